"""Policies as JSON values, and policies built from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunevit.agents.policies.actor_critic import CommunicatingActor, TokenActor, logits_of
from prunevit.agents.policies.calibration import Calibration
from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.agents.policies.heuristics import AttentionThreshold, KeepAll, TopK
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.policies.policy import Policy
from prunevit.envs.fields import field_size, field_slices
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import some_tensor
from prunevit.envs.vit.untouched import has_own_hooks

# policies without weights, and the arguments that define them, which are also attributes
PLAIN_POLICIES: dict[str, tuple[type, tuple[str, ...]]] = {
    "keep-all": (KeepAll, ()),
    "top-k": (TopK, ("tokens", "score", "seed")),
    "threshold": (AttentionThreshold, ("thresholds", "dither")),
}
# policies that saved models of before can have, and why there are none any more
GONE_POLICIES = {
    "adaptive-sampling": "it was not ATS as published, which prunes inside of blocks: see "
    "prunevit.benchmarks.baselines.ats",
}
PROBED = 64  # observations on which a policy and what will be read of it are compared
PROBE_TOLERANCE = 1e-5


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
    # not of subclasses, which may decide in another way
    if type(policy) is LearnedPolicy and type(policy.actor) in (TokenActor, CommunicatingActor):
        actor = policy.actor
        assert isinstance(actor, TokenActor)
        heads = actor.among_agents.heads if isinstance(actor, CommunicatingActor) else 0
        return {
            "kind": "learned",
            "observation": list(policy.fields),
            "hidden": list(actor.hidden),
            "attention_prior": actor.attention is not None,
            "redundancy_prior": actor.redundancy is not None,
            "actor_attention": heads,
            "alpha": policy.alpha,
            "threshold": policy.threshold,
            "dither": policy.dither,
            "calibration": policy.calibration and policy.calibration.to_json(),
        }
    if type(policy) is DynamicViTPolicy:
        return {
            "kind": "dynamic-vit",
            "keep": policy.keep,
            "hidden": policy.hidden,
            "dither": policy.dither,
        }
    raise SavedModelError(
        f"a {type(policy).__name__} has no form on disk: LearnedPolicy, DynamicViTPolicy and "
        f"{', '.join(plain.__name__ for plain, _ in PLAIN_POLICIES.values())} have"
    )


def make_policy(described: Mapping[str, Any], backbone: StagedViT) -> Policy:
    """Builds the policy that ``describe_policy`` described, with untrained weights.

    Raises:
        SavedModelError: the kind of policy is unknown or gone.
    """
    kind = described["kind"]
    if kind in PLAIN_POLICIES:
        plain, arguments = PLAIN_POLICIES[kind]
        # models of before 0.2 have no dither
        return plain(**{name: described[name] for name in arguments if name in described})
    if kind == "dynamic-vit":
        predictors = dynamic_vit_policy(backbone, described["keep"], described["hidden"])
        predictors.dither = described.get("dither", False)
        return predictors
    if kind in GONE_POLICIES:
        raise SavedModelError(f"policy {kind!r} is gone: {GONE_POLICIES[kind]}")
    if kind != "learned":
        raise SavedModelError(f"unknown kind of policy {kind!r}: of another version?")
    policy = learned_policy(
        backbone,
        described["observation"],
        described["hidden"],
        described["attention_prior"],
        described.get("alpha"),
        # models of before 0.2 have neither
        described.get("actor_attention", 0),
        described.get("redundancy_prior", False),
    )
    policy.threshold = described.get("threshold", 0.5)
    policy.dither = described.get("dither", False)
    policy.calibration = read_calibration(described.get("calibration"))
    return policy


def read_calibration(described: Any) -> Calibration | None:
    """The calibration that a file describes, if it does.

    Raises:
        SavedModelError: it is damaged.
    """
    if described is None:
        return None
    try:
        return Calibration.from_json(described)
    except ValueError as error:
        raise SavedModelError(str(error)) from error


def own_additions(policy: nn.Module) -> str | None:
    """What was added to a policy besides weights and settings, if anything."""
    if has_own_hooks(policy):
        return "it has hooks of its own"
    replaced = [name for name in vars(policy) if callable(getattr(type(policy), name, None))]
    return f"it has {', '.join(replaced)} of its own" if replaced else None


@torch.no_grad()
def check_policy_rebuilds(policy: nn.Module, again: Any, backbone: StagedViT) -> None:
    """Checks that ``again`` with the weights of ``policy`` decides as ``policy`` does.

    Raises:
        SavedModelError: it doesn't, since ``policy`` was changed.
    """
    problem = own_additions(policy)
    if problem is None:
        try:
            again.load_state_dict(policy.state_dict())
        except RuntimeError as error:
            problem = " ".join(str(error).split()).rstrip(".")
    if problem is None:
        again.to(some_tensor(policy).device)
        ours, rebuilt = (_on_a_probe(each, backbone) for each in (policy, again))
        if not torch.allclose(ours, rebuilt, rtol=0, atol=PROBE_TOLERANCE, equal_nan=True):
            problem = "its networks have other outputs"
    if problem is not None:
        raise SavedModelError(
            f"the policy would not come back as it is: {problem}. Hooks, replaced methods, other "
            "layers and quantised layers can't be saved: remove them, and add them again after "
            "loading"
        )


def _on_a_probe(policy: Any, backbone: StagedViT) -> Tensor:
    """What the networks of a policy give for random observations."""
    random = torch.Generator().manual_seed(0)
    device = some_tensor(policy).device
    if isinstance(policy, LearnedPolicy):
        size = sum(field_size(backbone, name) for name in policy.fields)
        observation = torch.randn(PROBED, size, generator=random).to(device)
        return logits_of(policy.actor, observation, None)
    tokens = torch.randn(PROBED, backbone.width, generator=random).to(device)
    image = torch.zeros(PROBED, dtype=torch.int64, device=device)
    alive = torch.ones(PROBED, device=device)
    return torch.cat([predict(tokens, image, 1, alive) for predict in policy.predictors])


def learned_policy(
    backbone: StagedViT,
    observation: Sequence[str],
    hidden: Sequence[int],
    attention_prior: bool,
    alpha: float | None = None,
    heads: int = 0,
    redundancy_prior: bool = False,
) -> LearnedPolicy:
    """Builds an untrained ``LearnedPolicy`` for ``backbone``.

    Args:
        backbone: the staged ViT.
        observation: names of the fields that agents observe.
        hidden: widths of the actor's hidden layers.
        attention_prior: start from class attention, see ``TokenActor``.
        alpha: weight of compute, if it is observed.
        heads: of the attention among agents; 0 for none.
        redundancy_prior: start from redundancy, see ``TokenActor``.
    """
    slices = field_slices(backbone, observation)
    size = max(columns.stop for columns in slices.values())
    attention = slices["cls_attention"].start if attention_prior else None
    redundancy = slices["redundancy"].start if redundancy_prior else None
    alpha_column = slices["alpha"].start if "alpha" in slices else None
    with torch.random.fork_rng(devices=[]):
        make = partial(CommunicatingActor, heads=heads) if heads else TokenActor
        actor = make(size, hidden, attention, alpha=alpha_column, redundancy=redundancy)
        return LearnedPolicy(actor, observation, backbone.num_prefix, alpha)


def dynamic_vit_policy(
    backbone: StagedViT, keep: float, hidden: int | None, seed: int = 0
) -> DynamicViTPolicy:
    """Builds an untrained ``DynamicViTPolicy`` for ``backbone``; ``seed`` draws its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DynamicViTPolicy(backbone.width, backbone.num_stages, keep, hidden)
