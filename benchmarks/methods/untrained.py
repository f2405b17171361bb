"""Methods that need no training: top-k by a score, thresholds, merging, and an oracle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement, pairwise, product
from typing import Any

from torch import Tensor, nn

from prunevit.agents.policies.heuristics import AttentionThreshold, Score, TopK
from prunevit.agents.policies.oracle import Oracle
from prunevit.agents.pruned_vit import PrunedViT, Trace
from prunevit.benchmarks.baselines import evit as evit_baseline
from prunevit.benchmarks.baselines import tome as tome_baseline
from prunevit.benchmarks.baselines import zero_tprune as zero_tprune_baseline
from prunevit.benchmarks.baselines.ats import ATS
from prunevit.benchmarks.baselines.pitome import PiToMeViT, share_merges
from prunevit.benchmarks.baselines.timm_parts import pass_counter
from prunevit.benchmarks.protocol import (
    TOLERANCE,
    Benchmark,
    FixedScheduleModel,
    Knobs,
    Method,
    check_matched,
    nearest,
    search_knob,
    with_best_dither,
)
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.evaluation import Traced, schedules_costing

SHAPES = (1.0, 0.7, 0.5, 0.35)  # schedules that keep this share from one stage to the next
MOST_COUNTED = 5  # nudged schedules whose exact cost is counted
NUDGE = 2  # tokens of a stage by which a schedule is brought to its cost
PITOME_SHARES = 2_000  # between a half and all, that are tried
RATES = 1_000  # shares of patches that stay at each stage, that are tried
ORACLE_IMAGES = 100
DITHERS = (0.0, 0.25, 0.5, 1.0)  # of scores that no training gave a scale


def best_schedule(
    bench: Benchmark,
    gmacs: float,
    count: Callable[[Sequence[int]], int],
    make: Callable[[Knobs], Traced],
    published: Sequence[tuple[int, ...]] = (),
    least: int = 1,
) -> Knobs:
    """Of several ways to spread equal numbers of patches over the stages, the one with which a
    method is most accurate on validation.

    Args:
        bench: the benchmark.
        gmacs: the target.
        count: numbers of patches at the stages -> multiply-accumulates of an image.
        make: ``tokens`` as knobs -> the pruned model.
        published: schedules of the method's authors, the fewest patches first; that nearest to the
            target is one of the ways.
        least: how many patches stay at the last stage at least.

    Raises:
        UnreachableError: none of the ways costs the target.
    """
    patches, stages = bench.backbone.num_patches, bench.backbone.num_stages

    @cache
    def macs(tokens: tuple[int, ...]) -> int:
        return count(tokens)

    def clamped(tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(max(least, number) for number in tokens)

    def miss(tokens: tuple[int, ...]) -> float:
        return abs(macs(tokens) / 1e9 - gmacs)

    def nearest_nudged(start: tuple[int, ...]) -> tuple[int, ...]:
        # another count can be slow; near a schedule it differs about as that of our runtime
        own = bench.backbone.uniform_macs
        wanted = 1e9 * gmacs - macs(start) + own(start)
        near = [way for way in nudged(start, patches) if way[-1] >= least]
        near.sort(key=lambda way: abs(own(way) - wanted))
        return min(near[:MOST_COUNTED], key=miss)

    starts: list[Sequence[int]] = []
    if published:
        starts.append(nearest(published, macs, gmacs * 1e9)[0])
    for shape in SHAPES:
        shares = [shape**stage for stage in range(stages)]
        starts += schedules_costing(patches, shares, gmacs, lambda each: macs(clamped(each)))
    ways = {clamped((0,) * stages)}
    for start in map(clamped, starts):
        # what its authors have is left as it is where it costs the point
        ways.add(start if miss(start) <= TOLERANCE * gmacs else nearest_nudged(start))
    matched = [tokens for tokens in sorted(ways) if miss(tokens) <= TOLERANCE * gmacs]
    if not matched:
        best = min(ways, key=miss)
        check_matched(macs(best) / 1e9, gmacs, {"tokens": list(best)})
    best = max(matched, key=lambda tokens: bench.validate(make({"tokens": list(tokens)})))
    return {"tokens": list(best)}


def nudged(tokens: Sequence[int], patches: int) -> set[tuple[int, ...]]:
    """Schedules that keep up to ``NUDGE`` tokens more or fewer at one or two stages: one token of a
    stage can cost more than an operating point's tolerance, two stages make up for it.
    """
    offsets = range(-NUDGE, NUDGE + 1)
    found = set()
    for first, second in combinations_with_replacement(range(len(tokens)), 2):
        for offset, other in product(offsets, offsets):
            changed = list(tokens)
            changed[first] += offset
            changed[second] += other
            # what is pruned stays pruned
            falls = all(now <= before for before, now in pairwise([patches, *changed]))
            if falls and changed[-1] >= 0:
                found.add(tuple(changed))
    return found


def even_schedules(patches: int, stages: int, with_fused: bool) -> list[tuple[int, ...]]:
    """EViT's schedules, which keep the same share at every stage, the fewest tokens first."""
    shares = (i / RATES for i in range(1, RATES + 1))
    schedules = (evit_baseline.even_tokens(patches, each, stages, with_fused) for each in shares)
    return list(dict.fromkeys(schedules))


def top_k(score: Score, bench: Benchmark, seed: int) -> Method:
    """Top-k by a score, with the best schedule."""
    backbone = bench.backbone

    def make(knobs: Knobs) -> PrunedViT:
        return PrunedViT(backbone, TopK(knobs["tokens"], score, seed))

    def count(tokens: Sequence[int]) -> int:
        return backbone.uniform_macs(tokens, score == "attention")

    return Method(lambda gmacs: best_schedule(bench, gmacs, count, make, least=0), make)


def merging_pruned(
    open_method: Callable[[Benchmark, int], Method], bench: Benchmark, seed: int
) -> Method:
    """A method on a backbone that merges what is pruned."""
    own = bench.backbone
    merging = StagedViT(own.model, own.prune_before, prune_at=own.prune_at, on_prune="merge")
    return open_method(replace(bench, backbone=merging), seed)


def attention_threshold(bench: Benchmark, seed: int) -> Method:
    """The same threshold on class attention at every stage. Where the task allows, with the dither
    that is best on validation.
    """
    backbone = bench.backbone

    def make(knobs: Knobs) -> PrunedViT:
        thresholds = [knobs["threshold"]] * backbone.num_stages
        return PrunedViT(backbone, AttentionThreshold(thresholds, knobs.get("dither", 0.0)))

    tried: defaultdict[float, dict[float, float]] = defaultdict(dict)  # by dither

    def tune(gmacs: float) -> Knobs:
        def searched(shared: Knobs) -> Knobs:
            def knobs(threshold: float) -> Knobs:
                return {"threshold": threshold, **shared}

            def cost(threshold: float) -> float:
                return bench.cost(make(knobs(threshold)))

            most = float(backbone.num_patches)
            return search_knob(cost, 1e-3, most, gmacs, knobs, tried[shared.get("dither", 0.0)])

        return with_best_dither(bench, searched, make, DITHERS)

    return Method(tune, make)


def adaptive_sampling(bench: Benchmark, seed: int) -> Method:
    """ATS, with the same number of samples at every stage. Where the task allows, with the dither
    that is best on validation.
    """
    backbone = bench.backbone

    def make(knobs: Knobs) -> ATS:
        return ATS(backbone, [knobs["samples"]] * backbone.num_stages, knobs.get("dither", 0.0))

    @cache
    def cost_of(samples: int, dither: float) -> float:
        return bench.cost(make({"samples": samples, "dither": dither}))

    def tune(gmacs: float) -> Knobs:
        def searched(shared: Knobs) -> Knobs:
            def cost(samples: int) -> float:
                return cost_of(samples, shared.get("dither", 0.0))

            # samples often fall on the same patch, so many more than there are patches can be
            # needed
            choices = range(2, 64 * backbone.num_patches + 1)
            samples, spent = nearest(choices, cost, gmacs)
            knobs = {"samples": samples, **shared}
            check_matched(spent, gmacs, knobs)
            return knobs

        return with_best_dither(bench, searched, make, DITHERS)

    return Method(tune, make)


def merging(
    build: Callable[[Any, Sequence[int]], nn.Module],
    choices: Sequence[tuple[int, ...]],
    bench: Benchmark,
) -> Method:
    """Token merging with the one of ``choices`` (the merges of each block, the most first) whose
    cost is nearest to the target; ``build`` makes the merging model.
    """
    backbone, model = bench.backbone, bench.model
    count = pass_counter(model, backbone.image_shape, build)

    def make(knobs: Knobs) -> FixedScheduleModel:
        merges = knobs["merges"]
        tokens = tome_baseline.token_counts(backbone.num_patches, 0, merges)
        kept = [tokens[block] for block in backbone.whole_from]
        return FixedScheduleModel(build(model, merges), backbone, count(merges), kept)

    def tune(gmacs: float) -> Knobs:
        merges, macs = nearest(choices, count, gmacs * 1e9)
        if abs(macs / 1e9 - gmacs) > TOLERANCE * gmacs:
            ways = nudged_merges(merges, backbone.num_patches)
            merges = min(sorted(ways), key=lambda way: abs(count(way) / 1e9 - gmacs))
        check_matched(count(merges) / 1e9, gmacs, {"merges": list(merges)})
        return {"merges": list(merges)}

    return Method(tune, make)


def nudged_merges(merges: Sequence[int], patches: int) -> set[tuple[int, ...]]:
    """Schedules with up to ``NUDGE`` merges more or fewer in one block, of which it can do all."""
    found = {tuple(merges)}
    for block, offset in product(range(len(merges)), range(-NUDGE, NUDGE + 1)):
        changed = [*merges[:block], merges[block] + offset, *merges[block + 1 :]]
        left = tome_baseline.token_counts(patches, 0, changed)
        if changed[block] >= 0 and [a - b for a, b in pairwise(left)] == changed:
            found.add(tuple(changed))
    return found


def tome(bench: Benchmark, seed: int) -> Method:
    """Token merging as evenly as possible, with the number of merges nearest to the target."""
    depth = bench.backbone.depth
    most = depth * (bench.backbone.num_patches // 2)
    choices = [tome_baseline.even_merges(total, depth) for total in range(most, -1, -1)]
    return merging(tome_baseline.ToMeViT, choices, bench)


def pitome(bench: Benchmark, seed: int) -> Method:
    """PiToMe with its paper's schedule: in each block the same share of the patches stays."""
    backbone = bench.backbone
    shares = (0.5 + i / (2 * PITOME_SHARES) for i in range(PITOME_SHARES + 1))
    choices = [share_merges(backbone.num_patches, share, backbone.depth) for share in shares]
    return merging(PiToMeViT, list(dict.fromkeys(choices)), bench)


def evit(with_fused: bool, bench: Benchmark, seed: int) -> Method:
    """EViT, which keeps the same share at every stage, as in its paper, or by a better schedule."""
    backbone, model = bench.backbone, bench.model
    patches, stages = backbone.num_patches, backbone.whole_from
    count = evit_baseline.macs_counter(model, backbone.image_shape, stages, with_fused)
    schedules = even_schedules(patches, len(stages), with_fused)

    def make(knobs: Knobs) -> FixedScheduleModel:
        tokens = knobs["tokens"]
        kept = evit_baseline.token_counts(patches, tokens, with_fused)
        fusing = evit_baseline.EViT(model, stages, tokens, with_fused)
        return FixedScheduleModel(fusing, backbone, count(tokens), kept)

    return Method(lambda gmacs: best_schedule(bench, gmacs, count, make, schedules), make)


def zero_tprune(bench: Benchmark, seed: int) -> Method:
    """Zero-TPrune, which keeps the same share at every stage, or by a better schedule."""
    backbone, model = bench.backbone, bench.model
    patches, stages = backbone.num_patches, backbone.whole_from
    count = zero_tprune_baseline.macs_counter(model, backbone.image_shape, stages)
    schedules = even_schedules(patches, len(stages), with_fused=False)

    def make(knobs: Knobs) -> FixedScheduleModel:
        tokens = knobs["tokens"]
        pruned = zero_tprune_baseline.ZeroTPrune(model, stages, tokens)
        return FixedScheduleModel(pruned, backbone, count(tokens), tokens)

    return Method(lambda gmacs: best_schedule(bench, gmacs, count, make, schedules), make)


def oracle(knows_labels: bool, bench: Benchmark, seed: int) -> Method:
    """Greedy leave-one-out, with the numbers of patches with which class attention does best."""

    def search(knobs: Knobs) -> Callable[[Tensor, Tensor], Trace]:
        found = Oracle(bench.backbone, knobs["tokens"])
        return lambda images, labels: found.trace(images, labels if knows_labels else None)

    def by_attention(knobs: Knobs) -> PrunedViT:
        return PrunedViT(bench.backbone, TopK(knobs["tokens"], "attention", seed))

    def count(tokens: Sequence[int]) -> int:
        return bench.backbone.uniform_macs(tokens, with_attention=False)

    return Method(
        tune=lambda gmacs: best_schedule(bench, gmacs, count, by_attention, least=0),
        make=None,
        search=search,
        most_images=ORACLE_IMAGES,
    )
