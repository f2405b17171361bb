"""Stable-Baselines3's PPO on a standard game: one policy for all agents, through SuperSuit."""

from __future__ import annotations

from typing import Any

import torch
from pettingzoo.utils import BaseParallelWrapper
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed
from torch import Tensor

from prunevit.benchmarks.marl.protocol import Curve, env_maker
from prunevit.extras import needs
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.mappo import ADAM_EPS

with needs("marl-peers"):
    import supersuit


class TimeLimited(BaseParallelWrapper):
    """Marks in the infos, as SB3 reads them, episodes that were truncated. SuperSuit doesn't pass
    that on, and SB3 would not bootstrap at any end.
    """

    def step(self, actions: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
        seen, rewards, terminations, truncations, infos = super().step(actions)
        for agent, info in infos.items():
            info["TimeLimit.truncated"] = truncations[agent] and not terminations[agent]
        return seen, rewards, terminations, truncations, infos


def make_envs(task: str, copies: int, seed: int) -> Any:
    """A ``VecEnv`` in which each agent of each copy is one sub-environment, copy by copy."""
    single = supersuit.pettingzoo_env_to_vec_env_v1(TimeLimited(env_maker(task)()))
    envs = supersuit.concat_vec_envs_v1(single, copies, num_cpus=0, base_class="stable_baselines3")
    # copies share a random state, and SuperSuit's wrapper for SB3 passes no seed on: without this
    # all would play the same episodes
    envs.venv.reset(seed=1_000_003 * seed)
    return envs


def learn(task: str, algorithm: str, config: MappoConfig, curve: Curve) -> None:
    """Trains to the end, passing each iteration's policy to ``curve``."""
    assert algorithm == "ppo"
    set_random_seed(config.seed)
    envs = make_envs(task, config.num_envs, config.seed)
    decisions = envs.num_envs * config.rollout_steps
    model = PPO(
        "MlpPolicy",
        envs,
        n_steps=config.rollout_steps,
        batch_size=max(decisions // config.minibatches, 2),
        n_epochs=config.epochs,
        learning_rate=config.lr,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip,
        ent_coef=config.entropy,
        vf_coef=config.value_weight,
        max_grad_norm=config.max_grad_norm,
        policy_kwargs={
            "net_arch": list(config.hidden),
            "optimizer_kwargs": {"eps": ADAM_EPS},
        },
        device="cpu",
    )

    def act(observation: Tensor) -> Tensor:
        distribution = model.policy.get_distribution(observation).distribution
        assert isinstance(distribution, torch.distributions.Categorical)
        return distribution.logits

    curve.after(0, act)
    for iteration in range(1, config.iterations + 1):
        # one iteration; episodes continue in the next
        model.learn(decisions, reset_num_timesteps=False)
        curve.after(iteration, act)
    envs.close()
