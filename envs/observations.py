"""``View``: what can be observed at a stage, of each living patch and of the whole image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from prunevit.envs.fields import ALPHA_FLOOR, FIELDS, RowField, Rows, patch_positions
from prunevit.envs.vit.merging import pad_units
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.tokens import Tokens


class View:
    """The living patches of B images at one stage, with fields that are computed on demand.

    The R living patches are in the order of the batch, and within an image by position, whatever
    the order of packed rows.

    Args:
        backbone: the staged ViT.
        tokens: its tokens at the stage.
        stage: 0-based.
        alpha: alpha of each episode, float32 [B].
        start: the view of the images before they were repeated, if consecutive episodes play the
            same image; else None.
        images: the images [B, C, H, W], for policies that look at pixels; else None.
        shared_alpha: alpha of all episodes, if it is the same and known to the host.

    Attributes:
        alive: which patches still exist, bool [B, N]. A copy, so a policy may change it.
        image: index of the image that each living patch belongs to, int64 [R].
        patch: index of each living patch in its image, 0..N-1, int64 [R].
        count: number of living patches of each image, int64 [B].
    """

    def __init__(
        self,
        backbone: StagedViT,
        tokens: Tokens,
        stage: int,
        alpha: Tensor,
        start: View | None = None,
        images: Tensor | None = None,
        shared_alpha: float | None = None,
    ) -> None:
        self.backbone = backbone
        self._shared_alpha = shared_alpha
        self._start = start
        self._images = images
        self.stage = stage
        self.alpha = alpha
        self._tokens = tokens
        self._alive = tokens.alive[:, backbone.num_prefix :]
        self.alive = self._alive.clone()

    def at_alpha(self, alpha: float) -> View:
        """The same patches with another alpha."""
        alphas = torch.full_like(self.alpha, alpha)
        return View(self.backbone, self._tokens, self.stage, alphas, shared_alpha=alpha)

    @cached_property
    def _places(self) -> Tensor:
        """Flat index of each living patch in [B, N], ascending, int64 [R]."""
        flat = self._alive.flatten()
        layout = self._tokens.layout
        if layout is None or flat.device.type == "cpu":
            return flat.nonzero().squeeze(1)
        # the layout knows the count, so a GPU need not be waited for
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
        return self._alive.sum(1)

    @cached_property
    def _rows(self) -> Tensor:
        """Row of the backbone's tokens that holds each living patch, int64 [R]."""
        row = self._tokens.row.view(self.alive.shape[0], self.backbone.num_slots)
        return row[:, self.backbone.num_prefix :].flatten().index_select(0, self._places)

    @cached_property
    def token(self) -> Tensor:
        """Embeddings of the living patches, float32 [R, D]."""
        return self._tokens.x.index_select(0, self._rows).float()

    @cached_property
    def cls(self) -> Tensor:
        """Class token of each image, float32 [B, D].

        A model without one uses the mean of its prefix tokens, or of its living patches.
        """
        prefix = self.backbone.num_prefix
        if not prefix:
            return self.mean_token
        row = self._tokens.row.view(self.alive.shape[0], self.backbone.num_slots)
        if self.backbone.has_class_token:
            return self._tokens.x.index_select(0, row[:, 0]).float()
        return self._tokens.x[row[:, :prefix]].mean(1).float()

    @cached_property
    def mean_token(self) -> Tensor:
        """Mean embedding of the living patches of each image [B, D]; zeros if there are none."""
        total = self.token.new_zeros(self.alive.shape[0], self.token.shape[1])
        return total.index_add_(0, self.image, self.token) / self.count.clamp(min=1)[:, None]

    @cached_property
    def cls_attention(self) -> Tensor:
        """Attention that each living patch received from the class token, times N, [R].

        Of the last attention, averaged over heads. 1 is an even share among all patches of the
        image, and the value of all patches before the first block.

        Raises:
            ValueError: the policy said that it would not need it.
        """
        return self.field("cls_attention").squeeze(1)

    @property
    def _attention(self) -> tuple[Tensor, bool]:
        """``cls_attention`` of packed rows, float32 [S, 1], and True; before the first block
        [1, 1] and False.
        """
        received = self._tokens.attention
        if received is None and self.backbone.has_attended(self.stage):
            raise ValueError(
                "class attention was not observed, since the policy says needs_attention = False: "
                "let it say True"
            )
        if received is None:
            return self.alpha.new_ones(1, 1), False
        return received[:, None].float() * self.backbone.num_patches, True

    @cached_property
    def redundancy(self) -> Tensor:
        """Largest cosine similarity of each living patch to another one of its image, [R]; -1 where
        there is no other. What merging methods go by.

        It takes D multiply-accumulates for each pair of living patches.
        """
        layout, prefix = self._tokens.layout, self.backbone.num_prefix
        # the layout knows the longest image, so a GPU need not be waited for
        longest = self.backbone.num_patches if layout is None else layout.max_seqlen - prefix
        if longest < 1:  # no patch is left, or there is no image
            return self.token.new_zeros(0)
        unit, cell = pad_units(self.token, self._alive, self._places, longest)
        similar = unit @ unit.transpose(1, 2)  # [B, longest, longest]
        is_padding = torch.arange(longest, device=unit.device) >= self.count[:, None]
        itself = torch.eye(longest, dtype=torch.bool, device=unit.device)
        similar = similar.masked_fill(is_padding[:, None] | itself, -1.0)
        return similar.amax(2).flatten().index_select(0, cell)

    @cached_property
    def brightness(self) -> Tensor:
        """Mean pixel value of each living patch over all channels, [R].

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
        """Share of each image's patches that are alive, float32 [B]."""
        return self.count.float() / self.backbone.num_patches

    @cached_property
    def stage_one_hot(self) -> Tensor:
        """The stage as a one-hot vector, float32 [T]."""
        count, device = self.backbone.num_stages, self.alive.device
        return torch.eye(count, dtype=torch.float32, device=device)[self.stage]

    def source(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The distinct values of a field, and which of them each living patch observes.

        Returns:
            values [U, size], and an index into them for each living patch, int64 [R]; None if U
            is 1.

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
            values, of_rows = self._attention
            return values, self._rows if of_rows else None
        if name == "redundancy":
            every = torch.arange(self._places.shape[0], device=self.alive.device)
            return self.redundancy[:, None], every
        if name == "alive_fraction":
            return self.alive_fraction[:, None], self.image
        if name == "alpha":
            # alphas span decades
            return self.alpha[:, None].clamp(min=ALPHA_FLOOR).log(), self.image
        raise ValueError(f"unknown observation field {name!r}: choose from {', '.join(FIELDS)}")

    def field(self, name: str) -> Tensor:
        """The values of a field for every living patch, float32 [R, size]."""
        values, seen = self.source(name)
        if seen is None:
            return values.expand(self._places.shape[0], -1)
        return values.index_select(0, seen)

    def living(self, fields: Sequence[str]) -> Tensor:
        """Observations of the living patches, float32 [R, D_obs]."""
        return torch.cat([self.field(name) for name in fields], dim=1)

    def rows(self, fields: Sequence[str]) -> Rows | None:
        """The ``fields`` in the order of packed rows, or None if they have to be gathered.

        That is the case for masked rows, rows that episodes share, models without a class token,
        alphas that differ from image to image, and positions.
        """
        tokens, backbone, layout = self._tokens, self.backbone, self._tokens.layout
        if layout is None or len(layout.lengths) != len(self.alive) or not len(self.alive):
            return None
        shown, start = [], 0
        for name in fields:
            of_rows = name == "token"
            if name == "token":
                values = tokens.x.float()
            elif name == "cls" and backbone.has_class_token:
                values = tokens.x.index_select(0, layout.starts).float()
            elif name == "stage":
                values = self.stage_one_hot[None]
            elif name == "cls_attention":
                values, of_rows = self._attention
            elif name == "alpha" and self._shared_alpha is not None:
                values = self.alpha.new_full((1, 1), math.log(max(self._shared_alpha, ALPHA_FLOOR)))
            else:
                return None
            shown.append(RowField(values, slice(start, start + values.shape[1]), of_rows))
            start += values.shape[1]
        return Rows(tuple(shown), layout)

    def at_patches(self, values: Tensor) -> Tensor:
        """Maps values of packed rows [S] to patches [B, N]; undefined for patches not alive."""
        row = self._tokens.row.view(self.alive.shape[0], self.backbone.num_slots)
        return values[row[:, self.backbone.num_prefix :]]

    def distinct(self, fields: Sequence[str]) -> tuple[Tensor, Tensor]:
        """``living`` without the repetitions of episodes that play the same image.

        Returns:
            distinct observations float32 [U, D_obs], and an index into them for each living patch,
            int64 [R].
        """
        if self._start is None:
            return self.living(fields), torch.arange(len(self._places), device=self.alive.device)
        times = len(self.alive) // len(self._start.alive)
        seen = self.image // times * self.backbone.num_patches + self.patch
        return self._start.living(fields), seen

    def distinct_states(self) -> tuple[Tensor, Tensor]:
        """``state`` without the repetitions of episodes that play the same image.

        Returns:
            distinct states float32 [S, D_state], and the index among them of the state of each
            observation of ``distinct``, int64 [U].
        """
        seen = self if self._start is None else self._start
        return seen.state(), seen.image

    def scatter(self, values: Tensor) -> Tensor:
        """Maps values of living patches [R, ...] to [B, N, ...], with zeros (False) elsewhere."""
        dense = values.new_zeros(self.alive.numel(), *values.shape[1:])
        dense[self._places] = values
        return dense.unflatten(0, self.alive.shape)

    def gather(self, values: Tensor) -> Tensor:
        """Selects the living patches: values [B, N] to [R]."""
        return values.flatten().index_select(0, self._places)

    def state(self) -> Tensor:
        """The global state, float32 [B, D_state].

        Class token, mean embedding of the living patches, one-hot stage and share alive.
        """
        stage = self.stage_one_hot.expand(len(self.alive), -1)
        return torch.cat([self.cls, self.mean_token, stage, self.alive_fraction[:, None]], dim=1)
