"""timm's blocks on packed rows, whatever the family of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokenprune.envs.ragged import Layout, attention, first_row_attention
from tokenprune.envs.rotary import Rotary

Query = Callable[[Tensor, Layout], Tensor]


@dataclass(frozen=True)
class Form:
    """How a class of block leads its tokens around attention; x is [..., D].

    Attributes:
        enter: block, x -> what its attention reads.
        leave: block, x, what its attention gives -> what the block gives.
    """

    enter: Callable[[Any, Tensor], Tensor]
    leave: Callable[[Any, Tensor, Tensor], Tensor]


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
    query: Query,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """A block on packed rows; the same arithmetic as timm's in the same order.

    Args:
        family: of the model.
        block: timm's.
        index: the block's place in the model.
        x: rows [S, D].
        layout: whose rows they are.
        rotary: their positions, where the model rotates.
        query: queries of all rows [S, heads, head_dim] -> the query of each image whose attention
            is observed [B, heads, head_dim].
        wanted: whether it is observed.

    Returns:
        rows [S, D], and what each was paid, [S], where wanted.
    """
    if layout.equal is not None and not wanted:
        images = x.unflatten(0, (-1, layout.equal))
        turn = rotary.patches(index, len(images)) if rotary else None
        return family.whole(block, images, None, turn).flatten(0, 1), None
    attn, form = block.attn, family.blocks[type(block)]
    source = form.enter(block, x)
    q, k, v = family.project(block, source, rotary.rows(index, len(x)) if rotary else None)
    mixed = attn.norm(attention(q, k, v, layout))
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(source).sigmoid()
    paid = first_row_attention(query(q, layout), k, layout) if wanted else None
    return form.leave(block, x, attn.proj(mixed)), paid


# What plain and rotary models share


def _post_norm_leave(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    x = x + block.norm1(mixed)
    return x + block.norm2(block.mlp(x))


def pre_norm_enter(block: Any, x: Tensor) -> Tensor:
    """Of blocks that normalise what attention reads."""
    return block.norm1(x)


POST_NORM = Form(enter=lambda block, x: x, leave=_post_norm_leave)
