"""This project's MAPPO and IPPO on a standard game."""

from __future__ import annotations

import torch
from torch import Tensor

from prunevit.benchmarks.marl_games import GAMES, Curve, Settings
from prunevit.trainers.common.config import PETTINGZOO_PREFIX, MappoConfig, defaults_for
from prunevit.trainers.common.experiments import PettingZooTask
from prunevit.trainers.mappo import Trainer

CRITICS = {"mappo": "central", "ippo": "local"}


def configuration(game: str, algorithm: str, seed: int, settings: Settings) -> MappoConfig:
    """``settings`` as ours calls them; all else is the default for such games."""
    values = defaults_for(f"{PETTINGZOO_PREFIX}{GAMES[game]}").to_json() | {
        "critic": CRITICS[algorithm],
        "num_envs": settings.num_envs,
        "rollout_steps": settings.rollout_steps,
        "iterations": settings.iterations,
        "hidden": settings.hidden,
        "critic_hidden": settings.hidden,
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


def learn(game: str, algorithm: str, seed: int, settings: Settings, curve: Curve) -> None:
    """Trains to the end, showing ``curve`` each iteration's policy."""
    config = configuration(game, algorithm, seed, settings)
    torch.manual_seed(seed)
    task = PettingZooTask(config)
    trainer = Trainer(task.env, task.make_actor(), config)
    ids = torch.eye(task.env.num_agents)

    def act(observation: Tensor) -> Tensor:
        return trainer.learner.actor(torch.cat([observation, ids], 1))

    curve.after(0, act)
    for iteration in range(1, settings.iterations + 1):
        trainer.iterate()
        curve.after(iteration, act)
    task.env.close()
