"""Looks for leaks: ``python -m benchmarks.stress.soak``.

Plays and trains on a tiny game for a long time. Fails if the resident memory or the number of open
files grows, judged by the slope of a line fitted to regular samples and its standard error. Linux
only.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from prunevit.benchmarks.machine import MIB
from prunevit.benchmarks.noise_images import NoiseImages
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.cluttered_digits import ClutteredDigits
from prunevit.envs.data.digits import IMAGE_SIZE
from prunevit.envs.game import TokenGame
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers import mappo
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.signals import ends_in_one_line

PAGES = Path("/proc/self/statm")
FILES = Path("/proc/self/fd")
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
SIGNIFICANT = 3.0  # a slope of more standard errors is not due to chance
NOISE_SHARE = 0.01  # less growth than this share of the memory held is noise
EPISODES = 8  # at once
# 16 patches of a digit
TINY: dict[str, Any] = {"patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2}
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
    samples: int = 200
    """Samples of memory and files in each of the two."""
    out: Path | None = None
    """Also write the figures to this JSON file."""


@dataclass
class Growth:
    """Samples taken while something ran.

    Attributes:
        memory: resident bytes of each sample.
        files: open files of each sample.
    """

    memory: list[int]
    files: list[int]

    def settled(self) -> NDArray[np.float64]:
        """The memory without the first quarter, in which caches and allocators fill up."""
        return np.asarray(self.memory[len(self.memory) // 4 :], dtype=np.float64)

    @property
    def slope(self) -> tuple[float, float]:
        """The growth in bytes over the settled samples by a fitted straight line, and its standard
        error if samples are independent.
        """
        held = self.settled()
        place = np.linspace(-0.5, 0.5, len(held))
        slope = float(place @ held / (place @ place))
        rest = held - held.mean() - slope * place
        return slope, float(rest.std() / np.linalg.norm(place))

    def check(self, what: str) -> str:
        """Describes the growth in a line.

        Raises:
            SoakError: memory grew by more than noise, or files grew.
        """
        slope, error = self.slope
        held = self.settled().mean()
        said = (
            f"{what}: {held / MIB:.1f} MiB held, slope {slope / MIB:+.3f} +- {error / MIB:.3f} MiB "
            f"over the settled part, open files {self.files[0]} at first, {self.files[-1]} at last"
        )
        if slope > SIGNIFICANT * error and slope > NOISE_SHARE * held:
            raise SoakError(f"memory grows; {said}")
        if self.files[-1] > max(self.files[: len(self.files) // 2]):
            raise SoakError(f"open files grow; {said}")
        return said


class Sampler:
    """Takes ``samples`` samples in the course of ``total`` calls."""

    def __init__(self, total: int, samples: int) -> None:
        self._every = max(total // samples, 1)
        self._calls = 0
        self.growth = Growth([], [])

    def __call__(self) -> None:
        self._calls += 1
        if self._calls % self._every:
            return
        gc.collect()  # garbage is not a leak
        self.growth.memory.append(int(PAGES.read_text(encoding="ascii").split()[1]) * PAGE_SIZE)
        self.growth.files.append(len(list(FILES.iterdir())))


def play(steps: int, sample: Callable[[], None]) -> None:
    """Plays random games, on tensors and through PettingZoo's API in turns."""
    torch.manual_seed(0)
    backbone = create_backbone(DIGITS_VIT, untrained=True, **TINY)
    images = NoiseImages((1, IMAGE_SIZE, IMAGE_SIZE))
    tensors = BatchedTokenPrune(TokenGame(StagedViT(backbone, STAGES)), images, EPISODES)
    dicts = TokenPruneEnv(backbone, images, prune_before=STAGES, device="cpu")
    generator = torch.Generator().manual_seed(0)
    done = 0
    while done < steps:
        tensors.reset(done)
        for _ in STAGES:
            shape = (EPISODES, tensors.num_agents)
            observed = tensors.step(torch.randint(2, shape, generator=generator)).observations
            observed.living()
            sample()
        dicts.reset(done)
        for _ in STAGES:
            chosen = torch.randint(2, (len(dicts.agents),), generator=generator).tolist()
            if dicts.agents:
                dicts.step(dict(zip(dicts.agents, chosen, strict=True)))
            sample()
        done += 2 * len(STAGES)


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
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        weights = Path(folder) / "tiny.safetensors"
        classes = ClutteredDigits.num_classes
        backbone = create_backbone(DIGITS_VIT, untrained=True, **TINY)
        write_weights(weights, backbone.state_dict(), DIGITS_VIT, classes, TINY)
        config = MappoConfig(
            checkpoint=weights, prune_before=STAGES, iterations=iterations, checkpoint_every=5,
            num_envs=2 * EPISODES, eval_every=10, eval_size=16, hidden=(8,), device="cpu",
            threads=1, run_name=str(Path(folder) / "run"),
        )  # fmt: skip
        run, config = mappo.open_run(config)
        run.records = SampledRecords(sample)
        with (
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            experiment, _ = mappo.learn(run, config)
        experiment.env.close()


def soak(config: SoakConfig) -> dict[str, Growth]:
    """Plays and trains; returns the samples of each."""
    torch.set_num_threads(1)
    playing, training = (Sampler(n, config.samples) for n in (config.steps, config.iterations))
    gc.collect()
    gc.freeze()  # objects of before need not be collected each time
    try:
        play(config.steps, playing)
        train(config.iterations, training)
    finally:
        gc.unfreeze()
    return {
        f"{config.steps} game steps": playing.growth,
        f"{config.iterations} trainer iterations": training.growth,
    }


def main() -> None:
    """The command line."""
    with ends_in_one_line(SoakError, ValueError, OSError):
        config = tyro.cli(SoakConfig, description=__doc__, prog="python -m benchmarks.stress.soak")
        if min(config.steps, config.iterations) < config.samples or config.samples < 8:
            raise ValueError("give at least 8 samples, and as many steps and iterations as those")
        seen = soak(config)
        if config.out is not None:
            write_json(config.out, {name: vars(growth) for name, growth in seen.items()})
        for name, growth in seen.items():
            print(growth.check(name))


if __name__ == "__main__":
    main()
