"""The adapters of ``envs.adapters``, ready to be timed by ``benchmarks.speed.env_speed``."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from prunevit.benchmarks.speed.timed_trainer import alive_before
from prunevit.envs.adapters.common import GameArguments
from prunevit.envs.adapters.epymarl import TokenPruneAgents
from prunevit.envs.adapters.gymnasium import TokenPruneVector
from prunevit.envs.adapters.sb3 import TokenVecEnv
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.game import TokenGame
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.staged_vit import StagedViT

Play = Callable[[], object]
BARE = "TokenGame"


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
    batch = keeps.shape[1]
    bare = TokenGame(StagedViT(model, game.get("prune_before")))

    def play_bare() -> None:
        bare.reset(*images.load(range(batch)))
        for keep in keeps:
            bare.step(keep == 1)

    vector = TokenPruneVector(batch, tensors=True, **arguments)
    vec_env = TokenVecEnv(batch, **arguments)
    players = {
        BARE: play_bare,
        "gymnasium vector, tensors": _steps(vector, keeps),
        "sb3": _steps(vec_env, keeps.flatten(1).cpu().numpy()),
    }
    if batch == 1:
        players["epymarl"] = _episode(TokenPruneAgents(**arguments), keeps[:, 0].tolist())
    if importlib.util.find_spec("ray") is not None:
        players["rllib"] = _rllib(keeps, arguments)
    if importlib.util.find_spec("torchrl") is not None:
        from prunevit.envs.adapters.torchrl import TokenPruneTorchRL

        players["torchrl"] = _torchrl(TokenPruneTorchRL(batch, **arguments), keeps)
        if batch == 1:
            players["torchrl, PettingZooWrapper"] = _torchrl_wrapper(keeps[:, 0], arguments)
    return players


def _steps(env: Any, actions: Any) -> Play:
    """Of an environment whose last step starts the next episode."""
    env.reset()
    return lambda: [env.step(action) for action in actions]


def _episode(env: Any, actions: Sequence[Any]) -> Play:
    def play() -> None:
        env.reset()
        for action in actions:
            env.step(action)

    return play


def _rllib(keeps: Tensor, game: GameArguments) -> Play:
    """RLlib's vector takes a dictionary of living agents for each image."""
    from prunevit.envs.adapters.rllib import TokenPruneMultiVector

    env = TokenPruneMultiVector(keeps.shape[1], game)
    names = env.envs[0].agents
    actions = [
        [
            {name: action for name, action, living in zip(names, *of_image, strict=True) if living}
            for of_image in zip(keep.tolist(), alive.tolist(), strict=True)
        ]
        for keep, alive in zip(keeps, alive_before(list(keeps == 1)), strict=True)
    ]
    return _episode(env, actions)


def _torchrl_wrapper(keeps: Tensor, game: GameArguments) -> Play:
    """TorchRL's own wrapper of PettingZoo around ``TokenPruneEnv``."""
    from torchrl.envs.libs.pettingzoo import PettingZooWrapper

    with warnings.catch_warnings():
        # it names the only version of PettingZoo that it was tested with
        warnings.simplefilter("ignore", UserWarning)
        return _torchrl(PettingZooWrapper(TokenPruneEnv(**game)), keeps)


def _torchrl(env: Any, keeps: Tensor) -> Play:
    def play() -> None:
        seen = env.reset()
        for keep in keeps:
            seen = env.step(seen.set(("token", "action"), keep))["next"]

    return play
