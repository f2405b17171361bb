"""The speed of compared methods over timm's dense model, and over our own runtime with nothing
pruned, which has the kernels that all methods run on.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from prunevit.agents.policies.heuristics import KeepAll
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.benchmarks.methods.registry import METHODS
from prunevit.benchmarks.protocol import Benchmark
from prunevit.benchmarks.records import Records, command, origin
from prunevit.progress import progress_bar, say
from prunevit.trainers.common.timing import TimingProcess, speedup

SPEED_BATCH = 64
SPEED_IMAGES = 256
SPEED_ROUNDS = 9


def time_untimed(field: Sequence[tuple[str, int]], records: Records, bench: Benchmark) -> None:
    """Writes into the records without a speed how many times as fast as both baselines they are, at
    batches of ``SPEED_BATCH``. Trains and judges nothing. An upper bound has no speed, and neither
    has a learned method whose run is gone.
    """
    baselines = {"dense": bench.model, "unpruned": PrunedViT(bench.backbone, KeepAll())}
    # evenly spread; some of them twice where there are fewer
    chosen = [i * len(bench.test) // SPEED_IMAGES for i in range(SPEED_IMAGES)]
    pixels = bench.test.load(chosen)[0].to(bench.backbone.device)
    begun = datetime.now(UTC).isoformat(timespec="seconds")  # the same for all of a process
    turns = progress_bar(len(field), "methods", title="speed", items=field)
    with TimingProcess() as process, turns:
        for name, seed in turns:
            found = (records.find(name, seed, point) for point in bench.task.points)
            rows = {str(row["point"]): row for row in found if row and row["speedup"] is None}
            make = METHODS[name].open(bench, seed).make
            if make is None or not rows:
                continue
            try:
                models: dict[str, Any] = {key: make(row) for key, row in rows.items()}
            except ValueError as error:
                say(f"{name}, seed {seed} can't be timed: {error}")
                continue
            timings = process.time_models(baselines | models, pixels, SPEED_BATCH, SPEED_ROUNDS)
            for key in models:
                rows[key]["speedup"] = speedup(timings["dense"], timings[key])
                rows[key]["speedup_same_kernels"] = speedup(timings["unpruned"], timings[key])
                rows[key].update(where(bench), speed_command=command(), timed=begun)
            records.save()
            said = ", ".join(f"{rows[key]['speedup']:.2f}x" for key in models)
            say(f"{name}, seed {seed}: {said}")


def where(bench: Benchmark) -> dict[str, Any]:
    """What a record says about the machine and the commit."""
    device = bench.backbone.device
    return {"threads": torch.get_num_threads(), "device": str(device), **origin(device)}
