"""BenchMARL's algorithms as methods."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any, cast

from prunevit.agents.pruned_vit import PrunedViT
from prunevit.agents.run_reader import RUN_WEIGHTS
from prunevit.benchmarks.methods.learned import (
    check_settings,
    shared_settings,
    tuned_after_training,
)
from prunevit.benchmarks.protocol import Benchmark, Method

MINUTES = 2.0  # of a training
ALGORITHMS = ("mappo", "ippo", "qmix", "vdn", "iql", "masac", "isac")


def benchmarl(name: str, algorithm: str, bench: Benchmark, seed: int) -> Method:
    """An algorithm of BenchMARL, trained for ``MINUTES``; the knob is the threshold on
    how much better keep is rated than prune.
    """
    folder = bench.runs / f"{name}-{seed}"

    def train() -> None:
        # an extra, needed by these methods alone
        from prunevit.trainers.benchmarl import BenchmarlConfig
        from prunevit.trainers.benchmarl import train as train_benchmarl

        if bench.base.pretrained:
            raise ValueError(f"{name} can't take downloaded weights: give --checkpoint FILE")
        config = BenchmarlConfig(
            algorithm=cast("Any", algorithm),
            minutes=MINUTES,
            seed=seed,
            run_name=str(folder.absolute()),
            **shared_settings(bench),
        )
        if bench.iterations is not None:
            config = replace(config, iterations=bench.iterations)
        check_settings(folder, config.to_json())
        if not (folder / RUN_WEIGHTS).is_file():
            # a killed run can't be resumed: BenchMARL writes its checkpoint at the end
            shutil.rmtree(folder, ignore_errors=True)
            train_benchmarl(config)

    return tuned_after_training(bench, train, lambda: PrunedViT.from_run(folder))
