"""Policies that decide which tokens stay, and ``PrunedViT``, a backbone pruned by one."""

from prunevit.agents.calibrate import CalibrationError, calibrate
from prunevit.agents.policies.actor_critic import CommunicatingActor, TokenActor
from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.agents.policies.heuristics import AttentionThreshold, KeepAll, TopK
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.policies.policy import Policy
from prunevit.agents.policy_library import find_policy, policy_card, policy_names
from prunevit.agents.pruned_transformers_vit import PrunedTransformersViT
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.agents.pruning import prune

__all__ = [
    "AttentionThreshold",
    "CalibrationError",
    "CommunicatingActor",
    "DynamicViTPolicy",
    "KeepAll",
    "LearnedPolicy",
    "Policy",
    "PrunedTransformersViT",
    "PrunedViT",
    "TokenActor",
    "TopK",
    "calibrate",
    "find_policy",
    "policy_card",
    "policy_names",
    "prune",
]
