"""Policies of ``benchmarks.compare`` that learn. Each is trained once a seed, in a run of its own
below the results, and then brought to any cost by one knob.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import torch

from prunevit.agents.policies.actor_critic import LearnedPolicy
from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.agents.saving import RUN_WEIGHTS
from prunevit.benchmarks.arena import Arena, Contender, Knobs, UnreachableError, bisected
from prunevit.envs.old_names import rename_settings
from prunevit.trainers import finetune
from prunevit.trainers.common.config import LATER_SETTINGS, MappoConfig
from prunevit.trainers.common.evaluation import evaluate
from prunevit.trainers.common.run_folder import RunFolder, describe
from prunevit.trainers.common.runs import Run, learn
from prunevit.trainers.dynamic_vit import DynamicViTConfig
from prunevit.trainers.dynamic_vit_run import execute as train_dynamic_vit
from prunevit.trainers.finetune import FinetuneConfig

ODDS = (1e-4, 1e4)  # of keep, between which a threshold is looked for
PRICES_BEYOND = 8.0  # prices are looked for so far beyond those that a policy was trained under
BENCHMARL_MINUTES = 2.0
BENCHMARL = ("mappo", "ippo", "qmix", "vdn", "iql", "masac", "isac")
# settings that change no policy but by rounding
RUNS_OWN = (
    "threads", "device", "run", "run_name", "resume", "workers", "cache_gb", "profile",
    "accumulate",
)  # fmt: skip

Stages = Literal["game", "first", "released"]


@dataclass(frozen=True)
class Recipe:
    """A training by ``trainers.mappo``.

    Attributes:
        title: what it is, in a line.
        changes: settings other than the arena's.
        many_prices: train one policy for all of the game's prices; otherwise for one, and later
            reach other costs by the threshold.
        stages: where it prunes: at the game's stages, at the first of them alone, or where
            RL4EViT's code does.
        length: iterations, as a share of the game's; where their number is given, it counts.
    """

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    many_prices: bool = True
    stages: Stages = "game"
    length: float = 1.0

    def settings(self, arena: Arena) -> dict[str, Any]:
        settings = dict(self.changes)
        if self.stages == "released":
            settings["prune_before"] = arena.game.released_stages
        elif self.stages == "first":
            settings["prune_before"] = arena.game.prune_before[:1]
        if arena.iterations is None:
            settings["iterations"] = round(self.length * arena.base.iterations)
        if self.many_prices:
            observation = settings.get("observation", arena.base.observation)
            settings["observation"] = (*observation, "alpha")
            settings["alpha_range"] = arena.game.alpha_range
        return settings


def middle_point(arena: Arena) -> float:
    """The operating point that what can be trained for one cost only is trained for."""
    points = sorted(arena.game.points)
    return points[(len(points) - 1) // 2]


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises ValueError where ``folder`` holds a run under other settings that matter."""
    written = folder / "config.json"
    if not written.is_file():
        return
    found = rename_settings(json.loads(written.read_text(encoding="utf-8")))
    wanted = json.loads(json.dumps(settings))

    def value(settings: Mapping[str, Any], key: str) -> Any:
        return settings.get(key, LATER_SETTINGS.get(key, False))  # what came later was off before

    strange = sorted(
        key
        for key in (found.keys() | wanted.keys()) - set(RUNS_OWN)
        if value(found, key) != value(wanted, key)
    )
    if strange:
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(strange)}): move it away, or "
            "give another --out"
        )


def trained_run(arena: Arena, name: str, seed: int, changes: Mapping[str, Any]) -> Path:
    """The finished run of a training under the arena's settings and ``changes``.

    Raises:
        ValueError: its folder holds a run under other settings.
    """
    config = replace(arena.base, seed=seed, **changes)
    folder = arena.runs / f"{name}-{seed}"
    check_settings(folder, config.to_json())
    if not (folder / RUN_WEIGHTS).is_file():
        task, _, _ = learn(Run(folder, config))
        task.env.close()
    return folder


def placed(model: PrunedViT, arena: Arena) -> PrunedViT:
    """``model`` where the arena's own is, and laid out in memory like it."""
    return model.to(arena.backbone.device).to(memory_format=torch.channels_last)


def set_to(model: PrunedViT, knobs: Knobs) -> PrunedViT:
    """The same networks under the ``alpha`` or the ``threshold`` of ``knobs``, and its
    ``dither``.
    """
    policy = model.policy
    assert isinstance(policy, LearnedPolicy)
    prices = "alpha" in policy.fields
    own = LearnedPolicy(
        policy.actor,
        policy.fields,
        policy.num_prefix,
        knobs["alpha"] if prices else None,
        0.5 if prices else knobs["threshold"],
        knobs.get("dither", False),
    )
    return PrunedViT(model.backbone, own)


def tuned(arena: Arena, model: PrunedViT, gmacs: float) -> Knobs:
    """The price at which ``model`` costs no more than ``gmacs``; the threshold where it was trained
    for one price. Where the game has alike neighbours, with ``dither`` if that is better on
    validation.
    """
    if not arena.game.dithers:
        return _tuned(arena, model, gmacs, {})
    ways = []
    for dither in (False, True):
        try:
            ways.append(_tuned(arena, model, gmacs, {"dither": dither}))
        except UnreachableError:
            # one way may not come so low; that neither does is the other's to say
            if dither and not ways:
                raise
    return max(
        ways,
        key=lambda knobs: evaluate(set_to(model, knobs), arena.validation, arena.size).accuracy,
    )


def _tuned(arena: Arena, model: PrunedViT, gmacs: float, shared: Knobs) -> Knobs:
    policy = model.policy
    assert isinstance(policy, LearnedPolicy)
    low, high = ODDS
    if "alpha" in policy.fields:
        low, high = arena.game.alpha_range
        low, high = low / PRICES_BEYOND, high * PRICES_BEYOND

    def knobs(value: float) -> Knobs:
        if "alpha" in policy.fields:
            return {"alpha": value, **shared}
        return {"threshold": value / (1 + value), **shared}

    def cost(value: float) -> float:
        return arena.gmacs_of(set_to(model, knobs(value)))

    return knobs(bisected(cost, low, high, gmacs, at_least=False))


def learned(name: str, recipe: Recipe, arena: Arena, seed: int) -> Contender:
    """Set by its price of compute where it observes one, else by the threshold on its
    probability.
    """

    @cache
    def load() -> PrunedViT:
        return placed(PrunedViT.from_run(arena.runs / f"{name}-{seed}"), arena)

    def tune(gmacs: float) -> Knobs:
        settings = recipe.settings(arena)
        trained_run(arena, name, seed, settings)
        price = {} if recipe.many_prices else {"alpha": settings.get("alpha", arena.base.alpha)}
        return {**price, **tuned(arena, load(), gmacs)}

    return Contender(tune, lambda knobs: set_to(load(), knobs))


def one_price_each(ours: Recipe, arena: Arena, seed: int) -> Contender:
    """What ``ours``, one policy for all prices, is measured against: for each cost a training of
    its own, under the one price at which ours costs that.
    """
    changes = replace(ours, many_prices=False).settings(arena)

    @cache
    def load(run: str) -> PrunedViT:
        return placed(PrunedViT.from_run(arena.runs / run), arena)

    def tune(gmacs: float) -> Knobs:
        percent = 100e9 * gmacs / arena.backbone.dense_macs
        name = f"mappo-each-price-{percent:.0f}"
        price = learned("mappo", ours, arena, seed).tune(gmacs)["alpha"]
        alpha = {"alpha": float(f"{price:.2g}")}
        run = trained_run(arena, name, seed, changes | alpha).name
        return {"run": run, **alpha, **tuned(arena, load(run), gmacs)}

    return Contender(tune, lambda knobs: set_to(load(knobs["run"]), knobs))


def fine_tuned(name: str, ours: Recipe, arena: Arena, seed: int) -> Contender:
    """``trainers.finetune`` under ``ours``, once, at the price of the middle operating point and
    with dither if it has it there; then brought to every cost by the price, as ours is.
    """
    folder = arena.runs / f"{name}-{seed}"

    @cache
    def load() -> PrunedViT:
        return placed(PrunedViT.from_pretrained(folder / "model"), arena)

    def train() -> None:
        begun = RunFolder(folder)
        if begun.is_begun:
            # the price was looked for then, and may have been among other images
            of_then = begun.read_settings(FinetuneConfig)
            alpha, dither = of_then.alpha, of_then.dither
        else:
            gmacs = arena.gmacs_at(middle_point(arena))
            knobs = learned("mappo", ours, arena, seed).tune(gmacs)
            alpha, dither = knobs["alpha"], knobs.get("dither", False)
        config = FinetuneConfig(
            run=arena.runs / f"mappo-{seed}",
            alpha=alpha,
            dither=dither,
            seed=seed,
            device=arena.base.device,
            threads=arena.base.threads,
            run_name=str(folder.absolute()),
            **arena.game.fine_tuning,
        )
        check_settings(folder, describe(config))
        if not (folder / "model").is_dir():
            finetune.train(FinetuneConfig(resume=folder) if begun.is_begun else config)

    def tune(gmacs: float) -> Knobs:
        train()
        return tuned(arena, load(), gmacs)

    return Contender(tune, lambda knobs: set_to(load(), knobs))


def of_the_game(base: MappoConfig) -> dict[str, Any]:
    """Settings that trainers other than ours share with it."""
    names = (
        "backbone", "model_kwargs", "checkpoint", "dataset", "prune_before", "device", "threads",
    )  # fmt: skip
    return {name: getattr(base, name) for name in names}


def dynamic_vit(name: str, fine_tune: bool, arena: Arena, seed: int) -> Contender:
    """Trained for one share of the patches; set by the share that is kept."""
    base, folder = arena.base, arena.runs / f"{name}-{seed}"
    config = DynamicViTConfig(
        pretrained=base.pretrained,
        fine_tune=fine_tune,
        seed=seed,
        run_name=str(folder.absolute()),
        **of_the_game(base),
        **arena.game.dynamic_vit,
    )
    if arena.iterations is not None:
        config = replace(config, iterations=arena.iterations)

    def train() -> None:
        check_settings(folder, describe(config))
        if not (folder / RUN_WEIGHTS).is_file():
            was_begun = RunFolder(folder).is_begun
            train_dynamic_vit(DynamicViTConfig(resume=folder) if was_begun else config)

    @cache
    def load() -> PrunedViT:
        return placed(PrunedViT.from_run(folder), arena)

    def make(knobs: Knobs) -> PrunedViT:
        policy = copy.copy(load().policy)  # the same predictors, set for itself
        assert isinstance(policy, DynamicViTPolicy)
        policy.keep = knobs["keep"]
        return PrunedViT(load().backbone, policy)

    def tune(gmacs: float) -> Knobs:
        train()

        def cost(pruned: float) -> float:
            return arena.gmacs_of(make({"keep": 1 / pruned}))

        patches = float(arena.backbone.num_patches)
        return {"keep": 1 / bisected(cost, 1.0, patches, gmacs, at_least=True)}

    return Contender(tune, make)


def benchmarl(name: str, algorithm: str, arena: Arena, seed: int) -> Contender:
    """An algorithm of BenchMARL, in ``BENCHMARL_MINUTES``; set by the threshold on how much better
    it thinks of keep.
    """
    base, folder = arena.base, arena.runs / f"{name}-{seed}"

    def train() -> None:
        # an extra: who doesn't compare with it needn't have it
        from prunevit.trainers.benchmarl import BenchmarlConfig
        from prunevit.trainers.benchmarl import train as train_benchmarl

        if base.pretrained:
            raise ValueError(f"{name} can't take downloaded weights: give --checkpoint FILE")
        config = BenchmarlConfig(
            algorithm=cast("Any", algorithm),
            minutes=BENCHMARL_MINUTES,
            seed=seed,
            run_name=str(folder.absolute()),
            **of_the_game(base),
        )
        if arena.iterations is not None:
            config = replace(config, iterations=arena.iterations)
        check_settings(folder, config.described())
        if not (folder / RUN_WEIGHTS).is_file():
            # what was killed can't go on: BenchMARL's own checkpoints come at the end
            shutil.rmtree(folder, ignore_errors=True)
            train_benchmarl(config)

    @cache
    def load() -> PrunedViT:
        return placed(PrunedViT.from_run(folder), arena)

    def tune(gmacs: float) -> Knobs:
        train()
        return tuned(arena, load(), gmacs)

    return Contender(tune, lambda knobs: set_to(load(), knobs))


# --- who there is ---

# arXiv 2503.23459: the survivors' pot, paid where the answer is right, and a critic as baseline
PAPER = {
    "reward": "markov-game", "accuracy": "correct", "alpha": 3.0,
    "rollouts_per_image": 1, "critic": "central",
}  # fmt: skip
# RL4EViT's code (github.com/LuErShuai/rl4evit at 5847406, timm/models/vision_transformer_dynamic.py
# and marl/mappo.py): its rates, networks and minibatches of 16 episodes. What stays ours: GELU for
# its tanh, a place's coordinates for the agent's number, normalised advantages and values.
RELEASED = {
    "reward": "released-code", "observation": ("token", "position"), "rollouts_per_image": 1,
    "critic": "central", "hidden": (64, 256, 64), "critic_hidden": (64, 256, 64),
    "gae_lambda": 0.0, "gamma": 0.99, "attention_prior": 0.0, "keep_bias": 0.0,
    "lr": 5e-6, "lr_schedule": "constant", "epochs": 4, "minibatches": 16, "entropy": 0.01,
}  # fmt: skip
WITHOUT_STAGE = ("token", "cls", "cls_attention")

OURS = Recipe("ours: one policy for all budgets, paid for the dense model's answer (kl), no labels")
RECIPES: Mapping[str, Recipe] = {
    "mappo": OURS,
    "mappo-one-price": Recipe("ours, trained for one price", many_prices=False),
    "agreement": Recipe("paid for dense's answers, no labels", {"accuracy": "agreement"}),
    "confidence": Recipe("paid for the true class's probability", {"accuracy": "confidence"}),
    "paper": Recipe("the paper's way: pot, critic as baseline", PAPER, many_prices=False),
    # half as many iterations still take them several times as long as ours
    "released": Recipe(
        "what RL4EViT's code does", RELEASED, many_prices=False, stages="released", length=0.5
    ),
    "released-faster": Recipe(
        "the same at a hundred times its learning rate",
        {**RELEASED, "lr": 5e-4},
        many_prices=False,
        stages="released",
        length=0.5,
    ),
    "ippo": Recipe(
        "IPPO (arXiv 2011.09533): a local critic as baseline",
        {"rollouts_per_image": 1, "critic": "local"},
    ),
    "no-image-baseline": Recipe(
        "a central critic as baseline", {"rollouts_per_image": 1, "critic": "central"}
    ),
    "with-critic": Recipe("a central critic beside the image baseline", {"critic": "central"}),
    "no-attention-prior": Recipe("from no prior", {"attention_prior": 0.0}),
    "no-team-reward": Recipe(
        "survivors share a pot, at one price",
        {key: PAPER[key] for key in ("reward", "accuracy", "alpha")},
        many_prices=False,
    ),
    "no-stage": Recipe("blind to the stage", {"observation": WITHOUT_STAGE}),
    "one-stage": Recipe("prunes at the first stage alone", stages="first"),
}
