"""Policies as JSON values, and policies built from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.agents.policies.heuristics import AdaptiveSampling, AttentionThreshold, KeepAll, TopK
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.policies.policy import Policy
from prunevit.envs.fields import field_slices
from prunevit.envs.vit.staged_vit import StagedViT

# policies without weights, and the arguments that define them, which are also attributes
PLAIN_POLICIES: dict[str, tuple[type, tuple[str, ...]]] = {
    "keep-all": (KeepAll, ()),
    "top-k": (TopK, ("tokens", "score", "seed")),
    "threshold": (AttentionThreshold, ("thresholds",)),
    "adaptive-sampling": (AdaptiveSampling, ("samples",)),
}


class SavedModelError(ValueError):
    """A model can't be saved, or files can't be read as one; the message says why."""


def describe_policy(policy: Policy) -> dict[str, Any]:
    """Describes a policy in JSON values; trained weights are saved elsewhere.

    Raises:
        SavedModelError: policies of this class can't be saved.
    """
    for kind, (plain, arguments) in PLAIN_POLICIES.items():
        if type(policy) is plain:
            return {"kind": kind} | {name: getattr(policy, name) for name in arguments}
    if isinstance(policy, LearnedPolicy) and isinstance(policy.actor, TokenActor):
        return {
            "kind": "learned",
            "observation": list(policy.fields),
            "hidden": list(policy.actor.hidden),
            "attention_prior": policy.actor.attention is not None,
            "alpha": policy.alpha,
            "threshold": policy.threshold,
            "dither": policy.dither,
        }
    if isinstance(policy, DynamicViTPolicy):
        return {"kind": "dynamic-vit", "keep": policy.keep, "hidden": policy.hidden}
    raise SavedModelError(
        f"a {type(policy).__name__} has no form on disk: LearnedPolicy, DynamicViTPolicy and "
        f"{', '.join(plain.__name__ for plain, _ in PLAIN_POLICIES.values())} have"
    )


def make_policy(described: Mapping[str, Any], backbone: StagedViT) -> Policy:
    """Builds the policy that ``describe_policy`` described, with untrained weights.

    Raises:
        SavedModelError: the kind of policy is unknown.
    """
    kind = described["kind"]
    if kind in PLAIN_POLICIES:
        plain, arguments = PLAIN_POLICIES[kind]
        return plain(**{name: described[name] for name in arguments})
    if kind == "dynamic-vit":
        return dynamic_vit_policy(backbone, described["keep"], described["hidden"])
    if kind != "learned":
        raise SavedModelError(f"unknown kind of policy {kind!r}: of another version?")
    policy = learned_policy(
        backbone,
        described["observation"],
        described["hidden"],
        described["attention_prior"],
        described.get("alpha"),
    )
    policy.threshold = described.get("threshold", 0.5)
    policy.dither = described.get("dither", False)
    return policy


def learned_policy(
    backbone: StagedViT,
    observation: Sequence[str],
    hidden: Sequence[int],
    with_prior: bool,
    alpha: float | None = None,
) -> LearnedPolicy:
    """Builds an untrained ``LearnedPolicy`` for ``backbone``.

    Args:
        backbone: the staged ViT.
        observation: names of the fields that agents observe.
        hidden: widths of the actor's hidden layers.
        with_prior: start from class attention, see ``TokenActor``.
        alpha: weight of compute, if it is observed.
    """
    slices = field_slices(backbone, observation)
    size = max(columns.stop for columns in slices.values())
    attention = slices["cls_attention"].start if with_prior else None
    alpha_column = slices["alpha"].start if "alpha" in slices else None
    with torch.random.fork_rng(devices=[]):
        actor = TokenActor(size, hidden, attention, alpha=alpha_column)
        return LearnedPolicy(actor, observation, backbone.num_prefix, alpha)


def dynamic_vit_policy(
    backbone: StagedViT, keep: float, hidden: int, seed: int = 0
) -> DynamicViTPolicy:
    """Builds an untrained ``DynamicViTPolicy`` for ``backbone``; ``seed`` draws its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DynamicViTPolicy(backbone.width, backbone.num_stages, keep, hidden)
