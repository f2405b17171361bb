"""Pruning for people without a ragged runtime: every image is padded to the longest of its batch.

With the same number of survivors for every image (EViT's kind of pruning) nothing is padded or
masked, and timm's blocks run on their dense path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prunevit.agents.policies.policy import Policy
from prunevit.benchmarks.baselines.timm_parts import (
    attend,
    check_plain,
    chunks,
    embed,
    feed_forward,
    run_block,
)
from prunevit.envs.observations import View
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError
from prunevit.envs.vit.tokens import Tokens


class PaddedViT(nn.Module):
    """As ``PrunedViT``, but blocks run on rectangles of tokens with the padding masked.

    Args:
        backbone: says where the stages stand; its model is run, its execution is not used.
        policy: who stays.

    Raises:
        UnsupportedBackboneError: the backbone's blocks are not timm's plain ones, or it prunes
            inside of them.
    """

    def __init__(self, backbone: StagedViT, policy: Policy) -> None:
        super().__init__()
        check_plain(backbone.model)
        if backbone.prune_at != "block":
            raise UnsupportedBackboneError(
                f"rectangles of tokens run whole blocks, not prune_at={backbone.prune_at!r}"
            )
        self.backbone = backbone
        self.policy = policy

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        backbone, policy = self.backbone, self.policy
        model = backbone.model
        x = torch.cat([embed(model, chunk) for chunk in chunks(model, images)])
        batch, slots, _ = x.shape
        tokens = Tokens(
            x=x.flatten(0, 1),
            alive=torch.ones(batch, slots, dtype=torch.bool, device=x.device),
            row=torch.arange(batch * slots, device=x.device),
            layout=None,
            attention=None,
        )
        mask: Tensor | None = None
        alpha = torch.zeros(batch, device=x.device)
        edges = (0, *backbone.prune_before, backbone.depth)
        for stage, (start, stop) in enumerate(pairwise(edges)):
            last = stage == backbone.num_stages
            wanted = policy.needs_attention and not last
            tokens = self._run(tokens, mask, start, stop, wanted)
            if not last:
                keep = policy(View(backbone, tokens, stage, alpha, images=images))
                tokens, mask = _padded(backbone.prune(tokens, keep))
        return backbone.finish(tokens)

    def _run(
        self, tokens: Tokens, mask: Tensor | None, start: int, stop: int, with_attention: bool
    ) -> Tokens:
        parts = chunks(self.backbone.model, tokens.x.unflatten(0, (len(tokens.alive), -1)))
        masks: Sequence[Tensor | None] = [None] * len(parts)
        if mask is not None:
            masks = mask.tensor_split(len(parts))
        ran = [
            self._run_chunk(*part, start, stop, with_attention)
            for part in zip(parts, masks, strict=True)
        ]
        paid = [received.flatten() for _, received in ran if received is not None]
        return replace(
            tokens,
            x=torch.cat([x.flatten(0, 1) for x, _ in ran]),
            attention=torch.cat(paid) if paid else None,
        )

    def _run_chunk(
        self, x: Tensor, mask: Tensor | None, start: int, stop: int, with_attention: bool
    ) -> tuple[Tensor, Tensor | None]:
        paid = None
        for i in range(start, stop):
            block = self.backbone.model.blocks[i]
            if with_attention and i == stop - 1:
                x, paid = self._observed_block(block, x, mask)
            else:
                x = run_block(block, x, mask)
        return x, paid

    def _observed_block(self, block: Any, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """timm's block, and what the class token paid each place, [B, L]: queries and keys are
        computed once for both.
        """
        mixed, q, k = attend(block.attn, block.norm1(x), mask)
        x = feed_forward(block, x + block.ls1(mixed))
        scores = (k @ self._query(q, mask)[..., None]).squeeze(-1) * block.attn.scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], -torch.inf)
        return x, scores.softmax(-1).mean(1)

    def _query(self, q: Tensor, mask: Tensor | None) -> Tensor:
        """Whose attention is observed: [B, heads, L, size] -> [B, heads, size]."""
        if self.backbone.has_class_token:
            return q[:, :, 0]
        if self.backbone.num_prefix:
            return q[:, :, : self.backbone.num_prefix].mean(2)
        if mask is None:
            return q.mean(2)
        weight = mask[:, 0, 0, :, None].to(q.dtype)[:, None]
        return (q * weight).sum(2) / weight.sum(2)


def _padded(tokens: Tokens) -> tuple[Tokens, Tensor | None]:
    """Moves each image's survivors to the front and cuts all images at the longest.

    Returns:
        the tokens, and which places hold one, bool [B, 1, 1, L]; None where all do.
    """
    batch, slots = tokens.alive.shape
    lengths = tokens.alive.sum(1)
    shortest, longest = torch.stack(lengths.aminmax()).tolist()  # the one host sync of a stage
    slot = tokens.alive.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
    source = tokens.row.view(batch, slots).gather(1, slot)
    place = torch.arange(batch * longest, device=slot.device).view(batch, longest)
    row = torch.zeros(batch, slots, dtype=torch.int64, device=slot.device)
    moved = replace(
        tokens,
        x=tokens.x.index_select(0, source.flatten()),
        row=row.scatter(1, slot, place).flatten(),
    )
    if shortest == longest:
        return moved, None
    return moved, (place[:1] < lengths[:, None])[:, None, None, :]
