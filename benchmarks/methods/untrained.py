"""Methods that need no training: top-k by a score, thresholds, merging, and an oracle."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from torch import Tensor

from prunevit.agents.policies.heuristics import AttentionThreshold, Score, TopK
from prunevit.agents.policies.oracle import Oracle
from prunevit.agents.pruned_vit import PrunedViT, Trace
from prunevit.benchmarks.baselines import evit as evit_baseline
from prunevit.benchmarks.baselines import tome as tome_baseline
from prunevit.benchmarks.baselines.ats import ATS
from prunevit.benchmarks.protocol import (
    Benchmark,
    FixedScheduleModel,
    Knobs,
    Method,
    UnreachableError,
    bisect,
)
from prunevit.trainers.common.evaluation import schedules_at

SHAPES = (1.0, 0.7, 0.5, 0.35)  # schedules that keep this share from one stage to the next
ORACLE_IMAGES = 100


def best_schedule(
    bench: Benchmark, score: Score, seed: int, gmacs: float, pays_attention: bool
) -> Knobs:
    """Of several ways to spread equal numbers of tokens over the stages, the one with which a top-k
    by ``score`` is most accurate on validation.

    Raises:
        UnreachableError: it costs more even with no patch kept.
    """
    backbone = bench.backbone
    least = backbone.uniform_macs([0] * backbone.num_stages, pays_attention) / 1e9
    if least > gmacs:
        raise UnreachableError(f"with no patch kept it costs {least:.4f} GMACs")
    shapes = [[shape**stage for stage in range(backbone.num_stages)] for shape in SHAPES]
    ways = {
        tuple(tokens)
        for shape in shapes
        for tokens in schedules_at(backbone, gmacs, shape, pays_attention)
    }

    def accuracy(tokens: Sequence[int]) -> float:
        return bench.validate(PrunedViT(backbone, TopK(tokens, score, seed))).accuracy

    return {"tokens": max(map(list, sorted(ways)), key=accuracy)}


def top_k(score: Score, bench: Benchmark, seed: int) -> Method:
    """Top-k by a score, with the best schedule."""
    return Method(
        tune=lambda gmacs: best_schedule(bench, score, seed, gmacs, score == "attention"),
        make=lambda knobs: PrunedViT(bench.backbone, TopK(knobs["tokens"], score, seed)),
    )


def attention_threshold(bench: Benchmark, seed: int) -> Method:
    """The same threshold on class attention at every stage."""
    backbone = bench.backbone

    def make(knobs: Knobs) -> PrunedViT:
        return PrunedViT(backbone, AttentionThreshold([knobs["threshold"]] * backbone.num_stages))

    def tune(gmacs: float) -> Knobs:
        def cost(threshold: float) -> float:
            return bench.validate(make({"threshold": threshold})).gmacs

        limit = float(backbone.num_patches)
        return {"threshold": bisect(cost, 1e-3, limit, gmacs, at_least=True)}

    return Method(tune, make)


def adaptive_sampling(bench: Benchmark, seed: int) -> Method:
    """ATS, with the same number of samples at every stage."""
    backbone = bench.backbone

    def make(knobs: Knobs) -> ATS:
        return ATS(backbone, [knobs["samples"]] * backbone.num_stages)

    def cost(samples: int) -> float:
        return bench.validate(make({"samples": samples})).gmacs

    def tune(gmacs: float) -> Knobs:
        # samples often fall on the same patch, so many more than there are patches can be needed
        most = 64 * backbone.num_patches
        samples = bisect_left(range(most + 1), gmacs, lo=2, hi=most, key=cost)
        if samples == most and cost(most) < gmacs:
            raise UnreachableError(f"{most} samples cost less")
        return {"samples": samples}

    return Method(tune, make)


def tome(bench: Benchmark, seed: int) -> Method:
    """Token merging as evenly as possible, with the most merges that cost at least the target."""
    backbone, model = bench.backbone, bench.model
    count = tome_baseline.macs_counter(model, backbone.image_shape)

    def make(knobs: Knobs) -> FixedScheduleModel:
        merges = knobs["merges"]
        tokens = tome_baseline.token_counts(backbone.num_patches, 0, merges)
        kept = [tokens[block] for block in backbone.prune_before]
        merging = tome_baseline.ToMeViT(model, merges)
        return FixedScheduleModel(merging, backbone, count(merges), kept)

    def tune(gmacs: float) -> Knobs:
        try:
            merges = tome_baseline.merges_at(model, backbone.image_shape, gmacs * 1e9)
        except ValueError as error:
            raise UnreachableError(str(error)) from error
        # these cost at most the target: one merge less costs at least as much
        fewer = max(sum(merges) - 1, 0)
        return {"merges": list(tome_baseline.even_merges(fewer, backbone.depth))}

    return Method(tune, make)


def evit(with_fused: bool, bench: Benchmark, seed: int) -> Method:
    """EViT with its paper's schedule, the same share at every stage: the lowest that costs at least
    the target.
    """
    backbone, model = bench.backbone, bench.model
    patches, stages = backbone.num_patches, backbone.prune_before
    count = evit_baseline.macs_counter(model, backbone.image_shape, stages, with_fused)
    rates = [kept / patches for kept in range(1, patches + 1)]
    schedules = sorted(
        {evit_baseline.even_tokens(patches, rate, len(stages), with_fused) for rate in rates}
    )

    def make(knobs: Knobs) -> FixedScheduleModel:
        tokens = knobs["tokens"]
        kept = evit_baseline.token_counts(patches, tokens, with_fused)
        fusing = evit_baseline.EViT(model, stages, tokens, with_fused)
        return FixedScheduleModel(fusing, backbone, count(tokens), kept)

    def tune(gmacs: float) -> Knobs:
        place = bisect_left(schedules, gmacs * 1e9, key=count)  # more patches cost more
        if place == len(schedules):
            raise UnreachableError("all of its patches cost less")
        return {"tokens": list(schedules[place])}

    return Method(tune, make)


def oracle(knows_labels: bool, bench: Benchmark, seed: int) -> Method:
    """Greedy leave-one-out, with the numbers of patches with which class attention does best."""

    def search(knobs: Knobs) -> Callable[[Tensor, Tensor], Trace]:
        found = Oracle(bench.backbone, knobs["tokens"])
        return lambda images, labels: found.trace(images, labels if knows_labels else None)

    return Method(
        tune=lambda gmacs: best_schedule(bench, "attention", seed, gmacs, pays_attention=False),
        make=None,
        search=search,
        most_images=ORACLE_IMAGES,
    )
