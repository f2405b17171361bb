"""``LazyObservations``: observations of the token game that are computed when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from prunevit.envs.batched.protocol import Observations
from prunevit.envs.observations import View


class LazyObservations(Observations):
    """``Observations`` backed by a ``View``: fields that nobody reads are never computed.

    Args:
        view: the surviving patches at a stage.
        fields: what agents observe, names in ``fields.FIELDS``.
    """

    def __init__(self, view: View, fields: Sequence[str]) -> None:
        object.__setattr__(self, "view", view)
        object.__setattr__(self, "fields", tuple(fields))
        object.__setattr__(self, "alive", view.alive.clone())  # whoever reads it may change it

    view: View
    fields: tuple[str, ...]

    @cached_property
    def _living(self) -> Tensor:
        return self.view.living(self.fields)

    def living(self) -> Tensor:
        return self._living

    def distinct(self) -> tuple[Tensor, Tensor]:
        return self._distinct

    @cached_property
    def _distinct(self) -> tuple[Tensor, Tensor]:
        return self.view.distinct(self.fields)

    def distinct_states(self) -> tuple[Tensor, Tensor]:
        return self._distinct_states

    @cached_property
    def _distinct_states(self) -> tuple[Tensor, Tensor]:
        return self.view.distinct_states()

    @cached_property
    def observation(self) -> Tensor:
        return self.view.scatter(self._living)

    @cached_property
    def state(self) -> Tensor:
        return self.view.state()

    @cached_property
    def action_mask(self) -> Tensor:
        return action_mask(self.view.alive)


def action_mask(alive: Tensor) -> Tensor:
    """Allows both actions to living agents and only pruning to others: bool [B, N] -> [B, N, 2]."""
    return torch.stack([torch.ones_like(alive), alive], dim=-1)
