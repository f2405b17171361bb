"""``Layout``: images of different numbers of tokens packed in one tensor, without padding.

B images with ``lengths`` tokens each are stored one after the other in a tensor of
S = sum(lengths) rows. Layers that work row by row (linear, norm, MLP) need to know nothing about
it. Only attention must know where an image ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# On a CPU, attention runs once per bucket of images of similar length, which are padded to the
# longest of them. A bucket spans this many lengths: width 1 pads nothing.
BUCKET_WIDTHS = (1, 4, 16, 1 << 30)
# The cost model that chooses the bucket width, fitted on one x86 core with AVX-512: the fixed cost
# of a call, the cost of a multiply-accumulate, and the cost of gathering one number into the padded
# rows and back. Threads share the last two but not the first.
CALL_SECONDS = 30e-6
MAC_SECONDS = 1 / 20e9
GATHER_SECONDS = 1 / 1.5e9


@dataclass(frozen=True)
class Padding:
    """How packed rows are spread over cells: buckets of images padded to equal length.

    Attributes:
        row: the row that each cell holds, int64 [cells].
        cell: the cell that holds each row, int64 [S].
        bias: attention bias of each cell, 0 on rows and -inf on padding, float32 [cells].
    """

    row: Tensor
    cell: Tensor
    bias: Tensor


# not frozen: of a frozen one, the compiler of torch 2.6 looks at all fields, used or not
@dataclass(eq=False)
class Layout:
    """Where the images of a packed tensor begin and end; made once a stage, used by every layer.

    Attributes:
        lengths: rows of each image in packed order, int64 [B], on the host.
        starts: first row of each image, int64 [B].
        image: packed index of the image that each row belongs to, int64 [S].
        width: attention width of a row: heads times head size.
        uniform_length: rows of every image if all have the same number, else None.
        buckets: the attention calls, int64 [3 * buckets] on the host: of each call the number of
            images, cells of an image, and whether any of them is padding. Flat, since compilers
            take a dimension of size 1 for another kind of tensor.
        padding: how rows are spread over cells; None if the cells are the rows themselves.
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
        """Lays out images of ``lengths`` rows, at least one each.

        Ascending lengths give the best buckets.
        """
        if len(lengths) and (lengths == lengths[0]).all():
            return Layout.uniform(len(lengths), int(lengths[0]), width, device)
        cu_seqlens = _cumulative(lengths)
        on_device = to_device(lengths, device)
        edges = _edges(lengths, width, device)
        buckets = _buckets(lengths, edges)
        return Layout(
            lengths=lengths,
            starts=to_device(cu_seqlens[:-1], device),
            image=torch.repeat_interleave(on_device, output_size=int(cu_seqlens[-1])),
            width=width,
            uniform_length=None,
            buckets=torch.from_numpy(buckets.flatten()),
            padding=_pad(lengths, buckets, device),
            cu_seqlens=to_device(cu_seqlens.astype(np.int32), device),
            max_seqlen=int(lengths.max(initial=0)),
        )

    @staticmethod
    @torch.compiler.disable
    def uniform(images: int, length: int, width: int, device: torch.device) -> Layout:
        """Lays out images of one length: one bucket, without padding."""
        if not images:
            return Layout.of(np.zeros(0, np.int64), width, device)
        starts = torch.arange(0, images * length, length, device=device)
        ends = (images + 1) * length
        return Layout(
            lengths=np.full(images, length, np.int64),
            starts=starts,
            image=_image_of_row(images, length, device),
            width=width,
            uniform_length=length,
            buckets=torch.tensor([images, length, 0]),
            padding=None,
            cu_seqlens=torch.arange(0, ends, length, dtype=torch.int32, device=device),
            max_seqlen=length,
        )

    def split(self, count: int) -> list[tuple[slice, Layout]]:
        """Splits the images into at most ``count`` chunks of about as many rows each.

        Returns:
            the rows of each chunk, and their layout.
        """
        cu_seqlens = _cumulative(self.lengths)
        ideal = np.linspace(0, cu_seqlens[-1], count + 1)
        parts = self._cut_at(np.unique(np.searchsorted(cu_seqlens, ideal)))
        device = self.starts.device
        return [(rows, Layout.of(lengths, self.width, device)) for rows, lengths in parts]

    def groups(self) -> list[tuple[slice, int, int]]:
        """Splits the images into runs of one length.

        Returns:
            of each run its rows, its number of images, and their length.
        """
        if not len(self.lengths):
            return []
        parts = self._cut_at(_cut(self.lengths, 1))
        return [(rows, len(lengths), int(lengths[0])) for rows, lengths in parts]

    def _cut_at(self, edges: NDArray[np.int64]) -> list[tuple[slice, NDArray[np.int64]]]:
        """Rows and lengths of the images between each two of ``edges``, numbers of images."""
        ends = _cumulative(self.lengths).tolist()
        return [(slice(ends[i], ends[j]), self.lengths[i:j]) for i, j in pairwise(edges.tolist())]

    def mean(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Averages over each image's rows, with the weights [S] of rows: [S, ...] -> [B, ...]."""
        # sums of half precision would overflow, or stop growing
        wide = rows.float() if rows.dtype.itemsize < 4 else rows
        if weight is not None:
            share = weight / self.mean(weight)[self.image]
            wide = wide * share.view(-1, *[1] * (rows.dim() - 1))
        total = wide.new_zeros(len(self.lengths), *rows.shape[1:]).index_add(0, self.image, wide)
        count = to_device(self.lengths, wide.device).to(wide.dtype)
        return (total / count.view(-1, *[1] * (rows.dim() - 1))).to(rows.dtype)

    def max(self, rows: Tensor) -> Tensor:
        """Takes the maximum over each image's rows: [S, D] -> [B, D]."""
        index = self.image[:, None].expand_as(rows)
        lowest = rows.new_full((len(self.lengths), rows.shape[1]), -torch.inf)
        return lowest.scatter_reduce(0, index, rows, "amax")

    def pad(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pads rows [S, D] with zeros.

        Returns:
            the padded rows [B, max_seqlen, D], and bool [B, max_seqlen], True on rows.
        """
        valid = to_device(np.arange(self.max_seqlen) < self.lengths[:, None], rows.device)
        padded = rows.new_zeros(*valid.shape, rows.shape[1])
        place = torch.arange(len(rows), device=rows.device) - self.starts[self.image]
        return padded.index_put((self.image, place), rows), valid

    def without_first(self, rows: Tensor, count: int) -> tuple[Tensor, Layout]:
        """Drops the first ``count`` rows of every image; returns the rest and their layout."""
        if not count:
            return rows, self
        place = np.arange(len(rows)) - np.repeat(
            np.cumsum(self.lengths) - self.lengths, self.lengths
        )
        kept = to_device(np.flatnonzero(place >= count), rows.device)
        return rows.index_select(0, kept), Layout.of(self.lengths - count, self.width, rows.device)


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of ``array`` on a device, where the host waits for nothing that is under way there."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def _cumulative(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row at which each image begins, and the number of rows at the end."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _image_of_row(images: int, length: int, device: torch.device) -> Tensor:
    """``Layout.image`` of images of one length."""
    if images == 1:
        return torch.zeros(length, dtype=torch.int64, device=device)
    return torch.arange(images, device=device)[:, None].expand(-1, length).flatten()


def _edges(lengths: NDArray[np.int64], width: int, device: torch.device) -> NDArray[np.int64]:
    """Images at which buckets begin, and the number of images at the end."""
    if device.type == "cpu" and len(lengths):
        candidates = [_cut(lengths, bucket_width) for bucket_width in BUCKET_WIDTHS]
        return min(candidates, key=lambda edges: _estimated_seconds(lengths, edges, width))
    # a GPU is limited by the number of calls, not by arithmetic: one call
    return np.array([0, len(lengths)] if len(lengths) else [0])


def _cut(lengths: NDArray[np.int64], bucket_width: int) -> NDArray[np.int64]:
    """Edges wherever (length - 1) // bucket_width changes."""
    cuts = np.flatnonzero(np.diff((lengths - 1) // bucket_width)) + 1
    return np.concatenate([[0], cuts, [len(lengths)]])


def _estimated_seconds(lengths: NDArray[np.int64], edges: NDArray[np.int64], width: int) -> float:
    images, longest, padded = _buckets(lengths, edges).T
    cells = int((images * longest).sum())
    gathered = 4 * width * cells if padded.any() else 0
    shared = MAC_SECONDS * (2 * images * longest**2 * width).sum() + GATHER_SECONDS * gathered
    calls = len(images) + 4 * bool(gathered)
    return float(CALL_SECONDS * calls + shared / torch.get_num_threads())


def _buckets(lengths: NDArray[np.int64], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """``Layout.buckets``, [buckets, 3]."""
    if not len(lengths):
        return np.zeros((0, 3), np.int64)
    longest = np.maximum.reduceat(lengths, edges[:-1])
    padded = np.minimum.reduceat(lengths, edges[:-1]) < longest
    return np.stack([np.diff(edges), longest, padded], axis=1)


def _pad(
    lengths: NDArray[np.int64], buckets: NDArray[np.int64], device: torch.device
) -> Padding | None:
    """``Layout.padding``."""
    images, longest, padded = buckets.T
    if not padded.any():
        return None
    cells = np.repeat(longest, images)  # of each image
    end = np.cumsum(cells)
    place = np.arange(end[-1]) - np.repeat(end - cells, cells)
    length, start = (
        np.repeat(of_image, cells) for of_image in (lengths, np.cumsum(lengths) - lengths)
    )
    valid = place < length
    # padding repeats an image's last row: any row will do, since it is masked
    row = start + np.minimum(place, length - 1)
    bias = np.where(valid, np.float32(0), np.float32(-np.inf))
    return Padding(*(to_device(part, device) for part in (row, np.flatnonzero(valid), bias)))
