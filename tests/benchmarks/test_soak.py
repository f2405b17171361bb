import numpy as np
import pytest

from tokenprune.benchmarks.soak import MIB, Growth, SoakConfig, SoakError, soak

LOOKS = 200
NOISE = np.random.default_rng(0).normal(0, MIB / 4, LOOKS)


def growth(memory, files=None):
    return Growth([int(held) for held in memory], files or [5] * LOOKS)


def test_noise_is_no_growth():
    assert "slope" in growth(300 * MIB + NOISE).check("steps")


def test_what_fills_up_at_first_is_no_growth():
    early = 100 * MIB * np.minimum(np.arange(LOOKS) / 40, 1)
    growth(300 * MIB + early + NOISE).check("steps")


def test_a_walk_is_not_taken_for_a_line():
    walk = np.cumsum(np.random.default_rng(1).normal(0, MIB / 10, LOOKS))
    slope, error = growth(300 * MIB + walk - walk.mean()).slope
    assert abs(slope) < 6 * error


def test_a_leak_is_named():
    leak = np.linspace(0, 20 * MIB, LOOKS)
    with pytest.raises(SoakError, match=r"memory grows; steps: .* slope \+15\.0"):
        growth(300 * MIB + leak).check("steps")


def test_files_that_stay_open_are_named():
    with pytest.raises(SoakError, match="open files grow"):
        growth(300 * MIB + NOISE, list(range(LOOKS))).check("steps")


def test_a_short_soak_looks_as_often_as_it_should():
    seen = soak(SoakConfig(steps=80, iterations=16, samples=8))
    assert list(seen) == ["80 game steps", "16 trainer iterations"]
    for each in seen.values():
        assert len(each.memory) == len(each.files) == 8
        assert min(each.memory) > 50 * MIB
        assert each.files[-1] <= each.files[0]
