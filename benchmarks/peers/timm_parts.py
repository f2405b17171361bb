"""Parts of timm's VisionTransformer that peers need with their insides visible."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from tokenprune.envs.backbone import UnsupportedBackboneError


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
        f"padded, tome and uniform are written for timm's plain Block with Attention, not for "
        f"{kind}: leave them out of the variants"
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
    qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    mixed = attn.norm(mixed.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(x).sigmoid()
    return attn.proj(mixed), q, k
