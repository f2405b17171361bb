"""Policies that need no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from prunevit.envs.observations import View

Score = Literal["attention", "norm", "brightness", "random"]
Number = TypeVar("Number", int, float)


class KeepAll:
    """Prunes nothing: the dense model, run stage by stage."""

    needs_attention = False
    macs_per_decision = 0

    def __call__(self, view: View) -> Tensor:
        return view.alive


class TopK:
    """Keeps the k living patches of each image with the highest score.

    Args:
        tokens: k for each stage.
        score: "attention": class-token attention in the block before, the criterion of EViT (arXiv
            2202.07800). "norm": length of the embedding. "brightness": mean pixel, a criterion for
            bright things on dark ground, as digits are. "random": no criterion.
        seed: of the random scores.
    """

    macs_per_decision = 0

    def __init__(self, tokens: Sequence[int], score: Score = "attention", seed: int = 0) -> None:
        if score not in get_args(Score):
            raise ValueError(f"unknown score {score!r}: choose from {', '.join(get_args(Score))}")
        self.tokens = _checked("tokens", tokens)
        self.score = score
        self.needs_attention = score == "attention"
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, view: View) -> Tensor:
        return keep_highest(view, self._scores(view), of_stage("tokens", self.tokens, view))

    def _scores(self, view: View) -> Tensor:
        if self.score == "attention":
            return view.cls_attention
        if self.score == "norm":
            return view.token.norm(dim=1)
        if self.score == "brightness":
            return view.brightness
        device = view.alive.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return torch.rand(len(view.image), generator=self._generators[device], device=device)


class AttentionThreshold:
    """Keeps every patch that the class token paid attention enough in the block before: as many of
    an image as there are.

    The simplest rule with which images differ in length; before the first block, where nothing is
    paid yet, all patches count as paid an even share.

    Args:
        thresholds: the least attention for each stage; 1 is an even share among all patches of the
            image.
    """

    needs_attention = True
    macs_per_decision = 0

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = _checked("thresholds", thresholds)

    def __call__(self, view: View) -> Tensor:
        least = of_stage("thresholds", self.thresholds, view)
        return view.scatter(view.cls_attention >= least)


class AdaptiveSampling:
    """Adaptive Token Sampling, "ATS" (arXiv 2111.15667, section 3): patches are sampled by inverse
    transform, so that few are kept where few hold all of the attention.

    Significances are normalised to a distribution over the living patches, and its cumulative sum
    is read at the K fixed quantiles 1/2K, 3/2K, ..., (2K-1)/2K. A patch that several quantiles fall
    on is kept once.

    What differs from the paper: there a patch's significance is its class attention times the
    length of its value vector; values don't leave the block here, and attention stands alone. There
    patches go between a block's attention and its MLP; here behind both, which leaves what survives
    as it is, and costs a little more.

    Args:
        samples: K for each stage, at most so many patches are kept.
    """

    needs_attention = True
    macs_per_decision = 0

    def __init__(self, samples: Sequence[int]) -> None:
        self.samples = _checked("samples", samples)

    def __call__(self, view: View) -> Tensor:
        count = of_stage("samples", self.samples, view)
        reached = view.scatter(view.cls_attention).cumsum(1)
        quantiles = (torch.arange(count, device=reached.device) + 0.5) / max(count, 1)
        # the first patch with which the sum reaches the quantile: never one that adds nothing
        patch = torch.searchsorted(reached, reached[:, -1:] * quantiles)
        # behind the last one where attention is not a number
        patch = patch.clamp(max=view.backbone.num_patches - 1)
        return torch.zeros_like(view.alive).scatter_(1, patch, True) & view.alive


def keep_highest(view: View, scores: Tensor, count: int) -> Tensor:
    """The ``count`` living patches of each image with the highest scores [R], or all where fewer
    live: bool [B, N].
    """
    dense = torch.full(view.alive.shape, -torch.inf, device=view.alive.device)
    dense[view.alive] = scores
    chosen = dense.topk(min(count, view.backbone.num_patches), dim=1).indices
    return torch.zeros_like(view.alive).scatter_(1, chosen, True) & view.alive


def of_stage(name: str, numbers: Sequence[Number], view: View) -> Number:
    """What is set for the view's stage; raises ValueError where not every stage has a number."""
    stages = view.backbone.num_stages
    if len(numbers) != stages:
        raise ValueError(f"{name} for {len(numbers)} stages, the backbone has {stages}")
    return numbers[view.stage]


def _checked(name: str, numbers: Sequence[Number]) -> tuple[Number, ...]:
    if not all(number >= 0 for number in numbers):
        raise ValueError(f"{name}={tuple(numbers)}: each must be at least 0")
    return tuple(numbers)
