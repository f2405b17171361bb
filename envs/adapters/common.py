"""What all adapters do: open the game, hand its tensors out, and let go of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import ImageSet
from prunevit.envs.data.digits import Split
from prunevit.envs.game import GameError
from prunevit.envs.rewards import Reward
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.staged_vit import Execution


class GameArguments(TypedDict, total=False):
    """Which game is played: arguments of ``TokenPruneEnv``, with its defaults."""

    backbone: str | nn.Module
    dataset: str | ImageSet
    split: Split
    prune_before: Sequence[int] | None
    reward: str | Reward
    observation: Sequence[str]
    device: str | torch.device
    execution: Execution


class GameHandle:
    """The game behind an adapter, until the adapter is closed: then nothing holds the backbone.

    Args:
        num_envs: images at once.
        arguments: ``GameArguments``.
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
            GameError: it was closed.
        """
        if self._env is None:
            raise GameError("the environment is closed")
        return self._env

    def close(self) -> None:
        """Lets go of the backbone and of all tensors; once is enough."""
        if self._env is not None:
            self._env.close()
            self._env = None


def to_numpy(values: Tensor) -> NDArray[Any]:
    """An array that can be written on; on the CPU it shares the tensor's memory."""
    # the zeros after an episode's end are one number in memory
    return values.cpu().contiguous().numpy()
