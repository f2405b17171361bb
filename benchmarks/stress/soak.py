"""Looks for leaks: ``python -m benchmarks.stress.soak``.

Plays and trains on a small game for a long time. Fails if the resident memory or the number of open
files grows, judged by the slope of a line fitted to regular samples and its standard error. Linux
only.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from scipy.stats import linregress

from prunevit.benchmarks.machine import MIB
from prunevit.benchmarks.noise_images import NoiseImages
from prunevit.benchmarks.stress.kill_storm import silence
from prunevit.cli import prog
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.digits import IMAGE_SIZE
from prunevit.envs.game import TokenGame
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers import mappo
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.signals import ends_in_one_line

PAGES = Path("/proc/self/statm")
FILES = Path("/proc/self/fd")
SIGNIFICANT = 3.0  # a slope of more standard errors is not due to chance
NOISE_SHARE = 0.01  # less growth than this share of the memory held is noise
SAMPLES = 200
EPISODES = 8  # at once
STAGES = (1, 2)


class SoakError(RuntimeError):
    """Something grew."""


@dataclass
class SoakConfig:
    """How long it runs."""

    steps: int = 200_000
    """Steps of the game, half of them on tensors and half through PettingZoo's API, each of which
    moves a number of episodes on by one stage."""
    iterations: int = 500
    """Iterations of the trainer, with its logs, evaluations and checkpoints."""
    out: Path | None = None
    """Also write the figures to this JSON file."""


class Sampler:
    """Takes ``SAMPLES`` samples in the course of ``total`` calls.

    Attributes:
        memory: resident bytes of each sample.
        files: open files of each sample.
    """

    def __init__(self, total: int) -> None:
        self.memory: list[int] = []
        self.files: list[int] = []
        self._every = max(total // SAMPLES, 1)
        self._calls = 0

    def __call__(self) -> None:
        self._calls += 1
        if self._calls % self._every == 0:
            gc.collect()  # garbage is not a leak
            pages = int(PAGES.read_text(encoding="ascii").split()[1])
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
            self.files.append(len(list(FILES.iterdir())))


def check(what: str, memory: list[int], files: list[int]) -> str:
    """Describes the growth in a line.

    Args:
        what: was done.
        memory: resident bytes of each sample. The first quarter, in which caches and allocators
            fill up, does not count.
        files: open files of each sample.

    Raises:
        SoakError: memory grew by more than noise, or files grew.
    """
    settled = np.asarray(memory[len(memory) // 4 :], dtype=np.float64)
    fit = linregress(np.linspace(0, 1, len(settled)), settled)
    said = (
        f"{what}: {settled.mean() / MIB:.1f} MiB held, slope {fit.slope / MIB:+.3f} +- "
        f"{fit.stderr / MIB:.3f} MiB over the settled part, open files {files[0]} at first, "
        f"{files[-1]} at last"
    )
    if fit.slope > max(SIGNIFICANT * fit.stderr, NOISE_SHARE * settled.mean()):
        raise SoakError(f"memory grows; {said}")
    if files[-1] > max(files[: len(files) // 2]):
        raise SoakError(f"open files grow; {said}")
    return said


def play(steps: int, sample: Callable[[], None]) -> None:
    """Plays random games, on tensors and through PettingZoo's API in turns."""
    torch.manual_seed(0)
    tiny: dict[str, Any] = {"patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2}
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
            if dicts.agents:
                dicts.step({agent: int(torch.randint(2, ())) for agent in dicts.agents})
            sample()


class SampledRecords(list[dict[str, float]]):
    """A run's records, which takes a sample each time one is added."""

    def __init__(self, sample: Callable[[], None]) -> None:
        super().__init__()
        self._sample = sample

    def append(self, record: dict[str, float]) -> None:
        super().append(record)
        self._sample()


def train(iterations: int, sample: Callable[[], None]) -> None:
    """Runs ``trainers.mappo`` up to its report."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, silence():
        config = MappoConfig(
            prune_before=STAGES, iterations=iterations, checkpoint_every=5, num_envs=2 * EPISODES,
            eval_every=10, eval_size=16, hidden=(8,), device="cpu", threads=1,
            run_name=str(Path(folder) / "run"),
        )  # fmt: skip
        run, config = mappo.open_run(config)
        run.records = SampledRecords(sample)
        experiment, _ = mappo.learn(run, config)
        experiment.env.close()


def soak(config: SoakConfig) -> dict[str, Sampler]:
    """Plays and trains; returns the samples of each."""
    torch.set_num_threads(1)
    playing, training = Sampler(config.steps), Sampler(config.iterations)
    gc.collect()
    gc.freeze()  # objects of before need not be collected each time
    try:
        play(config.steps, playing)
        train(config.iterations, training)
    finally:
        gc.unfreeze()
    return {
        f"{config.steps} game steps": playing,
        f"{config.iterations} trainer iterations": training,
    }


def main() -> None:
    """The command line."""
    with ends_in_one_line(SoakError, ValueError, OSError):
        config = tyro.cli(SoakConfig, description=__doc__, prog=prog())
        if min(config.steps, config.iterations) < SAMPLES:
            raise ValueError(f"give at least {SAMPLES} steps and iterations")
        samples = {
            name: {"memory": sampler.memory, "files": sampler.files}
            for name, sampler in soak(config).items()
        }
        if config.out is not None:
            write_json(config.out, samples)
        for name, sampled in samples.items():
            print(check(name, **sampled))


if __name__ == "__main__":
    main()
