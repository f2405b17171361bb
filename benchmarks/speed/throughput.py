"""Times a pruned ViT beside timm's and beside other ways to run fewer tokens:
``python -m benchmarks.speed.throughput``.

Variants:

- ``dense``: timm's own model, the baseline;
- ``packed``: ours;
- ``masked``: all tokens carried along and pruned ones masked, as in RL4EViT's code;
- ``padded``: every image padded to the longest of its batch;
- ``tome``: token merging;
- ``uniform``: the same number of tokens for every image, as in EViT;
- ``unpruned``: our runtime with nothing pruned, which shows what it costs or saves by itself.

Packed, masked and padded see the same patches pruned, a different number in every image. ToMe and
uniform get as much compute as comes closest to ours from below.

All variants take turns in one process, on the same weights and images. Time and GMACs include the
policy, and masked and padded tokens. Speed-up is the median of each round's own ratio to dense;
efficiency is the speed-up over what the GMACs promise; spread is the distance between the quartiles
of the passes over their median. Latency (p50, p95) is measured at batch 1. Peak memory is that of a
fresh process that makes one pass (on CUDA, of the tensors on the device). Weights are random, since
time does not depend on them.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro

from prunevit.benchmarks.machine import MIB
from prunevit.benchmarks.markdown import markdown_table
from prunevit.benchmarks.speed.variants import (
    Plan,
    Variant,
    calls,
    gmacs,
    make_plan,
    pass_peak,
    pass_peak_of,
)
from prunevit.benchmarks.speed.workload import (
    SCHEDULES,
    Schedule,
    ScheduleName,
    Spec,
    Workload,
    load,
)
from prunevit.trainers.common.checkpoint import CheckpointError, write_json
from prunevit.trainers.common.settings import JsonObject
from prunevit.trainers.common.timing import Timing, interleaved, speedup

Record = dict[str, Any]

FEWEST_IMAGES = 32
RIVALS = ("tome", "padded", "masked", "uniform")


@dataclass
class ThroughputConfig:
    """What is measured."""

    model: str = "deit_small_patch16_224"
    """Any timm VisionTransformer, or digits_vit."""
    model_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of the model, as {"depth": 6}."""
    run: Path | None = None
    """A folder of trainers.mappo: its backbone, stages, policy and test images take the place of
    model and schedule, and the policy's own patterns that of drawn ones."""
    schedule: ScheduleName = "released"
    """released: stages before blocks 3, 6 and 9, keep 0.7 each; every-block: before every block but
    the first, keep 0.9 each."""
    keep: float | None = None
    """Mean share of an image's living patches that survives a stage; the schedule's own if not
    given. Each image has its own share at each stage, up to 0.3 off."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Images a call."""
    image_sizes: tuple[int, ...] = ()
    """Heights and widths in pixels, as 224 384 512; the model's own if none is given."""
    variants: tuple[Variant, ...] = get_args(Variant)
    """Which are measured; dense is the baseline and always is."""
    images: int = FEWEST_IMAGES
    """Different images a pass goes over, rounded up to a multiple of all batch sizes."""
    rounds: int = 15
    """Timed passes of each variant, all of them in turns."""
    warmup: int = 2
    """Passes of each variant before those."""
    memory: bool = True
    """Measure peak memory; on a CPU this starts a process for each variant."""
    threads: int | None = None
    """CPU threads; torch's own choice if not given."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and images; the policy stays in float32."""
    seed: int = 0
    """Of weights, images and patterns."""
    out: Path | None = None
    """Also write the records to this JSON file."""


def check(config: ThroughputConfig) -> None:
    """Refuses settings that can't be measured.

    Raises:
        ValueError: the message says which.
    """
    for name in ("batch_sizes", "image_sizes"):
        if any(size < 1 for size in getattr(config, name)):
            raise ValueError(f"{name}={getattr(config, name)}: each must be at least 1")
    if not config.batch_sizes:
        raise ValueError("batch_sizes is empty: name at least one, as 1 32")
    for name, least in (("images", 1), ("rounds", 1), ("warmup", 0), ("threads", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: at least {least}")
    if config.run is not None and (config.image_sizes or config.model_kwargs):
        raise ValueError("a run brings its own model: leave out image_sizes and model_kwargs")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device")


def specs(config: ThroughputConfig) -> list[Spec]:
    """What is to be run, one for each image size."""
    schedule = SCHEDULES[config.schedule]
    if config.keep is not None:
        schedule = Schedule(schedule.prune_before, config.keep)
    multiple = math.lcm(*config.batch_sizes)
    return [
        Spec(
            model=config.model,
            schedule=schedule,
            images=-(-config.images // multiple) * multiple,
            seed=config.seed,
            device=config.device,
            dtype=getattr(torch, config.dtype),
            model_kwargs=config.model_kwargs | sized,
            run=config.run,
        )
        for sized in ([{"img_size": size} for size in config.image_sizes] or [{}])
    ]


def chosen(config: ThroughputConfig) -> list[Variant]:
    """The variants that are measured, dense first."""
    return [name for name in get_args(Variant) if name == "dense" or name in config.variants]


def measure(config: ThroughputConfig) -> Iterator[list[Record]]:
    """Records of each image size and batch size, as soon as they are there."""
    variants = chosen(config)
    for spec in specs(config):
        workload = load(spec)
        plan = make_plan(workload, with_merges="tome" in variants)
        for batch_size in dict.fromkeys(config.batch_sizes):
            peaks: dict[Variant, int] = {}
            if config.memory:
                peaks = _peaks(config, spec, workload, plan, batch_size)
            load_before = os.getloadavg()[0]
            timings = interleaved(
                {name: calls(name, workload, plan, batch_size) for name in variants},
                config.rounds,
                config.warmup,
                workload.images.device,
                each_call=batch_size == 1,
            )
            settings = {
                "model": config.model if config.run is None else str(config.run),
                "batch_size": batch_size,
                "image_size": workload.packed.image_shape[-1],
                "threads": torch.get_num_threads(),
                "device": _device_name(config),
                "dtype": config.dtype,
                "load": load_before,
            }
            yield [
                {"variant": name}
                | settings
                | _figures(name, timings, workload, plan, batch_size)
                | ({"peak_memory": peaks[name]} if config.memory else {})
                for name in variants
            ]


def _figures(
    name: Variant, timings: dict[str, Timing], workload: Workload, plan: Plan, batch_size: int
) -> Record:
    timing = timings[name]
    faster = speedup(timings["dense"], timing)
    cost = gmacs(name, workload, plan, batch_size)
    dense_cost = gmacs("dense", workload, plan, batch_size)
    figures = {
        "images_per_second": len(workload.images) / timing.seconds,
        "spread": timing.spread,
        "gmacs": cost,
        "speedup": faster,
        "efficiency": faster * cost / dense_cost,
    }
    if timing.calls:
        figures |= {"p50": timing.latency(50), "p95": timing.latency(95)}  # seconds
    return figures


def _device_name(config: ThroughputConfig) -> str:
    return torch.cuda.get_device_name() if config.device == "cuda" else config.device


def _peaks(
    config: ThroughputConfig, spec: Spec, workload: Workload, plan: Plan, batch_size: int
) -> dict[Variant, int]:
    """Bytes by variant."""
    threads = torch.get_num_threads()
    peaks: dict[Variant, int] = {}
    for name in chosen(config):
        if config.device == "cuda":
            peaks[name] = pass_peak(name, workload, plan, batch_size)
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            arguments = (name, spec, plan, batch_size, threads)
            peaks[name] = process.submit(pass_peak_of, *arguments).result()
    return peaks


def table(records: Sequence[Record]) -> str:
    """Records of one image size and batch size as Markdown, and how many times as fast as each
    rival ours is.
    """
    first = records[0]
    title = (
        f"{first['model']}, {first['image_size']} px, batch {first['batch_size']} "
        f"({first['device']}, {first['dtype']}, {first['threads']} threads, "
        f"load {first['load']:.2f})"
    )

    def scaled(value: float | None, unit: float) -> str:
        return "" if value is None else f"{value / unit:.1f}"

    header = [
        "variant", "images/s", "spread", "GMACs", "speed-up", "efficiency", "p50, ms", "p95, ms",
        "peak MiB",
    ]  # fmt: skip
    rows = [
        [
            row["variant"], f"{row['images_per_second']:.2f}", f"{row['spread']:.1%}",
            f"{row['gmacs']:.4f}", f"{row['speedup']:.2f}x", f"{row['efficiency']:.2f}",
            scaled(row.get("p50"), 1e-3), scaled(row.get("p95"), 1e-3),
            scaled(row.get("peak_memory"), MIB),
        ]
        for row in records
    ]  # fmt: skip
    speed = {row["variant"]: row["speedup"] for row in records}
    leads = [
        f"packed is {speed['packed'] / speed[rival]:.2f}x as fast as {rival}"
        for rival in RIVALS
        if rival in speed and "packed" in speed
    ]
    return "\n".join([title, "", markdown_table(header, rows), "", *leads])


def report(config: ThroughputConfig) -> None:
    """Measures, prints each table when it is there, and keeps the file up to date with it."""
    records: list[Record] = []
    for measured in measure(config):
        print(table(measured), end="\n\n", flush=True)
        records += measured
        if config.out is not None:
            write_json(config.out, records)
    print(f"load at the end: {' '.join(f'{load:.2f}' for load in os.getloadavg())}")


def main() -> None:
    """The command line."""
    prog = "python -m benchmarks.speed.throughput"
    config = tyro.cli(ThroughputConfig, description=__doc__, prog=prog)
    try:
        check(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        report(config)
    except (ValueError, CheckpointError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
