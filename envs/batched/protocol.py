"""``BatchedEnv``, the tensor protocol that trainers consume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor


@dataclass(frozen=True)
class Observations:
    """What the agents see before they act, B environments of N agents at once.

    Attributes:
        observation: float32 [B, N, D_obs]; zeros for an agent that is not alive.
        state: float32 [B, D_state], the global state that a central critic may see.
        alive: bool [B, N]; an agent that is not alive takes no part in a loss and its action is
            ignored.
        action_mask: bool [B, N, A], True where an action is allowed; every row allows at least one.
    """

    observation: Tensor
    state: Tensor
    alive: Tensor
    action_mask: Tensor

    def living(self) -> Tensor:
        """Observations of the living agents alone, in the order of ``alive.nonzero()``, float32 [R,
        D_obs].
        """
        return self.observation[self.alive]

    def distinct(self) -> tuple[Tensor, Tensor]:
        """``living`` without repetitions that the environment knows of.

        Returns:
            observations float32 [U, D_obs], and which of them each living agent sees, int64 [R].
        """
        living = self.living()
        return living, torch.arange(len(living), device=living.device)


@dataclass(frozen=True)
class Transition:
    """What one joint action brought.

    Attributes:
        observations: what the agents see next. In an environment that reset itself, this is the
            first observation of the new episode.
        reward: float32 [B, N], paid to the living and, where the game says so, to those that have
            gone.
        terminated: bool [B], the episode ended by its own rules: nothing follows, nothing is
            bootstrapped.
        truncated: bool [B], the episode was cut off: its value goes on in ``final``.
        final: where any environment was truncated, what its agents saw last, [B, ...] with rows of
            meaning only there; else None.
        metrics: named float32 [B] of episodes that ended in this step, NaN elsewhere.
    """

    observations: Observations
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    final: Observations | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class BatchedEnv(Protocol):
    """B copies of a game of N like agents, stepped together; all tensors lie on ``device``.

    Attributes:
        num_envs: B.
        num_agents: N.
        observation_space: of one agent, a flat float32 Box [D_obs].
        state_space: a flat float32 Box [D_state].
        action_space: of one agent.
        episode_length: the common number of steps of all episodes, which then end together, after
            which the caller calls ``reset``; None where lengths vary: each environment then resets
            itself inside ``step``.
        rollouts_per_start: so many consecutive environments begin every episode in the same state,
            so that their returns can be compared with each other; 1 where starts are independent.
        device: of every tensor.
    """

    num_envs: int
    num_agents: int
    observation_space: Box
    state_space: Box
    action_space: Discrete
    episode_length: int | None
    rollouts_per_start: int
    device: torch.device

    def reset(self, seed: int | None = None) -> Observations:
        """Begins new episodes everywhere; the same seed begins the same ones."""
        ...

    def step(self, actions: Tensor) -> Transition:
        """Takes the joint action int64 [B, N]."""
        ...

    def close(self) -> None:
        """Frees what the environments hold."""
        ...
