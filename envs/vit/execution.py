"""Runs a range of sublayers on ``Tokens``, in chunks of images where that is faster.

Sublayer 2 b is the attention of block b, sublayer 2 b + 1 its MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import torch
from timm.models import checkpoint
from torch import Tensor

from prunevit.envs.vit.blocks import (
    BlockCall,
    Sublayer,
    masked_block,
    packed_block,
    timm_block,
    timm_block_on_slots,
)
from prunevit.envs.vit.timm_models.ops import ModelOps
from prunevit.envs.vit.timm_models.rope import RotaryEmbedding
from prunevit.envs.vit.timm_models.supported import some_tensor
from prunevit.envs.vit.tokens import Segment, Tokens
from prunevit.envs.vit.torch_compile import compile_block
from prunevit.envs.vit.untouched import has_global_hooks, has_hooks, is_untouched

eager_block = torch.compiler.disable(packed_block)

# Rows of more bytes than this leave a CPU's caches between blocks, and the system has to allocate
# much of the memory for each block's results again, page by page. In chunks of 2 to 4 MiB,
# 1,024 images of 65 tokens of width 64 take three quarters of the time (one core), and 64 images of
# DeiT-S 0.9 to 0.97 of it; 256 and 32 images lose nothing.
CHUNK_BYTES = 1 << 22


@cache
def split_at_blocks(start: int, stop: int) -> tuple[tuple[int, Sublayer | None], ...]:
    """The blocks to which the sublayers ``start`` to ``stop - 1`` belong, each with the one of its
    sublayers that is among them, None if both are.
    """
    found: dict[int, list[Sublayer]] = {}
    for i in range(start, stop):
        found.setdefault(i // 2, []).append(get_args(Sublayer)[i % 2])
    return tuple((i, None if len(names) > 1 else names[0]) for i, names in found.items())


@torch.compiler.disable(recursive=False)
def run_sublayers(
    model: Any,
    ops: ModelOps,
    make: Callable[[], Tokens],
    start: int,
    stop: int,
    num_query_tokens: int | None,
    torch_compile: bool = False,
    chunked: bool = True,
) -> Tokens:
    """Runs the sublayers ``start`` to ``stop - 1``.

    Args:
        model: timm's model.
        ops: its operations.
        make: makes the tokens. Nothing else may hold them, or the memory of their rows is only
            freed after the last block.
        start: the first sublayer.
        stop: the sublayer after the last one.
        num_query_tokens: fill ``Tokens.attention`` with the attention received from this many first
            tokens in the last block, see ``packed_block``; None leaves it empty.
        torch_compile: compile the blocks of packed execution, unless gradients may be needed.
            Blocks of which one sublayer runs alone are not compiled.
        chunked: run large batches in chunks of images where that is allowed.
    """
    tokens = make()
    anyone = has_global_hooks()
    masked = tokens.layout is None  # masked execution runs timm's blocks, dropout included
    blocks = split_at_blocks(start, stop)
    untouched = [not anyone and is_untouched(model.blocks[i], masked) for i, _ in blocks]
    if chunked and blocks and not masked and all(untouched):
        count = num_chunks(model, len(tokens.x), len(tokens.alive), torch_compile)
        if count > 1:
            return _run_chunks(model, ops, tokens, start, stop, num_query_tokens, count)
    x, received = tokens.x, None
    tokens = replace(tokens, x=x.new_empty(0))
    gradients = torch.is_grad_enabled()
    # the operators that hide layouts from compilers have no gradients
    packed = eager_block if gradients else compile_block() if torch_compile else packed_block
    own, timms = (masked_block, timm_block_on_slots) if masked else (packed, timm_block)
    where: Any = tokens.alive if masked else tokens.layout
    log_size = None if tokens.size is None else tokens.size.log().to(x.dtype)
    recomputes = model.grad_checkpointing and gradients
    for (i, sublayer), plain in zip(blocks, untouched, strict=True):
        rotary = tokens.rotary.of_block(i) if tokens.rotary else None
        queries = num_query_tokens if i == blocks[-1][0] else None
        arguments = (BlockCall(ops, model.blocks[i], rotary, queries, log_size, sublayer), x, where)
        run = timms if not plain else eager_block if sublayer and not masked else own
        # as timm's models do: what a block computes for the backward pass is computed again there
        x, received = checkpoint(run, *arguments) if recomputes else run(*arguments)
    segment = Segment(tokens.alive, start, stop, received is not None)
    return replace(tokens, x=x, attention=received, segments=(*tokens.segments, segment))


# not for a compiler: the number and the sizes of chunks differ from batch to batch
@torch.compiler.disable
def _run_chunks(
    model: Any,
    ops: ModelOps,
    tokens: Tokens,
    start: int,
    stop: int,
    num_query_tokens: int | None,
    count: int,
) -> Tokens:
    """``run_sublayers`` on ``count`` chunks of about as many rows each, one after the other."""
    assert tokens.layout is not None
    x, received = torch.empty_like(tokens.x), []
    for rows, layout in tokens.layout.split(count):
        rotary = tokens.rotary.slice_rows(rows) if tokens.rotary else None
        size = None if tokens.size is None else tokens.size[rows]
        chunk = replace(tokens, x=tokens.x[rows], layout=layout, rotary=rotary, size=size)
        out = run_sublayers(
            model, ops, lambda c=chunk: c, start, stop, num_query_tokens, chunked=False
        )
        x[rows] = out.x
        if out.attention is not None:
            received.append(out.attention)
    segment = Segment(tokens.alive, start, stop, bool(received))
    attention = torch.cat(received) if received else None
    return replace(tokens, x=x, attention=attention, segments=(*tokens.segments, segment))


@torch.compiler.disable
def embed_chunks(
    model: Any, ops: ModelOps, images: Tensor, count: int
) -> tuple[Tensor, RotaryEmbedding | None]:
    """``ops.embed`` on ``count`` chunks of ``images``, one after the other."""
    chunks = [ops.embed(model, chunk) for chunk in images.tensor_split(count)]
    return torch.cat([x for x, _ in chunks]), chunks[0][1]


@torch.compiler.disable
def num_chunks(model: Any, rows: int, images: int, torch_compile: bool) -> int:
    """In how many chunks to run ``images`` images of ``rows`` tokens together.

    More than one only for large batches on a CPU, and only if nobody can tell the difference:
    without gradients, autocast, tracing, training mode and hooks.
    """
    weight = some_tensor(model)
    size = rows * model.embed_dim * weight.dtype.itemsize
    if size <= CHUNK_BYTES or weight.device.type != "cpu" or torch_compile:
        return 1
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
        return 1
    if any(module.training for module in model.modules()) or has_hooks(model):
        return 1
    return min(math.ceil(size / CHUNK_BYTES), images)
