"""``Tokens``: the tokens of B images between two sublayers, and how pruned ones are removed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunevit.envs.vit.layout import Layout, to_device
from prunevit.envs.vit.timm_models.rope import RotaryEmbedding


@dataclass(frozen=True)
class Segment:
    """Consecutive sublayers that have run on the same tokens; their cost is counted on demand.

    Sublayer 2 b is the attention of block b, sublayer 2 b + 1 its MLP.

    Attributes:
        alive: which tokens they ran on, bool [B, L].
        start: the first of the sublayers.
        stop: the sublayer after the last one.
        with_attention: whether the last attention also returned what the class token paid.
    """

    alive: Tensor
    start: int
    stop: int
    with_attention: bool


@dataclass(frozen=True)
class Tokens:
    """The tokens of B images on their way through the blocks.

    Each image has L slots: its prefix tokens, then its N patches.

    Attributes:
        x: embeddings, one row per token, [S, D]. Packed execution stores the surviving tokens,
            image after image; masked execution stores all B * L slots.
        alive: which tokens still exist, bool [B, L].
        row: the row of ``x`` that holds the token of each slot, int64 [B * L]; undefined for slots
            whose token is gone.
        layout: layout of the packed rows; None in masked execution.
        attention: attention that each row received from the class token when it last attended,
            averaged over heads, [S]. None before the first block, or if it was not asked for. A
            model without a class token uses the mean query of its prefix tokens, or of all its
            tokens.
        segments: the sublayers that have run so far.
        rotary: rotary embedding of the rows; None if the model has none.
        size: number of first tokens that each row stands for, float [S]; None as long as no tokens
            have merged.
    """

    x: Tensor
    alive: Tensor
    row: Tensor
    layout: Layout | None = None
    attention: Tensor | None = None
    segments: tuple[Segment, ...] = ()
    rotary: RotaryEmbedding | None = None
    size: Tensor | None = None

    @staticmethod
    def of_slots(x: Tensor, alive: Tensor) -> Tokens:
        """Tokens of images that have a row for each slot.

        Args:
            x: [B, L, D].
            alive: bool [B, L].
        """
        return Tokens(x.flatten(0, 1), alive, torch.arange(alive.numel(), device=x.device))

    def repeat(self, times: int) -> Tokens:
        """Repeats each image ``times`` times, copies next to each other.

        Copies of packed images share their rows of ``x``. They must be pruned next, since blocks
        can't run on shared rows.
        """
        slots = self.alive.shape[1]
        row = self.row.unflatten(0, (-1, slots)).repeat_interleave(times, dim=0).flatten()
        shared = self.layout is not None
        return replace(
            self,
            x=self.x if shared else self.x[row],
            alive=self.alive.repeat_interleave(times, dim=0),
            row=row if shared else torch.arange(len(row), device=row.device),
            attention=self.attention if shared or self.attention is None else self.attention[row],
            size=self.size if shared or self.size is None else self.size[row],
            segments=tuple(
                replace(segment, alive=segment.alive.repeat_interleave(times, dim=0))
                for segment in self.segments
            ),
        )


def remove_tokens(tokens: Tokens, alive: Tensor) -> Tokens:
    """Leaves only the tokens that are ``alive``, bool [B, L].

    Packed rows are gathered, which needs their number on the host: the one host sync of a
    stage. Masked execution keeps all rows.
    """
    if tokens.layout is None:
        return replace(tokens, alive=alive, attention=None)
    if len(alive) == 1:  # the fewest operations: here each of them counts
        slot = alive.view(-1).nonzero().squeeze(1)
        lengths = np.array([len(slot)])
    else:
        lengths = alive.sum(1).cpu().numpy()
    images, before, width = len(lengths), tokens.layout.lengths, tokens.layout.width
    if images == len(before) and lengths.sum() == before.sum():
        return replace(tokens, attention=None)  # nothing was pruned
    if (lengths == lengths[:1]).all():
        # images of one length stay in the order of the batch, their tokens in that of the slots
        layout = Layout.uniform(images, int(lengths[0]), width, alive.device)
        if images > 1:
            slot = nonzero(alive.view(1, -1), int(lengths.sum()))[1]
        row = alive.view(-1).cumsum(0) - 1
    else:
        slot, lengths = slots_by_length(alive, lengths)
        layout = Layout.of(lengths, width, alive.device)
        row = torch.zeros_like(tokens.row)
        row[slot] = torch.arange(len(slot), device=slot.device)
    source = tokens.row.index_select(0, slot)
    return Tokens(
        x=tokens.x.index_select(0, source),
        alive=alive,
        row=row,
        layout=layout,
        segments=tokens.segments,
        rotary=tokens.rotary.take(slot % alive.shape[1]) if tokens.rotary else None,
        size=None if tokens.size is None else tokens.size.index_select(0, source),
    )


def slots_by_length(alive: Tensor, lengths: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
    """Slots of the survivors, images with fewer of them first, and the lengths in that order.

    Args:
        alive: bool [B, L].
        lengths: number of survivors of each image, int64 [B].
    """
    order = np.argsort(lengths, kind="stable")
    place = to_device(order, alive.device)
    image, position = nonzero(alive[place], int(lengths.sum()))
    return place[image] * alive.shape[1] + position, lengths[order]


def nonzero(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Row and column of each of the ``count`` True entries of ``mask`` [R, C].

    Since the count is known, a GPU need not be waited for.
    """
    on_host = mask.device.type == "cpu"
    index = mask.nonzero() if on_host else torch.nonzero_static(mask, size=count)
    return index[:, 0], index[:, 1]
