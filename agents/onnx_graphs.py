"""A ``PrunedViT`` in operations that an exporter can follow: ``OneImage`` and ``ImageBatch``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.agents.policies.actor_critic import AgentAttention, CommunicatingActor
from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.agents.policies.heuristics import AttentionThreshold, KeepAll, TopK
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.policies.serialization import own_additions
from prunevit.agents.pruned_transformers_vit import PrunedTransformersViT
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.observations import View
from prunevit.envs.vit.blocks import BlockCall, dense_block, masked_received, observed_block
from prunevit.envs.vit.execution import split_at_blocks
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.heads import (
    classify_padded,
    classify_prefix,
    is_head_untouched,
    pools_tokens,
)
from prunevit.envs.vit.tokens import Tokens
from prunevit.envs.vit.untouched import is_untouched

# in the graph these answer as they do in PyTorch; others are traced, which may miss what they do
KNOWN_POLICIES = (KeepAll, TopK, AttentionThreshold, DynamicViTPolicy, LearnedPolicy)


class ExportError(ValueError):
    """The pruned ViT can't be exported; the message says why."""


class OneImage(nn.Module):
    """A ``PrunedViT`` for one image, in operations that an exporter can follow.

    A batch of one needs no layout: its surviving rows are gathered, and go through timm's blocks.

    Args:
        model: the pruned ViT.

    Raises:
        ExportError: it has a policy or a backbone that has no such form; the message says why.
    """

    def __init__(self, model: PrunedViT) -> None:
        super().__init__()
        reason = self._why_not(model)
        if reason is not None:
            raise ExportError(reason)
        self.backbone: StagedViT = model.backbone
        self.policy: Any = model.policy

    def _why_not(self, model: PrunedViT) -> str | None:
        """Why ``model`` can't be exported, or None if it can."""
        if not isinstance(model, PrunedViT):
            return f"a {type(model).__name__} can't be exported: only a PrunedViT can"
        if isinstance(model, PrunedTransformersViT):
            return (
                "a pruned model of transformers can't be exported with transformers' outputs: "
                "export model.as_timm()"
            )
        if model.backbone.on_prune == "merge" and not isinstance(self, ImageBatch):
            return (
                "a model that merges what it prunes is exported as an ImageBatch, of one image too"
            )
        return _why_no_policy(model.policy, model.backbone) or _why_no_backbone(model.backbone)

    def forward(self, images: Tensor, alpha: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Classifies images.

        Args:
            images: [B, C, H, W].
            alpha: for a policy that observes it, float32 [B]; its own by default. In a graph also
                [1] for all images.

        Returns:
            logits [B, classes], and which patches survived each stage, bool [B, T, N].
        """
        backbone, policy = self.backbone, self.policy
        tokens = self._begin(images)
        if alpha is None:
            alpha = images.new_full(images.shape[:1], own_alpha(policy) or 0.0)
        else:
            # one alpha is broadcast to all images by this in a graph
            alpha = torch.where(tokens.alive[:, 0], alpha, 0.0)
        needs_attention = getattr(policy, "needs_attention", True)
        kept = []
        for stage, (start, stop) in enumerate(pairwise((0, *backbone.edges))):
            last = stage == backbone.num_stages
            tokens = self._run(tokens, start, stop, needs_attention and not last)
            if not last:
                view = View(backbone, tokens, stage, alpha, images=images)
                tokens = self._prune(tokens, self._decide(view))
                kept.append(tokens.alive[:, backbone.num_prefix :])
        return self._classify(tokens), torch.stack(kept, dim=1)

    def _begin(self, images: Tensor) -> Tokens:
        backbone = self.backbone
        x, rotary = backbone.ops.embed(backbone.model, images)
        everyone = x.new_ones(images.shape[0], backbone.num_slots, dtype=torch.bool)
        return replace(Tokens.of_slots(x, everyone), rotary=rotary)

    def _classify(self, tokens: Tokens) -> Tensor:
        backbone, model, x = self.backbone, self.backbone.model, tokens.x[None]
        if backbone.keeps_last_patch:
            torch._check(x.shape[1] > backbone.num_prefix)
        # what was put into a head may look at all tokens
        if not pools_tokens(model) and is_head_untouched(model):
            x = x[:, : backbone.num_prefix]
        return model.forward_head(model.norm(x))

    def _decide(self, view: View) -> Tensor:
        policy = self.policy
        # without a look at the values, which a graph can't take
        if type(policy) is LearnedPolicy:
            logits = self._logits(view)
            return policy.keep(view, view.scatter(logits[:, 1] - logits[:, 0]))
        if type(policy) is DynamicViTPolicy:
            return policy.choose(view, policy.margin(view))
        return policy(view)

    def _logits(self, view: View) -> Tensor:
        """A learned policy's logits for the living patches, [R, 2]."""
        actor, observation = self.policy.actor, view.living(self.policy.fields)
        if not isinstance(actor, CommunicatingActor):
            return actor(observation)
        features = _among_agents(actor.among_agents, actor.net[:3](observation), view)
        return actor.with_prior(actor.net[3:](features), observation)

    def _prune(self, tokens: Tokens, keep: Tensor) -> Tokens:
        alive, prefix = self.backbone.survivors(tokens, keep), self.backbone.num_prefix
        slot = alive[0].nonzero().squeeze(1)
        source = tokens.row.index_select(0, slot)
        # rows are in the order of their slots, so a slot's row is the number of survivors before it
        row = alive[0].long().cumsum(0) - 1
        rotary = tokens.rotary
        if rotary is not None:
            patch = source[prefix:] - prefix
            rotary = replace(rotary, sin_cos=rotary.sin_cos.index_select(2, patch))
        return replace(
            tokens,
            x=tokens.x.index_select(0, source),
            alive=alive,
            row=row.clamp(min=0),
            attention=None,
            rotary=rotary,
        )

    def _run(self, tokens: Tokens, start: int, stop: int, with_attention: bool) -> Tokens:
        backbone, images, attention = self.backbone, self._images(tokens), None
        valid, mask = self._valid(tokens)
        log_size = None if tokens.size is None else tokens.size.log()
        if mask is not None and log_size is not None:
            mask = log_size.view(mask.shape).masked_fill(~mask, -torch.inf)
        blocks = split_at_blocks(start, stop)
        for i, sublayer in blocks:
            block = backbone.model.blocks[i]
            rotary = tokens.rotary.of_block(i) if tokens.rotary else None
            call = BlockCall(
                backbone.ops, block, rotary, backbone.num_query_tokens, log_size, sublayer
            )
            rope = rotary.patches(images.shape[0]) if rotary else None
            if with_attention and i == blocks[-1][0]:
                images, q, k = observed_block(call, images, mask, rope)
                attention = masked_received(call, q, k, valid).flatten()
            else:
                images = dense_block(call, images, mask, rope)
        return replace(tokens, x=images.flatten(0, 1), attention=attention)

    def _images(self, tokens: Tokens) -> Tensor:
        """The rows of each image, [B, n, D]."""
        torch._check(tokens.x.shape[0] > 0)  # the class token or a patch always stays
        return tokens.x[None]

    def _valid(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """Which rows of each image hold tokens, [B, n]; and as the mask of its attention, if some
        don't.
        """
        # without a mask, whose dynamic length an exporter would compare with 1
        return tokens.x.new_ones(1, tokens.x.shape[0], dtype=torch.bool), None


@dataclass(frozen=True)
class PaddedTokens(Tokens):
    """Tokens of images that are padded to the longest of them.

    Attributes:
        valid: which rows of each image hold its tokens, which come first, bool [B, n]. None as long
            as all do.
    """

    valid: Tensor | None = None


class ImageBatch(OneImage):
    """A ``PrunedViT`` for any number of images, in operations that an exporter can follow.

    After each stage images are padded to the longest of the batch.
    """

    def _why_not(self, model: PrunedViT) -> str | None:
        if (reason := super()._why_not(model)) is not None:
            return reason
        if is_head_untouched(model.backbone.model):
            return None
        if model.backbone.on_prune == "merge":
            return (
                "a head with hooks, replaced or quantised layers can't be exported with a model "
                "that merges what it prunes: it would see padding"
            )
        return (
            "a head with hooks, replaced or quantised layers would see the padding of a batch: "
            "export the model for one image (batch='one')"
        )

    def _begin(self, images: Tensor) -> Tokens:
        tokens = super()._begin(images)
        return PaddedTokens(tokens.x, tokens.alive, tokens.row, rotary=tokens.rotary)

    def _classify(self, tokens: Tokens) -> Tensor:
        model, images = self.backbone.model, self._images(tokens)
        if not pools_tokens(model):
            return classify_prefix(model, images[:, : self.backbone.num_prefix])
        size = None if tokens.size is None else tokens.size.view(images.shape[:2])
        return classify_padded(model, model.norm(images), self._valid(tokens)[0], size)

    def _prune(self, tokens: Tokens, keep: Tensor) -> Tokens:
        alive = self.backbone.survivors(tokens, keep)
        if self.backbone.on_prune == "merge":
            tokens = self._merge(tokens, alive)
        images, slots = alive.shape
        lengths = alive.sum(1)
        # an exporter would compare 1 with the length of what it broadcasts, and the number of
        # patches, of which rotary positions are taken, with 0
        shortest = max(2, self.backbone.num_prefix + 1)
        longest: Any = lengths.max().clamp(min=shortest).item()
        torch._check(longest >= shortest)
        first = torch.arange(images, device=alive.device) * longest  # row of each image
        row = first[:, None] + (alive.long().cumsum(1) - 1).clamp(min=0)
        slot = alive.flatten().nonzero().squeeze(1)
        # padding repeats the first slot of all
        place = slot.new_zeros(images * longest)
        place = place.index_copy(0, row.flatten().index_select(0, slot), slot)
        source = tokens.row.index_select(0, place)
        return PaddedTokens(
            x=tokens.x.index_select(0, source),
            size=None if tokens.size is None else tokens.size.index_select(0, source),
            alive=alive,
            row=row.flatten(),
            rotary=tokens.rotary.take(place % slots) if tokens.rotary else None,
            valid=torch.arange(longest, device=alive.device) < lengths[:, None],
        )

    def _merge(self, tokens: Tokens, alive: Tensor) -> Tokens:
        """``merge_tokens`` before any token is removed, on all rows of each image."""
        images, (valid, _) = self._images(tokens), self._valid(tokens)
        # the rows of dead slots are others', to which they add nothing
        stays = tokens.x.new_zeros(tokens.x.shape[0]).scatter_add(
            0, tokens.row, alive.flatten().to(tokens.x.dtype)
        )
        stays = stays.view(valid.shape) > 0
        is_patch = torch.arange(valid.shape[1], device=alive.device) >= self.backbone.num_prefix
        target = stays & is_patch
        gone = valid & ~stays & is_patch & target.any(1, keepdim=True)
        unit = F.normalize(images, dim=2)
        similar = (unit @ unit.mT).masked_fill(~target[:, None], -torch.inf)
        into = similar.argmax(2)  # [B, n]
        size = torch.ones_like(images[..., 0])
        if tokens.size is not None:
            size = tokens.size.view(valid.shape)
        moved = size * gone
        total = size.scatter_add(1, into, moved)
        share = (moved / total.gather(1, into))[..., None]
        x = (images * (size / total)[..., None]).scatter_add(
            1, into[..., None].expand_as(images), images * share
        )
        return replace(tokens, x=x.flatten(0, 1), size=total.flatten())

    def _images(self, tokens: Tokens) -> Tensor:
        return tokens.x.unflatten(0, self._valid(tokens)[0].shape)

    def _valid(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        assert isinstance(tokens, PaddedTokens)
        if tokens.valid is None:
            return tokens.alive, None
        return tokens.valid, tokens.valid[:, None, None, :]


def _among_agents(layer: AgentAttention, features: Tensor, view: View) -> Tensor:
    """``AgentAttention`` among the living patches of each image, [R, W] -> [R, W].

    Padded to all patches instead of to the longest image, which only the values tell.
    """
    padded = view.scatter(layer.qkv(layer.norm(features)))  # [B, N, 3 * inner]
    q, k, v = padded.unflatten(2, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=view.alive[:, None, None])
    rows = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
    place = view.image * view.backbone.num_patches + view.patch
    return features + layer.output(rows.index_select(0, place))


def own_alpha(policy: Any) -> float | None:
    """The alpha of a policy that observes it; None of others."""
    return policy.alpha if type(policy) is LearnedPolicy else None


def _why_no_policy(policy: Any, backbone: StagedViT) -> str | None:
    """Why a policy can't be exported, or None if it can."""
    if type(policy) in (DynamicViTPolicy, LearnedPolicy) and (added := own_additions(policy)):
        return f"the policy can't be exported: {added}"
    if isinstance(policy, TopK) and policy.score == "random":
        return (
            "top-k by random scores can't be exported: in a graph, torch.rand would not draw what "
            "the policy's torch.Generator draws"
        )
    if isinstance(policy, TopK) and policy.score == "attention" and not backbone.has_attended(0):
        return (
            "top-k by attention before block 0 can't be exported: there all patches have the same, "
            "and which of them torch keeps is not defined"
        )
    return None


def _why_no_backbone(backbone: StagedViT) -> str | None:
    """Why a backbone can't be exported, or None if it can."""
    if pools_tokens(backbone.model) and not backbone.model.global_pool:
        return (
            "a backbone without pooling (global_pool='') can't be exported, since an image has no "
            "single output"
        )
    if backbone.dtype != torch.float32:
        return f"a model in {backbone.dtype} can't be exported: export it in float32"
    if not all(is_untouched(block) for block in backbone.model.blocks):
        return (
            "blocks with hooks, replaced or quantised layers can't be exported: remove or merge "
            "them"
        )
    return None
