"""DynamicViT's differentiable keep masks and its losses (arXiv 2106.02034): all tokens run, and an
attention bias hides those that are pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.envs.data.classes import check_labels
from prunevit.envs.data.image_set import ImageSet, Reseedable
from prunevit.envs.data_config import model_classes
from prunevit.envs.vit.blocks import BlockCall, dense_block, masked_attention_received
from prunevit.envs.vit.execution import split_at_blocks
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.tokens import Tokens
from prunevit.envs.vit.untouched import has_global_hooks, is_untouched
from prunevit.trainers.common.evaluation import Traced, evaluate
from prunevit.trainers.common.loop import Monitor
from prunevit.trainers.common.run import TrainingError

# the authors' code adds this much to the weights of a query, shared out among all keys
EPSILON = 1e-6
# the paper's weights of the distances to the dense model, of logits and of tokens
KL_WEIGHT, TOKEN_WEIGHT = 0.5, 0.5
# stage, tokens of all slots, keep mask of the patches [B, N] -> logits of prune and keep [B * N, 2]
Judge = Callable[[int, Tokens, Tensor], Tensor]
# Largest gradient of an image's loss to a keep mask. Neither in the paper nor in the authors' code:
# the gradient to a pruned key is linear in exp(score), while its effect saturates. Where attention
# is sharp, that gradient reached 1e7 here. On the digits (--prune-before 1 3 --mixup 0 --cutmix 0
# --label-smoothing 0), validation accuracy is 93.9% with this bound and 90.5% without.
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


def masked_attention(scores: Tensor, kept: Tensor) -> Tensor:
    """Attention in which no token sees a pruned one but itself (eqs. 10-12), with the gradient to
    the keep mask.

    Args:
        scores: before the softmax, [B, heads, L, L].
        kept: D of the tokens, 1 or 0, [B, L].

    Returns:
        weights [B, heads, L, L].
    """
    seen = kept[:, None, None, :]
    own = torch.eye(seen.shape[-1], dtype=seen.dtype, device=seen.device)
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * (seen + (1 - seen) * own)
    return (weights + EPSILON / len(own)) / (weights.sum(-1, keepdim=True) + EPSILON)


def check_masks_act(backbone: StagedViT, images: ImageSet, batch_size: int) -> None:
    """Checks that keep masks can be learned on ``backbone`` from batches of ``images``.

    Raises:
        TrainingError: there are fewer images than a batch holds, or the backbone's blocks are not
            timm's own.
        DatasetError: the images have other classes than the backbone.
    """
    if len(images) < batch_size:
        raise TrainingError(
            f"a step takes batch_size={batch_size} images, the dataset has {len(images)}"
        )
    check_labels(model_classes(backbone.model), images)
    if has_global_hooks() or not all(is_untouched(b, True) for b in backbone.model.blocks):
        raise TrainingError(
            "keep masks act through the attention of timm's own blocks: these have hooks, "
            "replaced layers or another attention scale"
        )


def draw_images(images: ImageSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws a step's images [B, C, H, W] and labels [B], without repeats."""
    if isinstance(images, Reseedable):
        images.reseed(seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.load(order[:count])


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
    for i, sublayer in split_at_blocks(backbone.edges[0], backbone.edges[-1]):
        rotary = begun.rotary.of_block(i) if begun.rotary else None
        call = BlockCall(backbone.ops, backbone.model.blocks[i], rotary, None, sublayer=sublayer)
        x = dense_block(call, x, None, rotary.patches(len(x)) if rotary else None)
    everyone = x.new_ones(backbone.num_stages, len(x), backbone.num_patches)
    return _finished(backbone, begun, x, everyone)


def run_masked(
    backbone: StagedViT, policy: DynamicViTPolicy, begun: Tokens, generator: torch.Generator
) -> Outputs:
    """Runs the model with keep masks that the predictors draw, from ``begun``."""
    image = torch.arange(len(begun.alive), device=begun.x.device)
    image = image.repeat_interleave(backbone.num_patches)

    def judge(stage: int, tokens: Tokens, kept: Tensor) -> Tensor:
        x = tokens.x.unflatten(0, tokens.alive.shape)
        patches = x[:, backbone.num_prefix :].flatten(0, 1)
        return policy.predictors[stage](patches, image, len(kept), kept.flatten())

    return run_judged(backbone, judge, begun, generator)


def run_judged(
    backbone: StagedViT,
    judge: Judge,
    begun: Tokens,
    generator: torch.Generator,
    with_attention: bool = False,
) -> Outputs:
    """Runs the model with keep masks that are drawn by the logits of ``judge``, from ``begun``.
    Where it asks for the attention that tokens received, no gradient flows through that.
    """
    x = begun.x.unflatten(0, begun.alive.shape)
    batch, prefix = len(x), backbone.num_prefix
    kept = x.new_ones(batch, backbone.num_patches)
    seen, attention = F.pad(kept, (prefix, 0), value=1.0), begun.attention
    history = []
    for stage in range(backbone.num_stages):
        shown = Tokens.of_slots(x, seen.detach() > 0)
        logits = judge(stage, replace(shown, attention=attention), kept)
        kept = kept * gumbel_keep(logits, generator).view_as(kept)
        if kept.requires_grad:
            kept.register_hook(
                partial(torch.clamp, min=-MAX_MASK_GRAD / batch, max=MAX_MASK_GRAD / batch)
            )
        history.append(kept)
        seen = F.pad(kept, (prefix, 0), value=1.0)
        start, stop = backbone.edges[stage : stage + 2]
        # where the next stage stands, the attention of the block before it, or of its own
        observed = (stop - 1) // 2 * 2 if with_attention and stop < backbone.edges[-1] else None
        for i in range(start, stop):
            if i == observed:
                attention = _attention_received(backbone, x, i // 2, seen, begun)
            x = _masked_sublayer(backbone, x, i, seen, begun)
    return _finished(backbone, begun, x, torch.stack(history))


@torch.no_grad()
def _attention_received(
    backbone: StagedViT, x: Tensor, block: int, kept: Tensor, begun: Tokens
) -> Tensor:
    """``Tokens.attention`` of a block that will run on x [B, L, D], of which ``kept`` [B, L] are
    seen: [B * L].
    """
    rotary = begun.rotary.of_block(block) if begun.rotary else None
    timms = backbone.model.blocks[block]
    call = BlockCall(backbone.ops, timms, rotary, backbone.num_query_tokens)
    return masked_attention_received(call, x, kept > 0).flatten()


def _masked_sublayer(
    backbone: StagedViT, x: Tensor, index: int, kept: Tensor, begun: Tokens
) -> Tensor:
    """A sublayer on all tokens, [B, L, D], of which ``kept`` [B, L] are seen."""
    block, ops = backbone.model.blocks[index // 2], backbone.ops
    attn, steps = block.attn, ops.steps(block)
    if index % 2:
        return steps.mlp(block, x)
    source = steps.pre_attention(block, x)
    rope = begun.rotary.of_block(index // 2).slots() if begun.rotary else None
    q, k, v = (part.transpose(1, 2) for part in ops.project(block, source, rope))
    weights = masked_attention(q @ k.transpose(-1, -2) * attn.scale, kept)
    mixed = attn.norm((weights @ v).transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(source).sigmoid()
    return steps.residual(block, x, attn.proj(mixed))


def _finished(backbone: StagedViT, begun: Tokens, x: Tensor, kept: Tensor) -> Outputs:
    """Norm and head. A head that pools over patches pools over the kept ones."""
    ended = backbone.prune(replace(begun, x=x.flatten(0, 1)), kept[-1] > 0)
    return Outputs(
        logits=backbone.finish(ended),
        patches=backbone.model.norm(x)[:, backbone.num_prefix :],
        kept=kept,
    )


def losses(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,
    shares: Sequence[float],
    ratio_weight: float,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """The paper's four losses and their weighted sum, named "loss" (section 3.3).

    Args:
        student: outputs of the masked model.
        teacher: outputs of the dense model.
        labels: int64 [B], or mixed ones, float32 [B, classes].
        shares: target share of kept patches after each stage.
        ratio_weight: weight of the squared distance from these.
        label_smoothing: share of the target that is spread over all classes.
    """
    last = student.kept[-1].detach()  # a token isn't kept for its distance
    distance = (student.patches - teacher.patches).square().mean(2)
    wanted = torch.tensor(shares, device=labels.device)[:, None]
    terms = {
        "classification": F.cross_entropy(student.logits, labels, label_smoothing=label_smoothing),
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


def mask_monitor(model: Traced, validation: ImageSet, size: int, batch_size: int) -> Monitor:
    """What a training by keep masks shows, and evaluates ``model`` by, on ``size`` validation
    images.
    """

    def evaluate_now() -> dict[str, float]:
        result = evaluate(model, validation, size)
        return {"validation_accuracy": result.accuracy, "validation_gmacs": result.gmacs}

    return Monitor(
        evaluate_now,
        progress=lambda record: f"loss {record['loss']:.3f} kept {record['keep_ratio']:.3f}",
        activity=lambda: f"training on {batch_size} images",
    )
