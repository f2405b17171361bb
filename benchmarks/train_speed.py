"""How fast training is: ``python -m benchmarks.train_speed``.

Times whole iterations of ``trainers.mappo`` in its default settings on the digits, in the course of
a training, split into load, backbone, policy and update. Beside them, in turns, in one process:

- ``forward``: the bare forward passes that the very same iteration needs, the limit;
- ``straw``: the same arithmetic driven image by image and stage by stage in Python, as RL4EViT's
  released code drives its own; written here for the comparison (``benchmarks/peers/straw.py``);
- ``benchmarl``: BenchMARL's MAPPO as ``trainers.benchmarl`` sets it up, on the same game with as
  many episodes. Its learning set-up, with a central critic, four minibatches an epoch and every
  image once, does more than ours;
- ``like-benchmarl``: our trainer in that set-up; both start out keeping as many tokens as ours.

Then, with ``--grid``, what an iteration costs by number of tokens, episodes and stages: each in a
process of its own, for its peak memory. There images are noise and weights random, and half of the
tokens live to the end.

Figures are medians; ratios are those within a round.
"""

from __future__ import annotations

import copy
import importlib
import math
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from prunevit.benchmarks.iterations import Cell, Parts, WatchedTrainer, measure_cell
from prunevit.benchmarks.measuring import Timing, now, speedup
from prunevit.benchmarks.peers.straw import Straw
from prunevit.envs.data.datasets import ImageSet, open_images
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.experiments import load_backbone
from prunevit.trainers.mappo import sample

Record = dict[str, Any]
Peer = Literal["straw", "benchmarl", "like-benchmarl"]

MIB = 2**20
SURVIVORS = 0.5  # in the grid
# what of the grid is measured where the others vary
USUAL = {"tokens": 64, "batch": 256, "stages": 2}


@dataclass
class TrainSpeedConfig:
    """What is measured."""

    after: tuple[int, ...] = (0, 200)
    """Iterations of learning after which it is measured: at first little is pruned."""
    rounds: int = 9
    """Timed iterations of each variant at each of those points, all in turns; one before them is
    not counted."""
    peers: tuple[Peer, ...] = ("straw", "benchmarl", "like-benchmarl")
    """Who is measured beside ours; none if empty."""
    num_envs: int = MappoConfig.num_envs
    """Episodes an iteration, of all variants."""
    grid: bool = False
    """Also measure the cost by tokens, episodes and stages."""
    tokens: tuple[int, ...] = (64, 256, 1024)
    """Of the grid: square numbers."""
    batches: tuple[int, ...] = (32, 128, 512, 1024)
    """Of the grid: episodes an iteration."""
    stages: tuple[int, ...] = (1, 2, 4, 7)
    """Of the grid: points at which tokens can be pruned, with 64 tokens and 256 episodes."""
    grid_rounds: int = 3
    """Timed iterations of each cell of the grid."""
    threads: int = 2
    """CPU threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    seed: int = 0
    """Of weights, images and actions."""
    out: Path | None = None
    """Also write the records to this JSON file."""


def check(config: TrainSpeedConfig) -> None:
    """Refuses settings that can't be measured.

    Raises:
        ValueError: the message says which.
    """
    for name, least in (("rounds", 1), ("grid_rounds", 1), ("threads", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)}: at least {least}")
    rollouts = MappoConfig.rollouts_per_image
    for batch in (config.num_envs, *config.batches):
        if batch < rollouts or batch % rollouts:
            raise ValueError(f"{batch} episodes an iteration: a multiple of {rollouts} is needed")
    if any(n < 1 or math.isqrt(n) ** 2 != n for n in config.tokens):
        raise ValueError(f"tokens={config.tokens}: square numbers, as 64 256 1024")
    if not all(1 <= n <= 7 for n in config.stages):
        raise ValueError(f"stages={config.stages}: each 1..7, there are 8 blocks")
    taken = config.rounds + 2  # two warm up
    limit = MappoConfig.iterations - taken
    if not config.after or any(not 0 <= n <= limit for n in config.after):
        raise ValueError(f"after={config.after}: each 0..{limit}, a training has an end")
    if any(later - earlier < taken for earlier, later in pairwise(config.after)):
        raise ValueError(f"after={config.after}: ascending, and {taken} apart or more")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device")


@dataclass
class Row:
    """What was measured of one variant."""

    timing: Timing = field(default_factory=Timing)
    parts: list[Parts] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)  # after the first stage, of all tokens

    def record(self, variant: str, rows: dict[str, Row], episodes: int) -> Record:
        """As JSON values; ``rows`` are those of all variants."""
        seconds = self.timing.seconds
        parts = [vars(each) for each in self.parts]
        return {
            "variant": variant,
            "seconds": seconds,
            "spread": self.timing.spread,
            "over_forward": speedup(self.timing, rows["forward"].timing),
            "over_ours": speedup(self.timing, rows["ours"].timing),
            "images_per_second": episodes / seconds,
            "decisions_per_second": statistics.median(self.decisions) / seconds,
            "kept_after_first_stage": statistics.median(self.kept),
        } | {
            name: statistics.median(each[name] for each in parts)
            for name in (parts[0] if parts else ())
        }


class Contest:
    """Variants that take turns.

    Args:
        config: what is measured.
        model: the backbone, on its device.
        images: what is played.
    """

    def __init__(self, config: TrainSpeedConfig, model: nn.Module, images: ImageSet) -> None:
        self._config = config
        self._model = model
        self._images = images
        self._settings = MappoConfig(
            num_envs=config.num_envs, device=config.device, seed=config.seed
        )
        self._ours = WatchedTrainer(self._settings, model, images)
        self.rows: dict[str, Row] = {}

    def learn_until(self, iterations: int) -> None:
        """Trains on without measuring."""
        while self._ours.trainer.iteration < iterations:
            self._ours.iterate()

    def measure(self) -> dict[str, Row]:
        """Rounds of all variants; a first one is not counted."""
        self._ours.iterate()
        keep = self._ours.played.kept[0]
        others = self._others(keep)
        self.rows = {"ours": Row(), "forward": Row()}
        self._round(others)
        self.rows = {name: Row() for name in self.rows}
        rounds = self._config.rounds
        if "benchmarl" not in self._config.peers:
            for _ in range(rounds):
                self._round(others)
            return self.rows
        from prunevit.benchmarks.peers.iterations_benchmarl import Iteration, iterate

        theirs, turns = Row(), []

        def take_turn(iteration: Iteration) -> None:
            turns.append(iteration)
            if len(turns) > 1:  # their first warms up
                theirs.timing.passes.append(iteration.seconds)
                theirs.decisions.append(iteration.decisions)
                theirs.kept.append(iteration.kept)
                self._round(others)

        iterate(self._settings, self._model, self._images, keep, rounds + 1, take_turn)
        return self.rows | {"benchmarl": theirs}

    def _others(self, keep: float) -> dict[str, Straw | WatchedTrainer]:
        """Those that don't take their turns by themselves; ``keep``: as for BenchMARL."""
        others: dict[str, Straw | WatchedTrainer] = {}
        if "straw" in self._config.peers:
            learner = copy.deepcopy(self._ours.trainer.learner)
            others["straw"] = Straw(learner, self._ours.game, self._ours.env.fields)
        if "like-benchmarl" in self._config.peers:
            alike = replace(
                self._settings, critic="central", critic_hidden=(64,), hidden=(64,),
                rollouts_per_image=1, minibatches=4, attention_prior=0.0,
                keep_bias=math.log(keep / (1 - keep)),
            )  # fmt: skip
            others["like-benchmarl"] = WatchedTrainer(alike, self._model, self._images)
        return others

    def _round(self, others: dict[str, Straw | WatchedTrainer]) -> None:
        ours = self._ours
        self._note("ours", ours.iterate(), ours)
        forward = self.rows["forward"]
        forward.timing.passes.append(ours.bare_forward())
        forward.decisions.append(ours.played.decisions)
        forward.kept.append(ours.played.kept[0])
        for name, other in others.items():
            if isinstance(other, WatchedTrainer):
                self._note(name, other.iterate(), other)
            else:
                self._time_straw(other)

    def _note(self, name: str, parts: Parts, watched: WatchedTrainer) -> None:
        row = self.rows.setdefault(name, Row())
        row.timing.passes.append(parts.total)
        row.parts.append(parts)
        row.decisions.append(watched.played.decisions)
        row.kept.append(watched.played.kept[0])

    def _time_straw(self, straw: Straw) -> None:
        device = self._ours.env.device
        generator = torch.Generator(device).manual_seed(self._config.seed)
        kept: list[Tensor] = []

        def choose(log_probs: Tensor, stage: int) -> Tensor:
            action = sample(log_probs, generator)
            if stage == 0:
                kept.append(action.float().mean())
            return action

        played = self._ours.played
        begun = now(device)
        decisions = straw.iterate(played.images, played.labels, choose)
        row = self.rows.setdefault("straw", Row())
        row.timing.passes.append(now(device) - begun)
        row.decisions.append(decisions)
        row.kept.append(float(torch.stack(kept).mean()))


def measure(config: TrainSpeedConfig) -> list[Record]:
    """Records of all variants at each point of the training."""
    settings = MappoConfig(device=config.device)
    model = load_backbone(settings)
    images = open_images(
        settings.dataset, "train", resolve_model_data_config(model), augment=settings.augment
    )
    contest = Contest(config, model, images)
    shared = {
        "episodes": config.num_envs,
        "device": torch.cuda.get_device_name() if config.device == "cuda" else config.device,
        "threads": torch.get_num_threads(),
    }
    records: list[Record] = []
    for iterations in config.after:
        contest.learn_until(iterations)
        load = os.getloadavg()[0]
        rows = contest.measure()
        records += [
            row.record(name, rows, config.num_envs)
            | {"after": iterations, "load_before": load}
            | shared
            for name, row in rows.items()
        ]
    return records


def cells(config: TrainSpeedConfig) -> list[Cell]:
    """The grid's, each once."""
    sizes = [
        USUAL | {"tokens": tokens, "batch": batch}
        for tokens in config.tokens
        for batch in config.batches
    ]
    sizes += [USUAL | {"stages": stages} for stages in config.stages]
    return [
        Cell(
            survivors=SURVIVORS,
            rounds=config.grid_rounds,
            device=config.device,
            threads=config.threads,
            **size,
        )
        for size in sizes
    ]


def in_a_process(cell: Cell) -> Record:
    """The cell and its figures."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        return vars(cell) | process.submit(measure_cell, cell).result()


HEAD = (
    f"{'variant':<15}{'images/s':>9}{'decisions/s':>13}{'kept':>6}{'over forward':>14}"
    f"{'over ours':>11}{'load':>8}{'backbone':>10}{'policy':>8}{'update':>8}  ms"
)


def table(records: list[Record]) -> str:
    """Variants at each point of the training as text."""
    lines = []
    for iterations in dict.fromkeys(record["after"] for record in records):
        here = [record for record in records if record["after"] == iterations]
        ours = next(record for record in here if record["variant"] == "ours")
        lines += [
            f"after {iterations} iterations, {ours['episodes']} episodes each ({ours['device']}, "
            f"{ours['threads']} threads, load {ours['load_before']:.2f} before)",
            HEAD,
        ]
        for row in here:
            parts = [row.get(name) for name in ("load", "backbone", "policy", "update")]
            lines.append(
                f"{row['variant']:<15}{row['images_per_second']:>9.0f}"
                f"{row['decisions_per_second']:>13,.0f}{row['kept_after_first_stage']:>6.2f}"
                f"{row['over_forward']:>13.2f}x"
                f"{row['over_ours']:>10.2f}x"
                + "".join(
                    f"{'-' if part is None else format(1e3 * part, '.1f'):>{width}}"
                    for part, width in zip(parts, (8, 10, 8, 8), strict=True)
                )
            )
    return "\n".join(lines)


GRID_HEAD = (
    f"{'tokens':>6}{'episodes':>10}{'stages':>8}{'ms an image':>13}{'forward, ms':>13}"
    f"{'over forward':>14}{'peak MiB':>10}"
)


def grid_line(cell: Record) -> str:
    """A cell of the grid as text."""
    each = 1e3 / cell["batch"]
    return (
        f"{cell['tokens']:>6}{cell['batch']:>10}{cell['stages']:>8}"
        f"{each * cell['seconds']:>13.3f}{each * cell['forward_seconds']:>13.3f}"
        f"{cell['seconds'] / cell['forward_seconds']:>13.2f}x{cell['memory'] / MIB:>10.0f}"
    )


def report(config: TrainSpeedConfig) -> None:
    """Measures, prints, and keeps the file up to date with it."""
    records: dict[str, list[Record]] = {"variants": measure(config), "grid": []}
    print(table(records["variants"]), flush=True)
    if config.out is not None:
        write_json(config.out, records)
    if not config.grid:
        return
    print(GRID_HEAD)
    for cell in cells(config):
        try:
            records["grid"].append(in_a_process(cell))
        except BrokenProcessPool:
            print(f"{cell.tokens:>6}{cell.batch:>10}{cell.stages:>8}  was killed: out of memory?")
            continue
        print(grid_line(records["grid"][-1]), flush=True)
        if config.out is not None:
            write_json(config.out, records)


def without_missing(config: TrainSpeedConfig) -> TrainSpeedConfig:
    """``config`` without BenchMARL where it is not installed, which is said."""
    if "benchmarl" in config.peers:
        try:
            importlib.import_module("prunevit.benchmarks.peers.iterations_benchmarl")
        except ImportError as error:
            print(f"benchmarl is left out: {error}", file=sys.stderr)
            return replace(config, peers=tuple(p for p in config.peers if p != "benchmarl"))
    return config


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(
        TrainSpeedConfig,
        description=__doc__,
        args=arguments,
        prog="python -m benchmarks.train_speed",
    )
    try:
        check(config)
        torch.set_num_threads(config.threads)
        report(without_missing(config))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
