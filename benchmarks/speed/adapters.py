"""The adapters of ``envs.adapters``, ready to be timed by ``benchmarks.speed.env_speed``."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from prunevit.benchmarks.speed.timed_trainer import alive_after
from prunevit.envs.adapters.common import GameArguments
from prunevit.envs.adapters.epymarl import TokenPruneAgents
from prunevit.envs.adapters.gymnasium import TokenPruneVector
from prunevit.envs.adapters.sb3 import TokenVecEnv
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.game import TokenGame
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.staged_vit import StagedViT

Play = Callable[[], object]  # an episode of all images
BARE = "TokenGame"


def bare_game(game: TokenGame, images: ImageSet, keeps: Tensor) -> Play:
    """Loading the images and stepping the game, without observations.

    Args:
        game: a game.
        images: of which the first are played.
        keeps: joint actions int64 [T, B, N].
    """

    def play() -> None:
        game.reset(*images.load(range(keeps.shape[1])))
        for keep in keeps:
            game.step(keep == 1)

    return play


def gymnasium_vector(keeps: Tensor, tensors: bool, game: GameArguments) -> Play:
    """``TokenPruneVector``, whose last step starts the next episode."""
    env = TokenPruneVector(keeps.shape[1], tensors=tensors, **game)
    actions = list(keeps) if tensors else list(keeps.cpu().numpy().astype(np.int8))
    env.reset(seed=0)
    return lambda: [env.step(action) for action in actions]


def sb3_vec_env(keeps: Tensor, game: GameArguments) -> Play:
    """``TokenVecEnv``, whose last step starts the next episode."""
    env = TokenVecEnv(keeps.shape[1], **game)
    actions = list(keeps.flatten(1).cpu().numpy())
    env.reset()
    return lambda: [env.step(action) for action in actions]


def epymarl_env(keeps: Tensor, game: GameArguments) -> Play:
    """``TokenPruneAgents``, which takes one image."""
    return _episode(TokenPruneAgents(**game), keeps[:, 0].tolist())


def rllib_vector(keeps: Tensor, game: GameArguments) -> Play:
    """``TokenPruneMultiVector``, which takes a dictionary of living agents for each image."""
    from prunevit.envs.adapters.rllib import TokenPruneMultiVector

    env = TokenPruneMultiVector(keeps.shape[1], game)
    names = env.envs[0].agents
    actions = [
        [
            {name: action for name, action, living in zip(names, *of_image, strict=True) if living}
            for of_image in zip(keep.tolist(), alive.tolist(), strict=True)
        ]
        for keep, alive in zip(keeps, alive_after(list(keeps == 1))[:-1], strict=True)
    ]
    return _episode(env, actions)


def _episode(env: Any, actions: Sequence[Any]) -> Play:
    def play() -> None:
        env.reset()
        for action in actions:
            env.step(action)

    return play


def torchrl_native(keeps: Tensor, game: GameArguments) -> Play:
    """``TokenPruneTorchRL``."""
    from prunevit.envs.adapters.torchrl import TokenPruneTorchRL

    return _torchrl(TokenPruneTorchRL(keeps.shape[1], **game), keeps)


def torchrl_wrapper(keeps: Tensor, game: GameArguments) -> Play:
    """TorchRL's own ``PettingZooWrapper`` around ``TokenPruneEnv``, one image at a time."""
    from torchrl.envs.libs.pettingzoo import PettingZooWrapper

    with warnings.catch_warnings():
        # it names the only version of PettingZoo that it was tested with
        warnings.simplefilter("ignore", UserWarning)
        env = PettingZooWrapper(TokenPruneEnv(**game))
    return _torchrl(env, keeps[:, 0])


def _torchrl(env: Any, keeps: Tensor) -> Play:
    def play() -> None:
        seen = env.reset()
        for keep in keeps:
            seen = env.step(seen.set(("token", "action"), keep))["next"]

    return play


def adapters(
    model: nn.Module, images: ImageSet, keeps: Tensor, game: GameArguments
) -> dict[str, Play]:
    """Functions that play an episode of B images, by adapter. RLlib and TorchRL are left out where
    they aren't installed, EPyMARL and TorchRL's wrapper, which take one image, where B is not 1.

    Args:
        model: the backbone.
        images: what is played.
        keeps: joint actions int64 [T, B, N].
        game: further arguments of every environment.
    """
    arguments: GameArguments = {**game, "backbone": model, "dataset": images}
    staged = StagedViT(model, game.get("prune_before"))
    players = {
        BARE: bare_game(TokenGame(staged), images, keeps),
        "gymnasium vector, arrays": gymnasium_vector(keeps, False, arguments),
        "gymnasium vector, tensors": gymnasium_vector(keeps, True, arguments),
        "sb3": sb3_vec_env(keeps, arguments),
    }
    if keeps.shape[1] == 1:
        players["epymarl"] = epymarl_env(keeps, arguments)
    if importlib.util.find_spec("ray") is not None:
        players["rllib"] = rllib_vector(keeps, arguments)
    if importlib.util.find_spec("torchrl") is not None:
        players["torchrl"] = torchrl_native(keeps, arguments)
        if keeps.shape[1] == 1:
            players["torchrl, PettingZooWrapper"] = torchrl_wrapper(keeps, arguments)
    return players


def decisions_of(keeps: Tensor) -> int:
    """How often a living agent decides.

    Args:
        keeps: joint actions int64 [T, B, N].
    """
    return sum(int(alive.sum()) for alive in alive_after(list(keeps == 1))[:-1])
