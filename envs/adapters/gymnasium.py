"""Gymnasium: a central controller says for every token of an image whether it stays.

``gymnasium.make("prunevit/TokenPrune-v0")`` plays one image at a time,
``gymnasium.make_vec("prunevit/TokenPrune-v0", num_envs=B)`` B images at once on the tensor game.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import gymnasium
import numpy as np
import torch
from gymnasium import logger
from gymnasium.spaces import Box, MultiBinary
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from prunevit.envs.adapters.common import (
    GameArguments,
    GameHandle,
    to_numpy,
)
from prunevit.envs.batched.inputs import image_indices, to_actions
from prunevit.envs.batched.lazy_observations import action_mask
from prunevit.envs.batched.protocol import Observations
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data_config import model_data_config
from prunevit.envs.game import GameError
from prunevit.envs.rendering import denormalise, strip_of_episode

SAMPLED = 2  # what MultiBinary.sample takes in a mask for a place that is free


def facts(env: BatchedTokenPrune, alive: Tensor, reward: Tensor) -> dict[str, Tensor]:
    """Infos of B episodes, the same keys at every step.

    Args:
        env: the game.
        alive: bool [B, N], who decides next.
        reward: what the last step paid each agent, float32 [B, N].

    Returns:
        ``index`` and ``label`` of the image, ``action_mask`` int8 [B, N] as the action space's
        ``sample`` takes it, ``agent_rewards``, and what is zero until the end: ``logits``,
        ``correct`` and ``gmacs`` (policy not included).
    """
    outcome = env.outcome
    none = torch.zeros(env.num_envs, device=env.device)
    return {
        "index": env.indices,
        "label": env.labels,
        "action_mask": SAMPLED * alive.to(torch.int8),
        "agent_rewards": reward,
        "logits": outcome.logits.float()
        if outcome
        else none[:, None].expand(-1, env.game.backbone.num_classes),
        "correct": outcome.correct if outcome else none.bool(),
        "gmacs": outcome.gmacs if outcome else none,
    }


class Pictures:
    """What ``render`` shows: each image stage by stage, pruned patches whited out.

    Args:
        render_mode: None or "rgb_array".

    Raises:
        ValueError: another mode.
    """

    def __init__(self, render_mode: str | None) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r}: choose rgb_array, or None")
        self._history: list[Tensor] | None = [] if render_mode else None

    def begin(self, observed: Observations) -> None:
        if self._history is not None:
            self._history = [observed.alive]

    def go_on(self, env: BatchedTokenPrune) -> None:
        if self._history is not None:
            self._history.append(env.survivors)

    def draw(self, env: BatchedTokenPrune) -> tuple[NDArray[np.uint8], ...] | None:
        """uint8 [H, W, 3] for each image; None, and a warning, without a mode."""
        if self._history is None:
            logger.warn(
                "nothing is rendered: give render_mode='rgb_array' when the environment is made"
            )
            return None
        if not self._history:
            raise GameError("nothing to render before reset")
        config = model_data_config(env.game.backbone.model)
        shown = denormalise(env.pixels.float().cpu(), tuple(config["mean"]), tuple(config["std"]))
        alive = torch.stack(self._history, dim=1).cpu()  # [B, stages so far + 1, N]
        grid, pictures = env.game.backbone.grid_size, env.game.num_stages + 1
        return tuple(
            strip_of_episode(image, tuple(rows), grid, pictures)
            for image, rows in zip(shown, alive, strict=True)
        )


class TokenPruneGym(gymnasium.Env[Any, NDArray[np.int8]]):
    """One image an episode; the action says of each token whether it is kept.

    Observations are float32 [N, D_obs], zeros for pruned tokens. The reward is the mean of what the
    N agents are paid, which for a team reward is that reward; ``info["agent_rewards"]`` has each.
    Infos are those of ``facts``.

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
        self._pictures = Pictures(render_mode)
        self._held = GameHandle(1, game)
        self._alive = torch.zeros(1, self._held.env.num_agents, dtype=torch.bool)
        self.observation_space = _all_tokens(self._held.env)
        self.action_space = MultiBinary(self._held.env.num_agents)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begins an episode on an image that ``seed`` draws, or on ``options["indices"]``, which
        is one.
        """
        super().reset(seed=seed)
        env = self._held.env
        observed = env.reset(seed, indices=image_indices(options))
        self._alive = observed.alive
        self._pictures.begin(observed)
        nothing = torch.zeros(observed.alive.shape, device=env.device)
        return to_numpy(observed.observation[0]), self._info(observed, nothing)

    def step(
        self, action: ArrayLike
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        env = self._held.env
        transition = env.step(to_actions(action, env.device)[None])
        self._alive = transition.observations.alive
        self._pictures.go_on(env)
        return (
            to_numpy(transition.observations.observation[0]),
            float(transition.reward.mean()),
            bool(transition.terminated),
            False,
            self._info(transition.observations, transition.reward),
        )

    def action_masks(self) -> NDArray[np.bool_]:
        """Which bits each token may choose, as sb3-contrib's ``MaskablePPO`` asks: bool [2 N], for
        each token whether it may prune (always) and whether it may keep.
        """
        return to_numpy(action_mask(self._alive)[0].flatten())

    def render(self) -> Any:
        """uint8 [H, W, 3], all pictures of an episode of one size; None without a mode."""
        pictures = self._pictures.draw(self._held.env)
        return None if pictures is None else pictures[0]

    def close(self) -> None:
        self._held.close()

    def _info(self, observed: Observations, reward: Tensor) -> dict[str, Any]:
        rows = {
            name: value[0] for name, value in facts(self._held.env, observed.alive, reward).items()
        }
        return {name: row.item() if row.dim() == 0 else to_numpy(row) for name, row in rows.items()}


class TokenPruneVector(VectorEnv[Any, Any, Any]):
    """B images at once, all of whose episodes end together.

    What ``TokenPruneGym`` returns, with a leading dimension B.

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
        self._pictures = Pictures(render_mode)
        self._held = GameHandle(num_envs, game)
        self._give: Callable[[Tensor], Any] = _as_it_is if tensors else to_numpy
        self.single_observation_space = _all_tokens(self._held.env)
        self.single_action_space = MultiBinary(self._held.env.num_agents)
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
        nothing = torch.zeros(observed.alive.shape, device=observed.alive.device)
        return self._give(observed.observation), self._infos(observed, nothing)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        env = self._held.env
        if self._over and self._autoreset is AutoresetMode.NEXT_STEP:
            observations, infos = self.reset()
            none = torch.zeros(self.num_envs, device=env.device)
            return observations, *map(self._give, (none, none.bool(), none.bool())), infos
        transition = env.step(to_actions(actions, env.device))
        self._pictures.go_on(env)
        observed = transition.observations
        infos = self._infos(observed, transition.reward)
        self._over = env.outcome is not None
        if self._over and self._autoreset is AutoresetMode.SAME_STEP:
            ended = {"final_obs": self._give(observed.observation), "final_info": infos}
            observed = self._begin(None, None)
            # the new episodes', but for what this step paid: who sums that up must miss nothing
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
        return self._pictures.draw(self._held.env)

    def close_extras(self, **kwargs: Any) -> None:
        # Gymnasium also closes, when it is collected, what failed to be made
        if hasattr(self, "_held"):
            self._held.close()

    def _begin(self, seed: int | None, indices: Any) -> Observations:
        observed = self._held.env.reset(seed, indices=indices)
        self._over = False
        self._pictures.begin(observed)
        return observed

    def _infos(self, observed: Observations, reward: Tensor) -> dict[str, Any]:
        shown = facts(self._held.env, observed.alive, reward)
        return self._with_masks({name: self._give(value) for name, value in shown.items()})

    def _with_masks(self, infos: dict[str, Any]) -> dict[str, Any]:
        """Gymnasium marks beside each info which environments have it: here all."""
        everywhere = np.ones(self.num_envs, np.bool_)
        return infos | {f"_{name}": everywhere.copy() for name in infos}


def _all_tokens(env: BatchedTokenPrune) -> Box:
    (size,) = env.observation_space.shape
    return Box(-np.inf, np.inf, (env.num_agents, size), np.float32)


def _as_it_is(values: Tensor) -> Tensor:
    return values
