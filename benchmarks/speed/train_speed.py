"""Times whole iterations of ``trainers.mappo``: ``python -m benchmarks.speed.train_speed``.

These take turns in one process, at several points of a training on the digits:

- ``ours``: an iteration in the default settings, split into load, backbone, policy and update;
- ``forward``: the bare forward passes that this iteration needs, which are the lower bound;
- ``benchmarl``: an iteration of BenchMARL's MAPPO on the same game with as many episodes, where
  BenchMARL is installed. It uses a central critic, four minibatches an epoch and each image once;
- ``like-benchmarl``: our trainer in that set-up. Both start with our current share of kept tokens.

With ``--tokens N`` only ours and forward are timed, on noise of N patches and with random weights,
where half of the tokens survive to the end. Run it once for each size, since peak memory is the
process's.

All figures are medians over the rounds, and ratios are medians of each round's own ratio.
"""

from __future__ import annotations

import importlib
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from prunevit.benchmarks.machine import MIB, peak_memory
from prunevit.benchmarks.markdown import markdown_table
from prunevit.benchmarks.noise_images import NoiseImages
from prunevit.benchmarks.speed.timed_trainer import Figures, TimedTrainer
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data_config import model_data_config
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.experiments import load_backbone
from prunevit.trainers.common.timing import Timing, speedup

Record = dict[str, Any]

PATCH_SIZE = 8  # of digits_vit, in pixels
SURVIVORS = 0.5  # share of the tokens of noise that survive to the end
FROZEN_LR = 1e-12  # keeps this share constant


@dataclass
class TrainSpeedConfig:
    """What is measured."""

    after: tuple[int, ...] = (0, 200)
    """Iterations of training before each measurement; early on, little is pruned."""
    rounds: int = 9
    """Timed iterations of each variant, after one that is not counted."""
    num_envs: int = MappoConfig.num_envs
    """Episodes an iteration."""
    prune_before: tuple[int, ...] = (1, 3)
    """The stages."""
    tokens: int | None = None
    """Measure on noise of so many patches, a square number; on the digits if not given."""
    benchmarl: bool = True
    """Measure BenchMARL, and ours in its set-up, too."""
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
    for name in ("rounds", "threads"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: at least 1")
    tokens = config.tokens
    if tokens is not None and (tokens < 1 or math.isqrt(tokens) ** 2 != tokens):
        raise ValueError(f"tokens={tokens}: a square number, as 256")
    taken = config.rounds + 2  # two warm up
    limit = MappoConfig.iterations - taken
    if not config.after or any(not 0 <= n <= limit for n in config.after):
        raise ValueError(f"after={config.after}: each must be in 0..{limit}")
    if any(later - earlier < taken for earlier, later in pairwise(config.after)):
        raise ValueError(f"after={config.after}: must ascend by {taken} or more")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device")


def set_up(config: TrainSpeedConfig) -> tuple[MappoConfig, nn.Module, ImageSet]:
    """The trainer's settings, the backbone on its device, and the images."""
    settings = MappoConfig(
        num_envs=config.num_envs,
        prune_before=config.prune_before,
        device=config.device,
        seed=config.seed,
    )
    if config.tokens is None:
        model = load_backbone(settings)
        data_config = model_data_config(model)
        augment = settings.augment
        return settings, model, open_images(settings.dataset, "train", data_config, augment=augment)
    keep = SURVIVORS ** (1 / len(config.prune_before))
    settings = replace(settings, attention_prior=0.0, keep_bias=log_odds(keep), lr=FROZEN_LR)
    side = PATCH_SIZE * math.isqrt(config.tokens)
    model = create_backbone(DIGITS_VIT, untrained=True, img_size=side).to(config.device)
    return settings, model, NoiseImages((1, side, side), max(config.num_envs // 8, 1))


def log_odds(probability: float) -> float:
    """log(p / (1 - p))."""
    return math.log(probability / (1 - probability))


def like_benchmarl(settings: MappoConfig, keep: float) -> MappoConfig:
    """Our trainer set up as BenchMARL's, starting from the probability ``keep``."""
    return replace(
        settings, critic="central", critic_hidden=(64,), hidden=(64,), rollouts_per_image=1,
        minibatches=4, attention_prior=0.0, keep_bias=log_odds(keep),
    )  # fmt: skip


def play_rounds(
    config: TrainSpeedConfig, ours: TimedTrainer, model: nn.Module, images: ImageSet
) -> dict[str, list[Figures]]:
    """Figures of every variant, round by round."""
    settings = ours.trainer.config
    keep = ours.iterate()["kept"]
    turns = {"ours": ours.iterate, "forward": ours.forward}
    if config.benchmarl:
        alike = TimedTrainer(like_benchmarl(settings, keep), model, images)
        turns["like-benchmarl"] = alike.iterate
    rounds: dict[str, list[Figures]] = defaultdict(list)

    def take_turns(theirs: Figures | None = None) -> None:
        for name, turn in turns.items():
            rounds[name].append(turn())
        if theirs is not None:
            rounds["benchmarl"].append(theirs)

    if config.benchmarl:
        from prunevit.benchmarks.speed.benchmarl import iterate

        iterate(settings, model, images, keep, config.rounds + 1, take_turns)
    else:
        for _ in range(config.rounds + 1):
            take_turns()
    return {name: figures[1:] for name, figures in rounds.items()}  # the first one warms up


def to_record(name: str, rounds: Mapping[str, Sequence[Figures]], episodes: int) -> Record:
    """A variant's medians; ``rounds`` are those of all variants."""
    timings = {
        each: Timing([figures["seconds"] for figures in rounds[each]])
        for each in (name, "forward", "ours")
    }
    seconds = timings[name].seconds
    medians = {
        key: statistics.median(figures[key] for figures in rounds[name]) for key in rounds[name][0]
    }
    return {
        "variant": name,
        "spread": timings[name].spread,
        "over_forward": speedup(timings[name], timings["forward"]),
        "over_ours": speedup(timings[name], timings["ours"]),
        "images_per_second": episodes / seconds,
        "decisions_per_second": medians.pop("decisions") / seconds,
        "kept_after_first_stage": medians.pop("kept"),
        **medians,
    }


def measure(config: TrainSpeedConfig) -> list[Record]:
    """Records of all variants at each point of the training."""
    settings, model, images = set_up(config)
    ours = TimedTrainer(settings, model, images)
    shared = {
        "episodes": config.num_envs,
        "tokens": ours.env.num_agents,
        "stages": len(config.prune_before),
        "device": torch.cuda.get_device_name() if config.device == "cuda" else config.device,
        "threads": torch.get_num_threads(),
    }
    records: list[Record] = []
    for iterations in config.after:
        while ours.trainer.iteration < max(iterations, 1):
            ours.iterate()
        peak = peak_memory(torch.device(config.device))  # before BenchMARL is there
        load = os.getloadavg()[0]
        rounds = play_rounds(config, ours, model, images)
        at = {"after": iterations, "load_before": load, "peak_memory": peak}
        records += [to_record(name, rounds, config.num_envs) | at | shared for name in rounds]
    return records


def table(records: Sequence[Record]) -> str:
    """The records as Markdown."""
    parts = ("load", "backbone", "policy", "update")
    header = [
        "after", "variant", "images/s", "decisions/s", "kept", "over forward", "over ours",
        *(f"{part}, ms" for part in parts), "peak MiB",
    ]  # fmt: skip
    rows = [
        [
            str(row["after"]), row["variant"], f"{row['images_per_second']:.0f}",
            f"{row['decisions_per_second']:,.0f}", f"{row['kept_after_first_stage']:.2f}",
            f"{row['over_forward']:.2f}x", f"{row['over_ours']:.2f}x",
            *(f"{1e3 * row[part]:.1f}" if part in row else "" for part in parts),
            f"{row['peak_memory'] / MIB:.0f}",
        ]
        for row in records
    ]  # fmt: skip
    return markdown_table(header, rows)


def without_missing(config: TrainSpeedConfig) -> TrainSpeedConfig:
    """Leaves BenchMARL out where it isn't installed, with a message, and where noise is played."""
    if config.tokens is not None:
        return replace(config, benchmarl=False)
    if config.benchmarl:
        try:
            importlib.import_module("prunevit.benchmarks.speed.benchmarl")
        except ImportError as error:
            print(f"BenchMARL is left out: {error}", file=sys.stderr)
            return replace(config, benchmarl=False)
    return config


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    prog = "python -m benchmarks.speed.train_speed"
    config = tyro.cli(TrainSpeedConfig, description=__doc__, args=arguments, prog=prog)
    try:
        check(config)
        torch.set_num_threads(config.threads)
        records = measure(without_missing(config))
        if config.out is not None:
            write_json(config.out, records)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(table(records))


if __name__ == "__main__":
    main()
