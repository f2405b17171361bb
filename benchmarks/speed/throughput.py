"""Times a pruned ViT beside timm's and beside other ways to run fewer tokens:
``python -m benchmarks.speed.throughput``.

Variants:

- ``dense``: timm's own model, a baseline;
- ``packed``: ours;
- ``masked``: all tokens carried along and pruned ones masked, as in RL4EViT's code;
- ``padded``: every image padded to the longest of its batch;
- ``tome``: token merging;
- ``uniform``: the same number of tokens for every image, as in EViT;
- ``unpruned``: our runtime with nothing pruned, the other baseline: the same kernels as all that
  prune or merge.

All but dense and masked run on the same kernels: few rows go through oneDNN's linear layers, and
large batches pass in chunks that fit a CPU's caches. The speed-up over dense says what a user
gains, the speed-up over unpruned what pruning or merging alone gains.

Packed, masked and padded see the same patches pruned, a different number in every image. ToMe and
uniform get as much compute as comes closest to ours from below.

All variants take turns in one process, on the same weights and images. Time and GMACs include the
policy, and masked and padded tokens. Speed-up is the median of each round's own ratio to a
baseline. Efficiency is the speed-up over dense divided by what the GMACs promise. Spread is the
distance between the quartiles of the passes over their median. Latency (p50, p95) is measured at
batch 1. Peak memory is that of a fresh process that makes one pass (on CUDA, of the tensors on the
device).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
import tyro
from torch import Tensor

from prunevit.benchmarks.machine import MIB
from prunevit.benchmarks.markdown import records_table
from prunevit.benchmarks.records import Record
from prunevit.benchmarks.speed.timed import FIRST_COLUMNS, LATENCIES, pace, show_and_keep
from prunevit.benchmarks.speed.variants import (
    VARIANTS,
    ThroughputConfig,
    Workload,
    calls,
    fresh_pass_peak,
    load,
    pass_peak,
)
from prunevit.cli import prog
from prunevit.envs.devices import pick_device
from prunevit.trainers.common.run import COMMAND_ERRORS
from prunevit.trainers.common.signals import ends_in_one_line
from prunevit.trainers.common.timing import interleaved, speedup


def measure(config: ThroughputConfig) -> Iterator[list[Record]]:
    """Records of each image size and batch size, as soon as they are there.

    Raises:
        ValueError: these settings can't be measured.
    """
    if not config.batch_sizes:
        raise ValueError("batch_sizes is empty: name at least one, as 1 32")
    if config.run is not None and config.image_sizes:
        raise ValueError("a run brings its own model: leave out image_sizes")
    pick_device(config.device)
    for image_size in config.image_sizes or (None,):
        workload = load(config, image_size)
        for batch_size in dict.fromkeys(config.batch_sizes):
            yield compare(config, image_size, workload, batch_size)


def compare(
    config: ThroughputConfig, image_size: int | None, workload: Workload, batch_size: int
) -> list[Record]:
    """Records of all variants at one batch size."""
    device = workload.images.device
    names = [name for name in VARIANTS if name == "dense" or name in config.variants]
    peaks = {}
    for name in names if config.memory else ():
        if device.type == "cuda":
            peaks[name] = pass_peak(name, workload, batch_size)
            continue
        spawn, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
        with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as process:
            task = process.submit(fresh_pass_peak, name, config, image_size, batch_size)
            peaks[name] = task.result()
    settings = {
        "model": config.model if config.run is None else str(config.run),
        "batch_size": batch_size,
        "image_size": workload.packed.image_shape[-1],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": config.dtype,
        "load": os.getloadavg()[0],
    }
    passes: dict[str, list[Callable[[], Tensor]]] = {
        name: calls(name, workload, batch_size) for name in names
    }
    title = f"{settings['model']}, batch {batch_size}"
    timings = interleaved(passes, config.rounds, 1, device, batch_size == 1, title)
    gmacs = {name: VARIANTS[name].macs(workload, batch_size) / 1e9 for name in names}
    records = []
    for name in names:
        timing = timings[name]
        faster = speedup(timings["dense"], timing)
        record = {"variant": name} | settings
        record |= pace(timing, len(workload.images)) | {
            "gmacs": gmacs[name],
            "speedup": faster,
            "efficiency": faster * gmacs[name] / gmacs["dense"],
        }
        if "unpruned" in timings:
            record["speedup_same_kernels"] = speedup(timings["unpruned"], timing)
        if config.memory:
            record["peak_memory"] = peaks[name]  # bytes
        records.append(record)
    return records


def table(records: Sequence[Record]) -> str:
    """Records of one image size and batch size as Markdown."""
    first = records[0]
    title = (
        f"{first['model']}, {first['image_size']} px, batch {first['batch_size']} "
        f"({first['device']}, {first['dtype']}, {first['threads']} threads, "
        f"load {first['load']:.2f})"
    )
    columns = {
        **FIRST_COLUMNS,
        "over dense": ("speedup", 1, ".2f"),
        "over unpruned": ("speedup_same_kernels", 1, ".2f"),
        "efficiency": ("efficiency", 1, ".2f"),
        **LATENCIES,
        "peak MiB": ("peak_memory", MIB, ".1f"),
    }
    return f"{title}\n\n{records_table(records, columns)}\n"


def main() -> None:
    """The command line."""
    with ends_in_one_line(*COMMAND_ERRORS):
        config = tyro.cli(ThroughputConfig, description=__doc__, prog=prog())
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        show_and_keep(measure(config), table, config.out)


if __name__ == "__main__":
    main()
