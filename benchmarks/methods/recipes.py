"""Trainings by ``trainers.mappo``: ours, ours with one part changed, and RL4EViT's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from prunevit.benchmarks.protocol import Benchmark
from prunevit.trainers.common.config import MappoConfig

Stages = Literal["task", "first", "between", "released"]


@dataclass(frozen=True)
class Recipe:
    """A training by ``trainers.mappo``.

    Attributes:
        title: what it is, in a line.
        changes: settings that differ from those of ours.
        alpha_range: train one policy, which observes alpha, for the task's range of alphas. Without
            it, train for one alpha, and reach other costs by the threshold later.
        stages: where it prunes: at the task's stages, the first of them alone, between the blocks
            behind them, as DynamicViT has it, or at those of RL4EViT's code.
        length: iterations as a share of the task's. Where their number is given, shorter ones take
            all of it.
        samples: whether its authors evaluate it by drawing actions. It then has the one compute
            that this gives, and takes part a second time with a threshold.
    """

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    alpha_range: bool = True
    stages: Stages = "task"
    length: float = 1.0
    samples: bool = False

    def settings(self, bench: Benchmark) -> dict[str, Any]:
        """The changes to ``bench.base``: those of the task's ours, and this one's."""
        settings = {**bench.task.ours, **self.changes}
        if self.stages == "released":
            settings["prune_before"] = bench.task.released_stages
            settings["prune_at"] = "block"
        elif self.stages == "first":
            settings["prune_before"] = bench.task.prune_before[:1]
        elif self.stages == "between":
            settings["prune_before"] = bench.backbone.whole_from
            settings["prune_at"] = "block"
        if bench.iterations is None or self.length > 1:
            settings["iterations"] = round(self.length * bench.base.iterations)
        if self.alpha_range:
            observation = settings.get("observation", bench.base.observation)
            settings["observation"] = (*observation, "alpha")
            settings["alpha_range"] = bench.task.alpha_range
        return settings


# Our reading of arXiv 2503.23459: survivors share a reward that is paid where the answer is right,
# and a critic is the baseline
PAPER = {
    "reward": "markov-game", "accuracy": "correct", "alpha": 3.0,
    "rollouts_per_image": 1, "on_prune": "drop",
}  # fmt: skip
# RL4EViT's code (github.com/LuErShuai/rl4evit at 5847406, timm/models/vision_transformer_dynamic.py
# and marl/mappo.py): its rates, networks and minibatches of 16 episodes. Ours remain GELU (its
# tanh), coordinates of a place (its agent number), and normalised advantages and values.
RELEASED = {
    "reward": "released-code", "observation": ("token", "position"), "rollouts_per_image": 1,
    "hidden": (64, 256, 64), "critic_hidden": (64, 256, 64),
    "gae_lambda": 0.0, "gamma": 0.99, "attention_prior": 0.0, "keep_bias": 0.0,
    "lr": 5e-6, "lr_schedule": "constant", "epochs": 4, "minibatches": 16, "entropy": 0.01,
    "on_prune": "drop",
}  # fmt: skip
WITHOUT_STAGE = ("token", "cls", "cls_attention")

RECIPES: Mapping[str, Recipe] = {
    "mappo": Recipe("ours: one policy for every alpha"),
    "rloo": Recipe("ours without a critic, RLOO-style", {"critic": "none"}),
    "agreement": Recipe("paid for the dense model's answers, no labels", {"accuracy": "agreement"}),
    "confidence": Recipe("paid for the true class's probability", {"accuracy": "confidence"}),
    "paper": Recipe(
        "RL4EViT's paper as we read it: a shared reward, a critic as baseline",
        PAPER,
        alpha_range=False,
    ),
    # even half the iterations take several times as long as ours
    "released": Recipe(
        "RL4EViT's released code, at its own learning rate",
        RELEASED,
        alpha_range=False,
        stages="released",
        length=0.5,
        samples=True,
    ),
    "released-faster": Recipe(
        "the same at a hundred times its learning rate",
        {**RELEASED, "lr": 5e-4},
        alpha_range=False,
        stages="released",
        length=0.5,
        samples=True,
    ),
    "ippo": Recipe(
        "IPPO (arXiv 2011.09533): a local critic as baseline",
        {"rollouts_per_image": 1, "critic": "local"},
    ),
    "no-image-baseline": Recipe("ours without the image baseline", {"rollouts_per_image": 1}),
    "no-attention-prior": Recipe("without the attention prior", {"attention_prior": 0.0}),
    "no-team-reward": Recipe(
        "survivors share a reward, one alpha",
        {key: PAPER[key] for key in ("reward", "accuracy", "alpha")},
        alpha_range=False,
    ),
    "no-stage": Recipe("doesn't observe the stage", {"observation": WITHOUT_STAGE}),
    "no-class-token": Recipe(
        "doesn't observe the class token", {"observation": ("token", "stage", "cls_attention")}
    ),
    "between-blocks": Recipe("prunes before blocks, not inside of them", stages="between"),
    "one-stage": Recipe("prunes at the first stage alone", stages="first"),
    "redundancy": Recipe(
        "observes redundancy too", {"observation": (*MappoConfig.observation, "redundancy")}
    ),
    "drop": Recipe("ours, dropping what it prunes", {"on_prune": "drop"}),
    "merge": Recipe("ours, merging what it prunes", {"on_prune": "merge"}),
    "actor-attention": Recipe("agents attend to each other", {"actor_attention": 2}),
    "larger-actor": Recipe("an actor of 128 hidden units", {"hidden": (128,)}),
    "longer": Recipe("trained for twice as long", length=2.0),
    "three-stages": Recipe("stages in blocks 0, 1 and 3", {"prune_before": (0, 1, 3)}),
}
