"""LTMP, written from the paper "Learned Thresholds Token Merging and Pruning for Vision
Transformers" (arXiv 2307.10780).

In every block, between attention and MLP, a source whose most similar target is more similar than a
threshold merges into it, as in ToMe. Then patches whose importance, the mean attention that all
tokens pay them, is not above another threshold are pruned. The two thresholds of each block are all
that is learned. In training all tokens run, masks hide those that are gone, and a loss brings the
compute to a target.

On one image this is the authors' code (github.com/Mxbonn/ltmp), and so is the masked training
before the loss; outputs of both are in tests/fixtures/originals. Theirs removes tokens of one image
at a time. Here linear layers run on the living tokens of the whole batch, without padding, and
attention on rectangles that are padded to the longest image. An image is counted as if alone. All
prefix tokens are protected; theirs knows only a class token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.agents.pruned_vit import Trace
from prunevit.benchmarks.baselines.timm_parts import (
    check_reads_class_token,
    chunks,
    embed,
    feed_forward,
)
from prunevit.benchmarks.baselines.tome import split
from prunevit.envs.vit.macs import count_linear_macs
from prunevit.envs.vit.onednn_linear import linear
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.heads import classify_prefix

# the authors' code adds this much to the weights of a query in training, shared out among all keys
EPSILON = 1e-5
FIRST_MERGE_THRESHOLD = 0.9  # the authors': at 1 merging is never learned
TEMPERATURE = 0.1  # of the masks' gradient to the thresholds
BUDGET_WEIGHT = 10.0  # of the loss that brings the compute to its target
LABEL_SMOOTHING = 0.1
GRADIENT_NORM = 1.0  # at most, of a step's gradient to the thresholds of a kind


class State(NamedTuple):
    """Tokens between two blocks."""

    x: Tensor  # [B, L, D]
    size: Tensor  # patches that each stands for, [B, L, 1]
    alive: Tensor  # which places hold a token; bool [B, L], in training 1 and 0


Layer = Callable[[Tensor], Tensor]
Run = Callable[[Layer, Tensor], Tensor]  # of a layer on tokens [B, L, D]


def linear_macs(backbone: StagedViT, counts: Sequence[Tensor]) -> Tensor:
    """Multiply-accumulates of images with so many tokens before each block and after the last one,
    [B] each, similarities not included.
    """
    full, spared = backbone.num_slots, torch.zeros_like(counts[0])
    for block, (before, after) in zip(backbone.model.blocks, pairwise(counts), strict=True):
        width = block.attn.num_heads * block.attn.head_dim
        spared = spared + (full - before) * count_linear_macs(block.attn)
        spared = spared + 2 * width * (full**2 - before**2)
        spared = spared + (full - after) * count_linear_macs(block.mlp)
    return backbone.dense_macs - spared


def start(model: Any, images: Tensor) -> State:
    """The tokens before the first block."""
    x = embed(model, images)
    return State(x, torch.ones_like(x[..., :1]), torch.ones_like(x[..., 0]))


def attend(
    block: Any, state: State, softmax: Callable[[Tensor], Tensor], run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """A block up to its MLP, with proportional attention.

    Returns:
        Tokens [B, L, D], the mean over heads of their keys [B, L, head_dim], and what each token
        pays each, [B, L, L].
    """
    attn, normed = block.attn, run(block.norm1, state.x)
    qkv = run(partial(linear, attn.qkv), normed).unflatten(2, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    weights = softmax(q @ k.mT * attn.scale + state.size.log().mT[:, None])
    mixed = run(attn.norm, (weights @ v).transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * run(attn.gate, normed).sigmoid()
    mixed = run(partial(linear, attn.proj), mixed)
    return state.x + block.ls1(mixed), k.mean(1), weights.mean(1)


def merge_into(
    patches: State, importance: Tensor, into: Tensor, merging: Tensor, num_prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Averages merging sources into targets, weighted with their sizes; of the importance the most
    counts. Sources stay, merged or not.

    Args:
        patches: without prefix tokens.
        importance: of the patches, [B, N].
        into: the target of each source, int64 [B, sources].
        merging: which sources merge, 1 or 0, [B, sources].
        num_prefix: see ``split``.

    Returns:
        Patches [B, N, D], sizes [B, N, 1] and importance [B, N]: sources, then targets.
    """
    sources, targets = split(patches.x, num_prefix)
    source_size, target_size = split(patches.size, num_prefix)
    source_importance, target_importance = split(importance, num_prefix)
    weight, place = source_size * merging[..., None], into[..., None]
    total_size = target_size.scatter_add(1, place, weight)
    total = (targets * target_size).scatter_add(1, place.expand_as(sources), sources * weight)
    most = target_importance.scatter_reduce(1, into, source_importance * merging, "amax")
    return (
        torch.cat([sources, total / total_size], dim=1),
        torch.cat([source_size, total_size], dim=1),
        torch.cat([source_importance, most], dim=1),
    )


class LTMPViT(nn.Module):
    """A timm VisionTransformer, neither changed nor copied, with thresholds on similarity and
    importance.

    Args:
        backbone: says where patches are counted; its execution is not used.
        merge: threshold of each block, on the cosine of a source with its target.
        prune: threshold of each block, on the mean attention that a patch gets.

    Raises:
        UnsupportedBackboneError: blocks that are not timm's plain ones, no class token, or a head
            that reads more than it.
        ValueError: not one of each for each block.
    """

    def __init__(self, backbone: StagedViT, merge: Sequence[float], prune: Sequence[float]) -> None:
        super().__init__()
        check_reads_class_token(backbone.model, "learned thresholds need")
        if not len(merge) == len(prune) == backbone.depth:
            raise ValueError(
                f"{len(merge)} and {len(prune)} thresholds for {backbone.depth} blocks"
            )
        self.backbone = backbone
        self.thresholds = tuple(zip(merge, prune, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return torch.cat([self.trace(c).logits for c in chunks(self.backbone.model, images)])

    def trace(self, images: Tensor) -> Trace:
        """Classifies images. Tells how many patches are left at each stage, as if they were the
        first ones; not which.
        """
        backbone, prefix = self.backbone, self.backbone.num_prefix
        state = start(backbone.model, images)
        state = state._replace(alive=state.alive.bool())
        counts = [state.alive.sum(1)]
        similarities = torch.zeros_like(counts[0])
        for block, thresholds in zip(backbone.model.blocks, self.thresholds, strict=True):
            targets = (counts[-1] - prefix + prefix % 2) // 2
            sources = counts[-1] - prefix - targets
            similarities = similarities + sources * targets * block.attn.head_dim
            state = self._block(block, state, *thresholds)
            counts.append(state.alive.sum(1))
        kept = torch.stack([counts[block] - prefix for block in backbone.whole_from], dim=1)
        places = torch.arange(backbone.num_patches, device=kept.device)
        return Trace(
            logits=classify_prefix(backbone.model, state.x[:, :prefix]),
            alive=places < kept[..., None],
            macs=linear_macs(backbone, counts) + similarities,
        )

    def _block(self, block: Any, state: State, merge: float, prune: float) -> State:
        prefix, alive = self.backbone.num_prefix, state.alive
        hidden = torch.zeros_like(state.x[..., 0]).masked_fill(~alive, -torch.inf)
        x, keys, paid = attend(
            block, state, lambda scores: (scores + hidden[:, None, None]).softmax(-1), among(alive)
        )
        importance = (paid * alive[..., None]).sum(1) / alive.sum(1, keepdim=True)
        patches = State(x[:, prefix:], state.size[:, prefix:], alive[:, prefix:])
        sources, targets = split(F.normalize(keys[:, prefix:], dim=2), prefix)
        living, possible = split(patches.alive, prefix)
        importance = importance[:, prefix:]
        if targets.shape[1]:
            similarity = (sources @ targets.mT).masked_fill(~possible[:, None], -torch.inf)
            most, into = similarity.max(2)
            merging = living & (most > merge)
            x_merged, size, importance = merge_into(patches, importance, into, merging, prefix)
            patches = State(x_merged, size, torch.cat([living & ~merging, possible], dim=1))
        keeps = patches.alive & (importance > prune)
        longest = int(keeps.sum(1).max())
        order = keeps.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
        x, size = (
            torch.cat([whole[:, :prefix], part.take_along_dim(order[..., None], 1)], dim=1)
            for whole, part in ((x, patches.x), (state.size, patches.size))
        )
        alive = torch.cat([alive[:, :prefix], keeps.take_along_dim(order, 1)], dim=1)
        return State(among(alive)(partial(feed_forward, block), x), size, alive)


def among(alive: Tensor) -> Run:
    """Runs layers on the living tokens alone, bool [B, L]; the others are zero then."""
    if alive.all():
        return lambda layer, x: layer(x)

    def run(layer: Layer, x: Tensor) -> Tensor:
        rows = layer(x[alive])
        return rows.new_zeros(*alive.shape, rows.shape[1]).index_put((alive,), rows)

    return run


# --- training ---


def passes(values: Tensor, threshold: Tensor) -> Tensor:
    """1 where a value is above the threshold, else 0, with the gradient of a sigmoid."""
    soft = ((values - threshold) / TEMPERATURE).sigmoid()
    return (values > threshold).to(soft.dtype) + (soft - soft.detach())


def masked_pass(
    backbone: StagedViT, images: Tensor, merge: Tensor, prune: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Runs all tokens, and hides those that are gone, with the gradient to the thresholds.

    Args:
        backbone: the frozen model.
        images: [B, C, H, W].
        merge: see ``LTMPViT``, [depth].
        prune: likewise.

    Returns:
        Logits [B, classes], and which tokens are left behind each block, 1 or 0, [B, L].
    """
    state, history = start(backbone.model, images), []
    for index, block in enumerate(backbone.model.blocks):
        state = _masked_block(block, state, merge[index], prune[index], backbone.num_prefix)
        history.append(state.alive)
    return classify_prefix(backbone.model, state.x[:, : backbone.num_prefix]), history


def _masked_block(block: Any, state: State, merge: Tensor, prune: Tensor, prefix: int) -> State:
    alive = state.alive

    def softmax(scores: Tensor) -> Tensor:
        weights = (scores - scores.amax(-1, keepdim=True)).exp() * alive[:, None, None]
        return (weights + EPSILON / alive.shape[1]) / (weights.sum(-1, keepdim=True) + EPSILON)

    x, keys, paid = attend(block, state, softmax, lambda layer, x: layer(x))
    patches = State(x[:, prefix:], state.size[:, prefix:], alive[:, prefix:])
    unit = F.normalize(keys[:, prefix:], dim=2) * patches.alive.detach()[..., None]
    sources, targets = split(unit, prefix)
    most, into = (sources @ targets.mT).max(2)
    merging = passes(most, merge)
    *merged, importance = merge_into(
        patches, paid.mean(1)[:, prefix:], into, merging.detach(), prefix
    )
    living, possible = split(patches.alive, prefix)
    left = torch.cat([torch.where(living > 0, 1 - merging, living), possible], dim=1)
    left = torch.where(left > 0, passes(importance, prune), left)
    x, size, alive = (
        torch.cat([before[:, :prefix], part], dim=1)
        for before, part in zip((x, state.size, alive), (*merged, left), strict=True)
    )
    return State(feed_forward(block, x), size, alive)


def learn_thresholds(
    backbone: StagedViT,
    batches: Iterable[tuple[Tensor, Tensor]],
    compute: float,
    merge_lr: float,
    prune_lr: float,
) -> tuple[list[float], list[float]]:
    """Trains the thresholds by stochastic gradient descent with momentum, as the paper does.

    Args:
        backbone: the frozen model.
        batches: images [B, C, H, W] and labels [B], one batch for each step.
        compute: what a pass should cost, as a share of the dense model.
        merge_lr: learning rate of the merging thresholds.
        prune_lr: learning rate of the pruning thresholds.

    Returns:
        The merging and the pruning threshold of each block.
    """
    merge = torch.full((backbone.depth,), FIRST_MERGE_THRESHOLD, device=backbone.device)
    prune = torch.zeros(backbone.depth, device=backbone.device)
    rates = ((merge, merge_lr), (prune, prune_lr))
    optimizer = torch.optim.SGD(
        [{"params": [each.requires_grad_()], "lr": lr} for each, lr in rates], momentum=0.9
    )
    for images, labels in batches:
        logits, history = masked_pass(backbone, images, merge, prune)
        counts = [torch.full_like(history[0].sum(1), backbone.num_slots)]
        counts += [alive.sum(1) for alive in history]
        spent = linear_macs(backbone, counts).mean() / backbone.dense_macs
        loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        loss = loss + BUDGET_WEIGHT * (spent - compute) ** 2
        optimizer.zero_grad()
        loss.backward()
        # where what is gone was nearly all that a query paid attention to, the masks' gradient is
        # hundreds of times larger: a threshold on merging jumps to 1, where it has none any more
        for each, _ in rates:
            nn.utils.clip_grad_norm_(each, GRADIENT_NORM)
        optimizer.step()
        with torch.no_grad():
            for each, _ in rates:
                each.clamp_(0, 1)
    return merge.tolist(), prune.tolist()
