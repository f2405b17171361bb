from contextlib import ExitStack

import numpy as np
import pytest

from prunevit.benchmarks.machine import MIB
from prunevit.benchmarks.stress.soak import Growth, Sampler, SoakConfig, SoakError, soak
from prunevit.envs.data import cluttered_digits

SAMPLES = 200
NOISE = np.random.default_rng(0).normal(0, MIB / 4, SAMPLES)


def growth(memory, files=None):
    return Growth([int(held) for held in memory], files or [5] * SAMPLES)


def test_noise_is_no_growth():
    assert "slope" in growth(300 * MIB + NOISE).check("steps")


def test_what_fills_up_at_first_is_no_growth():
    early = 100 * MIB * np.minimum(np.arange(SAMPLES) / 40, 1)
    growth(300 * MIB + early + NOISE).check("steps")


def test_correlated_samples_are_no_growth():
    walk = np.cumsum(np.random.default_rng(1).normal(0, MIB / 10, SAMPLES))
    growth(300 * MIB + walk).check("steps")


def test_the_slope_has_a_standard_error():
    slopes = []
    for seed in range(50):
        noise = np.random.default_rng(seed).normal(0, MIB, SAMPLES)
        slope, error = growth(300 * MIB + np.linspace(0, 8 * MIB, SAMPLES) + noise).slope
        slopes.append(slope)
    assert np.mean(slopes) == pytest.approx(6 * MIB, rel=0.05)
    assert np.std(slopes) == pytest.approx(error, rel=0.4)


def test_a_leak_is_named():
    leak = np.linspace(0, 20 * MIB, SAMPLES)
    with pytest.raises(SoakError, match=r"memory grows; steps: .* slope \+14\.9"):
        growth(300 * MIB + leak).check("steps")


def test_files_that_stay_open_are_named():
    with pytest.raises(SoakError, match="open files grow"):
        growth(300 * MIB + NOISE, list(range(SAMPLES))).check("steps")


@pytest.mark.stress
def test_a_short_soak_takes_its_samples(monkeypatch):
    for split in ("train", "validation"):
        monkeypatch.setitem(cluttered_digits.DEFAULT_SIZES, split, 40)
    seen = soak(SoakConfig(steps=32, iterations=8, samples=8))
    assert list(seen) == ["32 game steps", "8 trainer iterations"]
    for each in seen.values():
        assert len(each.memory) == len(each.files) == 8
        assert min(each.memory) > 50 * MIB


def test_a_sample_counts_open_files(tmp_path):
    """Many of them: what else this process runs may open and close a few."""
    sample = Sampler(2, 2)
    sample()
    with ExitStack() as opened:
        for i in range(60):
            opened.enter_context((tmp_path / str(i)).open("w"))
        sample()
    before, after = sample.growth.files
    assert after - before > 40
