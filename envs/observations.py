"""What can be seen at a stage: fields of each living patch, and the global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from prunevit.envs.vit.layout import Layout
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.tokens import Tokens

FIELDS = ("token", "cls", "stage", "position", "cls_attention", "alive_fraction", "alpha")
DEFAULT_FIELDS = ("token", "cls", "stage", "cls_attention")
POSITION_OCTAVES = 2
ALPHA_FLOOR = 1e-3  # of compute: below it agents see no difference


@dataclass(frozen=True)
class RowField:
    """A field in the order of packed rows.

    Attributes:
        values: [S, size] of the rows, [B, size] of the images they belong to, or [1, size] of all.
        columns: where the field stands in an observation.
        of_rows: whether each row has its own.
    """

    values: Tensor
    columns: slice
    of_rows: bool


@dataclass(frozen=True)
class Rows:
    """What packed rows show, prefix tokens too; nothing is gathered or written out for it.

    Attributes:
        fields: of an observation, in its order.
        layout: of the rows.
    """

    fields: tuple[RowField, ...]
    layout: Layout

    def column(self, index: int) -> Tensor:
        """The field of one number that stands there, [S], or [1] where it is one for all."""
        return next(field.values[:, 0] for field in self.fields if field.columns.start == index)


def field_size(backbone: StagedViT, field: str) -> int:
    """Numbers that ``field`` adds to an observation."""
    return {
        "token": backbone.width,
        "cls": backbone.width,
        "stage": backbone.num_stages,
        "position": 2 + 4 * POSITION_OCTAVES,
        "cls_attention": 1,
        "alive_fraction": 1,
        "alpha": 1,
    }[field]


def field_slices(backbone: StagedViT, fields: Sequence[str]) -> dict[str, slice]:
    """Where each of ``fields`` stands in an observation made of them, in this order.

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
    """D_state."""
    return 2 * backbone.width + backbone.num_stages + 1


class View:
    """The living patches of B images at one stage; fields are computed when asked for.

    R living patches stand in the order of the batch, within an image by position, whatever the
    order of packed rows.

    Args:
        backbone: whose tokens they are.
        tokens: the tokens.
        stage: 0-based.
        alpha: price of compute of each episode, float32 [B]; the same where episodes begin alike.
        start: where so many consecutive episodes begin alike, the view of their beginnings, one of
            each; None where they differ.
        images: what is classified [B, C, H, W], for those who look at pixels; None where nobody
            does.
        price: the price of all episodes, where it is one and known to the host.

    Attributes:
        alive: bool [B, N].
        image: index of the image that each living patch belongs to, int64 [R].
        patch: index of each living patch in its image, 0..N-1, int64 [R].
        count: living patches of each image, int64 [B].
    """

    def __init__(
        self,
        backbone: StagedViT,
        tokens: Tokens,
        stage: int,
        alpha: Tensor,
        start: View | None = None,
        images: Tensor | None = None,
        price: float | None = None,
    ) -> None:
        self.backbone = backbone
        self._price = price
        self._start = start
        self._images = images
        self.stage = stage
        self.alpha = alpha
        self._tokens = tokens
        self.alive = tokens.alive[:, backbone.num_prefix :]

    def at_alpha(self, price: float) -> View:
        """The same patches under another price of compute."""
        alpha = torch.full_like(self.alpha, price)
        return View(self.backbone, self._tokens, self.stage, alpha, price=price)

    @cached_property
    def _places(self) -> Tensor:
        """Flat index of each living patch in [B, N], ascending, int64 [R]."""
        flat = self.alive.flatten()
        layout = self._tokens.layout
        if layout is None or flat.device.type == "cpu":
            return flat.nonzero().squeeze(1)
        # the layout knows how many: the device need not be asked
        count = int(layout.lengths.sum()) - len(self.alive) * self.backbone.num_prefix
        return torch.nonzero_static(flat, size=count).squeeze(1)

    @cached_property
    def image(self) -> Tensor:
        return self._places // self.backbone.num_patches

    @cached_property
    def patch(self) -> Tensor:
        return self._places % self.backbone.num_patches

    @cached_property
    def count(self) -> Tensor:
        return self.alive.sum(1)

    @cached_property
    def _rows(self) -> Tensor:
        """Row of the backbone's tokens that holds each living patch, int64 [R]."""
        row = self._tokens.row.view(len(self.alive), self.backbone.num_slots)
        return row[:, self.backbone.num_prefix :].flatten().index_select(0, self._places)

    @cached_property
    def token(self) -> Tensor:
        """Embeddings of the living patches, [R, D]."""
        return self._tokens.x.index_select(0, self._rows).float()

    @cached_property
    def cls(self) -> Tensor:
        """Class token of each image [B, D]; the mean of the prefix or patch tokens where the model
        has none.
        """
        prefix = self.backbone.num_prefix
        if not prefix:
            return self.mean_token
        row = self._tokens.row.view(len(self.alive), self.backbone.num_slots)
        if self.backbone.has_class_token:
            return self._tokens.x.index_select(0, row[:, 0]).float()
        return self._tokens.x[row[:, :prefix]].mean(1).float()

    @cached_property
    def mean_token(self) -> Tensor:
        """Mean of the living patches of each image [B, D]; zeros where none lives."""
        total = self.token.new_zeros(len(self.alive), self.token.shape[1])
        return total.index_add_(0, self.image, self.token) / self.count.clamp(min=1)[:, None]

    @cached_property
    def cls_attention(self) -> Tensor:
        """Attention that the class token paid each living patch in the last block, times N, [R].

        1 is an even share among all patches of the image. 1 everywhere before the first block.
        """
        paid = self._tokens.attention
        if paid is None:
            return torch.ones(len(self._places), device=self.alive.device)
        return paid[self._rows].float() * self.backbone.num_patches

    @cached_property
    def brightness(self) -> Tensor:
        """Mean pixel of each living patch, over its channels too, [R].

        Raises:
            ValueError: the view was made without the images.
        """
        if self._images is None:
            raise ValueError(
                "brightness looks at pixels, this view shows none: run the policy in a PrunedViT"
            )
        grey = self._images.float().mean(1, keepdim=True)
        of_patches = F.adaptive_avg_pool2d(grey, self.backbone.grid_size)
        return of_patches.flatten().index_select(0, self._places)

    @cached_property
    def alive_fraction(self) -> Tensor:
        """Living share of each image's patches, float32 [B]."""
        return self.count.float() / self.backbone.num_patches

    @cached_property
    def stage_one_hot(self) -> Tensor:
        """float32 [T]."""
        one_hot = torch.zeros(self.backbone.num_stages, device=self.alive.device)
        one_hot[self.stage] = 1.0
        return one_hot

    def source(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Where a field comes from, each value once: per token, per image, per place or per stage.

        Returns:
            values [U, size], and which of them each living patch sees, int64 [R]; None where U is 1
            and all see the same.

        Raises:
            ValueError: there is no such field.
        """
        if name == "token":
            return self._tokens.x.float(), self._rows
        if name == "cls":
            return self.cls, self.image
        if name == "stage":
            return self.stage_one_hot[None], None
        if name == "position":
            return patch_positions(self.backbone).to(self.alive.device), self.patch
        if name == "cls_attention":
            paid = self._tokens.attention
            if paid is None:
                return torch.ones(1, 1, device=self.alive.device), None
            return paid[:, None].float() * self.backbone.num_patches, self._rows
        if name == "alive_fraction":
            return self.alive_fraction[:, None], self.image
        if name == "alpha":
            # prices span decades
            return self.alpha[:, None].clamp(min=ALPHA_FLOOR).log(), self.image
        raise ValueError(f"unknown observation field {name!r}: choose from {', '.join(FIELDS)}")

    def field(self, name: str) -> Tensor:
        """One field of every living patch, float32 [R, size]."""
        values, seen = self.source(name)
        if seen is None:
            return values.expand(self._places.shape[0], -1)
        return values.index_select(0, seen)

    def living(self, fields: Sequence[str]) -> Tensor:
        """Observations of the living patches, float32 [R, D_obs]."""
        return torch.cat([self.field(name) for name in fields], dim=1)

    def rows(self, fields: Sequence[str]) -> Rows | None:
        """``fields`` in the order of packed rows; None where they have to be gathered: rows that
        are masked or that episodes share, a class token that has to be averaged, prices that differ
        from image to image, positions.
        """
        tokens, backbone, layout = self._tokens, self.backbone, self._tokens.layout
        if layout is None or len(layout.lengths) != len(self.alive) or not len(self.alive):
            return None
        shown, start = [], 0
        for name in fields:
            of_rows = name in ("token", "cls_attention")
            if name == "token":
                values = tokens.x.float()
            elif name == "cls" and backbone.has_class_token:
                values = tokens.x.index_select(0, layout.starts).float()
            elif name == "stage":
                values = self.stage_one_hot[None]
            elif name == "cls_attention" and tokens.attention is not None:
                values = tokens.attention[:, None].float() * backbone.num_patches
            elif name == "cls_attention":
                values, of_rows = torch.ones(1, 1, device=self.alive.device), False
            elif name == "alpha" and self._price is not None:
                values = torch.full(
                    (1, 1), math.log(max(self._price, ALPHA_FLOOR)), device=self.alive.device
                )
            else:
                return None
            shown.append(RowField(values, slice(start, start + values.shape[1]), of_rows))
            start += values.shape[1]
        return Rows(tuple(shown), layout)

    def at_patches(self, values: Tensor) -> Tensor:
        """Values of packed rows, [S], at the patches they stand for, [B, N]; anything where no
        patch lives.
        """
        row = self._tokens.row.view(len(self.alive), self.backbone.num_slots)
        return values[row[:, self.backbone.num_prefix :]]

    def distinct(self, fields: Sequence[str]) -> tuple[Tensor, Tensor]:
        """``living`` without what episodes that begin alike repeat.

        Returns:
            observations float32 [U, D_obs], and which of them each living patch sees, int64 [R].
        """
        if self._start is None:
            return self.living(fields), torch.arange(len(self._places), device=self.alive.device)
        times = len(self.alive) // len(self._start.alive)
        seen = self.image // times * self.backbone.num_patches + self.patch
        return self._start.living(fields), seen

    def scatter(self, values: Tensor) -> Tensor:
        """Values of the living patches [R, ...] at their places in [B, N, ...], zeros (False)
        elsewhere.
        """
        dense = values.new_zeros(self.alive.numel(), *values.shape[1:])
        dense[self._places] = values
        return dense.unflatten(0, self.alive.shape)

    def state(self) -> Tensor:
        """Global state: class token, mean living token, stage, living share; float32 [B,
        D_state].
        """
        stage = self.stage_one_hot.expand(len(self.alive), -1)
        return torch.cat([self.cls, self.mean_token, stage, self.alive_fraction[:, None]], dim=1)


def patch_positions(backbone: StagedViT) -> Tensor:
    """Row and column in -1..1 and their sines and cosines at ``POSITION_OCTAVES`` frequencies,
    float32 [N, size].
    """
    rows, columns = backbone.grid_size
    row, column = torch.meshgrid(
        torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij"
    )
    place = torch.stack([row.flatten(), column.flatten()], dim=1)
    waves = [place * math.pi * 2**octave for octave in range(POSITION_OCTAVES)]
    return torch.cat([place] + [wave for w in waves for wave in (w.sin(), w.cos())], dim=1)
