"""Policies that need no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenprune.envs.observations import View

Score = Literal["attention", "norm", "random"]


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
            2202.07800). "norm": length of the embedding. "random": no criterion.
        seed: of the random scores.
    """

    macs_per_decision = 0

    def __init__(self, tokens: Sequence[int], score: Score = "attention", seed: int = 0) -> None:
        if score not in get_args(Score):
            raise ValueError(f"unknown score {score!r}: choose from {', '.join(get_args(Score))}")
        if any(k < 0 for k in tokens):
            raise ValueError(f"tokens={tuple(tokens)}: a number of tokens is at least 0")
        self.tokens = tuple(tokens)
        self.score = score
        self.needs_attention = score == "attention"
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, view: View) -> Tensor:
        if view.backbone.num_stages != len(self.tokens):
            raise ValueError(
                f"tokens for {len(self.tokens)} stages, the backbone has {view.backbone.num_stages}"
            )
        k = min(self.tokens[view.stage], view.backbone.num_patches)
        dense = torch.full(view.alive.shape, -torch.inf, device=view.alive.device)
        dense[view.alive] = self._scores(view)
        keep = torch.zeros_like(view.alive)
        return keep.scatter_(1, dense.topk(k, dim=1).indices, True) & view.alive

    def _scores(self, view: View) -> Tensor:
        if self.score == "attention":
            return view.cls_attention
        if self.score == "norm":
            return view.token.norm(dim=1)
        device = view.alive.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return torch.rand(len(view.image), generator=self._generators[device], device=device)
