"""Bootstrapped 95% confidence intervals of means."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

CONFIDENCE = 0.95
RESAMPLES = 9_999
CURVE_RESAMPLES = 1_999  # of many columns at once


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The interval of the mean (BCa); the value itself where there is only one, or all are equal.

    Args:
        values: one a seed.
    """
    if len(set(values)) < 2:
        return values[0], values[0]
    with warnings.catch_warnings():
        # with few values BCa's correction can be undefined; then the percentiles are used
        warnings.simplefilter("ignore")
        for method in ("BCa", "percentile"):
            found = bootstrap(
                (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES,
                method=method, rng=np.random.default_rng(0),
            ).confidence_interval  # fmt: skip
            if np.isfinite(found.low) and np.isfinite(found.high):
                break
    return float(found.low), float(found.high)


def intervals(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The interval (percentiles) of the mean of each column.

    Args:
        values: [seeds, columns].

    Returns:
        lower and upper ends, [columns] each.
    """
    if len(values) < 2:
        return values[0], values[0]
    found = bootstrap(
        (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=CURVE_RESAMPLES,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return found.low, found.high
