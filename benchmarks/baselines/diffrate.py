"""DiffRate, written from the paper "DiffRate: Differentiable Compression Rate for Efficient Vision
Transformers" (arXiv 2305.17997).

In every block, between attention and MLP, patches are sorted by the attention that the class token
pays them. The last ones are pruned; of the rest, the last ones merge into the most similar of the
others. How many stay after each is learned, once for all images: each number has a probability, and
the expected number stays. In training all tokens run, masks hide those that are gone, and a loss
brings the compute to a target.

With a class token alone this is the authors' code (github.com/OpenGVLab/DiffRate), whose outputs,
in inference and in training, are in tests/fixtures/originals. All prefix tokens are protected;
theirs knows only a class token. A merged patch that is like no other has no weight (theirs could be
negative, and its logarithm undefined).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.benchmarks.baselines.ltmp import linear_macs
from prunevit.benchmarks.baselines.timm_parts import (
    attend,
    check_reads_class_token,
    chunks,
    embed,
    feed_forward,
    pass_counter,
)
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.heads import classify_prefix
from prunevit.trainers.common.masked_vit import masked_attention

Schedule = Sequence[tuple[int, int]]  # patches that stay after pruning and after merging, by block

LABEL_SMOOTHING = 0.1
# the authors have 5 for each squared GFLOP, which for DeiT-S is this for the share of its 4.6
BUDGET_WEIGHT = 100.0
FIRST_LR, LAST_LR = 0.01, 0.001  # of Adam, along a cosine


def merge_last(x: Tensor, size: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merges all patches behind the first ``count`` into the most similar of these, by their mean.
    Sizes are added, those that merge weighted with their similarity.

    Args:
        x: [B, N, D].
        size: [B, N, 1].
        count: how many stay.

    Returns:
        [B, count, D] and [B, count, 1].
    """
    unit = F.normalize(x.detach(), dim=2)
    most, into = (unit[:, count:] @ unit[:, :count].mT).max(2, keepdim=True)
    index = into.expand(-1, -1, x.shape[2])
    merged = x[:, :count].scatter_reduce(1, index, x[:, count:], "mean")
    return merged, size[:, :count].scatter_add(1, into, size[:, count:] * most.clamp(min=0))


def token_counts(patches: int, schedule: Schedule) -> list[int]:
    """Patches before the first block and after each."""
    counts = [patches]
    for kept in schedule:
        counts.append(min(counts[-1], *kept))
    return counts


class DiffRateViT(nn.Module):
    """A timm VisionTransformer, neither changed nor copied, with numbers of patches for each block.

    Args:
        model: the model, in evaluation mode.
        schedule: patches that stay after pruning and after merging, for each block.

    Raises:
        UnsupportedBackboneError: blocks that are not timm's plain ones, no class token, or a head
            that reads more than it.
        ValueError: not two numbers for each block, or fewer than one patch.
    """

    def __init__(self, model: Any, schedule: Schedule) -> None:
        super().__init__()
        self.model = check_reads_class_token(model, "learned compression rates need")
        if len(schedule) != len(model.blocks) or min(map(min, schedule)) < 1:
            raise ValueError(
                f"schedule={schedule}: {len(model.blocks)} blocks need two numbers each, at least 1"
            )
        self.schedule = [tuple(kept) for kept in schedule]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return torch.cat([self._logits(chunk) for chunk in chunks(self.model, images)])

    def _logits(self, images: Tensor) -> Tensor:
        x, prefix = embed(self.model, images), self.model.num_prefix_tokens
        size = torch.ones_like(x[..., :1])
        for block, (stay, then) in zip(self.model.blocks, self.schedule, strict=True):
            bias = size.log().mT[:, None]
            mixed, q, k = attend(block.attn, block.norm1(x), bias)
            x = x + block.ls1(mixed)
            if min(stay, then) < x.shape[1] - prefix:
                scores = q[:, :, :1] @ k.mT * block.attn.scale + bias
                paid = scores.softmax(-1).mean(1)[:, 0, prefix:]
                order = paid.argsort(dim=1, descending=True)[:, :stay, None]
                patches, sizes = (part[:, prefix:].take_along_dim(order, 1) for part in (x, size))
                if then < patches.shape[1]:
                    patches, sizes = merge_last(patches, sizes, then)
                x = torch.cat([x[:, :prefix], patches], dim=1)
                size = torch.cat([size[:, :prefix], sizes], dim=1)
            x = feed_forward(block, x)
        return classify_prefix(self.model, x[:, :prefix])


def macs_counter(model: Any, image_shape: Sequence[int]) -> Callable[[Schedule], int]:
    """Counts what one image costs with a schedule, ranking and matching included."""
    return pass_counter(model, image_shape, DiffRateViT)


# --- training ---


def expected_kept(logits: Tensor, candidates: Tensor) -> Tensor:
    """The expected number of patches, rounded up, with the gradient to the logits [C] of the
    candidates [C].
    """
    expected = logits.softmax(0) @ candidates
    return expected.ceil().detach() + (expected - expected.detach())


def rank_mask(logits: Tensor, candidates: Tensor, kept: int, last: int, patches: int) -> Tensor:
    """0 for the ranks from ``kept`` up to ``last``, else 1, with the gradient of the probability
    that a rank is kept; [patches].
    """
    ranks = torch.arange(patches, device=logits.device)
    probability = logits.softmax(0) @ (candidates[:, None] > ranks).to(logits.dtype)
    hard = ((ranks < kept) | (ranks >= last)).to(logits.dtype)
    return hard + (probability - probability.detach())


def masked_pass(
    backbone: StagedViT, images: Tensor, logits: Tensor, candidates: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Runs all tokens, and hides those that are gone, with the gradient to the rates.

    Args:
        backbone: the frozen model.
        images: [B, C, H, W].
        logits: of the candidates after pruning and after merging, [depth, 2, C]. In the first block
            nothing goes.
        candidates: numbers of patches, [C].

    Returns:
        Logits [B, classes], and the expected numbers of patches after pruning and after merging,
        for each block but the first.
    """
    prefix, patches = backbone.num_prefix, backbone.num_patches
    x = embed(backbone.model, images)
    size, alive = torch.ones_like(x[..., :1]), torch.ones_like(x[..., 0])
    last, history = patches, []
    for block, (prune, merge) in zip(backbone.model.blocks, logits, strict=True):
        attn, normed = block.attn, block.norm1(x)
        qkv = attn.qkv(normed).unflatten(2, (3, attn.num_heads, attn.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        weights = masked_attention(q @ k.mT * attn.scale + size.log().mT[:, None], alive)
        mixed = attn.norm((weights @ v).transpose(1, 2).flatten(2))
        if getattr(attn, "gate", None) is not None:
            mixed = mixed * attn.gate(normed).sigmoid()
        x = x + block.ls1(attn.proj(mixed))
        if block is not backbone.model.blocks[0]:
            order = weights[:, :, 0, prefix:].mean(1).argsort(dim=1, descending=True)
            parts = (part[:, prefix:].take_along_dim(order[..., None], 1) for part in (x, size))
            (patch, sizes), left = parts, alive[:, prefix:].take_along_dim(order, 1)
            stay, then = expected_kept(prune, candidates), expected_kept(merge, candidates)
            history.append((stay, then))
            if stay < last:
                left = left * rank_mask(prune, candidates, int(stay), last, patches)
                last = int(stay)
            if then < last:
                left = left * rank_mask(merge, candidates, int(then), last, patches)
                patch, sizes = _merged_in_place(patch, sizes, int(then), last)
                last = int(then)
            x = torch.cat([x[:, :prefix], patch], dim=1)
            size = torch.cat([size[:, :prefix], sizes], dim=1)
            alive = torch.cat([alive[:, :prefix], left], dim=1)
        x = feed_forward(block, x)
    return classify_prefix(backbone.model, x[:, :prefix]), history


def _merged_in_place(x: Tensor, size: Tensor, count: int, last: int) -> tuple[Tensor, Tensor]:
    """``merge_last`` among the first ``last`` patches, all of which stay where they are."""
    unit = F.normalize(x[:, :last].detach(), dim=2)
    most, into = (unit[:, count:] @ unit[:, :count].mT).max(2, keepdim=True)
    # the authors' code gives sources at least the size of a patch in training
    moved = (size[:, count:last] * most).clamp(min=1)
    index = into.expand(-1, -1, x.shape[2])
    merged = x[:, :count].scatter_reduce(1, index, x[:, count:last], "mean")
    total = size[:, :count].clamp(min=1).scatter_add(1, into, moved)
    return (
        torch.cat([merged, x[:, count:]], dim=1),
        torch.cat([total, moved, size[:, last:]], dim=1),
    )


def expected_counts(backbone: StagedViT, history: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Tokens before the first block and behind each, with the gradient to both expected numbers of
    a block, whichever is the smaller one.
    """
    counts = [torch.full_like(history[0][0], backbone.num_slots)] * 2
    for kept in history:
        fewest = torch.stack([counts[-1] - backbone.num_prefix, *kept]).min().detach()
        gradient = sum((each - each.detach() for each in kept), torch.zeros_like(fewest))
        counts.append(backbone.num_prefix + fewest + gradient)
    return counts


def learn_schedule(
    backbone: StagedViT,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    compute: float,
) -> list[tuple[int, int]]:
    """Trains the rates by Adam, as the paper does.

    Args:
        backbone: the frozen model.
        batches: images [B, C, H, W] and labels [B], one batch for each step.
        steps: how many they are.
        compute: what a pass should cost, as a share of the dense model.

    Returns:
        Patches that stay after pruning and after merging, for each block.
    """
    patches = backbone.num_patches
    candidates = torch.arange(patches, 0, -1, device=backbone.device, dtype=torch.float32)
    logits = torch.zeros(backbone.depth, 2, patches, device=backbone.device, requires_grad=True)
    optimizer = torch.optim.Adam([logits])
    for step, (images, labels) in enumerate(batches):
        rate = LAST_LR + (FIRST_LR - LAST_LR) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        answers, history = masked_pass(backbone, images, logits, candidates)
        loss = F.cross_entropy(answers, labels, label_smoothing=LABEL_SMOOTHING)
        spent = linear_macs(backbone, expected_counts(backbone, history)) / backbone.dense_macs
        loss = loss + BUDGET_WEIGHT * (spent - compute) ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        rest = [[int(expected_kept(each, candidates)) for each in pair] for pair in logits[1:]]
    return [(patches, patches), *((stay, then) for stay, then in rest)]
