"""Times iterations of BenchMARL's MAPPO on the token game, set up as by ``trainers.benchmarl``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from prunevit.envs.adapters.benchmarl import TokenPruneTask
from prunevit.envs.adapters.torchrl import GROUP
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.rewards import make_reward
from prunevit.extras import needs
from prunevit.trainers.benchmarl import BenchmarlConfig, actor_of, make_experiment
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.timing import now

with needs("benchmarl"):
    from benchmarl.experiment import Callback
    from tensordict import TensorDictBase


class TimedIterations(Callback):
    """Notes the figures of each iteration, as ``benchmarks.speed.train_speed`` has them, then calls
    ``take_turns``, whose time is not counted.
    """

    def __init__(self, take_turns: Callable[[], None], device: torch.device) -> None:
        super().__init__()
        self.figures: list[dict[str, float]] = []
        self._take_turns = take_turns
        self._device = device
        self._start = now(device)
        self._alive = torch.empty(0)

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        self._alive = batch.get((GROUP, "mask"))  # bool [B, T, N]

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        seconds = now(self._device) - self._start
        second = self._alive[:, min(1, self._alive.shape[1] - 1)]
        kept, decisions = float(second.float().mean()), float(self._alive.sum())
        self.figures.append({"seconds": seconds, "decisions": decisions, "kept": kept})
        self._take_turns()
        self._start = now(self._device)


def iterate(
    config: MappoConfig,
    model: nn.Module,
    images: ImageSet,
    iterations: int,
    take_turns: Callable[[], None],
) -> list[dict[str, float]]:
    """Trains, and calls ``take_turns`` after each iteration; returns the iterations' figures.

    Args:
        config: our settings, from which the game, the number of episodes and the actor's first
            logit of keep are taken, so that the backbone has as much work as in our trainer.
        model: the backbone, on its device.
        images: the images that are played.
        iterations: how many.
        take_turns: what else is timed in turns.
    """
    device = next(model.parameters()).device
    same = {name: getattr(config, name) for name in ("prune_before", "observation")}
    theirs = BenchmarlConfig(images=config.num_envs, iterations=iterations, device=device.type)
    reward = make_reward(config.reward)
    task = TokenPruneTask(config=same | {"backbone": model, "dataset": images, "reward": reward})
    with tempfile.TemporaryDirectory() as folder:
        experiment = make_experiment(theirs, task, Path(folder))
        experiment.config.checkpoint_at_end = False
        # the policy's own parameters, though in a module of its own
        last = [layer for layer in actor_of(experiment).modules() if isinstance(layer, nn.Linear)][
            -1
        ]
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.0, config.keep_bias]))
        experiment.collector.update_policy_weights_()
        # not passed as an argument, since BenchMARL pickles those
        experiment.callbacks.append(timed := TimedIterations(take_turns, device))
        experiment.run()
    return timed.figures
