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

# Images are padded to the longest of their bucket; buckets are ranges of length this many tokens
# wide. Width 1 pads nothing: images of one length share a call.
BUCKET_WIDTHS = (1, 4, 16, 1 << 30)
# What decides between them on a CPU, fitted to one core (x86, AVX-512): the fixed cost of a call, a
# call's cost per multiply-accumulate, and the cost per number of gathering padded rows and their
# results.
CALL_SECONDS = 25e-6
MAC_SECONDS = 1 / 20e9
GATHER_SECONDS = 1 / 1.5e9


@dataclass(frozen=True)
class Bucket:
    """Consecutive images that attention handles in one call.

    Attributes:
        start: first packed row.
        stop: one past the last packed row.
        images: how many images.
        length: the longest of them.
        index: int64 [images * length], the row (from ``start``) that stands at each padded place;
            None where all are of one length and nothing is padded.
        valid: bool [images, 1, 1, length], False where padded; None likewise.
        unpad: int64 [stop - start], the padded place of each row; None likewise.
    """

    start: int
    stop: int
    images: int
    length: int
    index: Tensor | None = None
    valid: Tensor | None = None
    unpad: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """Where the images of a packed tensor begin and end; made once a stage, used by every layer of
    it.

    Attributes:
        lengths: rows of each image in packed order, int64 [B], on the host.
        first: row at which each image begins, int64 [B].
        image: packed place of the image that each row belongs to, int64 [S].
        width: numbers that attention handles a row (heads times head size).
        buckets: how attention goes through the images.
    """

    lengths: NDArray[np.int64]
    first: Tensor
    image: Tensor
    width: int
    buckets: tuple[Bucket, ...]

    @staticmethod
    def of(lengths: NDArray[np.int64], width: int, device: torch.device) -> Layout:
        """Lays out images of ``lengths`` rows, at least one each; ascending lengths make the best
        buckets.
        """
        on_device = torch.from_numpy(lengths).to(device)
        return Layout(
            lengths=lengths,
            first=on_device.cumsum(0) - on_device,
            image=torch.repeat_interleave(on_device, output_size=int(lengths.sum())),
            width=width,
            buckets=_buckets(lengths, width, device),
        )

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
        """Rows [S, D] -> [B, longest, D], zeros behind an image's last row, and bool [B, longest],
        True on rows.
        """
        longest = int(self.lengths.max(initial=0))
        valid = torch.from_numpy(np.arange(longest) < self.lengths[:, None]).to(rows.device)
        padded = rows.new_zeros(*valid.shape, rows.shape[1])
        place = torch.arange(len(rows), device=rows.device) - self.first[self.image]
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


def _buckets(lengths: NDArray[np.int64], width: int, device: torch.device) -> tuple[Bucket, ...]:
    if not len(lengths):
        return ()
    if device.type == "cpu":
        edges = min(
            (_edges(lengths, w) for w in BUCKET_WIDTHS), key=lambda e: _seconds(lengths, e, width)
        )
    else:
        # a GPU is short of work, not of arithmetic: one call
        edges = np.array([0, len(lengths)])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return tuple(
        _bucket(lengths[low:high], int(starts[low]), device) for low, high in pairwise(edges)
    )


def _edges(lengths: NDArray[np.int64], bucket_width: int) -> NDArray[np.int64]:
    """Where buckets begin, and the end: ``lengths`` is cut wherever (length - 1) // bucket_width
    changes.
    """
    cuts = np.flatnonzero(np.diff((lengths - 1) // bucket_width)) + 1
    return np.concatenate([[0], cuts, [len(lengths)]])


def _seconds(lengths: NDArray[np.int64], edges: NDArray[np.int64], width: int) -> float:
    images = np.diff(edges)
    longest = np.maximum.reduceat(lengths, edges[:-1])
    padded = np.minimum.reduceat(lengths, edges[:-1]) < longest
    return float(
        CALL_SECONDS * len(images)
        + MAC_SECONDS * (2 * images * longest**2 * width).sum()
        + ((4 * GATHER_SECONDS * width * images * longest + 2 * CALL_SECONDS) * padded).sum()
    )


def _bucket(lengths: NDArray[np.int64], start: int, device: torch.device) -> Bucket:
    images, longest, rows = len(lengths), int(lengths.max()), int(lengths.sum())
    if lengths.min() == longest:
        return Bucket(start, start + rows, images, longest)
    place = np.arange(longest)
    valid = place < lengths[:, None]
    # padding repeats an image's last row: any row does, it is masked
    first = np.cumsum(lengths) - lengths
    index = first[:, None] + np.minimum(place, lengths[:, None] - 1)
    return Bucket(
        start,
        start + rows,
        images,
        longest,
        index=torch.from_numpy(index.reshape(-1)).to(device),
        valid=torch.from_numpy(valid[:, None, None, :]).to(device),
        unpad=torch.from_numpy(np.flatnonzero(valid)).to(device),
    )


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Softmax attention in which no row sees another image's.

    Args:
        q: queries [S, heads, head_dim].
        k: keys, likewise.
        v: values, likewise.
        layout: whose rows they are.

    Returns:
        [S, heads * head_dim].
    """
    parts = [_attend(q, k, v, bucket) for bucket in layout.buckets]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else q.flatten(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket) -> Tensor:
    def heads_first(rows: Tensor) -> Tensor:
        rows = rows[bucket.start : bucket.stop]
        if bucket.index is not None:
            rows = rows.index_select(0, bucket.index)
        return rows.unflatten(0, (bucket.images, bucket.length)).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        heads_first(q), heads_first(k), heads_first(v), attn_mask=bucket.valid
    )
    rows = out.transpose(1, 2).reshape(bucket.images * bucket.length, -1)
    return rows if bucket.unpad is None else rows.index_select(0, bucket.unpad)


def first_row_attention(q: Tensor, k: Tensor, layout: Layout) -> Tensor:
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
    if len(layout.buckets) == 1 and layout.buckets[0].index is None:
        # images of one length need no gathering
        images = k.unflatten(0, (layout.buckets[0].images, layout.buckets[0].length))
        return ((images * q[:, None]).sum(-1) * scale).softmax(1).mean(-1).flatten()
    scores = (q[layout.image] * k).sum(-1) * scale  # [S, heads]
    index = layout.image[:, None].expand_as(scores)
    best = scores.new_full((len(layout.lengths), scores.shape[1]), -torch.inf)
    best = best.scatter_reduce(0, index, scores, "amax")
    weights = (scores - best[layout.image]).exp()
    total = torch.zeros_like(best).index_add(0, layout.image, weights)
    return (weights / total[layout.image]).mean(1)
