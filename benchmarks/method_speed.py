"""The speed of compared methods over timm's dense model, and over our own runtime with nothing
pruned, which has the kernels that all methods run on.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import torch

from prunevit.agents.policies.heuristics import KeepAll
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.benchmarks.differences import DENSE
from prunevit.benchmarks.methods.registry import METHODS
from prunevit.benchmarks.protocol import Benchmark
from prunevit.benchmarks.records import Record, Records, command, origin
from prunevit.progress import progress_bar, say
from prunevit.trainers.common.timing import TimingProcess, speedup

SPEED_ROUNDS = 9
ONE_IMAGE = "_one_image"  # at the end of fields of speeds image by image
SPEEDS = {"speedup": "dense", "speedup_same_kernels": "unpruned"}  # field: over which baseline


def time_all(records: Records, bench: Benchmark) -> None:
    """Writes into the records how many times as fast as both baselines they are, in the task's
    batches and image by image, unless one process has timed them all before. Trains and judges
    nothing. An upper bound has no speed, and neither has a learned method whose run is gone.
    """
    rows: dict[tuple[str, int], list[Record]] = {}
    for row in records.rows:
        if row["method"] != DENSE:
            rows.setdefault((row["method"], row["seed"]), []).append(row)
    opened = {(name, seed): METHODS[name].open(bench, seed).make for name, seed in rows}
    makes = {key: make for key, make in opened.items() if make is not None}
    due = [row for key in makes for row in rows[key]]
    untimed = any(row["speedup"] is None for row in due)
    if not untimed and len({row.get("timed") for row in due}) < 2:
        return
    for row in due:
        row["speedup"] = None  # of another process
    baselines = {"dense": bench.model, "unpruned": PrunedViT(bench.backbone, KeepAll())}
    count = bench.task.speed_images
    # evenly spread; some of them twice where there are fewer
    chosen = [i * len(bench.test) // count for i in range(count)]
    pixels = bench.test.load(chosen)[0].to(bench.backbone.device)
    inputs = {"": (pixels, bench.task.speed_batch), ONE_IMAGE: (pixels[::8], 1)}
    begun = datetime.now(UTC).isoformat(timespec="seconds")  # the same for all of a process
    turns = progress_bar(len(makes), "methods", title="speed", items=makes.items())
    with TimingProcess() as process, turns:
        for (name, seed), make in turns:
            at = {str(row["point"]): row for row in rows[name, seed]}
            try:
                models: dict[str, Any] = {point: make(row) for point, row in at.items()}
            except ValueError as error:
                say(f"{name}, seed {seed} can't be timed: {error}")
                continue
            for ending, (images, batch) in inputs.items():
                timings = process.time_models(baselines | models, images, batch, SPEED_ROUNDS)
                for point, row in at.items():
                    for field, baseline in SPEEDS.items():
                        row[field + ending] = speedup(timings[baseline], timings[point])
            for row in at.values():
                row.update(where(bench), speed_command=command(), timed=begun)
                row["speed_batch"] = bench.task.speed_batch
            records.save()
            said = ", ".join(f"{row['speedup']:.2f}x" for row in at.values())
            say(f"{name}, seed {seed}: {said}")


def where(bench: Benchmark) -> dict[str, Any]:
    """What a record says about the machine and the commit."""
    device = bench.backbone.device
    return {"threads": torch.get_num_threads(), "device": str(device), **origin(device)}
