"""``BatchedPettingZoo``: copies of a PettingZoo ``ParallelEnv`` as one ``BatchedEnv``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv
from torch import Tensor

from prunevit.envs.batched.pettingzoo_buffer import ObservationBuffer, entry_of
from prunevit.envs.batched.pettingzoo_spaces import CommonSpaces
from prunevit.envs.batched.protocol import Observations, Transition

SEED_LIMIT = 2**31  # the narrowest seeders, behind C bindings, take a signed 32-bit integer


class BatchedPettingZoo:
    """B copies of a PettingZoo ``ParallelEnv`` with N agents as one ``BatchedEnv``.

    Agents are in the order of ``possible_agents``. They share one network, so they must be
    homogeneous: one ``Discrete`` action space, and observations that flatten to the same number of
    values.

    An agent that has ended, or has not joined yet, is not alive: its observation is zero, its
    reward 0, its action ignored, and its mask allows action 0 only. The reward of the step in which
    it ends is its last one. An environment's episode ends when no agent is left, and the next
    episode begins in that same step.

    PettingZoo has flags for each agent, trainers for each environment. So an episode ends in one of
    two ways:

    - All agents that were left terminated: ``terminated``. No value is bootstrapped.
    - At least one was truncated: ``truncated``, and ``final`` holds the last observations. An agent
      that terminated in that step or before it is not alive in ``final``, even if it is flagged as
      truncated too, and no value is bootstrapped for it.

    The value that follows the action of agent n is therefore

    - 0 if ``terminated``,
    - the value of ``final`` times ``final.alive`` if ``truncated``,
    - the value of ``observations`` times ``observations.alive`` otherwise,

    and no advantage is carried over the end of an episode or of an agent's life. An agent that is
    truncated alone, while others play on, can't be expressed and counts as terminated.

    ``state`` is the environment's ``state()`` if it has a ``state_space``. Otherwise it is the
    concatenation of all agents' observations, without their ids.

    Metrics of an ended episode are ``episode_return``, the sum of rewards averaged over the N
    agents, and ``episode_length`` in steps.

    Args:
        make_env: makes one environment; called ``num_envs`` times.
        num_envs: B.
        device: device of all tensors. The environments themselves run on the CPU.
        agent_ids: append the agent's one-hot index [N] to its observation, so that agents can
            behave differently although they share a network.
        with_state: ask the environments for their state, which some compute on every call. Without
            it ``state`` is empty, [B, 0].
        first: number of the first environment, which determines its seeds. An environment with B
            copies and one with those from number B on play what one with 2B copies would.

    Raises:
        TypeError: ``make_env`` makes no ``ParallelEnv``.
        ValueError: the agents are not homogeneous, an action or observation space can't be used,
            ``num_envs`` is below 1, or ``make_env`` makes different environments or the same one
            twice.
    """

    episode_length: int | None = None
    rollouts_per_start: int = 1

    def __init__(
        self,
        make_env: Callable[[], ParallelEnv],
        num_envs: int,
        device: torch.device | str = "cpu",
        agent_ids: bool = True,
        with_state: bool = True,
        first: int = 0,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self._envs = [make_env() for _ in range(num_envs)]
        if len({id(env) for env in self._envs}) < num_envs:
            raise ValueError("make_env returned the same environment twice; it must make new ones")
        self._spaces = CommonSpaces.of(self._envs[0])
        for copy, env in enumerate(self._envs):
            if (spaces := CommonSpaces.of(env)) != self._spaces:
                raise ValueError(
                    f"make_env made unlike environments: the first has {self._spaces}, "
                    f"number {copy} has {spaces}"
                )
        self.num_envs = num_envs
        self._first = first
        self.num_agents = len(self._spaces.agents)
        self.device = torch.device(device)
        self.action_space: Discrete = Discrete(int(self._spaces.action_space.n))
        self._make_buffer = functools.partial(
            ObservationBuffer, num_envs, self._spaces, agent_ids=agent_ids, with_state=with_state
        )
        self._buffer = self._make_buffer()
        self.observation_space = _unbounded(self._buffer.observation.shape[-1])
        self.state_space = _unbounded(self._buffer.state.shape[-1])
        self._index = self._spaces.index
        self._acting: list[list[str]] = [[] for _ in range(num_envs)]
        self._ended: list[set[str]] = [set() for _ in range(num_envs)]
        self._returns = np.zeros((num_envs, self.num_agents))
        self._lengths = np.zeros(num_envs, dtype=np.int64)
        self._seeds: np.random.SeedSequence | None = None
        self._episodes = [0] * num_envs
        self._stepping = False

    def reset(self, seed: int | None = None) -> Observations:
        """Begins new episodes everywhere.

        The k-th episode of environment b is seeded by (``seed``, b, k). So a whole run can be
        repeated, automatic resets included.

        Args:
            seed: seed of all episodes from here on. None continues with the next episodes of the
                last seed, or begins with a random seed.

        Raises:
            RuntimeError: an environment has no agents after its reset.
            ValueError: an observation, state or mask that is missing, does not fit its space or is
                not finite.
        """
        if seed is not None or self._seeds is None:
            self._seeds = np.random.SeedSequence(seed)
            self._episodes = [0] * self.num_envs
        self._stepping = False
        for row in range(self.num_envs):
            self._begin(row)
        self._buffer.check_finite()
        self._stepping = True
        return self._buffer.observations(self.device)

    def step(self, actions: Tensor) -> Transition:
        """Takes the joint action int64 [B, N]; resets environments whose last agent ended.

        After an error the environments are no longer at the same step, and must be ``reset``.

        Raises:
            RuntimeError: there was no ``reset``, or none since an error; an agent's flags
                contradict ``env.agents``, or it comes back after it ended; or an environment has no
                agents after its reset.
            ValueError: actions of another type or shape, or one that a living agent may not take;
                an observation, state or mask that does not fit its space; or one of them or a
                reward that is missing or not finite.
        """
        if not self._stepping:
            raise RuntimeError("step before reset: no episode is running")
        chosen = self._checked(actions)
        start = int(self._spaces.action_space.start)
        self._stepping = False
        reward = np.zeros((self.num_envs, self.num_agents), dtype=np.float32)
        terminated = np.zeros(self.num_envs, dtype=bool)
        truncated = np.zeros(self.num_envs, dtype=bool)
        metrics = {
            name: np.full(self.num_envs, np.nan, dtype=np.float32)
            for name in ("episode_return", "episode_length")
        }
        final: ObservationBuffer | None = None
        for row, env in enumerate(self._envs):
            acting = self._acting[row]
            observations, rewards, terminations, truncations, infos = env.step(
                {agent: start + chosen[row][self._index[agent]] for agent in acting}
            )
            for agent in acting:
                reward[row, self._index[agent]] = entry_of(rewards, agent, row, "reward")
            self._returns[row] += reward[row]
            self._lengths[row] += 1
            self._acting[row] = self._living(row)
            self._check_flags(row, acting, terminations, truncations)
            self._ended[row].update(agent for agent in acting if agent not in self._acting[row])
            if self._acting[row]:
                self._buffer.write(row, env, self._acting[row], observations, infos)
                continue
            cut_off = [agent for agent in acting if not terminations[agent]]
            if cut_off:
                truncated[row] = True
                if final is None:
                    final = self._make_buffer()
                # nobody acts on the last observations, so their masks may allow nothing
                final.write(row, env, cut_off, observations, infos, masked=False)
            else:
                terminated[row] = True
            metrics["episode_return"][row] = self._returns[row].mean()
            metrics["episode_length"][row] = self._lengths[row]
            self._begin(row)
        for row, i in np.argwhere(~np.isfinite(reward)):
            raise ValueError(
                f"the reward of agent {self._spaces.agents[i]!r} in environment {row} is "
                f"{reward[row, i]}; rewards must be finite"
            )
        self._buffer.check_finite()
        if final is not None:
            final.check_finite()
        self._stepping = True
        return Transition(
            observations=self._buffer.observations(self.device),
            reward=torch.tensor(reward, device=self.device),
            terminated=torch.tensor(terminated, device=self.device),
            truncated=torch.tensor(truncated, device=self.device),
            final=None if final is None else final.observations(self.device),
            metrics={k: torch.tensor(v, device=self.device) for k, v in metrics.items()},
        )

    def close(self) -> None:
        """Closes every environment; afterwards ``step`` raises."""
        self._stepping = False
        for env in self._envs:
            env.close()

    def _begin(self, row: int) -> None:
        """Resets environment ``row`` to its next episode and writes its observations."""
        assert self._seeds is not None
        key = (self._first + row, self._episodes[row])
        seeds = np.random.SeedSequence(self._seeds.entropy, spawn_key=key)
        seed = int(seeds.generate_state(1)[0]) % SEED_LIMIT
        self._episodes[row] += 1
        observations, infos = self._envs[row].reset(seed=seed)
        self._ended[row].clear()
        self._acting[row] = self._living(row)
        if not self._acting[row]:
            raise RuntimeError(
                f"environment {row} has no agents after reset(): its `agents` must list those "
                f"that begin the episode, of {list(self._spaces.agents)}"
            )
        self._returns[row] = 0
        self._lengths[row] = 0
        self._buffer.write(row, self._envs[row], self._acting[row], observations, infos)

    def _living(self, row: int) -> list[str]:
        # a copy: environments change their own list while they step
        agents = list(self._envs[row].agents)
        if unknown := [agent for agent in agents if agent not in self._index]:
            raise RuntimeError(
                f"environment {row} has agents {unknown} that are not among its "
                f"possible_agents {list(self._spaces.agents)}"
            )
        if returned := self._ended[row].intersection(agents):
            raise RuntimeError(
                f"environment {row} brought back agents {sorted(returned)} that had ended; "
                f"advantages run along one life of an agent, and PettingZoo allows no second one"
            )
        return agents

    def _check_flags(
        self,
        row: int,
        acting: Sequence[str],
        terminations: Mapping[str, bool],
        truncations: Mapping[str, bool],
    ) -> None:
        """Raises RuntimeError if flags and ``env.agents`` contradict each other."""
        for agent in acting:
            ended = entry_of(terminations, agent, row, "termination") or entry_of(
                truncations, agent, row, "truncation"
            )
            if ended == (agent in self._acting[row]):
                happened = "was neither terminated nor truncated but is no longer"
                if ended:
                    happened = "terminated or was truncated but is still"
                raise RuntimeError(
                    f"agent {agent!r} of environment {row} {happened} in env.agents; "
                    f"PettingZoo's parallel API keeps exactly those that have not ended"
                )

    def _checked(self, actions: Tensor) -> list[list[int]]:
        """Checks the joint action [B, N]; returns it as lists, undefined for agents not alive."""
        shape = (self.num_envs, self.num_agents)
        if actions.dtype != torch.int64 or actions.shape != shape:
            raise ValueError(
                f"actions must be int64 {list(shape)} [environments, agents], "
                f"got {actions.dtype} {list(actions.shape)}"
            )
        chosen = actions.cpu().numpy()
        count = int(self.action_space.n)
        exists = (chosen >= 0) & (chosen < count)
        index = np.where(exists, chosen, 0)[..., None]
        allowed = exists & np.take_along_axis(self._buffer.action_mask, index, axis=-1)[..., 0]
        wrong = self._buffer.alive & ~allowed
        for row, i in np.argwhere(wrong):
            choice = np.flatnonzero(self._buffer.action_mask[row, i]).tolist()
            raise ValueError(
                f"agent {self._spaces.agents[i]!r} in environment {row} can't take action "
                f"{chosen[row, i]}; of actions 0 to {count - 1} its mask allows {choice}"
            )
        return chosen.tolist()


def _unbounded(size: int) -> Box:
    return Box(-np.inf, np.inf, (size,), dtype=np.float32)
