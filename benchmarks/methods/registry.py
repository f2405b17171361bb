"""All methods that ``benchmarks.compare`` can compare, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from prunevit.benchmarks.methods import each_point, learned, untrained
from prunevit.benchmarks.methods.recipes import RECIPES
from prunevit.benchmarks.protocol import Benchmark, Method


@dataclass(frozen=True)
class MethodSpec:
    """A method that can be compared.

    Attributes:
        title: what it is, in a line.
        open: benchmark and seed -> the method.
        is_seeded: whether its result depends on the seed.
        fine_tunes: whether it changes the backbone's weights.
        embeds: whether it also prunes a backbone without a classifier.
    """

    title: str
    open: Callable[[Benchmark, int], Method]
    is_seeded: bool = True
    fine_tunes: bool = False
    embeds: bool = False


UNSEEDED: dict[str, tuple[str, Callable[[Benchmark, int], Method]]] = {
    "norm": ("norm of the embedding, top-k", partial(untrained.top_k, "norm")),
    "brightness": ("mean pixel, top-k", partial(untrained.top_k, "brightness")),
    "attention": ("class attention, top-k", partial(untrained.top_k, "attention")),
    "attention-merge": (
        "class attention, top-k, the rest merged",
        partial(untrained.merging_pruned, partial(untrained.top_k, "attention")),
    ),
    "threshold": ("class attention, threshold", untrained.attention_threshold),
    "threshold-merge": (
        "class attention, threshold, the rest merged",
        partial(untrained.merging_pruned, untrained.attention_threshold),
    ),
    "ats": ("ATS: adaptive token sampling", untrained.adaptive_sampling),
    "tome": ("ToMe: token merging", untrained.tome),
    "pitome": ("PiToMe: token merging by energy", untrained.pitome),
    "evit": ("EViT: class attention, the rest fused", partial(untrained.evit, True)),
    "evit-unfused": ("EViT without its fused token", partial(untrained.evit, False)),
    "zero-tprune": ("Zero-TPrune: page rank of attention, and similarity", untrained.zero_tprune),
    "oracle": (
        "greedy leave-one-out by the true class, 100 images", partial(untrained.oracle, True),
    ),
    "oracle-no-labels": (
        "greedy leave-one-out by the dense model's answer, 100 images",
        partial(untrained.oracle, False),
    ),
}  # fmt: skip
SEEDED: dict[str, tuple[str, Callable[[Benchmark, int], Method]]] = {
    "random": ("random top-k", partial(untrained.top_k, "random")),
    "random-merge": (
        "random top-k, the rest merged",
        partial(untrained.merging_pruned, partial(untrained.top_k, "random")),
    ),
    "dynamic-vit": ("DynamicViT, frozen backbone", learned.dynamic_vit),
    "dynamic-vit-merge": (
        "DynamicViT, frozen backbone, the rest merged when it is judged",
        partial(learned.dynamic_vit, on_prune="merge"),
    ),
    "dynamic-vit-narrow": (
        "DynamicViT, frozen backbone, predictors as wide as our actor",
        partial(learned.dynamic_vit, narrow=True),
    ),
    "dynamic-vit-fine-tuned": (
        "DynamicViT: the backbone learns too",
        partial(learned.dynamic_vit, fine_tune=True),
    ),
    **{
        f"{name}-fine-tuned": (title, partial(learned.fine_tuned_top_k, f"{name}-fine-tuned", open))
        for name, title, open in (
            (
                "attention",
                "class attention, top-k: the backbone fine-tuned under it",
                partial(untrained.top_k, "attention"),
            ),
            (
                "evit",
                "EViT without its fused token: the backbone fine-tuned under it",
                partial(untrained.evit, False),
            ),
        )
    },
    "ltmp": ("LTMP: learned thresholds, merging and pruning", each_point.ltmp),
    "diffrate": ("DiffRate: learned rates, pruning and merging", each_point.diffrate),
    **{
        name: (recipe.title, partial(learned.sampled if recipe.samples else learned.mappo, name))
        for name, recipe in RECIPES.items()
    },
    **{
        f"{name}-threshold": (f"{recipe.title}, by a threshold", partial(learned.mappo, name))
        for name, recipe in RECIPES.items()
        if recipe.samples
    },
    "straight-through": (
        "our actor, taught by straight-through keep masks",
        learned.straight_through,
    ),
    "warm-start": ("ours, begun from the actor so taught", learned.warm_started),
    "mappo-each-price": ("ours, a training for each operating point", learned.one_alpha_each),
    "mappo-fine-tuned": ("ours, the backbone fine-tuned under it", learned.fine_tuned),
    **{
        f"benchmarl-{name}": (
            f"BenchMARL's {name.upper()}, {learned.BENCHMARL_MINUTES:g} minutes",
            partial(learned.benchmarl, name),
        )
        for name in learned.BENCHMARL_ALGORITHMS
    },
}
# what needs no labels: scores, merging, and rewards that the recipe leaves to the task
EMBEDDING = UNSEEDED.keys() - {"oracle", "oracle-no-labels"} | {
    "random", "random-merge",
    *(
        name
        for name, recipe in RECIPES.items()
        if not recipe.changes.keys() & {"accuracy", "reward"}
    ),
}  # fmt: skip
METHODS: Mapping[str, MethodSpec] = {
    name: MethodSpec(title, open, name in SEEDED, name.endswith("-fine-tuned"), name in EMBEDDING)
    for name, (title, open) in (UNSEEDED | SEEDED).items()
}
