"""The trainer beside its peers, on standard cooperative games: ``python -m benchmarks.marl_peers``.

Our MAPPO and IPPO, BenchMARL's, and Stable-Baselines3's PPO with one policy for all agents learn
from as many frames, with networks of one size and the same settings wherever these mean the same;
what is left, from activations to the treatment of values, is each library's own. One routine plays
the same episodes with all of them in the course of their training, greedily and with drawn actions.

OUT/records.jsonl gets a line for each training as soon as it is done, and OUT/curves.png shows
them. A call that was killed goes on behind the last training that was done.
"""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from prunevit.benchmarks.figures import MARKERS, save
from prunevit.benchmarks.marl_games import GAMES, Curve, Learn, Settings, game_maker
from prunevit.benchmarks.records import FILE, Record, cell, interval, read
from prunevit.trainers.common.checkpoint import write_text

FIGURE = "curves.png"
FIELDS = {
    "game", "library", "algorithm", "seed", "frames", "points", "greedy", "sampled",
    "wall_seconds", "cpu_seconds", "threads", "settings", "versions", "command",
}  # fmt: skip


class Entrant(NamedTuple):
    """Who takes part: an algorithm of a library, whose module in ``peers`` has a ``learn``."""

    library: str
    algorithm: str

    @property
    def name(self) -> str:
        return f"{self.library}-{self.algorithm}"


ENTRANTS = {
    entrant.name: entrant
    for entrant in (
        Entrant("ours", "mappo"),
        Entrant("ours", "ippo"),
        Entrant("benchmarl", "mappo"),
        Entrant("benchmarl", "ippo"),
        Entrant("sb3", "ppo"),
    )
}
PACKAGES = {
    "ours": ("prunevit",),
    "benchmarl": ("benchmarl", "torchrl"),
    "sb3": ("stable-baselines3", "supersuit"),
}


@dataclass
class MarlPeersConfig:
    """Who learns what, and for how long."""

    games: tuple[str, ...] = tuple(GAMES)
    """Which games; an unknown name lists them all."""
    entrants: tuple[str, ...] = tuple(ENTRANTS)
    """Who takes part; an unknown name lists them all."""
    seeds: int = 5
    """Trainings of each in each game."""
    frames: int = 300_000
    """Steps of the game in each training, rounded up to whole iterations; all agents act in one."""
    evaluations: int = 10
    """Points of the curves, evenly spread, beside the one before training."""
    episodes: int = 100
    """Episodes of each evaluation, greedy and drawn."""
    out: Path = Path("results/marl-peers")
    """Folder of the records and the figure."""
    threads: int = 1
    """CPU threads. Networks of this size don't gain by more."""


def check(config: MarlPeersConfig) -> None:
    """Refuses settings that can't be compared.

    Raises:
        ValueError: the message says which.
        ImportError: a library is missing; the message says how to install it.
    """
    for kind, names, known in (
        ("games", config.games, list(GAMES)),
        ("entrants", config.entrants, list(ENTRANTS)),
    ):
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ValueError(
                f"unknown {kind} {', '.join(unknown) or '()'}: there are {', '.join(known)}"
            )
    for name in ("seeds", "frames", "evaluations", "episodes", "threads"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    # what is missing should be known before hours of training, not after
    for name in config.games:
        game_maker(name)
    for name in config.entrants:
        learner(ENTRANTS[name].library)


def learner(library: str) -> Learn:
    """A library's way to train.

    Raises:
        ImportError: it is missing; the message says how to install it.
    """
    return importlib.import_module(f"prunevit.benchmarks.peers.marl_{library}").learn


def train(
    config: MarlPeersConfig, game: str, entrant: Entrant, seed: int, settings: Settings
) -> Record:
    """Trains once; what there is to say of it."""
    curve = Curve(game, settings, config.evaluations, config.episodes)
    learner(entrant.library)(game, entrant.algorithm, seed, settings, curve)
    packages = ("torch", "pettingzoo", GAMES[game].split(".")[0], *PACKAGES[entrant.library])
    return {
        "game": game,
        "library": entrant.library,
        "algorithm": entrant.algorithm,
        "seed": seed,
        "frames": curve.frames[-1],
        "points": curve.frames,
        "greedy": curve.greedy,
        "sampled": curve.sampled,
        "wall_seconds": curve.seconds,
        "cpu_seconds": curve.cpu_seconds,
        "threads": torch.get_num_threads(),
        "settings": described(config, settings),
        "versions": {package: version(package) for package in packages},
        "command": f"python -m benchmarks.marl_peers {shlex.join(sys.argv[1:])}",
    }


def described(config: MarlPeersConfig, settings: Settings) -> dict[str, Any]:
    """What must be the same for two records to be compared, as JSON values."""
    own = {name: getattr(config, name) for name in ("evaluations", "episodes", "threads")}
    return json.loads(json.dumps(asdict(settings) | own))


def compare(config: MarlPeersConfig) -> list[Record]:
    """Trains whoever has not been trained yet; returns all records of the folder.

    Raises:
        ValueError: the folder holds damaged records, or some of other settings.
        OSError: the disk is full or not writable.
    """
    settings = Settings(frames=config.frames)
    path = config.out / FILE
    rows = read(path, FIELDS) if path.is_file() else []
    wanted = described(config, settings)
    strange = sorted(
        {
            key
            for row in rows
            for key in wanted.keys() | row["settings"].keys()
            if row["settings"].get(key) != wanted.get(key)
        }
    )
    if strange:
        raise ValueError(
            f"{path} holds records of other settings ({', '.join(strange)}): give another --out"
        )
    torch.set_num_threads(config.threads)
    done = {(row["game"], row["library"], row["algorithm"], row["seed"]) for row in rows}
    # seeds outermost: a machine that slows down does so for all, and a comparison that is cut off
    # has as many of each
    for seed in range(config.seeds):
        for game in config.games:
            for entrant in (ENTRANTS[name] for name in config.entrants):
                if (game, *entrant, seed) in done:
                    continue
                row = train(config, game, entrant, seed, settings)
                rows.append(row)
                write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
                print(
                    f"{game}, {entrant.name}, seed {seed}: {row['greedy'][-1]:.2f} greedy, "
                    f"{row['sampled'][-1]:.2f} drawn, {row['wall_seconds']:.0f} s",
                    flush=True,
                )
    return rows


def grouped(rows: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Records by game and entrant, ours first."""
    games: dict[str, dict[str, list[Record]]] = {}
    for name, entrant in ENTRANTS.items():
        for row in rows:
            if (row["library"], row["algorithm"]) == entrant:
                games.setdefault(row["game"], {}).setdefault(name, []).append(row)
    return games


def table(rows: Sequence[Record]) -> str:
    """A line a game and entrant: what it reached at the end, over the seeds, and how fast."""
    lines = [
        "| game | entrant | seeds | frames | return, greedy | return, drawn | seconds | of CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for game, entrants in grouped(rows).items():
        for name, group in entrants.items():
            greedy, sampled = ([row[key][-1] for row in group] for key in ("greedy", "sampled"))
            wall, cpu = ([row[key] for row in group] for key in ("wall_seconds", "cpu_seconds"))
            lines.append(
                f"| {game} | {name} | {len(group)} | {group[0]['frames']:,} | {cell(greedy)} "
                f"| {cell(sampled)} | {cell(wall, digits=0)} | {cell(cpu, digits=0)} |"
            )
    return "\n".join(lines)


def draw(rows: Sequence[Record], path: Path) -> None:
    """Curves, a row of panels a game, greedy and with drawn actions: means over the seeds, and
    the 95% intervals of the means as bands.
    """
    games = grouped(rows)
    kinds = {"greedy": "greedy", "sampled": "actions drawn"}
    figure = Figure(figsize=(11, 4 * len(games)), layout="constrained")
    panels = figure.subplots(len(games), len(kinds), squeeze=False)
    for line, (game, entrants) in zip(panels, games.items(), strict=True):
        for axes, (kind, title) in zip(line, kinds.items(), strict=True):
            for i, (name, group) in enumerate(entrants.items()):
                points = group[0]["points"]
                values = np.array([row[kind] for row in group])  # [seeds, points]
                bands = np.array([interval(column) for column in values.T.tolist()])
                (drawn,) = axes.plot(
                    points, values.mean(0), label=name, marker=MARKERS[i], markersize=4
                )
                axes.fill_between(
                    points, bands[:, 0], bands[:, 1], color=drawn.get_color(), alpha=0.2,
                    linewidth=0,
                )  # fmt: skip
            axes.set_title(f"{game}, {title}")
            axes.set_xlabel("frames")
            axes.set_ylabel("mean episode return")
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    try:
        config = tyro.cli(
            MarlPeersConfig,
            description=__doc__,
            args=arguments,
            prog="python -m benchmarks.marl_peers",
        )
        check(config)
        rows = compare(config)
        draw(rows, config.out / FIGURE)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(table(rows))


if __name__ == "__main__":
    main()
