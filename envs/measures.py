"""How good the answers of a pruned model are, and by what that can be measured."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from prunevit.envs.data.image_set import ImageSet

Measure = Literal["accuracy", "agreement", "cosine"]


def measure_for(num_classes: int, images: ImageSet) -> Measure:
    """What tells how good a model is on ``images``.

    - cosine: cosine similarity to the embedding of the dense model, for a model without a
      classifier (``num_classes`` of 0).
    - agreement: whether the prediction is that of the dense model, for images without labels.
    - accuracy: whether the prediction is the label.
    """
    if not num_classes:
        return "cosine"
    return "accuracy" if images.num_classes else "agreement"


def measure(kind: Measure, outputs: Tensor, labels: Tensor, dense: Tensor | None) -> Tensor:
    """Measures the answers of a pruned model.

    Args:
        kind: by what.
        outputs: logits [B, classes], or embeddings [B, D].
        labels: int64 [B]; read for accuracy only.
        dense: outputs of the unpruned model, of the same shape; not read for accuracy.

    Returns:
        float32 [B].
    """
    if kind == "accuracy":
        return (outputs.argmax(1) == labels).float()
    assert dense is not None
    if kind == "agreement":
        return (outputs.argmax(1) == dense.argmax(1)).float()
    return F.cosine_similarity(outputs.float(), dense.float())
