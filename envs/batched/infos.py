"""Infos of the token game: which images are played, and how their episodes ended."""

from __future__ import annotations

import torch
from torch import Tensor

from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.game import Outcome


def episode_infos(env: BatchedTokenPrune, outcome: Outcome | None) -> dict[str, Tensor]:
    """Infos of B episodes, with the same keys at every step.

    Args:
        env: the game.
        outcome: how episodes ended; None gives zeros.

    Returns:
        ``index`` and ``label`` of the image, int64 [B], ``logits`` float32 [B, classes]
        (embeddings [B, D] without a classifier), ``correct`` bool [B] and ``gmacs`` (policy not
        included) float32 [B].
    """
    images = {"index": env.indices, "label": env.labels}
    if outcome is None:
        zeros = torch.zeros(env.num_envs, dtype=torch.float32, device=env.device)
        logits = zeros[:, None].expand(-1, env.game.backbone.num_outputs)
        return images | {"logits": logits, "correct": zeros.bool(), "gmacs": zeros}
    return images | {
        "logits": outcome.logits.float(),
        "correct": outcome.correct,
        "gmacs": outcome.gmacs,
    }
