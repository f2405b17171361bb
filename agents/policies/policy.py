"""What decides: the ``Policy`` protocol."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from prunevit.envs.observations import View


@runtime_checkable
class Policy(Protocol):
    """Decides at every stage which living patches stay.

    Attributes:
        needs_attention: whether it reads ``cls_attention``, which costs a little to observe.
        macs_per_decision: multiply-accumulates that one decision on one living patch costs.
    """

    needs_attention: bool
    macs_per_decision: int

    def __call__(self, view: View) -> Tensor:
        """Keep, bool [B, N]; of no meaning for patches that are gone."""
        ...
