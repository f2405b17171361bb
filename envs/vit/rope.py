"""RotaryEmbedding positions that follow the surviving tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class RotaryEmbedding:
    """Sines and cosines by which blocks rotate the queries and keys of B images' tokens.

    Attributes:
        sin_cos: of each patch of an image, sines before cosines, [depth, heads, N, 2 * head_dim];
            depth is 1 where all blocks rotate alike, heads likewise.
        prefix: slots before the patches, whose tokens are not rotated.
        slot: place in its image, 0..L-1, of each row, int64 [S]; None where every image has all its
            slots.
        gathered: sines and cosines of each row, [S, heads, 2 * head_dim], gathered once for all
            blocks; None where blocks differ or every image has all its slots.
    """

    sin_cos: Tensor
    prefix: int
    slot: Tensor | None = None
    gathered: Tensor | None = None

    @staticmethod
    def of(sin_cos: Tensor, prefix: int) -> RotaryEmbedding:
        """From what timm's modules give: [N, 2 * head_dim], or [depth, heads, N, 2 * head_dim]."""
        return RotaryEmbedding(sin_cos if sin_cos.dim() == 4 else sin_cos[None, None], prefix)

    def take(self, slot: Tensor) -> RotaryEmbedding:
        """Of rows that stand in ``slot``, int64 [S]."""
        alike = len(self.sin_cos) == 1
        return replace(
            self, slot=slot, gathered=self.slots(0).index_select(0, slot) if alike else None
        )

    def slice_rows(self, rows: slice) -> RotaryEmbedding:
        """Of some of the rows, images whole."""
        if self.slot is None:
            return self
        gathered = None if self.gathered is None else self.gathered[rows]
        return replace(self, slot=self.slot[rows], gathered=gathered)

    def slots(self, block: int) -> Tensor:
        """Of each slot of an image, [L, heads, 2 * head_dim]."""
        patches = self._of_block(block)
        half = patches.shape[-1] // 2
        # sine 0 and cosine 1: prefix tokens come out as they went in, to the last bit
        sines, cosines = (
            F.pad(part, (0, 0, self.prefix, 0), value=value)
            for part, value in zip(patches.split(half, -1), (0.0, 1.0), strict=True)
        )
        return torch.cat([sines, cosines], dim=-1).transpose(0, 1)

    def rows(self, block: int, count: int) -> Tensor:
        """Of each of the ``count`` packed rows, [S, heads, 2 * head_dim]."""
        if self.gathered is not None:
            return self.gathered
        slots = self.slots(block)
        if self.slot is not None:
            return slots.index_select(0, self.slot)
        return slots.repeat(count // len(slots), 1, 1)

    def patches(self, block: int, images: int) -> Tensor:
        """For timm's own blocks, which rotate patches alone and have heads first: [heads, N, 2 *
        head_dim], or [B, heads, n, 2 * head_dim] for images that have kept n patches each.
        """
        if self.slot is None:
            return self._of_block(block)
        of_images = self.rows(block, len(self.slot)).unflatten(0, (images, -1))
        return of_images[:, self.prefix :].transpose(1, 2)

    def _of_block(self, block: int) -> Tensor:
        """[heads, N, 2 * head_dim]."""
        return self.sin_cos[block if len(self.sin_cos) > 1 else 0]
