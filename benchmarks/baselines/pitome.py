"""PiToMe, written from the paper "Accelerating Transformers with Spectrum-Preserving Token Merging"
(arXiv 2405.16148).

Patches are nodes of a graph whose edges are the cosines of their keys. A patch's energy is its mean
similarity to all patches; similarities below a margin count little. Patches of high energy have
many like them. In every block, between attention and MLP, patches are sorted by energy and are in
turn sources and targets, and sources merge into their most similar target. In the first half of
the blocks any source can, and the most similar pairs do. In the second half only the 2r patches of
the highest energy take part, and the others are protected.

The margins, their halves and the number of merges, a share of the patches, are those of the
authors' code for DeiT (github.com/hchautran/PiToMe), whose outputs are in tests/fixtures/originals.
The paper has attention in proportion to the number of patches that a token stands for; the code
leaves that away for image classification, and here it can be turned off. All prefix tokens are
protected; theirs protects a class token alone. As in our ToMe, LayerScale and norms of queries and
keys are applied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunevit.benchmarks.baselines.tome import ToMeViT, best_pairs, merge

FIRST_MARGIN = 0.75  # of the cosine, in the first block; it falls to zero behind the last


def energies(similarity: Tensor, margin: float) -> Tensor:
    """Mean similarity of each patch to all: [B, N, N] -> [B, N]. What is below ``margin`` counts
    as exp(similarity - margin) - 1.
    """
    return F.elu(similarity - margin).mean(2)


def share_merges(patches: int, share: float, depth: int) -> tuple[int, ...]:
    """The paper's schedule: in each block the same ``share`` of the patches stays, rounded up; at
    least half of them.
    """
    merges = []
    for _ in range(depth):
        merges.append(min(math.floor(patches - patches * share), patches // 2))
        patches -= merges[-1]
    return tuple(merges)


class PiToMeViT(ToMeViT):
    """A timm VisionTransformer, neither changed nor copied, with token merging by energy.

    Args:
        model: the model, in evaluation mode.
        merges: r of each block.
        proportional: a key counts as often as it has patches.

    Raises:
        UnsupportedBackboneError: as ``ToMeViT``.
        ValueError: as ``ToMeViT``.
    """

    def __init__(self, model: Any, merges: Sequence[int], proportional: bool = True) -> None:
        super().__init__(model, merges)
        self.proportional = proportional

    def _bias(self, size: Tensor | None) -> Tensor | None:
        return super()._bias(size) if self.proportional else None

    def _merge(
        self, index: int, keys: Tensor, patches: Tensor, size: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        depth, number = len(self.merges), patches.shape[1]
        unit = F.normalize(keys, dim=2)
        similarity = unit @ unit.mT
        energy = energies(similarity, FIRST_MARGIN * (1 - index / depth))
        order = energy.argsort(dim=1, descending=True)[..., None]
        taking_part = number if index < math.ceil(depth / 2) else 2 * count
        sources, targets = order[:, :taking_part:2], order[:, 1:taking_part:2]
        among = similarity.take_along_dim(sources, 1).take_along_dim(targets.mT, 2)
        patches, size = patches.take_along_dim(order, 1), size.take_along_dim(order, 1)
        merged, merged_size = merge(
            patches[:, :taking_part], size[:, :taking_part], 0, best_pairs(among, count)
        )
        return (
            torch.cat([merged, patches[:, taking_part:]], dim=1),
            torch.cat([merged_size, size[:, taking_part:]], dim=1),
        )
