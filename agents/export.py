"""Exports a pruned ViT for one image to ONNX, with dynamic numbers of surviving tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.policies.serialization import own_additions
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.observations import View
from prunevit.envs.vit.blocks import BlockCall, dense_block, masked_attention_received
from prunevit.envs.vit.execution import split_at_blocks
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.heads import (
    classify_prefix,
    is_head_untouched,
    pools_tokens,
)
from prunevit.envs.vit.tokens import Tokens
from prunevit.envs.vit.untouched import is_untouched

OPSET = 18


class ExportError(ValueError):
    """The pruned ViT can't be exported; the message says why."""


class OneImage(nn.Module):
    """A ``PrunedViT`` for one image, in operations that an exporter can follow.

    A batch of one needs no layout: its surviving rows are gathered, and go through timm's blocks.

    Args:
        model: the pruned ViT.

    Raises:
        ExportError: its policy is not a ``LearnedPolicy``, something was added to either, or its
            backbone merges patches, has rotary positions or pools over all tokens.
    """

    def __init__(self, model: PrunedViT) -> None:
        super().__init__()
        if type(model.policy) is not LearnedPolicy:
            raise ExportError(
                f"a {type(model.policy).__name__} can't be exported: only a LearnedPolicy can"
            )
        if model.backbone.on_prune == "merge":
            raise ExportError(
                "a model that merges what it prunes can't be exported, since exported attention "
                "takes each token for a single one: only on_prune='drop' can be"
            )
        if pools_tokens(model.backbone.model):
            raise ExportError(
                "the backbone pools over all of its tokens: only a head that reads the class token "
                "can be exported"
            )
        if model.backbone.dtype != torch.float32:
            raise ExportError(
                f"a model in {model.backbone.dtype} can't be exported: export it in float32"
            )
        if not all(is_untouched(block) for block in model.backbone.model.blocks):
            raise ExportError(
                "blocks with hooks, replaced or quantised layers can't be exported: remove or "
                "merge them"
            )
        added = own_additions(model.policy)
        if added is not None:
            raise ExportError(f"the policy can't be exported: {added}")
        self.backbone: StagedViT = model.backbone
        self.policy: LearnedPolicy = model.policy

    def forward(self, image: Tensor) -> Tensor:
        """Classifies an image [1, C, H, W]; logits [1, classes]."""
        backbone, policy = self.backbone, self.policy
        x, rotary = backbone.ops.embed(backbone.model, image)
        if rotary is not None:
            raise ExportError("a backbone that rotates positions can't be exported")
        everyone = torch.ones(1, backbone.num_slots, dtype=torch.bool, device=x.device)
        tokens = Tokens.of_slots(x, everyone)
        for stage, (start, stop) in enumerate(pairwise((0, *backbone.edges))):
            last = stage == backbone.num_stages
            tokens = self._run(tokens, start, stop, policy.needs_attention and not last)
            if not last:
                view = View(backbone, tokens, stage, torch.zeros(1, device=x.device))
                tokens = self._prune(tokens, self._decide(view))
        # what was put into a head may look at all tokens
        read = backbone.num_prefix if is_head_untouched(backbone.model) else None
        return classify_prefix(backbone.model, tokens.x[None, :read])

    def _decide(self, view: View) -> Tensor:
        view = self.policy.under_own_alpha(view)
        logits = self.policy.logits(view)
        return self.policy.keep(view, view.scatter(logits[:, 1] - logits[:, 0]))

    def _prune(self, tokens: Tokens, keep: Tensor) -> Tokens:
        prefix = self.backbone.num_prefix
        alive = torch.cat([tokens.alive[:, :prefix], tokens.alive[:, prefix:] & keep], dim=1)
        slot = alive[0].nonzero().squeeze(1)
        # rows are in the order of their slots, so a slot's row is the number of survivors before it
        row = alive[0].long().cumsum(0) - 1
        return replace(
            tokens,
            x=tokens.x.index_select(0, tokens.row.index_select(0, slot)),
            alive=alive,
            row=row.clamp(min=0),
            attention=None,
        )

    def _run(self, tokens: Tokens, start: int, stop: int, with_attention: bool) -> Tokens:
        backbone, image, attention = self.backbone, tokens.x[None], None
        torch._check(image.shape[1] > 0)  # the class token always stays
        blocks = split_at_blocks(start, stop)
        for i, sublayer in blocks:
            block = backbone.model.blocks[i]
            call = BlockCall(
                backbone.ops, block, None, backbone.num_query_tokens, sublayer=sublayer
            )
            if with_attention and i == blocks[-1][0]:
                whole = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
                attention = masked_attention_received(call, image, whole).squeeze(0)
            # without a mask, whose dynamic length an exporter would compare with 1
            image = dense_block(call, image, None, None)
        return replace(tokens, x=image.squeeze(0), attention=attention)


def export_onnx(model: PrunedViT, file: Path | str) -> None:
    """Exports ``model`` for images [1, C, H, W], with input "image" and output "logits".

    Needs ``pip install -e '.[onnx]'``.

    Raises:
        ExportError: the model can't be exported.
    """
    one = OneImage(model).eval()
    device = model.backbone.device
    image = torch.zeros(1, *model.backbone.image_shape, device=device)
    program = torch.onnx.export(
        one,
        (image,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
    )
    assert program is not None
    program.save(str(file))
