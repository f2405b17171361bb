"""timm's blocks on packed rows, whatever the family of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunevit.envs.vit.onednn_linear import linear, mlp, runs_by_onednn
from prunevit.envs.vit.ragged import Layout, attention, first_row_attention
from prunevit.envs.vit.rope import Rotary


@dataclass(frozen=True)
class Form:
    """How a class of block leads its tokens around attention; x is [..., D].

    Attributes:
        enter: block, x -> what its attention reads.
        join: block, x, what its attention gives -> x with it.
        leave: block, x with it -> what the block gives.
    """

    enter: Callable[[Any, Tensor], Tensor]
    join: Callable[[Any, Tensor, Tensor], Tensor]
    leave: Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """How models of some of timm's classes run on a part of their tokens.

    Attributes:
        models: the classes; subclasses may have a forward pass of their own.
        blocks: of each class of block that is known, its form.
        attentions: of each class of attention that is known, its projection: the module, what it
            reads [..., D] and how it turns queries and keys, [..., heads, 2 * head_dim] or None ->
            queries, keys and values [..., heads, head_dim].
        embed: model, images [B, C, H, W] -> tokens before the first block [B, L, D], and their
            rotary positions, None where the model has none.
        whole: timm's own block on images of one length: block, x [B, L, D], mask of attention or
            None, and ``Rotary.patches`` or None -> [B, L, D].
    """

    models: tuple[type[nn.Module], ...]
    blocks: Mapping[type[nn.Module], Form]
    attentions: Mapping[
        type[nn.Module], Callable[[Any, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
    ]
    embed: Callable[[Any, Tensor], tuple[Tensor, Rotary | None]]
    whole: Callable[[Any, Tensor, Tensor | None, Tensor | None], Tensor]

    def project(
        self, block: Any, source: Tensor, turn: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What attention mixes: queries, keys and values [..., heads, head_dim]."""
        return self.attentions[type(block.attn)](block.attn, source, turn)


def packed_block(
    family: Family,
    block: Any,
    index: int,
    x: Tensor,
    layout: Layout,
    rotary: Rotary | None,
    observers: int | None,
) -> tuple[Tensor, Tensor | None]:
    """A block on packed rows; the same arithmetic as timm's in the same order.

    Args:
        family: of the model.
        block: timm's.
        index: the block's place in the model.
        x: rows [S, D].
        layout: whose rows they are.
        rotary: their positions, where the model rotates.
        observers: attention is observed that the mean query of so many first tokens of an image
            pays; of all its tokens where 0; none where None.

    Returns:
        rows [S, D], and what each was paid, [S], where observed.
    """
    plain = layout.equal is not None and observers is None
    if plain and not runs_by_onednn(block.attn.proj, x):
        images = x.unflatten(0, (-1, layout.equal))
        turn = rotary.patches(index, len(images)) if rotary else None
        return family.whole(block, images, None, turn).flatten(0, 1), None
    x, paid = _attended(family, block, index, x, layout, rotary, observers)
    return family.blocks[type(block)].leave(block, x), paid


def _attended(
    family: Family,
    block: Any,
    index: int,
    x: Tensor,
    layout: Layout,
    rotary: Rotary | None,
    observers: int | None,
) -> tuple[Tensor, Tensor | None]:
    """The first half of ``packed_block``: queries, keys and values are gone when it returns, before
    the second needs its memory.
    """
    attn, form = block.attn, family.blocks[type(block)]
    source = form.enter(block, x)
    q, k, v = family.project(block, source, rotary.rows(index, len(x)) if rotary else None)
    mixed = attn.norm(attention(q, k, v, layout))
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(source).sigmoid()
    paid = None
    if observers is not None:
        paid = first_row_attention(_packed_query(q, layout, observers), k, layout)
    return form.join(block, x, linear(attn.proj, mixed)), paid


def masked_block(
    family: Family,
    block: Any,
    index: int,
    x: Tensor,
    alive: Tensor,
    rotary: Rotary | None,
    observers: int | None,
) -> tuple[Tensor, Tensor | None]:
    """timm's own block over all slots, pruned ones masked out of the keys.

    Args:
        family: of the model.
        block: timm's.
        index: the block's place in the model.
        x: rows of all slots [B * L, D].
        alive: bool [B, L].
        rotary: their positions, where the model rotates.
        observers: as in ``packed_block``.

    Returns:
        rows [B * L, D], and what each was paid, [B * L], where observed.
    """
    images = x.unflatten(0, alive.shape)
    paid = None
    if observers is not None:
        slots = rotary.slots(index) if rotary else None
        paid = observed_row(family, block, images, alive, slots, observers).flatten()
    turn = rotary.patches(index, len(images)) if rotary else None
    return family.whole(block, images, alive[:, None, None, :], turn).flatten(0, 1), paid


def observed_row(
    family: Family, block: Any, images: Tensor, alive: Tensor, turn: Tensor | None, observers: int
) -> Tensor:
    """What is paid to each slot in a block that is about to run on all of them.

    Args:
        family: of the model.
        block: timm's.
        images: [B, L, D].
        alive: bool [B, L]; the others are paid nothing.
        turn: ``Rotary.slots``, where the model rotates.
        observers: as in ``packed_block``.

    Returns:
        [B, L], mean over heads.
    """
    source = family.blocks[type(block)].enter(block, images)
    q, k, _ = family.project(block, source, turn)
    query = _masked_query(q, alive, observers)
    scores = torch.einsum("bhd,blhd->bhl", query, k) * block.attn.scale
    scores = scores.masked_fill(~alive[:, None, :], -torch.inf)
    return scores.softmax(-1).mean(1)


def _packed_query(q: Tensor, layout: Layout, observers: int) -> Tensor:
    """The query of each image whose attention is observed: [S, heads, size] -> [B, heads, size]."""
    if not observers:
        return layout.mean(q)
    if layout.equal is not None:
        return q.unflatten(0, (-1, layout.equal))[:, :observers].mean(1)
    places = torch.arange(observers, device=q.device)
    return q[layout.first[:, None] + places].mean(1)


def _masked_query(q: Tensor, alive: Tensor, observers: int) -> Tensor:
    """Likewise: [B, L, heads, size] -> [B, heads, size]."""
    if observers:
        return q[:, :observers].mean(1)
    weight = alive.to(q.dtype)[..., None, None]
    return (q * weight).sum(1) / weight.sum(1)


# what plain and rotary models share


def _post_norm_enter(block: Any, x: Tensor) -> Tensor:
    return x


def _post_norm_join(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    return x + block.norm1(mixed)


def _post_norm_leave(block: Any, x: Tensor) -> Tensor:
    return x + block.norm2(mlp(block.mlp, x))


def pre_norm_enter(block: Any, x: Tensor) -> Tensor:
    """Of blocks that normalise what attention reads."""
    return block.norm1(x)


POST_NORM = Form(enter=_post_norm_enter, join=_post_norm_join, leave=_post_norm_leave)
