"""timm's ``Eva``: EVA, EVA-02, DINOv3, Perception Encoder and others with rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor
from torch.nn import functional as F

from prunevit.envs.vit.blocks import POST_NORM, Family, Form, pre_norm_enter
from prunevit.envs.vit.onednn_linear import linear, mlp
from prunevit.envs.vit.rope import Rotary


def _embed(model: Any, images: Tensor) -> tuple[Tensor, Rotary | None]:
    x, turns = model._pos_embed(model.patch_embed(images))
    return model.norm_pre(x), None if turns is None else Rotary.of(turns, model.num_prefix_tokens)


def _whole(block: Any, x: Tensor, mask: Tensor | None, turn: Tensor | None) -> Tensor:
    # timm infers the head size from the number of elements, which no images don't have
    return block(x, rope=turn, attn_mask=mask) if len(x) else x


def _join(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    return x + (mixed if block.gamma_1 is None else block.gamma_1 * mixed)


def _leave(block: Any, x: Tensor) -> Tensor:
    widened = mlp(block.mlp, block.norm2(x))
    return x + (widened if block.gamma_2 is None else block.gamma_2 * widened)


def _project_eva(attn: Any, source: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if attn.qkv is None:
        return _project_apart(attn, source, turn)
    if attn.q_bias is None:
        qkv = linear(attn.qkv, source)
    else:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        # timm adds the bias on its own where asked to: in half precision the sum differs
        apart = attn.qkv_bias_separate
        qkv = attn.qkv(source) + bias if apart else F.linear(source, attn.qkv.weight, bias)
    return _split(attn, qkv, turn)


def _project_rope(attn: Any, source: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if attn.qkv is None:
        return _project_apart(attn, source, turn)
    return _split(attn, linear(attn.qkv, source), turn)


def _split(attn: Any, qkv: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(-3)
    return _turned(attn, attn.q_norm(q), turn), _turned(attn, attn.k_norm(k), turn), v


def _project_apart(attn: Any, source: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        linear(project, source).unflatten(-1, (-1, attn.head_dim))
        for project in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    q, k = _turned(attn, attn.q_norm(q), turn), _turned(attn, attn.k_norm(k), turn)
    # grouped queries: several heads read one head of keys and values
    groups = attn.num_heads // k.shape[-2]
    if groups > 1:
        k, v = (rows.repeat_interleave(groups, dim=-2) for rows in (k, v))
    return q, k, v


def _turned(attn: Any, rows: Tensor, turn: Tensor | None) -> Tensor:
    return rows if turn is None else apply_rot_embed_cat(rows, turn, half=attn.rotate_half)


EVA = Family(
    models=(Eva,),
    blocks={EvaBlock: Form(pre_norm_enter, _join, _leave), EvaBlockPostNorm: POST_NORM},
    attentions={EvaAttention: _project_eva, AttentionRope: _project_rope},
    embed=_embed,
    whole=_whole,
)
