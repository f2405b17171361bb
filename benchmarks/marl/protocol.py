"""The protocol of ``benchmarks.marl.compare``: standard cooperative games, settings that all
libraries share, and one routine that evaluates the policies of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pettingzoo import ParallelEnv
from torch import Tensor

from prunevit.envs.batched.make_pettingzoo import make_pettingzoo

EVALUATION_SEED = 987_654_321  # of the first episode; each next episode adds one

TASKS = {
    "simple_spread": "mpe2.simple_spread_v3",
    "simple_reference": "mpe2.simple_reference_v3",
}

Act = Callable[[Tensor], Tensor]
"""Observations of the agents, as the game gives them, [N, D_obs] -> logits of actions [N, A]."""


@dataclass(frozen=True)
class Settings:
    """Settings that are equal for all libraries, wherever they mean the same."""

    frames: int  # steps of the game in a training; all agents act in each step
    num_envs: int = 16  # copies of the game
    rollout_steps: int = 128  # of each copy in an iteration
    hidden: tuple[int, ...] = (64, 64)  # widths of the hidden layers, of actor and critic
    epochs: int = 5
    minibatches: int = 8
    lr: float = 7e-4  # of Adam, constant
    adam_eps: float = 1e-5
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    value_weight: float = 1.0
    max_grad_norm: float = 10.0

    @property
    def frames_per_iteration(self) -> int:
        return self.num_envs * self.rollout_steps

    @property
    def iterations(self) -> int:
        """The fewest that give ``frames``."""
        return -(-self.frames // self.frames_per_iteration)


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

    def __init__(self, task: str, settings: Settings, points: int, episodes: int) -> None:
        last = settings.iterations
        self._task = task
        self._per_iteration = settings.frames_per_iteration
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


Learn = Callable[[str, str, int, Settings, Curve], None]
"""A library's training: task, algorithm, seed, settings, and the curve, to which it passes its
policy after each iteration.
"""
