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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from prunevit.benchmarks.bootstrap import interval
from prunevit.benchmarks.figures import MARKERS, save_figure
from prunevit.benchmarks.markdown import markdown_table, mean_and_interval
from prunevit.benchmarks.marl.protocol import TASKS, Curve, Learn, Settings, env_maker
from prunevit.benchmarks.records import FILE, Record, Records, command
from prunevit.envs.old_names import COMPARE_FLAGS, rename_flags
from prunevit.versions import version_of

MODULE = "benchmarks.marl.compare"
FIGURE = "curves.png"
KEY = ("task", "library", "algorithm", "seed")
FIELDS = {
    *KEY, "frames", "points", "greedy", "sampled", "wall_seconds", "cpu_seconds", "threads",
    "settings", "versions", "command",
}  # fmt: skip
# library, whose module of this folder has a function learn, and algorithm
METHODS = {
    "ours-mappo": ("ours", "mappo"),
    "ours-ippo": ("ours", "ippo"),
    "benchmarl-mappo": ("benchmarl", "mappo"),
    "benchmarl-ippo": ("benchmarl", "ippo"),
    "sb3-ppo": ("sb3", "ppo"),
}
PACKAGES = {
    "ours": ("prunevit",),
    "benchmarl": ("benchmarl", "torchrl"),
    "sb3": ("stable-baselines3", "supersuit"),
}


@dataclass
class MarlCompareConfig:
    """What is compared."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Which games; an unknown name lists them all."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which libraries and algorithms; an unknown name lists them all."""
    seeds: int = 5
    """Trainings of each method on each game."""
    frames: int = 300_000
    """Steps of the game in each training, rounded up to whole iterations; all agents act in one."""
    evaluations: int = 10
    """Evaluations, evenly spread, beside the one before training."""
    episodes: int = 100
    """Episodes of each evaluation, greedy and sampled."""
    out: Path = Path("results/marl")
    """Folder of the records and the figure."""
    threads: int = 1
    """CPU threads. Networks of this size don't gain from more."""


def check(config: MarlCompareConfig) -> None:
    """Refuses settings that can't be compared.

    Raises:
        ValueError: the message says which.
        ImportError: a library is missing; the message says how to install it.
    """
    for kind, names, known in (
        ("tasks", config.tasks, list(TASKS)),
        ("methods", config.methods, list(METHODS)),
    ):
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ValueError(
                f"unknown {kind} {', '.join(unknown) or '()'}: there are {', '.join(known)}"
            )
    for name in ("seeds", "frames", "evaluations", "episodes", "threads"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    # a missing library should be known before hours of training, not after
    for name in config.tasks:
        env_maker(name)
    for name in config.methods:
        learner(METHODS[name][0])


def learner(library: str) -> Learn:
    """A library's training.

    Raises:
        ImportError: it is missing; the message says how to install it.
    """
    return importlib.import_module(f"prunevit.benchmarks.marl.{library}").learn


def train(
    config: MarlCompareConfig, task: str, method: str, seed: int, settings: Settings
) -> Record:
    """Trains once; returns the record."""
    library, algorithm = METHODS[method]
    curve = Curve(task, settings, config.evaluations, config.episodes)
    learner(library)(task, algorithm, seed, settings, curve)
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
        "settings": settings_of(config, settings),
        "versions": {package: version_of(package) for package in packages},
        "command": command(MODULE),
    }


def settings_of(config: MarlCompareConfig, settings: Settings) -> dict[str, Any]:
    """What all records of a folder have in common, as JSON values."""
    own = {name: getattr(config, name) for name in ("evaluations", "episodes", "threads")}
    return json.loads(json.dumps(asdict(settings) | own))


def compare(config: MarlCompareConfig) -> list[Record]:
    """Trains what isn't trained yet; returns all records of the folder.

    Raises:
        ValueError: the folder holds damaged records, or some of other settings.
        OSError: the disk is full or not writable.
    """
    settings = Settings(frames=config.frames)
    records = Records(config.out / FILE, KEY, FIELDS)
    records.require(settings_of(config, settings))
    torch.set_num_threads(config.threads)
    # seeds outermost: a machine that slows down, or an end before the last seed, affects all alike
    for seed in range(config.seeds):
        for task in config.tasks:
            for method in config.methods:
                if records.find(task, *METHODS[method], seed) is not None:
                    continue
                row = train(config, task, method, seed, settings)
                records.put(row)
                print(
                    f"{task}, {method}, seed {seed}: {row['greedy'][-1]:.2f} greedy, "
                    f"{row['sampled'][-1]:.2f} sampled, {row['wall_seconds']:.0f} s",
                    flush=True,
                )
    return records.rows


def grouped(rows: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Records by task and method, ours first."""
    tasks: dict[str, dict[str, list[Record]]] = {}
    for name, method in METHODS.items():
        for row in rows:
            if (row["library"], row["algorithm"]) == method:
                tasks.setdefault(row["task"], {}).setdefault(name, []).append(row)
    return tasks


def table(rows: Sequence[Record]) -> str:
    """A line for each task and method: returns at the end, over the seeds, and seconds."""
    lines = []
    for task, methods in grouped(rows).items():
        for name, group in methods.items():
            returns = [[row[kind][-1] for row in group] for kind in ("greedy", "sampled")]
            seconds = [[row[kind] for row in group] for kind in ("wall_seconds", "cpu_seconds")]
            lines.append(
                [task, name, str(len(group)), f"{group[0]['frames']:,}"]
                + [mean_and_interval(values) for values in returns]
                + [mean_and_interval(values, digits=0) for values in seconds]
            )
    header = [
        "task", "method", "seeds", "frames", "return, greedy", "return, sampled", "seconds",
        "CPU seconds",
    ]  # fmt: skip
    return markdown_table(header, lines)


def draw(rows: Sequence[Record]) -> Figure:
    """Learning curves, a row of panels for each task, greedy and sampled: means over the seeds with
    95% intervals as bands.
    """
    tasks = grouped(rows)
    figure = Figure(figsize=(11, 4 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False)
    for line, (task, methods) in zip(panels, tasks.items(), strict=True):
        for axes, kind in zip(line, ("greedy", "sampled"), strict=True):
            for marker, (name, group) in zip(MARKERS, methods.items(), strict=False):
                frames = group[0]["points"]
                values = np.array([row[kind] for row in group])  # [seeds, points]
                low, high = np.array([interval(column) for column in values.T.tolist()]).T
                (drawn,) = axes.plot(
                    frames, values.mean(0), label=name, marker=marker, markersize=4
                )
                color = drawn.get_color()
                axes.fill_between(frames, low, high, color=color, alpha=0.2, linewidth=0)
            axes.set_title(f"{task}, {kind} actions")
            axes.set_xlabel("frames")
            axes.set_ylabel("mean episode return")
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    try:
        arguments = rename_flags(sys.argv[1:] if arguments is None else arguments, COMPARE_FLAGS)
        config = tyro.cli(
            MarlCompareConfig, description=__doc__, args=arguments, prog=f"python -m {MODULE}"
        )
        check(config)
        rows = compare(config)
        save_figure(draw(rows), config.out / FIGURE)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(table(rows))


if __name__ == "__main__":
    main()
