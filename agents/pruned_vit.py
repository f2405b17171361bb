"""``PrunedViT``: a backbone and a policy as one module, the thing people deploy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenprune.agents.policy import Policy
from tokenprune.envs.backbone import StagedViT
from tokenprune.envs.observations import View


@dataclass(frozen=True)
class Trace:
    """What a forward pass did.

    Attributes:
        logits: [B, classes].
        alive: bool [B, T, N], who survived each stage.
        macs: multiply-accumulates of each image, the policy's included, int64 [B].
    """

    logits: Tensor
    alive: Tensor
    macs: Tensor


class PrunedViT(nn.Module):
    """Classifies images with the tokens that its policy keeps; a pass leaves nothing on the module.

    Args:
        backbone: the staged ViT.
        policy: who stays.
    """

    def __init__(self, backbone: StagedViT, policy: Policy) -> None:
        super().__init__()
        self.backbone = backbone
        self.policy = policy

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.trace(images).logits

    def trace(self, images: Tensor) -> Trace:
        """As ``forward``, with what was pruned and what it cost."""
        backbone, policy = self.backbone, self.policy
        tokens = backbone.begin(images, policy.needs_attention)
        budget = torch.zeros(len(images), device=images.device)
        alive, decisions = [], torch.zeros_like(tokens.macs)
        for stage in range(backbone.num_stages):
            view = View(backbone, tokens, stage, budget)
            decisions = decisions + view.count
            tokens = backbone.advance(tokens, policy(view), stage, policy.needs_attention)
            alive.append(tokens.alive[:, backbone.num_prefix :])
        return Trace(
            logits=backbone.finish(tokens),
            alive=torch.stack(alive, dim=1),
            macs=backbone.total_macs(tokens) + decisions * policy.macs_per_decision,
        )
