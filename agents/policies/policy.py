"""The ``Policy`` protocol."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from prunevit.envs.observations import View
from prunevit.envs.vit.staged_vit import StagedViT


@runtime_checkable
class Policy(Protocol):
    """Decides at every stage which patches stay.

    Attributes:
        needs_attention: whether it reads ``cls_attention``, which costs a little compute.
        macs_per_decision: multiply-accumulates of one decision on one living patch. A policy with a
            true ``compares_patches`` also pays for the similarity of each pair of living patches,
            one with ``macs_per_pair`` for so many a pair.
    """

    needs_attention: bool
    macs_per_decision: int

    def __call__(self, view: View) -> Tensor:
        """Returns which patches stay, bool [B, N]; ignored for patches that are gone."""


def count_policy_macs(policy: Any, backbone: StagedViT, living: Tensor) -> Tensor:
    """Multiply-accumulates of a policy's decisions on each image, int64 [B].

    Args:
        policy: the policy. One that doesn't say what it costs is free.
        backbone: the staged ViT that it prunes.
        living: patches that it decides on at each stage, int64 [B, T].
    """
    of_one = getattr(policy, "macs_per_decision", 0)
    of_pair = getattr(policy, "macs_per_pair", 0)
    of_pair += backbone.width * getattr(policy, "compares_patches", False)
    return (living * of_one + living.square() * of_pair).sum(1)
