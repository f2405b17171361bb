"""Stable-Baselines3: every token of every image is one environment, and all share a policy.

SB3 has no agents that leave. A pruned token therefore stays until the end of the episode: it
observes zeros, its actions are ignored, and it still gets rewards. These belong to the decision
that pruned it. Its later steps are no decisions, and nothing can be learned from their zeros. The
buffers here credit the rewards to the last decision and leave the later steps out.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Sequence
from typing import Any, ClassVar, Unpack

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from prunevit.envs.adapters.common import (
    GameArguments,
    GameHandle,
    to_numpy,
)
from prunevit.envs.batched.inputs import image_indices, to_actions
from prunevit.envs.batched.protocol import Observations

LEARNS_FROM_THE_PRUNED = (
    "pruned tokens were among the rows of this episode, and no buffer leaves them out. To train, "
    "give rollout_buffer_class=TokenRolloutBuffer (PPO, A2C) or MaskableTokenRolloutBuffer "
    "(MaskablePPO), or take TokenDQN; infos of such rows say 'pruned'. To evaluate, ignore this"
)


class TokenActions(Discrete):
    """Prune (0) or keep (1), and which tokens decided in the last step.

    SB3 hands the action space of an environment to its buffers through all wrappers. Observations
    don't show who is pruned after a wrapper has changed them, as ``VecNormalize`` does.

    Attributes:
        decided: which tokens were alive before the last step, bool [B * N].
        steps: how many steps there were.
        is_read: whether a buffer asks for ``decided``.
    """

    def __init__(self) -> None:
        super().__init__(2)
        self.decided: NDArray[np.bool_] = np.zeros(0, bool)
        self.steps = 0
        self.is_read = False

    def record(self, decided: NDArray[np.bool_]) -> None:
        self.decided = decided
        self.steps += 1


class TokenVecEnv(VecEnv):
    """B images of N tokens as B * N environments, ordered by image and token.

    ``info["pruned"]`` says whether a token had been pruned before the step. Infos of the last step
    have ``terminal_observation``, which is zero. The first token of each image also has
    ``correct``, ``gmacs`` and, as from SB3's monitor, ``episode`` with the mean return of the
    tokens.

    ``env.set_options({"indices": [...]})`` chooses the B images of the next ``reset``.

    Args:
        num_images: B.
        game: arguments of ``TokenPruneEnv``.
    """

    render_mode = None

    def __init__(self, num_images: int = 64, **game: Unpack[GameArguments]) -> None:
        self._held = GameHandle(num_images, game)
        env = self._held.env
        (size,) = env.observation_space.shape
        self.num_images, self.num_tokens = num_images, env.num_agents
        self._token_actions = TokenActions()
        observations = Box(-np.inf, np.inf, (size,), np.float32)
        super().__init__(num_images * env.num_agents, observations, self._token_actions)
        self.device = env.device
        self._warned = False
        self._begun = time.monotonic()
        self._no_observation = np.zeros(size, np.float32)
        self._alive = torch.zeros(0, dtype=torch.bool)
        self._returns = torch.zeros(0)
        self._actions: Tensor | None = None

    def reset(self) -> NDArray[np.float32]:
        observed = self._begin(self._seeds[0], image_indices(self._options[0]))
        self._reset_seeds()
        self._reset_options()
        return self._rows(observed.observation)

    def step_async(self, actions: NDArray[Any]) -> None:
        device = self._held.env.device
        self._actions = to_actions(actions, device).view(self.num_images, self.num_tokens)

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict]]:
        assert self._actions is not None
        env = self._held.env
        acted = self._alive
        transition = env.step(self._actions)
        observed = transition.observations
        self._actions = None
        self._alive = observed.alive
        self._returns = self._returns + transition.reward
        over = env.outcome is not None
        space = self._token_actions
        space.record(to_numpy(acted.flatten()))
        if over and not self._warned and not space.is_read and not acted.all():
            self._warned = True
            warnings.warn(LEARNS_FROM_THE_PRUNED, stacklevel=2)
        infos = self._last_infos(acted) if over else _marked(acted, {})
        if over:
            observed = self._begin(None, None)
        return (
            self._rows(observed.observation),
            self._rows(transition.reward),
            np.full(self.num_envs, over),
            infos,
        )

    def close(self) -> None:
        self._held.close()

    def action_masks(self) -> NDArray[np.bool_]:
        """Allowed actions, bool [B * N, 2]: a pruned token may only prune."""
        alive = self._rows(self._alive)
        return np.stack([np.ones_like(alive), alive], axis=1)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError(
            f"{attr_name} can't be set: the tokens are rows of tensors, not environments"
        )

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        if method_name != "action_masks":
            raise AttributeError(f"a token has no method {method_name}, only action_masks")
        return list(self.action_masks()[list(self._get_indices(indices))])

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))

    def _begin(self, seed: int | None, indices: Any) -> Observations:
        observed = self._held.env.reset(seed, indices=indices)
        self._alive = observed.alive
        self._returns = torch.zeros_like(observed.alive, dtype=torch.float32)
        return observed

    def _rows(self, values: Tensor) -> NDArray[Any]:
        """[B, N, ...] -> [B * N, ...]."""
        return to_numpy(values.flatten(0, 1))

    def _last_infos(self, acted: Tensor) -> list[dict[str, Any]]:
        env = self._held.env
        assert env.outcome is not None
        infos = _marked(acted, {"terminal_observation": self._no_observation})
        seconds = round(time.monotonic() - self._begun, 6)
        facts = (env.outcome.correct, env.outcome.gmacs, self._returns.mean(1))
        for image, (correct, gmacs, mean_return) in enumerate(
            zip(*(fact.tolist() for fact in facts), strict=True)
        ):
            first = image * self.num_tokens
            infos[first] = infos[first] | {
                "correct": correct,
                "gmacs": gmacs,
                "episode": {"r": mean_return, "l": env.game.num_stages, "t": seconds},
            }
        return infos


def _marked(acted: Tensor, info: dict[str, Any]) -> list[dict[str, Any]]:
    """A list with ``info`` and ``pruned`` for each token.

    It refers to only two dictionaries, since making thousands would take longer than the game.
    """
    kinds = np.array([info | {"pruned": True}, info | {"pruned": False}], dtype=object)
    return kinds[to_numpy(acted.flatten()).astype(np.intp)].tolist()


class TokenRolloutBuffer(RolloutBuffer):
    """Rollout buffer of ``PPO`` and ``A2C`` for ``TokenVecEnv``, with decisions of living tokens.

    Pass it as ``rollout_buffer_class``, with ``n_steps`` a multiple of the number of stages.
    """

    arrays: ClassVar[Sequence[str]] = (
        "observations",
        "actions",
        "values",
        "log_probs",
        "advantages",
        "returns",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # one that was loaded with a model stands still
        self._last_step = self.action_space, getattr(self.action_space, "steps", 0)

    def reset(self) -> None:
        self._living: NDArray[np.bool_] = np.zeros((self.buffer_size, self.n_envs), bool)
        super().reset()

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Adds a step as SB3 does.

        Raises:
            ValueError: the step was not taken in the environment whose action space this buffer
                has, so that it is not known who decided.
        """
        space, (known, steps) = self.action_space, self._last_step
        if not isinstance(space, TokenActions) or (known is space and steps == space.steps):
            raise ValueError(
                "this buffer asks the action space of a TokenVecEnv which tokens decided, but its "
                "own is another one: after load() or set_env(), set "
                "model.rollout_buffer.action_space = env.action_space"
            )
        self._last_step, space.is_read = (space, space.steps), True
        self._living[self.pos] = space.decided
        super().add(*args, **kwargs)

    def compute_returns_and_advantage(self, last_values: Tensor, dones: NDArray[np.bool_]) -> None:
        """Computes returns as SB3 does, with rewards of pruned tokens moved to their last decision.

        Raises:
            ValueError: the rollout ends within an episode.
        """
        if not dones.all():
            raise ValueError(
                f"n_steps={self.buffer_size} ends within an episode, when the later rewards of "
                "pruned tokens are not known: take a multiple of the number of stages"
            )
        for step in reversed(range(1, self.buffer_size)):
            pruned = ~self._living[step]
            self.rewards[step - 1] += self.gamma * self.rewards[step] * pruned
            # nothing follows the decision by which a token was pruned
            self.episode_starts[step][pruned] = 1.0
        super().compute_returns_and_advantage(last_values, dones)

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:
        """Yields minibatches of the living tokens' decisions in random order."""
        assert self.full
        if not self.generator_ready:
            living = self.swap_and_flatten(self._living)[:, 0]
            for name in self.arrays:
                setattr(self, name, self.swap_and_flatten(getattr(self, name))[living])
            self.generator_ready = True
        count = len(self.observations)
        order = np.random.permutation(count)
        # of nearly equal size: a single decision has no standard deviation to normalise by
        for chosen in np.array_split(order, -(-count // (batch_size or count))):
            yield self._get_samples(chosen)


class TokenReplayBuffer(ReplayBuffer):
    """Replay buffer of ``DQN`` for ``TokenVecEnv``, with decisions of living tokens.

    Decisions are stored at the end of their episode, when all of their rewards are known.

    ``TokenDQN`` uses it. With another algorithm, pass it as ``replay_buffer_class``, and ``gamma``
    in ``replay_buffer_kwargs``: SB3 tells no buffer the algorithm's. From SB3 2.7 on, this one
    counts for what the algorithm learns too. Before, both must be the same.

    Args:
        gamma: the discount.
        buffer_size: capacity in decisions.
        args: further arguments of ``ReplayBuffer``.
        n_envs: number of environments, B * N.
        kwargs: further arguments of ``ReplayBuffer``.
    """

    def __init__(
        self, buffer_size: int, *args: Any, gamma: float, n_envs: int = 1, **kwargs: Any
    ) -> None:
        # the number of living tokens varies, so decisions are stored as those of one environment
        kwargs["n_envs"] = 1
        super().__init__(buffer_size, *args, **kwargs)
        self.gamma = gamma
        self._episode: list[tuple[NDArray[Any], ...]] = []

    def add(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        if "pruned" not in infos[0]:
            raise ValueError("this buffer is for TokenVecEnv, whose infos say who was pruned")
        if isinstance(self.action_space, TokenActions):
            self.action_space.is_read = True
        living = ~np.array([info["pruned"] for info in infos])
        self._episode.append((obs, next_obs, action.reshape(len(obs), -1), reward, living))
        if not done.all():
            return
        later = np.zeros_like(reward)  # rewards that pruned tokens still get
        ended = np.ones_like(living)
        for seen, following, chosen, paid, living in reversed(self._episode):
            total = paid + self.gamma * later
            later = np.where(living, 0.0, total)
            self._store(seen, following, chosen, total, ended, living)
            ended = ~living
        self._episode = []

    def _get_samples(self, *args: Any, **kwargs: Any) -> ReplayBufferSamples:
        samples = super()._get_samples(*args, **kwargs)
        if "discounts" not in samples._fields:
            return samples
        # or the algorithm would discount what follows by its own gamma
        return samples._replace(discounts=torch.full_like(samples.rewards, self.gamma))

    def _store(self, *arrays: NDArray[Any]) -> None:
        *values, living = arrays
        rows = np.flatnonzero(living)[-self.buffer_size :]
        places = (self.pos + np.arange(len(rows))) % self.buffer_size
        stored = (self.observations, self.next_observations, self.actions, self.rewards, self.dones)
        for store, value in zip(stored, values, strict=True):
            store[places, 0] = value[rows]
        self.full = self.full or self.pos + len(rows) >= self.buffer_size
        self.pos = (self.pos + len(rows)) % self.buffer_size


class TokenDQN(DQN):
    """SB3's DQN for ``TokenVecEnv``: each token explores for itself, the living alone are replayed.

    SB3 lets either all environments act at random in a step or none, and a token learns nothing
    from an image of which a random half is gone.
    """

    def _setup_model(self) -> None:
        if self.replay_buffer_class is None:
            self.replay_buffer_class = TokenReplayBuffer
        if self.replay_buffer_kwargs.setdefault("gamma", self.gamma) != self.gamma:
            raise ValueError(
                f"replay_buffer_kwargs={self.replay_buffer_kwargs}: gamma is the algorithm's, "
                f"{self.gamma}; leave it out"
            )
        super()._setup_model()

    def predict(
        self,
        observation: NDArray[Any] | dict[str, NDArray[Any]],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        action, state = self.policy.predict(observation, state, episode_start, deterministic)
        if deterministic:
            return action, state
        explores = np.random.rand(*action.shape) < self.exploration_rate
        return np.where(explores, np.random.randint(2, size=action.shape), action), state
