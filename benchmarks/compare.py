"""Policies compared under one protocol: ``python -m benchmarks.compare --game digits``.

Every policy prunes the same frozen backbone through the same runtime. Those that learn are trained,
or their runs under OUT/runs are taken. At each operating point, a share of the dense model's
compute, its knob is set on validation images; then it is judged on all test images and timed beside
timm's own dense model, in one process that does nothing else, in turns, its decisions included.

OUT/records.jsonl gets a line for each policy, seed and point as soon as it is measured. A call that
was killed goes on where it stood.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from tokenprune.benchmarks.entrants import ENTRANTS, Arena, Entrant, Entry, UnreachableError
from tokenprune.benchmarks.games import GAMES
from tokenprune.benchmarks.records import Record, Records, table
from tokenprune.envs.backbone import StagedViT
from tokenprune.envs.datasets import ImageSet, open_images
from tokenprune.envs.models import create_backbone
from tokenprune.envs.token_prune import pick_device
from tokenprune.trainers.checkpoint import CheckpointError
from tokenprune.trainers.evaluation import evaluate, speeds_of_fresh_process
from tokenprune.trainers.runs import RunError

SPEED_BATCH = 64
SPEED_IMAGES = 512
SPEED_ROUNDS = 9


@dataclass
class CompareConfig:
    """What is compared."""

    game: str = "digits"
    """digits, cifar10 or imagenet."""
    policies: tuple[str, ...] = ("mappo", "attention", "threshold", "ats", "random", "norm", "tome")
    """Who takes part; an unknown name lists them all."""
    seeds: int = 5
    """Trainings of each policy that learns, and draws of each that is random."""
    out: Path = Path("results")
    """Folder of the records and the runs."""
    data: str | None = None
    """The dataset, as folder:PATH; the game's own if not given."""
    backbone: str | None = None
    """The backbone; the game's own if not given."""
    checkpoint: Path | None = None
    """A file with the backbone's weights."""
    pretrained: bool = False
    """Download the backbone's weights."""
    points: tuple[float, ...] = ()
    """Operating points, shares of the dense model's compute; the game's own if none is given."""
    iterations: int | None = None
    """Iterations of each training; the game's own if not given."""
    eval_size: int = 1_000
    """Validation images on which knobs are set."""
    test_size: int | None = None
    """Test images; all of them if not given."""
    speed: bool = True
    """Time the policies. Nothing else should run then."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: int | None = None
    """CPU threads; torch's own choice if not given."""


def check(config: CompareConfig) -> None:
    """Refuses settings that can't be compared.

    Raises:
        ValueError: the message says which.
    """
    if config.game not in GAMES:
        raise ValueError(f"unknown game {config.game!r}: choose from {', '.join(GAMES)}")
    unknown = [name for name in config.policies if name not in ENTRANTS]
    if unknown or not config.policies:
        known = "; ".join(f"{name} ({entrant.title})" for name, entrant in ENTRANTS.items())
        raise ValueError(f"unknown policies {', '.join(unknown) or '()'}: there are {known}")
    for name in ("seeds", "eval_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if any(not 0 < point <= 1 for point in config.points):
        raise ValueError(f"points={config.points}: shares of the dense compute, in (0, 1]")


def open_arena(config: CompareConfig) -> tuple[Arena, ImageSet]:
    """Where policies meet, and the test images.

    Raises:
        ValueError: data or weights are not named, unknown or damaged.
    """
    game = GAMES[config.game]
    if config.backbone is not None:
        game = replace(game, backbone=config.backbone)
    base = game.config(config.data, config.checkpoint, config.pretrained)
    base = replace(base, device=config.device, threads=config.threads)
    if config.iterations is not None:
        base = replace(base, iterations=config.iterations)
    model = create_backbone(
        base.backbone, pretrained=base.pretrained, checkpoint=base.checkpoint, **base.model_kwargs
    )
    model = model.to(pick_device(config.device)).to(memory_format=torch.channels_last)
    data_config = resolve_model_data_config(model)
    arena = Arena(
        game=game,
        base=base,
        model=model.requires_grad_(False),
        backbone=StagedViT(model, game.prune_before),
        validation=open_images(base.dataset, "validation", data_config),
        size=config.eval_size,
        runs=config.out / "runs",
    )
    return arena, open_images(base.dataset, "test", data_config)


def entries(
    entrant: Entrant, arena: Arena, seed: int, points: list[float]
) -> Iterator[tuple[float, Entry]]:
    """The policy at each point that it can be brought to."""
    at = entrant.open(arena, seed)
    for point in points:
        try:
            yield point, at(point * arena.backbone.dense_macs / 1e9)
        except UnreachableError as error:
            print(f"  not at {point:.0%} of the dense compute: {error}", flush=True)


def compare(config: CompareConfig) -> list[Record]:
    """Measures what is not there yet; returns all records of the folder.

    Raises:
        ValueError: settings that don't go together, an unknown or damaged dataset or backbone, a
            folder of another game or of other settings.
        CheckpointError: a run in the folder is damaged.
        OSError: the disk is full or not writable.
    """
    records = Records(config.out, config.game)
    arena, test = open_arena(config)
    points = list(config.points or arena.game.points)
    dense_accuracy: float | None = None
    command = f"python -m benchmarks.compare {shlex.join(sys.argv[1:])}"
    for name in config.policies:
        entrant = ENTRANTS[name]
        for seed in range(config.seeds if entrant.is_seeded else 1):
            due = [point for point in points if not records.has(name, seed, point)]
            if not due:
                continue
            print(f"{name}, seed {seed}", flush=True)
            found = dict(entries(entrant, arena, seed, due))
            if not found:
                continue
            if dense_accuracy is None:
                dense_accuracy = accuracy(arena.model, test, config.test_size)
            speeds = timed(found, arena, test) if config.speed else {}
            rows = []
            for point, entry in found.items():
                result = evaluate(entry.model, test, config.test_size)
                row = {
                    "game": config.game,
                    "policy": name,
                    "seed": seed,
                    "point": point,
                    **entry.knobs,
                    "fine_tuned": entrant.fine_tunes,
                    "accuracy": result.accuracy,
                    "dense_accuracy": dense_accuracy,
                    "gmacs": result.gmacs,
                    "dense_gmacs": arena.backbone.dense_macs / 1e9,
                    "kept": list(result.kept),
                    "left": list(result.left),
                    "speedup": speeds.get(point),
                    "threads": torch.get_num_threads(),
                    "device": str(arena.backbone.device),
                    "command": command,
                }
                rows.append(row)
                print(
                    f"  {point:.0%}: accuracy {100 * row['accuracy']:.2f} of "
                    f"{100 * dense_accuracy:.2f} at {row['gmacs'] / row['dense_gmacs']:.1%}",
                    flush=True,
                )
            records.add(rows)
    return records.rows


@torch.inference_mode()
def accuracy(model: nn.Module, images: ImageSet, size: int | None) -> float:
    """Share of ``size`` images (all where None) that timm's own model gets right."""
    count = len(images) if size is None else min(size, len(images))
    chosen = [i * len(images) // count for i in range(count)]
    device = next(model.parameters()).device
    right = 0
    for start in range(0, count, SPEED_IMAGES):
        pixels, labels = images.load(chosen[start : start + SPEED_IMAGES])
        right += int((model(pixels.to(device)).argmax(1).cpu() == labels).sum())
    return right / count


def timed(found: dict[float, Entry], arena: Arena, images: ImageSet) -> dict[float, float]:
    """How many times faster than timm's dense model each is, at batches of ``SPEED_BATCH``."""
    pixels = speed_images(images).to(arena.backbone.device)
    models: dict[str, Any] = {"dense": arena.model} | {
        str(point): entry.model for point, entry in found.items()
    }
    speeds = speeds_of_fresh_process(models, pixels, SPEED_BATCH, SPEED_ROUNDS)
    return {point: speeds[str(point)] / speeds["dense"] for point in found}


def speed_images(images: ImageSet) -> Tensor:
    """``SPEED_IMAGES`` images, evenly spread, some of them twice where there are fewer."""
    chosen = [i * len(images) // SPEED_IMAGES for i in range(SPEED_IMAGES)]
    return images.load(chosen)[0]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    try:
        config = tyro.cli(CompareConfig, description=__doc__, args=arguments)
        check(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        rows = compare(config)
    except (ValueError, CheckpointError, RunError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(table(rows))


if __name__ == "__main__":
    main()
