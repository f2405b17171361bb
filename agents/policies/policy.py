"""The ``Policy`` protocol."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from prunevit.envs.observations import View


@runtime_checkable
class Policy(Protocol):
    """Decides at every stage which patches stay.

    Attributes:
        needs_attention: whether it reads ``cls_attention``, which costs a little compute.
        macs_per_decision: multiply-accumulates of one decision on one living patch. A policy with a
            true ``compares_patches`` also pays for the similarity of each pair of living patches.
    """

    needs_attention: bool
    macs_per_decision: int

    def __call__(self, view: View) -> Tensor:
        """Returns which patches stay, bool [B, N]; ignored for patches that are gone."""
