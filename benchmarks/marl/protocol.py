"""The protocol of ``benchmarks.marl.compare``: standard cooperative games, settings that all
libraries share, and one routine that evaluates the policies of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pettingzoo import ParallelEnv
from torch import Tensor

from prunevit.envs.batched.make_pettingzoo import make_pettingzoo
from prunevit.trainers.common.config import (
    PETTINGZOO_PREFIX,
    CriticKind,
    MappoConfig,
    defaults_for,
)

EVALUATION_SEED = 987_654_321  # of the first episode; each next episode adds one

TASKS = {
    "simple_spread": "mpe2.simple_spread_v3",
    "simple_reference": "mpe2.simple_reference_v3",
}
CRITICS: dict[str, CriticKind] = {"mappo": "central", "ippo": "local", "ppo": "local"}
# equal for all libraries, wherever they mean the same
SHARED: dict[str, Any] = {
    "num_envs": 16, "rollout_steps": 128, "hidden": (64, 64), "epochs": 5, "minibatches": 8,
    "lr": 7e-4, "gamma": 0.99, "gae_lambda": 0.95, "clip": 0.2, "entropy": 0.01,
    "value_weight": 1.0, "max_grad_norm": 10.0,
}  # fmt: skip

Act = Callable[[Tensor], Tensor]
"""Observations of the agents, as the game gives them, [N, D_obs] -> logits of actions [N, A]."""


def configuration(task: str, algorithm: str, seed: int, frames: int) -> MappoConfig:
    """Our settings of a training, from which the other libraries take theirs.

    Args:
        task: of ``TASKS``.
        algorithm: of ``CRITICS``.
        seed: of the training.
        frames: steps of the game, rounded up to whole iterations; all agents act in each step.
    """
    return replace(
        defaults_for(f"{PETTINGZOO_PREFIX}{TASKS[task]}"),
        **SHARED,
        iterations=-(-frames // (SHARED["num_envs"] * SHARED["rollout_steps"])),
        critic=CRITICS[algorithm],
        critic_hidden=SHARED["hidden"],
        # the other libraries' networks have no LayerNorm
        critic_norm=False,
        hidden_layers="gelu",
        lr_schedule="constant",
        seed=seed,
        device="cpu",
    )


def env_maker(task: str) -> Callable[[], ParallelEnv]:
    """A function that makes a copy of the game ``task`` of ``TASKS``.

    Raises:
        ModuleNotFoundError: its package is missing; the message says what to install.
    """
    return make_pettingzoo(TASKS[task])


@torch.no_grad()
def mean_return(task: str, act: Act, episodes: int, greedy: bool) -> float:
    """Mean over episodes, the same for every policy, and over agents of the sum of their rewards.
    Actions are each agent's likeliest ones if ``greedy``, otherwise sampled.
    """
    env = env_maker(task)()
    agents = env.possible_agents  # all stay until the end
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    total = 0.0
    for episode in range(episodes):
        seen, _ = env.reset(seed=EVALUATION_SEED + episode)
        while env.agents:
            logits = act(torch.stack([torch.as_tensor(seen[agent]).float() for agent in agents]))
            if greedy:
                chosen = logits.argmax(-1)
            else:
                chosen = logits.softmax(-1).multinomial(1, generator=generator).squeeze(1)
            joint = dict(zip(agents, chosen.tolist(), strict=True))
            seen, rewards, _, _, _ = env.step(joint)
            total += sum(float(reward) for reward in rewards.values())
    env.close()
    return total / len(agents) / episodes


class Curve:
    """Evaluates a policy in the course of its training, before it and at ``points`` evenly spread
    places.

    Attributes:
        frames: of the training until each evaluation.
        greedy: mean return of each evaluation with greedy actions.
        sampled: the same with sampled actions.
        seconds: of the training, without the evaluations.
        cpu_seconds: of this process in them.
    """

    def __init__(self, task: str, config: MappoConfig, points: int, episodes: int) -> None:
        last = config.iterations
        self._task = task
        self._per_iteration = config.num_envs * config.rollout_steps
        self._episodes = episodes
        self._due = {round(point * last / points) for point in range(points + 1)}
        self._started: tuple[float, float] | None = None
        self.frames: list[int] = []
        self.greedy: list[float] = []
        self.sampled: list[float] = []
        self.seconds = self.cpu_seconds = 0.0

    def after(self, iteration: int, act: Act) -> None:
        """To be called before the training, with 0, and after each iteration; evaluates ``act`` if
        an evaluation is due.
        """
        if iteration not in self._due:
            return
        if self._started is not None:
            wall, cpu = self._started
            self.seconds += time.perf_counter() - wall
            self.cpu_seconds += time.process_time() - cpu
        self.frames.append(iteration * self._per_iteration)
        for greedy, returns in ((True, self.greedy), (False, self.sampled)):
            returns.append(mean_return(self._task, act, self._episodes, greedy))
        self._started = time.perf_counter(), time.process_time()


Learn = Callable[[str, str, MappoConfig, Curve], None]
"""A library's training: task, algorithm, our settings, and the curve, to which it passes its policy
before it and after each iteration.
"""
