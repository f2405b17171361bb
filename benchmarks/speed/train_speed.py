"""Times whole iterations of ``trainers.mappo``: ``python -m benchmarks.speed.train_speed``.

These take turns in one process, at several points of a training on the digits:

- ``ours``: an iteration in the default settings but without a critic;
- ``forward``: the bare forward passes that this iteration needs, which are the lower bound;
- ``benchmarl``: an iteration of BenchMARL's MAPPO on the same game with as many episodes, where
  BenchMARL is installed. It uses a central critic, four minibatches an epoch and each image once;
- ``like-benchmarl``: our trainer in that set-up. Both start with our current share of kept tokens.

With ``--tokens N`` only ours and forward are timed, on noise of N patches and with random weights,
where half of the tokens survive to the end. Run it once for each size, since peak memory is the
process's.

All figures are medians over the rounds, and ratios are medians of each round's own ratio. The
trainer's ``--profile`` shows which parts of an iteration take how long.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
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
from prunevit.benchmarks.markdown import records_table
from prunevit.benchmarks.noise_images import NoiseImages
from prunevit.benchmarks.speed.timed_trainer import Figures, TimedTrainer
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data_config import model_data_config
from prunevit.envs.devices import pick_device
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.experiments import load_backbone
from prunevit.trainers.common.run import COMMAND_ERRORS
from prunevit.trainers.common.settings import Count, Settings, Threads
from prunevit.trainers.common.signals import ends_in_one_line
from prunevit.trainers.common.timing import Timing, speedup

PATCH_SIZE = 8  # of digits_vit, in pixels
SURVIVORS = 0.5  # share of the tokens of noise that survive to the end
FROZEN_LR = 1e-12  # keeps this share constant


@dataclass
class TrainSpeedConfig(Settings):
    """What is measured."""

    after: tuple[int, ...] = (0, 200)
    """Iterations of training before each measurement; early on, little is pruned."""
    rounds: Count = 9
    """Timed iterations of each variant, after one that is not counted."""
    num_envs: int = MappoConfig.num_envs
    """Episodes an iteration."""
    prune_before: tuple[int, ...] = (1, 3)
    """The stages."""
    tokens: Count | None = None
    """Measure on noise of so many patches, a square number; on the digits if not given."""
    benchmarl: bool = True
    """Measure BenchMARL, and ours in its set-up, too."""
    threads: Threads = 2
    """CPU threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    out: Path | None = None
    """Also write the records to this JSON file."""


def set_up(config: TrainSpeedConfig) -> tuple[MappoConfig, nn.Module, ImageSet]:
    """The trainer's settings, the backbone on its device, and the images."""
    settings = MappoConfig(
        num_envs=config.num_envs,
        prune_before=config.prune_before,
        critic="none",
        device=config.device,
    )
    pick_device(config.device)
    if config.tokens is None:
        model = load_backbone(settings)
        data_config = model_data_config(model)
        augment = settings.augment
        return settings, model, open_images(settings.dataset, "train", data_config, augment=augment)
    keep = SURVIVORS ** (1 / len(config.prune_before))
    settings = replace(settings, attention_prior=0.0, keep_bias=log_odds(keep), lr=FROZEN_LR)
    side = PATCH_SIZE * math.isqrt(config.tokens)
    if side**2 != config.tokens * PATCH_SIZE**2:
        raise ValueError(f"tokens={config.tokens}: a square number, as 256")
    model = create_backbone(DIGITS_VIT, untrained=True, img_size=side).to(config.device)
    return settings, model, NoiseImages((1, side, side), max(config.num_envs // 8, 1))


def log_odds(probability: float) -> float:
    """log(p / (1 - p))."""
    return math.log(probability / (1 - probability))


def play_rounds(
    config: TrainSpeedConfig, ours: TimedTrainer, model: nn.Module, images: ImageSet
) -> dict[str, list[Figures]]:
    """Figures of every variant, round by round."""
    settings = ours.trainer.config
    keep = ours.iterate()["kept"]
    turns = {"ours": ours.iterate, "forward": ours.forward}
    if config.benchmarl:
        alike = replace(
            settings, critic="central", critic_hidden=(64,), hidden=(64,), rollouts_per_image=1,
            minibatches=4, attention_prior=0.0, keep_bias=log_odds(keep),
        )  # fmt: skip
        turns["like-benchmarl"] = TimedTrainer(alike, model, images).iterate
    rounds: dict[str, list[Figures]] = defaultdict(list)

    def take_turns(theirs: Figures | None = None) -> None:
        for name, turn in turns.items():
            rounds[name].append(turn())
        if theirs is not None:
            rounds["benchmarl"].append(theirs)

    if config.benchmarl:
        from prunevit.benchmarks.speed.benchmarl import iterate

        iterate(settings, model, images, log_odds(keep), config.rounds + 1, take_turns)
    else:
        for _ in range(config.rounds + 1):
            take_turns()
    return {name: figures[1:] for name, figures in rounds.items()}  # the first one warms up


def to_record(name: str, rounds: Mapping[str, Sequence[Figures]], episodes: int) -> dict[str, Any]:
    """A variant's medians; ``rounds`` are those of all variants."""
    timing, forward, ours = (
        Timing([figures["seconds"] for figures in rounds[each]])
        for each in (name, "forward", "ours")
    )
    decisions, kept = (
        statistics.median(figures[key] for figures in rounds[name]) for key in ("decisions", "kept")
    )
    return {
        "variant": name,
        "seconds": timing.seconds,
        "spread": timing.spread,
        "over_forward": speedup(timing, forward),
        "over_ours": speedup(timing, ours),
        "images_per_second": episodes / timing.seconds,
        "decisions_per_second": decisions / timing.seconds,
        "kept_after_first_stage": kept,
    }


def measure(config: TrainSpeedConfig) -> list[dict[str, Any]]:
    """Records of all variants at each point of the training.

    Raises:
        ValueError: what is asked for can't be measured.
    """
    taken = config.rounds + 2  # two warm up
    limit = MappoConfig.iterations - taken
    if not config.after or any(not 0 <= n <= limit for n in config.after):
        raise ValueError(f"after={config.after}: each must be in 0..{limit}")
    if any(later - earlier < taken for earlier, later in pairwise(config.after)):
        raise ValueError(f"after={config.after}: must ascend by {taken} or more")
    torch.set_num_threads(config.threads)
    settings, model, images = set_up(config)
    ours = TimedTrainer(settings, model, images)
    shared = {
        "episodes": config.num_envs,
        "tokens": ours.env.num_agents,
        "stages": len(config.prune_before),
        "device": torch.cuda.get_device_name() if config.device == "cuda" else config.device,
        "threads": torch.get_num_threads(),
    }
    records: list[dict[str, Any]] = []
    for iterations in config.after:
        while ours.trainer.iteration < max(iterations, 1):
            ours.iterate()
        at = {
            "after": iterations,
            "load_before": os.getloadavg()[0],
            "peak_memory": peak_memory(torch.device(config.device)),  # before BenchMARL is there
        }
        rounds = play_rounds(config, ours, model, images)
        records += [to_record(name, rounds, config.num_envs) | at | shared for name in rounds]
    return records


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as Markdown."""
    columns = {
        "after": ("after", 1, ""),
        "variant": ("variant", 1, ""),
        "images/s": ("images_per_second", 1, ".0f"),
        "decisions/s": ("decisions_per_second", 1, ",.0f"),
        "kept": ("kept_after_first_stage", 1, ".2f"),
        "over forward": ("over_forward", 1, ".2f"),
        "over ours": ("over_ours", 1, ".2f"),
        "peak MiB": ("peak_memory", MIB, ".0f"),
    }
    return records_table(records, columns)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with ends_in_one_line(*COMMAND_ERRORS):
        prog = "python -m benchmarks.speed.train_speed"
        config = tyro.cli(TrainSpeedConfig, description=__doc__, args=arguments, prog=prog)
        if config.tokens is not None:
            config.benchmarl = False
        elif config.benchmarl and importlib.util.find_spec("benchmarl") is None:
            print("BenchMARL is left out: it comes with pip install -e '.[benchmarl]'")
            config.benchmarl = False
        records = measure(config)
        if config.out is not None:
            write_json(config.out, records)
        print(table(records))


if __name__ == "__main__":
    main()
