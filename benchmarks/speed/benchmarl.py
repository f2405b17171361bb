"""Times iterations of BenchMARL's MAPPO on the token game, set up as by ``trainers.benchmarl``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from prunevit.benchmarks.speed.timed_trainer import Figures
from prunevit.envs.adapters.benchmarl import TokenPruneTask
from prunevit.envs.adapters.torchrl import GROUP
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.rewards import make_reward
from prunevit.extras import needs
from prunevit.trainers.benchmarl import BenchmarlConfig, make_experiment
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.timing import now

with needs("benchmarl"):
    from benchmarl.experiment import Callback
    from benchmarl.models.mlp import Mlp
    from tensordict import TensorDictBase


class AfterIteration(Callback):
    """Passes each iteration's figures to ``take_turn``, whose own time is not counted."""

    def __init__(self, take_turn: Callable[[Figures], None], device: torch.device) -> None:
        super().__init__()
        self._take_turn = take_turn
        self._device = device
        self._start = now(device)
        self._alive = torch.empty(0)

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        self._alive = batch.get((GROUP, "mask"))  # bool [B, T, N]

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        seconds = now(self._device) - self._start
        second = self._alive[:, min(1, self._alive.shape[1] - 1)]
        kept = float(second.float().mean())
        self._take_turn({"seconds": seconds, "decisions": float(self._alive.sum()), "kept": kept})
        self._start = now(self._device)


def iterate(
    config: MappoConfig,
    model: nn.Module,
    images: ImageSet,
    keep_bias: float,
    iterations: int,
    take_turn: Callable[[Figures], None],
) -> None:
    """Trains, and calls ``take_turn`` after each iteration.

    Args:
        config: our settings, from which the game and the number of episodes are taken.
        model: the backbone, on its device.
        images: what is played.
        keep_bias: the actor's first logit of keep, so that the backbone has as much work as in our
            trainer.
        iterations: how many.
        take_turn: what else is timed in turns.
    """
    device = next(model.parameters()).device
    same = {name: getattr(config, name) for name in ("prune_before", "observation")}
    theirs = BenchmarlConfig(
        backbone=config.backbone,
        dataset=config.dataset,
        reward=config.reward,
        images=config.num_envs,
        iterations=iterations,
        device=device.type,
        **same,
    )
    reward = make_reward(config.reward)
    task = TokenPruneTask(config=same | {"backbone": model, "dataset": images, "reward": reward})
    with tempfile.TemporaryDirectory() as folder:
        experiment = make_experiment(theirs, task, Path(folder))
        experiment.config.checkpoint_at_end = False
        shared = next(part for part in experiment.policy.modules() if isinstance(part, Mlp))
        network = shared.mlp.get_stateful_net()  # has the same parameters
        last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.0, keep_bias]))
        experiment.collector.update_policy_weights_()
        # not passed as an argument, since BenchMARL pickles those
        experiment.callbacks.append(AfterIteration(take_turn, device))
        experiment.run()
