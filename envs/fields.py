"""The fields that observations are made of: their names, sizes and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunevit.envs.vit.layout import Layout
from prunevit.envs.vit.staged_vit import StagedViT

FIELDS = (
    "token", "cls", "stage", "position", "cls_attention", "redundancy", "alive_fraction", "alpha",
)  # fmt: skip
DEFAULT_FIELDS = ("token", "cls", "stage", "cls_attention")
POSITION_OCTAVES = 2
ALPHA_FLOOR = 1e-3  # agents can't tell smaller values of alpha apart


@dataclass(frozen=True)
class RowField:
    """A field of an observation in the order of packed rows.

    Attributes:
        values: of the rows [S, size], of their images [B, size], or of all [1, size].
        columns: columns of the field in an observation.
        of_rows: whether each row has its own value.
    """

    values: Tensor
    columns: slice
    of_rows: bool


@dataclass(frozen=True)
class Rows:
    """Observations of packed rows, prefix tokens included, without gathering them.

    Attributes:
        fields: the fields of an observation, in its order.
        layout: layout of the rows.
    """

    fields: tuple[RowField, ...]
    layout: Layout

    def column(self, index: int) -> Tensor:
        """The field of size 1 at column ``index``, [S], or [1] if it is the same for all."""
        return next(field.values[:, 0] for field in self.fields if field.columns.start == index)


def field_size(backbone: StagedViT, field: str) -> int:
    """Number of values that ``field`` adds to an observation."""
    return {
        "token": backbone.width,
        "cls": backbone.width,
        "stage": backbone.num_stages,
        "position": 2 + 4 * POSITION_OCTAVES,
        "cls_attention": 1,
        "redundancy": 1,
        "alive_fraction": 1,
        "alpha": 1,
    }[field]


def field_slices(backbone: StagedViT, fields: Sequence[str]) -> dict[str, slice]:
    """Computes the columns of each of ``fields`` in an observation made of them, in this order.

    Raises:
        ValueError: a field is unknown or named twice, or there is none.
    """
    unknown = [field for field in fields if field not in FIELDS]
    if unknown or not fields or len(set(fields)) < len(fields):
        raise ValueError(
            f"observation fields {tuple(fields)}: "
            f"name one or more of {', '.join(FIELDS)}, each once"
        )
    slices, start = {}, 0
    for field in fields:
        slices[field] = slice(start, start + field_size(backbone, field))
        start = slices[field].stop
    return slices


def state_size(backbone: StagedViT) -> int:
    """D_state, the size of the global state."""
    return 2 * backbone.width + backbone.num_stages + 1


def patch_positions(backbone: StagedViT) -> Tensor:
    """Encodes the position of each patch, float32 [N, size].

    The row and column in -1..1, and their sines and cosines at ``POSITION_OCTAVES`` frequencies.
    """
    rows, columns = backbone.grid_size
    places = (torch.linspace(-1, 1, n, dtype=torch.float32) for n in (rows, columns))
    row, column = torch.meshgrid(*places, indexing="ij")
    place = torch.stack([row.flatten(), column.flatten()], dim=1)
    waves = [place * math.pi * 2**octave for octave in range(POSITION_OCTAVES)]
    return torch.cat([place] + [wave for w in waves for wave in (w.sin(), w.cos())], dim=1)
