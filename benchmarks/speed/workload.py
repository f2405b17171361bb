"""What ``benchmarks.speed.throughput`` runs: a backbone, a policy, images, and which of their
patches survive.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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

KEEP_RANGE = 0.3  # ratios are drawn at most so far from their mean


@dataclass(frozen=True)
class Workload:
    """A backbone in both executions, a policy, images, and which of their patches survive each
    stage, bool [images, T, N]; None where the policy decides.
    """

    packed: StagedViT
    masked: StagedViT
    policy: Policy
    images: Tensor
    keep: NDArray[np.bool_] | None


class DrawnPolicy:
    """Runs a policy, for what it costs, and then keeps what has been drawn.

    Args:
        policy: the policy.
        keep: what is kept, bool [B, T, N].
    """

    def __init__(self, policy: Policy, keep: Tensor) -> None:
        self.policy = policy
        self.keep = keep
        self.needs_attention = policy.needs_attention
        self.macs_per_decision = policy.macs_per_decision

    def __call__(self, view: View) -> Tensor:
        self.policy(view)
        return self.keep[:, view.stage]


def load(
    model: str,
    prune_before: tuple[int, ...],
    keep: float,
    count: int,
    image_size: int | None = None,
    run: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """Builds a workload. Weights, images and survivors are random, since time does not depend on
    them. A ``run`` brings its own backbone, stages, policy and test images.

    Args:
        model: as ``create_backbone`` takes it.
        prune_before: stages.
        keep: mean share of an image's living patches that survives a stage.
        count: number of images.
        image_size: height and width in pixels; the model's own if not given.
        run: a folder of ``trainers.mappo``.
        device: where it runs.
        dtype: of weights and images; the policy stays in float32.
    """
    survivors = None
    if run is not None:
        pruned = PrunedViT.from_run(run).to(device)
        packed, policy = pruned.backbone, cast("Policy", pruned.policy)
        packed.model.to(dtype)
        dataset = json.loads((run / "config.json").read_text(encoding="utf-8"))["dataset"]
        test = open_images(dataset, "test", model_data_config(packed.model))
        images, _ = test.load([i % len(test) for i in range(count)])
    else:
        torch.manual_seed(0)
        sized: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
        vit = create_backbone(model, untrained=True, **sized).to(device, dtype)
        packed = StagedViT(vit, prune_before)
        policy = untrained_policy(packed).to(device)
        images = torch.randn(count, *packed.image_shape)
        survivors = draw_keep((count, packed.num_stages, packed.num_patches), keep)
    masked = StagedViT(packed.model, packed.prune_before, "masked")
    return Workload(packed, masked, policy, images.to(device, dtype), survivors)


def untrained_policy(backbone: StagedViT) -> LearnedPolicy:
    """An actor as training starts from, of the default size on the default observation."""
    slices = field_slices(backbone, DEFAULT_FIELDS)
    size = max(part.stop for part in slices.values())
    actor = TokenActor(size, MappoConfig().hidden, slices["cls_attention"].start)
    return LearnedPolicy(actor, DEFAULT_FIELDS)


def draw_keep(shape: tuple[int, int, int], mean: float) -> NDArray[np.bool_]:
    """Random survivors, bool ``shape`` = [images, T, N]: every image has at every stage a ratio of
    its own, uniform around ``mean``, and keeps that share of what lives.
    """
    generator = np.random.default_rng(0)
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
