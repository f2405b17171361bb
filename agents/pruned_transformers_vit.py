"""``PrunedTransformersViT``: a pruned ViT in the place of one of Hugging Face's transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from prunevit.agents import policy_file
from prunevit.agents.policies.policy import Policy
from prunevit.agents.policies.serialization import SavedModelError
from prunevit.agents.policy_library import find_policy
from prunevit.agents.pruned_vit import NO_GRAPH, Decide, PrunedViT, frozen
from prunevit.envs.vit.from_transformers import ImageSize, from_transformers, kind_of
from prunevit.envs.vit.staged_vit import StagedViT

# arguments of their forward pass that change nothing here if they are set
HARMLESS = {"interpolate_pos_encoding", "return_dict"}


class PrunedTransformersViT(PrunedViT):
    """A pruned ViT whose forward pass takes and returns what a model of transformers does.

    Everything else is as in ``PrunedViT``; ``trace`` also tells which patches survived. ``prune``
    makes one of a model of transformers.

    Args:
        backbone: the staged timm model that ``from_transformers`` made of ``theirs``.
        policy: decides which patches stay.
        theirs: the model of transformers. Its configuration and its pooling layer are copied.

    Attributes:
        config: configuration of ``theirs``.
        pooler: pooling layer of ``theirs``, None if it has none.
    """

    def __init__(self, backbone: StagedViT, policy: Policy | Decide, theirs: nn.Module) -> None:
        super().__init__(backbone, policy)
        self._output = kind_of(theirs).output
        # what CLIP calls the last hidden state comes before its last norm
        self._normed = not type(theirs).__name__.startswith("CLIP")
        self.config: Any = copy.deepcopy(theirs.config)
        pooler = getattr(theirs, "pooler", None)
        self.pooler = None if pooler is None else copy.deepcopy(pooler).train(self.training)

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:  # type: ignore[override]
        """Runs the model on images.

        Args:
            pixel_values: float [B, C, H, W].
            options: of the forward pass in transformers. Only ``return_dict`` has an effect.

        Returns:
            transformers' output of the model: ``last_hidden_state`` [B, L, D], with zeros for
            pruned patches, and ``pooler_output`` [B, D]; ``logits`` of a classifier;
            ``image_embeds`` and ``last_hidden_state`` of a model with a projection. As a tuple with
            ``return_dict=False``.

        Raises:
            ValueError: an option asks for what a pruned model doesn't have, such as attentions, or
                as in ``PrunedViT.forward``.
        """
        if isinstance(pixel_values, FakeTensor) or torch.jit.is_tracing():
            raise RuntimeError(NO_GRAPH)
        asked = [
            name for name, value in options.items() if value is not None and value is not False
        ]
        asked = [name for name in asked if name not in HARMLESS]
        if asked:
            raise ValueError(f"a pruned model doesn't support {', '.join(asked)}")
        output = self._classify_as_theirs(pixel_values.to(self.backbone.dtype))
        return output.to_tuple() if options.get("return_dict") is False else output

    # as in ``PrunedViT._classify``
    @torch.compiler.disable(recursive=False)
    def _classify_as_theirs(self, images: Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
        from transformers.models.clip.modeling_clip import CLIPVisionModelOutput

        tokens, _ = self._run(images)
        if self._output == "logits":
            return ImageClassifierOutput(logits=self.backbone.finish(tokens))
        last = self.backbone.features(tokens, self._normed)
        if self._output == "image_embeds":
            embeds = self.backbone.finish(tokens)
            return CLIPVisionModelOutput(image_embeds=embeds, last_hidden_state=last)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(last)
        elif self._pools:
            pooled = self.backbone.finish(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled)

    @property
    def _pools(self) -> bool:
        """Whether their model without a pooling layer of its own pools."""
        has_head = getattr(self.config, "vision_use_head", True)
        return has_head and self.config.model_type not in ("vit", "deit")

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @classmethod
    def from_policy(
        cls, vit: nn.Module, file: str | Path, img_size: ImageSize | None = None
    ) -> PrunedTransformersViT:
        """Prunes a model of transformers by a policy that ``save_policy`` wrote.

        Args:
            vit: the model, of the architecture that the policy was trained for.
            file: the file, or the name of one that comes with the package.
            img_size: size of the images, by default that of the model's configuration.

        Raises:
            SavedModelError: there is neither such a file nor such a name, the file is damaged, or
                its policy is one for another backbone.
            UnsupportedBackboneError: timm has no such model.
        """
        own = from_transformers(vit, img_size)
        backbone, policy = policy_file.read_policy(find_policy(file), own)
        return cls(backbone, frozen(policy), vit).eval()

    def as_timm(self) -> PrunedViT:
        """The same model with timm's outputs, which can be saved; it shares all weights."""
        return PrunedViT(self.backbone, self.policy)

    def _save_pretrained(self, save_directory: Path) -> NoReturn:
        raise SavedModelError(
            "a pruned model of transformers can't be saved as such: save model.as_timm(), which "
            "has timm's outputs, or the policy alone by save_policy"
        )
