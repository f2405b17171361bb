"""Attention over packed images: no token sees a token of another image."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from prunevit.envs.vit.layout import Layout

# On a CPU the fused kernel takes about 2 us per head and image, however few rows there are and
# however many threads. From this many images on, and up to this many rows, two batched matrix
# products take half of that (measured on two cores).
MANY_IMAGES = 8
SHORT_ROWS = 32
HALF_PRECISION = (torch.float16, torch.bfloat16)
AMPERE = (8, 0)  # compute capability
HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: Tensor | None = None
) -> Tensor:
    """Softmax attention within each image of a packed tensor.

    Args:
        q: queries [S, heads, head_dim].
        k: keys [S, heads, head_dim].
        v: values [S, heads, head_dim].
        layout: which rows belong to which image.
        bias: what is added to all scores of each key, [S]; None for nothing.

    Returns:
        [S, heads * head_dim].
    """
    if bias is None and has_varlen_kernel(q):  # it takes no bias
        from torch.nn.attention.varlen import varlen_attn

        cu_seqlens, max_seqlen = layout.cu_seqlens, layout.max_seqlen
        mixed = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        assert isinstance(mixed, Tensor)  # without return_aux
        return mixed.flatten(1)
    # what differs from layout to layout is no business of a compiler
    attend = _opaque_attend if torch.compiler.is_compiling() else _attend
    padding, biased = layout.padding, bias is not None
    if padding is None:
        return attend(q, k, v, layout.buckets, bias, biased)
    q, k, v = (rows.index_select(0, padding.row) for rows in (q, k, v))
    mask = padding.bias if bias is None else padding.bias + bias.index_select(0, padding.row)
    return attend(q, k, v, layout.buckets, mask, biased).index_select(0, padding.cell)


def has_varlen_kernel(q: Tensor) -> bool:
    """Whether attention over rows of different length has a kernel for ``q``: in half precision, on
    an NVIDIA GPU from Ampere on, from torch 2.10 on.
    """
    return (
        HAS_VARLEN
        and q.device.type == "cuda"
        and q.dtype in HALF_PRECISION
        and torch.cuda.get_device_capability(q.device) >= AMPERE
    )


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over images of one length: q, k, v [B, heads, L, head_dim], additive mask."""
    images, _, length, size = q.shape
    short = q.device.type == "cpu" and images >= MANY_IMAGES and length <= SHORT_ROWS
    if not short:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q @ k.transpose(-1, -2)).mul_(size**-0.5)
    if mask is not None:
        scores = scores.add_(mask)
    return scores.softmax(-1) @ v


def _attend(
    q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, bias: Tensor | None, biased: bool
) -> Tensor:
    """Attention over cells, one call a bucket.

    [cells, heads, head_dim] -> [cells, heads * head_dim]. Without ``biased``, ``bias`` is zero in
    buckets without padding, and left away there.
    """
    mixed, start = [], 0
    for images, length, padded in buckets.view(-1, 3).tolist():
        stop = start + images * length
        mask = None
        if bias is not None and (padded or biased):
            mask = bias[start:stop].view(images, 1, 1, length).to(q.dtype)
        queries, keys, values = (
            rows[start:stop].unflatten(0, (images, length)).transpose(1, 2) for rows in (q, k, v)
        )
        out = _softmax_attention(queries, keys, values, mask)
        mixed.append(out.transpose(1, 2).reshape(images * length, -1))
        start = stop
    if len(mixed) == 1:
        return mixed[0]
    return torch.cat(mixed) if mixed else q.flatten(1)


@torch.library.custom_op("prunevit::attend", mutates_args=())
def _opaque_attend(
    q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, bias: Tensor | None, biased: bool
) -> Tensor:
    """``_attend`` as one operator without a gradient."""
    return _attend(q, k, v, buckets, bias, biased)


@_opaque_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, bias: Tensor | None, biased: bool
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])


def attention_received(
    q: Tensor, k: Tensor, layout: Layout, num_query_tokens: int, bias: Tensor | None = None
) -> Tensor:
    """The attention that every row receives from one query of its image, averaged over heads.

    With the query of the class token this is the first row of each image's attention matrix.

    Args:
        q: queries of all rows [S, heads, head_dim].
        k: keys of all rows [S, heads, head_dim].
        layout: which rows belong to which image.
        num_query_tokens: an image's query is the mean of those of this many first tokens, or of all
            its tokens if 0.
        bias: what is added to the score of each key, [S]; None for nothing.

    Returns:
        [S]; sums to 1 over each image.
    """
    receive = _opaque_received if torch.compiler.is_compiling() else _received
    received = receive(q, k, layout.image, layout.buckets, num_query_tokens, bias)
    assert isinstance(received, Tensor)
    return received


def _received(
    q: Tensor,
    k: Tensor,
    image: Tensor,
    buckets: Tensor,
    num_query_tokens: int,
    bias: Tensor | None,
) -> Tensor:
    calls = buckets.view(-1, 3).tolist()
    scale = q.shape[-1] ** -0.5
    if len(calls) == 1 and not calls[0][2]:
        # images of one length need no gathering
        queries, keys = (rows.unflatten(0, calls[0][:2]) for rows in (q, k))
        query = queries[:, : num_query_tokens or None].mean(1, keepdim=True)
        scores = (keys * query).sum(-1) * scale  # [B, L, heads]
        if bias is not None:
            scores = scores + bias.view(*scores.shape[:2], 1)
        return scores.softmax(1).mean(-1).flatten()
    images = sum(call[0] for call in calls)
    query = _mean_query(q, image, images, num_query_tokens)
    scores = (query[image] * k).sum(-1) * scale  # [S, heads]
    if bias is not None:
        scores = scores + bias[:, None]
    if scores.dtype in HALF_PRECISION:
        scores = scores.float()  # sums of half precision stop growing
    index = image[:, None].expand_as(scores)
    best = scores.new_full((images, scores.shape[1]), -torch.inf)
    best = best.scatter_reduce(0, index, scores, "amax")
    weights = (scores - best[image]).exp()
    total = torch.zeros_like(best).index_add(0, image, weights)
    return (weights / total[image]).mean(1)


def _mean_query(q: Tensor, image: Tensor, images: int, num_query_tokens: int) -> Tensor:
    """The query of each image: [S, heads, head_dim] -> [B, heads, head_dim]."""
    if not num_query_tokens:
        wide = q.float() if q.dtype in HALF_PRECISION else q
        total = wide.new_zeros(images, *q.shape[1:]).index_add(0, image, wide)
        count = image.new_zeros(images).index_add(0, image, torch.ones_like(image))
        return (total / count.to(wide.dtype)[:, None, None]).to(q.dtype)
    starts = torch.searchsorted(image, torch.arange(images, device=q.device))
    return q[starts[:, None] + torch.arange(num_query_tokens, device=q.device)].mean(1)


@torch.library.custom_op("prunevit::attention_received", mutates_args=())
def _opaque_received(
    q: Tensor,
    k: Tensor,
    image: Tensor,
    buckets: Tensor,
    num_query_tokens: int,
    bias: Tensor | None,
) -> Tensor:
    """``_received`` as one operator without a gradient."""
    return _received(q, k, image, buckets, num_query_tokens, bias).to(q.dtype)


@_opaque_received.register_fake
def _(
    q: Tensor,
    k: Tensor,
    image: Tensor,
    buckets: Tensor,
    num_query_tokens: int,
    bias: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape[0])
