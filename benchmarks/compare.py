"""Compares methods under one protocol: ``python -m benchmarks.compare --task digits``.

Every method prunes the same frozen backbone, on the same kernels. Methods that learn are trained,
or their runs under OUT/runs are used. At each operating point, a share of the dense model's
compute, a method's knob is set on validation images; then it is judged on all test images.
At the end all methods are timed, decisions included, in batches and image by image, in turns with
timm's own dense model and with our runtime with nothing pruned. All run on the kernels of that
runtime. They are timed in a process that does nothing else; nothing else should run on the machine
then. With ``--no-speed`` this is left for later: the same call without it then only times. A method
that comes later has all of the folder timed anew, as speeds of several processes are not compared.

OUT/records.jsonl gets a line for each method, seed and point as soon as it is measured, and a
killed comparison goes on where it stood. All records of a folder come from one commit and one
machine; with another, give another --out, and --runs with the trainings that there are.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from prunevit.benchmarks.differences import DENSE, differences, is_matched, summary
from prunevit.benchmarks.embeddings import (
    embeddings_tables,
    judge_dense_embeddings,
    judge_embeddings,
)
from prunevit.benchmarks.markdown import markdown_table, mean_and_interval
from prunevit.benchmarks.method_speed import ONE_IMAGE, SPEEDS, time_all, where
from prunevit.benchmarks.methods.registry import METHODS
from prunevit.benchmarks.protocol import Benchmark, UnreachableError, judge, judge_dense
from prunevit.benchmarks.records import FILE, Record, Records, command
from prunevit.benchmarks.tasks import TASKS
from prunevit.cli import prog
from prunevit.envs.data.datasets import check_has_classes, open_images
from prunevit.envs.data.image_set import Sourced
from prunevit.envs.data_config import model_data_config
from prunevit.envs.old_names import COMPARE_FLAGS, rename_flags
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import sha256
from prunevit.extras import needs
from prunevit.progress import progress_bar, say
from prunevit.trainers.common.backbones import load_backbone
from prunevit.trainers.common.classification import check_can_classify, versions
from prunevit.trainers.common.run import COMMAND_ERRORS
from prunevit.trainers.common.settings import Count, JsonObject, Range, Settings, Threads
from prunevit.trainers.common.signals import ends_in_one_line

with needs("benchmarks"):
    import pandas as pd


@dataclass
class CompareConfig(Settings):
    """What is compared."""

    task: Literal["digits", "cifar10", "imagenet", "embeddings"] = "digits"
    """Images, backbone and stages."""
    methods: tuple[str, ...] = (
        "mappo", "dynamic-vit", "attention", "threshold", "ats", "evit", "tome", "pitome",
        "zero-tprune", "random", "norm",
    )  # fmt: skip
    """Which methods; an unknown name lists them all."""
    seeds: Count = 5
    """Trainings of each learned method, and draws of each random one."""
    out: Path = Path("results")
    """Folder of the records."""
    runs: Path | None = None
    """Folder of the trainings' runs; OUT/runs if not given."""
    data: str | None = None
    """The data set, as folder:PATH; the task's own if not given."""
    backbone: str | None = None
    """The backbone; the task's own if not given."""
    model_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of the backbone, as {"img_size": 224}; the task's own if none is given."""
    checkpoint: Path | None = None
    """A file with the backbone's weights."""
    pretrained: bool = False
    """Download the backbone's weights."""
    prune_before: tuple[int, ...] = ()
    """Stages of the methods that don't bring their own; the task's if none is given."""
    points: tuple[Annotated[float, Range(0, 1, open_low=True)], ...] = ()
    """Operating points, shares of the dense compute; the task's own if none is given."""
    iterations: Count | None = None
    """Iterations of each training; the task's own if not given. With those, DynamicViT and ours
    compute about as much; an equal number doesn't do that."""
    eval_size: Count = 1_000
    """Validation images on which knobs are set."""
    split: Literal["test", "validation"] = "test"
    """The images that judge. Ideas are tried on validation images: those of test judge once."""
    test_size: Count | None = None
    """How many images judge; all of them if not given."""
    index_size: Count = 2_000
    """Of embeddings: photographs of the training that are searched."""
    speed: bool = True
    """At the end, time all methods, if one process has not yet. Nothing else should run then."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: Threads | None = None
    """CPU threads; torch's own choice if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            known = "; ".join(f"{name} ({spec.title})" for name, spec in METHODS.items())
            raise ValueError(f"unknown methods {', '.join(unknown) or '()'}: there are {known}")
        others = [name for name in self.methods if not METHODS[name].embeds]
        if TASKS[self.task].embeds and others:
            known = ", ".join(name for name, spec in METHODS.items() if spec.embeds)
            raise ValueError(f"{', '.join(others)} can't learn without labels: there are {known}")


def open_benchmark(config: CompareConfig) -> Benchmark:
    """What methods share.

    Raises:
        ValueError: data or weights are not named, unknown or damaged.
    """
    task = TASKS[config.task]
    task = replace(
        task,
        backbone=config.backbone or task.backbone,
        points=config.points or task.points,
        model_kwargs=config.model_kwargs or task.model_kwargs,
        prune_before=config.prune_before or task.prune_before,
    )
    base = task.config(config.data, config.checkpoint, config.pretrained)
    iterations = base.iterations if config.iterations is None else config.iterations
    base = replace(base, device=config.device, threads=config.threads, iterations=iterations)
    model = load_backbone(base, 0 if task.embeds else None)
    data_config = model_data_config(model)
    backbone = StagedViT(model, task.prune_before, prune_at=task.prune_at)
    index = None
    if task.embeds:
        check_has_classes(base.dataset)
        index = open_images(base.dataset, "train", data_config)
    else:
        check_can_classify(base.dataset, backbone.num_classes)
    return Benchmark(
        task=task,
        base=base,
        iterations=config.iterations,
        model=model.requires_grad_(False),
        backbone=backbone,
        validation=open_images(base.dataset, "validation", data_config),
        size=config.eval_size,
        test=open_images(base.dataset, config.split, data_config),
        runs=config.runs or config.out / "runs",
        index=index,
        index_size=config.index_size,
    )


def settings_of(config: CompareConfig, bench: Benchmark) -> dict[str, Any]:
    """What all records of a folder have in common."""
    names = ["backbone", "model_kwargs", "pretrained", "dataset"]
    if bench.task.prune_at != "block":  # older records don't name it
        names.append("prune_at")
    settings = {name: getattr(bench.base, name) for name in names} | {
        "weights": sha256(bench.base.checkpoint) if bench.base.checkpoint else None,
        "prune_before": list(bench.task.prune_before),
        "iterations": config.iterations,
        "eval_size": config.eval_size,
        "split": config.split,
        "test_size": min(config.test_size or len(bench.test), len(bench.test)),
    }
    if bench.task.embeds:
        settings["index_size"] = config.index_size
    return settings


def compare(config: CompareConfig) -> list[Record]:
    """Measures what isn't measured yet; returns all records of the folder.

    Raises:
        COMMAND_ERRORS: settings that don't go together, something unknown or damaged, a folder of
            other settings, a training that diverged, or a full disk.
    """
    records = Records(config.out / FILE)
    records.require({"task": config.task}, lambda row: {"task": row["task"]})
    bench = open_benchmark(config)
    settings = settings_of(config, bench)
    records.require(settings)
    records.require_origin(bench.backbone.device)
    if records.find(DENSE, 0, 1.0) is None:
        records.put(dense_record(settings, bench))
    entrants = [
        (name, seed)
        for name in config.methods
        for seed in range(config.seeds if METHODS[name].is_seeded else 1)
    ]
    all_due = [
        [point for point in bench.task.points if records.find(name, seed, point) is None]
        for name, seed in entrants
    ]
    with progress_bar(sum(map(len, all_due)), "points", title="compare") as bar:
        for (name, seed), due in zip(entrants, all_due, strict=True):
            if not due:
                continue
            say(f"{name}, seed {seed}")
            found = 0
            for row in measure(name, seed, due, settings, bench):
                records.put(row)
                say(
                    f"  {row['point']:.0%}: accuracy {100 * row['accuracy']:.2f} of "
                    f"{100 * row['dense_accuracy']:.2f} at {row['gmacs'] / row['dense_gmacs']:.1%}"
                )
                found += 1
                bar.update()
            bar.update(len(due) - found)  # those that can't be reached
    if config.speed:
        time_all(records, bench)
    return records.rows


def measure(
    name: str, seed: int, points: Sequence[float], settings: dict[str, Any], bench: Benchmark
) -> Iterator[Record]:
    """Judges a method at ``points``, and trains it first where that is due."""
    method = METHODS[name].open(bench, seed)
    size = min(settings["test_size"], method.most_images or settings["test_size"])
    for point in points:
        matched = True
        try:
            knobs = method.tune(bench.gmacs_at(point))
        except UnreachableError as error:
            say(f"  not at {point:.0%} of the dense compute: {error}")
            if error.nearest is None:
                continue
            knobs, matched = error.nearest, False
        if bench.task.embeds:
            found = judge_embeddings(method, knobs, bench, size)
        else:
            found = judge(method, knobs, bench, size).compared_with(judge_dense(bench, size))
        backbone = method.make(knobs).backbone if method.make else bench.backbone
        yield {
            "method": name,
            "seed": seed,
            "point": point,
            "matched": matched,
            **knobs,
            "fine_tuned": METHODS[name].fine_tunes,
            "on_prune": backbone.on_prune,
            **found,
            "speedup": None,
            **origin_of(settings, bench),
        }


def dense_record(settings: dict[str, Any], bench: Benchmark) -> Record:
    """The record of timm's own model, which the others are compared with. Where several test images
    have one source, it says which have, in their order.
    """
    size = settings["test_size"]
    if bench.task.embeds:
        found = judge_dense_embeddings(bench, size)
    else:
        dense = judge_dense(bench, size)
        found = dense.compared_with(dense)
    sources = {}
    if isinstance(bench.test, Sourced):
        every = bench.test.sources
        sources["sources"] = [int(every[i * len(every) // size]) for i in range(size)]
    return {
        "method": DENSE,
        "seed": 0,
        "point": 1.0,
        "fine_tuned": False,
        **found,
        **sources,
        "speedup": None,
        **origin_of(settings, bench),
    }


def origin_of(settings: dict[str, Any], bench: Benchmark) -> Record:
    """What a record says of how it came to be."""
    return {
        "task": bench.task.name,
        "dense_gmacs": bench.backbone.dense_macs / 1e9,
        **where(bench),
        "versions": versions(),
        "settings": settings,
        "command": command(),
    }


def title_of(name: str, rows: pd.DataFrame) -> str:
    """A method's title, which says too if it merges what it prunes, as ours does on some tasks."""
    title = METHODS[name].title
    merges = "on_prune" in rows and rows["on_prune"].eq("merge").any()
    return f"{title}, merging what it prunes" if merges and "merg" not in title else title


def table(methods: Iterable[tuple[str, pd.DataFrame]], with_speeds: bool = True) -> str:
    """A row for each method, and a column for each operating point: test accuracy and, where it was
    timed, the speed-up in the same cell, or in a row of its own if there are intervals. A cell with
    fewer seeds says how many. What could not be brought to a point stands below the table, with the
    compute that it had. A cell is empty where a method was not judged.

    Args:
        methods: title and records of each.
        with_speeds: show how many times as fast each is, see ``speed_cell``.
    """
    methods = list(methods)
    points = sorted({point for _, rows in methods for point in rows["point"]})
    elsewhere = [line for title, rows in methods for line in points_of_their_own(title, rows)]
    lines = []
    for title, judged in methods:
        rows = judged[is_matched(judged)]
        groups = [rows[rows["point"] == point] for point in points]
        most = max(len(group) for group in groups)
        accuracies, speeds = [title], [""]
        for point, group in zip(points, groups, strict=True):
            percent = (100 * group["accuracy"]).tolist()
            missed = "not reached" if judged["point"].eq(point).any() else ""
            cell = mean_and_interval(percent) if percent else missed
            accuracies.append(cell + (f", {len(group)} seeds" if 0 < len(group) < most else ""))
            speeds.append(speed_cell(group) if with_speeds else "")
        if most == 1:
            cells = zip(accuracies[1:], speeds[1:], strict=True)
            lines.append([title, *(", ".join(filter(None, cell)) for cell in cells)])
        else:
            lines += [accuracies, speeds] if any(speeds) else [accuracies]
    first, *others = (f"at {point:.0%}" for point in points)
    found = markdown_table(["method", f"{first} of dense GMACs", *others], lines)
    return "\n".join([found, *([""] if elsewhere else []), *elsewhere])


def one_image_table(methods: Iterable[tuple[str, pd.DataFrame]]) -> str:
    """A row for each method that was timed image by image, and a column for each operating point:
    ``speed_cell``.

    Args:
        methods: title and records of each.
    """
    methods = [(title, rows[is_matched(rows)]) for title, rows in methods]
    points = sorted({point for _, rows in methods for point in rows["point"]})
    lines = [
        [title, *(speed_cell(rows[rows["point"] == point], ONE_IMAGE) for point in points)]
        for title, rows in methods
    ]
    columns = [f"at {point:.0%}" for point in points]
    lines = [line for line in lines if any(line[1:])]
    return markdown_table(["image by image", *columns], lines) if lines else ""


def speed_cell(rows: pd.DataFrame, ending: str = "") -> str:
    """How many times as fast as timm's dense model these records are and, in brackets, as our own
    runtime with nothing pruned; empty where they were not timed. ``ending`` is that of the fields.
    """
    cells = []
    for speed in SPEEDS:
        timed = rows[speed + ending].dropna().tolist() if speed + ending in rows else []
        cells += [mean_and_interval(timed, unit="x")] if timed else []
    return cells[0] + "".join(f" ({cell})" for cell in cells[1:]) if cells else ""


def points_of_their_own(title: str, rows: pd.DataFrame) -> Iterator[str]:
    """A line for a method with records that are not at their operating point."""
    others = rows[~is_matched(rows)]
    cells = [
        f"{100 * group['accuracy'].mean():.2f} at "
        f"{(group['gmacs'] / group['dense_gmacs']).mean():.1%}"
        for _, group in others.groupby("point")
    ]
    if cells:
        yield f"{title}, at points of its own: {', '.join(dict.fromkeys(cells))}"


def report(config: CompareConfig) -> None:
    """Compares, and prints all records of the folder, the most accurate method first."""
    data = pd.DataFrame(compare(config))
    print(f"dense: {100 * data['dense_accuracy'].iloc[0]:.2f}")
    methods = [
        (title_of(name, group), group) for name, group in data.groupby("method") if name != DENSE
    ]
    if not methods:
        return  # no method reached a point
    methods.sort(key=lambda method: -method[1]["accuracy"].mean())
    tables = (
        table(methods),
        one_image_table(methods),
        differences(methods, data),
        summary(methods),
        embeddings_tables(data, methods),
    )
    print("\n\n".join(filter(None, tables)))
    print(
        f"in {config.out}: {FILE} (all figures)\n"
        f"next: python -m benchmarks.figures {shlex.quote(str(config.out))}",
        file=sys.stderr,
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with ends_in_one_line(*COMMAND_ERRORS):
        arguments = rename_flags(sys.argv[1:] if arguments is None else arguments, COMPARE_FLAGS)
        config = tyro.cli(CompareConfig, description=__doc__, args=arguments, prog=prog())
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        report(config)


if __name__ == "__main__":
    main()
