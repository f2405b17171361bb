"""Stable-Baselines3's PPO on a standard game: one policy for all agents, through SuperSuit."""

from __future__ import annotations

from typing import Any

import torch
from pettingzoo.utils import BaseParallelWrapper
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed
from torch import Tensor

from prunevit.benchmarks.marl.protocol import Curve, Settings, env_maker
from prunevit.extras import needs

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


def learn(task: str, algorithm: str, seed: int, settings: Settings, curve: Curve) -> None:
    """Trains to the end, passing each iteration's policy to ``curve``."""
    assert algorithm == "ppo"
    set_random_seed(seed)
    envs = make_envs(task, settings.num_envs, seed)
    decisions = envs.num_envs * settings.rollout_steps
    model = PPO(
        "MlpPolicy",
        envs,
        n_steps=settings.rollout_steps,
        batch_size=max(decisions // settings.minibatches, 2),
        n_epochs=settings.epochs,
        learning_rate=settings.lr,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        clip_range=settings.clip,
        ent_coef=settings.entropy,
        vf_coef=settings.value_weight,
        max_grad_norm=settings.max_grad_norm,
        policy_kwargs={
            "net_arch": list(settings.hidden),
            "optimizer_kwargs": {"eps": settings.adam_eps},
        },
        device="cpu",
    )

    def act(observation: Tensor) -> Tensor:
        distribution = model.policy.get_distribution(observation).distribution
        assert isinstance(distribution, torch.distributions.Categorical)
        return distribution.logits

    curve.after(0, act)
    for iteration in range(1, settings.iterations + 1):
        # one iteration; episodes continue in the next
        model.learn(decisions, reset_num_timesteps=False)
        curve.after(iteration, act)
    envs.close()
