"""ATS, "Adaptive Token Sampling" (arXiv 2111.15667): other numbers of patches for every image.

A patch's significance is the attention that the class token pays it, times the norm of its value.
Patches are sorted by it, and their cumulative sum is read at the points of a grid: the patches
nearest to these stay. Sampling takes place inside of a block. Only survivors ask for attention,
and only they go through the attention's output projection and the MLP.

This is the authors' code (github.com/adaptivetokensampling/ATS) on one image at a time, whose
outputs are in tests/fixtures/originals. In a batch, theirs depends on the other images: an image
with padding never loses its least significant patch, and one without padding always loses it.
There, and where one patch is left, we differ by choice: an image doesn't depend on others, and its
last patch stays. All prefix tokens are protected; theirs knows only a class token. Dither is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.agents.policies.dither import dither_levels
from prunevit.agents.pruned_vit import Trace
from prunevit.benchmarks.baselines.timm_parts import check_plain, chunks
from prunevit.envs.vit.attention import attention_received
from prunevit.envs.vit.execution import run_sublayers
from prunevit.envs.vit.layout import Layout
from prunevit.envs.vit.macs import count_linear_macs
from prunevit.envs.vit.onednn_linear import linear
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError
from prunevit.envs.vit.tokens import Tokens


def sample(significance: Tensor, alive: Tensor, count: int) -> Tensor:
    """Which patches are nearest to the ``count`` points of a grid on the cumulative sum of their
    ascending significance. Fewer than ``count``, as several points can have one nearest patch.

    Args:
        significance: not negative, [B, N].
        alive: which patches still exist, bool [B, N].
        count: points of the grid, at least 2.

    Returns:
        bool [B, N].
    """
    patches = alive.shape[1]
    order = significance.masked_fill(~alive, -1).argsort(dim=1)  # the dead come first
    ascending = (significance * alive).gather(1, order)
    total = ascending.cumsum(1)
    living = alive.sum(1, keepdim=True)
    lowest = total.gather(1, (patches - living).clamp(max=patches - 1))
    # the least significant patch is at 0, out of the grid's reach
    level = ((total - lowest) / (total[:, -1:] - lowest)).clamp(min=0)
    start = torch.where(level > 0, level, 1).amin(1, keepdim=True)
    grid = start + (1 - start) * torch.linspace(0, 1, count, device=level.device, dtype=level.dtype)
    right = torch.searchsorted(level, grid).clamp(max=patches - 1)
    left = (right - 1).clamp(min=0)
    is_left_nearer = grid - level.gather(1, left) <= level.gather(1, right) - grid
    # no more than the ``count`` most significant patches can be sampled
    nearest = torch.where(is_left_nearer, left, right).clamp(min=patches - count)
    kept = torch.zeros_like(alive).scatter(1, order.gather(1, nearest), True)
    return (kept | (living == 1)) & alive


def attend(q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, image: Tensor) -> Tensor:
    """Attention of some rows of each image to all of them.

    Args:
        q: [R, heads, head_dim].
        k: [S, heads, head_dim].
        v: as ``k``.
        queries: layout of ``q``.
        keys: layout of ``k`` and ``v``.
        image: which image of ``keys`` each image of ``queries`` is, int64 [B].

    Returns:
        [R, heads * head_dim].
    """
    asking, valid = queries.pad(q.flatten(1))
    answering, present = keys.pad(torch.cat([k, v], dim=1).flatten(1))
    both = answering[image].unflatten(2, (-1, q.shape[2])).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(
        asking.unflatten(2, (-1, q.shape[2])).transpose(1, 2),
        both[:, : q.shape[1]],
        both[:, q.shape[1] :],
        attn_mask=None if keys.uniform_length is not None else present[image][:, None, None],
    )
    return mixed.transpose(1, 2).flatten(2)[valid]


class ATS(nn.Module):
    """A timm VisionTransformer, neither changed nor copied, with adaptive token sampling.

    Args:
        backbone: says where the stages are: sampling takes place inside of the blocks before them,
            or of their own blocks if they prune inside too. Its execution is not used.
        samples: points of each stage's grid, at least 2. The authors have as many as patches.
        dither: strength with which each patch's own level changes its significance, the same for
            all images, so that of similar neighbours other ones are sampled; 0 for none.

    Raises:
        UnsupportedBackboneError: blocks that are not timm's plain ones, no class token, or a
            backbone that merges.
        ValueError: a stage before the first block, or not a number of samples for each.
    """

    def __init__(self, backbone: StagedViT, samples: Sequence[int], dither: float = 0.0) -> None:
        super().__init__()
        check_plain(backbone.model)
        if not backbone.has_class_token:
            raise UnsupportedBackboneError("adaptive token sampling needs a class token")
        if backbone.on_prune == "merge":
            raise UnsupportedBackboneError(
                "adaptive token sampling drops what it doesn't sample: take on_prune='drop'"
            )
        if not backbone.has_attended(0):
            raise ValueError("no block comes before the stage at block 0, to sample in")
        if len(samples) != backbone.num_stages or not all(
            isinstance(count, Integral) and count >= 2 for count in samples
        ):
            raise ValueError(
                f"samples={tuple(samples)}: {backbone.num_stages} stages need a number each, at "
                "least 2"
            )
        self.backbone = backbone
        self.samples = tuple(samples)
        self.dither = dither
        # inside of which sampling takes place
        self._blocks = [block - 1 for block in backbone.whole_from]
        self._until_sampling = StagedViT(backbone.model, self._blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        parts = chunks(self.backbone.model, images)
        return torch.cat([self.trace(part).logits for part in parts])

    def trace(self, images: Tensor) -> Trace:
        """Classifies images, and reports which patches survived and what it cost."""
        backbone = self.backbone
        tokens = self._until_sampling.begin(images, with_attention=False)
        alive, sampled = [], torch.zeros(len(images), dtype=torch.int64, device=images.device)
        for stage, (block, next_block) in enumerate(pairwise((*self._blocks, backbone.depth))):
            before = tokens.alive.sum(1)
            tokens = self._sampling_block(tokens, block, stage)
            alive.append(tokens.alive[:, backbone.num_prefix :])
            sampled = sampled + self._macs(block, before, tokens.alive.sum(1))
            start, stop = 2 * (block + 1), 2 * next_block
            tokens = run_sublayers(
                backbone.model, backbone.ops, lambda t=tokens: t, start, stop, None
            )
        return Trace(
            logits=backbone.finish(tokens),
            alive=torch.stack(alive, dim=1),
            macs=backbone.total_macs(tokens) + sampled,
        )

    def _sampling_block(self, tokens: Tokens, index: int, stage: int) -> Tokens:
        backbone, layout = self.backbone, tokens.layout
        assert layout is not None
        block, prefix = backbone.model.blocks[index], backbone.num_prefix
        attn, steps = block.attn, backbone.ops.steps(block)
        source = steps.pre_attention(block, tokens.x)
        q, k, v = backbone.ops.project(block, source, None)
        paid = attention_received(q, k, layout, 1)
        significance = paid * v.flatten(1).norm(dim=1)  # [S]
        patches = tokens.alive[:, prefix:]
        row = tokens.row.view(len(patches), -1)
        dense = significance.new_zeros(patches.shape)
        dense[patches] = significance[row[:, prefix:][patches]]
        if self.dither:
            level = dither_levels(*backbone.grid_size, stage, dense.device)
            dense = dense * (1 / level - 1) ** self.dither
        keep = sample(dense, patches, self.samples[stage])

        numbers = torch.arange(len(tokens.x), device=keep.device)[:, None]
        stays = backbone.prune(replace(tokens, x=numbers), keep)
        rows = stays.x[:, 0]  # of those that stay
        assert stays.layout is not None
        image = layout.image[rows[stays.layout.starts]]
        mixed = attn.norm(attend(q[rows], k, v, stays.layout, layout, image))
        if getattr(attn, "gate", None) is not None:
            mixed = mixed * attn.gate(source[rows]).sigmoid()
        x = steps.residual(block, tokens.x[rows], linear(attn.proj, mixed))
        return replace(stays, x=steps.mlp(block, x))

    def _macs(self, index: int, before: Tensor, after: Tensor) -> Tensor:
        """Multiply-accumulates of a block in which ``before`` tokens become ``after``, [B]."""
        block = self.backbone.model.blocks[index]
        width = block.attn.num_heads * block.attn.head_dim
        project = count_linear_macs(block.attn.qkv)
        attention = before * width + 2 * width * before * after  # what is received, then the mix
        return before * project + attention + after * (count_linear_macs(block) - project)
