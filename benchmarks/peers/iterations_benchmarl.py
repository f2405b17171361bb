"""BenchMARL's MAPPO on the token game, an iteration at a time, set up as ``trainers.benchmarl``
does.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from prunevit.benchmarks.measuring import now
from prunevit.envs.adapters.benchmarl import TokenPruneTask
from prunevit.envs.adapters.torchrl import GROUP
from prunevit.envs.data.datasets import ImageSet
from prunevit.envs.rewards import make_reward
from prunevit.extras import needs
from prunevit.trainers.benchmarl import BenchmarlConfig, make_experiment
from prunevit.trainers.common.config import MappoConfig

with needs("benchmarl"):
    from benchmarl.experiment import Callback, Experiment
    from benchmarl.models.mlp import Mlp
    from tensordict import TensorDictBase


@dataclass
class Iteration:
    """One of BenchMARL's.

    Attributes:
        seconds: from the end of the one before to its own, logs included.
        decisions: how often a living token was asked.
        kept: share of the tokens that lives on after the first stage.
    """

    seconds: float
    decisions: int
    kept: float


class Turns(Callback):
    """Hands each iteration on, and the machine with it, until it is given back.

    Args:
        take_turn: called after each iteration; its time is nobody's.
        device: where BenchMARL works.
    """

    def __init__(self, take_turn: Callable[[Iteration], None], device: torch.device) -> None:
        super().__init__()
        self._take_turn = take_turn
        self._device = device
        self._begun = now(device)
        self._alive = torch.empty(0)

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        self._alive = batch.get((GROUP, "mask"))  # bool [B, T, N]

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        seconds = now(self._device) - self._begun
        second = self._alive[:, min(1, self._alive.shape[1] - 1)]
        self._take_turn(Iteration(seconds, int(self._alive.sum()), float(second.float().mean())))
        self._begun = now(self._device)


def settings_like(config: MappoConfig, iterations: int) -> BenchmarlConfig:
    """The runner's own settings, with as many images as ``config`` plays episodes."""
    return BenchmarlConfig(
        backbone=config.backbone,
        dataset=config.dataset,
        prune_before=config.prune_before,
        observation=config.observation,
        reward=config.reward,
        images=config.num_envs,
        iterations=iterations,
        device=config.device,
    )


def iterate(
    config: MappoConfig,
    model: nn.Module,
    images: ImageSet,
    keep: float,
    iterations: int,
    take_turn: Callable[[Iteration], None],
) -> None:
    """Trains, and calls ``take_turn`` after each iteration.

    Args:
        config: our settings; the game and the number of episodes are theirs.
        model: the backbone, on its device.
        images: what is played.
        keep: probability of keep that the actor starts from: with as many tokens as ours the
            backbone has as much to do.
        iterations: how many.
        take_turn: who comes next.
    """
    game = {
        "backbone": model,
        "dataset": images,
        "prune_before": config.prune_before,
        "observation": config.observation,
        "reward": make_reward(config.reward),
    }
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        experiment = make_experiment(
            replace(settings_like(config, iterations), device=device.type),
            TokenPruneTask(config=game),
            Path(folder),
        )
        experiment.config.checkpoint_at_end = False
        start_from(experiment, keep)
        # not among its arguments: BenchMARL pickles those
        experiment.callbacks.append(Turns(take_turn, device))
        experiment.run()


def start_from(experiment: Experiment, keep: float) -> None:
    """Has the actor keep a token with about the probability ``keep``."""
    shared = next(part for part in experiment.policy.modules() if isinstance(part, Mlp))
    # a module of the same parameters
    network = shared.mlp.get_stateful_net()
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.0, math.log(keep / (1 - keep))]))
    experiment.collector.update_policy_weights_()
