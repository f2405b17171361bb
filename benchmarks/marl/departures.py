"""Measures changes of our defaults for PettingZoo games, which are those of MAPPO's authors:
``python -m benchmarks.marl.departures``.

OUT/records.jsonl gets a line for each training. A killed command goes on after the last finished
training.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from prunevit.benchmarks.markdown import markdown_table, mean_and_interval
from prunevit.benchmarks.records import FILE, Record, Records, command
from prunevit.trainers.common.config import PETTINGZOO_PREFIX, MappoConfig, defaults_for
from prunevit.trainers.common.experiments import PettingZooExperiment
from prunevit.trainers.mappo import Trainer
from prunevit.versions import version_of

MODULE = "benchmarks.marl.departures"
KEY = ("task", "change", "seed")
FIELDS = {*KEY, "settings", "greedy", "sampled", "cpu_seconds", "versions", "command"}
PURSUIT = {
    "x_size": 8, "y_size": 8, "n_evaders": 4, "n_pursuers": 4, "obs_range": 5, "max_cycles": 50,
    "surround": False,
}  # fmt: skip
TASKS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "simple_spread": ("mpe2.simple_spread_v3", {}),
    "simple_reference": ("mpe2.simple_reference_v3", {}),
    "pursuit": ("pettingzoo.sisl.pursuit_v5", PURSUIT),
}
CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "no-critic-norm": {"critic_norm": False},
    "8-minibatches": {"epochs": 5, "minibatches": 8},
    "15-epochs": {"epochs": 15},
    "linear-lr": {"lr": 1e-3, "lr_schedule": "linear"},
    "fast-value-norm": {"value_norm_decay": 0.99},
}
# what the defaults were until 0.2, but for the value norm, whose decay was 0.99 an iteration
CHANGES = CHANGES | {
    "before-0.2": CHANGES["no-critic-norm"] | CHANGES["8-minibatches"] | CHANGES["linear-lr"]
}


@dataclass
class DeparturesConfig:
    """What is measured."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Which games; an unknown name lists them all."""
    changes: tuple[str, ...] = tuple(CHANGES)
    """Which changes; an unknown name lists them all."""
    seeds: int = 5
    """Trainings of each change on each game."""
    iterations: int = 150
    """Iterations of each training, of 2,048 steps of the game."""
    episodes: int = 200
    """Episodes of the evaluation, greedy and sampled."""
    out: Path = Path("results/departures")
    """Folder of the records."""
    threads: int = 1
    """CPU threads."""


def settings(config: DeparturesConfig, task: str, change: str, seed: int) -> MappoConfig:
    """The defaults for the game with the change."""
    module, arguments = TASKS[task]
    changes: dict[str, Any] = {
        "env_kwargs": arguments,
        "iterations": config.iterations,
        "eval_size": config.episodes,
        "seed": seed,
        "device": "cpu",
    }
    return replace(defaults_for(f"{PETTINGZOO_PREFIX}{module}"), **changes | CHANGES[change])


def train(config: MappoConfig) -> tuple[dict[str, float], float]:
    """Trains once; returns the results of the policy at the end and the CPU seconds."""
    torch.manual_seed(config.seed)
    experiment = PettingZooExperiment(config)
    started = time.process_time()
    trainer = Trainer(experiment.env, experiment.make_actor(), config)
    for _ in range(config.iterations):
        trainer.iterate()
    seconds = time.process_time() - started
    results = experiment.evaluate(trainer.learner.actor)
    experiment.env.close()
    return results, seconds


def measure(config: DeparturesConfig) -> list[Record]:
    """Trains what isn't trained yet; returns all records of the folder.

    Raises:
        ValueError: an unknown name, or the folder holds damaged records or some of other settings.
        OSError: the disk is full or not writable.
    """
    for kind, names, known in (
        ("tasks", config.tasks, TASKS),
        ("changes", config.changes, CHANGES),
    ):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"unknown {kind} {', '.join(unknown)}: there are {', '.join(known)}")
    records = Records(config.out / FILE, KEY, FIELDS)
    common = {"iterations": config.iterations, "episodes": config.episodes}
    records.require(common)
    torch.set_num_threads(config.threads)
    # seeds outermost: an end before the last seed affects all alike
    for seed in range(config.seeds):
        for task in config.tasks:
            for change in config.changes:
                if records.find(task, change, seed) is not None:
                    continue
                results, seconds = train(settings(config, task, change, seed))
                row = {
                    "task": task,
                    "change": change,
                    "seed": seed,
                    "settings": common,
                    "greedy": results["validation_episode_return"],
                    "sampled": results["validation_sampled_return"],
                    "cpu_seconds": seconds,
                    "versions": {name: version_of(name) for name in ("prunevit", "torch")},
                    "command": command(MODULE),
                }
                records.put(row)
                print(
                    f"{task}, {change}, seed {seed}: {row['greedy']:.2f} greedy, "
                    f"{row['sampled']:.2f} sampled, {seconds:.0f} s",
                    flush=True,
                )
    return records.rows


def table(rows: Sequence[Record]) -> str:
    """A line for each game and change: returns over the seeds, and CPU seconds."""
    lines = []
    for task in TASKS:
        for change in CHANGES:
            group = [row for row in rows if (row["task"], row["change"]) == (task, change)]
            if group:
                greedy, sampled, seconds = (
                    [row[kind] for row in group] for kind in ("greedy", "sampled", "cpu_seconds")
                )
                returns = [mean_and_interval(greedy), mean_and_interval(sampled)]
                spent = mean_and_interval(seconds, digits=0)
                lines.append([task, change, str(len(group)), *returns, spent])
    header = ["task", "change", "seeds", "return, greedy", "return, sampled", "CPU seconds"]
    return markdown_table(header, lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    try:
        config = tyro.cli(
            DeparturesConfig, description=__doc__, args=arguments, prog=f"python -m {MODULE}"
        )
        rows = measure(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(table(rows))


if __name__ == "__main__":
    main()
