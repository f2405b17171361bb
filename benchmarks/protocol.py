"""The protocol of ``benchmarks.compare``: how a method is brought to an operating point, and how it
is judged there.

Every method has one knob. It is set on validation images such that the method's compute matches the
operating point, a share of the dense model's, within 1% from either side. A method that can't be
brought there is judged at the nearest compute that it can have. The test images judge once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunevit.agents.pruned_vit import Trace
from prunevit.benchmarks.records import pack_answers
from prunevit.benchmarks.tasks import Task
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.evaluation import (
    Evaluation,
    Traced,
    evaluate,
    evaluate_traces,
    mean_gmacs,
)

TOLERANCE = 0.01  # between compute on validation and the operating point, relative to the point
CLOSE = TOLERANCE / 4  # where a search ends
FINEST = 1 + 2**-24  # ratio of knobs that float32 doesn't tell apart

Knobs = Mapping[str, Any]
T = TypeVar("T")


class UnreachableError(ValueError):
    """A method can't be brought to an operating point.

    Args:
        message: why not.
        nearest: the knobs that come nearest to it; None if there are none.
    """

    def __init__(self, message: str, nearest: Knobs | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True, eq=False)  # told apart by identity
class Benchmark:
    """What all methods of a comparison share.

    Attributes:
        task: data, backbone and stages.
        base: settings of ``trainers.mappo``, of which methods change some.
        iterations: of every training; None leaves each method its own number.
        model: timm's own model, frozen.
        backbone: the same model, staged.
        validation: images on which knobs are set.
        size: how many of them are used.
        test: images that judge.
        runs: the folder of the trainings' runs.
        index: where the model embeds, photographs of the training that are searched.
        index_size: how many of them.
    """

    task: Task
    base: MappoConfig
    iterations: int | None
    model: nn.Module
    backbone: StagedViT
    validation: ImageSet
    size: int
    test: ImageSet
    runs: Path
    index: ImageSet | None = None
    index_size: int = 0

    @property
    def middle_point(self) -> float:
        """The operating point for which methods train that can train for only one."""
        points = sorted(self.task.points)
        return points[(len(points) - 1) // 2]

    def gmacs_at(self, point: float) -> float:
        """GMACs of an image at an operating point, a share of the dense compute."""
        return point * self.backbone.dense_macs / 1e9

    def cost(self, model: Traced) -> float:
        """Mean GMACs of ``model`` on the validation images."""
        return mean_gmacs(model, self.validation, self.size)

    def validate(self, model: Traced) -> float:
        """How good ``model`` is on the validation images."""
        return evaluate(model, self.validation, self.size).score


@dataclass(frozen=True)
class Method:
    """One method with one seed, at any compute.

    Attributes:
        tune: GMACs of an image -> the knobs that bring it there. Trains where that is due. Raises
            UnreachableError.
        make: the pruned model with these knobs, which may be among other items, as in a record.
            Trains nothing, and raises ValueError where the training's run is gone. None for an
            upper bound.
        search: of an upper bound, which needs the image's own label: knobs -> a function of images
            and labels. Its speed means nothing.
        most_images: that it is judged on, if not all.
    """

    tune: Callable[[float], Knobs]
    make: Callable[[Knobs], Traced] | None
    search: Callable[[Knobs], Callable[[Tensor, Tensor], Trace]] | None = None
    most_images: int | None = None


class FixedScheduleModel(nn.Module):
    """A model that keeps the same number of patches of every image, as ``evaluate`` takes it.

    Args:
        model: images [B, C, H, W] -> logits.
        backbone: the staged ViT that it was made from.
        macs: multiply-accumulates of an image.
        kept: number of patches after each stage.
    """

    def __init__(
        self, model: nn.Module, backbone: StagedViT, macs: int, kept: Sequence[int]
    ) -> None:
        super().__init__()
        self.model = model
        self.backbone = backbone
        self.macs = macs
        self.kept = tuple(kept)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def trace(self, images: Tensor) -> Trace:
        """Tells how many patches are left, as if they were the first ones; not which."""
        count = torch.tensor(self.kept, device=images.device)[:, None]
        alive = torch.arange(self.backbone.num_patches, device=images.device) < count  # [T, N]
        macs = torch.full((len(images),), self.macs, device=images.device)
        return Trace(self(images), alive.expand(len(images), -1, -1), macs)


def check_matched(cost: float, target: float, knobs: Knobs) -> None:
    """Checks that ``knobs``, whose compute on validation is ``cost``, are within ``TOLERANCE``.

    Raises:
        UnreachableError: they are not; it holds them.
    """
    if abs(cost - target) > TOLERANCE * target:
        raise UnreachableError(f"the nearest it can cost is {cost / target:.1%} of that", knobs)


def search_knob(
    cost: Callable[[float], float],
    low: float,
    high: float,
    target: float,
    knobs_of: Callable[[float], Knobs],
    tried: dict[float, float] | None = None,
) -> Knobs:
    """Sets a knob such that it costs ``target``, from whichever side it comes nearest.

    Args:
        cost: knob -> GMACs of an image on validation, which never rise with the knob.
        low: the lowest value of the knob, positive.
        high: the highest.
        target: GMACs of an image.
        knobs_of: the knob as a record has it.
        tried: what earlier searches found that knobs cost; gets what this one finds.

    Raises:
        UnreachableError: no value costs the target within ``TOLERANCE``; it holds the nearest.
    """
    tried = {} if tried is None else tried
    for end in (low, high):
        if end not in tried:
            tried[end] = cost(end)
    high = min((knob for knob in tried if tried[knob] <= target), default=low)
    low = max((knob for knob in tried if knob < high and tried[knob] > target), default=high)
    halves = False
    while high / low > FINEST and tried[low] - target > CLOSE * target < target - tried[high]:
        # where a straight line says, or in the middle after a line that was far off
        share = 0.5 if halves else (tried[low] - target) / (tried[low] - tried[high])
        knob = low * (high / low) ** min(max(share, 0.02), 0.98)
        tried[knob] = cost(knob)
        start, end = (knob, high) if tried[knob] > target else (low, knob)
        halves = not halves and (end / start) ** 2 > high / low
        low, high = start, end
    best = min(tried, key=lambda knob: abs(tried[knob] - target))
    knobs = knobs_of(best)
    check_matched(tried[best], target, knobs)
    return knobs


def with_knobs(more: Knobs, tune: Callable[[], Knobs]) -> Knobs:
    """``more`` beside what ``tune`` returns, or beside the nearest where it can't reach the point.

    Raises:
        UnreachableError: as ``tune`` does.
    """
    try:
        return {**more, **tune()}
    except UnreachableError as error:
        nearest = error.nearest and {**more, **error.nearest}
        raise UnreachableError(str(error), nearest) from error


def with_best_dither(
    bench: Benchmark,
    tune: Callable[[Knobs], Knobs],
    make: Callable[[Knobs], Traced],
    strengths: Sequence[float] = (False, True),
) -> Knobs:
    """Brings a method to an operating point with dither, where the task allows it and that is more
    accurate on validation.

    Args:
        bench: the benchmark.
        tune: the ``dither`` as knobs, or none -> all knobs. Raises UnreachableError.
        make: knobs -> the pruned model.
        strengths: of dither, that of none first.

    Raises:
        UnreachableError: the point can't be reached with any of them.
    """
    if not bench.task.dithers:
        return tune({})
    ways = []
    for dither in strengths:
        try:
            ways.append(tune({"dither": dither}))
        except UnreachableError:
            # one way may not get so low: only if none does, this is the method's limit
            if dither == strengths[-1] and not ways:
                raise
    return max(ways, key=lambda knobs: bench.validate(make(knobs)))


def nearest(choices: Sequence[T], cost: Callable[[T], float], target: float) -> tuple[T, float]:
    """The one of ``choices``, sorted by rising ``cost``, that costs nearest to ``target``, and its
    cost.
    """
    place = bisect_left(choices, target, key=cost)
    around = choices[max(place - 1, 0) : place + 1]
    best = min(around, key=lambda choice: abs(cost(choice) - target))
    return best, cost(best)


@dataclass(frozen=True)
class Judgement:
    """What a model did on test images.

    Attributes:
        evaluation: accuracy and compute.
        logits: of every image, float32 [I, K], on the CPU.
        right: whether it was classified correctly, bool [I].
    """

    evaluation: Evaluation
    logits: Tensor
    right: Tensor

    def compared_with(self, dense: Judgement) -> dict[str, Any]:
        """What a record says of it beside the dense model, judged on the same images.

        ``agreement`` is the share of images to which both give the same answer, ``kl`` the mean
        divergence of the answer from the dense model's, in nats, and ``right`` which images were
        classified correctly.
        """
        log_probs, of_dense = (each.logits.log_softmax(1) for each in (self, dense))
        same = self.logits.argmax(1) == dense.logits.argmax(1)
        found = self.evaluation
        return {
            "accuracy": found.accuracy,
            "dense_accuracy": dense.evaluation.accuracy,
            "agreement": float(same.double().mean()),
            "kl": float((of_dense.exp() * (of_dense - log_probs)).sum(1).double().mean()),
            "images": len(self.right),
            "gmacs": found.gmacs,
            "kept": list(found.kept),
            "left": list(found.left),
            "right": pack_answers(self.right.numpy()),
        }


def judge(method: Method, knobs: Knobs, bench: Benchmark, size: int) -> Judgement:
    """What a method does on ``size`` test images with these knobs."""
    if method.search is not None:
        return judge_traces(method.search(knobs), bench.backbone, bench, size)
    assert method.make is not None
    model = method.make(knobs)
    # it may have stages of its own
    return judge_traces(lambda images, _: model.trace(images), model.backbone, bench, size)


def judge_traces(
    trace_of: Callable[[Tensor, Tensor], Trace], backbone: StagedViT, bench: Benchmark, size: int
) -> Judgement:
    """What ``trace_of``, as ``evaluate_traces`` takes it with ``backbone``, does on ``size`` test
    images.
    """
    logits: list[Tensor] = []
    right: list[Tensor] = []

    def noted(images: Tensor, labels: Tensor) -> Trace:
        trace = trace_of(images, labels)
        logits.append(trace.logits.float().cpu())
        right.append((trace.logits.argmax(1) == labels).cpu())
        return trace

    evaluation = evaluate_traces(noted, backbone, bench.test, size)
    return Judgement(evaluation, torch.cat(logits), torch.cat(right))


@cache
def judge_dense(bench: Benchmark, size: int) -> Judgement:
    """What timm's own model does on ``size`` test images."""
    backbone = bench.backbone
    kept = [backbone.num_patches] * backbone.num_stages
    dense = FixedScheduleModel(bench.model, backbone, backbone.dense_macs, kept)
    return judge_traces(lambda images, _: dense.trace(images), backbone, bench, size)
