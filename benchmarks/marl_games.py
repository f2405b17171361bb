"""Standard cooperative games, and how those who learn them are judged: all by one routine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pettingzoo import ParallelEnv
from torch import Tensor

from prunevit.envs.batched.pettingzoo import make_pettingzoo

EVALUATION_SEED = 987_654_321  # the first episode's; each next one's is one more

GAMES = {
    "simple_spread": "mpe2.simple_spread_v3",
    "simple_reference": "mpe2.simple_reference_v3",
}

Act = Callable[[Tensor], Tensor]
"""What the agents see, as the game shows it, [N, D_obs] -> logits of their actions [N, A]."""


@dataclass(frozen=True)
class Settings:
    """What is the same for all who learn, wherever it has the same meaning.

    Attributes:
        frames: steps of the game that are learned from; all agents act in a step.
        num_envs: copies of the game.
        rollout_steps: steps of each copy in an iteration.
        hidden: widths of the hidden layers, of actor and critic.
        epochs: passes over an iteration's decisions.
        minibatches: parts of a pass.
        lr: Adam's learning rate, which stays.
        adam_eps: Adam's epsilon.
        gamma: discount.
        gae_lambda: GAE's lambda.
        clip: PPO's clipping range.
        entropy: weight of the policy's entropy.
        value_weight: weight of the value loss.
        max_grad_norm: gradients are clipped to this norm.
    """

    frames: int
    num_envs: int = 16
    rollout_steps: int = 128
    hidden: tuple[int, ...] = (64, 64)
    epochs: int = 5
    minibatches: int = 8
    lr: float = 7e-4
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
        """As few as bring ``frames``."""
        return -(-self.frames // self.frames_per_iteration)


def game_maker(game: str) -> Callable[[], ParallelEnv]:
    """What makes a copy of the game ``game`` of ``GAMES``.

    Raises:
        ModuleNotFoundError: its package is missing; says what to install.
    """
    return make_pettingzoo(GAMES[game])


def episode_return(
    env: ParallelEnv, act: Act, seed: int, generator: torch.Generator | None
) -> float:
    """Plays an episode to its end; mean over the agents of the sum of their rewards.

    Args:
        env: a game whose agents all stay to the end.
        act: who plays.
        seed: of the episode.
        generator: draws the actions; without one each agent takes its likeliest.
    """
    seen, _ = env.reset(seed=seed)
    agents = env.possible_agents
    total = 0.0
    while env.agents:
        logits = act(torch.stack([torch.as_tensor(seen[agent]).float() for agent in agents]))
        if generator is None:
            chosen = logits.argmax(-1)
        else:
            chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        joint = dict(zip(agents, chosen.tolist(), strict=True))
        seen, rewards, _, _, _ = env.step(joint)
        total += sum(float(reward) for reward in rewards.values())
    return total / len(agents)


@torch.no_grad()
def mean_return(game: str, act: Act, episodes: int, greedy: bool) -> float:
    """Mean of ``episode_return`` over episodes that are the same for everybody.

    Args:
        game: of ``GAMES``.
        act: who plays.
        episodes: how many.
        greedy: take each agent's likeliest action, not one that is drawn.
    """
    env = game_maker(game)()
    generator = None if greedy else torch.Generator().manual_seed(EVALUATION_SEED)
    returns = [
        episode_return(env, act, EVALUATION_SEED + episode, generator)
        for episode in range(episodes)
    ]
    env.close()
    return sum(returns) / episodes


class Curve:
    """How good a learner is in the course of its training, and the seconds that this took; those
    of the evaluations don't count.

    Args:
        game: of ``GAMES``.
        settings: of the training.
        points: evaluations, evenly spread, and one before it begins.
        episodes: of each evaluation.

    Attributes:
        frames: learned from until each evaluation.
        greedy: mean return there where agents take their likeliest actions.
        sampled: the same where actions are drawn.
        seconds: of the training, between the first evaluation and the last.
        cpu_seconds: that this process was busy in them, whatever else ran on the machine.
    """

    def __init__(self, game: str, settings: Settings, points: int, episodes: int) -> None:
        last = settings.iterations
        self._game = game
        self._per_iteration = settings.frames_per_iteration
        self._episodes = episodes
        self._due = {round(point * last / points) for point in range(points + 1)}
        self._started: tuple[float, float] | None = None
        self.frames: list[int] = []
        self.greedy: list[float] = []
        self.sampled: list[float] = []
        self.seconds = self.cpu_seconds = 0.0

    def after(self, iteration: int, act: Act) -> None:
        """Evaluates ``act`` if it is time to; to be called from 0 on, after each iteration."""
        if iteration not in self._due:
            return
        if self._started is not None:
            wall, cpu = self._started
            self.seconds += time.perf_counter() - wall
            self.cpu_seconds += time.process_time() - cpu
        self.frames.append(iteration * self._per_iteration)
        for greedy, returns in ((True, self.greedy), (False, self.sampled)):
            returns.append(mean_return(self._game, act, self._episodes, greedy))
        self._started = time.perf_counter(), time.process_time()


Learn = Callable[[str, str, int, Settings, Curve], None]
"""A library: game, algorithm, seed and settings, and the curve that it shows itself to after each
iteration.
"""
