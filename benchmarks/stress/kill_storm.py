"""Kills short trainings at random moments: ``python -m benchmarks.stress.kill_storm``.

Every killed run is resumed, and must end bit for bit like a run that was not killed. Runs on the
CPU.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file

from prunevit.cli import prog
from prunevit.trainers import mappo
from prunevit.trainers.common.checkpoint import load_newest
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.signals import ends_in_one_line


class KillStormError(RuntimeError):
    """A killed and resumed run ended differently from the one that was not killed."""


@dataclass
class KillStormConfig:
    """Kills, resumes and compares short trainings on the digits."""

    kills: int = 30
    """Runs to be killed."""
    iterations: int = 12
    """Of each training; checkpoints are written every second one."""


@contextmanager
def silence() -> Iterator[None]:
    """Nothing is printed."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def train(config: MappoConfig) -> None:
    """Trains to the end of learning, without the report."""
    with silence():
        experiment, _ = mappo.learn(*mappo.open_run(config))
    experiment.env.close()


def train_in_a_process(config: MappoConfig, kill_after: float | None = None) -> bool:
    """Trains in a fork of this process, which is killed after ``kill_after`` seconds; returns
    whether it was killed before it ended.

    Raises:
        KillStormError: it failed.
    """
    process = multiprocessing.get_context("fork").Process(target=train, args=(config,))
    process.start()
    process.join(kill_after)
    process.kill()  # does nothing to one that has ended
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise KillStormError(f"a training failed with exit code {process.exitcode}")
    return process.exitcode != 0


def results(folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """What two equal runs have in common: metrics without the seconds, and weights."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) | {"seconds": None} for line in lines]
    weights = load_file(folder / "policy.safetensors")
    return metrics, {name: weight.tolist() for name, weight in weights.items()}


def storm(config: KillStormConfig, folder: Path) -> str:
    """Kills and resumes; returns a summary in one line.

    Raises:
        KillStormError: a resumed run ended differently.
    """
    moments = random.Random(0)
    torch.set_num_threads(1)  # a fork doesn't inherit threads
    base = MappoConfig(
        iterations=config.iterations, checkpoint_every=2, eval_every=3, eval_size=50,
        num_envs=32, device="cpu", threads=1,
    )  # fmt: skip
    whole = folder / "whole"
    start = time.monotonic()
    train_in_a_process(replace(base, run_name=str(whole)))
    seconds = time.monotonic() - start
    resumed_from: list[int] = []
    for number in range(config.kills):
        run = folder / str(number)
        moment = moments.uniform(0, seconds)
        if train_in_a_process(replace(base, run_name=str(run)), moment):
            checkpoint = run / "checkpoint.safetensors"
            done = load_newest(checkpoint)["iteration"] if checkpoint.is_file() else 0
            resumed_from.append(done)
            if (run / "config.json").is_file():
                train_in_a_process(MappoConfig(resume=run))
            else:  # killed before there was anything to resume
                shutil.rmtree(run, ignore_errors=True)
                train_in_a_process(replace(base, run_name=str(run)))
        if results(run) != results(whole):
            raise KillStormError(
                f"killed after {moment:.3f} s, {run} ended differently from {whole}"
            )
    return (
        f"{len(resumed_from)} of {config.kills} runs of {seconds:.1f} s were killed before their "
        f"end, and resumed from iterations {' '.join(map(str, sorted(resumed_from)))} of "
        f"{config.iterations}; all ended bit for bit like the one that was not killed"
    )


def main() -> None:
    """The command line."""
    with ends_in_one_line(KillStormError, OSError):
        config = tyro.cli(KillStormConfig, description=__doc__, prog=prog())
        with tempfile.TemporaryDirectory(prefix="kill-storm-") as folder:
            print(storm(config, Path(folder)))


if __name__ == "__main__":
    main()
