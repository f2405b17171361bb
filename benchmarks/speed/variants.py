"""What ``benchmarks.speed.throughput`` times: the same work done in different ways.

Which patches survive is fixed before anything is timed, so that ``packed``, ``masked`` and
``padded`` remove the same patches of the same images. Their policy still runs at every stage, and
its time counts.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.agents.policies.heuristics import KeepAll, TopK
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.policies.policy import Policy, count_policy_macs
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.benchmarks.baselines.padded import PaddedViT
from prunevit.benchmarks.baselines.tome import ToMeViT, macs_counter, merges_at
from prunevit.benchmarks.machine import peak_memory
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data_config import model_data_config
from prunevit.envs.fields import DEFAULT_FIELDS, field_slices
from prunevit.envs.observations import View
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.settings import Count, Settings, Share, Threads

KEEP_RANGE = 0.3  # ratios are drawn at most so far from their mean
SCALE_STEPS = 10_000  # how finely the uniform schedule is scaled


Name = Literal["dense", "packed", "masked", "padded", "tome", "uniform", "unpruned"]


@dataclass
class ThroughputConfig(Settings):
    """What is measured."""

    model: str = "deit_small_patch16_224"
    """Any timm VisionTransformer, or digits_vit."""
    run: Path | None = None
    """A folder of trainers.mappo: its backbone, stages, policy and test images take the place of
    model, stages and keep."""
    prune_before: tuple[int, ...] = (3, 6, 9)
    """The stages; RL4EViT's are 3, 6 and 9."""
    keep: Share = 0.7
    """Mean share of an image's living patches that survives a stage. Each image has its own share
    at each stage, up to 0.3 off."""
    batch_sizes: tuple[Count, ...] = (1, 32)
    """Images a call."""
    image_sizes: tuple[Count, ...] = ()
    """Heights and widths in pixels, as 224 384 512; the model's own if none is given."""
    variants: tuple[Name, ...] = get_args(Name)
    """Which are measured; dense always is."""
    images: Count = 32
    """Different images a pass goes over, rounded up to a multiple of all batch sizes."""
    rounds: Count = 15
    """Timed passes of each variant, all of them in turns, after one that is not counted."""
    memory: bool = True
    """Measure peak memory; on a CPU this starts a process for each variant."""
    threads: Threads | None = None
    """CPU threads; torch's own choice if not given."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and images; the policy stays in float32."""
    out: Path | None = None
    """Also write the records to this JSON file."""


@dataclass(frozen=True)
class Workload:
    """The work that every variant is given.

    Attributes:
        packed: the backbone in ours, the packed execution.
        policy: what decides at every stage.
        images: [n, C, H, W].
        keep: which patches survive each stage, bool [n, T, N].
    """

    packed: StagedViT
    policy: Policy
    images: Tensor
    keep: NDArray[np.bool_]

    @property
    def survivors(self) -> NDArray[np.int64]:
        """Living patches of each image after each stage, [n, T]."""
        return np.maximum(self.keep.sum(2), int(self.packed.keeps_last_patch))

    def macs(self, carried: ArrayLike | None = None) -> float:
        """Mean multiply-accumulates of an image, the policy's included, which decides on living
        patches alone.

        Args:
            carried: patches that are computed after each stage, [n, T]; the living ones if None.
        """
        living = torch.from_numpy(self.survivors[:, :-1])
        living = F.pad(living, (1, 0), value=self.packed.num_patches)  # [n, T]
        decisions = count_policy_macs(self.policy, self.packed, living)
        counts = np.broadcast_to(
            self.survivors if carried is None else carried, self.keep.shape[:2]
        )
        with_attention = self.policy.needs_attention
        ran = [self.packed.uniform_macs(row, with_attention) for row in counts.tolist()]
        return float(np.mean(ran)) + float(decisions.double().mean())

    def longest(self, batch_size: int) -> NDArray[np.int64]:
        """The most living patches in each image's batch, [n, T]."""
        by_batch = self.survivors.reshape(-1, batch_size, self.packed.num_stages)
        return by_batch.max(1).repeat(batch_size, axis=0)

    @cached_property
    def merges(self) -> tuple[int, ...]:
        """r of each block: token merging that costs at most as much as ours.

        Raises:
            ValueError: it can't be done with this model, or not at so low a cost.
        """
        return merges_at(self.packed.model, self.packed.image_shape, self.macs())

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Patches to keep at each stage, the same number in every image, in the proportions of
        ours: the most that cost at most as much.
        """
        backbone, shares, most = self.packed, self.keep.mean((0, 2)), self.macs()
        widest = 1 / max(min(shares), 1 / backbone.num_patches)

        def tokens(step: int) -> tuple[int, ...]:
            scale = widest * step / SCALE_STEPS
            return tuple(int(min(1.0, share * scale) * backbone.num_patches) for share in shares)

        def costs_more(step: int) -> bool:
            return backbone.uniform_macs(tokens(step)) > most

        return tokens(max(bisect_left(range(SCALE_STEPS + 1), True, key=costs_more) - 1, 0))


class DrawnPolicy:
    """Runs a policy, for what it costs, and then keeps what has been drawn.

    Args:
        policy: the policy.
        keep: which tokens are kept, bool [B, T, N].
    """

    def __init__(self, policy: Policy, keep: Tensor) -> None:
        self.policy = policy
        self.keep = keep
        self.needs_attention = policy.needs_attention
        self.macs_per_decision = policy.macs_per_decision

    def __call__(self, view: View) -> Tensor:
        self.policy(view)
        return self.keep[:, view.stage]


# --- variants ---


class Variant(NamedTuple):
    """A way to do the work.

    Attributes:
        model: workload and policy -> images [B, C, H, W] -> logits.
        macs: workload and batch size -> mean multiply-accumulates of an image as the variant runs
            it: masked and padded pay for tokens that they carry along, and every policy for its
            decisions.
    """

    model: Callable[[Workload, Policy], nn.Module]
    macs: Callable[[Workload, int], float]


VARIANTS: Mapping[Name, Variant] = {
    "dense": Variant(lambda work, _: work.packed.model, lambda work, _: work.packed.dense_macs),
    "packed": Variant(
        lambda work, policy: PrunedViT(work.packed, policy), lambda work, _: work.macs()
    ),
    "masked": Variant(
        lambda work, policy: PrunedViT(
            StagedViT(work.packed.model, work.packed.prune_before, "masked"), policy
        ),
        lambda work, _: work.macs(work.packed.num_patches),
    ),
    "padded": Variant(
        lambda work, policy: PaddedViT(work.packed, policy),
        lambda work, batch_size: work.macs(work.longest(batch_size)),
    ),
    "tome": Variant(
        lambda work, _: ToMeViT(work.packed.model, work.merges),
        lambda work, _: macs_counter(work.packed.model, work.packed.image_shape)(work.merges),
    ),
    "uniform": Variant(
        lambda work, _: PaddedViT(work.packed, TopK(work.tokens, "attention")),
        lambda work, _: work.packed.uniform_macs(work.tokens),
    ),
    "unpruned": Variant(
        lambda work, _: PrunedViT(work.packed, KeepAll()), lambda work, _: work.packed.dense_macs
    ),
}


def calls(name: Name, workload: Workload, batch_size: int) -> list[Callable[[], Tensor]]:
    """One call for each batch of the images; each returns logits."""
    batches = workload.images.split(batch_size)
    keep = torch.from_numpy(workload.keep).to(workload.images.device).split(batch_size)
    policies = [DrawnPolicy(workload.policy, drawn) for drawn in keep]
    # in training mode ours would mask
    models = [VARIANTS[name].model(workload, policy).eval() for policy in policies]
    return [partial(model, batch) for model, batch in zip(models, batches, strict=True)]


@torch.inference_mode()
def pass_peak(name: Name, workload: Workload, batch_size: int) -> int:
    """The most bytes held during a pass, weights and images included."""
    device = workload.images.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for call in calls(name, workload, batch_size):
        call()
    return peak_memory(device)


def fresh_pass_peak(
    name: Name, config: ThroughputConfig, image_size: int | None, batch_size: int
) -> int:
    """``pass_peak`` in a process that has yet to make its workload."""
    return pass_peak(name, load(config, image_size), batch_size)


# --- workloads ---


def load(config: ThroughputConfig, image_size: int | None = None) -> Workload:
    """Builds a workload. Weights, images and survivors are random, since time does not depend on
    them. A run brings its own backbone, stages, policy and test images.

    Args:
        config: the settings.
        image_size: height and width in pixels; the model's own if not given.
    """
    run, device, dtype = config.run, config.device, getattr(torch, config.dtype)
    count = config.images + -config.images % math.lcm(*config.batch_sizes)
    if run is not None:
        pruned = PrunedViT.from_run(run).to(device)
        pruned.backbone.model.to(dtype)
        dataset = json.loads((run / "config.json").read_text(encoding="utf-8"))["dataset"]
        test = open_images(dataset, "test", model_data_config(pruned.backbone.model))
        images = test.load([i % len(test) for i in range(count)])[0].to(device, dtype)
        # one by one, which takes less memory than what is measured later
        with torch.inference_mode():
            alive = torch.cat([pruned.trace(image).alive for image in images.split(1)])
        policy = cast("Policy", pruned.policy)
        return Workload(pruned.backbone, policy, images, alive.cpu().numpy())
    torch.manual_seed(0)
    sized: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    vit = create_backbone(config.model, untrained=True, **sized).to(device, dtype)
    packed = StagedViT(vit, config.prune_before)
    policy = untrained_policy(packed).to(device)
    images = torch.randn(count, *packed.image_shape).to(device, dtype)
    drawn = draw_keep((count, packed.num_stages, packed.num_patches), config.keep)
    return Workload(packed, policy, images, drawn)


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
