"""Copies of any PettingZoo ``ParallelEnv`` with like agents as one ``BatchedEnv``."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, Space
from gymnasium.spaces.utils import flatdim, flatten, flatten_space
from pettingzoo import AECEnv, ParallelEnv
from torch import Tensor

from prunevit.envs.batched.protocol import Observations, Transition
from prunevit.extras import install_command

ACTION_MASK = "action_mask"
SEED_LIMIT = 2**31  # the narrowest seeders, behind C bindings, take a signed 32-bit integer
EXTRAS = {"mpe2": "mpe2"}  # our extra that installs an environment's top-level package


class BatchedPettingZoo:
    """A ``BatchedEnv`` [B environments, N agents] over copies of a PettingZoo ``ParallelEnv``.

    Agents stand in the order of ``possible_agents``. They share one network, so they must be alike:
    one ``Discrete`` action space, and observations that flatten to the same number of values.

    An agent that has ended (or has not joined yet) is not alive: zero observation, reward 0, its
    action ignored, its mask allowing action 0 only. The reward of the step in which it ends is its
    last. An environment's episode ends when no agent is left, and the next one begins in that step.

    How the end of an episode reaches the trainer, whose flags are per environment:

    - Every agent that was left terminated: ``terminated``; nothing is bootstrapped.
    - At least one was truncated: ``truncated``, and ``final`` holds what was seen last. There
      ``alive`` says who goes on: an agent that terminated in that very step (also if it is flagged
      truncated as well) or before it is not alive, with a zero observation, and bootstraps nothing.

    So the value that follows agent n's action is 0 where ``terminated``, that of ``final`` times
    ``final.alive`` where ``truncated``, and else that of ``observed`` times ``observed.alive``; no
    advantage is carried over an end of either kind, nor over an agent's death. An agent that is
    truncated alone, while others play on, can't be expressed and counts as terminated.

    ``state`` is the environment's ``state()`` where it has a ``state_space``, else the observations
    of all agents, without their ids, one after the other.

    Metrics of an ended episode: ``episode_return``, the mean over the N agents of the sum of their
    rewards, and ``episode_length`` in steps.

    Args:
        make_env: makes one environment; called ``num_envs`` times.
        num_envs: B.
        device: of all tensors handed out; the environments themselves run on the CPU.
        agent_ids: append the agent's one-hot index [N] to its observation, so that agents which
            share a network can still differ.
        with_state: ask the environments for their state, which some compute anew each time; without
            it ``state`` is empty, [B, 0].
        first: number of the first environment, by which it is seeded: one of B environments and one
            with those from number B on play what one of 2B would.

    Raises:
        TypeError: ``make_env`` makes no ``ParallelEnv``.
        ValueError: the agents are not alike, or an action or observation space is of a kind that
            can't be used; ``num_envs`` is below 1; or ``make_env`` makes unlike environments or the
            same one twice.
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
        self._layout = _Layout.of(self._envs[0])
        for copy, env in enumerate(self._envs):
            if (layout := _Layout.of(env)) != self._layout:
                raise ValueError(
                    f"make_env made unlike environments: the first has {self._layout}, "
                    f"number {copy} has {layout}"
                )
        self.num_envs = num_envs
        self._first = first
        self.num_agents = len(self._layout.agents)
        self.device = torch.device(device)
        self.action_space: Discrete = Discrete(int(self._layout.action_space.n))
        self._make_frame = functools.partial(
            _Frame, num_envs, self._layout, agent_ids=agent_ids, with_state=with_state
        )
        self._now = self._make_frame()
        self.observation_space = _unbounded(self._now.observation.shape[-1])
        self.state_space = _unbounded(self._now.state.shape[-1])
        self._index = {agent: i for i, agent in enumerate(self._layout.agents)}
        self._acting: list[list[str]] = [[] for _ in range(num_envs)]
        self._ended: list[set[str]] = [set() for _ in range(num_envs)]
        self._returns = np.zeros((num_envs, self.num_agents))
        self._lengths = np.zeros(num_envs, dtype=np.int64)
        self._seeds: np.random.SeedSequence | None = None
        self._episodes = [0] * num_envs
        self._stepping = False

    def reset(self, seed: int | None = None) -> Observations:
        """Begins new episodes everywhere.

        The k-th episode of environment b is seeded by (``seed``, b, k), so that a whole run repeats
        itself, automatic resets included, whatever an environment does on a ``reset`` without seed.

        Args:
            seed: of all episodes from here on. None goes on with the next episodes of the last
                seed, or begins with a random one.

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
        self._now.check_finite()
        self._stepping = True
        return self._now.observations(self.device)

    def step(self, actions: Tensor) -> Transition:
        """Takes the joint action int64 [B, N]; an environment whose last agent ends is reset.

        After an error the environments no longer stand at the same step: ``reset`` before going on.

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
        self._stepping = False
        reward = np.zeros((self.num_envs, self.num_agents), dtype=np.float32)
        terminated = np.zeros(self.num_envs, dtype=bool)
        truncated = np.zeros(self.num_envs, dtype=bool)
        metrics = {
            name: np.full(self.num_envs, np.nan, dtype=np.float32)
            for name in ("episode_return", "episode_length")
        }
        final: _Frame | None = None
        for row, env in enumerate(self._envs):
            acting = self._acting[row]
            start = int(self._layout.action_space.start)
            observations, rewards, terminations, truncations, infos = env.step(
                {agent: start + chosen[row][self._index[agent]] for agent in acting}
            )
            for agent in acting:
                reward[row, self._index[agent]] = _entry(rewards, agent, row, "reward")
            self._returns[row] += reward[row]
            self._lengths[row] += 1
            self._acting[row] = self._living(row)
            self._check_flags(row, acting, terminations, truncations)
            self._ended[row].update(agent for agent in acting if agent not in self._acting[row])
            if self._acting[row]:
                self._now.write(row, env, self._acting[row], observations, infos)
                continue
            cut_off = [agent for agent in acting if not terminations[agent]]
            if cut_off:
                truncated[row] = True
                if final is None:
                    final = self._make_frame()
                # nobody acts on what was seen last, and its masks may well allow nothing
                final.write(row, env, cut_off, observations, infos, masked=False)
            else:
                terminated[row] = True
            metrics["episode_return"][row] = self._returns[row].mean()
            metrics["episode_length"][row] = self._lengths[row]
            self._begin(row)
        self._check_rewards(reward)
        self._now.check_finite()
        if final is not None:
            final.check_finite()
        self._stepping = True
        return Transition(
            observations=self._now.observations(self.device),
            reward=torch.tensor(reward, device=self.device),
            terminated=torch.tensor(terminated, device=self.device),
            truncated=torch.tensor(truncated, device=self.device),
            final=None if final is None else final.observations(self.device),
            metrics={k: torch.tensor(v, device=self.device) for k, v in metrics.items()},
        )

    def close(self) -> None:
        """Closes every environment; afterwards nothing can be stepped."""
        self._stepping = False
        for env in self._envs:
            env.close()

    def _begin(self, row: int) -> None:
        """Resets environment ``row`` to its next episode and writes what it shows."""
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
                f"that begin the episode, of {list(self._layout.agents)}"
            )
        self._returns[row] = 0
        self._lengths[row] = 0
        self._now.write(row, self._envs[row], self._acting[row], observations, infos)

    def _living(self, row: int) -> list[str]:
        # a copy: environments change their own list while they step
        agents = list(self._envs[row].agents)
        if unknown := [agent for agent in agents if agent not in self._index]:
            raise RuntimeError(
                f"environment {row} has agents {unknown} that are not among its "
                f"possible_agents {list(self._layout.agents)}"
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
        """Refuses an end that could not be told apart as termination or truncation."""
        for agent in acting:
            ended = _entry(terminations, agent, row, "termination") or _entry(
                truncations, agent, row, "truncation"
            )
            if ended == (agent in self._acting[row]):
                happened = (
                    "terminated or was truncated but is still"
                    if ended
                    else "was neither terminated nor truncated but is no longer"
                )
                raise RuntimeError(
                    f"agent {agent!r} of environment {row} {happened} in env.agents; "
                    f"PettingZoo's parallel API keeps exactly those that have not ended"
                )

    def _checked(self, actions: Tensor) -> list[list[int]]:
        """The joint action [B, N] as lists, of meaning where an agent is alive."""
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
        allowed = exists & np.take_along_axis(self._now.action_mask, index, axis=-1)[..., 0]
        wrong = self._now.alive & ~allowed
        for row, i in np.argwhere(wrong) if wrong.any() else ():
            choice = np.flatnonzero(self._now.action_mask[row, i]).tolist()
            raise ValueError(
                f"agent {self._layout.agents[i]!r} in environment {row} can't take action "
                f"{chosen[row, i]}; of actions 0 to {count - 1} its mask allows {choice}"
            )
        return chosen.tolist()

    def _check_rewards(self, reward: np.ndarray) -> None:
        if np.isfinite(reward).all():
            return
        for row, i in np.argwhere(~np.isfinite(reward)):
            raise ValueError(
                f"the reward of agent {self._layout.agents[i]!r} in environment {row} is "
                f"{reward[row, i]}; rewards must be finite"
            )


@dataclass(frozen=True)
class _Layout:
    """What all copies have in common: agents, their spaces (without action masks), state space."""

    agents: tuple[str, ...]
    observation_spaces: tuple[Space, ...]
    action_space: Discrete
    state_space: Space | None

    @classmethod
    def of(cls, env: ParallelEnv) -> _Layout:
        """Reads the spaces of ``env`` and refuses agents that are not alike."""
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
        sizes = [_flat_size(s, f"agent {a!r}") for a, s in zip(agents, observations, strict=True)]
        for i, agent in enumerate(agents):
            if not isinstance(actions[i], Discrete):
                raise ValueError(
                    f"agent {agent!r} has the action space {actions[i]}; only Discrete is supported"
                )
            if sizes[i] != sizes[0] or actions[i] != actions[0]:
                raise ValueError(
                    f"agents {agents[0]!r} and {agent!r} are not alike, so they can't share a "
                    f"network: observations {observations[0]} and {observations[i]} "
                    f"({sizes[0]} and {sizes[i]} values), actions {actions[0]} and {actions[i]}"
                )
        state_space = getattr(env, "state_space", None)
        if state_space is not None:
            _flat_size(state_space, "the state")
        return cls(agents, observations, actions[0], state_space)


class _Frame:
    """The arrays behind one ``Observations``, filled environment by environment.

    Rows that were never written hold zeros, nobody alive, and action 0 allowed.
    """

    def __init__(self, num_envs: int, layout: _Layout, agent_ids: bool, with_state: bool) -> None:
        n = len(layout.agents)
        self._layout = layout
        self._with_state = with_state
        self._written: list[Sequence[str]] = [()] * num_envs  # whom each row shows
        self._index = {agent: i for i, agent in enumerate(layout.agents)}
        self._size = flatdim(layout.observation_spaces[0])
        state_size = n * self._size if layout.state_space is None else flatdim(layout.state_space)
        state_size *= with_state
        self._ids = np.eye(n, n if agent_ids else 0, dtype=np.float32)
        self.observation = np.zeros(
            (num_envs, n, self._size + self._ids.shape[1]), dtype=np.float32
        )
        self.state = np.zeros((num_envs, state_size), dtype=np.float32)
        self.alive = np.zeros((num_envs, n), dtype=bool)
        self.action_mask = np.zeros((num_envs, n, int(layout.action_space.n)), dtype=bool)
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
        """Fills ``row`` with what ``agents`` see; all others are not alive there.

        Where not ``masked``, masks are not read and every action is allowed.
        """
        if agents != self._written[row]:
            self._show(row, agents)
        for agent in agents:
            i = self._index[agent]
            seen = _entry(observations, agent, row, "observation")
            mask = infos.get(agent, {}).get(ACTION_MASK)
            if mask is None and isinstance(seen, Mapping):
                mask = seen.get(ACTION_MASK)
            if mask is None or not masked:
                self.action_mask[row, i] = True
            else:
                self.action_mask[row, i] = self._allowed(mask, agent, row)
            space = self._layout.observation_spaces[i]
            whose = f"the observation of agent {agent!r} in environment {row}"
            if isinstance(seen, Mapping) and not isinstance(space, Dict):
                seen = seen.get("observation")
            self.observation[row, i, : self._size] = _flat(space, self._size, seen, whose)
        if not self._with_state:
            return
        if self._layout.state_space is None:
            self.state[row] = self.observation[row, :, : self._size].reshape(-1)
        else:
            whose = f"the state of environment {row}"
            self.state[row] = _flat(
                self._layout.state_space, self.state.shape[1], env.state(), whose
            )

    def _show(self, row: int, agents: Sequence[str]) -> None:
        """Only ``agents`` are alive in ``row`` from here on."""
        here = [self._index[agent] for agent in agents]
        self.observation[row] = 0
        self.observation[row, here, self._size :] = self._ids[here]
        self.alive[row] = False
        self.alive[row, here] = True
        self.action_mask[row] = False
        self.action_mask[row, :, 0] = True
        self._written[row] = list(agents)

    def _allowed(self, mask: Any, agent: str, row: int) -> np.ndarray:
        allowed = np.asarray(mask, dtype=bool)
        if allowed.shape != self.action_mask.shape[-1:] or not allowed.any():
            raise ValueError(
                f"the action mask of agent {agent!r} in environment {row} must allow at least one "
                f"of {self.action_mask.shape[-1]} actions, got {mask}"
            )
        return allowed

    def check_finite(self) -> None:
        """Refuses NaN and infinity in what the agents see and in the state."""
        if np.isfinite(self.observation).all() and np.isfinite(self.state).all():
            return
        for row, i, at in np.argwhere(~np.isfinite(self.observation)):
            raise ValueError(
                f"the observation of agent {self._layout.agents[i]!r} in environment {row} is "
                f"{self.observation[row, i, at]} at {at}; observations must be finite"
            )
        for row, at in np.argwhere(~np.isfinite(self.state)):
            raise ValueError(f"the state of environment {row} is {self.state[row, at]} at {at}")

    def observations(self, device: torch.device) -> Observations:
        """Tensors on ``device`` that own their memory: the next step overwrites the arrays here."""
        return Observations(
            observation=torch.tensor(self.observation, device=device),
            state=torch.tensor(self.state, device=device),
            alive=torch.tensor(self.alive, device=device),
            action_mask=torch.tensor(self.action_mask, device=device),
        )


def make_pettingzoo(name: str, **kwargs: Any) -> Callable[[], ParallelEnv]:
    """What makes the environment ``name``, with ``kwargs`` for each.

    Args:
        name: a module with a ``parallel_env``, as in "mpe2.simple_spread_v3" or
            "pettingzoo.sisl.pursuit_v5", or "module:factory" for a callable of another name.
        kwargs: given to the factory.

    Raises:
        ModuleNotFoundError: there is no such module; says what to install, or which there are.
        ValueError: the module has no such factory.
    """
    module_name, _, attribute = name.partition(":")
    module = _import(module_name)
    factory = getattr(module, attribute or "parallel_env", None)
    if not callable(factory):
        raise ValueError(
            f"module {module_name!r} has no callable {attribute or 'parallel_env'!r}; name another "
            f"factory as '{module_name}:factory'"
        )
    return functools.partial(factory, **kwargs)


def _import(module_name: str) -> Any:
    if not re.fullmatch(r"\w+(\.\w+)*", module_name):
        raise ValueError(f"{module_name!r} is no module name, such as mpe2.simple_spread_v3")
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        parent = missing.rpartition(".")[0]
        if parent and f"{module_name}.".startswith(f"{missing}."):
            paths = getattr(importlib.import_module(parent), "__path__", [])
            known = [m.name for m in pkgutil.iter_modules(paths) if re.search(r"_v\d+$", m.name)]
            advice = f"{parent} has {', '.join(known) or 'no environments'}"
        else:
            top, *below = module_name.split(".")
            if top == "pettingzoo" and below:
                advice = f"pip install 'pettingzoo[{below[0]}]'"
            elif top in EXTRAS:
                advice = install_command(EXTRAS[top])
            else:
                advice = f"install what provides {missing!r}"
        raise ModuleNotFoundError(
            f"environment {module_name!r} needs module {missing!r}, which is not there: {advice}",
            name=missing,
        ) from error


def _unbounded(size: int) -> Box:
    return Box(-np.inf, np.inf, (size,), dtype=np.float32)


def _without_mask(space: Space) -> Space:
    """What is left to see of PettingZoo's convention {"observation": ..., "action_mask": ...}."""
    if not isinstance(space, Dict) or ACTION_MASK not in space.spaces:
        return space
    seen = {key: part for key, part in space.spaces.items() if key != ACTION_MASK}
    return seen["observation"] if set(seen) == {"observation"} else Dict(seen)


def _flat_size(space: Space, whose: str) -> int:
    try:
        flat = flatten_space(space)
    # how gymnasium says that it can't flatten a kind of space; refused below, with the space named
    except NotImplementedError:
        flat = None
    if not isinstance(flat, Box):
        raise ValueError(f"{whose} has the space {space}, which does not flatten to a fixed size")
    return flatdim(space)


def _flat(space: Space, size: int, value: Any, whose: str) -> np.ndarray:
    """``value`` of ``space`` as a vector [size]; a Box's values as they are, in whatever dtype."""
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


def _entry(values: Mapping[str, Any], agent: str, row: int, what: str) -> Any:
    try:
        return values[agent]
    except KeyError:
        raise ValueError(f"environment {row} gave no {what} for agent {agent!r}") from None
