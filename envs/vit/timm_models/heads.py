"""What timm's models do after their last block, on images with different numbers of tokens."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.envs.vit.attention import varlen_attention
from prunevit.envs.vit.layout import Layout
from prunevit.envs.vit.untouched import has_global_hooks, is_untouched


def classify_prefix(model: Any, prefix: Tensor) -> Tensor:
    """Classifies by prefix tokens alone, for heads that read nothing else.

    Args:
        model: timm's model.
        prefix: prefix tokens after the last block [B, P, D].

    Returns:
        logits [B, classes].
    """
    return model.forward_head(model.norm(prefix))


def classify_pooled(
    model: Any,
    rows: Tensor,
    layout: Layout,
    pre_logits: bool = False,
    size: Tensor | None = None,
) -> Tensor:
    """timm's ``forward_head`` for models that pool over their tokens.

    Args:
        model: timm's model.
        rows: tokens after the last norm [S, D].
        layout: which rows belong to which image.
        pre_logits: return the input of the classifier instead of logits.
        size: number of first tokens that each row stands for, [S]: it is pooled as if it were there
            as many times. None if all are 1.

    Returns:
        logits [B, classes].
    """
    if model.global_pool == "":
        raise ValueError(
            "the backbone has no pooling (global_pool=''), so an image has no single output: call "
            "forward_features, or build the model with another global_pool"
        )
    if not _pools_prefix(model):
        if size is not None:
            size = layout.without_first(size, model.num_prefix_tokens)[0]
        rows, layout = layout.without_first(rows, model.num_prefix_tokens)
    log_size = None if size is None else size.log().to(rows.dtype)
    if model.global_pool == "prr":
        pool = model.attn_pool
        heads = pool.pre_norm(rows).unflatten(1, (pool.num_heads, pool.head_dim))
        refined = pool.post_norm(varlen_attention(heads, heads, heads, layout, log_size))
        pooled = refined[layout.starts] if pool.pool == "token" else layout.mean(refined, size)
    elif model.global_pool == "map":
        padded, valid = layout.pad(rows)
        mask = valid[:, None, None, :]
        if log_size is not None:
            bias = layout.pad(log_size[:, None])[0].mT[:, None]
            mask = bias.masked_fill(~mask, -torch.inf)
        pooled = model.attn_pool(padded, attn_mask=mask)
    elif model.global_pool == "avg":
        pooled = layout.mean(rows, size)
    elif model.global_pool == "max":
        pooled = layout.max(rows)
    else:
        pooled = 0.5 * (layout.max(rows) + layout.mean(rows, size))
    return _classify(model, pooled, pre_logits)


def classify_padded(
    model: Any, images: Tensor, valid: Tensor, size: Tensor | None = None
) -> Tensor:
    """``classify_pooled`` of padded images, without a look at their lengths.

    Args:
        model: timm's model.
        images: tokens after the last norm [B, L, D].
        valid: which of them are tokens and no padding, bool [B, L].
        size: as of ``classify_pooled``, [B, L].

    Returns:
        logits [B, classes].
    """
    if not _pools_prefix(model):
        images, valid = (each[:, model.num_prefix_tokens :] for each in (images, valid))
        size = None if size is None else size[:, model.num_prefix_tokens :]
    mask, each = valid[:, None, None, :], valid[..., None]
    weight = each if size is None else each * size[..., None]
    if size is not None:
        mask = size.log()[:, None, None, :].masked_fill(~mask, -torch.inf)
    if model.global_pool == "map":
        return _classify(model, model.attn_pool(images, attn_mask=mask))
    refines = model.global_pool == "prr"
    if refines:
        pool = model.attn_pool
        heads = pool.pre_norm(images).unflatten(2, (pool.num_heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        images = pool.post_norm(mixed.transpose(1, 2).flatten(2))
        if pool.pool == "token":
            return _classify(model, images[:, 0])
    mean = (images * weight).sum(1) / weight.sum(1)
    if refines or model.global_pool == "avg":
        return _classify(model, mean)
    largest = images.masked_fill(~each, -torch.inf).amax(1)
    return _classify(model, largest if model.global_pool == "max" else 0.5 * (largest + mean))


def _classify(model: Any, pooled: Tensor, pre_logits: bool = False) -> Tensor:
    pooled = model.head_drop(model.fc_norm(pooled))
    return pooled if pre_logits else model.head(pooled)


def pools_tokens(model: Any) -> bool:
    """Whether the head reads all tokens, not only the class token or distillation tokens."""
    return not isinstance(model, VisionTransformerDistilled) and model.global_pool != "token"


def head_reads_prefix(model: Any) -> bool:
    """Whether the head still has something to read after all patches have been pruned."""
    reads_prefix = not pools_tokens(model) or model.global_pool == "" or _pools_prefix(model)
    return model.num_prefix_tokens > 0 and reads_prefix


def count_classes(model: Any) -> int:
    """Outputs of the head that the model has now, 0 if it has none.

    ``num_classes`` of a timm model stays as it was if the head is replaced by assignment.
    """
    head = model.head
    if isinstance(head, nn.Identity):
        return 0
    sizes = [part.out_features for part in head.modules() if hasattr(part, "out_features")]
    if isinstance(getattr(head, "out_features", None), int):
        return head.out_features
    return sizes[-1] if sizes else model.num_classes


def is_head_untouched(model: Any, hooked: bool = False) -> bool:
    """Whether nothing but timm's own code runs after the last block.

    Args:
        model: timm's model.
        hooked: leave hooks on all modules together out of account.
    """
    own = vars(model)
    if "forward_head" in own or "pool" in own or (has_global_hooks() and not hooked):
        return False
    names = ("norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist")
    parts = [own["_modules"].get(name) for name in names]
    return all(part is None or is_untouched(part, may_draw=True) for part in parts)


def _pools_prefix(model: Any) -> bool:
    """Whether pooling includes prefix tokens.

    A flag of timm's VisionTransformer. Eva's attention pooling always includes them, its other
    poolings never do.
    """
    return getattr(model, "pool_include_prefix", model.attn_pool is not None)
