"""``StagedViT``: a timm ViT that stops at chosen blocks and continues on surviving tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from operator import index
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.choices import check_choice
from prunevit.envs.vit.block_outputs import BlockOutputs
from prunevit.envs.vit.execution import embed_chunks, num_chunks, run_sublayers
from prunevit.envs.vit.layout import Layout
from prunevit.envs.vit.macs import Macs, head_size, merging_macs
from prunevit.envs.vit.merging import merge_tokens
from prunevit.envs.vit.timm_models.heads import (
    classify_pooled,
    classify_prefix,
    count_classes,
    head_reads_prefix,
    is_head_untouched,
    pools_tokens,
)
from prunevit.envs.vit.timm_models.rope import RotaryEmbedding
from prunevit.envs.vit.timm_models.supported import (
    UnsupportedBackboneError,
    attention_width,
    model_ops,
    some_tensor,
)
from prunevit.envs.vit.tokens import Segment, Tokens, nonzero, remove_tokens
from prunevit.envs.vit.untouched import why_bypassed, why_indivisible

Execution = Literal["packed", "masked"]
OnPrune = Literal["drop", "merge"]
PruneAt = Literal["block", "mlp"]


class StagedViT(nn.Module):
    """Runs a timm ViT from one stage to the next on the surviving tokens.

    The model is used as it is: neither changed nor copied. Hooks, replaced layers, quantised
    weights and dropout in training mode have the effect that they have in timm's own forward pass.
    Blocks that have any are called once for each number of tokens that images have left, which is
    slower if there are many. Multiply-accumulates are those of the blocks as they are now: where
    blocks are changed later, stage the model anew.

    Args:
        model: timm's ``VisionTransformer``, plain or distilled, or ``Eva``.
        prune_before: 0-based blocks before which tokens can be pruned, ascending. None stands for
            every block but the first.
        execution: "packed" removes pruned tokens. "masked" keeps all tokens and masks the
            attention; it is slower, and the reference, for gradients too.
        torch_compile: compile the blocks of packed execution with ``torch.compile``, which takes
            half a minute for each of at most six graphs. Where gradients may be needed, they run
            uncompiled. So do blocks that are pruned inside.
        on_prune: what becomes of pruned patches. "drop": they are gone. "merge": each is averaged
            into the most similar patch of its image that stays, by cosine of the embeddings,
            weighted with the number of patches that each stands for. Attention and pooling weigh
            tokens with that number. An image that loses all of its patches loses what they held.
        prune_at: "block" prunes before these blocks begin. "mlp" prunes inside of them, between
            their attention and their MLP: decisions then see the attention of the block itself, and
            its MLP runs on the survivors alone.

    Attributes:
        edges: the sublayers before which each stage stands, then the number of all sublayers.
            Sublayer 2 b is the attention of block b, sublayer 2 b + 1 its MLP.
        num_patches: N.
        num_prefix: number of prefix tokens: class token, distillation token, registers.
        num_slots: L, the sum of both.
        width: D, the embedding width.
        grid_size: rows and columns of patches.
        image_shape: (C, H, W).
        num_query_tokens: number of first tokens whose attention is what ``Tokens.attention``
            reports: 1 for the class token, all prefix tokens without one, 0 for all tokens.
        keeps_last_patch: whether each image keeps at least one patch, since its head reads nothing
            but patches.
        dense_macs: multiply-accumulates of the unpruned model for an image.

    Raises:
        UnsupportedBackboneError: the model can't run on part of its tokens; the message says why.
        ValueError: stages out of range, repeated or out of order, or an unknown ``execution``,
            ``on_prune`` or ``prune_at``.
    """

    def __init__(
        self,
        model: nn.Module,
        prune_before: Sequence[int] | None = None,
        execution: Execution = "packed",
        torch_compile: bool = False,
        on_prune: OnPrune = "drop",
        prune_at: PruneAt = "block",
    ) -> None:
        super().__init__()
        check_choice("execution", execution, get_args(Execution))
        check_choice("on_prune", on_prune, get_args(OnPrune))
        check_choice("prune_at", prune_at, get_args(PruneAt))
        self.ops = model_ops(model)
        self.model = cast(Any, model)
        self.execution = execution
        self.on_prune = on_prune
        self._torch_compile = torch_compile
        self.depth = len(self.model.blocks)
        self.prune_before = _check_stages(prune_before, self.depth)
        self.prune_at = prune_at
        inside = prune_at == "mlp"
        self.edges = (*(2 * block + inside for block in self.prune_before), 2 * self.depth)
        self._check_divisible()
        self.width: int = self.model.embed_dim
        self.num_prefix: int = self.model.num_prefix_tokens
        self.num_patches: int = self.model.patch_embed.num_patches
        self.num_slots = self.num_prefix + self.num_patches
        self.grid_size: tuple[int, int] = self.model.patch_embed.grid_size
        self.image_shape: tuple[int, int, int] = (
            self.model.in_chans,
            *self.model.patch_embed.img_size,
        )
        self.has_class_token = getattr(self.model, "cls_token", None) is not None
        self.num_query_tokens = 1 if self.has_class_token else self.num_prefix
        self._look_at_head()

    def _check_divisible(self) -> None:
        for i in self.prune_before if self.prune_at == "mlp" else ():
            reason = why_indivisible(self.model.blocks[i])
            if reason is not None:
                raise UnsupportedBackboneError(
                    f"block {i} can't be pruned between its attention and its MLP, since {reason}, "
                    "which would never run: take prune_at='block'"
                )

    def _look_at_head(self) -> None:
        self._counted_head = head_size(self.model)
        self._macs = Macs.of(self.model, self.image_shape)
        self.dense_macs = self._macs.dense(self.num_slots)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As in timm: gives the model a new, untrained head."""
        self.model.reset_classifier(num_classes, global_pool)
        self._look_at_head()

    @property
    def num_classes(self) -> int:
        return count_classes(self.model)

    @property
    def num_outputs(self) -> int:
        """Length of what ``finish`` returns: classes, or the width of an embedding."""
        return self.num_classes or self.width

    @property
    def keeps_last_patch(self) -> bool:
        return not head_reads_prefix(self.model)

    @property
    def num_stages(self) -> int:
        """T, the number of times that tokens can be pruned."""
        return len(self.prune_before)

    @property
    def whole_from(self) -> tuple[int, ...]:
        """The first block that runs as a whole on what each stage leaves."""
        return tuple((edge + 1) // 2 for edge in self.edges[:-1])

    def has_attended(self, stage: int) -> bool:
        """Whether tokens have attended to each other before a stage."""
        return self.edges[stage] > 0

    @property
    def device(self) -> torch.device:
        return some_tensor(self.model).device

    @property
    def dtype(self) -> torch.dtype:
        return some_tensor(self.model).dtype

    @torch.compiler.disable(recursive=False)
    def begin(
        self,
        images: Tensor,
        with_attention: bool = True,
        execution: Execution | None = None,
        outputs: BlockOutputs | None = None,
    ) -> Tokens:
        """Embeds images and runs what comes before the first stage.

        Args:
            images: float [B, C, H, W].
            with_attention: fill ``Tokens.attention`` for the first stage.
            execution: how these images are executed, from here to the end; the module's own if
                None.
            outputs: collects the tokens after some of the blocks.

        Raises:
            ValueError: the images have another size than the backbone, or its patch dropout is on.
            UnsupportedBackboneError: the model was given hooks that could not run, or a head that
                can't weigh merged patches.
        """
        reason = why_bypassed(self.model) or self._why_not_merged()
        if reason is not None:
            raise UnsupportedBackboneError(reason)
        self._check_divisible()
        if head_size(self.model) != self._counted_head:
            self._look_at_head()  # the model was given another head
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
        make = partial(self._embed, images, execution)
        return self._run(make, 0, self.edges[0], with_attention, outputs)

    def _why_not_merged(self) -> str | None:
        """Why the head can't pool merged patches, or None if it can."""
        if self.on_prune == "drop" or not pools_tokens(self.model):
            return None
        if is_head_untouched(self.model, hooked=True):  # those that count and trace only look on
            return None
        return (
            "on_prune='merge': a pooling head with hooks, replaced or quantised layers would take "
            "each merged patch for a single one: take on_prune='drop', or remove what was added"
        )

    @torch.compiler.disable(recursive=False)
    def _embed(self, images: Tensor, execution: Execution | None) -> Tokens:
        batch = len(images)
        wanted = execution or self.execution
        rows = batch * self.num_slots
        count = 1
        if wanted == "packed":
            count = num_chunks(self.model, rows, batch, self._torch_compile)
        if count > 1:
            x, rotary = embed_chunks(self.model, self.ops, images, count)
        else:
            # timm infers shapes from the number of elements, so it can't embed zero images
            some = images if batch else images.new_zeros(1, *self.image_shape)
            x, rotary = self.ops.embed(self.model, some)
        return self._dense_tokens(x[:batch], rotary, wanted)

    @torch.compiler.disable(recursive=False)
    def _dense_tokens(
        self, x: Tensor, rotary: RotaryEmbedding | None, execution: Execution
    ) -> Tokens:
        """Tokens of images x [B, L, D], before anything is pruned."""
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
            rotary=rotary.of_images(batch, layout is not None) if rotary else None,
        )

    def restore(
        self, x: Tensor, attention: Tensor | None, rotary: RotaryEmbedding | None
    ) -> Tokens:
        """Puts together what ``begin`` returned for some images, from stored embeddings.

        Args:
            x: embeddings of images with all their tokens [B, L, D].
            attention: ``Tokens.attention`` of each image [B, L], or None.
            rotary: ``Tokens.rotary`` of any of these images.
        """
        tokens = self._dense_tokens(x, rotary, self.execution)
        segment = Segment(tokens.alive, 0, self.edges[0], attention is not None)
        received = None if attention is None else attention.flatten()
        return replace(tokens, attention=received, segments=(segment,))

    @torch.compiler.disable(recursive=False)
    def advance(
        self,
        tokens: Tokens,
        keep: Tensor | None,
        stage: int,
        with_attention: bool = True,
        outputs: BlockOutputs | None = None,
    ) -> Tokens:
        """Prunes, then runs on to the next stage, or to the end after the last stage.

        Args:
            tokens: what ``begin`` or the last ``advance`` returned.
            keep: which patches stay, bool [B, N]; ignored for patches that are already gone. None
                prunes nothing, and a GPU need not be waited for.
            stage: 0-based stage at which ``keep`` was decided.
            with_attention: fill ``Tokens.attention`` for the next stage.
            outputs: collects the tokens after some of the blocks.
        """
        start, stop = self.edges[stage : stage + 2]
        if keep is None:
            make = partial(replace, tokens, attention=None)
        else:
            make = partial(self.prune, tokens, keep)
        observed = with_attention and stage + 1 < self.num_stages
        return self._run(make, start, stop, observed, outputs)

    def survivors(self, tokens: Tokens, keep: Tensor) -> Tensor:
        """Which tokens stay if those where ``keep``, bool [B, N], is False go: bool [B, L]."""
        patches = tokens.alive[:, self.num_prefix :]
        survivors = patches & keep
        if self.keeps_last_patch:
            # if an image would lose all patches, its first one stays
            spared = patches & (patches.cumsum(1) == 1)
            survivors = survivors | (spared & ~survivors.any(1, keepdim=True))
        return torch.cat([tokens.alive[:, : self.num_prefix], survivors], dim=1)

    @torch.compiler.disable
    def prune(self, tokens: Tokens, keep: Tensor) -> Tokens:
        """Removes the patches where ``keep``, bool [B, N], is False, see ``on_prune``."""
        alive = self.survivors(tokens, keep)
        if self.on_prune == "merge":
            return merge_tokens(tokens, alive, self.num_prefix)
        return remove_tokens(tokens, alive)

    @torch.compiler.disable
    def finish(self, tokens: Tokens) -> Tensor:
        """Applies the last norm, pools over the survivors and classifies: logits [B, classes].

        A model without a classifier returns what would go into it: [B, D].
        """
        weighs = tokens.size is not None and pools_tokens(self.model)
        if not weighs and not is_head_untouched(self.model):
            return self._by_length(tokens, lambda x: self.model.forward_head(self.model.norm(x)))
        if not pools_tokens(self.model):
            if tokens.layout is not None and tokens.layout.uniform_length is not None:
                images = tokens.x.unflatten(0, (-1, tokens.layout.uniform_length))
                return classify_prefix(self.model, images[:, : self.num_prefix])
            row = tokens.row.view(len(tokens.alive), self.num_slots)
            return classify_prefix(self.model, tokens.x[row[:, : self.num_prefix]])
        lengths = tokens.alive.sum(1).cpu().numpy()
        slot = nonzero(tokens.alive.flatten()[None], int(lengths.sum()))[1]
        row = tokens.row[slot]
        rows = self.model.norm(tokens.x.index_select(0, row))
        layout = Layout.of(lengths, attention_width(self.model), rows.device)
        size = None if tokens.size is None else tokens.size[row]
        return classify_pooled(self.model, rows, layout, size=size)

    def _by_length(self, tokens: Tokens, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Runs a function of whole images on those that have as many tokens left together.

        Args:
            tokens: of B images.
            run: tokens [b, n, D] of images with n tokens each -> [b, ...].

        Returns:
            [B, ...], in the order of the images.
        """
        row = tokens.row.view(len(tokens.alive), self.num_slots)
        lengths = tokens.alive.sum(1)
        results, places = [], []
        for length in lengths.unique().tolist():
            some = (lengths == length).nonzero().squeeze(1)
            rows = row[some][tokens.alive[some]]
            results.append(run(tokens.x[rows].unflatten(0, (len(some), length))))
            places.append(some)
        if not results:
            return run(tokens.x.view(0, self.num_slots, self.width))
        return torch.cat(results)[torch.cat(places).argsort()]

    @torch.compiler.disable
    def features(self, tokens: Tokens, norm: bool = True) -> Tensor:
        """The tokens after the last norm, each in its slot, zeros where pruned: [B, L, D].

        Without ``norm``, the tokens as they are.
        """
        slot = tokens.alive.flatten().nonzero().squeeze(1)
        if not norm:
            normed = tokens.x.index_select(0, tokens.row[slot])
        elif is_head_untouched(self.model):
            normed = self.model.norm(tokens.x.index_select(0, tokens.row[slot]))
        else:
            # each image padded at its end to all slots, so that images of all lengths are stacked
            padded = self._by_length(
                tokens, lambda x: F.pad(self.model.norm(x), (0, 0, 0, self.num_slots - x.shape[1]))
            )
            order = torch.arange(self.num_slots, device=slot.device)
            normed = padded[order < tokens.alive.sum(1, keepdim=True)]
        dense = normed.new_zeros(tokens.alive.numel(), normed.shape[1])
        return dense.index_copy(0, slot, normed).unflatten(0, tokens.alive.shape)

    @torch.compiler.disable
    def classify(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's ``forward_head`` on what ``features`` returned.

        Args:
            features: [B, L, D]; a slot of zeros is taken as pruned.
            pre_logits: return the input of the classifier instead of logits.

        Returns:
            logits [B, classes].

        Raises:
            UnsupportedBackboneError: the head pools patches that may have merged.
        """
        if not pools_tokens(self.model):
            return self.model.forward_head(features, pre_logits=pre_logits)
        if self.on_prune == "merge":
            raise UnsupportedBackboneError(
                "on_prune='merge': features don't tell how many patches each stands for, which a "
                "pooling head needs: classify images as a whole"
            )
        alive = features.ne(0).any(2)
        if not is_head_untouched(self.model):
            head = partial(self.model.forward_head, pre_logits=pre_logits)
            return self._by_length(Tokens.of_slots(features, alive), head)
        lengths = alive.sum(1).cpu().numpy()
        layout = Layout.of(lengths, attention_width(self.model), features.device)
        return classify_pooled(self.model, features[alive], layout, pre_logits)

    def total_macs(self, tokens: Tokens) -> Tensor:
        """Multiply-accumulates of each image including its head, int64 [B]."""
        return self.spent_macs(tokens) + self._macs.head(tokens.alive.sum(1))

    @torch.compiler.disable
    def spent_macs(self, tokens: Tokens) -> Tensor:
        """Multiply-accumulates of each image so far, int64 [B]."""
        spent = torch.full((len(tokens.alive),), self._macs.embed, device=tokens.alive.device)
        for segment in tokens.segments:
            count = segment.alive.sum(1)
            spent = spent + self._macs.sublayers(count, segment.start, segment.stop)
            if segment.with_attention:
                spent = spent + self._macs.attention_received(count)
        if self.on_prune == "merge":
            counts = [segment.alive.sum(1) for segment in tokens.segments] + [tokens.alive.sum(1)]
            for before, after in pairwise(counts):
                spent = spent + self._merging_macs(before, after)
        return spent

    def _merging_macs(self, before: Any, after: Any) -> Any:
        """Multiply-accumulates of the merging that leaves ``after`` of ``before`` tokens."""
        return merging_macs(before - after, after - self.num_prefix, self.width)

    def uniform_macs(self, tokens: Sequence[int], with_attention: bool = True) -> int:
        """Multiply-accumulates of an image that keeps ``tokens[t]`` patches at each stage t."""
        least = int(self.keeps_last_patch)
        alive = [self.num_slots, *(self.num_prefix + max(kept, least) for kept in tokens)]
        spent = self._macs.embed + self._macs.head(alive[-1])
        for count, (start, stop) in zip(alive, pairwise((0, *self.edges)), strict=True):
            spent += self._macs.sublayers(count, start, stop)
            if with_attention and stop > start and stop < self.edges[-1]:
                spent += self._macs.attention_received(count)
        if self.on_prune == "merge":
            spent += sum(self._merging_macs(*counts) for counts in pairwise(alive))
        return spent

    def segment_macs(self, alive_patches: Tensor, stage: int) -> Tensor:
        """Multiply-accumulates from ``stage`` to the next one.

        Args:
            alive_patches: number of surviving patches, int64 of any shape.
            stage: 0-based.

        Returns:
            int64 of the same shape.
        """
        start, stop = self.edges[stage : stage + 2]
        return self._macs.sublayers(alive_patches + self.num_prefix, start, stop)

    @torch.compiler.disable(recursive=False)
    def _run(
        self,
        make: Callable[[], Tokens],
        start: int,
        stop: int,
        with_attention: bool,
        outputs: BlockOutputs | None,
    ) -> Tokens:
        queries = self.num_query_tokens if with_attention else None
        run = partial(run_sublayers, self.model, self.ops, torch_compile=self._torch_compile)
        if outputs is None:
            return run(make, start, stop, queries)
        tokens = make()
        for first, end in outputs.parts(start, stop):
            tokens = run(lambda t=tokens: t, first, end, queries if end == stop else None)
            outputs.add(tokens, end)
        return tokens


def _check_stages(prune_before: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    wanted = range(1, depth) if prune_before is None else prune_before
    try:
        stages = tuple(index(b) for b in wanted)  # accepts numpy's integers too
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
