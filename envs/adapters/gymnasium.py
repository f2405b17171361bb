"""The token game for Gymnasium: one controller decides for all tokens of an image.

``gymnasium.make("prunevit/TokenPrune-v0")`` plays one image at a time,
``gymnasium.make_vec("prunevit/TokenPrune-v0", num_envs=B)`` B images at once on the tensor game.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, MultiBinary
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from prunevit.envs.adapters.common import GameArguments, GameHandle, to_numpy
from prunevit.envs.batched.infos import episode_infos
from prunevit.envs.batched.inputs import image_indices, to_actions
from prunevit.envs.batched.protocol import Observations
from prunevit.envs.rendering import EpisodePictures

SAMPLED = 2  # what MultiBinary.sample takes in a mask for a place that is free


class TokenPruneGym(gymnasium.Env[Any, NDArray[np.int8]]):
    """Plays one image an episode. The action has a bit for each token: 1 keeps it, 0 prunes it.

    Observations are float32 [N, D_obs], zeros for pruned tokens. The reward is the mean of the N
    agents' rewards, which is the reward itself if the team shares one. Infos have the same keys at
    every step: ``index`` and ``label`` of the image, ``action_mask`` int8 [N] as the action space's
    ``sample`` takes it, ``agent_rewards`` float32 [N], and three that are zero until the end:
    ``logits`` [classes], ``correct`` and ``gmacs`` (policy not included).

    Args:
        render_mode: None or "rgb_array".
        game: arguments of ``TokenPruneEnv``.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own declaration
        "render_modes": ["rgb_array"],
        "render_fps": 2,
    }

    def __init__(self, render_mode: str | None = None, **game: Unpack[GameArguments]) -> None:
        self.render_mode = render_mode
        self._batch = TokenPruneVector(1, False, render_mode, AutoresetMode.DISABLED, **game)
        self.observation_space = self._batch.single_observation_space
        self.action_space: MultiBinary = self._batch.single_action_space
        self._alive: NDArray[np.bool_] = np.zeros(self.action_space.n, np.bool_)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begins an episode on an image that ``seed`` draws, or on ``options["indices"]``, which
        is one.
        """
        super().reset(seed=seed)
        observations, infos = self._batch.reset(seed=seed, options=options)
        return observations[0], self._first(infos)

    def step(
        self, action: ArrayLike
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Takes a bit for each token, 1 to keep and 0 to prune.

        Raises:
            GameError: no episode is under way.
            ValueError: the action is not N zeros and ones.
        """
        actions = to_actions(action, torch.device("cpu"))[None]
        observations, reward, terminated, _, infos = self._batch.step(actions)
        return observations[0], float(reward[0]), bool(terminated[0]), False, self._first(infos)

    def action_masks(self) -> NDArray[np.bool_]:
        """The action masks that sb3-contrib's ``MaskablePPO`` asks for, bool [2 N]: for each token
        whether it may prune, which is always so, and whether it may keep.
        """
        return np.stack([np.ones_like(self._alive), self._alive], axis=1).flatten()

    def render(self) -> Any:
        """uint8 [H, W, 3], all pictures of an episode of one size; None without a mode."""
        pictures = self._batch.render()
        return None if pictures is None else pictures[0]

    def close(self) -> None:
        self._batch.close()

    def _first(self, infos: dict[str, Any]) -> dict[str, Any]:
        """Infos of the one image, numbers as Python's."""
        self._alive = infos["action_mask"][0] > 0
        shown = {name: rows[0] for name, rows in infos.items() if name[0] != "_"}
        return {name: row.item() if row.ndim == 0 else row for name, row in shown.items()}


class TokenPruneVector(VectorEnv[Any, Any, Any]):
    """Plays B images at once. Their episodes end together.

    Values are those of ``TokenPruneGym`` with a leading dimension B.

    Args:
        num_envs: B.
        tensors: return tensors on the game's device instead of arrays.
        autoreset_mode: what follows the end, as Gymnasium defines it. SAME_STEP: the last step
            returns the next episodes' first observations, and infos have ``final_obs`` and
            ``final_info``. NEXT_STEP: the next step does, whatever its actions, and pays nothing.
            DISABLED: ``reset`` is called, also with ``options["reset_mask"]``, which must name all.
        render_mode: None or "rgb_array".
        game: arguments of ``TokenPruneEnv``.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own declaration
        **TokenPruneGym.metadata,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        tensors: bool = False,
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        **game: Unpack[GameArguments],
    ) -> None:
        try:
            self._autoreset = AutoresetMode(autoreset_mode)
        except ValueError as error:
            raise ValueError(
                f"autoreset_mode={autoreset_mode!r}: choose from "
                f"{', '.join(mode.value for mode in AutoresetMode)}"
            ) from error
        self.metadata = {**TokenPruneGym.metadata, "autoreset_mode": self._autoreset}
        self._over = False
        self.num_envs = num_envs
        self.render_mode = render_mode
        self._pictures = EpisodePictures(render_mode, ("rgb_array",))
        self._held = GameHandle(num_envs, game)
        self._give: Callable[[Tensor], Any] = _as_it_is if tensors else to_numpy
        env = self._held.env
        shape = (env.num_agents, *env.observation_space.shape)
        self.single_observation_space = Box(-np.inf, np.inf, shape, np.float32)
        self.single_action_space: MultiBinary = MultiBinary(env.num_agents)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begins episodes on images that ``seed`` draws, or on the B of ``options["indices"]``.

        Raises:
            ValueError: ``options["reset_mask"]`` leaves some out: all images begin together.
        """
        super().reset(seed=seed)
        if options is not None and "reset_mask" in options:
            options = dict(options)
            mask = np.asarray(options.pop("reset_mask"))
            if mask.shape != (self.num_envs,) or not mask.all():
                raise ValueError(
                    f"reset_mask={mask!r}: all {self.num_envs} images begin and end together"
                )
        observed = self._begin(seed, image_indices(options))
        nothing = torch.zeros_like(observed.alive, dtype=torch.float32)
        return self._give(observed.observation), self._infos(observed, nothing)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Takes a bit for each token of each image, [B, N]; ``autoreset_mode`` says what follows an
        episode's end.

        Raises:
            GameError: no episode is under way.
            ValueError: the actions are not B x N zeros and ones.
        """
        env = self._held.env
        if self._over and self._autoreset is AutoresetMode.NEXT_STEP:
            observations, infos = self.reset()
            none = torch.zeros(self.num_envs, dtype=torch.float32, device=env.device)
            return observations, *map(self._give, (none, none.bool(), none.bool())), infos
        transition = env.step(to_actions(actions, env.device))
        self._pictures.add(env.survivors)
        observed = transition.observations
        infos = self._infos(observed, transition.reward)
        self._over = env.outcome is not None
        if self._over and self._autoreset is AutoresetMode.SAME_STEP:
            ended = {"final_obs": self._give(observed.observation), "final_info": infos}
            observed = self._begin(None, None)
            # of the new episodes, except this step's rewards: a sum over them must miss nothing
            infos = self._infos(observed, transition.reward) | self._with_masks(ended)
        return (
            self._give(observed.observation),
            self._give(transition.reward.mean(1)),
            self._give(transition.terminated),
            self._give(transition.truncated),
            infos,
        )

    def render(self) -> Any:
        """A uint8 [H, W, 3] for each image; None without a mode."""
        env = self._held.env
        return self._pictures.draw(env.game, env.pixels)

    def close_extras(self, **kwargs: Any) -> None:
        # Gymnasium also closes an environment whose construction failed, when it is collected
        if hasattr(self, "_held"):
            self._held.close()

    def _begin(self, seed: int | None, indices: Any) -> Observations:
        observed = self._held.env.reset(seed, indices=indices)
        self._over = False
        self._pictures.begin(observed.alive)
        return observed

    def _infos(self, observed: Observations, reward: Tensor) -> dict[str, Any]:
        env = self._held.env
        shown = episode_infos(env, env.outcome) | {
            "action_mask": SAMPLED * observed.alive.to(torch.int8),
            "agent_rewards": reward,
        }
        return self._with_masks({name: self._give(value) for name, value in shown.items()})

    def _with_masks(self, infos: dict[str, Any]) -> dict[str, Any]:
        """Adds Gymnasium's mark of which environments have an info: all of them."""
        everywhere = np.ones(self.num_envs, np.bool_)
        return infos | {f"_{name}": everywhere.copy() for name in infos}


def _as_it_is(values: Tensor) -> Tensor:
    return values
