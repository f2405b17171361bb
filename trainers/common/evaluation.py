"""How accurate and how cheap a pruned ViT is on given images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prunevit.agents.policies.heuristics import Score, TopK
from prunevit.agents.pruned_vit import PrunedViT, Trace
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data.prefetch import prefetch
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.distributed import ALONE, Ranks

BATCH_SIZE = 250
HALVINGS = 50  # of the scale of a schedule: far below what a single token makes


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a set of images.

    Attributes:
        accuracy: share of right answers.
        gmacs: mean 1e9 multiply-accumulates an image, the policy's included.
        kept: mean share of the patches that survived each stage.
        left: how many images had 0, 1, ... N patches left at the end.
    """

    accuracy: float
    gmacs: float
    kept: tuple[float, ...]
    left: tuple[int, ...]


class Traced(Protocol):
    """What is evaluated: a ``PrunedViT``, or what tells as much of itself."""

    backbone: StagedViT

    def trace(self, images: Tensor) -> Trace: ...


def evaluate(
    model: Traced,
    images: ImageSet,
    size: int | None = None,
    ranks: Ranks = ALONE,
    workers: int = 0,
) -> Evaluation:
    """Runs ``model`` over ``size`` images (all where None), evenly spread: a folder's are sorted by
    class. ``ranks`` share them, and each gets the result of all; ``workers`` of each read them.
    """
    return evaluate_traces(
        lambda pixels, _: model.trace(pixels), model.backbone, images, size, ranks, workers
    )


@torch.inference_mode()
def evaluate_traces(
    trace_of: Callable[[Tensor, Tensor], Trace],
    backbone: StagedViT,
    images: ImageSet,
    size: int | None = None,
    ranks: Ranks = ALONE,
    workers: int = 0,
) -> Evaluation:
    """``evaluate`` of what may look at the labels.

    Args:
        trace_of: images [B, C, H, W] and labels [B], on the backbone's device -> what was done.
        backbone: that is pruned.
        images: of which ``size`` are taken (all where None).
        ranks: who share them.
        workers: processes of each that read them ahead.
    """
    count = len(images) if size is None else min(size, len(images))
    chosen = [i * len(images) // count for i in range(count)]
    device = backbone.device
    right, macs, kept = 0, 0, torch.zeros(backbone.num_stages)
    left = torch.zeros(backbone.num_patches + 1, dtype=torch.int64)
    starts = range(0, count, BATCH_SIZE)[ranks.rank :: ranks.count]
    batches = (chosen[start : start + BATCH_SIZE] for start in starts)
    for pixels, labels in prefetch(images, batches, workers, device):
        trace = trace_of(pixels.to(device, backbone.dtype), labels.to(device))
        right += int((trace.logits.argmax(1).cpu() == labels).sum())
        macs += int(trace.macs.sum())
        survivors = trace.alive.sum(2).cpu()  # [B, T]
        kept += survivors.sum(0) / backbone.num_patches
        left += survivors[:, -1].bincount(minlength=len(left))
    right, macs = ranks.total(right), ranks.total(macs)
    kept, left = (ranks.total_of(each) for each in (kept, left))
    return Evaluation(
        right / count, macs / count / 1e9, tuple((kept / count).tolist()), tuple(left.tolist())
    )


def schedules_at(
    backbone: StagedViT, gmacs: float, kept: Sequence[float], with_attention: bool = True
) -> list[list[int]]:
    """Ways to spend at least ``gmacs`` an image with the same number of tokens for every image.

    Three kinds, each with as few tokens as reach the cost: the shape of ``kept`` scaled, a constant
    share from stage to stage, and one cut at each stage after which nothing more is pruned.

    Args:
        backbone: the staged ViT.
        gmacs: 1e9 multiply-accumulates.
        kept: share of patches after each stage, of the policy to be matched.
        with_attention: whether whoever follows the schedule observes attention, and pays for it.

    Returns:
        Tokens to keep at each stage, a list for each way.
    """
    patches, stages = backbone.num_patches, backbone.num_stages

    def shape_scaled(scale: float) -> list[float]:
        return [min(1.0, share * scale) for share in kept]

    def geometric(scale: float) -> list[float]:
        return [scale ** (stage + 1) for stage in range(stages)]

    def one_cut(first: int) -> Callable[[float], list[float]]:
        return lambda scale: [1.0 if stage < first else scale for stage in range(stages)]

    def tokens_of(shares: Sequence[float]) -> list[int]:
        return [round(share * patches) for share in shares]

    def reaches(shares: Sequence[float]) -> bool:
        return backbone.uniform_macs(tokens_of(shares), with_attention) / 1e9 >= gmacs

    found: list[list[int]] = []
    for shape, most in [
        (shape_scaled, 1 / max(min(kept), 1 / patches)),
        (geometric, 1.0),
        *((one_cut(first), 1.0) for first in range(stages)),
    ]:
        # nor is it as much where the cost is higher even with nobody kept
        if not reaches(shape(most)) or reaches(shape(0.0)):
            continue
        # the cost never falls as the scale grows: halve what lies around the least that reaches it
        low, high = 0.0, most
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if reaches(shape(middle)) else (middle, high)
        if (tokens := tokens_of(shape(high))) not in found:
            found.append(tokens)
    # a policy whose own cost eats up all that it saves is matched by no pruning at all
    return found or [[patches] * stages]


def best_topk(
    backbone: StagedViT,
    images: ImageSet,
    gmacs: float,
    kept: Sequence[float],
    score: Score,
    size: int | None = None,
) -> list[int]:
    """The schedule of ``schedules_at`` with which a top-k by ``score`` is most accurate on
    ``images``.
    """
    candidates = schedules_at(backbone, gmacs, kept, with_attention=score == "attention")
    return max(
        candidates,
        key=lambda tokens: (
            evaluate(PrunedViT(backbone, TopK(tokens, score)), images, size).accuracy
        ),
    )
