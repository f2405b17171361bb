"""The spaces of a PettingZoo environment with homogeneous agents, and how values are flattened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Space
from gymnasium.spaces.utils import flatdim, flatten, flatten_space
from pettingzoo import AECEnv, ParallelEnv

ACTION_MASK = "action_mask"


@dataclass(frozen=True)
class CommonSpaces:
    """What all copies of an environment have in common.

    Attributes:
        agents: the possible agents.
        observation_spaces: space of each agent, without its action mask.
        action_space: of every agent.
        state_space: None if the environment has none.
    """

    agents: tuple[str, ...]
    observation_spaces: tuple[Space, ...]
    action_space: Discrete
    state_space: Space | None

    @property
    def index(self) -> dict[str, int]:
        """The place of each agent among them."""
        return {agent: i for i, agent in enumerate(self.agents)}

    @classmethod
    def of(cls, env: ParallelEnv) -> CommonSpaces:
        """Reads the spaces of ``env``.

        Raises:
            TypeError: ``env`` is not a ``ParallelEnv``.
            ValueError: its agents are not homogeneous, or a space can't be used.
        """
        if isinstance(env, AECEnv) or not callable(getattr(env, "observation_space", None)):
            raise TypeError(
                f"make_env must make a PettingZoo ParallelEnv, got {type(env).__name__}; a "
                f"turn-based AECEnv may convert by pettingzoo.utils.conversions.aec_to_parallel"
            )
        agents = tuple(getattr(env, "possible_agents", ()))
        if not agents:
            raise ValueError(f"{env} names no possible_agents, so its agents can't be counted")
        observations = tuple(_without_mask(env.observation_space(agent)) for agent in agents)
        actions = [env.action_space(agent) for agent in agents]
        sizes = [flat_size(s, f"agent {a!r}") for a, s in zip(agents, observations, strict=True)]
        for i, agent in enumerate(agents):
            if not isinstance(actions[i], Discrete):
                raise ValueError(
                    f"agent {agent!r} has the action space {actions[i]}; only Discrete is supported"
                )
            if sizes[i] != sizes[0] or actions[i] != actions[0]:
                raise ValueError(
                    f"agents {agents[0]!r} and {agent!r} are not homogeneous, so they can't "
                    f"share a network: observations {observations[0]} and {observations[i]} "
                    f"({sizes[0]} and {sizes[i]} values), actions {actions[0]} and {actions[i]}"
                )
        state_space = getattr(env, "state_space", None)
        if state_space is not None:
            flat_size(state_space, "the state")
        return cls(agents, observations, actions[0], state_space)


def _without_mask(space: Space) -> Space:
    """The space without the mask of PettingZoo's {"observation": ..., "action_mask": ...}."""
    if not isinstance(space, Dict) or ACTION_MASK not in space.spaces:
        return space
    seen = {key: part for key, part in space.spaces.items() if key != ACTION_MASK}
    return seen["observation"] if set(seen) == {"observation"} else Dict(seen)


def flat_size(space: Space, whose: str) -> int:
    """Number of values of ``space`` when flattened; raises ValueError if that is not fixed."""
    try:
        flat = flatten_space(space)
    # Gymnasium can't flatten this kind of space: refused below, with a message that names it
    except NotImplementedError:
        flat = None
    if not isinstance(flat, Box):
        raise ValueError(f"{whose} has the space {space}, which does not flatten to a fixed size")
    return flatdim(space)


def flat(space: Space, size: int, value: Any, whose: str) -> np.ndarray:
    """Flattens ``value`` of ``space`` to a vector [size]; a Box's values may have any dtype."""
    try:
        if isinstance(space, Box):
            array = np.asarray(value, dtype=np.float32)
            fits = array.shape == space.shape
        else:
            array = np.asarray(flatten(space, value))
            fits = array.shape == (size,)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{whose} does not fit {space}: {error!r}") from error
    if not fits:
        raise ValueError(f"{whose} does not fit {space}: its shape is {array.shape}")
    return array.reshape(-1)
