"""Parts of timm's VisionTransformer that peers need with their insides visible.

Peers run on the kernels that ours runs on: few rows go through oneDNN's linear layers, and large
batches pass in chunks that fit a CPU's caches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from prunevit.envs.vit.execution import num_chunks
from prunevit.envs.vit.onednn_linear import linear, mlp, uses_onednn
from prunevit.envs.vit.timm_models.heads import pools_tokens
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError
from prunevit.envs.vit.untouched import is_untouched

S = TypeVar("S")  # a schedule


def check_plain(model: Any) -> Any:
    """Returns ``model`` where peers can run it: they know one form of block.

    Raises:
        UnsupportedBackboneError: they can't.
    """
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        kind = type(model).__name__
    elif odd := [b for b in model.blocks if (type(b), type(b.attn)) != (Block, Attention)]:
        kind = f"{type(odd[0]).__name__} with {type(odd[0].attn).__name__}"
    else:
        return model
    raise UnsupportedBackboneError(
        f"rivals (padded, ats, tome, evit, uniform and others) are written for timm's plain Block "
        f"with Attention, not for {kind}: leave them out"
    )


def embed(model: Any, images: Tensor) -> Tensor:
    """What timm's VisionTransformer does before its blocks: [B, C, H, W] -> [B, P+N, D]."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def attend(attn: Any, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """timm's ``Attention`` in evaluation mode, fused, that also returns what it compared.

    Args:
        attn: the module.
        x: normed tokens [B, L, D].
        mask: as ``scaled_dot_product_attention`` takes it.

    Returns:
        output [B, L, D], queries and keys [B, heads, L, head_dim].
    """
    qkv = linear(attn.qkv, x).unflatten(2, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    mixed = attn.norm(mixed.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(x).sigmoid()
    return linear(attn.proj, mixed), q, k


def check_reads_class_token(model: Any, who_needs_it: str) -> Any:
    """``check_plain``, for methods that go by the class token.

    Raises:
        UnsupportedBackboneError: also if there is none, or the head reads more than it; the message
            begins with ``who_needs_it``.
    """
    if check_plain(model).cls_token is None or pools_tokens(model):
        raise UnsupportedBackboneError(
            f"{who_needs_it} a class token, and a head that reads no patches"
        )
    return model


def tokens_after_blocks(
    model: Any, prune_before: Sequence[int], tokens: Sequence[int]
) -> dict[int, int]:
    """How many patches stay behind which block, where ``tokens`` stay from each of ``prune_before``
    on.

    Raises:
        ValueError: stages out of range or order, or not a number of tokens for each.
    """
    if list(prune_before) != sorted(set(prune_before) & set(range(1, len(model.blocks)))):
        raise ValueError(
            f"prune_before={tuple(prune_before)} must ascend within 1..{len(model.blocks) - 1}"
        )
    if len(tokens) != len(prune_before) or min(tokens, default=0) < 0:
        raise ValueError(
            f"tokens={tuple(tokens)}: {len(prune_before)} stages need a number each, at least 0"
        )
    return {block - 1: count for block, count in zip(prune_before, tokens, strict=True)}


def feed_forward(block: Any, x: Tensor) -> Tensor:
    """The second half of timm's ``Block`` in evaluation mode, residual included."""
    return x + block.ls2(mlp(block.mlp, block.norm2(x)))


def run_block(block: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """timm's ``Block`` in evaluation mode: its own forward pass where oneDNN has nothing to do."""
    if not (uses_onednn(block.attn.proj, x) and is_untouched(block)):
        return block(x, attn_mask=mask)
    return feed_forward(block, x + block.ls1(attend(block.attn, block.norm1(x), mask)[0]))


def chunks(model: Any, x: Tensor) -> Sequence[Tensor]:
    """The images of a large batch in chunks, where ``StagedViT`` would take chunks too.

    Args:
        model: timm's model.
        x: images [B, C, H, W], or their tokens [B, L, D].
    """
    slots = model.num_prefix_tokens + model.patch_embed.num_patches if x.dim() == 4 else x.shape[1]
    return x.tensor_split(num_chunks(model, len(x) * slots, len(x), torch_compile=False))


def pass_counter(
    model: Any, image_shape: Sequence[int], build: Callable[[Any, S], nn.Module]
) -> Callable[[S], int]:
    """Counts the multiply-accumulates of one image in the model that ``build`` makes of ``model``
    and a schedule, without computing it.
    """
    shapes = copy.deepcopy(model).to("meta")
    dtype = next(shapes.parameters()).dtype
    image = torch.zeros(1, *image_shape, device="meta", dtype=dtype)

    def count(schedule: S) -> int:
        # the counter's module hooks want a graph
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            build(shapes, schedule)(image)
        return counter.get_total_flops() // 2

    return count
