"""Compares methods under one protocol: ``python -m benchmarks.compare --task digits``.

Every method prunes the same frozen backbone through the same runtime. Methods that learn are
trained, or their runs under OUT/runs are used. At each operating point, a share of the dense
model's compute, a method's knob is set on validation images; then it is judged on all test images.
At the end all methods are timed in turns with timm's own dense model, decisions included, in a
process that does nothing else; nothing else should run on the machine then. With ``--no-speed``
this is left for later: the same call without it then only times what has no speed yet.

OUT/records.jsonl gets a line for each method, seed and point as soon as it is measured, and a
killed comparison goes on where it stood. OUT/curves.jsonl and OUT/pictures.npz hold what the
figures need beside records.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from prunevit.benchmarks.artifacts import leave_curves, leave_pictures
from prunevit.benchmarks.markdown import markdown_table, mean_and_interval
from prunevit.benchmarks.method_speed import time_untimed, where
from prunevit.benchmarks.methods.registry import METHODS
from prunevit.benchmarks.protocol import (
    Benchmark,
    UnreachableError,
    UpperBound,
    judge,
    judge_dense,
)
from prunevit.benchmarks.records import FILE, Record, Records, command
from prunevit.benchmarks.tasks import TASKS
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data_config import model_data_config
from prunevit.envs.devices import pick_device
from prunevit.envs.old_names import COMPARE_FLAGS, rename_flags
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import sha256
from prunevit.trainers.common.checkpoint import CheckpointError
from prunevit.trainers.common.classification import versions
from prunevit.trainers.common.run import TrainingError


@dataclass
class CompareConfig:
    """What is compared."""

    task: str = "digits"
    """digits, cifar10 or imagenet."""
    methods: tuple[str, ...] = (
        "mappo", "dynamic-vit", "attention", "threshold", "ats", "evit", "tome", "random", "norm",
    )  # fmt: skip
    """Which methods; an unknown name lists them all."""
    seeds: int = 5
    """Trainings of each learned method, and draws of each random one."""
    out: Path = Path("results")
    """Folder of the records and the runs."""
    data: str | None = None
    """The data set, as folder:PATH; the task's own if not given."""
    backbone: str | None = None
    """The backbone; the task's own if not given."""
    checkpoint: Path | None = None
    """A file with the backbone's weights."""
    pretrained: bool = False
    """Download the backbone's weights."""
    points: tuple[float, ...] = ()
    """Operating points, shares of the dense compute; the task's own if none is given."""
    iterations: int | None = None
    """Iterations of each training; the task's own if not given."""
    eval_size: int = 1_000
    """Validation images on which knobs are set."""
    test_size: int | None = None
    """Test images; all of them if not given."""
    speed: bool = True
    """At the end, time what has no speed yet. Nothing else should run then."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: int | None = None
    """CPU threads; torch's own choice if not given."""


def check(config: CompareConfig) -> None:
    """Refuses settings that can't be compared.

    Raises:
        ValueError: the message says which.
    """
    if config.task not in TASKS:
        raise ValueError(f"unknown task {config.task!r}: choose from {', '.join(TASKS)}")
    unknown = [name for name in config.methods if name not in METHODS]
    if unknown or not config.methods:
        known = "; ".join(f"{name} ({spec.title})" for name, spec in METHODS.items())
        raise ValueError(f"unknown methods {', '.join(unknown) or '()'}: there are {known}")
    for name in ("seeds", "eval_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if any(not 0 < point <= 1 for point in config.points):
        raise ValueError(f"points={config.points}: shares of the dense compute, in (0, 1]")


def open_benchmark(config: CompareConfig) -> tuple[Benchmark, ImageSet]:
    """What methods share, and the test images.

    Raises:
        ValueError: data or weights are not named, unknown or damaged.
    """
    task = TASKS[config.task]
    points = tuple(config.points or task.points)
    task = replace(task, backbone=config.backbone or task.backbone, points=points)
    base = task.config(config.data, config.checkpoint, config.pretrained)
    base = replace(base, device=config.device, threads=config.threads)
    if config.iterations is not None:
        base = replace(base, iterations=config.iterations)
    model = create_backbone(
        base.backbone, pretrained=base.pretrained, checkpoint=base.checkpoint, **base.model_kwargs
    )
    model = model.to(pick_device(config.device)).to(memory_format=torch.channels_last)
    data_config = model_data_config(model)
    bench = Benchmark(
        task=task,
        base=base,
        iterations=config.iterations,
        model=model.requires_grad_(False),
        backbone=StagedViT(model, task.prune_before),
        validation=open_images(base.dataset, "validation", data_config),
        size=config.eval_size,
        runs=config.out / "runs",
    )
    return bench, open_images(base.dataset, "test", data_config)


def settings_of(config: CompareConfig, bench: Benchmark, test: ImageSet) -> dict[str, Any]:
    """What all records of a folder have in common."""
    base = bench.base
    return {
        "backbone": base.backbone,
        "model_kwargs": base.model_kwargs,
        "weights": sha256(base.checkpoint) if base.checkpoint else None,
        "pretrained": base.pretrained,
        "dataset": base.dataset,
        "prune_before": list(bench.task.prune_before),
        "iterations": config.iterations,
        "eval_size": config.eval_size,
        "test_size": len(test) if config.test_size is None else min(config.test_size, len(test)),
    }


def compare(config: CompareConfig) -> list[Record]:
    """Measures what isn't measured yet; returns all records of the folder.

    Raises:
        ValueError: settings that don't go together, an unknown or damaged data set or backbone, a
            folder of another task or of other settings.
        CheckpointError: a run in the folder is damaged.
        TrainingError: a training can't begin, or diverged.
        OSError: the disk is full or not writable.
    """
    records = Records(config.out / FILE)
    records.require({"task": config.task}, lambda row: {"task": row["task"]})
    bench, test = open_benchmark(config)
    settings = settings_of(config, bench, test)
    records.require(settings)
    field = [
        (name, seed)
        for name in config.methods
        for seed in range(config.seeds if METHODS[name].is_seeded else 1)
    ]
    # depends only on the number of images
    dense_of = cache(lambda size: judge_dense(bench, test, size))
    for name, seed in field:
        measure(name, seed, settings, records, bench, test, dense_of)
    leave_curves(config.out, field, bench)
    leave_pictures(config.out, field, records, bench, test)
    if config.speed:
        time_untimed(field, records, bench, test)
    return records.rows


def measure(
    name: str,
    seed: int,
    settings: dict[str, Any],
    records: Records,
    bench: Benchmark,
    test: ImageSet,
    dense_of: Callable[[int], float],
) -> None:
    """Judges a method at each point without a record, and trains it first where that is due.

    Args:
        name: of the method.
        seed: of its training, or its draws.
        settings: what all records have in common.
        records: the records, which get the new ones.
        bench: what methods share.
        test: the images that judge.
        dense_of: the dense model's accuracy on so many of them.
    """
    due = [point for point in bench.task.points if records.find(name, seed, point) is None]
    if not due:
        return
    print(f"{name}, seed {seed}", flush=True)
    method = METHODS[name].open(bench, seed)
    size = settings["test_size"]
    if isinstance(method, UpperBound):
        size = min(size, method.images)
    for point in due:
        try:
            knobs = method.tune(bench.gmacs_at(point))
        except UnreachableError as error:
            print(f"  not at {point:.0%} of the dense compute: {error}", flush=True)
            continue
        result = judge(method, knobs, bench, test, size)
        row = {
            "task": bench.task.name,
            "method": name,
            "seed": seed,
            "point": point,
            **knobs,
            "fine_tuned": METHODS[name].fine_tunes,
            "accuracy": result.accuracy,
            "dense_accuracy": dense_of(size),
            "images": size,
            "gmacs": result.gmacs,
            "dense_gmacs": bench.backbone.dense_macs / 1e9,
            "kept": list(result.kept),
            "left": list(result.left),
            "speedup": None,
            **where(bench),
            "versions": versions(),
            "settings": settings,
            "command": command("benchmarks.compare"),
        }
        records.put(row)
        print(
            f"  {point:.0%}: accuracy {100 * row['accuracy']:.2f} of "
            f"{100 * row['dense_accuracy']:.2f} at {row['gmacs'] / row['dense_gmacs']:.1%}",
            flush=True,
        )


def table(rows: Sequence[Record]) -> str:
    """A line for each method and operating point, over the seeds, the most accurate first. Methods
    that were judged on fewer images say on how many.
    """

    def mean(name: str, group: list[Record]) -> float:
        return float(np.mean([row[name] for row in group]))

    most = max((sum(row["left"]) for row in rows), default=0)
    lines = []
    for point in sorted({row["point"] for row in rows}):
        groups: dict[str, list[Record]] = {}
        for row in rows:
            if row["point"] == point:
                groups.setdefault(row["method"], []).append(row)
        for name, group in sorted(groups.items(), key=lambda item: -mean("accuracy", item[1])):
            images = min(sum(row["left"]) for row in group)
            speeds = [row["speedup"] for row in group if row["speedup"] is not None]
            loss = [100 * (row["dense_accuracy"] - row["accuracy"]) for row in group]
            lines.append(
                [
                    f"{100 * point:.0f}%",
                    name if images == most else f"{name} ({images} images)",
                    str(len(group)),
                    mean_and_interval([100 * row["accuracy"] for row in group]),
                    mean_and_interval(loss),
                    f"{np.mean([100 * row['gmacs'] / row['dense_gmacs'] for row in group]):.1f}",
                    mean_and_interval(speeds, unit="x") if speeds else "not timed",
                ]
            )
    header = ["point", "method", "seeds", "accuracy", "loss", "GMACs, % of dense", "speed-up"]
    return markdown_table(header, lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    try:
        arguments = rename_flags(sys.argv[1:] if arguments is None else arguments, COMPARE_FLAGS)
        config = tyro.cli(
            CompareConfig, description=__doc__, args=arguments, prog="python -m benchmarks.compare"
        )
        check(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        rows = compare(config)
    except (ValueError, CheckpointError, TrainingError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(table(rows))


if __name__ == "__main__":
    main()
