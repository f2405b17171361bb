"""Labelled images behind one small interface: the embedded digits, image folders, and timm's dataset names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenprune.envs import digits
from tokenprune.envs.digits import Split

DIGITS = "digits"
FOLDER_PREFIX = "folder:"
VALIDATION_SHARE = 0.1  # of the training images, where a dataset has no validation split
DEFAULT_SIZES: dict[Split, int] = {"train": 20_000, "validation": 2_000, "test": 5_000}
MAX_ROTATION = math.radians(10)
MAX_SHEAR = 0.15


class DatasetError(ValueError):
    """A dataset that is unknown, empty or damaged; the message names what is wrong and what would be right."""


class ImageSet(Protocol):
    """A fixed, indexed set of labelled images."""

    num_classes: int

    def __len__(self) -> int: ...

    def load(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 [n, C, H, W], normalised for the backbone, and labels int64 [n], on the CPU."""
        ...


class DigitsInClutter:
    """``digits.draw_digits`` as an ``ImageSet``; images are drawn when first asked for.

    Args:
        split: "train", "validation" or "test".
        size: number of images; ``DEFAULT_SIZES`` where None.
        seed: another seed is another draw of images from the same scans.
        augment: rotate and shear each image a little, anew each time it is loaded.
    """

    num_classes = 10

    def __init__(
        self, split: Split, size: int | None = None, seed: int = 0, augment: bool = False
    ) -> None:
        self._images, self._labels = digits.draw_digits(
            split, DEFAULT_SIZES[split] if size is None else size, seed
        )
        self._augmentation = torch.Generator().manual_seed(seed) if augment else None

    def __len__(self) -> int:
        return len(self._labels)

    def load(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices, dtype=torch.long)
        images = digits.normalise(self._images[index])
        if self._augmentation is not None:
            images = _rotate_and_shear(images, self._augmentation)
        return images, self._labels[index]


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


def open_images(
    dataset: str,
    split: Split,
    data_config: Mapping[str, Any],
    size: int | None = None,
    seed: int = 0,
    augment: bool = False,
) -> ImageSet:
    """Opens a dataset by name."""
    return DigitsInClutter(split, size, seed, augment)
