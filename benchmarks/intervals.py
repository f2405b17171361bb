"""95% confidence intervals of means over seeds."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

CONFIDENCE = 0.95


def t_interval(values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Student's t interval of the mean over the first axis, the seeds.

    It says where the mean over all possible seeds lies, not where one more seed would.

    Args:
        values: [S, ...].

    Returns:
        Lower and upper ends [...]. With one seed there is no interval: both are that seed's value.
    """
    values = np.asarray(values, dtype=np.float64)
    mean, count = values.mean(0), len(values)
    if count < 2:
        return mean, mean
    quantile = student_t.ppf((1 + CONFIDENCE) / 2, count - 1)
    half = quantile * values.std(0, ddof=1) / np.sqrt(count)
    return mean - half, mean + half
