"""Policies compared under one protocol: ``python -m benchmarks.compare --game digits``.

Every policy prunes the same frozen backbone through the same runtime. Those that learn are trained,
or their runs under OUT/runs are taken. At each operating point, a share of the dense model's
compute, its knob is set on validation images; then it is judged on all test images. At the end all
are timed beside timm's own dense model, in one process that does nothing else, in turns, decisions
included: on a machine that should do nothing else either. ``--no-speed`` leaves that for later: the
same call without it then does nothing but time what has no speed yet.

OUT/records.jsonl gets a line for each policy, seed and point as soon as it is measured. A call that
was killed goes on where it stood. OUT/curves.jsonl and OUT/pictures.npz hold what the figures show
beside records.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tyro
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from prunevit.agents.pruned_vit import PrunedViT
from prunevit.benchmarks.arena import Arena, Bound, Contender, Knobs, UnreachableError
from prunevit.benchmarks.entrants import ENTRANTS
from prunevit.benchmarks.games import GAMES
from prunevit.benchmarks.measuring import Timing, hardware, speedup
from prunevit.benchmarks.records import Record, Records, table
from prunevit.benchmarks.shown import Curves, take_pictures
from prunevit.benchmarks.trained import middle_point
from prunevit.envs.data.datasets import ImageSet, open_images
from prunevit.envs.token_prune import pick_device
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import sha256
from prunevit.trainers.common.checkpoint import CheckpointError
from prunevit.trainers.common.classification import versions
from prunevit.trainers.common.evaluation import Evaluation, Stopwatch, evaluate, evaluate_traces
from prunevit.trainers.common.run_folder import TrainingError
from prunevit.trainers.common.runs import RunError

SPEED_BATCH = 64
SPEED_IMAGES = 256
SPEED_ROUNDS = 9
PICTURED = ("mappo", "mappo-fine-tuned", "dynamic-vit", "attention")  # of seed 0


@dataclass
class CompareConfig:
    """What is compared."""

    game: str = "digits"
    """digits, cifar10 or imagenet."""
    policies: tuple[str, ...] = (
        "mappo", "dynamic-vit", "attention", "threshold", "ats", "evit", "tome", "random", "norm",
    )  # fmt: skip
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
    """Time at the end what has no speed yet. Nothing else should run then."""
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
    game = replace(
        game,
        backbone=config.backbone or game.backbone,
        points=tuple(config.points or game.points),
    )
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
        iterations=config.iterations,
        model=model.requires_grad_(False),
        backbone=StagedViT(model, game.prune_before),
        validation=open_images(base.dataset, "validation", data_config),
        size=config.eval_size,
        runs=config.out / "runs",
    )
    return arena, open_images(base.dataset, "test", data_config)


def settings_of(config: CompareConfig, arena: Arena, test: ImageSet) -> dict[str, Any]:
    """What all records of a folder have in common."""
    base = arena.base
    return {
        "backbone": base.backbone,
        "model_kwargs": base.model_kwargs,
        "weights": sha256(base.checkpoint) if base.checkpoint else None,
        "pretrained": base.pretrained,
        "dataset": base.dataset,
        "prune_before": list(arena.game.prune_before),
        "iterations": config.iterations,
        "eval_size": config.eval_size,
        "test_size": len(test) if config.test_size is None else min(config.test_size, len(test)),
    }


def compare(config: CompareConfig) -> list[Record]:
    """Measures what is not there yet; returns all records of the folder.

    Raises:
        ValueError: settings that don't go together, an unknown or damaged dataset or backbone, a
            folder of another game or of other settings.
        CheckpointError: a run in the folder is damaged.
        RunError, TrainingError: a training can't begin, or diverged.
        OSError: the disk is full or not writable.
    """
    records = Records(config.out, config.game)
    arena, test = open_arena(config)
    settings = settings_of(config, arena, test)
    records.require(settings)
    field = [
        (name, seed)
        for name in config.policies
        for seed in range(config.seeds if ENTRANTS[name].is_seeded else 1)
    ]
    # the same for all records of as many images
    dense_of = cache(lambda size: dense_accuracy(arena.model, test, size))
    for name, seed in field:
        measure(name, seed, settings, records, arena, test, dense_of)
    leave_curves(field, config.out, arena)
    leave_pictures(field, config.out, records, arena, test)
    if config.speed:
        time_what_has_no_speed(field, records, arena, test)
    return records.rows


def measure(
    name: str,
    seed: int,
    settings: dict[str, Any],
    records: Records,
    arena: Arena,
    test: ImageSet,
    dense_of: Callable[[int], float],
) -> None:
    """Trains a policy where that is due, and judges it at each point that has no record.

    Args:
        name: of the policy.
        seed: of its training, or its draws.
        settings: what its records share with all others.
        records: those that there are; gets the new ones.
        arena: where policies meet.
        test: the images that judge.
        dense_of: the dense model's accuracy on so many of them.
    """
    entrant = ENTRANTS[name]
    due = [point for point in arena.game.points if not records.has(name, seed, point)]
    if not due:
        return
    print(f"{name}, seed {seed}", flush=True)
    contender = entrant.open(arena, seed)
    size = settings["test_size"]
    if isinstance(contender, Bound):
        size = min(size, contender.images)
    for point in due:
        try:
            knobs = contender.tune(arena.gmacs_at(point))
        except UnreachableError as error:
            print(f"  not at {point:.0%} of the dense compute: {error}", flush=True)
            continue
        result = judged(contender, knobs, arena, test, size)
        row = {
            "game": arena.game.name,
            "policy": name,
            "seed": seed,
            "point": point,
            **knobs,
            "fine_tuned": entrant.fine_tunes,
            "accuracy": result.accuracy,
            "dense_accuracy": dense_of(size),
            "images": size,
            "gmacs": result.gmacs,
            "dense_gmacs": arena.backbone.dense_macs / 1e9,
            "kept": list(result.kept),
            "left": list(result.left),
            "speedup": None,
            **where(arena),
            "versions": versions(),
            "settings": settings,
            "command": command(),
        }
        records.add([row])
        print(
            f"  {point:.0%}: accuracy {100 * row['accuracy']:.2f} of "
            f"{100 * row['dense_accuracy']:.2f} at {row['gmacs'] / row['dense_gmacs']:.1%}",
            flush=True,
        )


def where(arena: Arena) -> dict[str, Any]:
    """What a record says of the machine."""
    device = arena.backbone.device
    return {
        "threads": torch.get_num_threads(),
        "device": str(device),
        "hardware": hardware(device),
    }


def command() -> str:
    """The call, as it would be typed again."""
    return f"python -m benchmarks.compare {shlex.join(sys.argv[1:])}"


def judged(
    contender: Contender | Bound, knobs: Knobs, arena: Arena, images: ImageSet, size: int
) -> Evaluation:
    """What it does on ``size`` images."""
    if isinstance(contender, Bound):
        return evaluate_traces(contender.search(knobs), arena.backbone, images, size)
    return evaluate(contender.make(knobs), images, size)


@torch.inference_mode()
def dense_accuracy(model: nn.Module, images: ImageSet, size: int) -> float:
    """Share of ``size`` images that timm's own model gets right."""
    chosen = [i * len(images) // size for i in range(size)]
    device = next(model.parameters()).device
    right = 0
    for start in range(0, size, SPEED_IMAGES):
        pixels, labels = images.load(chosen[start : start + SPEED_IMAGES])
        right += int((model(pixels.to(device)).argmax(1).cpu() == labels).sum())
    return right / size


def leave_curves(field: Sequence[tuple[str, int]], out: Path, arena: Arena) -> None:
    """Notes for the figures how the trainings of ``field`` went, as far as their runs are there."""
    curves = Curves(out)
    for name, seed in field:
        metrics = arena.runs / f"{name}-{seed}" / "metrics.jsonl"
        # fine-tuning goes in epochs
        if metrics.is_file() and not ENTRANTS[name].fine_tunes:
            curves.add(name, seed, metrics)


def leave_pictures(
    field: Sequence[tuple[str, int]], out: Path, records: Records, arena: Arena, test: ImageSet
) -> None:
    """Notes for the figures what is left of a few images at the middle operating point."""
    models = {}
    for name, seed in field:
        row = records.find(name, seed, middle_point(arena))
        if seed or name not in PICTURED or row is None:
            continue
        try:
            model = rebuilt(row, arena)
        except ValueError as error:
            print(f"no pictures of {name}: {error}", flush=True)
            continue
        assert isinstance(model, PrunedViT)
        models[name] = model
    if models:
        take_pictures(out, models, test, arena.backbone)


def rebuilt(row: Record, arena: Arena) -> nn.Module | None:
    """The model of a record, from its knobs and, where it was trained, its run; None where there is
    no such model to deploy.

    Raises:
        ValueError: the run is gone or damaged.
    """
    contender = ENTRANTS[row["policy"]].open(arena, row["seed"])
    if isinstance(contender, Bound):
        return None
    model = contender.make(row)
    assert isinstance(model, nn.Module)
    return model


def time_what_has_no_speed(
    field: Sequence[tuple[str, int]], records: Records, arena: Arena, images: ImageSet
) -> None:
    """Writes into the records how many times faster than timm's dense model each is, at batches of
    ``SPEED_BATCH``: the median of the rounds' own ratios. Nothing is trained or judged again.
    """
    pixels = speed_images(images).to(arena.backbone.device)
    with Stopwatch() as watch:
        for name, seed in field:
            rows = {
                str(row["point"]): row
                for row in records.rows
                if (row["policy"], row["seed"]) == (name, seed)
                and row["speedup"] is None
                and row["point"] in arena.game.points
            }
            try:
                models = {key: rebuilt(row, arena) for key, row in rows.items()}
            except ValueError as error:
                print(f"{name}, seed {seed} can't be timed: {error}", flush=True)
                continue
            timed = {key: model for key, model in models.items() if model is not None}
            if not timed:
                continue
            turns = {"dense": arena.model} | timed
            seconds = watch.round_seconds(turns, pixels, SPEED_BATCH, SPEED_ROUNDS)
            for key in timed:
                row = rows[key]
                row["speedup"] = speedup(Timing(seconds["dense"]), Timing(seconds[key]))
                row.update(where(arena), speed_command=command())
            records.save()
            said = ", ".join(f"{row['speedup']:.2f}x" for row in rows.values())
            print(f"{name}, seed {seed}: {said}", flush=True)


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
    except (ValueError, CheckpointError, RunError, TrainingError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(table(rows))


if __name__ == "__main__":
    main()
