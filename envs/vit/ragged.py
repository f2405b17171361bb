"""Rows of different length packed in one tensor, and attention over them.

B images with ``lengths`` tokens each lie one after the other, without gaps, in a tensor of
``S = sum(lengths)`` rows.
Row-wise layers (linear, norm, MLP) need nothing more; only attention must know where an image ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

# Images are padded to the max_seqlen of their bucket; buckets are ranges of length this many tokens
# wide. Width 1 pads nothing: images of one length share a call.
BUCKET_WIDTHS = (1, 4, 16, 1 << 30)
# What decides between them on a CPU, fitted to one core (x86, AVX-512): the fixed cost of a call, a
# call's cost per multiply-accumulate, and the cost per number of gathering padded rows and their
# results. Threads share the last two, and each call keeps its first.
CALL_SECONDS = 30e-6
MAC_SECONDS = 1 / 20e9
GATHER_SECONDS = 1 / 1.5e9
# On a CPU the fused kernel takes about 2 us a head and image however short the rows are, threads or
# not: two batched products take half of that from so many images on, up to so many rows each
# (measured on two cores).
MANY_IMAGES = 8
SHORT_ROWS = 32
HALF_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Padding:
    """Cells: the rows again, in buckets of images that are padded to the max_seqlen among them.

    Attributes:
        row: the row that stands in each cell, int64 [cells].
        cell: the cell of each row, int64 [S].
        bias: float32 [cells], 0 on rows and -inf where padded.
    """

    row: Tensor
    cell: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Layout:
    """Where the images of a packed tensor begin and end; made once a stage, used by every layer of
    it.

    Attributes:
        lengths: rows of each image in packed order, int64 [B], on the host.
        starts: row at which each image begins, int64 [B].
        image: packed place of the image that each row belongs to, int64 [S].
        width: numbers that attention handles a row (heads times head size).
        uniform_length: rows of every image, where all have as many; else None.
        buckets: how attention goes through the cells, int64 [buckets, 3] on the host: images,
            cells of an image, and whether some of these are padding.
        padding: the cells; None where they are the rows themselves.
        cu_seqlens: cumulative lengths, int32 [B + 1], as variable-length kernels take them.
        max_seqlen: rows of the longest image.
    """

    lengths: NDArray[np.int64]
    starts: Tensor
    image: Tensor
    width: int
    uniform_length: int | None
    buckets: Tensor
    padding: Padding | None
    cu_seqlens: Tensor
    max_seqlen: int

    @staticmethod
    @torch.compiler.disable
    def of(lengths: NDArray[np.int64], width: int, device: torch.device) -> Layout:
        """Lays out images of ``lengths`` rows, at least one each; ascending lengths make the best
        buckets.
        """
        if len(lengths) and (lengths == lengths[0]).all():
            return Layout.uniform(len(lengths), int(lengths[0]), width, device)
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        on_device = torch.from_numpy(lengths).to(device)
        edges = _edges(lengths, width, device)
        buckets = _buckets(lengths, edges)
        return Layout(
            lengths=lengths,
            starts=torch.from_numpy(cu_seqlens[:-1]).to(device),
            image=torch.repeat_interleave(on_device, output_size=int(cu_seqlens[-1])),
            width=width,
            uniform_length=None,
            buckets=torch.from_numpy(buckets),
            padding=_pad(lengths, buckets, device),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)).to(device),
            max_seqlen=int(lengths.max(initial=0)),
        )

    @staticmethod
    @torch.compiler.disable
    def uniform(images: int, length: int, width: int, device: torch.device) -> Layout:
        """Lays out images of one length: one bucket, without padding."""
        if not images:
            return Layout.of(np.zeros(0, np.int64), width, device)
        first = torch.arange(0, images * length, length, device=device)
        alone = images == 1
        return Layout(
            lengths=np.full(images, length, np.int64),
            starts=first,
            image=first.expand(length) if alone else _owners(images, length, device),
            width=width,
            uniform_length=length,
            buckets=torch.tensor([[images, length, 0]]),
            padding=None,
            cu_seqlens=torch.arange(
                0, (images + 1) * length, length, dtype=torch.int32, device=device
            ),
            max_seqlen=length,
        )

    def split(self, count: int) -> list[tuple[slice, Layout]]:
        """``count`` neighbours of about as many rows each, or fewer; images stay whole. Where each
        part's rows stand, and their layout.
        """
        cu_seqlens = np.concatenate([[0], np.cumsum(self.lengths)])
        ideal = np.linspace(0, cu_seqlens[-1], count + 1)
        edges = np.unique(np.searchsorted(cu_seqlens, ideal))
        return [
            (
                slice(int(cu_seqlens[first]), int(cu_seqlens[last])),
                Layout.of(self.lengths[first:last], self.width, self.starts.device),
            )
            for first, last in pairwise(edges)
        ]

    def mean(self, rows: Tensor) -> Tensor:
        """Mean over each image's rows: [S, ...] -> [B, ...]."""
        total = rows.new_zeros(len(self.lengths), *rows.shape[1:]).index_add(0, self.image, rows)
        count = torch.from_numpy(self.lengths).to(rows.device, rows.dtype)
        return total / count.view(-1, *[1] * (rows.dim() - 1))

    def max(self, rows: Tensor) -> Tensor:
        """Maximum over each image's rows: [S, D] -> [B, D]."""
        index = self.image[:, None].expand_as(rows)
        lowest = rows.new_full((len(self.lengths), rows.shape[1]), -torch.inf)
        return lowest.scatter_reduce(0, index, rows, "amax")

    def pad(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pads rows [S, D] to [B, max_seqlen, D] with zeros.

        Returns:
            the padded rows, and bool [B, max_seqlen], True on rows.
        """
        valid = torch.from_numpy(np.arange(self.max_seqlen) < self.lengths[:, None]).to(rows.device)
        padded = rows.new_zeros(*valid.shape, rows.shape[1])
        place = torch.arange(len(rows), device=rows.device) - self.starts[self.image]
        return padded.index_put((self.image, place), rows), valid

    def without_first(self, rows: Tensor, count: int) -> tuple[Tensor, Layout]:
        """Drops the first ``count`` rows of every image."""
        if not count:
            return rows, self
        place = np.arange(len(rows)) - np.repeat(
            np.cumsum(self.lengths) - self.lengths, self.lengths
        )
        kept = torch.from_numpy(np.flatnonzero(place >= count)).to(rows.device)
        return rows.index_select(0, kept), Layout.of(self.lengths - count, self.width, rows.device)


def _owners(images: int, length: int, device: torch.device) -> Tensor:
    """The image of each row, where all have ``length``."""
    return torch.arange(images, device=device)[:, None].expand(-1, length).flatten()


def _edges(lengths: NDArray[np.int64], width: int, device: torch.device) -> NDArray[np.int64]:
    """Images at which buckets begin, and the end."""
    if device.type == "cpu" and len(lengths):
        ways = [_cut(lengths, bucket_width) for bucket_width in BUCKET_WIDTHS]
        return min(ways, key=lambda edges: _estimated_seconds(lengths, edges, width))
    # a GPU is short of work, not of arithmetic: one call
    return np.array([0, len(lengths)] if len(lengths) else [0])


def _cut(lengths: NDArray[np.int64], bucket_width: int) -> NDArray[np.int64]:
    """Edges wherever (length - 1) // bucket_width changes."""
    cuts = np.flatnonzero(np.diff((lengths - 1) // bucket_width)) + 1
    return np.concatenate([[0], cuts, [len(lengths)]])


def _estimated_seconds(lengths: NDArray[np.int64], edges: NDArray[np.int64], width: int) -> float:
    images, max_seqlen, padded = _buckets(lengths, edges).T
    cells = int((images * max_seqlen).sum())
    gathered = 4 * width * cells if padded.any() else 0
    shared = MAC_SECONDS * (2 * images * max_seqlen**2 * width).sum() + GATHER_SECONDS * gathered
    calls = len(images) + 4 * bool(gathered)
    return float(CALL_SECONDS * calls + shared / torch.get_num_threads())


def _buckets(lengths: NDArray[np.int64], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """``Layout.buckets``."""
    if not len(lengths):
        return np.zeros((0, 3), np.int64)
    max_seqlen = np.maximum.reduceat(lengths, edges[:-1])
    padded = np.minimum.reduceat(lengths, edges[:-1]) < max_seqlen
    return np.stack([np.diff(edges), max_seqlen, padded], axis=1)


def _pad(
    lengths: NDArray[np.int64], buckets: NDArray[np.int64], device: torch.device
) -> Padding | None:
    images, max_seqlen, padded = buckets.T
    if not padded.any():
        return None
    cells = np.repeat(max_seqlen, images)  # of each image
    end = np.cumsum(cells)
    place = np.arange(end[-1]) - np.repeat(end - cells, cells)
    length, first = (
        np.repeat(of_image, cells) for of_image in (lengths, np.cumsum(lengths) - lengths)
    )
    valid = place < length
    # padding repeats an image's last row: any row does, it is masked
    row = first + np.minimum(place, length - 1)
    bias = np.where(valid, np.float32(0), np.float32(-np.inf))
    return Padding(
        *(torch.from_numpy(part).to(device) for part in (row, np.flatnonzero(valid), bias))
    )


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Softmax attention in which no row sees another image's.

    Args:
        q: queries [S, heads, head_dim].
        k: keys, likewise.
        v: values, likewise.
        layout: whose rows they are.

    Returns:
        [S, heads * head_dim].
    """
    if q.device.type == "cuda" and q.dtype in HALF_PRECISION:
        from torch.nn.attention.varlen import varlen_attn

        cu_seqlens, max_seqlen = layout.cu_seqlens, layout.max_seqlen
        mixed = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        assert isinstance(mixed, Tensor)  # without return_aux
        return mixed.flatten(1)
    # how many buckets there are differs from batch to batch: a compiler must not look inside
    attend = _opaque_attend if torch.compiler.is_compiling() else _attend
    padding = layout.padding
    if padding is None:
        return attend(q, k, v, layout.buckets, None)
    q, k, v = (rows.index_select(0, padding.row) for rows in (q, k, v))
    return attend(q, k, v, layout.buckets, padding.bias).index_select(0, padding.cell)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over images of one length: q, k and v [B, heads, L, size]; mask added to scores."""
    images, _, length, size = q.shape
    short = q.device.type == "cpu" and images >= MANY_IMAGES and length <= SHORT_ROWS
    if not short:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q @ k.transpose(-1, -2)).mul_(size**-0.5)
    if mask is not None:
        scores = scores.add_(mask)
    return scores.softmax(-1) @ v


def _attend(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, bias: Tensor | None) -> Tensor:
    """Attention over cells, a call a bucket: [cells, heads, head_dim] -> [cells, heads *
    head_dim].
    """
    mixed, start = [], 0
    for images, length, padded in buckets.tolist():
        stop = start + images * length
        mask = None
        if padded and bias is not None:
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """``_attend`` as one operator without a gradient."""
    return _attend(q, k, v, buckets, bias)


@_opaque_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, bias: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])


def attention_received(q: Tensor, k: Tensor, layout: Layout) -> Tensor:
    """What each image's first row pays to every row of its image: one row of the attention matrix,
    mean over heads.

    Args:
        q: queries of the first rows [B, heads, head_dim].
        k: keys of all rows [S, heads, head_dim].
        layout: whose rows they are.

    Returns:
        [S]; sums to 1 over each image.
    """
    scale = q.shape[-1] ** -0.5
    if layout.uniform_length is not None:
        # images of one length need no gathering
        images = k.unflatten(0, (-1, layout.uniform_length))
        return ((images * q[:, None]).sum(-1) * scale).softmax(1).mean(-1).flatten()
    scores = (q[layout.image] * k).sum(-1) * scale  # [S, heads]
    index = layout.image[:, None].expand_as(scores)
    best = scores.new_full((len(layout.lengths), scores.shape[1]), -torch.inf)
    best = best.scatter_reduce(0, index, scores, "amax")
    weights = (scores - best[layout.image]).exp()
    total = torch.zeros_like(best).index_add(0, layout.image, weights)
    return (weights / total[layout.image]).mean(1)
