"""DynamicViT's policy (arXiv 2106.02034): a predictor at each stage scores the patches to keep.

``trainers.dynamic_vit`` trains it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prunevit.agents.policies.dither import with_dither
from prunevit.agents.policies.heuristics import keep_highest
from prunevit.envs.observations import View
from prunevit.envs.vit.macs import count_linear_macs
from prunevit.envs.vit.staged_vit import StagedViT


class KeepPredictor(nn.Module):
    """Predicts for each patch whether to keep it (equations 1 to 5 of the paper).

    Half of a patch's features are its own, the other half are averaged over the image.

    Args:
        width: D, the width of the backbone.
        hidden: number of features, a multiple of 4.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU())
        self.judge = nn.Sequential(
            nn.Linear(hidden, hidden // 2),
            nn.GELU(),
            nn.Linear(hidden // 2, hidden // 4),
            nn.GELU(),
            nn.Linear(hidden // 4, 2),
        )

    def forward(self, tokens: Tensor, image: Tensor, images: int, alive: Tensor) -> Tensor:
        """Computes logits of prune and keep, [R, 2].

        Args:
            tokens: embeddings of patches [R, D].
            image: index of the image of each patch, int64 [R].
            images: number of images, B.
            alive: weight of each patch in the average of its image [R]: 1, or 0 if it is pruned.
        """
        local, shared = self.read(tokens).chunk(2, dim=1)
        count = alive.new_zeros(images).index_add(0, image, alive)
        total = shared.new_zeros(images, shared.shape[1])
        total = total.index_add(0, image, shared * alive[:, None])
        average = total / count.clamp(min=1)[:, None]
        return self.judge(torch.cat([local, average.index_select(0, image)], dim=1))


class DynamicViTPolicy(nn.Module):
    """Keeps the patches with the highest predicted scores, keep^(t+1) * N of each image at stage t.

    Args:
        width: D, the width of the backbone.
        num_stages: T.
        keep: share of the patches that is kept from stage to stage. It can be changed after the
            training: ``policy.keep = 0.5`` makes the model cheaper.
        hidden: width of the predictors; None for the paper's, which is D.
        dither: rank patches by their scores less a level of each patch's own, the same for all
            images: what the noise of the training does to them, without randomness. It can be
            changed after the training.

    Raises:
        ValueError: ``keep`` is not in (0, 1], or ``hidden`` is not a multiple of 4.
    """

    needs_attention = False

    def __init__(
        self,
        width: int,
        num_stages: int,
        keep: float = 0.7,
        hidden: int | None = None,
        dither: bool = False,
    ) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        if hidden < 4 or hidden % 4:
            raise ValueError(f"hidden={hidden} must be a multiple of 4")
        self.width = width
        self.hidden = hidden
        self.keep = keep
        self.dither = dither
        self.predictors = nn.ModuleList(KeepPredictor(width, hidden) for _ in range(num_stages))
        self.macs_per_decision = count_linear_macs(self.predictors[0])

    @property
    def keep(self) -> float:
        return self._keep

    @keep.setter
    def keep(self, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"keep={share} must be above 0 and at most 1")
        self._keep = float(share)

    def shares(self) -> list[float]:
        """The share of an image's patches that is kept at each stage."""
        return [self.keep ** (stage + 1) for stage in range(len(self.predictors))]

    def check_fits(self, backbone: StagedViT) -> None:
        """Raises ValueError if ``backbone`` has another width or number of stages."""
        own = self.width, len(self.predictors)
        other = backbone.width, backbone.num_stages
        if own != other:
            raise ValueError(
                f"the policy was made for a backbone of width {own[0]} with {own[1]} stages, "
                f"this one is of width {other[0]} with {other[1]}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicViTPolicy:
        """Follows moves to another device but not dtype: rounding would change decisions."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def forward(self, view: View) -> Tensor:
        margin = self.margin(view)
        # a sum is finite only if all its terms are, and a GPU is waited for only once
        if not math.isfinite(margin.sum()):
            raise ValueError("the policy's logits are not finite: check its weights and the images")
        return self.choose(view, margin)

    def margin(self, view: View) -> Tensor:
        """Computes the logit of keep minus that of prune of each living patch, [R]."""
        everyone = torch.ones_like(view.token[:, 0])
        logits = self.predictors[view.stage](view.token, view.image, view.alive.shape[0], everyone)
        return logits[:, 1] - logits[:, 0]

    def choose(self, view: View, margin: Tensor) -> Tensor:
        """Selects the patches of each image with the highest margins [R]: bool [B, N]."""
        count = int(self.shares()[view.stage] * view.backbone.num_patches)
        if self.dither:
            margin = view.gather(with_dither(view, view.scatter(margin)))
        return keep_highest(view, margin, count)
