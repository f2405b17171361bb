"""95% confidence intervals: of a mean over seeds, and of a difference between two methods on the
same test images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

CONFIDENCE = 0.95
RESAMPLES = 1_999


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


@dataclass(frozen=True)
class Difference:
    """A difference in accuracy with its 95% interval.

    Attributes:
        mean: accuracy of the first method less that of the second.
        low: lower end of the interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def is_apart(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired_difference(first: ArrayLike, second: ArrayLike, clusters: ArrayLike) -> Difference:
    """A paired bootstrap over test images, in which images of one source are drawn together.

    Every resample draws clusters with replacement, the same ones for both methods. Seeds are
    resampled too: by a draw from Student's t distribution about their mean, with the spread of the
    seeds' accuracies, because drawing 3 or 5 seeds with replacement covers 74 or 84% in place of
    95%.

    Args:
        first: whether each seed of a method got each image right, bool [S1, I]. A method that has
            no seeds has one row.
        second: the same of another method, bool [S2, I].
        clusters: the source of each image, such as the number of its scan, int [I].

    Raises:
        ValueError: the methods were judged on different numbers of images.
    """
    right = [np.asarray(rows, dtype=np.float64) for rows in (first, second)]
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    if not right[0].shape[1] == right[1].shape[1] == len(cluster):
        shapes = f"{right[0].shape[1]}, {right[1].shape[1]} and {len(cluster)}"
        raise ValueError(f"methods and clusters are of different numbers of images: {shapes}")
    gain = right[0].mean(0) - right[1].mean(0)  # [I]
    sums = np.stack([np.bincount(cluster, gain), np.bincount(cluster)], axis=1)  # [C, 2]
    gains, images = (draws(len(sums)) @ sums.astype(np.float32)).T.astype(np.float64)
    resampled = gains / images
    random = np.random.default_rng(0)
    for rows in right:
        if (seeds := len(rows)) > 1:
            spread = rows.mean(1).std(ddof=1) / np.sqrt(seeds)
            resampled += spread * random.standard_t(seeds - 1, RESAMPLES)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(float(gain.mean()), float(low), float(high))


@lru_cache(maxsize=2)
def draws(clusters: int) -> NDArray[np.float32]:
    """How often each cluster is drawn in each resample, [RESAMPLES, C]. It is the same for all
    methods, so differences between them come from the methods alone.
    """
    random = np.random.default_rng(1)
    return random.multinomial(clusters, np.full(clusters, 1 / clusters), RESAMPLES).astype(
        np.float32
    )
