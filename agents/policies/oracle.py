"""An oracle that tries out which patches can go: an estimate of how good pruning could be.

It is no policy, since it runs the model many times on the image that it prunes. It shows how much
is left to learn, but is no strict upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunevit.agents.pruned_vit import PrunedViT, Trace
from prunevit.envs.observations import View
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.tokens import Tokens

BATCH_SIZE = 512  # images in a forward pass


class FixedKeep:
    """A policy for one batch of images, with given survivors.

    Args:
        keep: which patches survive each stage, bool [B, T, N].
    """

    needs_attention = False
    macs_per_decision = 0

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, view: View) -> Tensor:
        return self.keep[:, view.stage]


class Oracle:
    """Greedy backward elimination of patches.

    A stage takes several rounds. Each leaves out every living patch in turn, and then removes the
    patches whose absence does the least harm, until the wanted number is left. Later stages prune
    nothing meanwhile.

    With labels, harm is the loss of log-probability of the true class. Predictions can then change
    from wrong to right, and accuracy can exceed that of the dense model. Without labels, it is
    KL(dense || pruned).

    Args:
        backbone: the staged ViT, in packed execution.
        tokens: number of patches of every image to keep at each stage.
        share: share of the living patches removed in a round, at least one patch. A smaller share
            is better and slower; 0 removes one patch a round.

    Raises:
        ValueError: ``tokens`` has not one number for each stage, or ``share`` is not in [0, 1).
    """

    def __init__(self, backbone: StagedViT, tokens: Sequence[int], share: float = 1 / 3) -> None:
        if len(tokens) != backbone.num_stages or min(tokens) < 0:
            raise ValueError(
                f"tokens={tuple(tokens)}: {backbone.num_stages} stages need a number each, "
                "at least 0"
            )
        if not 0 <= share < 1:
            raise ValueError(f"share={share} must be at least 0 and below 1")
        self.backbone = backbone
        self.tokens = tuple(tokens)
        self.share = share

    def trace(self, images: Tensor, labels: Tensor | None = None) -> Trace:
        """Classifies the pruned images; the cost of the search is not counted."""
        keep = self.keep(images, labels)
        return PrunedViT(self.backbone, FixedKeep(keep)).trace(images)

    @torch.no_grad()
    def keep(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Searches the patches that survive each stage, bool [B, T, N].

        Args:
            images: float [B, C, H, W].
            labels: the true classes, int64 [B].
        """
        at_once = max(1, BATCH_SIZE // self.backbone.num_patches)
        parts = images.split(at_once)
        known = [None] * len(parts) if labels is None else labels.split(at_once)
        return torch.cat([self._keep(*part) for part in zip(parts, known, strict=True)])

    def _keep(self, images: Tensor, labels: Tensor | None) -> Tensor:
        backbone = self.backbone
        tokens = backbone.begin(images, with_attention=False)
        alive = tokens.alive[:, backbone.num_prefix :]
        dense = self._answers(tokens, alive, 0)
        history = []
        for stage, wanted in enumerate(self.tokens):
            left = int(alive[0].sum())  # the same for every image
            while left > wanted:
                going = min(left - wanted, max(1, math.floor(self.share * left)))
                # living patches of each image [B, left]
                patch = alive.nonzero()[:, 1].view(len(images), left)
                without = alive.repeat_interleave(left, 0).scatter(1, patch.view(-1, 1), False)
                answers = self._answers(tokens.repeat(left), without, stage)
                harm = _harm(answers.unflatten(0, (-1, left)), dense, labels)
                least = harm.topk(going, dim=1, largest=False).indices
                alive = alive.scatter(1, patch.gather(1, least), False)
                left -= going
            tokens = backbone.advance(tokens, alive, stage, with_attention=False)
            alive = tokens.alive[:, backbone.num_prefix :]
            history.append(alive)
        return torch.stack(history, dim=1)

    def _answers(self, tokens: Tokens, keep: Tensor, stage: int) -> Tensor:
        """Log-probabilities if ``keep`` survives the stage and later stages prune nothing."""
        for later in range(stage, self.backbone.num_stages):
            tokens = self.backbone.advance(tokens, keep, later, with_attention=False)
        return self.backbone.finish(tokens).log_softmax(-1)


def _harm(answers: Tensor, dense: Tensor, labels: Tensor | None) -> Tensor:
    """The harm of each of an image's n log-probabilities [B, n, classes], as [B, n]."""
    if labels is not None:
        return -answers.gather(2, labels.view(-1, 1, 1).expand(-1, answers.shape[1], 1)).squeeze(2)
    told = dense[:, None]
    return (told.exp() * (told - answers)).sum(2)
