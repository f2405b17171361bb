"""EPyMARL: the game as an environment for its ``gymma`` wrapper.

``--env-config=gymma with env_args.key="prunevit.envs:prunevit/TokenPruneAgents-v0"``. EPyMARL's
own PettingZoo wrapper replaces the rewards of an episode's last step by zeros; this one does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Tuple
from numpy.typing import NDArray

from prunevit.envs.adapters.common import (
    GameArguments,
    GameHandle,
    to_numpy,
)
from prunevit.envs.batched.inputs import image_indices, to_actions
from prunevit.envs.batched.protocol import Observations


class TokenPruneAgents(gymnasium.Env[tuple[NDArray[np.float32], ...], Sequence[int]]):
    """One image an episode, with tuples of N observations, actions and rewards.

    All agents stay until the end. A pruned token observes zeros, its actions are ignored, and it
    still gets rewards. Infos are numbers, which EPyMARL averages over episodes.

    Args:
        game: arguments of ``TokenPruneEnv``.

    Attributes:
        n_agents: N.
    """

    def __init__(self, **game: Unpack[GameArguments]) -> None:
        self._held = GameHandle(1, game)
        env = self._held.env
        (size,) = env.observation_space.shape
        self.n_agents = env.num_agents
        self.observation_space = Tuple(
            [Box(-np.inf, np.inf, (size,), np.float32) for _ in range(self.n_agents)]
        )
        self.action_space: Tuple = Tuple([Discrete(2) for _ in range(self.n_agents)])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[NDArray[np.float32], ...], dict[str, Any]]:
        """Begins an episode on an image drawn with ``seed``, or on ``options["indices"]`` [1]."""
        super().reset(seed=seed)
        observed = self._held.env.reset(seed, indices=image_indices(options))
        return _each(observed), {}

    # gymma expects a reward for each agent
    def step(  # type: ignore[override]
        self, actions: Sequence[int]
    ) -> tuple[tuple[NDArray[np.float32], ...], tuple[float, ...], bool, bool, dict[str, Any]]:
        """Takes an action of each token, 1 to keep and 0 to prune; returns what ``gymma`` expects:
        a tuple of observations and one of rewards, terminated, truncated, infos.
        """
        env = self._held.env
        transition = env.step(to_actions(np.asarray(actions), env.device)[None])
        outcome = env.outcome
        infos = (
            {"correct": float(outcome.correct), "gmacs": float(outcome.gmacs)} if outcome else {}
        )
        return (
            _each(transition.observations),
            tuple(transition.reward[0].tolist()),
            bool(transition.terminated),
            False,
            infos,
        )

    def close(self) -> None:
        self._held.close()


def _each(observed: Observations) -> tuple[NDArray[np.float32], ...]:
    return tuple(to_numpy(observed.observation[0]))
