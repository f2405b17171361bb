"""Confidence intervals over few seeds cover what they say."""

import numpy as np
import pytest

from prunevit.benchmarks.intervals import t_interval


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_over_few_seeds_cover_the_mean_95_times_in_100(seeds):
    drawn = np.random.default_rng(0).normal(94.0, 0.3, (seeds, 4_000))
    low, high = t_interval(drawn)
    covered = ((low <= 94.0) & (high >= 94.0)).mean()
    assert abs(covered - 0.95) < 0.012  # 3.5 standard errors of 4,000 draws


def test_one_seed_has_no_interval_and_equal_seeds_one_of_no_width():
    assert t_interval([94.2]) == (94.2, 94.2)
    assert t_interval([94.25] * 3) == (94.25, 94.25)
