"""Times whole iterations of ``trainers.mappo``: ``python -m benchmarks.speed.train_speed``.

These take turns in one process, on the digits:

- ``ours``: an iteration in the default settings but without a critic;
- ``forward``: the bare forward passes that this iteration needs, which are the lower bound.

With ``--tokens N`` they run on noise of N patches and with random weights, where half of the tokens
survive to the end. Run it once for each size, since peak memory is the process's.

All figures are medians over the rounds, and ratios are medians of each round's own ratio. The
trainer's ``--profile`` shows which parts of an iteration take how long.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.benchmarks.machine import MIB, peak_memory
from prunevit.benchmarks.markdown import records_table
from prunevit.benchmarks.noise_images import NoiseImages
from prunevit.cli import prog
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data_config import model_data_config
from prunevit.envs.devices import now, pick_device
from prunevit.envs.game import Stage, TokenGame
from prunevit.envs.rewards import make_reward
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.progress import progress_bar
from prunevit.trainers.common.backbones import load_backbone
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.run import COMMAND_ERRORS
from prunevit.trainers.common.settings import Count, Range, Settings, Threads
from prunevit.trainers.common.signals import ends_in_one_line
from prunevit.trainers.common.timing import Timing, speedup
from prunevit.trainers.mappo import Trainer

PATCH_SIZE = 8  # of digits_vit, in pixels
SURVIVORS = 0.5  # share of the tokens of noise that survive to the end
FROZEN_LR = 1e-12  # keeps this share constant

Figures = dict[str, float]
"""Of one iteration: ``seconds``, ``decisions`` (how often a living agent acted) and ``kept`` (share
of the agents alive after the first stage).
"""


@dataclass
class TrainSpeedConfig(Settings):
    """What is measured."""

    after: Annotated[int, Range(0, 400)] = 0
    """Iterations of training before the measurement; early on, little is pruned."""
    rounds: Count = 9
    """Timed iterations of each variant, after one that is not counted."""
    num_envs: Count = MappoConfig.num_envs
    """Episodes an iteration."""
    prune_before: tuple[int, ...] = (1, 3)
    """The stages."""
    tokens: Count | None = None
    """Measure on noise images with this many patches, a square number. Default: the digits."""
    threads: Threads = 2
    """CPU threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    out: Path | None = None
    """Also write the records to this JSON file."""


@torch.no_grad()
def bare_forward(env: BatchedTokenPrune, images: Tensor, keeps: Sequence[Tensor]) -> None:
    """The forward passes of a rollout, including the dense one that the reward compares with. There
    are no observations, rewards or policy.

    Args:
        env: the game.
        images: [n, C, H, W], on the game's device.
        keeps: joint actions, bool [B, N] a stage.
    """
    backbone = env.game.backbone
    tokens = backbone.begin(images, with_attention=False)
    if env.game.reward.needs_dense:
        env.game.dense_logits(tokens)
    if env.rollouts_per_start > 1:
        tokens = tokens.repeat(env.rollouts_per_start)
    for stage, keep in enumerate(keeps):
        tokens = backbone.advance(tokens, keep, stage, with_attention=False)
    backbone.finish(tokens)


class NotingGame(TokenGame):
    """Notes the joint actions of the last episodes: ``keeps``, bool [B, N] a stage."""

    def reset(self, images: Tensor, labels: Tensor, alpha: Tensor | None = None) -> Stage:
        self.keeps: list[Tensor] = []
        return super().reset(images, labels, alpha)

    def step(self, keep: Tensor) -> Stage:
        self.keeps.append(keep)
        return super().step(keep)


class TimedTrainer:
    """A trainer whose iterations are timed.

    Args:
        config: its settings; the reward has its default arguments.
        model: the backbone, on its device.
        images: the images that are played.
    """

    def __init__(self, config: MappoConfig, model: nn.Module, images: ImageSet) -> None:
        torch.manual_seed(config.seed)
        staged = StagedViT(model, config.prune_before)
        self.game = NotingGame(staged, make_reward(config.reward), config.rollouts_per_image)
        self.env = BatchedTokenPrune(self.game, images, config.num_envs, config.observation)
        actor = TokenActor(
            self.env.observation_space.shape[0],
            config.hidden,
            self.env.field_slices["cls_attention"].start,
            config.attention_prior,
            config.keep_bias,
        )
        self.trainer = Trainer(self.env, actor, config)

    def iterate(self) -> Figures:
        """Trains for one iteration."""
        start = now(self.env.device)
        self.trainer.iterate()
        return self._figures(start)

    def forward(self) -> Figures:
        """Runs the bare forward passes of the last episodes, on the same tokens."""
        start = now(self.env.device)
        bare_forward(self.env, self.env.pixels.to(self.env.device), self.game.keeps)
        return self._figures(start)

    def _figures(self, start: float) -> Figures:
        seconds = now(self.env.device) - start
        outcome = self.env.outcome
        assert outcome is not None
        decisions, kept = int(outcome.decisions.sum()), float(outcome.kept[:, 0].float().mean())
        return {"seconds": seconds, "decisions": decisions, "kept": kept / self.env.num_agents}


def set_up(config: TrainSpeedConfig) -> TimedTrainer:
    """Our trainer, on the digits or on noise."""
    pick_device(config.device)
    settings = MappoConfig(
        num_envs=config.num_envs,
        prune_before=config.prune_before,
        critic="none",
        device=config.device,
    )
    if config.tokens is None:
        model = load_backbone(settings)
        images = open_images(
            settings.dataset, "train", model_data_config(model), augment=settings.augment
        )
        return TimedTrainer(settings, model, images)
    keep = SURVIVORS ** (1 / len(config.prune_before))
    bias = math.log(keep / (1 - keep))
    settings = replace(settings, attention_prior=0.0, keep_bias=bias, lr=FROZEN_LR)
    side = PATCH_SIZE * math.isqrt(config.tokens)
    if side**2 != config.tokens * PATCH_SIZE**2:
        raise ValueError(f"tokens={config.tokens}: a square number, as 256")
    model = create_backbone(DIGITS_VIT, untrained=True, img_size=side).to(config.device)
    noise = NoiseImages((1, side, side), max(config.num_envs // 8, 1))
    return TimedTrainer(settings, model, noise)


def to_record(name: str, rounds: Sequence[Mapping[str, Figures]], episodes: int) -> dict[str, Any]:
    """A variant's medians; each of the ``rounds`` has the figures of all variants."""
    timing, forward = (
        Timing([turns[each]["seconds"] for turns in rounds]) for each in (name, "forward")
    )
    decisions, kept = (
        statistics.median(turns[name][key] for turns in rounds) for key in ("decisions", "kept")
    )
    return {
        "variant": name,
        "seconds": timing.seconds,
        "spread": timing.spread,
        "over_forward": speedup(timing, forward),
        "images_per_second": episodes / timing.seconds,
        "decisions_per_second": decisions / timing.seconds,
        "kept_after_first_stage": kept,
    }


def measure(config: TrainSpeedConfig) -> list[dict[str, Any]]:
    """Records of all variants.

    Raises:
        ValueError: these settings can't be measured.
    """
    torch.set_num_threads(config.threads)
    ours = set_up(config)
    for _ in range(max(config.after, 1)):
        ours.iterate()
    shared = {
        "after": config.after,
        "load_before": os.getloadavg()[0],
        "peak_memory": peak_memory(torch.device(config.device)),
        "episodes": config.num_envs,
        "tokens": ours.env.num_agents,
        "stages": len(config.prune_before),
        "device": torch.cuda.get_device_name() if config.device == "cuda" else config.device,
        "threads": torch.get_num_threads(),
    }
    variants = {"ours": ours.iterate, "forward": ours.forward}
    count = config.rounds + 1  # the first warms up
    turns = progress_bar(count, "rounds", items=range(count))
    rounds = [{name: turn() for name, turn in variants.items()} for _ in turns]
    return [to_record(name, rounds[1:], config.num_envs) | shared for name in variants]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as Markdown."""
    columns = {
        "after": ("after", 1, ""),
        "variant": ("variant", 1, ""),
        "images/s": ("images_per_second", 1, ".0f"),
        "decisions/s": ("decisions_per_second", 1, ",.0f"),
        "kept": ("kept_after_first_stage", 1, ".2f"),
        "over forward": ("over_forward", 1, ".2f"),
        "peak MiB": ("peak_memory", MIB, ".0f"),
    }
    return records_table(records, columns)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with ends_in_one_line(*COMMAND_ERRORS):
        config = tyro.cli(TrainSpeedConfig, description=__doc__, args=arguments, prog=prog())
        records = measure(config)
        if config.out is not None:
            write_json(config.out, records)
        print(table(records))


if __name__ == "__main__":
    main()
