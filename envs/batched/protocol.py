"""``BatchedEnv``: the protocol of tensors between environments and trainers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor


@dataclass(frozen=True)
class Observations:
    """What the agents of B environments observe before they act.

    Attributes:
        observation: float32 [B, N, D_obs]; zeros for an agent that is not alive.
        state: global state for a central critic, float32 [B, D_state].
        alive: which agents still act, bool [B, N]. The actions of others are ignored, and losses
            leave them out.
        action_mask: which actions are allowed, bool [B, N, A]; at least one for every agent.
    """

    observation: Tensor
    state: Tensor
    alive: Tensor
    action_mask: Tensor

    def living(self) -> Tensor:
        """Observations of the living agents, in the order of ``alive.nonzero()``.

        Returns:
            float32 [R, D_obs] for R living agents.
        """
        return self.observation[self.alive]

    def distinct(self) -> tuple[Tensor, Tensor]:
        """``living`` without the repetitions that the environment knows of.

        Returns:
            distinct observations float32 [U, D_obs], and the index of each living agent's
            observation among them, int64 [R].
        """
        living = self.living()
        return living, torch.arange(len(living), device=living.device)

    def distinct_states(self) -> tuple[Tensor, Tensor]:
        """The global states in which the distinct observations are made.

        Returns:
            distinct states float32 [S, D_state], and the index among them of the state of each of
            the U observations of ``distinct``, int64 [U].
        """
        return self.state, self.alive.nonzero()[:, 0]


@dataclass(frozen=True)
class Transition:
    """The result of one joint action.

    Attributes:
        observations: what the agents see next. In an environment that reset itself, this is the
            first observation of the new episode.
        reward: float32 [B, N]; some games also reward agents that are no longer alive.
        terminated: whether the episode ended by its own rules, bool [B]. No value is bootstrapped.
        truncated: whether the episode was cut off, bool [B]. Its value is bootstrapped from
            ``final``.
        final: the last observations of truncated environments, [B, ...], undefined for all others;
            None if none was truncated.
        metrics: named values of the episodes that ended in this step, float32 [B], NaN for others.
    """

    observations: Observations
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    final: Observations | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class BatchedEnv(Protocol):
    """B copies of a game of N homogeneous agents, stepped together.

    Attributes:
        num_envs: B.
        num_agents: N.
        observation_space: space of one agent, a flat float32 Box [D_obs].
        state_space: a flat float32 Box [D_state].
        action_space: space of one agent.
        episode_length: number of steps of every episode, if it is fixed. All episodes then end
            together, and the caller calls ``reset``. None if lengths vary; each environment then
            resets itself inside ``step``.
        rollouts_per_start: this many consecutive environments begin each episode in the same state,
            so that their returns can be compared; 1 if they begin independently.
        device: device of every tensor.
    """

    num_envs: int
    num_agents: int
    observation_space: Box
    state_space: Box
    action_space: Discrete
    episode_length: int | None
    rollouts_per_start: int

    @property
    def device(self) -> torch.device: ...

    def reset(self, seed: int | None = None) -> Observations:
        """Begins new episodes everywhere; the same seed begins the same episodes."""

    def step(self, actions: Tensor) -> Transition:
        """Takes the joint action int64 [B, N]."""

    def close(self) -> None:
        """Frees the resources of the environments."""
