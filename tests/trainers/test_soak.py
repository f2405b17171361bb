"""Playing and training for long holds no more memory and no more files at the end. ``--soak FILE``
goes on for long, and writes what was held to FILE.
"""

import gc
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from prunevit.benchmarks.noise_images import NoiseImages
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data import cluttered_digits
from prunevit.envs.data.digits import IMAGE_SIZE
from prunevit.envs.game import TokenGame
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers import mappo
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.config import MappoConfig

PAGES = Path("/proc/self/statm")
FILES = Path("/proc/self/fd")
MIB = 2**20
SIGNIFICANT = 3.0  # a slope of more standard errors is not due to chance
NOISE_SHARE = 0.01  # less growth than this share of the memory held is noise
LONG = {"steps": 200_000, "iterations": 500, "samples": 200}
SHORT = {"steps": 32, "iterations": 8, "samples": 8}
EPISODES = 8  # at once
STAGES = (1, 2)

needs_proc = pytest.mark.skipif(not PAGES.is_file(), reason="needs Linux")


class Sampler:
    """Notes ``memory``, resident bytes, and ``files``, open ones, ``samples`` times in the course
    of ``total`` calls.
    """

    def __init__(self, total, samples):
        self.memory, self.files = [], []
        self._every = total // samples
        self._calls = 0

    def __call__(self):
        self._calls += 1
        if self._calls % self._every == 0:
            gc.collect()  # garbage is not a leak
            pages = int(PAGES.read_text(encoding="ascii").split()[1])
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
            self.files.append(len(list(FILES.iterdir())))


def check(memory, files):
    """Fails if more is held at the end, and says how much; the first quarter, in which caches and
    allocators fill up, does not count.
    """
    settled = np.asarray(memory[len(memory) // 4 :], dtype=np.float64)
    (slope, _), covariance = np.polyfit(np.linspace(0, 1, len(settled)), settled, 1, cov=True)
    error = covariance[0, 0] ** 0.5
    said = (
        f"{settled.mean() / MIB:.1f} MiB held, slope {slope / MIB:+.3f} +- {error / MIB:.3f} MiB, "
        f"open files {files[0]} at first, {files[-1]} at last"
    )
    assert slope <= max(SIGNIFICANT * error, NOISE_SHARE * settled.mean()), f"memory grows; {said}"
    assert files[-1] <= max(files[: len(files) // 2]), f"open files grow; {said}"
    return said


def play(steps, sample):
    """Plays random games, on tensors and through PettingZoo's API in turns."""
    torch.manual_seed(0)
    tiny = {"patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2}
    backbone = create_backbone(DIGITS_VIT, untrained=True, **tiny)
    images = NoiseImages((1, IMAGE_SIZE, IMAGE_SIZE))
    tensors = BatchedTokenPrune(TokenGame(StagedViT(backbone, STAGES)), images, EPISODES)
    dicts = TokenPruneEnv(backbone, images, prune_before=STAGES, device="cpu")
    for seed in range(0, steps, 2 * len(STAGES)):
        tensors.reset(seed)
        for _ in STAGES:
            tensors.step(torch.randint(2, (EPISODES, tensors.num_agents))).observations.living()
            sample()
        dicts.reset(seed)
        for _ in STAGES:
            dicts.step({agent: int(torch.randint(2, ())) for agent in dicts.agents})
            sample()


class SampledRecords(list):
    """A run's records, which takes a sample each time one is added."""

    def __init__(self, sample):
        super().__init__()
        self.sample = sample

    def append(self, record):
        super().append(record)
        self.sample()


def train(iterations, sample, folder):
    """Runs ``trainers.mappo`` up to its report."""
    config = MappoConfig(
        prune_before=STAGES, iterations=iterations, checkpoint_every=5, num_envs=2 * EPISODES,
        eval_every=10, eval_size=16, hidden=(8,), device="cpu", threads=1,
        run_name=str(folder),
    )  # fmt: skip
    run, config = mappo.open_run(config)
    run.records = SampledRecords(sample)
    mappo.learn(run, config)


@pytest.mark.stress
@needs_proc
def test_nothing_grows(request, tmp_path, monkeypatch):
    file = request.config.getoption("--soak")
    length = LONG if file else SHORT
    if not file:
        for split in ("train", "validation"):
            monkeypatch.setitem(cluttered_digits.DEFAULT_SIZES, split, 40)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    playing = Sampler(length["steps"], length["samples"])
    training = Sampler(length["iterations"], length["samples"])
    gc.collect()
    gc.freeze()  # objects of before need not be collected each time
    try:
        play(length["steps"], playing)
        train(length["iterations"], training, tmp_path / "run")
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
    seen = {
        f"{length['steps']} game steps": playing,
        f"{length['iterations']} trainer iterations": training,
    }
    for sampler in seen.values():
        assert len(sampler.memory) == len(sampler.files) == length["samples"]
        assert min(sampler.memory) > 50 * MIB
    if file:
        write_json(
            Path(file), {name: {"memory": s.memory, "files": s.files} for name, s in seen.items()}
        )
        for name, sampler in seen.items():
            print(f"{name}: {check(sampler.memory, sampler.files)}")


# --- the check itself ---

NOISE = np.random.default_rng(0).normal(0, MIB / 4, LONG["samples"])
EARLY = 100 * MIB * np.minimum(np.arange(LONG["samples"]) / 40, 1)
WALK = np.cumsum(np.random.default_rng(1).normal(0, MIB / 10, LONG["samples"]))


def checked(memory, files=None):
    return check([int(held) for held in memory], files or [5] * len(memory))


@pytest.mark.parametrize(
    "growth", [NOISE, EARLY + NOISE, WALK], ids=["noise", "what fills up at first", "correlated"]
)
def test_what_is_no_growth(growth):
    assert "slope" in checked(300 * MIB + growth)


def test_a_leak_is_named():
    leak = np.linspace(0, 20 * MIB, LONG["samples"])
    with pytest.raises(AssertionError, match=r"memory grows; .* slope \+14\.9"):
        checked(300 * MIB + leak)


def test_files_that_stay_open_are_named():
    with pytest.raises(AssertionError, match="open files grow"):
        checked(300 * MIB + NOISE, list(range(LONG["samples"])))


@needs_proc
def test_a_sample_counts_open_files(tmp_path):
    """Many of them: what else this process runs may open and close a few."""
    sample = Sampler(2, 2)
    sample()
    with ExitStack() as opened:
        for i in range(60):
            opened.enter_context((tmp_path / str(i)).open("w"))
        sample()
    before, after = sample.files
    assert after - before > 40
