"""Methods that learn. Each is trained once for a seed, in a run of its own below the results, and
is then brought to any compute by one knob.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.agents.run_reader import RUN_WEIGHTS
from prunevit.benchmarks.methods.recipes import Recipe
from prunevit.benchmarks.protocol import Benchmark, Knobs, Method, UnreachableError, bisect
from prunevit.benchmarks.records import differences
from prunevit.envs.old_names import rename_settings
from prunevit.trainers import finetune
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.run import RunFolder
from prunevit.trainers.dynamic_vit import DynamicViTConfig
from prunevit.trainers.dynamic_vit import train as train_dynamic_vit
from prunevit.trainers.finetune import FinetuneConfig
from prunevit.trainers.mappo import learn

ODDS = (1e-4, 1e4)  # of keep, between which a threshold is searched
ALPHAS_BEYOND = 8.0  # alphas are searched up to this factor beyond the trained range
# settings that change a policy by no more than rounding
RUNS_OWN = {
    "threads", "device", "run", "run_name", "resume", "workers", "cache_gb", "profile",
    "accumulate", "version",
}  # fmt: skip


# --- runs ---


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises ValueError where ``folder`` holds a run under other settings that matter."""
    written = folder / "config.json"
    if not written.is_file():
        return
    found = rename_settings(json.loads(written.read_text(encoding="utf-8")))
    wanted = json.loads(json.dumps(settings))
    names = (found.keys() | wanted.keys()) - RUNS_OWN

    def values(settings: Mapping[str, Any]) -> dict[str, Any]:
        # settings that a run doesn't have are newer than it, and were off then
        later = {**FinetuneConfig.LATER, **MappoConfig.LATER}
        return {name: settings.get(name, later.get(name, False)) for name in names}

    if differ := differences(values(found), values(wanted)):
        raise ValueError(
            f"{folder} holds a run with other settings ({differ}): move it away, or give another "
            "--out"
        )


def trained_run(bench: Benchmark, name: str, seed: int, changes: Mapping[str, Any]) -> Path:
    """The finished run of a training under the benchmark's settings and ``changes``.

    Raises:
        ValueError: its folder holds a run under other settings.
    """
    config = replace(bench.base, seed=seed, **changes)
    folder = bench.runs / f"{name}-{seed}"
    check_settings(folder, config.to_json())
    if not (folder / RUN_WEIGHTS).is_file():
        experiment, _ = learn(RunFolder(folder), config)
        experiment.env.close()
    return folder


def shared_settings(bench: Benchmark) -> dict[str, Any]:
    """Settings that other trainers share with ``trainers.mappo``."""
    names = (
        "backbone", "model_kwargs", "checkpoint", "dataset", "prune_before", "device", "threads",
    )  # fmt: skip
    return {name: getattr(bench.base, name) for name in names}


# --- knobs ---


def placed(model: PrunedViT, bench: Benchmark) -> PrunedViT:
    """``model`` on the benchmark's device and in its memory format."""
    return model.to(bench.backbone.device).to(memory_format=torch.channels_last)


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
        0.5 if by_alpha else knobs["threshold"],
        knobs.get("dither", False),
    )
    return PrunedViT(model.backbone, own)


def tuned(bench: Benchmark, model: PrunedViT, gmacs: float) -> Knobs:
    """The alpha at which ``model`` costs at most ``gmacs``, or the threshold where its policy
    doesn't observe alpha. Where the task allows, with ``dither`` if that is better on validation.
    """
    policy = model.policy
    assert isinstance(policy, LearnedPolicy)
    by_alpha = "alpha" in policy.fields
    low, high = bench.task.alpha_range if by_alpha else ODDS
    if by_alpha:
        low, high = low / ALPHAS_BEYOND, high * ALPHAS_BEYOND

    def bisected(shared: Knobs) -> Knobs:
        def knobs(value: float) -> Knobs:
            own = {"alpha": value} if by_alpha else {"threshold": value / (1 + value)}
            return {**own, **shared}

        def cost(value: float) -> float:
            return bench.validate(set_to(model, knobs(value))).gmacs

        return knobs(bisect(cost, low, high, gmacs, at_least=False))

    if not bench.task.dithers:
        return bisected({})
    ways = []
    for dither in (False, True):
        try:
            ways.append(bisected({"dither": dither}))
        except UnreachableError:
            # one way may not get so low: only if neither does, this is the method's limit
            if dither and not ways:
                raise
    return max(ways, key=lambda knobs: bench.validate(set_to(model, knobs)).accuracy)


def tuned_after_training(
    bench: Benchmark, train: Callable[[], object], load: Callable[[], PrunedViT]
) -> Method:
    """A learned policy, brought to any compute by alpha or the threshold.

    Args:
        bench: what it is compared on.
        train: trains where that is due.
        load: reads what was trained.
    """
    loaded = cache(lambda: placed(load(), bench))

    def tune(gmacs: float) -> Knobs:
        train()
        return tuned(bench, loaded(), gmacs)

    return Method(tune, lambda knobs: set_to(loaded(), knobs))


# --- methods ---


def mappo(name: str, recipe: Recipe, bench: Benchmark, seed: int) -> Method:
    """A training by ``trainers.mappo``."""
    settings = recipe.settings(bench)
    method = tuned_after_training(
        bench,
        lambda: trained_run(bench, name, seed, settings),
        lambda: PrunedViT.from_run(bench.runs / f"{name}-{seed}"),
    )
    if recipe.alpha_range:
        return method
    trained_for = {"alpha": settings.get("alpha", bench.base.alpha)}
    return Method(lambda gmacs: {**trained_for, **method.tune(gmacs)}, method.make)


def one_alpha_each(ours: Recipe, bench: Benchmark, seed: int) -> Method:
    """What ``ours``, one policy for all alphas, is measured against: a training for each operating
    point, under the one alpha with which ours reaches it.
    """
    changes = replace(ours, alpha_range=False).settings(bench)

    @cache
    def load(run: str) -> PrunedViT:
        return placed(PrunedViT.from_run(bench.runs / run), bench)

    def tune(gmacs: float) -> Knobs:
        percent = 100e9 * gmacs / bench.backbone.dense_macs
        name = f"mappo-each-price-{percent:.0f}"
        alpha = float(f"{mappo('mappo', ours, bench, seed).tune(gmacs)['alpha']:.2g}")
        run = trained_run(bench, name, seed, {**changes, "alpha": alpha}).name
        return {"run": run, "alpha": alpha, **tuned(bench, load(run), gmacs)}

    return Method(tune, lambda knobs: set_to(load(knobs["run"]), knobs))


def fine_tuned(name: str, ours: Recipe, bench: Benchmark, seed: int) -> Method:
    """``trainers.finetune`` under ``ours``, once, with the alpha (and the dither) of the middle
    operating point.
    """
    folder = bench.runs / f"{name}-{seed}"

    def train() -> None:
        begun = RunFolder(folder)
        if begun.is_begun:
            # alpha was chosen then, maybe on other validation images
            of_then = begun.read_settings(FinetuneConfig)
            alpha, dither = of_then.alpha, of_then.dither
        else:
            gmacs = bench.gmacs_at(bench.middle_point)
            knobs = mappo("mappo", ours, bench, seed).tune(gmacs)
            alpha, dither = knobs["alpha"], knobs.get("dither", False)
        config = FinetuneConfig(
            run=bench.runs / f"mappo-{seed}",
            alpha=alpha,
            dither=dither,
            seed=seed,
            device=bench.base.device,
            threads=bench.base.threads,
            run_name=str(folder.absolute()),
            **bench.task.fine_tuning,
        )
        check_settings(folder, config.to_json())
        if not (folder / "model").is_dir():
            finetune.train(FinetuneConfig(resume=folder) if begun.is_begun else config)

    return tuned_after_training(bench, train, lambda: PrunedViT.from_pretrained(folder / "model"))


def dynamic_vit(name: str, fine_tune: bool, bench: Benchmark, seed: int) -> Method:
    """DynamicViT, trained for one share of patches; the knob is the share it keeps."""
    folder = bench.runs / f"{name}-{seed}"
    config = DynamicViTConfig(
        pretrained=bench.base.pretrained,
        fine_tune=fine_tune,
        seed=seed,
        run_name=str(folder.absolute()),
        **shared_settings(bench),
        **bench.task.dynamic_vit,
    )
    if bench.iterations is not None:
        config = replace(config, iterations=bench.iterations)

    def train() -> None:
        check_settings(folder, config.to_json())
        if not (folder / RUN_WEIGHTS).is_file():
            was_begun = RunFolder(folder).is_begun
            train_dynamic_vit(DynamicViTConfig(resume=folder) if was_begun else config)

    @cache
    def load() -> PrunedViT:
        return placed(PrunedViT.from_run(folder), bench)

    def make(knobs: Knobs) -> PrunedViT:
        policy = copy.copy(load().policy)  # shares the predictors
        assert isinstance(policy, DynamicViTPolicy)
        policy.keep = knobs["keep"]
        return PrunedViT(load().backbone, policy)

    def tune(gmacs: float) -> Knobs:
        train()

        def cost(pruned: float) -> float:
            return bench.validate(make({"keep": 1 / pruned})).gmacs

        patches = float(bench.backbone.num_patches)
        return {"keep": 1 / bisect(cost, 1.0, patches, gmacs, at_least=True)}

    return Method(tune, make)
