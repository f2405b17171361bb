"""Trainings that are killed at random moments, and resumed, end bit for bit like one that was not.
``--kills N`` kills so many.
"""

import json
import multiprocessing
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from prunevit.trainers import mappo
from prunevit.trainers.common.checkpoint import load_newest
from prunevit.trainers.common.config import MappoConfig

BASE = MappoConfig(
    iterations=12, checkpoint_every=2, eval_every=3, eval_size=50, num_envs=32, device="cpu",
    threads=1,
)  # fmt: skip

# not forks of this process: torch refuses backward passes in one if it ran some itself
FORKSERVER = multiprocessing.get_context("forkserver")


def train(config):
    """Trains to the end of learning, without the report."""
    mappo.learn(*mappo.open_run(config))


def train_in_a_process(config, kill_after=None):
    """Trains in a process of its own, which is killed after ``kill_after`` seconds; returns
    whether it was killed before it ended.
    """
    process = FORKSERVER.Process(target=train, args=(config,))
    process.start()
    process.join(kill_after)
    process.kill()  # does nothing to one that has ended
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def results(folder):
    """What two equal runs have in common: metrics without the seconds, and weights."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) | {"seconds": None} for line in lines]
    weights = load_file(folder / "policy.safetensors")
    return metrics, {name: weight.tolist() for name, weight in weights.items()}


@pytest.mark.stress
def test_killed_runs_end_as_if_they_had_not_been(request, tmp_path):
    kills = request.config.getoption("--kills")
    moments = random.Random(0)
    whole = tmp_path / "whole"
    FORKSERVER.set_forkserver_preload([mappo.__name__])
    train_in_a_process(replace(BASE, run_name=str(tmp_path / "first"), iterations=1))  # imports
    start = time.monotonic()
    train_in_a_process(replace(BASE, run_name=str(whole)))
    seconds = time.monotonic() - start
    resumed_from = []
    for number in range(kills):
        run = tmp_path / str(number)
        again = replace(BASE, run_name=str(run))
        if train_in_a_process(again, moments.uniform(0, seconds)):
            checkpoint = run / "checkpoint.safetensors"
            done = load_newest(checkpoint)["iteration"] if checkpoint.is_file() else 0
            resumed_from.append(done)
            if (run / "config.json").is_file():
                again = MappoConfig(resume=run)
            else:  # killed before there was anything to resume
                shutil.rmtree(run, ignore_errors=True)
            train_in_a_process(again)
        assert results(run) == results(whole), f"run {number}"
    print(
        f"{len(resumed_from)} of {kills} runs were killed, and resumed from iterations "
        f"{sorted(resumed_from)} of {BASE.iterations}"
    )
