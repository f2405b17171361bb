"""Token merging, written from the paper "Token Merging: Your ViT But Faster" (arXiv 2210.09461).

In every block, between attention and MLP, the r patches that are most like another one are
averaged into it. Deciding who merges (``match``) is apart from doing it (``merge``).

With a class token, alone or with a distillation token, this is the original code
(github.com/facebookresearch/ToMe), whose outputs are in tests/fixtures/originals. Elsewhere we
differ by choice. The original lets registers merge; here all prefix tokens are protected. Without a
class token its patches lose their order, and its mean counts a token once however many patches it
stands for. It ignores LayerScale and the norms of queries and keys.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.benchmarks.baselines.timm_parts import (
    attend,
    check_plain,
    chunks,
    embed,
    feed_forward,
    pass_counter,
)
from prunevit.envs.vit.timm_models.heads import classify_prefix
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

POOLINGS = ("token", "avg", "map")


class Matching(NamedTuple):
    """Which sources merge into which targets."""

    stays: Tensor  # sources that stay, ascending, int64 [B, sources - r]
    merges: Tensor  # sources that merge, int64 [B, r]
    into: Tensor  # the target of each of these, int64 [B, r]


def split(patches: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Sources and targets among patches [B, N, ...]: tokens at even and at odd places of an image,
    prefix tokens included in the count.
    """
    first = num_prefix % 2
    return patches[:, first::2], patches[:, 1 - first :: 2]


def match(sources: Tensor, targets: Tensor, count: int) -> Matching:
    """Bipartite soft matching: each source proposes to the most similar target, and the ``count``
    best pairs merge.

    Args:
        sources: keys [B, sources, d].
        targets: keys [B, targets, d].
        count: r, at most the number of sources.
    """
    return best_pairs(F.normalize(sources, dim=-1) @ F.normalize(targets, dim=-1).mT, count)


def best_pairs(similarity: Tensor, count: int) -> Matching:
    """What ``match`` does where the similarities [B, sources, targets] are known."""
    best, target = similarity.max(2)
    order = best.argsort(dim=1, descending=True)
    merges, stays = order[:, :count], order[:, count:].sort(1).values
    return Matching(stays=stays, merges=merges, into=target.gather(1, merges))


def merge(x: Tensor, size: Tensor, num_prefix: int, matching: Matching) -> tuple[Tensor, Tensor]:
    """Averages merging patches, each weighted with the number of patches it stands for.

    Args:
        x: patches [B, N, D].
        size: how many of the first patches each stands for, [B, N, 1].
        num_prefix: number of prefix tokens before the patches, see ``split``.
        matching: who merges.

    Returns:
        patches [B, N - r, D] and their sizes [B, N - r, 1]: the sources that stay, then the
        targets.
    """
    stays, merges, into = (part[..., None] for part in matching)
    width = x.shape[2]
    sources, targets = split(x, num_prefix)
    source_size, target_size = split(size, num_prefix)
    moved_size = source_size.gather(1, merges)
    moved = sources.gather(1, merges.expand(-1, -1, width)) * moved_size
    total_size = target_size.scatter_add(1, into, moved_size)
    total = (targets * target_size).scatter_add(1, into.expand(-1, -1, width), moved)
    staying = sources.gather(1, stays.expand(-1, -1, width))
    return (
        torch.cat([staying, total / total_size], dim=1),
        torch.cat([source_size.gather(1, stays), total_size], dim=1),
    )


def token_counts(patches: int, prefix: int, merges: Sequence[int]) -> list[int]:
    """Tokens of an image, prefix ones included, before the first block and after each."""
    counts = [patches]
    for wanted in merges:
        # the paper's limit: half of the patches can merge in a block
        counts.append(counts[-1] - min(wanted, counts[-1] // 2))
    return [prefix + count for count in counts]


class ToMeViT(nn.Module):
    """A timm VisionTransformer, neither changed nor copied, with token merging.

    Args:
        model: the model, in evaluation mode.
        merges: r of each block.

    Raises:
        UnsupportedBackboneError: blocks that are not timm's plain ones, or a pooling that merged
            tokens have no weighted form of.
        ValueError: not one r for each block.
    """

    def __init__(self, model: Any, merges: Sequence[int]) -> None:
        super().__init__()
        self.model = check_plain(model)
        distilled = isinstance(model, VisionTransformerDistilled)
        if not distilled and model.global_pool not in POOLINGS:
            raise UnsupportedBackboneError(
                f"token merging with global_pool={model.global_pool!r}: "
                f"supported are {', '.join(POOLINGS)}"
            )
        if len(merges) != len(model.blocks):
            raise ValueError(f"{len(merges)} numbers of merges for {len(model.blocks)} blocks")
        self.merges = tuple(merges)
        self._reads_prefix_alone = distilled or model.global_pool == "token"

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return torch.cat([self._logits(chunk) for chunk in chunks(self.model, images)])

    def _logits(self, images: Tensor) -> Tensor:
        x = embed(self.model, images)
        size: Tensor | None = None  # until something has merged all are 1
        for index in range(len(self.merges)):
            x, size = self._block(index, x, size)
        return self._head(x, size)

    def _block(self, index: int, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        block, prefix = self.model.blocks[index], self.model.num_prefix_tokens
        mixed, _, k = attend(block.attn, block.norm1(x), self._bias(size))
        x = x + block.ls1(mixed)
        count = min(self.merges[index], (x.shape[1] - prefix) // 2)
        if count:
            size = torch.ones_like(x[..., :1]) if size is None else size
            keys = k[:, :, prefix:].mean(1)
            patches, patch_size = self._merge(index, keys, x[:, prefix:], size[:, prefix:], count)
            x = torch.cat([x[:, :prefix], patches], dim=1)
            size = torch.cat([size[:, :prefix], patch_size], dim=1)
        return feed_forward(block, x), size

    def _bias(self, size: Tensor | None) -> Tensor | None:
        """Of the attention scores, for tokens of these sizes."""
        return _proportional(size)

    def _merge(
        self, index: int, keys: Tensor, patches: Tensor, size: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Merges ``count`` patches [B, N, D] of ``size`` [B, N, 1] into others in block ``index``,
        by their ``keys`` [B, N, head_dim].
        """
        prefix = self.model.num_prefix_tokens
        return merge(patches, size, prefix, match(*split(keys, prefix), count))

    def _head(self, x: Tensor, size: Tensor | None) -> Tensor:
        model = self.model
        if self._reads_prefix_alone:
            return classify_prefix(model, x[:, : model.num_prefix_tokens])
        x = model.norm(x)
        if size is None:
            return model.forward_head(x)
        if not model.pool_include_prefix:
            x, size = x[:, model.num_prefix_tokens :], size[:, model.num_prefix_tokens :]
        if model.global_pool == "avg":
            pooled = (x * size).sum(1) / size.sum(1)
        else:
            pooled = model.attn_pool(x, attn_mask=_proportional(size))
        return model.head(model.head_drop(model.fc_norm(pooled)))


def _proportional(size: Tensor | None) -> Tensor | None:
    """Proportional attention: log(size) on the scores makes a key count as often as it has patches;
    [B, L, 1] -> [B, 1, 1, L].
    """
    return None if size is None else size.log().transpose(1, 2)[:, None]


def even_merges(total: int, depth: int) -> tuple[int, ...]:
    """The paper's constant schedule, r in every block, where ``total`` is a multiple of ``depth``;
    otherwise the last blocks merge one more.
    """
    fewer, rest = divmod(total, depth)
    return (fewer,) * (depth - rest) + (fewer + 1,) * rest


def macs_counter(model: Any, image_shape: Sequence[int]) -> Callable[[Sequence[int]], int]:
    """Counts what one image costs with given merges, matching included."""
    return pass_counter(model, image_shape, ToMeViT)


def merges_at(model: Any, image_shape: Sequence[int], macs: float) -> tuple[int, ...]:
    """The fewest merges, as evenly as they go, with which an image costs at most ``macs``.

    Raises:
        ValueError: even the most merges cost more.
    """
    depth = len(model.blocks)
    most = depth * (model.patch_embed.num_patches // 2)
    count = macs_counter(model, image_shape)
    total = bisect_left(
        range(most + 1), True, key=lambda total: count(even_merges(total, depth)) <= macs
    )
    if total > most:
        raise ValueError(f"token merging can't get down to {macs / 1e9:.4f} GMACs")
    return even_merges(total, depth)
