"""Confidence intervals cover what they say, and know which images belong together."""

import numpy as np
import pytest

from prunevit.benchmarks import intervals
from prunevit.benchmarks.intervals import paired_difference, t_interval


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_over_few_seeds_cover_the_mean_95_times_in_100(seeds):
    drawn = np.random.default_rng(0).normal(94.0, 0.3, (seeds, 4_000))
    low, high = t_interval(drawn)
    covered = ((low <= 94.0) & (high >= 94.0)).mean()
    assert abs(covered - 0.95) < 0.012  # 3.5 standard errors of 4,000 draws


def test_one_seed_has_no_interval_and_equal_seeds_one_of_no_width():
    assert t_interval([94.2]) == (94.2, 94.2)
    assert t_interval([94.25] * 3) == (94.25, 94.25)


def draw(random, seeds, clusters, size, skill, spread):
    """Answers [S, I] of a method whose skill varies from seed to seed and from scan to scan."""
    hard = random.normal(0, 0.1, clusters).repeat(size)
    of_seed = random.normal(0, spread, (seeds, 1))
    return random.random((seeds, clusters * size)) < skill + of_seed + hard


@pytest.mark.parametrize(
    ("seeds", "others", "spread"),
    [(3, 3, 0.03), (5, 5, 0.03), (3, 3, 0.0), (5, 3, 0.03), (1, 3, 0.03)],
)
def test_paired_intervals_cover_the_difference(seeds, others, spread, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 499)
    intervals.draws.cache_clear()
    random = np.random.default_rng(1)
    clusters, trials, covered, apart = np.arange(60).repeat(5), 400, 0, 0
    for _ in range(trials):
        # what has one row has no seeds, as the dense model
        first, second = (
            draw(random, each, 60, 5, 0.7, spread * (each > 1)) for each in (seeds, others)
        )
        found = paired_difference(first, second, clusters)
        covered += found.low <= 0 <= found.high
        apart += found.is_apart
    assert covered + apart == trials
    # two means of few seeds: a t draw for each is a little wider than it need be
    assert 0.93 < covered / trials < 0.995
    intervals.draws.cache_clear()


def test_images_of_one_scan_count_once():
    random = np.random.default_rng(2)
    right = random.random((2, 1, 80)) < [[[0.9]], [[0.7]]]
    alone = paired_difference(*right, np.arange(80))
    copies = paired_difference(*right.repeat(9, axis=2), np.arange(80).repeat(9))
    naive = paired_difference(*right.repeat(9, axis=2), np.arange(720))
    assert alone.mean == pytest.approx(copies.mean) == pytest.approx(naive.mean)
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low, rel=0.05)
    assert naive.high - naive.low < 0.4 * (alone.high - alone.low)


def test_what_both_get_right_or_wrong_makes_no_difference():
    right = np.random.default_rng(3).random((1, 500)) < 0.5
    found = paired_difference(right, right, np.arange(500))
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert not found.is_apart


def test_other_numbers_of_images_are_refused():
    with pytest.raises(ValueError, match="500, 400 and 500"):
        paired_difference(np.ones((1, 500)), np.ones((1, 400)), np.arange(500))
