"""timm's blocks on packed rows and on masked images, whichever timm model they belong to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunevit.envs.vit.attention import attention_received, varlen_attention
from prunevit.envs.vit.layout import Layout
from prunevit.envs.vit.onednn_linear import linear, uses_onednn
from prunevit.envs.vit.timm_models.ops import ModelOps
from prunevit.envs.vit.timm_models.rope import RotaryEmbedding


def packed_block(
    ops: ModelOps,
    block: Any,
    index: int,
    x: Tensor,
    layout: Layout,
    rotary: RotaryEmbedding | None,
    num_query_tokens: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Runs a block on packed rows: timm's arithmetic in timm's order.

    Args:
        ops: the operations of the model.
        block: timm's block.
        index: index of the block in the model.
        x: rows [S, D].
        layout: layout of the rows.
        rotary: their rotary embedding, if the model has one.
        num_query_tokens: also return the attention that each row receives from the mean query of
            this many first tokens of its image, or of all its tokens if 0; None returns none.

    Returns:
        rows [S, D], and the attention received [S] or None.
    """
    plain = layout.uniform_length is not None and num_query_tokens is None
    if plain and not uses_onednn(block.attn.proj, x):
        images = x.unflatten(0, (-1, layout.uniform_length))
        rope = rotary.patches(index, len(images)) if rotary else None
        return ops.dense_block(block, images, None, rope).flatten(0, 1), None
    x, received = _packed_attention(ops, block, index, x, layout, rotary, num_query_tokens)
    return ops.blocks[type(block)].mlp(block, x), received


def _packed_attention(
    ops: ModelOps,
    block: Any,
    index: int,
    x: Tensor,
    layout: Layout,
    rotary: RotaryEmbedding | None,
    num_query_tokens: int | None,
) -> tuple[Tensor, Tensor | None]:
    """The first half of ``packed_block``.

    A function of its own, so that queries, keys and values are freed before the MLP needs memory.
    """
    attn, steps = block.attn, ops.blocks[type(block)]
    source = steps.pre_attention(block, x)
    q, k, v = ops.project(block, source, rotary.rows(index, len(x)) if rotary else None)
    mixed = attn.norm(varlen_attention(q, k, v, layout))
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(source).sigmoid()
    received = None
    if num_query_tokens is not None:
        received = attention_received(_packed_query(q, layout, num_query_tokens), k, layout)
    return steps.residual(block, x, linear(attn.proj, mixed)), received


def masked_block(
    ops: ModelOps,
    block: Any,
    index: int,
    x: Tensor,
    alive: Tensor,
    rotary: RotaryEmbedding | None,
    num_query_tokens: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Runs timm's own block on all slots, with pruned tokens masked out of the keys.

    Args:
        ops: the operations of the model.
        block: timm's block.
        index: index of the block in the model.
        x: rows of all slots [B * L, D].
        alive: which tokens still exist, bool [B, L].
        rotary: rotary embedding, if the model has one.
        num_query_tokens: as for ``packed_block``.

    Returns:
        rows [B * L, D], and the attention received [B * L] or None.
    """
    images = x.unflatten(0, alive.shape)
    received = None
    if num_query_tokens is not None:
        slots = rotary.slots(index) if rotary else None
        received = masked_attention_received(ops, block, images, alive, slots, num_query_tokens)
        received = received.flatten()
    rope = rotary.patches(index, len(images)) if rotary else None
    return ops.dense_block(block, images, alive[:, None, None, :], rope).flatten(0, 1), received


def masked_attention_received(
    ops: ModelOps,
    block: Any,
    images: Tensor,
    alive: Tensor,
    rope: Tensor | None,
    num_query_tokens: int,
) -> Tensor:
    """The attention that each slot receives in a block that is about to run on all of them.

    Args:
        ops: the operations of the model.
        block: timm's block.
        images: its input [B, L, D].
        alive: which tokens still exist, bool [B, L]; the others receive 0.
        rope: ``RotaryEmbedding.slots``, if the model has a rotary embedding.
        num_query_tokens: as for ``packed_block``.

    Returns:
        [B, L], averaged over heads.
    """
    source = ops.blocks[type(block)].pre_attention(block, images)
    q, k, _ = ops.project(block, source, rope)
    query = _masked_query(q, alive, num_query_tokens)
    scores = torch.einsum("bhd,blhd->bhl", query, k) * block.attn.scale
    scores = scores.masked_fill(~alive[:, None, :], -torch.inf)
    return scores.softmax(-1).mean(1)


def _packed_query(q: Tensor, layout: Layout, num_query_tokens: int) -> Tensor:
    """The mean query of each image's query tokens: [S, heads, size] -> [B, heads, size]."""
    if not num_query_tokens:
        return layout.mean(q)
    if layout.uniform_length is not None:
        return q.unflatten(0, (-1, layout.uniform_length))[:, :num_query_tokens].mean(1)
    places = torch.arange(num_query_tokens, device=q.device)
    return q[layout.starts[:, None] + places].mean(1)


def _masked_query(q: Tensor, alive: Tensor, num_query_tokens: int) -> Tensor:
    """The mean query of each image's query tokens: [B, L, heads, size] -> [B, heads, size]."""
    if num_query_tokens:
        return q[:, :num_query_tokens].mean(1)
    weight = alive.to(q.dtype)[..., None, None]
    return (q * weight).sum(1) / weight.sum(1)
