"""timm's blocks on packed rows and on masked images, whichever timm model they belong to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from prunevit.envs.vit.attention import attention_received, varlen_attention
from prunevit.envs.vit.layout import Layout
from prunevit.envs.vit.onednn_linear import linear, uses_onednn
from prunevit.envs.vit.timm_models.ops import ModelOps
from prunevit.envs.vit.timm_models.rope import RotaryEmbedding
from prunevit.envs.vit.tokens import slots_by_length

Sublayer = Literal["attention", "mlp"]


# not frozen: of a frozen one, the compiler of torch 2.6 looks at all fields, used or not
@dataclass(eq=False)
class BlockCall:
    """A block that is to run, and what it is told besides its rows.

    Attributes:
        ops: the operations of the model.
        block: timm's block.
        rotary: rotary embedding of the rows in this block; None if the model has none.
        num_query_tokens: also return the attention that each row receives from the mean query of
            this many first tokens of its image, or of all its tokens if 0; None returns none.
        log_size: logarithm of the number of first tokens that each row stands for, [rows]. Added to
            the scores of its key it makes attention proportional to that number. None if all are 1.
        sublayer: run this part of the block alone, with its residual connection; None runs all.
    """

    ops: ModelOps
    block: Any
    rotary: RotaryEmbedding | None
    num_query_tokens: int | None
    log_size: Tensor | None = None
    sublayer: Sublayer | None = None


def dense_block(
    call: BlockCall, images: Tensor, mask: Tensor | None, rope: Tensor | None
) -> Tensor:
    """timm's own forward pass of a block, or of its sublayer, as ``ModelOps.dense_block``."""
    block = call.block
    if call.sublayer is None:
        return call.ops.dense_block(block, images, mask, rope)
    steps = call.ops.steps(block)
    if call.sublayer == "mlp":
        return steps.mlp(block, images)
    if not images.shape[0]:
        return images  # timm's attention infers shapes from the number of elements
    rotary = {} if rope is None else {"rope": rope}
    mixed = block.attn(steps.pre_attention(block, images), attn_mask=mask, **rotary)
    return steps.residual(block, images, mixed)


def packed_block(call: BlockCall, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Runs a block on packed rows: timm's arithmetic in timm's order.

    Args:
        call: the block.
        x: rows [S, D].
        layout: layout of the rows.

    Returns:
        rows [S, D], and the attention received [S] or None.
    """
    ops, block = call.ops, call.block
    if call.sublayer == "mlp":
        return ops.steps(block).mlp(block, x), None
    # a compiler would make graphs of their own for images of one length
    plain = (
        not torch.compiler.is_compiling()
        and call.sublayer is None
        and layout.uniform_length is not None
        and call.num_query_tokens is None
    )
    if plain and not uses_onednn(block.attn.proj, x):
        images = x.unflatten(0, (-1, layout.uniform_length))
        rope = call.rotary.patches(len(images)) if call.rotary else None
        mask = _proportional(call.log_size, len(images))
        return ops.dense_block(block, images, mask, rope).flatten(0, 1), None
    x, received = _packed_attention(call, x, layout)
    if call.sublayer == "attention":
        return x, received
    return ops.steps(block).mlp(block, x), received


def _packed_attention(call: BlockCall, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The attention of ``packed_block``, with its residual connection.

    A function of its own, so that queries, keys and values are freed before the MLP needs memory.
    """
    block, steps = call.block, call.ops.steps(call.block)
    attn, source = block.attn, steps.pre_attention(block, x)
    q, k, v = call.ops.project(block, source, call.rotary.rows() if call.rotary else None)
    mixed = attn.norm(varlen_attention(q, k, v, layout, call.log_size))
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(source).sigmoid()
    received = None
    if call.num_query_tokens is not None:
        received = attention_received(q, k, layout, call.num_query_tokens, call.log_size)
    return steps.residual(block, x, linear(attn.proj, mixed)), received


def _proportional(log_size: Tensor | None, images: int) -> Tensor | None:
    """timm's attention mask for images of one length; ``BlockCall.log_size`` -> [B, 1, 1, L]."""
    return None if log_size is None else log_size.view(images, 1, 1, -1)


# the lengths of images differ from batch to batch: nothing to compile
@torch.compiler.disable
def timm_block(call: BlockCall, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """``packed_block`` for blocks in which more than timm's own code runs.

    Calls the block as timm does, once for each number of tokens, on the images that have so many:
    hooks and replaced layers see what they would see in timm's model.
    """
    outputs, paid, attn = [], [], call.block.attn
    for rows, images, length in layout.groups():
        part = x[rows].unflatten(0, (images, length))
        rope = call.rotary.slice_rows(rows).patches(images) if call.rotary else None
        bias = None if call.log_size is None else call.log_size[rows]
        mask = _proportional(bias, images)
        if call.num_query_tokens is None:
            out = dense_block(call, part, mask, rope)
        else:
            out, q, k = observed_block(call, part, mask, rope)
            group = Layout.uniform(images, length, layout.width, x.device)
            if not attn.fused_attn:  # fused kernels take the usual scale, whatever attn.scale is
                q = q * (attn.scale / attn.head_dim**-0.5)
            rows_of = (q.flatten(0, 1), k.flatten(0, 1))
            paid.append(attention_received(*rows_of, group, call.num_query_tokens, bias))
        outputs.append(out.flatten(0, 1))
    if not outputs:
        return x, None if call.num_query_tokens is None else x.new_zeros(0)
    return torch.cat(outputs), torch.cat(paid) if paid else None


def observed_block(
    call: BlockCall, images: Tensor, mask: Tensor | None, rope: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """timm's block on images [B, L, D], with the queries and keys [B, L, heads, head_dim] in it.

    They are those that the block itself computed: no module runs twice.
    """
    attn = call.block.attn
    with _capture_outputs(attn, ("q_norm", "k_norm")) as seen:
        out = dense_block(call, images, mask, rope)
    if len(seen) != 2:
        raise RuntimeError(
            "the attention of a block was replaced, so that the attention which tokens receive "
            "can't be observed: choose a policy without needs_attention"
        )
    q, k = seen["q_norm"], seen["k_norm"]  # [B, heads, L, head_dim]
    if rope is not None:
        q, k = (_rotate_patches(attn, rows, rope) for rows in (q, k))
    groups = q.shape[1] // k.shape[1]  # several heads of queries can share one of keys
    k = k.repeat_interleave(groups, dim=1) if groups > 1 else k
    return out, q.transpose(1, 2), k.transpose(1, 2)


@contextmanager
def _capture_outputs(module: Any, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collects what these submodules return in this thread, after all hooks of theirs."""
    seen: dict[str, Tensor] = {}
    thread = threading.get_ident()

    def capture(name: str, out: Tensor) -> None:
        if threading.get_ident() == thread:
            seen[name] = out

    handles = [
        getattr(module, name).register_forward_hook(lambda _, __, out, n=name: capture(n, out))
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _rotate_patches(attn: Any, rows: Tensor, rope: Tensor) -> Tensor:
    """Rotates queries or keys [B, heads, L, head_dim] as timm's attention does."""
    count = attn.num_prefix_tokens
    prefix, patches = rows[:, :, :count], rows[:, :, count:]
    rotated = apply_rot_embed_cat(patches, rope, half=getattr(attn, "rotate_half", False))
    return torch.cat([prefix, rotated], dim=2).type_as(rows)


def masked_block(call: BlockCall, x: Tensor, alive: Tensor) -> tuple[Tensor, Tensor | None]:
    """Runs timm's own block on all slots, with pruned tokens masked out of the keys.

    Args:
        call: the block.
        x: rows of all slots [B * L, D].
        alive: which tokens still exist, bool [B, L].

    Returns:
        rows [B * L, D], and the attention received [B * L] or None.
    """
    images = x.unflatten(0, alive.shape)
    received = None
    if call.num_query_tokens is not None:
        received = masked_attention_received(call, images, alive).flatten()
    rope = call.rotary.patches(len(images)) if call.rotary else None
    mask = alive[:, None, None, :]
    sizes = _proportional(call.log_size, len(images))
    if sizes is not None:
        mask = sizes.masked_fill(~mask, -torch.inf)
    out = dense_block(call, images, mask, rope)
    return out.flatten(0, 1), received


@torch.compiler.disable
def timm_block_on_slots(call: BlockCall, x: Tensor, alive: Tensor) -> tuple[Tensor, Tensor | None]:
    """``masked_block`` for blocks in which more than timm's own code runs.

    That code would see pruned tokens, which a mask hides from timm's attention alone. So the block
    runs on the survivors, and the slots of pruned tokens stay as they were.
    """
    slot, lengths = slots_by_length(alive, alive.sum(1).cpu().numpy())
    attn = call.block.attn
    layout = Layout.of(lengths, attn.num_heads * attn.head_dim, alive.device)
    rotary = call.rotary.take(slot % alive.shape[1]) if call.rotary else None
    sizes = None if call.log_size is None else call.log_size.index_select(0, slot)
    some = replace(call, rotary=rotary, log_size=sizes)
    out, received = timm_block(some, x.index_select(0, slot), layout)
    if received is not None:
        received = received.new_zeros(len(x)).index_copy(0, slot, received)
    return x.to(out.dtype).index_copy(0, slot, out), received


def masked_attention_received(call: BlockCall, images: Tensor, alive: Tensor) -> Tensor:
    """The attention that each slot receives in a block that is about to run on all of them.

    Args:
        call: the block.
        images: its input [B, L, D].
        alive: which tokens still exist, bool [B, L]; the others receive 0.

    Returns:
        [B, L], averaged over heads.
    """
    source = call.ops.steps(call.block).pre_attention(call.block, images)
    rope = call.rotary.slots() if call.rotary else None
    q, k, _ = call.ops.project(call.block, source, rope)
    return masked_received(call, q, k, alive)


def masked_received(call: BlockCall, q: Tensor, k: Tensor, alive: Tensor) -> Tensor:
    """``masked_attention_received``, from queries and keys [B, L, heads, head_dim]."""
    if call.num_query_tokens:
        query = q[:, : call.num_query_tokens].mean(1)  # [B, heads, head_dim]
    else:
        weight = alive.float()[..., None, None]  # in half precision sums would overflow
        query = ((q * weight).sum(1) / weight.sum(1)).to(q.dtype)
    scores = torch.einsum("bhd,blhd->bhl", query, k) * call.block.attn.scale
    if call.log_size is not None:
        scores = scores + call.log_size.view(alive.shape[0], 1, -1)
    scores = scores.masked_fill(~alive[:, None, :], -torch.inf)
    return scores.softmax(-1).mean(1)
