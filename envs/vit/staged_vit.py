"""``StagedViT``: a timm ViT that stops before chosen blocks and goes on with the tokens that
survive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import index
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from prunevit.envs.vit.blocks import masked_block, packed_block
from prunevit.envs.vit.heads import (
    classify_normed,
    classify_prefix,
    head_reads_prefix,
    pools_tokens,
)
from prunevit.envs.vit.macs import Macs
from prunevit.envs.vit.onednn_linear import has_hooks
from prunevit.envs.vit.ragged import Layout
from prunevit.envs.vit.rope import RotaryEmbedding
from prunevit.envs.vit.supported import UnsupportedBackboneError, attention_width, model_ops
from prunevit.envs.vit.torch_compile import compile_block

__all__ = ["Execution", "StagedViT", "Tokens", "UnsupportedBackboneError"]

Execution = Literal["packed", "masked"]

# Rows of more than this leave a CPU's caches from block to block, and much of what a block makes of
# them comes from the system anew, page by page. In parts of 2 to 4 MiB 1,024 images of 65 tokens of
# width 64 take three quarters of the time (one core), 64 images of DeiT-S 0.9 to 0.97 of it; 256
# and 32 images lose nothing.
CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Segment:
    """Blocks that have run; what they cost is counted only when somebody asks.

    Attributes:
        alive: bool [B, L], on what.
        start: the first of them.
        stop: the one behind the last.
        with_attention: whether attention was observed in the last.
    """

    alive: Tensor
    start: int
    stop: int
    with_attention: bool


@dataclass(frozen=True)
class Tokens:
    """The tokens of B images on their way through the blocks; each image has L slots: prefix
    tokens, then N patches.

    Attributes:
        x: embeddings, a row a token, [S, D]. Packed: the living tokens, image after image. Masked:
            all B * L slots.
        alive: bool [B, L].
        row: int64 [B * L], the row of ``x`` that holds each slot's token; of no meaning where it is
            not alive.
        layout: of the packed rows; None in masked execution.
        attention: what each row of ``x`` received from the class token in the last block, mean
            over heads, [S]. None before the first block, or where it was not asked for. A model
            without a class token uses the mean query of its prefix tokens, or of all its tokens.
        segments: the blocks that have run so far.
        rotary: where the model has rotary positions, those of the rows of ``x``.
    """

    x: Tensor
    alive: Tensor
    row: Tensor
    layout: Layout | None
    attention: Tensor | None
    segments: tuple[Segment, ...] = ()
    rotary: RotaryEmbedding | None = None

    def repeat(self, times: int) -> Tokens:
        """Each image ``times`` times in a row.

        Packed ones go on sharing their rows of ``x``, and can only be pruned next.
        """
        slots = self.alive.shape[1]
        row = self.row.unflatten(0, (-1, slots)).repeat_interleave(times, dim=0).flatten()
        shared = self.layout is not None
        return replace(
            self,
            x=self.x if shared else self.x[row],
            alive=self.alive.repeat_interleave(times, dim=0),
            row=row if shared else torch.arange(len(row), device=row.device),
            attention=self.attention if shared or self.attention is None else self.attention[row],
            segments=tuple(
                replace(ran, alive=ran.alive.repeat_interleave(times, dim=0))
                for ran in self.segments
            ),
        )


class StagedViT(nn.Module):
    """Runs a timm VisionTransformer or Eva from one stage to the next on the surviving tokens.

    The model given is used as it is, neither changed nor copied, and must be in eval mode for
    packed execution.

    Args:
        model: timm ``VisionTransformer``, plain or distilled, or ``Eva``.
        prune_before: 0-based blocks before which the stages stand, ascending; before every block
            but the first where None.
        execution: "packed" removes pruned tokens; "masked" carries all of them and masks attention:
            slower, and the reference, for gradients too.
        torch_compile: whether packed execution runs its blocks through ``torch.compile``, which
            takes half a minute where they first meet a kind of layout; without gradients only.

    Raises:
        UnsupportedBackboneError: the model can't be staged; the message says why.
        ValueError: stages out of range, repeated or out of order; an unknown execution.
    """

    def __init__(
        self,
        model: nn.Module,
        prune_before: Sequence[int] | None = None,
        execution: Execution = "packed",
        torch_compile: bool = False,
    ) -> None:
        super().__init__()
        if execution not in get_args(Execution):
            raise ValueError(
                f"unknown execution {execution!r}: choose from {', '.residual(get_args(Execution))}"
            )
        self.ops = model_ops(model)
        self.model = cast(Any, model)
        self.execution = execution
        self._torch_compile = torch_compile
        self.depth = len(self.model.blocks)
        self.prune_before = _check_stages(prune_before, self.depth)
        self.width: int = self.model.embed_dim
        self.num_prefix: int = self.model.num_prefix_tokens
        self.num_patches: int = self.model.patch_embed.num_patches
        self.num_slots = self.num_prefix + self.num_patches
        self.grid_size: tuple[int, int] = self.model.patch_embed.grid_size
        self.image_shape: tuple[int, int, int] = (
            self.model.in_chans,
            *self.model.patch_embed.img_size,
        )
        self.num_classes: int = self.model.num_classes
        self.has_class_token = getattr(self.model, "cls_token", None) is not None
        # whose attention is observed: the first token's, the first tokens', or that of all (0)
        self.num_query_tokens = 1 if self.has_class_token else self.num_prefix
        # a head that reads patches alone has nothing to read once all are gone
        self.keeps_last_patch = not head_reads_prefix(self.model)
        self._macs = Macs.of(self.model, self.image_shape)
        self.dense_macs = self._macs.dense(self.num_slots)

    @property
    def num_stages(self) -> int:
        """T, the number of points at which tokens can be pruned."""
        return len(self.prune_before)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @torch.compiler.disable(recursive=False)
    def begin(
        self, images: Tensor, with_attention: bool = True, execution: Execution | None = None
    ) -> Tokens:
        """Embeds ``images`` float [B, C, H, W] and runs the blocks before the first stage.

        Args:
            images: what to classify.
            with_attention: fill ``Tokens.attention`` for the first stage.
            execution: of these images, from here to the end; the module's own where None.

        Raises:
            ValueError: the images are of another size than the backbone was built for, or its patch
                dropout is on.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images of shape {list(images.shape[1:])}: the backbone was staged for "
                f"{list(self.image_shape)}; for another size call timm's model.set_input_size, "
                "then stage it anew"
            )
        dropout = self.model.patch_drop
        if dropout is not None and dropout.training and getattr(dropout, "prob", 0) > 0:
            raise ValueError(
                "the backbone's patch dropout takes patches away before any decision: build it "
                "with patch_drop_rate=0, or call .eval() on it"
            )
        return self._run(
            partial(self._embed, images, execution), 0, self.prune_before[0], with_attention
        )

    @torch.compiler.disable(recursive=False)
    def _embed(self, images: Tensor, execution: Execution | None) -> Tokens:
        batch = len(images)
        wanted = execution or self.execution
        rows = batch * self.num_slots
        count = self._num_chunks(rows, batch) if wanted == "packed" else 1
        if count > 1:
            x, rotary = self._embed_in_chunks(images, count)
        else:
            # timm can't embed no images: it infers shapes from the number of elements
            some = images if batch else images.new_zeros(1, *self.image_shape)
            x, rotary = self.ops.embed(self.model, some)
        return self._dense_tokens(x[:batch], rotary, wanted)

    @torch.compiler.disable
    def _embed_in_chunks(self, images: Tensor, count: int) -> tuple[Tensor, RotaryEmbedding | None]:
        parts = [self.ops.embed(self.model, part) for part in images.tensor_split(count)]
        return torch.cat([x for x, _ in parts]), parts[0][1]

    @torch.compiler.disable(recursive=False)
    def _dense_tokens(
        self, x: Tensor, rotary: RotaryEmbedding | None, execution: Execution
    ) -> Tokens:
        """Images x [B, L, D] of which nothing has been pruned."""
        batch = len(x)
        alive = torch.ones(batch, self.num_slots, dtype=torch.bool, device=x.device)
        layout = None
        if execution == "packed":
            layout = Layout.uniform(batch, self.num_slots, attention_width(self.model), x.device)
        return Tokens(
            x=x.flatten(0, 1),
            alive=alive,
            row=torch.arange(alive.numel(), device=x.device),
            layout=layout,
            attention=None,
            rotary=rotary,
        )

    def restore(
        self, x: Tensor, attention: Tensor | None, rotary: RotaryEmbedding | None
    ) -> Tokens:
        """What ``begin`` returned, from its parts.

        Args:
            x: embeddings of images with all their tokens [B, L, D].
            attention: likewise, [B, L].
            rotary: of any of these images.
        """
        tokens = self._dense_tokens(x, rotary, self.execution)
        ran = Segment(tokens.alive, 0, self.prune_before[0], attention is not None)
        attention = None if attention is None else attention.flatten()
        return replace(tokens, attention=attention, segments=(ran,))

    @torch.compiler.disable(recursive=False)
    def advance(
        self, tokens: Tokens, keep: Tensor, stage: int, with_attention: bool = True
    ) -> Tokens:
        """Prunes, then runs the blocks up to the next stage, or to the end after the last one.

        Args:
            tokens: as ``begin`` or the last ``advance`` returned them.
            keep: bool [B, N]; ignored for patches that are gone.
            stage: 0-based, the one at which ``keep`` was decided.
            with_attention: fill ``Tokens.attention`` for the next stage.
        """
        last = stage + 1 == self.num_stages
        stop = self.depth if last else self.prune_before[stage + 1]
        return self._run(
            partial(self.prune, tokens, keep),
            self.prune_before[stage],
            stop,
            with_attention and not last,
        )

    @torch.compiler.disable
    def prune(self, tokens: Tokens, keep: Tensor) -> Tokens:
        """Removes the patches that ``keep`` bool [B, N] gives up; the blocks' one host sync happens
        here.
        """
        patches = tokens.alive[:, self.num_prefix :]
        survivors = patches & keep
        if self.keeps_last_patch:
            # the living patch that stands first stays where all were given up
            spared = patches & (patches.cumsum(1) == 1)
            survivors = torch.where(survivors.any(1, keepdim=True), survivors, spared)
        alive = torch.cat([tokens.alive[:, : self.num_prefix], survivors], dim=1)
        if tokens.layout is None:
            return replace(tokens, alive=alive, attention=None)

        if len(alive) == 1:
            return self._prune_one(tokens, alive)
        host_lengths = alive.sum(1).cpu().numpy()
        before = tokens.layout.lengths
        if len(host_lengths) == len(before) and host_lengths.sum() == before.sum():
            return replace(tokens, attention=None)  # nothing was pruned
        if (host_lengths == host_lengths[:1]).all():
            # images of one length stay in the order of the batch, tokens in that of their slots
            images, length = len(host_lengths), int(host_lengths[0])
            layout = Layout.uniform(images, length, tokens.layout.width, alive.device)
            slot = _nonzero(alive.view(1, -1), int(host_lengths.sum()))[1]
            row = alive.view(-1).cumsum(0) - 1
        else:
            order = np.argsort(host_lengths, kind="stable")
            layout = Layout.of(host_lengths[order], tokens.layout.width, alive.device)
            # slots of the survivors in packed order: images by length, tokens by position
            place = torch.from_numpy(order).to(alive.device)
            image, position = _nonzero(alive[place], int(host_lengths.sum()))
            slot = place[image] * self.num_slots + position
            row = torch.zeros_like(tokens.row)
            row[slot] = torch.arange(len(slot), device=slot.device)
        rotary = tokens.rotary.take(slot % self.num_slots) if tokens.rotary else None
        return Tokens(
            x=tokens.x.index_select(0, tokens.row[slot]),
            alive=alive,
            row=row,
            layout=layout,
            attention=None,
            segments=tokens.segments,
            rotary=rotary,
        )

    def _prune_one(self, tokens: Tokens, alive: Tensor) -> Tokens:
        """The rows of one image, which stand in the order of their slots, as ``alive`` bool [1, L]
        leaves them.
        """
        assert tokens.layout is not None
        slot = alive.view(-1).nonzero().squeeze(1)
        if len(slot) == tokens.layout.uniform_length:
            return replace(tokens, attention=None)
        return Tokens(
            x=tokens.x.index_select(0, tokens.row.index_select(0, slot)),
            alive=alive,
            row=alive.view(-1).cumsum(0) - 1,
            layout=Layout.uniform(1, len(slot), tokens.layout.width, alive.device),
            attention=None,
            segments=tokens.segments,
            rotary=tokens.rotary.take(slot) if tokens.rotary else None,
        )

    @torch.compiler.disable
    def finish(self, tokens: Tokens) -> Tensor:
        """Norm, pooling over the survivors, and classifier: logits [B, classes]."""
        if not pools_tokens(self.model):
            if tokens.layout is not None and tokens.layout.uniform_length is not None:
                images = tokens.x.unflatten(0, (-1, tokens.layout.uniform_length))
                return classify_prefix(self.model, images[:, : self.num_prefix])
            row = tokens.row.view(len(tokens.alive), self.num_slots)
            return classify_prefix(self.model, tokens.x[row[:, : self.num_prefix]])
        lengths = tokens.alive.sum(1).cpu().numpy()
        slot = _nonzero(tokens.alive.flatten()[None], int(lengths.sum()))[1]
        rows = self.model.norm(tokens.x.index_select(0, tokens.row[slot]))
        layout = Layout.of(lengths, attention_width(self.model), rows.device)
        return classify_normed(self.model, rows, layout)

    @torch.compiler.disable
    def features(self, tokens: Tokens) -> Tensor:
        """The survivors after timm's last norm, each in its slot, zeros where pruned: [B, L, D]."""
        slot = tokens.alive.flatten().nonzero().squeeze(1)
        normed = self.model.norm(tokens.x.index_select(0, tokens.row[slot]))
        dense = normed.new_zeros(tokens.alive.numel(), normed.shape[1])
        return dense.index_copy(0, slot, normed).unflatten(0, tokens.alive.shape)

    @torch.compiler.disable
    def classify(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's ``forward_head`` on what ``features`` returned [B, L, D].

        Args:
            features: a slot that is zero throughout is taken as pruned.
            pre_logits: stop before the classifier.

        Returns:
            logits [B, classes], or what the classifier reads.
        """
        if not pools_tokens(self.model):
            return self.model.forward_head(features, pre_logits=pre_logits)
        alive = features.ne(0).any(2)
        lengths = alive.sum(1).cpu().numpy()
        layout = Layout.of(lengths, attention_width(self.model), features.device)
        return classify_normed(self.model, features[alive], layout, pre_logits)

    def total_macs(self, tokens: Tokens) -> Tensor:
        """Multiply-accumulates of each image once its head has run, int64 [B]."""
        return self.spent_macs(tokens) + self._macs.head(tokens.alive.sum(1))

    @torch.compiler.disable
    def spent_macs(self, tokens: Tokens) -> Tensor:
        """Multiply-accumulates of each image so far, int64 [B]."""
        spent = torch.full((len(tokens.alive),), self._macs.embed, device=tokens.alive.device)
        for ran in tokens.segments:
            count = ran.alive.sum(1)
            spent = spent + self._macs.blocks(count, ran.start, ran.stop)
            if ran.with_attention:
                spent = spent + self._macs.attention_received(count)
        return spent

    def uniform_macs(self, tokens: Sequence[int], with_attention: bool = True) -> int:
        """Multiply-accumulates of an image that keeps ``tokens[t]`` patches at stage t."""
        edges = (0, *self.prune_before, self.depth)
        least = int(self.keeps_last_patch)
        alive = [self.num_slots, *(self.num_prefix + max(kept, least) for kept in tokens)]
        spent = self._macs.embed + self._macs.head(alive[-1])
        for stage, count in enumerate(alive):
            start, stop = edges[stage], edges[stage + 1]
            spent += self._macs.blocks(count, start, stop)
            if with_attention and stop > start and stop < self.depth:
                spent += self._macs.attention_received(count)
        return spent

    def segment_macs(self, alive_patches: Tensor, stage: int) -> Tensor:
        """What the blocks from ``stage`` to the next cost with so many living patches; the shape is
        kept, int64.
        """
        last = stage + 1 == self.num_stages
        stop = self.depth if last else self.prune_before[stage + 1]
        return self._macs.blocks(alive_patches + self.num_prefix, self.prune_before[stage], stop)

    @torch.compiler.disable(recursive=False)
    def _run(
        self,
        make: Callable[[], Tokens],
        start: int,
        stop: int,
        with_attention: bool,
        in_chunks: bool = True,
    ) -> Tokens:
        """Runs the blocks ``start``..``stop - 1`` on the tokens that ``make`` gives: nobody else
        may hold them, or the rows that the blocks begin with stay in memory until the last is done.
        Very many where ``in_chunks`` allows it, in parts.
        """
        tokens = make()
        if in_chunks and stop > start and tokens.layout is not None:
            count = self._num_chunks(len(tokens.x), len(tokens.alive))
            if count > 1:
                return self._run_in_chunks(tokens, start, stop, with_attention, count)
        x, attention = tokens.x, None
        tokens = replace(tokens, x=x.new_empty(0))
        packed = compile_block() if self._torch_compile else packed_block
        for i in range(start, stop):
            block, rotary = self.model.blocks[i], tokens.rotary
            num_query_tokens = self.num_query_tokens if with_attention and i == stop - 1 else None
            if tokens.layout is None:
                x, attention = masked_block(
                    self.ops, block, i, x, tokens.alive, rotary, num_query_tokens
                )
            else:
                x, attention = packed(
                    self.ops, block, i, x, tokens.layout, rotary, num_query_tokens
                )
        ran = Segment(tokens.alive, start, stop, attention is not None)
        return replace(tokens, x=x, attention=attention, segments=(*tokens.segments, ran))

    # not for a compiler: the number and the sizes of parts differ from batch to batch
    @torch.compiler.disable
    def _run_in_chunks(
        self, tokens: Tokens, start: int, stop: int, with_attention: bool, count: int
    ) -> Tokens:
        """``_run`` on about as many rows at a time, images whole."""
        assert tokens.layout is not None
        x, attention = torch.empty_like(tokens.x), []
        for place, layout in tokens.layout.split(count):
            rotary = tokens.rotary.slice_rows(place) if tokens.rotary else None
            part = replace(tokens, x=tokens.x[place], layout=layout, rotary=rotary)
            ran = self._run(lambda part=part: part, start, stop, with_attention, in_chunks=False)
            x[place] = ran.x
            if ran.attention is not None:
                attention.append(ran.attention)
        done = Segment(tokens.alive, start, stop, bool(attention))
        attention = torch.cat(attention) if attention else None
        return replace(tokens, x=x, attention=attention, segments=(*tokens.segments, done))

    @torch.compiler.disable
    def _num_chunks(self, rows: int, images: int) -> int:
        """In how many parts so many images, of so many tokens together, go through the model: more
        than one where they are many, on a CPU, and nobody could tell.
        """
        size = rows * self.width * self.dtype.itemsize
        if size <= CHUNK_BYTES or self.device.type != "cpu" or self._torch_compile:
            return 1
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
            return 1
        if any(part.training for part in self.model.modules()) or has_hooks(self.model):
            return 1
        return min(math.ceil(size / CHUNK_BYTES), images)


def _nonzero(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Row and column of each of the ``count`` True entries of ``mask`` [R, C], without asking the
    device how many.
    """
    on_host = mask.device.type == "cpu"
    index = mask.nonzero() if on_host else torch.nonzero_static(mask, size=count)
    return index[:, 0], index[:, 1]


def _check_stages(prune_before: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    wanted = range(1, depth) if prune_before is None else prune_before
    try:
        stages = tuple(index(b) for b in wanted)  # numpy's integers too
    except TypeError as error:
        raise ValueError(f"prune_before={wanted!r} must be a sequence of whole numbers") from error
    if not stages:
        raise ValueError(
            "prune_before is empty: name at least one block"
            if prune_before is not None
            else "a model of one block has no stage between blocks: give prune_before=(0,)"
        )
    if any(not 0 <= b < depth for b in stages):
        raise ValueError(
            f"prune_before={stages} is out of range: the backbone's blocks are 0..{depth - 1}"
        )
    if any(a >= b for a, b in pairwise(stages)):
        raise ValueError(f"prune_before={stages} must ascend without repeats")
    return stages
