"""timm's blocks on packed rows, whatever the ops of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunevit.envs.vit.onednn_linear import linear, mlp, uses_onednn
from prunevit.envs.vit.ragged import Layout, attention_received, varlen_attention
from prunevit.envs.vit.rope import RotaryEmbedding


@dataclass(frozen=True)
class BlockOps:
    """How a class of block leads its tokens around attention; x is [..., D].

    Attributes:
        pre_attention: block, x -> what its attention reads.
        residual: block, x, what its attention gives -> x with it.
        mlp: block, x with it -> what the block gives.
    """

    pre_attention: Callable[[Any, Tensor], Tensor]
    residual: Callable[[Any, Tensor, Tensor], Tensor]
    mlp: Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class ModelOps:
    """How models of some of timm's classes run on a part of their tokens.

    Attributes:
        models: the classes; subclasses may have a forward pass of their own.
        blocks: of each class of block that is known, its form.
        attentions: of each class of attention that is known, its projection: the module, what it
            reads [..., D] and how it turns queries and keys, [..., heads, 2 * head_dim] or None ->
            queries, keys and values [..., heads, head_dim].
        embed: model, images [B, C, H, W] -> tokens before the first block [B, L, D], and their
            rotary positions, None where the model has none.
        dense_block: timm's own block on images of one length: block, x [B, L, D], attention mask
            or None, and ``RotaryEmbedding.patches`` or None -> [B, L, D].
    """

    models: tuple[type[nn.Module], ...]
    blocks: Mapping[type[nn.Module], BlockOps]
    attentions: Mapping[
        type[nn.Module], Callable[[Any, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
    ]
    embed: Callable[[Any, Tensor], tuple[Tensor, RotaryEmbedding | None]]
    dense_block: Callable[[Any, Tensor, Tensor | None, Tensor | None], Tensor]

    def project(
        self, block: Any, source: Tensor, rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What attention mixes: queries, keys and values [..., heads, head_dim]."""
        return self.attentions[type(block.attn)](block.attn, source, rope)


def packed_block(
    ops: ModelOps,
    block: Any,
    index: int,
    x: Tensor,
    layout: Layout,
    rotary: RotaryEmbedding | None,
    num_query_tokens: int | None,
) -> tuple[Tensor, Tensor | None]:
    """A block on packed rows; the same arithmetic as timm's in the same order.

    Args:
        ops: of the model.
        block: timm's.
        index: the block's place in the model.
        x: rows [S, D].
        layout: whose rows they are.
        rotary: their positions, where the model rotates.
        num_query_tokens: the mean query of this many first tokens of an image is the one whose
            attention is returned; 0 averages all of its tokens, None returns no attention.

    Returns:
        rows [S, D], and what each was attention, [S], where observed.
    """
    plain = layout.uniform_length is not None and num_query_tokens is None
    if plain and not uses_onednn(block.attn.proj, x):
        images = x.unflatten(0, (-1, layout.uniform_length))
        rope = rotary.patches(index, len(images)) if rotary else None
        return ops.dense_block(block, images, None, rope).flatten(0, 1), None
    x, attention = _attended(ops, block, index, x, layout, rotary, num_query_tokens)
    return ops.blocks[type(block)].mlp(block, x), attention


def _attended(
    ops: ModelOps,
    block: Any,
    index: int,
    x: Tensor,
    layout: Layout,
    rotary: RotaryEmbedding | None,
    num_query_tokens: int | None,
) -> tuple[Tensor, Tensor | None]:
    """The first half of ``packed_block``: queries, keys and values are gone when it returns, before
    the second needs its memory.
    """
    attn, form = block.attn, ops.blocks[type(block)]
    source = form.pre_attention(block, x)
    q, k, v = ops.project(block, source, rotary.rows(index, len(x)) if rotary else None)
    mixed = attn.norm(varlen_attention(q, k, v, layout))
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(source).sigmoid()
    attention = None
    if num_query_tokens is not None:
        attention = attention_received(_packed_query(q, layout, num_query_tokens), k, layout)
    return form.residual(block, x, linear(attn.proj, mixed)), attention


def masked_block(
    ops: ModelOps,
    block: Any,
    index: int,
    x: Tensor,
    alive: Tensor,
    rotary: RotaryEmbedding | None,
    num_query_tokens: int | None,
) -> tuple[Tensor, Tensor | None]:
    """timm's own block over all slots, pruned ones masked out of the keys.

    Args:
        ops: of the model.
        block: timm's.
        index: the block's place in the model.
        x: rows of all slots [B * L, D].
        alive: bool [B, L].
        rotary: their positions, where the model rotates.
        num_query_tokens: as in ``packed_block``.

    Returns:
        rows [B * L, D], and what each was attention, [B * L], where observed.
    """
    images = x.unflatten(0, alive.shape)
    attention = None
    if num_query_tokens is not None:
        slots = rotary.slots(index) if rotary else None
        attention = masked_attention_received(
            ops, block, images, alive, slots, num_query_tokens
        ).flatten()
    rope = rotary.patches(index, len(images)) if rotary else None
    return ops.dense_block(block, images, alive[:, None, None, :], rope).flatten(0, 1), attention


def masked_attention_received(
    ops: ModelOps,
    block: Any,
    images: Tensor,
    alive: Tensor,
    rope: Tensor | None,
    num_query_tokens: int,
) -> Tensor:
    """What is attention to each slot in a block that is about to run on all of them.

    Args:
        ops: of the model.
        block: timm's.
        images: [B, L, D].
        alive: bool [B, L]; the others are attention nothing.
        rope: ``RotaryEmbedding.slots``, where the model rotates.
        num_query_tokens: as in ``packed_block``.

    Returns:
        [B, L], mean over heads.
    """
    source = ops.blocks[type(block)].pre_attention(block, images)
    q, k, _ = ops.project(block, source, rope)
    query = _masked_query(q, alive, num_query_tokens)
    scores = torch.einsum("bhd,blhd->bhl", query, k) * block.attn.scale
    scores = scores.masked_fill(~alive[:, None, :], -torch.inf)
    return scores.softmax(-1).mean(1)


def _packed_query(q: Tensor, layout: Layout, num_query_tokens: int) -> Tensor:
    """The query of each image whose attention is observed: [S, heads, size] -> [B, heads, size]."""
    if not num_query_tokens:
        return layout.mean(q)
    if layout.uniform_length is not None:
        return q.unflatten(0, (-1, layout.uniform_length))[:, :num_query_tokens].mean(1)
    places = torch.arange(num_query_tokens, device=q.device)
    return q[layout.starts[:, None] + places].mean(1)


def _masked_query(q: Tensor, alive: Tensor, num_query_tokens: int) -> Tensor:
    """Likewise: [B, L, heads, size] -> [B, heads, size]."""
    if num_query_tokens:
        return q[:, :num_query_tokens].mean(1)
    weight = alive.to(q.dtype)[..., None, None]
    return (q * weight).sum(1) / weight.sum(1)


# what plain and rotary models share


def _post_norm_pre_attention(block: Any, x: Tensor) -> Tensor:
    return x


def _post_norm_residual(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    return x + block.norm1(mixed)


def _post_norm_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.norm2(mlp(block.mlp, x))


def pre_norm(block: Any, x: Tensor) -> Tensor:
    """Of blocks that normalise what attention reads."""
    return block.norm1(x)


POST_NORM = BlockOps(
    pre_attention=_post_norm_pre_attention, residual=_post_norm_residual, mlp=_post_norm_mlp
)
