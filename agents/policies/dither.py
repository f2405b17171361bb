"""Dither: thresholds that vary from patch to patch in an even pattern, in place of sampling."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunevit.envs.observations import View

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # their square roots are irrational


def with_dither(view: View, margin: Tensor) -> Tensor:
    """``margin`` as dither changes it: a threshold of 0 on it then keeps a patch where the
    probability of keep, ``sigmoid(margin)``, exceeds the patch's own level. Of similar patches in a
    region, a share stays that equals their probability.

    Args:
        view: the patches.
        margin: logit of keep minus that of prune, float [B, N].
    """
    height, width = view.backbone.grid_size
    return margin - dither_levels(height, width, view.stage, margin.device).logit()


def dither_levels(height: int, width: int, stage: int, device: torch.device) -> Tensor:
    """Computes thresholds in (0, 1) for the patches of a grid, low and high ones in every region.

    They are the ranks of a Kronecker sequence over rows and columns (Roberts 2018, "The
    unreasonable effectiveness of quasirandom sequences"). Each stage has its own irrational steps,
    so that a patch's thresholds at different stages are unrelated.

    Returns:
        float32 [height * width], row by row.
    """
    levels = torch.tensor(_dither_levels(height, width, stage))
    return levels.to(device, non_blocking=True)


# numbers, not a tensor: one that was made while a tracer or an exporter ran would stay theirs
@cache
def _dither_levels(height: int, width: int, stage: int) -> NDArray[np.float32]:
    """``dither_levels`` in NumPy."""
    down, right = (math.sqrt(PRIMES[(2 * stage + i) % len(PRIMES)]) for i in range(2))
    rows, columns = np.indices((height, width), dtype=np.float64)
    phase = np.mod(rows * down + columns * right, 1).ravel()
    return ((phase.argsort().argsort() + np.float32(0.5)) / np.float32(len(phase))).astype(
        np.float32
    )
