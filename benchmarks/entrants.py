"""Who takes part in ``benchmarks.compare``: how each policy is trained, and how it is brought to a
given cost.

Every policy has one knob that its cost follows. For each operating point the knob is set on
validation images: ours cost at most what the point says, policies to compare with at least that.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.agents.actor_critic import LearnedPolicy
from tokenprune.agents.dynamic_vit import DynamicViTPolicy
from tokenprune.agents.heuristics import AdaptiveSampling, AttentionThreshold, Score, TopK
from tokenprune.agents.pruned_vit import PrunedViT, Trace
from tokenprune.agents.saved import RUN_WEIGHTS
from tokenprune.benchmarks.games import Game
from tokenprune.benchmarks.peers.evit import EViT, even_tokens
from tokenprune.benchmarks.peers.evit import macs_counter as evit_macs_counter
from tokenprune.benchmarks.peers.evit import token_counts as evit_token_counts
from tokenprune.benchmarks.peers.tome import (
    ToMeViT,
    even_merges,
    macs_counter,
    merges_at,
    token_counts,
)
from tokenprune.envs.backbone import StagedViT
from tokenprune.envs.datasets import ImageSet
from tokenprune.trainers.config import MappoConfig
from tokenprune.trainers.dynamic_vit import DynamicViTConfig
from tokenprune.trainers.dynamic_vit_run import execute as train_dynamic_vit
from tokenprune.trainers.evaluation import Traced, evaluate, schedules_at
from tokenprune.trainers.run_folder import RunFolder, describe
from tokenprune.trainers.runs import Run, learn

BISECTIONS = 12
ODDS = (1e-4, 1e4)  # of keep, between which a threshold is looked for
PRICES_BEYOND = 8.0  # prices are looked for so far beyond those that a policy was trained under
RUNS_OWN = ("threads", "device", "run_name", "resume")  # settings that change no policy
SHAPES = (1.0, 0.7, 0.5, 0.35)  # of equal lengths: what is kept from one stage to the next


class UnreachableError(ValueError):
    """A policy can't be brought to an operating point; the message says which."""


@dataclass(frozen=True)
class Arena:
    """Where policies meet.

    Attributes:
        game: data, backbone and stages.
        base: settings that a training starts from; a policy changes some of them.
        model: timm's own model, frozen.
        backbone: the same model, staged.
        validation: images on which knobs are set.
        size: how many of them.
        runs: the folder in which trainings leave their runs.
    """

    game: Game
    base: MappoConfig
    model: nn.Module
    backbone: StagedViT
    validation: ImageSet
    size: int
    runs: Path

    def gmacs_of(self, model: Traced) -> float:
        return evaluate(model, self.validation, self.size).gmacs


@dataclass(frozen=True)
class Entry:
    """A policy at an operating point.

    Attributes:
        model: the backbone pruned by it.
        knobs: how it was set, by name; goes into the record.
    """

    model: Traced
    knobs: Mapping[str, Any]


At = Callable[[float], Entry]
"""GMACs of an image -> the policy there; raises UnreachableError."""


@dataclass(frozen=True)
class Entrant:
    """A policy that can take part.

    Attributes:
        title: what it is, in a line.
        open: arena and seed -> the policy at any cost, trained where it has to be.
        is_seeded: whether another seed is another policy.
        fine_tunes: whether it changes the backbone's weights.
    """

    title: str
    open: Callable[[Arena, int], At]
    is_seeded: bool = True
    fine_tunes: bool = False


def bisected(
    cost: Callable[[float], float], low: float, high: float, target: float, at_least: bool
) -> float:
    """The knob between ``low`` and ``high``, both positive, at which ``cost``, which falls as the
    knob rises, comes closest to ``target`` from below, or ``at_least`` from above.

    Raises:
        UnreachableError: the cost is on the wrong side of the target at the far end.
    """
    end = low if at_least else high
    reached = cost(end)
    if (reached < target) if at_least else (reached > target):
        raise UnreachableError(f"its cost is {reached:.4f} GMACs at the {end:g} end of its knob")
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cost(middle) > target else (low, middle)
    return low if at_least else high


# --- policies that need no training ---


def top_k(score: Score, arena: Arena, seed: int) -> At:
    """Equal lengths; of several ways to spread them over the stages the best on validation."""
    backbone = arena.backbone

    def at(gmacs: float) -> Entry:
        with_attention = score == "attention"
        shapes = [[shape**stage for stage in range(backbone.num_stages)] for shape in SHAPES]
        ways = {
            tuple(tokens)
            for shape in shapes
            for tokens in schedules_at(backbone, gmacs, shape, with_attention)
        }
        entries = [
            Entry(PrunedViT(backbone, TopK(tokens, score, seed)), {"tokens": list(tokens)})
            for tokens in sorted(ways)
        ]
        return max(
            entries,
            key=lambda entry: evaluate(entry.model, arena.validation, arena.size).accuracy,
        )

    return at


def attention_threshold(arena: Arena, seed: int) -> At:
    """The same threshold at every stage."""
    backbone = arena.backbone

    def make(threshold: float) -> PrunedViT:
        return PrunedViT(backbone, AttentionThreshold([threshold] * backbone.num_stages))

    def at(gmacs: float) -> Entry:
        limit = float(backbone.num_patches)
        knob = bisected(lambda k: arena.gmacs_of(make(k)), 1e-3, limit, gmacs, at_least=True)
        return Entry(make(knob), {"threshold": knob})

    return at


def adaptive_sampling(arena: Arena, seed: int) -> At:
    """As many samples at every stage."""
    backbone = arena.backbone

    def make(samples: int) -> PrunedViT:
        return PrunedViT(backbone, AdaptiveSampling([samples] * backbone.num_stages))

    def at(gmacs: float) -> Entry:
        # quantiles fall on one patch again and again: many more samples than patches are kept
        fewest, most = 1, 64 * backbone.num_patches
        if arena.gmacs_of(make(most)) < gmacs:
            raise UnreachableError(f"{most} samples cost less")
        while fewest < most:
            middle = (fewest + most) // 2
            if arena.gmacs_of(make(middle)) < gmacs:
                fewest = middle + 1
            else:
                most = middle
        return Entry(make(most), {"samples": most})

    return at


# --- policies that MAPPO learns ---


def trained_run(arena: Arena, name: str, seed: int, changes: Mapping[str, Any]) -> Path:
    """The finished run of a training under the arena's settings and ``changes``.

    Raises:
        ValueError: its folder holds a run under other settings.
    """
    config = replace(arena.base, seed=seed, **changes)
    folder = arena.runs / f"{name}-{seed}"
    _check_settings(folder, config.to_json())
    if not (folder / RUN_WEIGHTS).is_file():
        task, _, _ = learn(Run(folder, config))
        task.env.close()
    return folder


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises ValueError where ``folder`` holds a run under other settings that matter."""
    written = folder / "config.json"
    if not written.is_file():
        return
    found = json.loads(written.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(settings))
    strange = sorted(
        key
        for key in (found.keys() | wanted.keys()) - set(RUNS_OWN)
        # what a run doesn't know of came later, and was off then
        if found.get(key, False) != wanted.get(key, False)
    )
    if strange:
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(strange)}): move it away, or "
            "give another --out"
        )


@dataclass(frozen=True)
class Recipe:
    """A training by ``trainers.mappo``.

    Attributes:
        title: what it is, in a line.
        changes: settings other than the arena's.
        many_prices: train one policy for all of the game's prices; otherwise for one, and later
            reach other costs by the threshold.
        released_stages: prune where RL4EViT's code does.
    """

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    many_prices: bool = True
    released_stages: bool = False

    def settings(self, arena: Arena) -> dict[str, Any]:
        settings = dict(self.changes)
        if self.released_stages:
            settings["prune_before"] = arena.game.released_stages
        if self.many_prices:
            observation = settings.get("observation", arena.base.observation)
            settings["observation"] = (*observation, "budget")
            settings["alpha_range"] = arena.game.alpha_range
        return settings


def learned(name: str, recipe: Recipe, arena: Arena, seed: int) -> At:
    """Set by its price of compute where it observes one, else by the threshold on its
    probability.
    """
    model = PrunedViT.from_run(trained_run(arena, name, seed, recipe.settings(arena)))
    model.to(arena.backbone.device)
    policy = model.policy
    assert isinstance(policy, LearnedPolicy)

    def set_to(knob: float) -> PrunedViT:
        budget = knob if recipe.many_prices else None
        threshold = 0.5 if recipe.many_prices else knob / (1 + knob)
        own = LearnedPolicy(policy.actor, policy.fields, policy.num_prefix, budget, threshold)
        return PrunedViT(model.backbone, own)

    def at(gmacs: float) -> Entry:
        low, high = ODDS
        if recipe.many_prices:
            low, high = arena.game.alpha_range
            low, high = low / PRICES_BEYOND, high * PRICES_BEYOND
        knob = bisected(lambda k: arena.gmacs_of(set_to(k)), low, high, gmacs, at_least=False)
        set_model = set_to(knob)
        assert isinstance(set_model.policy, LearnedPolicy)
        if recipe.many_prices:
            return Entry(set_model, {"budget": knob})
        return Entry(set_model, {"threshold": set_model.policy.threshold})

    return at


# --- DynamicViT ---


def dynamic_vit(name: str, fine_tune: bool, arena: Arena, seed: int) -> At:
    """Trained for one share of the patches; set by the share that is kept."""
    base, folder = arena.base, arena.runs / f"{name}-{seed}"
    config = DynamicViTConfig(
        backbone=base.backbone,
        model_kwargs=base.model_kwargs,
        pretrained=base.pretrained,
        checkpoint=base.checkpoint,
        dataset=base.dataset,
        prune_before=base.prune_before,
        fine_tune=fine_tune,
        seed=seed,
        device=base.device,
        threads=base.threads,
        run_name=str(folder.absolute()),
    )
    _check_settings(folder, describe(config))
    if not (folder / RUN_WEIGHTS).is_file():
        was_begun = RunFolder(folder).is_begun
        train_dynamic_vit(DynamicViTConfig(resume=folder) if was_begun else config)
    trained = PrunedViT.from_run(folder).to(arena.backbone.device)

    def keeping(share: float) -> PrunedViT:
        policy = copy.copy(trained.policy)  # the same predictors, set for itself
        assert isinstance(policy, DynamicViTPolicy)
        policy.keep = share
        return PrunedViT(trained.backbone, policy)

    def at(gmacs: float) -> Entry:
        least, most = 1 / arena.backbone.num_patches, 1.0
        pruned = bisected(
            lambda k: arena.gmacs_of(keeping(1 / k)), 1 / most, 1 / least, gmacs, at_least=True
        )
        return Entry(keeping(1 / pruned), {"keep": 1 / pruned})

    return at


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


def tome(arena: Arena, seed: int) -> At:
    """As evenly merged as it goes, by the fewest merges that cost no more."""
    backbone, model = arena.backbone, arena.model
    count = macs_counter(model, backbone.image_shape)

    def at(gmacs: float) -> Entry:
        try:
            merges = merges_at(model, backbone.image_shape, gmacs * 1e9)
        except ValueError as error:
            raise UnreachableError(str(error)) from error
        # one merge less costs at least as much as asked for
        merges = even_merges(max(sum(merges) - 1, 0), backbone.depth)
        tokens = token_counts(backbone.num_patches, 0, merges)
        kept = [tokens[block] for block in backbone.prune_before]
        peer = Peer(ToMeViT(model, merges), backbone, count(merges), kept)
        return Entry(peer, {"merges": list(merges)})

    return at


def evit(with_fused: bool, arena: Arena, seed: int) -> At:
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

    def at(gmacs: float) -> Entry:
        enough = [tokens for tokens in schedules if count(tokens) >= gmacs * 1e9]
        if not enough:
            raise UnreachableError("all of its patches cost less")
        tokens = min(enough, key=count)
        kept = evit_token_counts(backbone.num_patches, tokens, with_fused)
        peer = EViT(model, backbone.prune_before, tokens, with_fused)
        return Entry(Peer(peer, backbone, count(tokens), kept), {"tokens": list(tokens)})

    return at


# --- who there is ---

PAPER = {
    "reward": "markov-game", "accuracy": "correct", "alpha": 3.0,
    "rollouts_per_image": 1, "critic": "central",
}  # fmt: skip
RELEASED = {
    "reward": "released-code", "rollouts_per_image": 1, "critic": "central",
    "gae_lambda": 0.0, "gamma": 0.99, "attention_prior": 0.0, "keep_bias": 0.0,
    "lr": 5e-4, "lr_schedule": "constant", "epochs": 10, "entropy": 0.01,
}  # fmt: skip
WITHOUT_STAGE = ("token", "cls", "cls_attention")

RECIPES: Mapping[str, Recipe] = {
    "mappo": Recipe("ours: one policy for all budgets"),
    "mappo-one-price": Recipe("ours, trained for one price", many_prices=False),
    "agreement": Recipe("paid for the dense model's answer, no labels", {"accuracy": "agreement"}),
    "confidence": Recipe("paid for the true class's probability", {"accuracy": "confidence"}),
    "paper": Recipe("the paper's way: pot, critic as baseline", PAPER, many_prices=False),
    "released": Recipe(
        "what RL4EViT's code does", RELEASED, many_prices=False, released_stages=True
    ),
    "ippo": Recipe("a local critic as baseline", {"rollouts_per_image": 1, "critic": "local"}),
    "no-image-baseline": Recipe(
        "a central critic as baseline", {"rollouts_per_image": 1, "critic": "central"}
    ),
    "with-critic": Recipe("a central critic beside the image baseline", {"critic": "central"}),
    "no-attention-prior": Recipe("from no prior", {"attention_prior": 0.0}),
    "no-team-reward": Recipe(
        "survivors share a pot",
        {key: PAPER[key] for key in ("reward", "accuracy", "alpha")},
        many_prices=False,
    ),
    "no-stage": Recipe("blind to the stage", {"observation": WITHOUT_STAGE}),
}

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
    **{
        name: Entrant(recipe.title, partial(learned, name, recipe))
        for name, recipe in RECIPES.items()
    },
}
