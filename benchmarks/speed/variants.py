"""The variants of ``benchmarks.speed.throughput``: the same work done in different ways.

Which patches survive is fixed before anything is timed, so that ``packed``, ``masked`` and
``padded`` remove the same patches of the same images. Their policy still runs at every stage, and
its time counts; the plan then replaces its answer.
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
from prunevit.benchmarks.speed.workload import DrawnPolicy, Spec, Workload, load
from prunevit.envs.vit.staged_vit import StagedViT

Variant = Literal["dense", "packed", "masked", "padded", "tome", "uniform", "unpruned"]
Call = Callable[[], Tensor]

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
    """Fits the peers to what ours costs: they get the most compute that is not above it, so that
    rounding slows none of them down.

    Args:
        workload: with the survivors that were drawn; where there are none, its policy is asked.
        with_merges: fit token merging as well.

    Raises:
        ValueError: token merging can't be done with this model, or not at so low a cost.
    """
    backbone, keep = workload.packed, workload.keep
    if keep is None:
        model = PrunedViT(backbone, workload.decider).eval()
        keep = model.trace(workload.images).alive.cpu().numpy()
    macs = packed_macs(workload, keep)
    return Plan(
        keep=keep,
        macs=macs,
        merges=merges_at(backbone.model, backbone.image_shape, macs) if with_merges else (),
        tokens=uniform_tokens(backbone, keep.mean((0, 2)), macs),
    )


def packed_macs(workload: Workload, keep: NDArray[np.bool_]) -> float:
    """Mean multiply-accumulates of an image whose survivors are ``keep``, the policy's included."""
    backbone, decider = workload.packed, workload.decider
    counts = _counts(backbone, keep)
    spent = [backbone.uniform_macs(row, decider.needs_attention) for row in counts.tolist()]
    return float(np.mean(spent)) + _decisions(backbone, counts) * decider.macs_per_decision


def _counts(backbone: StagedViT, keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Living patches of each image after each stage, [images, T]."""
    return np.maximum(keep.sum(2), int(backbone.keeps_last_patch))


def _decisions(backbone: StagedViT, counts: NDArray[np.int64]) -> float:
    """Mean number of decisions on an image, one a stage for each patch that lives until then."""
    return backbone.num_patches + float(counts[:, :-1].sum(1).mean())


def uniform_tokens(
    backbone: StagedViT, shares: Sequence[float] | NDArray[np.float64], macs: float
) -> tuple[int, ...]:
    """The same number of patches for every image at each stage, in the proportions of ``shares``;
    the most that cost at most ``macs``, and none where even that costs more.
    """
    widest = 1 / max(min(shares), 1 / backbone.num_patches)

    def tokens(step: int) -> tuple[int, ...]:
        scale = widest * step / SCALE_STEPS
        return tuple(int(min(1.0, share * scale) * backbone.num_patches) for share in shares)

    above = bisect_left(
        range(SCALE_STEPS + 1), True, key=lambda step: backbone.uniform_macs(tokens(step)) > macs
    )
    return tokens(max(above - 1, 0))


def calls(variant: Variant, workload: Workload, plan: Plan, batch_size: int) -> list[Call]:
    """One call for each batch of the images; each returns logits."""
    batches = workload.images.split(batch_size)
    keep = torch.from_numpy(plan.keep).to(workload.images.device).split(batch_size)
    # in training mode ours would mask
    models = [
        _model(variant, workload, plan, DrawnPolicy(workload.decider, drawn)).eval()
        for drawn in keep
    ]
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
    backbone, decider = workload.packed, workload.decider
    counts = _counts(backbone, plan.keep)
    match variant:
        case "dense" | "unpruned":
            return backbone.dense_macs / 1e9
        case "packed":
            return plan.macs / 1e9
        case "uniform":
            return backbone.uniform_macs(plan.tokens) / 1e9
        case "tome":
            count = macs_counter(backbone.model, backbone.image_shape)
            return count(plan.merges) / 1e9
        case "masked":
            carried = np.full_like(counts, backbone.num_patches)
        case "padded":
            longest = counts.reshape(-1, batch_size, backbone.num_stages).max(1)
            carried = longest.repeat(batch_size, axis=0)
    ran = [backbone.uniform_macs(row, decider.needs_attention) for row in carried.tolist()]
    policy = _decisions(backbone, counts) * decider.macs_per_decision
    return (float(np.mean(ran)) + policy) / 1e9


@torch.inference_mode()
def pass_peak(variant: Variant, workload: Workload, plan: Plan, batch_size: int) -> int:
    """The most bytes held during a pass, weights and images included."""
    device = workload.images.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for call in calls(variant, workload, plan, batch_size):
        call()
    return peak_memory(device)


def pass_peak_of(variant: Variant, spec: Spec, plan: Plan, batch_size: int, threads: int) -> int:
    """``pass_peak`` of a fresh process, which still has to load its workload."""
    torch.set_num_threads(threads)
    return pass_peak(variant, load(spec), plan, batch_size)
