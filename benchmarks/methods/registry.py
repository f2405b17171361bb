"""All methods that ``benchmarks.compare`` can compare, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from prunevit.benchmarks.methods import benchmarl, learned, untrained
from prunevit.benchmarks.methods.recipes import OURS, RECIPES
from prunevit.benchmarks.protocol import Benchmark, Method, UpperBound
from prunevit.benchmarks.records import Record


@dataclass(frozen=True)
class MethodSpec:
    """A method that can be compared.

    Attributes:
        title: what it is, in a line.
        open: benchmark and seed -> the method.
        is_seeded: whether its result depends on the seed.
        fine_tunes: whether it changes the backbone's weights.
    """

    title: str
    open: Callable[[Benchmark, int], Method | UpperBound]
    is_seeded: bool = True
    fine_tunes: bool = False


def _unseeded(title: str, open: Callable[[Benchmark, int], Method | UpperBound]) -> MethodSpec:
    return MethodSpec(title, open, is_seeded=False)


_ON = f"{untrained.ORACLE_IMAGES} images"

METHODS: Mapping[str, MethodSpec] = {
    "random": MethodSpec("random top-k", partial(untrained.top_k, "random")),
    "norm": _unseeded("length of the embedding, top-k", partial(untrained.top_k, "norm")),
    "brightness": _unseeded("mean pixel, top-k", partial(untrained.top_k, "brightness")),
    "attention": _unseeded("class attention, top-k", partial(untrained.top_k, "attention")),
    "threshold": _unseeded("class attention, threshold", untrained.attention_threshold),
    "ats": _unseeded("adaptive token sampling", untrained.adaptive_sampling),
    "tome": _unseeded("token merging", untrained.tome),
    "evit": _unseeded("class attention, the rest fused", partial(untrained.evit, True)),
    "evit-unfused": _unseeded(
        "class attention, the paper's schedule", partial(untrained.evit, False)
    ),
    "dynamic-vit": MethodSpec(
        "DynamicViT, frozen backbone", partial(learned.dynamic_vit, "dynamic-vit", False)
    ),
    "dynamic-vit-fine-tuned": MethodSpec(
        "DynamicViT as published: the backbone learns too",
        partial(learned.dynamic_vit, "dynamic-vit-fine-tuned", True),
        fine_tunes=True,
    ),
    "oracle": _unseeded(
        f"greedy leave-one-out by the true class, {_ON}", partial(untrained.oracle, True)
    ),
    "oracle-no-labels": _unseeded(
        f"greedy leave-one-out by the dense model's answer, {_ON}",
        partial(untrained.oracle, False),
    ),
    **{
        name: MethodSpec(recipe.title, partial(learned.mappo, name, recipe))
        for name, recipe in RECIPES.items()
    },
    **{
        f"benchmarl-{algorithm}": MethodSpec(
            f"BenchMARL's {algorithm.upper()}, {benchmarl.MINUTES:g} minutes",
            partial(benchmarl.benchmarl, f"benchmarl-{algorithm}", algorithm),
        )
        for algorithm in benchmarl.ALGORITHMS
    },
    "mappo-each-price": MethodSpec(
        "ours, a training for each operating point", partial(learned.one_alpha_each, OURS)
    ),
    "mappo-fine-tuned": MethodSpec(
        "ours, the backbone fine-tuned under it",
        partial(learned.fine_tuned, "mappo-fine-tuned", OURS),
        fine_tunes=True,
    ),
}


def rebuild(row: Record, bench: Benchmark) -> nn.Module | None:
    """The model of a record, from its knobs and, for a learned method, its run; None for an upper
    bound, which has no model.

    Raises:
        ValueError: the run is gone or damaged.
    """
    method = METHODS[row["method"]].open(bench, row["seed"])
    if isinstance(method, UpperBound):
        return None
    model = method.make(row)
    assert isinstance(model, nn.Module)
    return model
