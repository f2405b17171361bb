"""Images of random pixels: for benchmarks whose times don't depend on what an image shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NoiseImages:
    """An ``ImageSet`` of noise, held in memory.

    Args:
        shape: (C, H, W).
        size: number of images.
        num_classes: of the backbone; all images are of the first.
    """

    def __init__(self, shape: tuple[int, ...], size: int = 256, num_classes: int = 10) -> None:
        self.num_classes = num_classes
        self.class_names = tuple(map(str, range(num_classes)))
        self._pixels = torch.randn(size, *shape, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._pixels)

    def load(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self._pixels[chosen], torch.zeros_like(chosen)
