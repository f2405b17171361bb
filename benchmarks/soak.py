"""Does anything grow? ``python -m benchmarks.soak``.

Plays and trains on a tiny game for a long time, and prints how the resident memory and the number
of open files went: a line fitted to the samples taken on the way, beside how far they lie off it.
On Linux.
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

from prunevit.benchmarks.iterations import Noise
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import ClutteredDigits
from prunevit.envs.data.digits import IMAGE_SIZE
from prunevit.envs.game import TokenGame
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers.common import runs
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.signals import ends_in_one_line

PAGES = Path("/proc/self/statm")
FILES = Path("/proc/self/fd")
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
SIGNIFICANT = 3.0  # standard errors from which on a slope is none by chance
NOISE_SHARE = 0.01  # of the memory held: less growth than that over the whole soak is noise
MIB = 2**20
EPISODES = 8  # at once
# 16 patches of a digit
TINY: dict[str, Any] = {"patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2}
STAGES = (1, 2)


class SoakError(RuntimeError):
    """Something grew."""


@dataclass
class SoakConfig:
    """How long."""

    steps: int = 200_000
    """Steps of the game, half of them on tensors and half through PettingZoo's API, each of which
    moves a number of episodes on by one stage."""
    iterations: int = 500
    """Iterations of the trainer, with its logs, evaluations and checkpoints."""
    samples: int = 200
    """Looks at memory and files in each of the two."""
    out: Path | None = None
    """Also write the figures to this JSON file."""


@dataclass
class Growth:
    """What was seen of memory and files while something ran.

    Attributes:
        memory: bytes held at each look.
        files: open files at each look.
    """

    memory: list[int]
    files: list[int]

    def settled(self) -> NDArray[np.float64]:
        """Without the first quarter: caches fill up, and allocators take what they will need."""
        return np.asarray(self.memory[len(self.memory) // 4 :], dtype=np.float64)

    @property
    def slope(self) -> tuple[float, float]:
        """Bytes from the first to the last settled look by a straight line fitted to them, and its
        standard error, looks taken as independent.
        """
        held = self.settled()
        place = np.linspace(-0.5, 0.5, len(held))
        slope = float(place @ held / (place @ place))
        rest = held - held.mean() - slope * place
        return slope, float(rest.std() / np.linalg.norm(place))

    def check(self, what: str) -> str:
        """What there is to say, in a line.

        Raises:
            SoakError: memory grew by more than noise, or files by any.
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


class Looks:
    """Takes ``samples`` looks in the course of ``total`` calls."""

    def __init__(self, total: int, samples: int) -> None:
        self._every = max(total // samples, 1)
        self._calls = 0
        self.seen = Growth([], [])

    def __call__(self) -> None:
        self._calls += 1
        if self._calls % self._every:
            return
        gc.collect()  # what waits for the collector has not leaked
        self.seen.memory.append(int(PAGES.read_text(encoding="ascii").split()[1]) * PAGE_SIZE)
        self.seen.files.append(len(list(FILES.iterdir())))


def play(steps: int, look: Callable[[], None]) -> None:
    """Random games, on tensors and through PettingZoo's API in turns."""
    torch.manual_seed(0)
    backbone = create_backbone(DIGITS_VIT, untrained=True, **TINY)
    images = Noise((1, IMAGE_SIZE, IMAGE_SIZE))
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
            look()
        dicts.reset(done)
        for _ in STAGES:
            chosen = torch.randint(2, (len(dicts.agents),), generator=generator).tolist()
            if dicts.agents:
                dicts.step(dict(zip(dicts.agents, chosen, strict=True)))
            look()
        done += 2 * len(STAGES)


class Watched(list[dict[str, float]]):
    """A run's records, which looks each time one is added."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self._look = look

    def append(self, record: dict[str, float]) -> None:
        super().append(record)
        self._look()


def train(iterations: int, look: Callable[[], None]) -> None:
    """A run of ``trainers.mappo`` up to its report."""
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
        run = runs.open_run(config)
        run.records = Watched(look)
        with (
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            task, _, _ = runs.learn(run)
        task.env.close()


def soak(config: SoakConfig) -> dict[str, Growth]:
    """Plays and trains; what was seen meanwhile."""
    torch.set_num_threads(1)
    playing, training = (Looks(n, config.samples) for n in (config.steps, config.iterations))
    gc.collect()
    gc.freeze()  # what was there before need not be looked through each time
    try:
        play(config.steps, playing)
        train(config.iterations, training)
    finally:
        gc.unfreeze()
    return {
        f"{config.steps} game steps": playing.seen,
        f"{config.iterations} trainer iterations": training.seen,
    }


def main() -> None:
    """The command line."""
    with ends_in_one_line(SoakError, ValueError, OSError):
        config = tyro.cli(SoakConfig, description=__doc__)
        if min(config.steps, config.iterations) < config.samples or config.samples < 8:
            raise ValueError("give at least 8 samples, and as many steps and iterations as those")
        seen = soak(config)
        if config.out is not None:
            write_json(config.out, {name: vars(growth) for name, growth in seen.items()})
        for name, growth in seen.items():
            print(growth.check(name))


if __name__ == "__main__":
    main()
