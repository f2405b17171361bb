"""timm's ``VisionTransformer``: ViT, DeiT, DeiT-3, DINOv2, CLIP, SigLIP and others."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor

from prunevit.envs.vit.onednn_linear import linear, mlp
from prunevit.envs.vit.timm_models.ops import POST_NORM, BlockOps, ModelOps, pre_norm


def _embed(model: Any, images: Tensor) -> tuple[Tensor, None]:
    x = model.patch_drop(model._pos_embed(model.patch_embed(images)))
    return model.norm_pre(x), None


def _dense_block(block: Any, x: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
    return block(x, attn_mask=mask)


def _residual(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    return x + block.drop_path1(block.ls1(mixed))


def _mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(mlp(block.mlp, block.norm2(x))))


def _project(attn: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    qkv = linear(attn.qkv, x).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.unbind(-3)
    return attn.q_norm(q), attn.k_norm(k), v


VIT = ModelOps(
    models=(VisionTransformer, VisionTransformerDistilled),
    blocks={Block: BlockOps(pre_norm, _residual, _mlp), ResPostBlock: POST_NORM},
    attentions={Attention: _project},
    embed=_embed,
    dense_block=_dense_block,
)
