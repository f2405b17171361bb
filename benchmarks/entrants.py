"""Who takes part in ``benchmarks.compare``: how each policy is trained, and how it is brought to a
given cost.

Every policy has one knob that its cost follows. For each operating point the knob is set on
validation images: ours cost at most what the point says, policies to compare with at least that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prunevit.agents.policies.heuristics import AdaptiveSampling, AttentionThreshold, Score, TopK
from prunevit.agents.policies.oracle import Oracle
from prunevit.agents.pruned_vit import PrunedViT, Trace
from prunevit.benchmarks.arena import Arena, Bound, Contender, Knobs, UnreachableError, bisected
from prunevit.benchmarks.peers.evit import EViT, even_tokens
from prunevit.benchmarks.peers.evit import macs_counter as evit_macs_counter
from prunevit.benchmarks.peers.evit import token_counts as evit_token_counts
from prunevit.benchmarks.peers.tome import (
    ToMeViT,
    even_merges,
    macs_counter,
    merges_at,
    token_counts,
)
from prunevit.benchmarks.trained import (
    BENCHMARL,
    BENCHMARL_MINUTES,
    OURS,
    RECIPES,
    benchmarl,
    dynamic_vit,
    fine_tuned,
    learned,
    one_price_each,
)
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.evaluation import evaluate, schedules_at

SHAPES = (1.0, 0.7, 0.5, 0.35)  # of equal lengths: what is kept from one stage to the next
ORACLE_IMAGES = 100


@dataclass(frozen=True)
class Entrant:
    """A policy that can take part.

    Attributes:
        title: what it is, in a line.
        open: arena and seed -> the policy at any cost.
        is_seeded: whether another seed is another policy.
        fine_tunes: whether it changes the backbone's weights.
    """

    title: str
    open: Callable[[Arena, int], Contender | Bound]
    is_seeded: bool = True
    fine_tunes: bool = False


# --- policies that need no training ---


def best_schedule(
    arena: Arena, score: Score, seed: int, gmacs: float, pays_attention: bool
) -> Knobs:
    """Equal lengths; of several ways to spread them over the stages the best of a top-k by
    ``score`` on validation.

    Raises:
        UnreachableError: with no patch kept it costs more.
    """
    backbone = arena.backbone
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
        model = PrunedViT(backbone, TopK(tokens, score, seed))
        return evaluate(model, arena.validation, arena.size).accuracy

    return {"tokens": max(map(list, sorted(ways)), key=accuracy)}


def top_k(score: Score, arena: Arena, seed: int) -> Contender:
    """The best schedule."""
    return Contender(
        tune=lambda gmacs: best_schedule(arena, score, seed, gmacs, score == "attention"),
        make=lambda knobs: PrunedViT(arena.backbone, TopK(knobs["tokens"], score, seed)),
    )


def attention_threshold(arena: Arena, seed: int) -> Contender:
    """The same threshold at every stage."""
    backbone = arena.backbone

    def make(knobs: Knobs) -> PrunedViT:
        return PrunedViT(backbone, AttentionThreshold([knobs["threshold"]] * backbone.num_stages))

    def tune(gmacs: float) -> Knobs:
        def cost(threshold: float) -> float:
            return arena.gmacs_of(make({"threshold": threshold}))

        limit = float(backbone.num_patches)
        return {"threshold": bisected(cost, 1e-3, limit, gmacs, at_least=True)}

    return Contender(tune, make)


def adaptive_sampling(arena: Arena, seed: int) -> Contender:
    """As many samples at every stage."""
    backbone = arena.backbone

    def make(knobs: Knobs) -> PrunedViT:
        return PrunedViT(backbone, AdaptiveSampling([knobs["samples"]] * backbone.num_stages))

    def cost(samples: int) -> float:
        return arena.gmacs_of(make({"samples": samples}))

    def tune(gmacs: float) -> Knobs:
        # quantiles fall on one patch again and again: many more samples than patches are kept
        fewest, most = 1, 64 * backbone.num_patches
        if cost(most) < gmacs:
            raise UnreachableError(f"{most} samples cost less")
        while fewest < most:
            middle = (fewest + most) // 2
            if cost(middle) < gmacs:
                fewest = middle + 1
            else:
                most = middle
        return {"samples": most}

    return Contender(tune, make)


# --- what pruning could reach ---


def oracle(knows_labels: bool, arena: Arena, seed: int) -> Bound:
    """Greedy leave-one-out, at the numbers of patches with which class attention does best."""

    def search(knobs: Knobs) -> Callable[[Tensor, Tensor], Trace]:
        found = Oracle(arena.backbone, knobs["tokens"])
        return lambda images, labels: found.trace(images, labels if knows_labels else None)

    return Bound(
        tune=lambda gmacs: best_schedule(arena, "attention", seed, gmacs, pays_attention=False),
        search=search,
        images=ORACLE_IMAGES,
    )


# --- models that are no policies ---


class Peer(nn.Module):
    """A model that treats all images alike, with what ``evaluate`` asks of a ``PrunedViT``.

    Args:
        model: images [B, C, H, W] -> logits.
        backbone: the staged ViT that it was made from.
        macs: multiply-accumulates of an image.
        kept: patches that are left behind each stage.
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
        """Which patches are left is not told: their number is, from the first on."""
        batch, patches = len(images), self.backbone.num_patches
        count = torch.tensor(self.kept, device=images.device)[:, None]
        alive = torch.arange(patches, device=images.device) < count  # [T, N]
        macs = torch.full((batch,), self.macs, device=images.device)
        return Trace(self(images), alive.expand(batch, -1, -1), macs)


def tome(arena: Arena, seed: int) -> Contender:
    """As evenly merged as it goes, by the fewest merges that cost no more."""
    backbone, model = arena.backbone, arena.model
    count = macs_counter(model, backbone.image_shape)

    def make(knobs: Knobs) -> Peer:
        merges = knobs["merges"]
        tokens = token_counts(backbone.num_patches, 0, merges)
        kept = [tokens[block] for block in backbone.prune_before]
        return Peer(ToMeViT(model, merges), backbone, count(merges), kept)

    def tune(gmacs: float) -> Knobs:
        try:
            merges = merges_at(model, backbone.image_shape, gmacs * 1e9)
        except ValueError as error:
            raise UnreachableError(str(error)) from error
        # one merge less costs at least as much as asked for
        return {"merges": list(even_merges(max(sum(merges) - 1, 0), backbone.depth))}

    return Contender(tune, make)


def evit(with_fused: bool, arena: Arena, seed: int) -> Contender:
    """The paper's schedule, the same share of what there is at every stage: the lowest that costs
    no less.
    """
    backbone, model = arena.backbone, arena.model
    count = evit_macs_counter(model, backbone.image_shape, backbone.prune_before, with_fused)
    schedules = sorted(
        {
            even_tokens(
                backbone.num_patches, kept / backbone.num_patches, backbone.num_stages, with_fused
            )
            for kept in range(1, backbone.num_patches + 1)
        }
    )

    def make(knobs: Knobs) -> Peer:
        tokens = knobs["tokens"]
        kept = evit_token_counts(backbone.num_patches, tokens, with_fused)
        peer = EViT(model, backbone.prune_before, tokens, with_fused)
        return Peer(peer, backbone, count(tokens), kept)

    def tune(gmacs: float) -> Knobs:
        # more patches cost more
        place = bisect_left(schedules, gmacs * 1e9, key=count)
        if place == len(schedules):
            raise UnreachableError("all of its patches cost less")
        return {"tokens": list(schedules[place])}

    return Contender(tune, make)


# --- who there is ---

ENTRANTS: Mapping[str, Entrant] = {
    "random": Entrant("random top-k", partial(top_k, "random")),
    "norm": Entrant("length of the embedding, top-k", partial(top_k, "norm"), is_seeded=False),
    "brightness": Entrant("mean pixel, top-k", partial(top_k, "brightness"), is_seeded=False),
    "attention": Entrant("class attention, top-k", partial(top_k, "attention"), is_seeded=False),
    "threshold": Entrant("class attention, threshold", attention_threshold, is_seeded=False),
    "ats": Entrant("adaptive token sampling", adaptive_sampling, is_seeded=False),
    "tome": Entrant("token merging", tome, is_seeded=False),
    "evit": Entrant("class attention, the rest fused", partial(evit, True), is_seeded=False),
    "evit-unfused": Entrant(
        "class attention, the paper's schedule", partial(evit, False), is_seeded=False
    ),
    "dynamic-vit": Entrant(
        "DynamicViT, frozen backbone", partial(dynamic_vit, "dynamic-vit", False)
    ),
    "dynamic-vit-fine-tuned": Entrant(
        "DynamicViT as published: the backbone learns too",
        partial(dynamic_vit, "dynamic-vit-fine-tuned", True),
        fine_tunes=True,
    ),
    "oracle": Entrant(
        f"greedy leave-one-out by the true class, {ORACLE_IMAGES} images",
        partial(oracle, True),
        is_seeded=False,
    ),
    "oracle-no-labels": Entrant(
        f"greedy leave-one-out by the dense model's answer, {ORACLE_IMAGES} images",
        partial(oracle, False),
        is_seeded=False,
    ),
    **{
        name: Entrant(recipe.title, partial(learned, name, recipe))
        for name, recipe in RECIPES.items()
    },
    **{
        f"benchmarl-{name}": Entrant(
            f"BenchMARL's {name.upper()}, {BENCHMARL_MINUTES:g} minutes",
            partial(benchmarl, f"benchmarl-{name}", name),
        )
        for name in BENCHMARL
    },
    "mappo-each-price": Entrant(
        "ours, a training for each operating point", partial(one_price_each, OURS)
    ),
    "mappo-fine-tuned": Entrant(
        "ours, the backbone fine-tuned under it",
        partial(fine_tuned, "mappo-fine-tuned", OURS),
        fine_tunes=True,
    ),
}
