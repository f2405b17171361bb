"""What adapters share: they open a game, pass its tensors on, and close it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.digits import Split
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.game import GameError
from prunevit.envs.rewards import Reward
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.staged_vit import Execution, OnPrune, PruneAt


class GameArguments(TypedDict, total=False):
    """Arguments of ``TokenPruneEnv``, with its defaults, that adapters take too."""

    backbone: str | nn.Module
    dataset: str | ImageSet
    split: Split
    prune_before: Sequence[int] | None
    reward: str | Reward
    observation: Sequence[str]
    device: str | torch.device
    execution: Execution
    prune_at: PruneAt
    on_prune: OnPrune


class GameHandle:
    """Holds the game of an adapter until the adapter is closed, so that its memory is freed then.

    Args:
        num_envs: number of images played at once.
        arguments: ``GameArguments``.

    Raises:
        TypeError: an argument is unknown.
    """

    def __init__(self, num_envs: int, arguments: Mapping[str, Any]) -> None:
        unknown = sorted(set(arguments) - set(GameArguments.__annotations__))
        if unknown:
            raise TypeError(
                f"unknown arguments {', '.join(unknown)}: a game takes "
                f"{', '.join(GameArguments.__annotations__)}"
            )
        self._env: BatchedTokenPrune | None = TokenPruneEnv(num_envs=num_envs, **arguments).batched

    @property
    def env(self) -> BatchedTokenPrune:
        """The game.

        Raises:
            GameError: the adapter was closed.
        """
        if self._env is None:
            raise GameError("the environment is closed")
        return self._env

    def close(self) -> None:
        """Frees the backbone and all tensors. A second call does nothing."""
        if self._env is not None:
            self._env.close()
            self._env = None


def to_numpy(values: Tensor) -> NDArray[Any]:
    """Converts to a writable array, which on the CPU shares the tensor's memory."""
    # the zeros after the end of an episode share one number in memory
    return values.cpu().contiguous().numpy()
