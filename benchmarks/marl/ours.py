"""This project's MAPPO and IPPO on a standard game."""

from __future__ import annotations

import torch

from prunevit.agents.policies.actor_critic import Actor
from prunevit.benchmarks.marl.protocol import Curve, env_maker
from prunevit.envs.batched.pettingzoo import BatchedPettingZoo
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.mappo import Trainer


def learn(task: str, algorithm: str, config: MappoConfig, curve: Curve) -> None:
    """Trains to the end, passing each iteration's policy to ``curve``."""
    del algorithm  # the settings say it
    torch.manual_seed(config.seed)
    # the other libraries' agents aren't told which of the agents they are
    env = BatchedPettingZoo(
        env_maker(task),
        config.num_envs,
        config.device,
        agent_ids=False,
        with_state=config.critic == "central",
    )
    actor = Actor(env.observation_space.shape[0], int(env.action_space.n), config.hidden)
    trainer = Trainer(env, actor, config)
    curve.after(0, trainer.learner.actor)
    for iteration in range(1, config.iterations + 1):
        trainer.iterate()
        curve.after(iteration, trainer.learner.actor)
    env.close()
