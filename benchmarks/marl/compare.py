"""Compares our trainer with other libraries on standard cooperative games:
``python -m benchmarks.marl.compare``.

Our MAPPO and IPPO, BenchMARL's, and Stable-Baselines3's PPO with one policy for all agents train
for the same number of frames, with networks of one size and the same settings wherever they mean
the same. Everything else, from activations to the treatment of values, is each library's own. One
routine evaluates all of them on the same episodes in the course of training, greedily and with
sampled actions.

OUT/records.jsonl gets a line for each training, and OUT/curves.png shows them. A killed comparison
goes on after the last finished training.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

from prunevit.benchmarks.figures import DPI, MARKERS
from prunevit.benchmarks.intervals import t_interval
from prunevit.benchmarks.markdown import markdown_table, mean_and_interval
from prunevit.benchmarks.marl.protocol import (
    SHARED,
    TASKS,
    Curve,
    Learn,
    configuration,
    env_maker,
)
from prunevit.benchmarks.records import FILE, Record, Records, command, origin
from prunevit.cli import prog
from prunevit.envs.old_names import COMPARE_FLAGS, rename_flags
from prunevit.extras import needs
from prunevit.progress import progress_bar, say
from prunevit.trainers.common.report import save_figure
from prunevit.trainers.common.settings import Count, Settings, Threads
from prunevit.trainers.common.signals import ends_in_one_line
from prunevit.trainers.mappo import ADAM_EPS
from prunevit.versions import version_of

with needs("benchmarks"):
    import pandas as pd
    from matplotlib.figure import Figure

FIGURE = "curves.png"
KEY = ("task", "library", "algorithm", "seed")
FIELDS = {
    *KEY, "frames", "points", "greedy", "sampled", "wall_seconds", "cpu_seconds", "threads",
    "settings", "versions", "command",
}  # fmt: skip


class Method(NamedTuple):
    """Who is compared: the title in tables, the library, whose module of this folder has a function
    ``learn``, and the algorithm.
    """

    title: str
    library: str
    algorithm: str


METHODS = {
    "ours-mappo": Method("**our MAPPO**", "ours", "mappo"),
    "ours-ippo": Method("**our IPPO**", "ours", "ippo"),
    "benchmarl-mappo": Method("BenchMARL's MAPPO", "benchmarl", "mappo"),
    "benchmarl-ippo": Method("BenchMARL's IPPO", "benchmarl", "ippo"),
    "sb3-ppo": Method("SB3's PPO", "sb3", "ppo"),
}
PACKAGES = {
    "ours": ("prunevit",),
    "benchmarl": ("benchmarl", "torchrl"),
    "sb3": ("stable-baselines3", "supersuit"),
}


@dataclass
class MarlCompareConfig(Settings):
    """What is compared."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Which games; an unknown name lists them all."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which libraries and algorithms; an unknown name lists them all."""
    seeds: Count = 5
    """Trainings of each method on each game."""
    frames: Count = 300_000
    """Steps of the game in each training, rounded up to whole iterations; all agents act in one."""
    evaluations: Count = 10
    """Evaluations, evenly spread, beside the one before training."""
    episodes: Count = 100
    """Episodes of each evaluation, greedy and sampled."""
    out: Path = Path("results/marl")
    """Folder of the records and the figure."""
    threads: Threads = 1
    """CPU threads. Networks of this size don't gain from more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind, known in (("tasks", TASKS), ("methods", METHODS)):
            names = getattr(self, kind)
            unknown = [name for name in names if name not in known]
            if unknown or not names:
                raise ValueError(
                    f"unknown {kind} {', '.join(unknown) or '()'}: there are {', '.join(known)}"
                )


def learner(library: str) -> Learn:
    """A library's training.

    Raises:
        ImportError: it is missing; the message says how to install it.
    """
    return importlib.import_module(f"prunevit.benchmarks.marl.{library}").learn


def train(config: MarlCompareConfig, task: str, method: str, seed: int) -> Record:
    """Trains once; returns the record."""
    _, library, algorithm = METHODS[method]
    settings = configuration(task, algorithm, seed, config.frames)
    curve = Curve(task, settings, config.evaluations, config.episodes)
    learner(library)(task, algorithm, settings, curve)
    packages = ("torch", "pettingzoo", TASKS[task].split(".")[0], *PACKAGES[library])
    return {
        "task": task,
        "library": library,
        "algorithm": algorithm,
        "seed": seed,
        "frames": curve.frames[-1],
        "points": curve.frames,
        "greedy": curve.greedy,
        "sampled": curve.sampled,
        "wall_seconds": curve.seconds,
        "cpu_seconds": curve.cpu_seconds,
        "threads": torch.get_num_threads(),
        "settings": settings_of(config),
        **origin(torch.device("cpu")),
        "versions": {package: version_of(package) for package in packages},
        "command": command(),
    }


def settings_of(config: MarlCompareConfig) -> dict[str, Any]:
    """What all records of a folder have in common, as JSON values."""
    names = ("frames", "evaluations", "episodes", "threads")
    own = {name: getattr(config, name) for name in names}
    # no library tells an agent which of the agents it is
    fixed = {"adam_eps": ADAM_EPS, "agent_ids": False}
    return json.loads(json.dumps(SHARED | own | fixed))


def compare(config: MarlCompareConfig) -> list[Record]:
    """Trains what isn't trained yet; returns all records of the folder.

    Raises:
        ImportError: a library is missing; the message says how to install it.
        ValueError: the folder holds damaged records, or some of other settings.
        OSError: the disk is full or not writable.
    """
    # a missing library should be known before hours of training, not after
    for task in config.tasks:
        env_maker(task)
    for method in config.methods:
        learner(METHODS[method].library)
    records = Records(config.out / FILE, KEY, FIELDS)
    records.require(settings_of(config))
    records.require_origin(torch.device("cpu"))
    torch.set_num_threads(config.threads)
    # seeds outermost: a machine that slows down, or an end before the last seed, affects all alike
    field = product(range(config.seeds), config.tasks, config.methods)
    due = [
        (task, method, seed)
        for seed, task, method in field
        if records.find(task, *METHODS[method][1:], seed) is None
    ]
    with progress_bar(len(due), "trainings", items=due) as trainings:
        for task, method, seed in trainings:
            row = train(config, task, method, seed)
            records.put(row)
            say(
                f"{task}, {method}, seed {seed}: {row['greedy'][-1]:.2f} greedy, "
                f"{row['sampled'][-1]:.2f} sampled, {row['wall_seconds']:.0f} s"
            )
    return records.rows


def with_methods(rows: Sequence[Record]) -> pd.DataFrame:
    """The records with ``method``, a name of ``METHODS``, and ``greedy_curve`` and
    ``sampled_curve`` beside the returns at the end; ours first.
    """
    data = pd.DataFrame(rows)
    names = {(library, algorithm): name for name, (_, library, algorithm) in METHODS.items()}
    pairs = zip(data["library"], data["algorithm"], strict=True)
    data["method"] = pd.Categorical([names[pair] for pair in pairs], list(METHODS))
    for kind in ("greedy", "sampled"):
        data[f"{kind}_curve"] = data[kind]
        data[kind] = [curve[-1] for curve in data[kind]]
    return data.sort_values("method", kind="stable")


def table(rows: Sequence[Record]) -> str:
    """A line for each method: returns at the end, over the seeds, and CPU seconds of a training."""
    data = with_methods(rows)
    tasks = [task for task in TASKS if task in set(data["task"])]
    lines = []
    for method, runs in data.groupby("method", observed=True):
        cells = [METHODS[method].title]
        for task in tasks:
            group = runs[runs["task"] == task]
            kinds = ("greedy", "sampled") if len(group) else ()
            cells += [mean_and_interval(group[kind].tolist()) for kind in kinds] or ["", ""]
            cells.append(f"{group['cpu_seconds'].mean():.0f}" if len(group) else "")
        lines.append(cells)
    header = [column for task in tasks for column in (f"{task}, greedy", "sampled", "CPU s")]
    return markdown_table(["method", *header], lines)


def draw(rows: Sequence[Record]) -> Figure:
    """Learning curves, a row of panels for each task, greedy and sampled: means over the seeds with
    95% intervals as bands.
    """
    data = with_methods(rows)
    tasks = [task for task in TASKS if task in set(data["task"])]
    figure = Figure(figsize=(11, 4 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False)
    kinds = product(tasks, ("greedy", "sampled"))
    for axes, (task, kind) in zip(panels.flat, kinds, strict=True):
        methods = data[data["task"] == task].groupby("method", observed=True)
        for marker, (name, group) in zip(MARKERS, methods, strict=False):
            values = np.array(group[f"{kind}_curve"].tolist())  # [seeds, points]
            places = group["points"].iloc[0]
            (line,) = axes.plot(places, values.mean(0), label=name, marker=marker, markersize=4)
            color = line.get_color()
            axes.fill_between(places, *t_interval(values), color=color, alpha=0.2, linewidth=0)
        axes.set_title(f"{task}, {kind} actions")
        axes.set_xlabel("frames")
        axes.set_ylabel("mean episode return")
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with ends_in_one_line(ValueError, OSError, ImportError):
        arguments = rename_flags(sys.argv[1:] if arguments is None else arguments, COMPARE_FLAGS)
        config = tyro.cli(MarlCompareConfig, description=__doc__, args=arguments, prog=prog())
        rows = compare(config)
        save_figure(draw(rows), config.out / FIGURE, DPI)
        print(table(rows))


if __name__ == "__main__":
    main()
