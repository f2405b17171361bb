"""Where the policies of ``benchmarks.compare`` meet, and how one is brought to a given cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunevit.agents.pruned_vit import Trace
from prunevit.benchmarks.games import Game
from prunevit.envs.data.datasets import ImageSet
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.evaluation import Traced, evaluate

BISECTIONS = 12

Knobs = Mapping[str, Any]


class UnreachableError(ValueError):
    """A policy can't be brought to an operating point; the message says which."""


@dataclass(frozen=True)
class Arena:
    """Where policies meet.

    Attributes:
        game: data, backbone and stages.
        base: settings that a training by ``trainers.mappo`` starts from; a policy changes some.
        iterations: of every training; None leaves each its own number.
        model: timm's own model, frozen.
        backbone: the same model, staged.
        validation: images on which knobs are set.
        size: how many of them.
        runs: the folder in which trainings leave their runs.
    """

    game: Game
    base: MappoConfig
    iterations: int | None
    model: nn.Module
    backbone: StagedViT
    validation: ImageSet
    size: int
    runs: Path

    def gmacs_of(self, model: Traced) -> float:
        return evaluate(model, self.validation, self.size).gmacs

    def gmacs_at(self, point: float) -> float:
        """What an operating point, a share of the dense compute, costs an image."""
        return point * self.backbone.dense_macs / 1e9


@dataclass(frozen=True)
class Contender:
    """One policy, one seed, at any cost.

    Attributes:
        tune: GMACs of an image -> the knobs with which it costs that; trains what has to be
            trained; raises UnreachableError.
        make: the backbone pruned by it, by the knobs among the items of a mapping (a record will
            do); trains nothing, and raises ValueError where a training is gone.
    """

    tune: Callable[[float], Knobs]
    make: Callable[[Knobs], Traced]


@dataclass(frozen=True)
class Bound:
    """What pruning could reach, and no way to prune: it searches with the image's own answer. So it
    is judged on few images, and its speed means nothing.

    Attributes:
        tune: as a contender's.
        search: the knobs -> images and labels -> what it found.
        images: how many it is judged on.
    """

    tune: Callable[[float], Knobs]
    search: Callable[[Knobs], Callable[[Tensor, Tensor], Trace]]
    images: int


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
