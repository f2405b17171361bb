"""EViT, written from the paper "Not All Patches are What You Need" (arXiv 2202.07800).

In some blocks, between attention and MLP, the patches that the class token pays the most attention
stay, and all others are fused into one more token (section 3.2). Every image keeps as many.
Without fusing, what survives is what ``TopK("attention")`` keeps before the next block, for less:
the MLP of the block is spared too.

A fused token is a patch like any other to the blocks behind it, which may keep it or fuse it again.
The paper's fused token is the sum of the patches weighted with their attention, not divided by the
sum of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunevit.benchmarks.baselines.timm_parts import (
    attend,
    check_reads_class_token,
    chunks,
    embed,
    feed_forward,
    pass_counter,
    run_block,
    tokens_after_blocks,
)
from prunevit.envs.vit.timm_models.heads import classify_prefix


def reorganise(patches: Tensor, attention: Tensor, count: int, with_fused: bool) -> Tensor:
    """The ``count`` patches with the most attention, in their order, and the others as one behind
    them, each weighted with its attention. Nothing changes where there are no more.

    Args:
        patches: [B, n, D].
        attention: what the class token paid each, [B, n].
        count: how many stay.
        with_fused: fuse the others, or drop them.

    Returns:
        [B, count + 1, D], or [B, count, D].
    """
    if count >= patches.shape[1]:
        return patches
    order = attention.argsort(dim=1, descending=True)[..., None]
    stay, go = order[:, :count].sort(1).values, order[:, count:]
    staying = patches.take_along_dim(stay, 1)
    if not with_fused:
        return staying
    weights = attention[..., None].take_along_dim(go, 1)
    fused = weights.transpose(1, 2) @ patches.take_along_dim(go, 1)
    return torch.cat([staying, fused], dim=1)


def token_counts(patches: int, tokens: Sequence[int], with_fused: bool = True) -> list[int]:
    """Tokens behind each stage, fused ones included, prefix ones not."""
    counts = []
    for count in tokens:
        if count < patches:
            patches = count + with_fused
        counts.append(patches)
    return counts


def even_tokens(
    patches: int, keep_rate: float, num_stages: int, with_fused: bool = True
) -> tuple[int, ...]:
    """The paper's schedule: at each stage the same share of what there is stays, rounded up."""
    tokens: list[int] = []
    for _ in range(num_stages):
        tokens.append(math.ceil(keep_rate * patches))
        patches = token_counts(patches, tokens[-1:], with_fused)[0]
    return tuple(tokens)


class EViT(nn.Module):
    """A timm VisionTransformer, neither changed nor copied, whose inattentive patches are fused.

    Args:
        model: the model, in evaluation mode.
        prune_before: 0-based blocks; patches go inside of the blocks before these, ascending. The
            paper's "4th, 7th and 10th layer" is (4, 7, 10).
        tokens: patches that stay at each of them.
        with_fused: fuse what goes, or drop it.

    Raises:
        UnsupportedBackboneError: blocks that are not timm's plain ones, no class token, or a head
            that reads more than it.
        ValueError: stages out of range or order, or not a number of tokens for each.
    """

    def __init__(
        self,
        model: Any,
        prune_before: Sequence[int],
        tokens: Sequence[int],
        with_fused: bool = True,
    ) -> None:
        super().__init__()
        self.model = check_reads_class_token(model, "fusing inattentive patches needs")
        self.tokens = tokens_after_blocks(model, prune_before, tokens)
        self.with_fused = with_fused

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return torch.cat([self._logits(chunk) for chunk in chunks(self.model, images)])

    def _logits(self, images: Tensor) -> Tensor:
        x = embed(self.model, images)
        for i, block in enumerate(self.model.blocks):
            x = self._block(block, x, self.tokens[i]) if i in self.tokens else run_block(block, x)
        return classify_prefix(self.model, x[:, : self.model.num_prefix_tokens])

    def _block(self, block: Any, x: Tensor, count: int) -> Tensor:
        prefix = self.model.num_prefix_tokens
        mixed, q, k = attend(block.attn, block.norm1(x), None)
        x = x + block.ls1(mixed)
        scores = (k @ q[:, :, 0, :, None]).squeeze(-1) * block.attn.scale
        paid = scores.softmax(-1).mean(1)[:, prefix:]
        patches = reorganise(x[:, prefix:], paid, count, self.with_fused)
        x = torch.cat([x[:, :prefix], patches], dim=1)
        return feed_forward(block, x)


def macs_counter(
    model: Any, image_shape: Sequence[int], prune_before: Sequence[int], with_fused: bool = True
) -> Callable[[Sequence[int]], int]:
    """Counts what one image costs with given numbers of tokens, the observed attention and fusing
    included.
    """

    def build(model: Any, tokens: Sequence[int]) -> EViT:
        return EViT(model, prune_before, tokens, with_fused)

    return pass_counter(model, image_shape, build)
