"""This project's MAPPO and IPPO on a standard game."""

from __future__ import annotations

import torch
from torch import Tensor

from prunevit.benchmarks.marl.protocol import TASKS, Curve, Settings
from prunevit.trainers.common.config import PETTINGZOO_PREFIX, MappoConfig, defaults_for
from prunevit.trainers.common.experiments import PettingZooExperiment
from prunevit.trainers.mappo import Trainer

CRITICS = {"mappo": "central", "ippo": "local"}


def configuration(task: str, algorithm: str, seed: int, settings: Settings) -> MappoConfig:
    """``settings`` under our names; the rest is the default for such games."""
    values = defaults_for(f"{PETTINGZOO_PREFIX}{TASKS[task]}").to_json() | {
        "critic": CRITICS[algorithm],
        "num_envs": settings.num_envs,
        "rollout_steps": settings.rollout_steps,
        "iterations": settings.iterations,
        "hidden": settings.hidden,
        "critic_hidden": settings.hidden,
        "critic_norm": False,  # the other libraries' critics have none
        "epochs": settings.epochs,
        "minibatches": settings.minibatches,
        "lr": settings.lr,
        "lr_schedule": "constant",
        "gamma": settings.gamma,
        "gae_lambda": settings.gae_lambda,
        "clip": settings.clip,
        "entropy": settings.entropy,
        "value_weight": settings.value_weight,
        "max_grad_norm": settings.max_grad_norm,
        "seed": seed,
        "device": "cpu",
    }
    return MappoConfig.from_json(values)


def learn(task: str, algorithm: str, seed: int, settings: Settings, curve: Curve) -> None:
    """Trains to the end, passing each iteration's policy to ``curve``."""
    config = configuration(task, algorithm, seed, settings)
    torch.manual_seed(seed)
    experiment = PettingZooExperiment(config)
    trainer = Trainer(experiment.env, experiment.make_actor(), config)
    ids = torch.eye(experiment.env.num_agents)

    def act(observation: Tensor) -> Tensor:
        return trainer.learner.actor(torch.cat([observation, ids], 1))

    curve.after(0, act)
    for iteration in range(1, settings.iterations + 1):
        trainer.iterate()
        curve.after(iteration, act)
    experiment.env.close()
