"""The part of a backbone that keeps its weights, and what it makes of images, computed once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.tensor_cache import TensorCache
from prunevit.envs.vit.timm_models.rope import RotaryEmbedding
from prunevit.trainers.common.classification import AFTER_BLOCKS, train_from
from prunevit.trainers.common.run import TrainingError

FROZEN_BLOCKS = re.compile(r"blocks:(\d+)")
# not part of what is frozen: patches that are left out are drawn anew for each step
LEARNING = (*AFTER_BLOCKS, "head_drop", "blocks", "patch_drop")


def frozen_blocks(what: str) -> int | None:
    """N of the setting "blocks:N"; None for "all" and "none"."""
    found = FROZEN_BLOCKS.fullmatch(what)
    return int(found[1]) if found else None


def freeze(model: Any, what: str) -> None:
    """Lets the weights of ``model`` that ``what`` names keep their values.

    Args:
        model: timm's ViT.
        what: "none", "all" (but for the classifier), or "blocks:N" (all before block N).

    Raises:
        TrainingError: the model has fewer blocks.
    """
    if what == "none":
        return
    model.requires_grad_(False)
    first = frozen_blocks(what)
    if first is None:
        model.get_classifier().requires_grad_(True)
        return
    blocks = getattr(model, "blocks", ())
    if first > len(blocks):
        raise TrainingError(f"--freeze {what}: the backbone has {len(blocks)} blocks")
    train_from(model, first)


class FrozenPart:
    """The part of a model that ``freeze`` froze: it turns images into features.

    Args:
        model: timm's model in evaluation mode, with whose weights features are computed.
        what: "all" or "blocks:N", as for ``freeze``.

    Raises:
        UnsupportedBackboneError: the model can't be stopped before a block.
    """

    def __init__(self, model: Any, what: str) -> None:
        self._model = model
        first = frozen_blocks(what)
        # a model stops before a block: the last one is computed each time, even if it is frozen
        self._first = None if first is None else min(first, len(model.blocks) - 1)
        self._staged = None if self._first is None else StagedViT(model, (self._first,))
        self._rotary: RotaryEmbedding | None = None

    def stay_in_evaluation_mode(self, model: Any) -> None:
        """Puts the frozen part of ``model``, which may be a copy in training mode, in evaluation
        mode: neither dropout nor statistics of batches vary features then.
        """
        learning = LEARNING if self._staged is not None else ("patch_drop",)
        for name, child in model.named_children():
            if name not in learning:
                child.eval()
        if self._first is not None:
            model.blocks[: self._first].eval()

    @torch.no_grad()
    def features(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What the frozen part makes of images.

        Args:
            images: float [B, C, H, W].
            dtype: of autocast; None turns it off.

        Returns:
            tokens before the first block that learns, [B, L, D], or with "all" what the classifier
            reads, [B, D].
        """
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            if self._staged is None:
                features = self._model.forward_features(images)
                return self._model.forward_head(features, pre_logits=True)
            tokens = self._staged.begin(images, with_attention=False)
        self._rotary = tokens.rotary
        return tokens.x.unflatten(0, (len(images), -1))

    def rest_of(self, model: Any) -> Callable[[Tensor], Tensor]:
        """What ``model``, which may be a copy that has learned, makes of features: logits."""
        if self._first is None:
            return model.get_classifier()
        staged = StagedViT(model, (self._first,))

        def rest(features: Tensor) -> Tensor:
            tokens = staged.restore(features, None, self._rotary)
            keep = tokens.alive[:, staged.num_prefix :]
            return staged.finish(staged.advance(tokens, keep, 0, with_attention=False))

        return rest


class CachedFeatures:
    """An ``ImageSet`` of features in place of images, computed once for as many as fit in memory.

    Args:
        images: the images, the same on every load.
        features: images [n, C, H, W] on ``device`` -> their features [n, ...].
        device: where features are computed.
        limit: bytes of host memory.
    """

    def __init__(
        self,
        images: ImageSet,
        features: Callable[[Tensor], Tensor],
        device: torch.device,
        limit: float,
    ) -> None:
        self.num_classes, self.class_names = images.num_classes, images.class_names
        self._images = images
        self._features = features
        self._device = device
        self._cache = TensorCache(self._compute, len(images), limit)

    def __len__(self) -> int:
        return len(self._images)

    def _compute(self, indices: Tensor) -> dict[str, Tensor]:
        images, labels = self._images.load(indices)
        features = self._features(images.to(self._device))
        return {"features": features, "labels": labels.to(self._device)}

    def load(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, ...] on the device of the frozen part, and labels int64 [n]."""
        tensors = self._cache.load(torch.as_tensor(indices), self._device)
        return tensors["features"], tensors["labels"].cpu()
