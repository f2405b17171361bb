"""Running normalisation of value targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunevit.trainers.common.distributed import ALONE, Ranks


class ValueNorm(nn.Module):
    """Mean and spread of the returns, averaged exponentially and debiased (MAPPO, arXiv 2103.01955,
    app. D.1).

    The statistics are buffers, so that they travel in a checkpoint.

    Args:
        decay: of the running averages, a call of ``update``; MAPPO's authors call it once a
            minibatch.
        floor: smallest variance.
    """

    mean: Tensor
    square: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.99999, floor: float = 1e-2) -> None:
        super().__init__()
        self.decay = decay
        self.floor = floor
        for name in ("mean", "square", "weight"):
            self.register_buffer(name, torch.zeros(()))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Debiased mean and standard deviation; 0 and 1 before the first update."""
        if not self.weight:
            return torch.zeros_like(self.mean), torch.ones_like(self.mean)
        mean = self.mean / self.weight
        variance = (self.square / self.weight - mean**2).clamp(min=self.floor)
        return mean, variance.sqrt()

    @torch.no_grad()
    def update(self, returns: Tensor, ranks: Ranks = ALONE) -> None:
        """Takes returns [R] of all ranks into the statistics; no returns change nothing."""
        if not ranks.total(returns.numel()):
            return
        rest = 1 - self.decay
        self.mean.mul_(self.decay).add_(rest * ranks.mean(returns))
        self.square.mul_(self.decay).add_(rest * ranks.mean(returns**2))
        self.weight.mul_(self.decay).add_(rest)

    def normalise(self, returns: Tensor) -> Tensor:
        mean, spread = self.statistics()
        return (returns - mean) / spread

    def denormalise(self, values: Tensor) -> Tensor:
        mean, spread = self.statistics()
        return values * spread + mean
