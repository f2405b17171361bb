from contextlib import ExitStack

import numpy as np
import pytest

from prunevit.benchmarks.machine import MIB
from prunevit.benchmarks.stress import soak as soaking
from prunevit.benchmarks.stress.soak import Sampler, SoakConfig, SoakError, check, soak
from prunevit.envs.data import cluttered_digits

SAMPLES = 200
NOISE = np.random.default_rng(0).normal(0, MIB / 4, SAMPLES)
EARLY = 100 * MIB * np.minimum(np.arange(SAMPLES) / 40, 1)
WALK = np.cumsum(np.random.default_rng(1).normal(0, MIB / 10, SAMPLES))


def checked(memory, files=None):
    return check("steps", [int(held) for held in memory], files or [5] * SAMPLES)


@pytest.mark.parametrize(
    "growth", [NOISE, EARLY + NOISE, WALK], ids=["noise", "what fills up at first", "correlated"]
)
def test_what_is_no_growth(growth):
    assert "slope" in checked(300 * MIB + growth)


def test_a_leak_is_named():
    leak = np.linspace(0, 20 * MIB, SAMPLES)
    with pytest.raises(SoakError, match=r"memory grows; steps: .* slope \+14\.9"):
        checked(300 * MIB + leak)


def test_files_that_stay_open_are_named():
    with pytest.raises(SoakError, match="open files grow"):
        checked(300 * MIB + NOISE, list(range(SAMPLES)))


@pytest.mark.stress
def test_a_short_soak_takes_its_samples(monkeypatch):
    monkeypatch.setattr(soaking, "SAMPLES", 8)
    for split in ("train", "validation"):
        monkeypatch.setitem(cluttered_digits.DEFAULT_SIZES, split, 40)
    seen = soak(SoakConfig(steps=32, iterations=8))
    assert list(seen) == ["32 game steps", "8 trainer iterations"]
    for each in seen.values():
        assert len(each.memory) == len(each.files) == 8
        assert min(each.memory) > 50 * MIB


def test_a_sample_counts_open_files(tmp_path):
    """Many of them: what else this process runs may open and close a few."""
    sample = Sampler(2)
    sample()
    with ExitStack() as opened:
        for i in range(60):
            opened.enter_context((tmp_path / str(i)).open("w"))
        sample()
    before, after = sample.files
    assert after - before > 40
