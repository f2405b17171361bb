"""DynamicViT's differentiable keep masks and its losses (arXiv 2106.02034): all tokens run, and an
attention bias hides those that are pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.tokens import Tokens

# weight of a pruned token's key, instead of 0: its logarithm must be finite
FLOOR = 1e-12
# the paper's weights of the distances to the dense model, of logits and of tokens
KL_WEIGHT, TOKEN_WEIGHT = 0.5, 0.5
# Largest gradient of an image's loss to a keep mask. Not in the paper: the gradient to a pruned key
# is linear in exp(score), while its effect saturates. Where attention is sharp that gradient
# reached 1e7 here, and no predictor learned from it.
MAX_MASK_GRAD = 1.0


def gumbel_keep(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a keep mask of 1 and 0 with the gradient of the Gumbel-softmax (eq. 8).

    Args:
        logits: of prune and keep, [..., 2].
        generator: draws the noise, on the logits' device.

    Returns:
        The mask, [...].
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
    noise = -(-uniform.clamp(min=1e-10).log()).log()
    soft = (logits + noise).softmax(-1)[..., 1]
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


def attention_bias(kept: Tensor, num_prefix: int) -> Tensor:
    """Additive attention bias that hides pruned tokens from all but themselves (eqs. 10-12), with
    the gradient to the keep mask.

    The paper multiplies exp(score) by G, which is D of the key and 1 on the diagonal; that is
    adding log G.

    Args:
        kept: D of the patches, 1 or 0, [B, N].
        num_prefix: number of tokens before them that are always kept.

    Returns:
        The bias, [B, 1, L, L].
    """
    seen = F.pad(kept, (num_prefix, 0), value=1.0)[:, None, None, :]
    own = torch.eye(seen.shape[-1], dtype=seen.dtype, device=seen.device)
    return (seen * (1 - own) + own + FLOOR).log()


@dataclass(frozen=True)
class Outputs:
    """A model's outputs on a batch.

    Attributes:
        logits: [B, classes].
        patches: embeddings after the last norm, [B, N, D].
        kept: D of each stage, 1 or 0, [T, B, N].
    """

    logits: Tensor
    patches: Tensor
    kept: Tensor


def run_dense(backbone: StagedViT, begun: Tokens) -> Outputs:
    """Runs the dense model from ``begun``, the tokens before the first stage."""
    x = begun.x.unflatten(0, begun.alive.shape)
    x = _blocks(backbone, x, backbone.prune_before[0], backbone.depth, None, begun)
    everyone = x.new_ones(backbone.num_stages, len(x), backbone.num_patches)
    return _finished(backbone, begun, x, everyone)


def run_masked(
    backbone: StagedViT, policy: DynamicViTPolicy, begun: Tokens, generator: torch.Generator
) -> Outputs:
    """Runs the model with keep masks that the predictors draw, from ``begun``."""
    x = begun.x.unflatten(0, begun.alive.shape)
    batch, prefix = len(x), backbone.num_prefix
    image = torch.arange(batch, device=x.device).repeat_interleave(backbone.num_patches)
    kept = x.new_ones(batch, backbone.num_patches)
    history = []
    edges = (*backbone.prune_before, backbone.depth)
    for stage, predictor in enumerate(policy.predictors):
        patches = x[:, prefix:].flatten(0, 1)
        logits = predictor(patches, image, batch, kept.flatten())
        kept = kept * gumbel_keep(logits, generator).view_as(kept)
        if kept.requires_grad:
            kept.register_hook(
                partial(torch.clamp, min=-MAX_MASK_GRAD / batch, max=MAX_MASK_GRAD / batch)
            )
        history.append(kept)
        bias = attention_bias(kept, prefix)
        x = _blocks(backbone, x, edges[stage], edges[stage + 1], bias, begun)
    return _finished(backbone, begun, x, torch.stack(history))


def _blocks(
    backbone: StagedViT, x: Tensor, start: int, stop: int, bias: Tensor | None, begun: Tokens
) -> Tensor:
    """timm's own blocks on all tokens, [B, L, D]."""
    for i in range(start, stop):
        rope = begun.rotary.of_block(i).patches(len(x)) if begun.rotary else None
        x = backbone.ops.dense_block(backbone.model.blocks[i], x, bias, rope)
    return x


def _finished(backbone: StagedViT, begun: Tokens, x: Tensor, kept: Tensor) -> Outputs:
    """Norm and head. A head that pools over patches pools over the kept ones."""
    ended = backbone.prune(replace(begun, x=x.flatten(0, 1)), kept[-1] > 0)
    return Outputs(
        logits=backbone.finish(ended),
        patches=backbone.model.norm(x)[:, backbone.num_prefix :],
        kept=kept,
    )


def losses(
    student: Outputs, teacher: Outputs, labels: Tensor, shares: Sequence[float], ratio_weight: float
) -> dict[str, Tensor]:
    """The paper's four losses and their weighted sum, named "loss" (section 3.3).

    Args:
        student: outputs of the masked model.
        teacher: outputs of the dense model.
        labels: int64 [B].
        shares: target share of kept patches after each stage.
        ratio_weight: weight of the squared distance from these.
    """
    last = student.kept[-1]
    distance = (student.patches - teacher.patches).square().mean(2)
    wanted = torch.tensor(shares, device=labels.device)[:, None]
    terms = {
        "classification": F.cross_entropy(student.logits, labels),
        "kl": F.kl_div(
            student.logits.log_softmax(-1),
            teacher.logits.log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        ),
        "tokens": (distance * last).sum() / last.sum().clamp(min=1),
        "ratio": (student.kept.mean(2) - wanted).square().mean(),
    }
    loss = (
        terms["classification"]
        + KL_WEIGHT * terms["kl"]
        + TOKEN_WEIGHT * terms["tokens"]
        + ratio_weight * terms["ratio"]
    )
    return {"loss": loss, **terms}
