"""Rotary positions that follow the surviving tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Rotary:
    """Sines and cosines by which blocks rotate the queries and keys of B images' tokens.

    Attributes:
        table: of each slot of an image, sines before cosines, [depth, L, heads, 2 * head_dim];
            depth is 1 where all blocks rotate alike, heads likewise. Prefix tokens turn by nothing.
        prefix: slots before the patches.
        slot: place in its image, 0..L-1, of each row, int64 [S]; None where every image has all its
            slots.
        shared: ``table`` at each row, [S, heads, 2 * head_dim], taken once for all blocks; None
            where blocks differ or every image has all its slots.
    """

    table: Tensor
    prefix: int
    slot: Tensor | None = None
    shared: Tensor | None = None

    @staticmethod
    def of(patches: Tensor, prefix: int) -> Rotary:
        """From what timm's modules give: [N, 2 * head_dim], or [depth, heads, N, 2 * head_dim]."""
        if patches.dim() == 2:
            patches = patches[None, None]
        half = patches.shape[-1] // 2
        # sine 0 and cosine 1: prefix tokens come out as they went in, to the last bit
        sines, cosines = (
            F.pad(part, (0, 0, prefix, 0), value=value)
            for part, value in zip(patches.split(half, -1), (0.0, 1.0), strict=True)
        )
        table = torch.cat([sines, cosines], dim=-1).transpose(1, 2).contiguous()
        return Rotary(table, prefix)

    def take(self, slot: Tensor) -> Rotary:
        """Of rows that stand in ``slot``, int64 [S]."""
        alike = len(self.table) == 1
        return replace(
            self, slot=slot, shared=self.table[0].index_select(0, slot) if alike else None
        )

    def rows(self, block: int, count: int) -> Tensor:
        """For ``count`` packed rows: [S, heads, 2 * head_dim]."""
        if self.shared is not None:
            return self.shared
        table = self.slots(block)
        if self.slot is not None:
            return table.index_select(0, self.slot)
        return table.repeat(count // len(table), 1, 1)

    def slots(self, block: int) -> Tensor:
        """For images that have all their slots: [L, heads, 2 * head_dim]."""
        return self.table[block if len(self.table) > 1 else 0]

    def patches(self, block: int, images: int) -> Tensor:
        """For timm's own blocks, which rotate patches alone and have heads first: [heads, N, 2 *
        head_dim], or [B, heads, n, 2 * head_dim] for images that have kept n patches each.
        """
        if self.slot is None:
            return self.slots(block)[self.prefix :].transpose(0, 1)
        of_images = self.rows(block, len(self.slot)).unflatten(0, (images, -1))
        return of_images[:, self.prefix :].transpose(1, 2)
