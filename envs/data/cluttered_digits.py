"""``ClutteredDigits``: scanned digits in clutter as an ``ImageSet``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from prunevit.envs.data import digits
from prunevit.envs.data.digits import Split

DEFAULT_SIZES: dict[Split, int] = {"train": 20_000, "validation": 2_000, "test": 5_000}
MAX_ROTATION = math.radians(10)
MAX_SHEAR = 0.15


class ClutteredDigits:
    """``digits.draw_digits`` as an ``ImageSet``; the first ``load`` draws the images.

    Args:
        split: "train", "validation" or "test".
        size: number of images; ``DEFAULT_SIZES`` if None.
        seed: different seeds draw different images from the same scans.
        augment: rotate and shear images a little, differently on every load.
    """

    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(
        self, split: Split, size: int | None = None, seed: int = 0, augment: bool = False
    ) -> None:
        self._split: Split = split
        self._size = DEFAULT_SIZES[split] if size is None else size
        self._seed = seed
        self._drawn: tuple[Tensor, Tensor] | None = None
        self._augmentation = torch.Generator().manual_seed(seed) if augment else None

    def __len__(self) -> int:
        return self._size

    @property
    def sources(self) -> Tensor:
        return digits.drawn_scans(self._split, self._size, self._seed)

    def reseed(self, seed: int) -> None:
        if self._augmentation is not None:
            self._augmentation.manual_seed(seed)

    def load(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        if self._drawn is None:
            self._drawn = digits.draw_digits(self._split, self._size, self._seed)
        images, labels = self._drawn
        index = torch.as_tensor(indices, dtype=torch.long)
        chosen = digits.normalise(images[index])
        if self._augmentation is not None:
            chosen = _rotate_and_shear(chosen, self._augmentation)
        return chosen, labels[index]


def _rotate_and_shear(images: Tensor, generator: torch.Generator) -> Tensor:
    angle, shear = (
        (torch.rand(len(images), generator=generator) * 2 - 1) * most
        for most in (MAX_ROTATION, MAX_SHEAR)
    )
    zero = torch.zeros_like(angle)
    rows = torch.stack(
        [
            torch.stack([angle.cos(), angle.sin() + shear, zero], dim=1),
            torch.stack([-angle.sin(), angle.cos(), zero], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
