"""``ObservationBuffer``: collects what PettingZoo environments return in arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Dict
from gymnasium.spaces.utils import flatdim
from pettingzoo import ParallelEnv

from prunevit.envs.batched.pettingzoo_spaces import ACTION_MASK, CommonSpaces, flat
from prunevit.envs.batched.protocol import Observations


class ObservationBuffer:
    """The arrays of one ``Observations``, filled environment by environment.

    A row that was never written has zeros, no living agents, and action 0 allowed.
    """

    def __init__(
        self, num_envs: int, spaces: CommonSpaces, agent_ids: bool, with_state: bool
    ) -> None:
        n = len(spaces.agents)
        self._spaces = spaces
        self._with_state = with_state
        self._written: list[Sequence[str]] = [()] * num_envs  # living agents of each row
        self._index = spaces.index
        self._size = flatdim(spaces.observation_spaces[0])
        state_size = n * self._size if spaces.state_space is None else flatdim(spaces.state_space)
        state_size *= with_state
        self._ids = np.eye(n, n if agent_ids else 0, dtype=np.float32)
        self.observation = np.zeros(
            (num_envs, n, self._size + self._ids.shape[1]), dtype=np.float32
        )
        self.state = np.zeros((num_envs, state_size), dtype=np.float32)
        self.alive = np.zeros((num_envs, n), dtype=bool)
        self.action_mask = np.zeros((num_envs, n, int(spaces.action_space.n)), dtype=bool)
        self.action_mask[..., 0] = True

    def write(
        self,
        row: int,
        env: ParallelEnv,
        agents: Sequence[str],
        observations: Mapping[str, Any],
        infos: Mapping[str, Any],
        masked: bool = True,
    ) -> None:
        """Writes what ``agents`` observe to ``row``; all other agents are not alive there.

        If not ``masked``, masks are not read and every action is allowed.
        """
        if agents != self._written[row]:
            here = [self._index[agent] for agent in agents]
            self.observation[row] = 0
            self.observation[row, here, self._size :] = self._ids[here]
            self.alive[row] = False
            self.alive[row, here] = True
            self.action_mask[row] = False
            self.action_mask[row, :, 0] = True
            self._written[row] = list(agents)
        for agent in agents:
            i = self._index[agent]
            seen = entry_of(observations, agent, row, "observation")
            mask = infos.get(agent, {}).get(ACTION_MASK)
            if mask is None and isinstance(seen, Mapping):
                mask = seen.get(ACTION_MASK)
            unmasked = mask is None or not masked
            self.action_mask[row, i] = True if unmasked else self._allowed(mask, agent, row)
            space = self._spaces.observation_spaces[i]
            whose = f"the observation of agent {agent!r} in environment {row}"
            if isinstance(seen, Mapping) and not isinstance(space, Dict):
                seen = seen.get("observation")
            self.observation[row, i, : self._size] = flat(space, self._size, seen, whose)
        state_space = self._spaces.state_space
        if self._with_state and state_space is None:
            self.state[row] = self.observation[row, :, : self._size].reshape(-1)
        elif self._with_state and state_space is not None:
            whose = f"the state of environment {row}"
            self.state[row] = flat(state_space, self.state.shape[1], env.state(), whose)

    def _allowed(self, mask: Any, agent: str, row: int) -> np.ndarray:
        allowed = np.asarray(mask, dtype=bool)
        if allowed.shape != self.action_mask.shape[-1:] or not allowed.any():
            raise ValueError(
                f"the action mask of agent {agent!r} in environment {row} must allow at least one "
                f"of {self.action_mask.shape[-1]} actions, got {mask}"
            )
        return allowed

    def check_finite(self) -> None:
        """Raises ValueError if an observation or state has NaN or infinite values."""
        if np.isfinite(self.observation).all() and np.isfinite(self.state).all():
            return
        for row, i, at in np.argwhere(~np.isfinite(self.observation)):
            raise ValueError(
                f"the observation of agent {self._spaces.agents[i]!r} in environment {row} is "
                f"{self.observation[row, i, at]} at {at}; observations must be finite"
            )
        for row, at in np.argwhere(~np.isfinite(self.state)):
            raise ValueError(f"the state of environment {row} is {self.state[row, at]} at {at}")

    def observations(self, device: torch.device) -> Observations:
        """Copies to tensors on ``device``, since the next step overwrites the arrays."""
        arrays = (self.observation, self.state, self.alive, self.action_mask)
        return Observations(*(torch.tensor(array, device=device) for array in arrays))


def entry_of(values: Mapping[str, Any], agent: str, row: int, what: str) -> Any:
    """Looks up ``agent`` in a dictionary that an environment returned; raises ValueError."""
    try:
        return values[agent]
    except KeyError:
        raise ValueError(f"environment {row} gave no {what} for agent {agent!r}") from None
