"""Rotary position embedding (RoPE) that follows the surviving tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class RotaryEmbedding:
    """The sines and cosines by which blocks rotate the queries and keys of B images.

    Attributes:
        sin_cos: sines before cosines of each patch, [depth, heads, N, 2 * head_dim]. The depth is 1
            if all blocks rotate in the same way, and heads is 1 if all heads do.
        prefix: number of prefix tokens, which come before the patches and are not rotated.
        slot: position of each row in its image, 0..L-1, int64 [S]; None if no token was pruned.
        gathered: sines and cosines of each row, [S, heads, 2 * head_dim], gathered once for all
            blocks; None if blocks differ or no token was pruned.
    """

    sin_cos: Tensor
    prefix: int
    slot: Tensor | None = None
    gathered: Tensor | None = None

    @staticmethod
    def from_timm(sin_cos: Tensor, prefix: int) -> RotaryEmbedding:
        """Wraps timm's embedding, [N, 2 * head_dim] or [depth, heads, N, 2 * head_dim]."""
        return RotaryEmbedding(sin_cos if sin_cos.dim() == 4 else sin_cos[None, None], prefix)

    def take(self, slot: Tensor) -> RotaryEmbedding:
        """Selects the embedding of rows at positions ``slot``, int64 [S]."""
        same_in_all_blocks = len(self.sin_cos) == 1
        gathered = self.slots(0).index_select(0, slot) if same_in_all_blocks else None
        return replace(self, slot=slot, gathered=gathered)

    def slice_rows(self, rows: slice) -> RotaryEmbedding:
        """Selects the embedding of a slice of the rows; it must not cut through an image."""
        if self.slot is None:
            return self
        gathered = None if self.gathered is None else self.gathered[rows]
        return replace(self, slot=self.slot[rows], gathered=gathered)

    def slots(self, block: int) -> Tensor:
        """Sines and cosines of every position of an image, [L, heads, 2 * head_dim]."""
        patches = self._of_block(block)
        half = patches.shape[-1] // 2
        # sine 0 and cosine 1 leave prefix tokens unchanged, to the last bit
        sines, cosines = (
            F.pad(part, (0, 0, self.prefix, 0), value=value)
            for part, value in zip(patches.split(half, -1), (0.0, 1.0), strict=True)
        )
        return torch.cat([sines, cosines], dim=-1).transpose(0, 1)

    def rows(self, block: int, count: int) -> Tensor:
        """Sines and cosines of each of the ``count`` packed rows, [S, heads, 2 * head_dim]."""
        if self.gathered is not None:
            return self.gathered
        slots = self.slots(block)
        if self.slot is not None:
            return slots.index_select(0, self.slot)
        return slots.repeat(count // len(slots), 1, 1)

    def patches(self, block: int, images: int) -> Tensor:
        """Sines and cosines as timm's own blocks take them: of patches alone, heads first.

        Returns:
            [heads, N, 2 * head_dim], or [B, heads, n, 2 * head_dim] for ``images`` images that have
            kept n patches each.
        """
        if self.slot is None:
            return self._of_block(block)
        of_images = self.rows(block, len(self.slot)).unflatten(0, (images, -1))
        return of_images[:, self.prefix :].transpose(1, 2)

    def _of_block(self, block: int) -> Tensor:
        """[heads, N, 2 * head_dim]."""
        return self.sin_cos[block if len(self.sin_cos) > 1 else 0]
