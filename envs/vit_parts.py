"""What is timm's own in a staged ViT: its blocks on packed rows, its head, and which models have
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from tokenprune.envs.ragged import Layout, attention, first_row_attention

Query = Callable[[Tensor, Layout], Tensor]


class UnsupportedBackboneError(ValueError):
    """A model that can't be run from stage to stage on a part of its tokens; the message says
    why.
    """


def check_supported(model: Any) -> Any:
    """Returns ``model`` where it can be staged.

    Raises:
        UnsupportedBackboneError: it can't; the message says why.
    """

    def refuse(reason: str) -> UnsupportedBackboneError:
        return UnsupportedBackboneError(
            f"{type(model).__name__} can't be run on a part of its tokens: {reason}. "
            "Supported are timm's plain VisionTransformer models (ViT, DeiT, DeiT-3, "
            "DINOv2, CLIP, SigLIP)."
        )

    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise refuse(
            "its forward pass is not that of timm's VisionTransformer, "
            "which is a plain sequence of blocks"
        )
    if not len(model.blocks):
        raise refuse("it has no blocks")
    for i, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise refuse(f"block {i} is a {type(block).__name__}, not timm's Block")
        if type(block.attn) is not Attention:
            raise refuse(f"the attention of block {i} is a {type(block.attn).__name__}")
    if not model.global_pool:
        raise refuse("it has no pooling (global_pool='') and so gives no logits")
    if model.num_classes < 1:
        raise refuse("it has no classifier (num_classes=0) and so gives no logits")
    return model


def packed_block(
    block: Any, x: Tensor, layout: Layout, query: Query, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """timm's ``Block`` on packed rows; the same arithmetic in the same order.

    Args:
        block: timm's.
        x: rows [S, D].
        layout: whose rows they are.
        query: queries of all rows [S, heads, head_dim] -> the query of each image whose attention
            is observed [B, heads, head_dim].
        wanted: whether it is observed.

    Returns:
        rows [S, D], and what each was paid, [S], where wanted.
    """
    if layout.equal is not None and not wanted:
        return block(x.unflatten(0, (-1, layout.equal))).flatten(0, 1), None
    attn = block.attn
    normed = block.norm1(x)
    qkv = attn.qkv(normed).unflatten(1, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.unbind(1)
    q, k = attn.q_norm(q), attn.k_norm(k)
    mixed = attn.norm(attention(q, k, v, layout))
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(normed).sigmoid()
    x = x + block.ls1(attn.proj(mixed))
    x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, first_row_attention(query(q, layout), k, layout) if wanted else None


def classify(model: Any, rows: Tensor, layout: Layout) -> Tensor:
    """What timm does after the last block, over images of different lengths: rows [S, D] -> logits
    [B, classes].
    """
    if isinstance(model, VisionTransformerDistilled):
        pair = torch.stack([rows[layout.first], rows[layout.first + 1]], dim=1)
        return model.forward_head(model.norm(pair))
    if model.global_pool == "token":
        return model.forward_head(model.norm(rows[layout.first])[:, None])
    return classify_normed(model, model.norm(rows), layout)


def classify_normed(model: Any, rows: Tensor, layout: Layout, pre_logits: bool = False) -> Tensor:
    """timm's ``forward_head`` of a model that pools over its tokens: normed rows [S, D] -> logits
    [B, classes], or what the classifier reads.
    """
    if not model.pool_include_prefix:
        rows, layout = layout.without_first(rows, model.num_prefix_tokens)
    if model.global_pool == "prr":
        pool = model.attn_pool
        heads = pool.pre_norm(rows).unflatten(1, (pool.num_heads, pool.head_dim))
        refined = pool.post_norm(attention(heads, heads, heads, layout))
        pooled = refined[layout.first] if pool.pool == "token" else layout.mean(refined)
    elif model.global_pool == "map":
        padded, valid = layout.pad(rows)
        pooled = model.attn_pool(padded, attn_mask=valid[:, None, None, :])
    elif model.global_pool == "avg":
        pooled = layout.mean(rows)
    elif model.global_pool == "max":
        pooled = layout.max(rows)
    else:
        pooled = 0.5 * (layout.max(rows) + layout.mean(rows))
    pooled = model.head_drop(model.fc_norm(pooled))
    return pooled if pre_logits else model.head(pooled)


def pools_tokens(model: Any) -> bool:
    """Whether the classifier reads all tokens, not the class token (and its like) alone."""
    return not isinstance(model, VisionTransformerDistilled) and model.global_pool != "token"


def head_reads_prefix(model: Any) -> bool:
    """Whether the classifier has something to read once all patches are gone."""
    return not pools_tokens(model) or (model.num_prefix_tokens > 0 and model.pool_include_prefix)


def attention_width(model: Any) -> int:
    """Numbers that attention handles a token: heads times head size."""
    attn = model.blocks[0].attn
    return attn.num_heads * attn.head_dim


def embed(model: Any, images: Tensor) -> Tensor:
    """What timm does before the first block: [B, C, H, W] -> [B, L, D]."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
