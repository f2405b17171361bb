"""Methods that learn. Each is trained once for a seed, in a run of its own below the results, and
is then brought to any compute by one knob.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch

from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.agents.policies.heuristics import TopK
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.policies.serialization import dynamic_vit_policy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.agents.run_reader import RUN_WEIGHTS
from prunevit.benchmarks.methods.recipes import RECIPES
from prunevit.benchmarks.methods.untrained import best_schedule
from prunevit.benchmarks.protocol import (
    Benchmark,
    Knobs,
    Method,
    UnreachableError,
    check_matched,
    nearest,
    search_knob,
    with_best_dither,
    with_knobs,
)
from prunevit.benchmarks.records import differences
from prunevit.envs.old_names import rename_settings
from prunevit.envs.vit.staged_vit import OnPrune, StagedViT
from prunevit.envs.vit.weights import read_description
from prunevit.trainers import finetune
from prunevit.trainers.common.backbones import StagedViTSettings
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.evaluation import Traced
from prunevit.trainers.common.run import RunFolder
from prunevit.trainers.dynamic_vit import DynamicViTConfig
from prunevit.trainers.dynamic_vit import train as train_dynamic_vit
from prunevit.trainers.finetune import FinetuneConfig
from prunevit.trainers.mappo import learn
from prunevit.trainers.straight_through import StraightThroughConfig
from prunevit.trainers.straight_through import train as train_straight_through

# by the knobs that a search leaves alone: what it found that its own knob costs
Tried = defaultdict[tuple[tuple[str, Any], ...], dict[float, float]]

ODDS = (1e-4, 1e4)  # of keep, between which a threshold is searched
ALPHAS_BEYOND = 8.0  # alphas are searched up to this factor beyond the trained range
TAUGHT_BATCH = 32  # images of a step by straight-through masks
WARM_LR = 1e-3  # of a policy that begins taught, beside a critic that knows nothing
BENCHMARL_MINUTES = 2.5  # of a training: what 200 iterations of ours take on the digits
BENCHMARL_ALGORITHMS = ("mappo", "ippo", "qmix", "vdn", "iql", "masac", "isac")
# settings that change a policy by no more than rounding
RUNS_OWN = {
    "threads", "device", "run", "run_name", "resume", "workers", "cache_gb", "profile",
    "accumulate", "version", "checkpoint_sha256",
    "init",  # where the run lay that it began from
}  # fmt: skip


# --- runs ---


def is_trained(folder: Path, settings: Mapping[str, Any], result: str = RUN_WEIGHTS) -> bool:
    """Whether ``folder`` holds ``result`` of a finished run.

    Raises:
        ValueError: it holds a run under other settings that matter, or they are damaged.
    """
    written = folder / "config.json"
    if written.is_file():
        try:
            found = rename_settings(json.loads(written.read_text(encoding="utf-8")))
            if not isinstance(found, dict):
                raise ValueError("it holds no JSON object")
        except ValueError as error:
            raise ValueError(f"{written} is damaged: {error}") from error
        wanted = json.loads(json.dumps(settings))
        names = (found.keys() | wanted.keys()) - RUNS_OWN
        # settings that a run doesn't have are newer than it, and were off then
        later = {**FinetuneConfig.LATER, **MappoConfig.LATER}
        then, now = (
            {name: values.get(name, later.get(name, False)) for name in names}
            for values in (found, wanted)
        )
        if differ := differences(then, now):
            raise ValueError(
                f"{folder} holds a run with other settings ({differ}): move it away, or give "
                "another --out"
            )
    return (folder / result).exists()


def trained_run(bench: Benchmark, name: str, seed: int, changes: Mapping[str, Any]) -> Path:
    """The finished run of ``trainers.mappo`` under the benchmark's settings and ``changes``.

    Raises:
        ValueError: its folder holds a run under other settings.
    """
    config = replace(bench.base, seed=seed, **changes)
    folder = bench.runs / f"{name}-{seed}"
    if not is_trained(folder, config.to_json()):
        learn(RunFolder(folder), config)
    return folder


def shared_settings(bench: Benchmark, folder: Path, seed: int) -> dict[str, Any]:
    """Settings of another trainer: those that it shares with ``trainers.mappo``, and its run."""
    names = (field.name for field in fields(StagedViTSettings))
    settings = {name: getattr(bench.base, name) for name in names}
    if bench.iterations is not None:
        settings["iterations"] = bench.iterations
    return settings | {"seed": seed, "run_name": str(folder.absolute())}


# --- knobs ---


def set_to(model: PrunedViT, knobs: Knobs) -> PrunedViT:
    """The same networks with the ``alpha`` or ``threshold`` of ``knobs``, and its ``dither``."""
    policy = model.policy
    assert isinstance(policy, LearnedPolicy)
    by_alpha = "alpha" in policy.fields
    own = LearnedPolicy(
        policy.actor,
        policy.fields,
        policy.num_prefix,
        knobs["alpha"] if by_alpha else None,
        knobs.get("threshold", 0.5),
        knobs.get("dither", False),
    )
    return PrunedViT(model.backbone, own)


def tuned(bench: Benchmark, model: PrunedViT, gmacs: float, tried: Tried | None = None) -> Knobs:
    """The alpha at which ``model`` costs ``gmacs``, with a threshold where no alpha does, or the
    threshold alone where its policy doesn't observe alpha. Where the task allows, with ``dither``
    if that is better on validation. ``tried`` holds what other points found.
    """
    tried = defaultdict(dict) if tried is None else tried
    policy = model.policy
    assert isinstance(policy, LearnedPolicy)
    by_alpha = "alpha" in policy.fields
    low, high = bench.task.alpha_range

    def searched(shared: Knobs) -> Knobs:
        def search(
            low: float, high: float, fixed: Knobs, knob_of: Callable[[float], Knobs]
        ) -> Knobs:
            def knobs(value: float) -> Knobs:
                return {**fixed, **knob_of(value)}

            def cost(value: float) -> float:
                return bench.cost(set_to(model, knobs(value)))

            return search_knob(cost, low, high, gmacs, knobs, tried[tuple(fixed.items())])

        reached = shared
        if by_alpha:
            ends = low / ALPHAS_BEYOND, high * ALPHAS_BEYOND
            try:
                return search(*ends, shared, lambda alpha: {"alpha": alpha})
            except UnreachableError as error:
                reached = error.nearest or shared
        return search(*ODDS, reached, lambda odds: {"threshold": odds / (1 + odds)})

    return with_best_dither(bench, searched, lambda knobs: set_to(model, knobs))


def reader(bench: Benchmark, load: Callable[[Path], PrunedViT]) -> Callable[[Path], PrunedViT]:
    """``load``, called once for each folder, on the benchmark's device and in its memory format."""
    return cache(
        lambda folder: load(folder).to(bench.backbone.device).to(memory_format=torch.channels_last)
    )


def tuned_after_training(
    bench: Benchmark,
    train: Callable[[], object],
    folder: Path,
    load: Callable[[Path], PrunedViT] | None = None,
) -> Method:
    """A learned policy, brought to any compute by alpha or the threshold. ``train`` trains where
    that is due, and ``load`` reads what is in ``folder`` then: a run, if not given.
    """
    loaded = reader(bench, load or (lambda folder: PrunedViT.from_run(folder)))
    tried: Tried = defaultdict(dict)

    def tune(gmacs: float) -> Knobs:
        train()
        return tuned(bench, loaded(folder), gmacs, tried)

    return Method(tune, lambda knobs: set_to(loaded(folder), knobs))


# --- methods ---


def mappo(name: str, bench: Benchmark, seed: int) -> Method:
    """A training by ``trainers.mappo`` with the recipe of that name."""
    settings = RECIPES[name].settings(bench)
    train = partial(trained_run, bench, name, seed, settings)
    method = tuned_after_training(bench, train, bench.runs / f"{name}-{seed}")
    if RECIPES[name].alpha_range:
        return method
    trained_for = {"alpha": settings.get("alpha", bench.base.alpha)}
    return replace(method, tune=lambda gmacs: with_knobs(trained_for, lambda: method.tune(gmacs)))


def taught_run(bench: Benchmark, seed: int) -> Path:
    """The finished run of ``trainers.straight_through``."""
    folder = bench.runs / f"straight-through-{seed}"
    config = StraightThroughConfig(
        alpha_range=bench.task.alpha_range,
        batch_size=TAUGHT_BATCH,
        **shared_settings(bench, folder, seed),
    )
    if not is_trained(folder, config.to_json()):
        is_begun = RunFolder(folder).is_begun
        train_straight_through(StraightThroughConfig(resume=folder) if is_begun else config)
    return folder


def straight_through(bench: Benchmark, seed: int) -> Method:
    """Our actor, taught by straight-through keep masks alone."""
    folder = bench.runs / f"straight-through-{seed}"
    return tuned_after_training(bench, lambda: taught_run(bench, seed), folder)


def warm_started(bench: Benchmark, seed: int) -> Method:
    """Ours, begun from the taught actor. It plays half as many games: the teaching took about as
    many passes through the backbone as the other half.
    """

    def train() -> None:
        changes = {**RECIPES["mappo"].settings(bench), "lr": WARM_LR}
        if bench.iterations is None:
            changes["iterations"] = bench.base.iterations // 2
        trained_run(bench, "warm-start", seed, {**changes, "init": taught_run(bench, seed)})

    return tuned_after_training(bench, train, bench.runs / f"warm-start-{seed}")


def sampled(name: str, bench: Benchmark, seed: int) -> Method:
    """The same training, judged by drawing actions, at the one compute that this gives. They are
    drawn in an even pattern, so that they repeat: a patch is kept with its own probability.
    """
    folder = bench.runs / f"{name}-{seed}"
    load = reader(bench, lambda folder: PrunedViT.from_run(folder))
    drawn = {"threshold": 0.5, "dither": True}

    def tune(gmacs: float) -> Knobs:
        trained_run(bench, name, seed, RECIPES[name].settings(bench))
        check_matched(bench.cost(set_to(load(folder), drawn)), gmacs, drawn)
        return drawn

    return Method(tune, lambda knobs: set_to(load(folder), knobs))


def knobs_of_ours(bench: Benchmark, seed: int, gmacs: float) -> Knobs:
    """The knobs with which ours costs ``gmacs``, or comes nearest to it."""
    return nearest_knobs(mappo("mappo", bench, seed), gmacs)


def nearest_knobs(method: Method, gmacs: float) -> Knobs:
    """The knobs with which a method costs ``gmacs``, or comes nearest to it."""
    try:
        return method.tune(gmacs)
    except UnreachableError as error:
        if error.nearest is None:
            raise
        return error.nearest


def one_alpha_each(bench: Benchmark, seed: int) -> Method:
    """What ours, one policy for all alphas, is measured against: a training for each operating
    point, under the one alpha with which ours reaches it.
    """
    changes = replace(RECIPES["mappo"], alpha_range=False).settings(bench)
    load = reader(bench, lambda folder: PrunedViT.from_run(folder))

    def tune(gmacs: float) -> Knobs:
        percent = 100e9 * gmacs / bench.backbone.dense_macs
        name = f"mappo-each-price-{percent:.0f}"
        alpha = float(f"{knobs_of_ours(bench, seed, gmacs)['alpha']:.2g}")
        run = trained_run(bench, name, seed, {**changes, "alpha": alpha})
        made = {"run": run.name, "alpha": alpha}
        return with_knobs(made, lambda: tuned(bench, load(run), gmacs))

    return Method(tune, lambda knobs: set_to(load(bench.runs / knobs["run"]), knobs))


def fine_tuned(bench: Benchmark, seed: int) -> Method:
    """``trainers.finetune`` under ours, once, with the alpha (and the dither) of the middle
    operating point.
    """
    folder = bench.runs / f"mappo-fine-tuned-{seed}"
    on_prune: OnPrune = RECIPES["mappo"].settings(bench).get("on_prune", "drop")

    def train() -> None:
        begun = RunFolder(folder)
        if begun.is_begun:
            # alpha was chosen then, maybe on other validation images
            of_then = begun.read_settings(FinetuneConfig)
            alpha, dither = of_then.alpha, of_then.dither
        else:
            knobs = knobs_of_ours(bench, seed, bench.gmacs_at(bench.middle_point))
            alpha, dither = knobs["alpha"], knobs.get("dither", False)
        run = bench.runs / f"mappo-{seed}"
        fine_tune(bench, folder, run=run, alpha=alpha, dither=dither, seed=seed)

    return tuned_after_training(
        bench, train, folder, lambda folder: fine_tuned_model(bench, folder, on_prune)
    )


def fine_tuned_model(bench: Benchmark, folder: Path, on_prune: OnPrune = "drop") -> PrunedViT:
    """The model of a finished run of ``trainers.finetune``.

    Raises:
        ValueError: its stages are not the benchmark's, as of a run from before they moved.
    """
    model = PrunedViT.from_pretrained(folder / "model")
    own, wanted = model.backbone, bench.backbone
    if (own.edges, own.on_prune) != (wanted.edges, on_prune):
        raise ValueError(
            f"{folder} holds a model that prunes elsewhere, or otherwise, than methods do now: "
            "move it away, or give another --runs"
        )
    return model


def fine_tune(bench: Benchmark, folder: Path, **settings: Any) -> None:
    """Runs ``trainers.finetune`` in ``folder`` where that is due. The task sets the number of
    images, the optimizer and the losses, the same for every policy; ``settings`` has the others.
    """
    config = FinetuneConfig(
        device=bench.base.device,
        threads=bench.base.threads,
        run_name=str(folder.absolute()),
        **bench.task.fine_tuning,
        **settings,
    )
    if not is_trained(folder, config.to_json(), "model"):
        begun = RunFolder(folder).is_begun
        finetune.train(FinetuneConfig(resume=folder) if begun else config)


def fine_tuned_top_k(
    name: str, frozen: Callable[[Benchmark, int], Method], bench: Benchmark, seed: int
) -> Method:
    """``trainers.finetune`` under a top-k by class attention, once, with the numbers of patches of
    the middle operating point. At other points it keeps the numbers that suit the fine-tuned model.

    Args:
        name: of the method.
        frozen: the same method with the backbone as it is; its knob are ``tokens``.
        bench: the benchmark.
        seed: of the fine-tuning.
    """
    folder, start = bench.runs / f"{name}-{seed}", bench.runs / f"{name}-start"
    load = reader(bench, lambda folder: fine_tuned_model(bench, folder))

    def train() -> None:
        if not start.exists():  # the tokens may have been chosen on other validation images
            knobs = nearest_knobs(frozen(bench, seed), bench.gmacs_at(bench.middle_point))
            pruned = PrunedViT(bench.backbone, TopK(knobs["tokens"]), described_kwargs(bench))
            pruned.save_pretrained(start)
        fine_tune(bench, folder, run=start, dataset=bench.base.dataset, seed=seed)

    @cache
    def under_fine_tuned() -> Method:
        backbone = load(folder).backbone
        return frozen(replace(bench, model=backbone.model, backbone=backbone), seed)

    def tune(gmacs: float) -> Knobs:
        train()
        return under_fine_tuned().tune(gmacs)

    def make(knobs: Knobs) -> Traced:
        made = under_fine_tuned().make
        assert made is not None
        return made(knobs)

    return Method(tune, make)


def described_kwargs(bench: Benchmark) -> dict[str, Any]:
    """The arguments that the benchmark's backbone was built with."""
    base = bench.base
    described = read_description(base.checkpoint, base.backbone) if base.checkpoint else {}
    return {**described.get("model_kwargs", {}), **base.model_kwargs}


def share_to_keep(bench: Benchmark, gmacs: float, hidden: int | None = None) -> float:
    """The share of patches, in steps of 0.01, that costs ``gmacs``, with DynamicViT's predictors of
    width ``hidden``, if it is kept from stage to stage.
    """
    policy = dynamic_vit_policy(bench.backbone, 0.5, hidden)

    def cost(percent: int) -> float:
        policy.keep = percent / 100
        return dynamic_vit_gmacs(bench.backbone, policy, kept_tokens(bench.backbone, policy))

    return nearest(range(1, 101), cost, gmacs)[0] / 100


def kept_tokens(backbone: StagedViT, policy: DynamicViTPolicy) -> list[int]:
    """How many patches it keeps at each stage: it rounds down."""
    return [int(backbone.num_patches * share) for share in policy.shares()]


def dynamic_vit_gmacs(
    backbone: StagedViT, policy: DynamicViTPolicy, tokens: Sequence[int]
) -> float:
    """GMACs of an image of which ``tokens`` patches are kept at each stage, predictors included."""
    decisions = backbone.num_patches + sum(tokens[:-1])
    blocks = backbone.uniform_macs(tokens, with_attention=False)
    return (blocks + policy.macs_per_decision * decisions) / 1e9


class CountedDynamicViT(DynamicViTPolicy):
    """DynamicViT that keeps a number of patches of its own at each stage. Where few are left, one
    share for all stages costs too little or too much.

    Args:
        like: the trained policy, whose predictors it shares.
        tokens: how many patches stay at each stage.
        patches: how many there are.
    """

    def __init__(self, like: DynamicViTPolicy, tokens: Sequence[int], patches: int) -> None:
        super().__init__(like.width, len(tokens), like.keep, like.hidden)
        self.predictors = like.predictors
        self.tokens = tuple(tokens)
        self.patches = patches

    def shares(self) -> list[float]:
        # half a patch more, as the policy rounds down
        return [(count + 0.5) / self.patches for count in self.tokens]


def dynamic_vit(
    bench: Benchmark,
    seed: int,
    fine_tune: bool = False,
    on_prune: OnPrune = "drop",
    narrow: bool = False,
) -> Method:
    """DynamicViT, trained for each operating point, as its authors do; with its backbone once, for
    the middle one, as ours is. The knob is the share of patches that it keeps. Where the task
    allows, with dither if that is better on validation. With ``on_prune="merge"`` the same
    trainings, which know only masks, are judged with merging. With ``narrow`` its predictors are as
    wide as our actor, and cost less of an operating point's compute.

    Another number of patches at each stage is taken where it is more accurate on validation, as for
    EViT, or where one share for all stages misses the point or leaves no patch.
    """

    def restaged(folder: Path) -> PrunedViT:
        model = PrunedViT.from_run(folder)
        own = model.backbone
        staged = StagedViT(own.model, own.prune_before, prune_at=own.prune_at, on_prune=on_prune)
        return PrunedViT(staged, model.policy)

    load = reader(bench, restaged)

    def make(knobs: Knobs) -> PrunedViT:
        model = load(bench.runs / knobs["run"])
        policy = copy.copy(model.policy)  # shares the predictors
        assert isinstance(policy, DynamicViTPolicy)
        if tokens := knobs.get("tokens"):
            policy = CountedDynamicViT(policy, tokens, model.backbone.num_patches)
        else:
            policy.keep = knobs["keep"]
        policy.dither = knobs.get("dither", False)
        return PrunedViT(model.backbone, policy)

    def tune(gmacs: float) -> Knobs:
        trained_for = bench.gmacs_at(bench.middle_point) if fine_tune else gmacs
        percent = 100e9 * gmacs / bench.backbone.dense_macs
        kind = "fine-tuned" if fine_tune else f"{percent:.0f}"
        name = "dynamic-vit-narrow" if narrow else "dynamic-vit"
        folder = bench.runs / f"{name}-{kind}-{seed}"
        settings = {**bench.task.dynamic_vit, **shared_settings(bench, folder, seed)}
        if fine_tune and bench.iterations is None:  # as many images as others are fine-tuned with
            of_others = FinetuneConfig(run=folder, **bench.task.fine_tuning)
            images = of_others.epochs * of_others.epoch_size
            batch = settings.get("batch_size", DynamicViTConfig.batch_size)
            settings["iterations"] = math.ceil(images / batch)
        if narrow:
            settings["hidden"] = bench.base.hidden[0]
        keep = share_to_keep(bench, trained_for, settings.get("hidden"))
        config = DynamicViTConfig(fine_tune=fine_tune, keep=keep, **settings)
        if not is_trained(folder, config.to_json()):
            is_begun = RunFolder(folder).is_begun
            train_dynamic_vit(DynamicViTConfig(resume=folder) if is_begun else config)

        def searched(shared: Knobs) -> Knobs:
            def knobs(pruned: float) -> Knobs:
                return {"run": folder.name, "keep": 1 / pruned, **shared}

            def cost(pruned: float) -> float:
                return bench.cost(make(knobs(pruned)))

            trained = load(folder)
            policy, staged = trained.policy, trained.backbone
            assert isinstance(policy, DynamicViTPolicy)

            def count(tokens: Sequence[int]) -> int:
                return round(1e9 * dynamic_vit_gmacs(staged, policy, tokens))

            def counted(tokens: Knobs) -> Knobs:
                return {"run": folder.name, **tokens, **shared}

            try:
                even = search_knob(cost, 1.0, float(staged.num_patches), gmacs, knobs)
                of_policy = make(even).policy
                assert isinstance(of_policy, DynamicViTPolicy)
                own = tuple(kept_tokens(staged, of_policy))
                ways = [even] if own[-1] > 0 else []  # else all patches would go
            except UnreachableError:
                ways = []
            try:
                spread = best_schedule(bench, gmacs, count, lambda each: make(counted(each)))
                ways.append(counted(spread))
            except UnreachableError as error:
                if not ways:
                    nearest = error.nearest and counted(error.nearest)
                    raise UnreachableError(str(error), nearest) from error
            return max(ways, key=lambda knobs: bench.validate(make(knobs)))

        return with_best_dither(bench, searched, make)

    return Method(tune, make)


def benchmarl(algorithm: str, bench: Benchmark, seed: int) -> Method:
    """An algorithm of BenchMARL, trained for ``BENCHMARL_MINUTES``; the knob is the threshold on
    how much better keep is rated than prune.
    """
    folder = bench.runs / f"benchmarl-{algorithm}-{seed}"

    def train() -> None:
        # an extra, needed by these methods alone
        from prunevit.trainers.benchmarl import BenchmarlConfig
        from prunevit.trainers.benchmarl import train as train_benchmarl

        config = BenchmarlConfig(
            algorithm=cast("Any", algorithm),
            minutes=BENCHMARL_MINUTES,
            **shared_settings(bench, folder, seed),
        )
        if not is_trained(folder, config.to_json()):
            # a killed run can't be resumed: BenchMARL writes its checkpoint at the end
            shutil.rmtree(folder, ignore_errors=True)
            train_benchmarl(config)

    return tuned_after_training(bench, train, folder)
