"""``model_data_config``: how images and labels are prepared for a backbone."""

from __future__ import annotations

from typing import Any

from timm.data import resolve_model_data_config
from torch import nn

from prunevit.envs.data.classes import ModelClasses
from prunevit.envs.vit.create import as_built
from prunevit.envs.vit.timm_models.heads import count_classes


def model_data_config(model: nn.Module) -> dict[str, Any]:
    """``timm.data.resolve_model_data_config``, but of the model as it is.

    timm reads image size, channels and classes from ``pretrained_cfg``, which describes the
    pretrained weights and not a model that was built with other arguments.

    Returns:
        timm's keys, and ``classes``, a ``ModelClasses``, if the model has a classifier.
    """
    config = as_built(resolve_model_data_config(model), model)
    if (classes := model_classes(model)) is not None:
        config["classes"] = classes
    return config


def model_classes(model: nn.Module) -> ModelClasses | None:
    """The classes of a model as it is; None if it has no classifier, or doesn't say how many."""
    # a PrunedViT has no head of its own, but says how many outputs it has
    count = count_classes(model) if hasattr(model, "head") else getattr(model, "num_classes", None)
    if not count:
        return None
    described: Any = getattr(model, "pretrained_cfg", None) or {}
    names = described.get("label_names")
    return ModelClasses(count, tuple(names) if names else None)
