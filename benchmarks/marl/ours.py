"""This project's MAPPO and IPPO on a standard game."""

from __future__ import annotations

import torch
from torch import Tensor

from prunevit.benchmarks.marl.protocol import Curve
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.experiments import PettingZooExperiment
from prunevit.trainers.mappo import Trainer


def learn(task: str, algorithm: str, config: MappoConfig, curve: Curve) -> None:
    """Trains to the end, passing each iteration's policy to ``curve``."""
    del task, algorithm  # the settings say both
    torch.manual_seed(config.seed)
    experiment = PettingZooExperiment(config)
    trainer = Trainer(experiment.env, experiment.make_actor(), config)
    ids = torch.eye(experiment.env.num_agents)

    def act(observation: Tensor) -> Tensor:
        return trainer.learner.actor(torch.cat([observation, ids], 1))

    curve.after(0, act)
    for iteration in range(1, config.iterations + 1):
        trainer.iterate()
        curve.after(iteration, act)
    experiment.env.close()
