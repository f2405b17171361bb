"""timm's ``Eva``: EVA, EVA-02, DINOv3, Perception Encoder and others with rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor
from torch.nn import functional as F

from prunevit.envs.vit.onednn_linear import linear, mlp
from prunevit.envs.vit.timm_models.ops import POST_NORM, BlockOps, ModelOps, pre_norm
from prunevit.envs.vit.timm_models.rope import RotaryEmbedding


def _embed(model: Any, images: Tensor) -> tuple[Tensor, RotaryEmbedding | None]:
    x, sin_cos = model._pos_embed(model.patch_embed(images))
    if sin_cos is None:
        return model.norm_pre(x), None
    return model.norm_pre(x), RotaryEmbedding.from_timm(sin_cos, model.num_prefix_tokens)


def _dense_block(block: Any, x: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
    # timm infers the head size from the number of elements, so it can't run on zero images
    return block(x, rope=rope, attn_mask=mask) if x.shape[0] else x


def _residual(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    return x + block.drop_path1(mixed if block.gamma_1 is None else block.gamma_1 * mixed)


def _mlp(block: Any, x: Tensor) -> Tensor:
    out = mlp(block.mlp, block.norm2(x))
    return x + block.drop_path2(out if block.gamma_2 is None else block.gamma_2 * out)


def _project(attn: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if attn.qkv is None:
        return _project_separately(attn, x, rope)
    if getattr(attn, "q_bias", None) is None:  # ``AttentionRope`` has no biases of its own
        qkv = linear(attn.qkv, x)
    else:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        # with qkv_bias_separate timm adds the bias on its own, which rounds differently in half
        # precision
        separate = attn.qkv_bias_separate
        qkv = attn.qkv(x) + bias if separate else F.linear(x, attn.qkv.weight, bias)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(-3)
    return _rotate(attn, attn.q_norm(q), rope), _rotate(attn, attn.k_norm(k), rope), v


def _project_separately(attn: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        linear(project, x).unflatten(-1, (-1, attn.head_dim))
        for project in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    q, k = _rotate(attn, attn.q_norm(q), rope), _rotate(attn, attn.k_norm(k), rope)
    # grouped-query attention: several heads of queries share one head of keys and values
    groups = attn.num_heads // k.shape[-2]
    if groups > 1:
        k, v = (rows.repeat_interleave(groups, dim=-2) for rows in (k, v))
    return q, k, v


def _rotate(attn: Any, rows: Tensor, rope: Tensor | None) -> Tensor:
    return rows if rope is None else apply_rot_embed_cat(rows, rope, half=attn.rotate_half)


EVA = ModelOps(
    models=(Eva,),
    blocks={EvaBlock: BlockOps(pre_norm, _residual, _mlp), EvaBlockPostNorm: POST_NORM},
    attentions={EvaAttention: _project, AttentionRope: _project},
    embed=_embed,
    dense_block=_dense_block,
)
