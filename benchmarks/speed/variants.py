"""The variants of ``benchmarks.speed.throughput``: the same work done in different ways.

Which patches survive is fixed before anything is timed, so that ``packed``, ``masked`` and
``padded`` remove the same patches of the same images. Their policy still runs at every stage, and
its time counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunevit.agents.policies.heuristics import KeepAll, TopK
from prunevit.agents.policies.policy import Policy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.benchmarks.baselines.padded import PaddedViT
from prunevit.benchmarks.baselines.tome import ToMeViT, macs_counter, merges_at
from prunevit.benchmarks.machine import peak_memory
from prunevit.benchmarks.speed.workload import DrawnPolicy, Workload
from prunevit.envs.vit.staged_vit import StagedViT

Variant = Literal["dense", "packed", "masked", "padded", "tome", "uniform", "unpruned"]

SCALE_STEPS = 10_000  # how finely the uniform schedule is scaled


@dataclass(frozen=True)
class Plan:
    """The work that every variant is given.

    Attributes:
        keep: who survives, bool [images, T, N].
        macs: mean multiply-accumulates of an image, the policy's included, as ours runs it.
        merges: r of each block: token merging that costs at most ``macs``; empty if not asked for.
        tokens: patches to keep at each stage: equal lengths that cost at most ``macs``.
    """

    keep: NDArray[np.bool_]
    macs: float
    merges: tuple[int, ...]
    tokens: tuple[int, ...]


@torch.inference_mode()
def make_plan(workload: Workload, with_merges: bool = True) -> Plan:
    """Gives each peer the most compute that is not above ours. Asks the policy who survives where
    that was not drawn.

    Raises:
        ValueError: token merging can't be done with this model, or not at so low a cost.
    """
    backbone, keep = workload.packed, workload.keep
    if keep is None:
        model = PrunedViT(backbone, workload.policy).eval()
        keep = model.trace(workload.images).alive.cpu().numpy()
    macs = carried_macs(workload, keep, _counts(backbone, keep))
    merges = merges_at(backbone.model, backbone.image_shape, macs) if with_merges else ()
    return Plan(keep, macs, merges, uniform_tokens(backbone, keep.mean((0, 2)), macs))


def _counts(backbone: StagedViT, keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Living patches of each image after each stage, [images, T]."""
    return np.maximum(keep.sum(2), int(backbone.keeps_last_patch))


def carried_macs(workload: Workload, keep: NDArray[np.bool_], carried: NDArray[np.int64]) -> float:
    """Mean multiply-accumulates of an image, the policy's included.

    Args:
        workload: what runs.
        keep: who survives, bool [images, T, N]; the policy decides on these alone.
        carried: patches that are computed after each stage, [images, T].
    """
    backbone, policy = workload.packed, workload.policy
    decisions = backbone.num_patches + _counts(backbone, keep)[:, :-1].sum(1).mean()
    ran = [backbone.uniform_macs(row, policy.needs_attention) for row in carried.tolist()]
    return float(np.mean(ran) + decisions * policy.macs_per_decision)


def uniform_tokens(
    backbone: StagedViT, shares: Sequence[float] | NDArray[np.float64], macs: float
) -> tuple[int, ...]:
    """The same number of patches for every image at each stage, in the proportions of ``shares``:
    the most that cost at most ``macs``.
    """
    widest = 1 / max(min(shares), 1 / backbone.num_patches)

    def tokens(step: int) -> tuple[int, ...]:
        scale = widest * step / SCALE_STEPS
        return tuple(int(min(1.0, share * scale) * backbone.num_patches) for share in shares)

    above = bisect_left(
        range(SCALE_STEPS + 1), True, key=lambda step: backbone.uniform_macs(tokens(step)) > macs
    )
    return tokens(max(above - 1, 0))


def calls(
    variant: Variant, workload: Workload, plan: Plan, batch_size: int
) -> list[Callable[[], Tensor]]:
    """One call for each batch of the images; each returns logits."""
    batches = workload.images.split(batch_size)
    keep = torch.from_numpy(plan.keep).to(workload.images.device).split(batch_size)
    policies = [DrawnPolicy(workload.policy, drawn) for drawn in keep]
    # in training mode ours would mask
    models = [_model(variant, workload, plan, policy).eval() for policy in policies]
    return [partial(model, batch) for model, batch in zip(models, batches, strict=True)]


def _model(variant: Variant, workload: Workload, plan: Plan, policy: Policy) -> nn.Module:
    match variant:
        case "dense":
            return workload.packed.model
        case "packed":
            return PrunedViT(workload.packed, policy)
        case "masked":
            return PrunedViT(workload.masked, policy)
        case "padded":
            return PaddedViT(workload.packed, policy)
        case "tome":
            return ToMeViT(workload.packed.model, plan.merges)
        case "uniform":
            return PaddedViT(workload.packed, TopK(plan.tokens, "attention"))
        case "unpruned":
            return PrunedViT(workload.packed, KeepAll())


def gmacs(variant: Variant, workload: Workload, plan: Plan, batch_size: int) -> float:
    """1e9 multiply-accumulates of an image as the variant runs it: masked and padded pay for tokens
    that they carry along, and every policy for its decisions.
    """
    backbone = workload.packed
    counts = _counts(backbone, plan.keep)
    match variant:
        case "dense" | "unpruned":
            macs: float = backbone.dense_macs
        case "packed":
            macs = plan.macs
        case "uniform":
            macs = backbone.uniform_macs(plan.tokens)
        case "tome":
            macs = macs_counter(backbone.model, backbone.image_shape)(plan.merges)
        case "masked":
            macs = carried_macs(workload, plan.keep, np.full_like(counts, backbone.num_patches))
        case "padded":
            longest = counts.reshape(-1, batch_size, backbone.num_stages).max(1)
            macs = carried_macs(workload, plan.keep, longest.repeat(batch_size, axis=0))
    return macs / 1e9


@torch.inference_mode()
def pass_peak(variant: Variant, workload: Workload, plan: Plan, batch_size: int) -> int:
    """The most bytes held during a pass, weights and images included."""
    device = workload.images.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for call in calls(variant, workload, plan, batch_size):
        call()
    return peak_memory(device)


def pass_peak_of(
    variant: Variant, make: Callable[[], Workload], plan: Plan, batch_size: int, threads: int
) -> int:
    """``pass_peak`` in a fresh process, which still has to make its workload."""
    torch.set_num_threads(threads)
    return pass_peak(variant, make(), plan, batch_size)
