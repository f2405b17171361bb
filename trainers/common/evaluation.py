"""How good a model is on given images, and its compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from prunevit.agents.policies.heuristics import Score, TopK
from prunevit.agents.pruned_vit import PrunedViT, Trace
from prunevit.envs.data.classes import check_labels
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data.prefetch import prefetch
from prunevit.envs.data_config import model_classes
from prunevit.envs.game import checked_batch
from prunevit.envs.measures import Measure, measure, measure_for
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.distributed import ALONE, Ranks

BATCH_SIZE = 250
HALVINGS = 50  # of the scale of a schedule, to far below what a single token makes


@dataclass(frozen=True)
class Evaluation:
    """Results of a pruned model on a set of images.

    Attributes:
        score: mean of ``measure`` over the images.
        gmacs: mean 1e9 multiply-accumulates per image, the policy's included.
        kept: mean share of the patches that survive each stage.
        left: how many images have 0, 1, ... N patches left at the end.
        measure: by what the model is judged, see ``measure_for``.
    """

    score: float
    gmacs: float
    kept: tuple[float, ...]
    left: tuple[int, ...]
    measure: Measure = "accuracy"

    @property
    def accuracy(self) -> float:
        """Share of images that were classified correctly.

        Raises:
            ValueError: the images have no labels, or the model has no classifier.
        """
        if self.measure != "accuracy":
            raise ValueError(
                f"{self.measure} was measured, and no accuracy: that needs images with classes and "
                "a model with a classifier"
            )
        return self.score

    def to_json(self) -> dict[str, Any]:
        """The results as JSON values, the score under the name of its measure."""
        others = {"gmacs": self.gmacs, "kept": list(self.kept), "left": list(self.left)}
        return {self.measure: self.score} | others


class Traced(Protocol):
    """What can be evaluated: a ``PrunedViT``, or another model with a trace."""

    backbone: StagedViT

    def trace(self, images: Tensor) -> Trace: ...


def evaluate(
    model: Traced,
    images: ImageSet,
    size: int | None = None,
    ranks: Ranks = ALONE,
    workers: int = 0,
) -> Evaluation:
    """Evaluates a pruned model. Without labels or a classifier, its answers are compared with those
    of the dense model.

    Args:
        model: the model.
        images: the images.
        size: how many of them, evenly spread because those of a folder are sorted by class; all if
            None.
        ranks: the processes that share the images; each returns the result of all.
        workers: processes per rank that load the images.

    Raises:
        ValueError: the backbone is in training mode, the images, their labels or their classes are
            not what it can be judged by, its logits are NaN, or ``size`` is below 1.
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
    """Does what ``evaluate`` does for a model that may use the labels, such as an oracle.
    Its ``trace_of`` takes images [B, C, H, W] and labels [B] on the device of ``backbone``.
    """
    if size is not None and size < 1:
        raise ValueError(f"size={size} must be at least 1")
    check_labels(model_classes(backbone.model), images)
    count = len(images) if size is None else min(size, len(images))
    device = backbone.device
    kind = measure_for(backbone.num_classes, images)
    score, macs, kept = 0.0, 0, torch.zeros(backbone.num_stages)
    left = torch.zeros(backbone.num_patches + 1, dtype=torch.int64)
    for pixels, labels in _batches(images, count, device, ranks, workers):
        pixels, labels = checked_batch(backbone, pixels, labels, kind == "accuracy")
        trace = trace_of(pixels, labels)
        if trace.logits.isnan().any():
            raise ValueError("the model's logits are NaN: check its weights and its precision")
        dense = None if kind == "accuracy" else backbone.model(pixels)
        score += float(measure(kind, trace.logits, labels, dense).sum())
        macs += int(trace.macs.sum())
        survivors = trace.alive.sum(2).cpu()  # [B, T]
        kept += survivors.sum(0) / backbone.num_patches
        left += survivors[:, -1].bincount(minlength=len(left))
    macs = ranks.total(macs)
    # float64 holds the number of right answers exactly
    total = float(ranks.total_of(torch.tensor(score, dtype=torch.float64)))
    kept, left = (ranks.total_of(each) for each in (kept, left))
    if left.sum() != count:
        raise ValueError(f"the data set returned {int(left.sum())} images where {count} were asked")
    return Evaluation(
        total / count,
        macs / count / 1e9,
        tuple((kept / count).tolist()),
        tuple(left.tolist()),
        kind,
    )


def traces(
    model: Traced, images: ImageSet, size: int | None = None
) -> Iterator[tuple[Trace, Tensor]]:
    """What a pruned model does on ``size`` evenly spread images, and their labels [B], batch by
    batch.
    """
    count = len(images) if size is None else min(size, len(images))
    for pixels, labels in _batches(images, count, model.backbone.device, ALONE, 0):
        with torch.inference_mode():
            trace = model.trace(pixels.to(model.backbone.device))
        yield trace, labels


def mean_gmacs(model: Traced, images: ImageSet, size: int | None = None) -> float:
    """Mean 1e9 multiply-accumulates per image of a pruned model on ``size`` evenly spread images,
    its policy's included.
    """
    macs = torch.cat([trace.macs for trace, _ in traces(model, images, size)])
    return int(macs.sum()) / len(macs) / 1e9


@torch.no_grad()
def accuracy(
    model: Callable[[Tensor], Tensor],
    images: ImageSet,
    device: torch.device,
    ranks: Ranks = ALONE,
    workers: int = 0,
) -> float:
    """Share of ``images`` that ``model``, in evaluation mode on ``device``, classifies correctly;
    ``ranks`` and ``workers`` as in ``evaluate``.
    """
    correct = 0
    for pixels, labels in _batches(images, len(images), device, ranks, workers):
        correct += int((model(pixels.to(device)).argmax(1).cpu() == labels).sum())
    return ranks.total(correct) / len(images)


def _batches(
    images: ImageSet, count: int, device: torch.device, ranks: Ranks, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches of ``count`` evenly spread images, with labels [B]."""
    chosen = [i * len(images) // count for i in range(count)]
    starts = range(0, count, BATCH_SIZE)[ranks.rank :: ranks.count]
    parts = (chosen[start : start + BATCH_SIZE] for start in starts)
    yield from prefetch(images, parts, workers, device)


def schedules_at(
    backbone: StagedViT, gmacs: float, kept: Sequence[float], with_attention: bool = True
) -> list[list[int]]:
    """Finds schedules that cost at least ``gmacs`` and keep equally many tokens of every image.

    There are three kinds: the shape of ``kept`` scaled, a constant share from stage to stage, and a
    single cut, at each of the stages. Each has as few tokens as reach the cost.

    Args:
        backbone: the staged ViT.
        gmacs: 1e9 multiply-accumulates per image.
        kept: share of patches after each stage, of the policy to match.
        with_attention: whether the cost of observing attention is included.

    Returns:
        Schedules, each a list of the number of tokens to keep at each stage.
    """
    return schedules_costing(
        backbone.num_patches,
        kept,
        gmacs,
        lambda tokens: backbone.uniform_macs(tokens, with_attention),
    )


def schedules_costing(
    patches: int, kept: Sequence[float], gmacs: float, macs: Callable[[Sequence[int]], int]
) -> list[list[int]]:
    """``schedules_at`` for whatever keeps equally many tokens of every image.

    Args:
        patches: N.
        kept: as of ``schedules_at``, a share for each stage.
        gmacs: likewise.
        macs: number of tokens at each stage -> multiply-accumulates of an image.
    """
    stages = len(kept)

    def shape_scaled(scale: float) -> list[float]:
        return [min(1.0, share * scale) for share in kept]

    def geometric(scale: float) -> list[float]:
        return [scale ** (stage + 1) for stage in range(stages)]

    def one_cut(first: int) -> Callable[[float], list[float]]:
        return lambda scale: [1.0 if stage < first else scale for stage in range(stages)]

    def tokens_of(shares: Sequence[float]) -> list[int]:
        return [round(share * patches) for share in shares]

    def reaches(shares: Sequence[float]) -> bool:
        return macs(tokens_of(shares)) / 1e9 >= gmacs

    found: list[list[int]] = []
    for shape, most in [
        (shape_scaled, 1 / max(min(kept), 1 / patches)),
        (geometric, 1.0),
        *((one_cut(first), 1.0) for first in range(stages)),
    ]:
        # left out if it can't reach the cost, or costs more even with no token kept
        if not reaches(shape(most)) or reaches(shape(0.0)):
            continue
        # bisection: the cost never falls as the scale grows
        low, high = 0.0, most
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if reaches(shape(middle)) else (middle, high)
        if (tokens := tokens_of(shape(high))) not in found:
            found.append(tokens)
    # a policy that costs as much as it saves is only matched by no pruning at all
    return found or [[patches] * stages]


def best_topk(
    backbone: StagedViT,
    images: ImageSet,
    gmacs: float,
    kept: Sequence[float],
    score: Score,
    size: int | None = None,
) -> list[int]:
    """Returns the schedule of ``schedules_at`` with which top-k by ``score`` is best on
    ``size`` of the ``images`` (all if None).
    """
    candidates = schedules_at(backbone, gmacs, kept, with_attention=score == "attention")
    return max(
        candidates,
        key=lambda tokens: evaluate(PrunedViT(backbone, TopK(tokens, score)), images, size).score,
    )
