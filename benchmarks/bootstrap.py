"""Bootstrapped 95% confidence intervals of means."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap

RESAMPLES = 9_999


def interval(values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper ends of the mean's interval (BCa) over the first axis, the seeds; the value
    itself where there is only one, or all are equal.
    """
    values = np.asarray(values, dtype=np.float64)
    low = high = values[0]
    if len(values) < 2:
        return low, high
    open = ~(values == low).all(0)
    # with few values BCa's correction can be undefined; then the percentiles are used
    for method in ("percentile", "BCa"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = bootstrap(
                (values,), np.mean, axis=0, confidence_level=0.95, n_resamples=RESAMPLES,
                method=method, rng=np.random.default_rng(0),
            ).confidence_interval  # fmt: skip
        defined = open & np.isfinite(found.low) & np.isfinite(found.high)
        low, high = np.where(defined, found.low, low), np.where(defined, found.high, high)
    return low, high
