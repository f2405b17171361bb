"""Rotary position embedding (RoPE) that follows the surviving tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


# not frozen: of a frozen one, the compiler of torch 2.6 looks at all fields, used or not
@dataclass(eq=False)
class RotaryEmbedding:
    """The sines and cosines by which blocks rotate the queries and keys of B images.

    Attributes:
        sin_cos: sines before cosines of each patch, [depth, heads, N, 2 * head_dim]. The depth is 1
            if all blocks rotate in the same way, and heads is 1 if all heads do.
        prefix: number of prefix tokens, which come before the patches and are not rotated.
        slot: position of each packed row in its image, 0..L-1, int64 [S]; None in masked execution.
        is_whole: whether no token was pruned.
        gathered: sines and cosines of each row, [S, heads, 2 * head_dim], gathered once for all
            blocks; None if blocks differ or no token was pruned.
    """

    sin_cos: Tensor
    prefix: int
    slot: Tensor | None = None
    is_whole: bool = True
    gathered: Tensor | None = None

    @staticmethod
    def from_timm(sin_cos: Tensor, prefix: int) -> RotaryEmbedding:
        """Wraps timm's embedding, [N, 2 * head_dim] or [depth, heads, N, 2 * head_dim]."""
        return RotaryEmbedding(sin_cos if sin_cos.dim() == 4 else sin_cos[None, None], prefix)

    def of_images(self, images: int, is_packed: bool) -> RotaryEmbedding:
        """The embedding of ``images`` images without pruned tokens."""
        slot = None
        if is_packed:
            length = self.prefix + self.sin_cos.shape[2]
            slot = torch.arange(length, device=self.sin_cos.device).repeat(images)
        return RotaryEmbedding(self.sin_cos, self.prefix, slot)

    def of_block(self, block: int) -> RotaryEmbedding:
        """The embedding as one block uses it: with a depth of 1."""
        if len(self.sin_cos) == 1:
            return self
        return replace(self, sin_cos=self.sin_cos[block : block + 1])

    def take(self, slot: Tensor) -> RotaryEmbedding:
        """Selects the embedding of rows at positions ``slot``, int64 [S]."""
        same_in_all_blocks = len(self.sin_cos) == 1
        gathered = self.slots().index_select(0, slot) if same_in_all_blocks else None
        return replace(self, slot=slot, is_whole=False, gathered=gathered)

    def slice_rows(self, rows: slice) -> RotaryEmbedding:
        """Selects the embedding of a slice of packed rows; it must not cut through an image."""
        assert self.slot is not None
        gathered = None if self.gathered is None else self.gathered[rows]
        return replace(self, slot=self.slot[rows], gathered=gathered)

    # the rest is asked of ``of_block``

    def slots(self) -> Tensor:
        """Sines and cosines of every position of an image, [L, heads, 2 * head_dim]."""
        half = self.sin_cos.shape[-1] // 2
        # sine 0 and cosine 1 leave prefix tokens unchanged, to the last bit
        sines, cosines = (
            F.pad(part, (0, 0, self.prefix, 0), value=value)
            for part, value in zip(self.sin_cos[0].split(half, -1), (0.0, 1.0), strict=True)
        )
        return torch.cat([sines, cosines], dim=-1).transpose(0, 1)

    def rows(self) -> Tensor:
        """Sines and cosines of each of the packed rows, [S, heads, 2 * head_dim]."""
        assert self.slot is not None
        # a compiler gathers while it rotates, and would make graphs of their own for what is here
        if not torch.compiler.is_compiling() and self.gathered is not None:
            return self.gathered
        return self.slots().index_select(0, self.slot)

    def patches(self, images: int) -> Tensor:
        """Sines and cosines as timm's own blocks take them: of patches alone, heads first.

        Returns:
            [heads, N, 2 * head_dim], or [B, heads, n, 2 * head_dim] for ``images`` images that have
            kept n patches each.
        """
        if self.is_whole:
            return self.sin_cos[0]
        of_images = self.rows().unflatten(0, (images, -1))
        return of_images[:, self.prefix :].transpose(1, 2)
