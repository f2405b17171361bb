"""Pictures of an episode: the image at every stage, with pruned patches faded to white."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

GAP = 2  # white pixels between pictures
FADE = 0.85  # share of white in a pruned patch


def stage_strip(pixels: Tensor, alive: Tensor, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """Draws an image K times side by side, with the pruned patches of each stage faded.

    Args:
        pixels: values 0..1, [C, H, W] with 1 or 3 channels.
        alive: which patches are alive in each picture, bool [K, N].
        grid: rows and columns of patches.

    Returns:
        uint8 [H, K * W + (K - 1) * GAP, 3].
    """
    channels, height, width = pixels.shape
    colour = pixels.expand(3, -1, -1) if channels == 1 else pixels[:3]
    pictures = []
    for patches in alive:
        mask = patches.float().view(1, 1, *grid)
        shown = F.interpolate(mask, size=(height, width), mode="nearest")[0]
        pictures.append(colour * (1 - FADE * (1 - shown)) + FADE * (1 - shown))
        pictures.append(torch.ones(3, height, GAP))
    strip = torch.cat(pictures[:-1], dim=2).clamp(0, 1)
    return (strip.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def strip_of_episode(
    pixels: Tensor, alive: Sequence[Tensor], grid: tuple[int, int], pictures: int
) -> NDArray[np.uint8]:
    """Draws an unfinished episode with ``stage_strip``, padded with white to its final width.

    Args:
        pixels: values 0..1, [C, H, W] with 1 or 3 channels.
        alive: bool [N] for each picture so far.
        grid: rows and columns of patches.
        pictures: number of pictures of a whole episode.

    Returns:
        uint8 [H, pictures * W + (pictures - 1) * GAP, 3].
    """
    strip = stage_strip(pixels, torch.stack(list(alive)), grid)
    width = pictures * pixels.shape[2] + (pictures - 1) * GAP
    filled = np.full((strip.shape[0], width, 3), 255, np.uint8)
    filled[:, : strip.shape[1]] = strip
    return filled


def denormalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Reverts the normalisation of pixels [..., C, H, W] to values 0..1."""
    shape = (-1, 1, 1)
    shifted = pixels * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return shifted.clamp(0, 1)
