"""Policies that need no training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from prunevit.agents.policies.dither import with_dither
from prunevit.choices import check_choice
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
        tokens: k for each stage: a number of patches, or a float up to 1 for a share of all the
            patches that an image has at the beginning.
        score: "attention": attention last received from the class token, as in EViT
            (arXiv 2202.07800). "norm": norm of the embedding. "brightness": mean pixel value, for
            bright objects on dark ground such as digits. "random": random scores.
        seed: seed of the random scores.

    Raises:
        ValueError: a number of tokens that is neither a whole number nor a share, or an unknown
            score.
    """

    macs_per_decision = 0

    def __init__(self, tokens: Sequence[float], score: Score = "attention", seed: int = 0) -> None:
        check_choice("score", score, get_args(Score))
        self.tokens = _counts_or_shares(tokens)
        self.score = score
        self.needs_attention = score == "attention"
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, view: View) -> Tensor:
        count = at_stage("tokens", self.tokens, view)
        if isinstance(count, float):
            count = round(count * view.backbone.num_patches)
        return keep_highest(view, self._scores(view), count)

    def _scores(self, view: View) -> Tensor:
        if self.score == "attention":
            if not view.backbone.has_attended(view.stage):
                warnings.warn(
                    "before block 0 all patches have the same attention: top-k keeps any of them. "
                    "Choose another score, or a later block in prune_before",
                    stacklevel=2,
                )
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
    """Keeps every patch that last received enough attention from the class token.

    It is the simplest rule that keeps different numbers of patches of different images. Before the
    first block, all patches count as having received an even share.

    Args:
        thresholds: lowest attention for each stage; 1 is an even share among all patches of the
            image.
        dither: vary the threshold from patch to patch, in the same way for all images. A patch with
            attention a under a threshold t has probability a / (a + t): of similar neighbours, that
            share is kept, where one threshold would keep all or none. The number is the strength: 1
            for these probabilities, less for ones nearer to a threshold, 0 for none.
    """

    needs_attention = True
    macs_per_decision = 0

    def __init__(self, thresholds: Sequence[float], dither: float = 0.0) -> None:
        self.thresholds = _checked("thresholds", thresholds)
        (self.dither,) = _checked("dither", (dither,))

    def __call__(self, view: View) -> Tensor:
        least = at_stage("thresholds", self.thresholds, view)
        if not self.dither or not least:
            return view.scatter(view.cls_attention >= least)
        margin = (view.scatter(view.cls_attention) / least).log() / self.dither
        return (with_dither(view, margin) >= 0) & view.alive


def keep_highest(view: View, scores: Tensor, count: int) -> Tensor:
    """Selects the ``count`` living patches of each image with the highest scores.

    Args:
        view: the patches.
        scores: score of each living patch [R].
        count: number of patches to select; all if fewer are alive.

    Returns:
        bool [B, N].
    """
    dense = view.scatter(scores).masked_fill(~view.alive, -torch.inf)
    chosen = dense.topk(min(count, view.backbone.num_patches), dim=1).indices
    return torch.zeros_like(view.alive).scatter_(1, chosen, True) & view.alive


def at_stage(name: str, numbers: Sequence[Number], view: View) -> Number:
    """The number for the view's stage; raises ValueError if there is not one for each stage."""
    stages = view.backbone.num_stages
    if len(numbers) != stages:
        raise ValueError(f"{name} for {len(numbers)} stages, the backbone has {stages}")
    return numbers[view.stage]


def _counts_or_shares(tokens: Sequence[float]) -> tuple[int | float, ...]:
    """``TopK.tokens``, of whatever type of number: counts are int, shares are float."""
    if not all(
        isinstance(number, Real)
        and (number >= 0 if isinstance(number, Integral) else 0 <= number <= 1)
        for number in tokens
    ):
        raise ValueError(
            f"tokens={tuple(tokens)}: each must be at least 0, and a whole number of patches, as "
            "98, or a share of them, as 0.5"
        )
    return tuple(int(n) if isinstance(n, Integral) else float(n) for n in tokens)


def _checked(name: str, numbers: Sequence[Number]) -> tuple[Number, ...]:
    if not all(number >= 0 for number in numbers):
        raise ValueError(f"{name}={tuple(numbers)}: each must be at least 0")
    return tuple(numbers)
