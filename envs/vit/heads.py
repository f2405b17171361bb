"""What timm's models do after their last block, over images of different lengths."""

from __future__ import annotations

from typing import Any

from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

from prunevit.envs.vit.ragged import Layout, varlen_attention


def classify_prefix(model: Any, prefix: Tensor) -> Tensor:
    """For a classifier that reads nothing else: prefix tokens behind the last block [B, P, D] ->
    logits [B, classes].
    """
    return model.forward_head(model.norm(prefix))


def classify_normed(model: Any, rows: Tensor, layout: Layout, pre_logits: bool = False) -> Tensor:
    """timm's ``forward_head`` of a model that pools over its tokens: normed rows [S, D] -> logits
    [B, classes], or what the classifier reads.
    """
    if not _pools_prefix(model):
        rows, layout = layout.without_first(rows, model.num_prefix_tokens)
    if model.global_pool == "prr":
        pool = model.attn_pool
        heads = pool.pre_norm(rows).unflatten(1, (pool.num_heads, pool.head_dim))
        refined = pool.post_norm(varlen_attention(heads, heads, heads, layout))
        pooled = refined[layout.starts] if pool.pool == "token" else layout.mean(refined)
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
    return not pools_tokens(model) or (model.num_prefix_tokens > 0 and _pools_prefix(model))


def _pools_prefix(model: Any) -> bool:
    """Whether pooling goes over prefix tokens too: a flag of timm's VisionTransformer; Eva's
    attention pooling always does, its other poolings never.
    """
    return getattr(model, "pool_include_prefix", model.attn_pool is not None)
