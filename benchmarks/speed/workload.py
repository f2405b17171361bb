"""The workload of ``benchmarks.speed.throughput``: a backbone, a policy, images, and which of their
patches survive.

Weights are random unless they come from a trained run: time does not depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.policies.policy import Policy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data_config import model_data_config
from prunevit.envs.fields import DEFAULT_FIELDS, field_slices
from prunevit.envs.observations import View
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.config import MappoConfig

ScheduleName = Literal["released", "every-block"]

KEEP_RANGE = 0.3  # ratios are drawn at most so far from their mean


@dataclass(frozen=True)
class Schedule:
    """Where tokens are pruned, and how many.

    Attributes:
        prune_before: as ``StagedViT`` takes it.
        keep: mean share of an image's living patches that survives a stage.
    """

    prune_before: tuple[int, ...] | None
    keep: float


SCHEDULES: Mapping[ScheduleName, Schedule] = {
    "released": Schedule((3, 6, 9), 0.7),  # what RL4EViT's code does
    "every-block": Schedule(None, 0.9),  # this project's default stages
}


@dataclass(frozen=True)
class Spec:
    """How to make a ``Workload``; small enough to send to another process.

    Attributes:
        model: as ``create_backbone`` takes it, like ``model_kwargs``.
        model_kwargs: arguments of the model.
        schedule: stages and mean share kept.
        images: how many.
        seed: of images, patterns and weights.
        device: "cpu" or "cuda".
        dtype: of weights and images; the policy stays in float32.
        run: folder of a trained run, whose backbone, stages, policy and test images are used in
            place of ``model`` and ``schedule``; None for drawn patterns.
    """

    model: str
    schedule: Schedule
    images: int
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    run: Path | None = None


@dataclass(frozen=True)
class Workload:
    """A backbone in both executions, who decides, the images, and which of their patches have been
    drawn to survive each stage, bool [images, T, N]; None where that is left to who decides.
    """

    packed: StagedViT
    masked: StagedViT
    decider: Policy
    images: Tensor
    keep: NDArray[np.bool_] | None


class DrawnPolicy:
    """Lets a policy decide, for what it costs, and then keeps what has been drawn.

    Args:
        decider: the policy.
        keep: what is kept, bool [B, T, N].
    """

    def __init__(self, decider: Policy, keep: Tensor) -> None:
        self.decider = decider
        self.keep = keep
        self.needs_attention = decider.needs_attention
        self.macs_per_decision = decider.macs_per_decision

    def __call__(self, view: View) -> Tensor:
        self.decider(view)
        return self.keep[:, view.stage]


def load(spec: Spec) -> Workload:
    """Builds what ``spec`` describes.

    Raises:
        ValueError: a model, its arguments, a stage or a run that isn't fit.
        OSError: the run's files can't be read.
    """
    if spec.run is not None:
        return _from_run(spec, spec.run)
    torch.manual_seed(spec.seed)
    model = create_backbone(spec.model, untrained=True, **spec.model_kwargs)
    model = model.to(spec.device, spec.dtype)
    packed = StagedViT(model, spec.schedule.prune_before)
    decider = untrained_policy(packed).to(spec.device)
    images = torch.randn(spec.images, *packed.image_shape)
    shape = (spec.images, packed.num_stages, packed.num_patches)
    return _workload(spec, packed, decider, images, draw_keep(shape, spec.schedule.keep, spec.seed))


def untrained_policy(backbone: StagedViT) -> LearnedPolicy:
    """An actor as training starts from, of the default size on the default observation."""
    slices = field_slices(backbone, DEFAULT_FIELDS)
    size = max(part.stop for part in slices.values())
    actor = TokenActor(size, MappoConfig().hidden, slices["cls_attention"].start)
    return LearnedPolicy(actor, DEFAULT_FIELDS)


def _from_run(spec: Spec, run: Path) -> Workload:
    pruned = PrunedViT.from_run(run).to(spec.device)
    pruned.backbone.model.to(spec.dtype)
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    data_config = model_data_config(pruned.backbone.model)
    test = open_images(settings["dataset"], "test", data_config)
    images, _ = test.load([i % len(test) for i in range(spec.images)])
    return _workload(spec, pruned.backbone, pruned.policy, images, None)


def _workload(
    spec: Spec,
    packed: StagedViT,
    decider: Policy,
    images: Tensor,
    keep: NDArray[np.bool_] | None,
) -> Workload:
    return Workload(
        packed=packed,
        masked=StagedViT(packed.model, packed.prune_before, "masked"),
        decider=decider,
        images=images.to(spec.device, spec.dtype),
        keep=keep,
    )


def draw_keep(shape: tuple[int, int, int], mean: float, seed: int) -> NDArray[np.bool_]:
    """Random survivors, bool ``shape`` = [images, T, N]: every image has at every stage a ratio of
    its own, uniform around ``mean``, and keeps that share of what lives.

    Raises:
        ValueError: ``mean`` is no share.
    """
    if not 0 < mean <= 1:
        raise ValueError(f"keep={mean}: the mean share kept at a stage must be in (0, 1]")
    generator = np.random.default_rng(seed)
    reach = min(KEEP_RANGE, mean, 1 - mean)
    survivors = np.empty(shape, dtype=np.bool_)
    alive = np.ones_like(survivors[:, 0])
    for stage in range(shape[1]):
        ratio = generator.uniform(mean - reach, mean + reach, len(alive))
        count = np.rint(ratio * alive.sum(1))
        score = np.where(alive, generator.random(alive.shape), -1.0)  # the dead come last
        rank = (-score).argsort(1).argsort(1)
        alive = alive & (rank < count[:, None])
        survivors[:, stage] = alive
    return survivors
