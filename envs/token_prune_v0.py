"""PettingZoo's module of the game: ``token_prune_v0.env()``, ``.parallel_env()``, ``.raw_env()``.

All three take the arguments of ``TokenPruneEnv``.
"""

from __future__ import annotations

from typing import Any

from pettingzoo import AECEnv
from pettingzoo.utils.conversions import parallel_to_aec
from pettingzoo.utils.wrappers import OrderEnforcingWrapper

from prunevit.envs.token_prune import TokenPruneEnv

__all__ = ["env", "parallel_env", "raw_env"]

parallel_env = TokenPruneEnv


def raw_env(**game: Any) -> AECEnv:
    """The agents of one image in turn.

    Raises:
        ValueError: ``num_envs`` is given: AEC has no batches.
    """
    if game.get("num_envs") is not None:
        raise ValueError("agents in turn play one image: num_envs is for parallel_env")
    return parallel_to_aec(TokenPruneEnv(**game))


def env(**game: Any) -> AECEnv:
    """``raw_env``, with PettingZoo's errors for calls out of turn."""
    return OrderEnforcingWrapper(raw_env(**game))
