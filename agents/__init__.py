"""Who decides: policies, and the backbone pruned by one."""

from tokenprune.agents.actor_critic import LearnedPolicy, TokenActor
from tokenprune.agents.dynamic_vit import DynamicViTPolicy
from tokenprune.agents.heuristics import AdaptiveSampling, AttentionThreshold, KeepAll, TopK
from tokenprune.agents.policy import Policy
from tokenprune.agents.pruned_vit import PrunedViT, prune

__all__ = [
    "AdaptiveSampling",
    "AttentionThreshold",
    "DynamicViTPolicy",
    "KeepAll",
    "LearnedPolicy",
    "Policy",
    "PrunedViT",
    "TokenActor",
    "TopK",
    "prune",
]
