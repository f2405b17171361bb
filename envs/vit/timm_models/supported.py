"""Which timm models can run on part of their tokens, and why others can't."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from prunevit.envs.vit.timm_models.eva import EVA
from prunevit.envs.vit.timm_models.ops import ModelOps
from prunevit.envs.vit.timm_models.vision_transformer import VIT
from prunevit.envs.vit.untouched import find_class, why_bypassed

SUPPORTED = (VIT, EVA)
# where wrappers keep the model itself, and how to get it
WRAPPERS = {
    "module": "model.module",  # DataParallel, DistributedDataParallel, timm's ModelEma
    "_orig_mod": "the model before torch.compile (model._orig_mod)",
    "_fsdp_wrapped_module": "model.module",
    "model": "model.model",
}


class UnsupportedBackboneError(ValueError):
    """The model can't run on part of its tokens; the message says why."""


def model_ops(model: Any) -> ModelOps:
    """Looks up the operations of a supported model.

    Raises:
        UnsupportedBackboneError: the model is not supported; the message says why.
    """
    reason = why_unsupported(model)
    if reason is not None:
        raise UnsupportedBackboneError(
            f"{type(model).__name__} can't be run on a part of its tokens: {reason}. "
            "Supported are timm's plain VisionTransformer models (ViT, DeiT, DeiT-3, DINOv2, CLIP, "
            "SigLIP and others) and its Eva models (EVA, EVA-02, DINOv3, PE and others)."
        )
    return next(ops for ops in SUPPORTED if find_class(model, ops.models))


def why_unsupported(model: Any) -> str | None:
    """The reason why ``model`` is not supported, or None if it is."""
    for ops in SUPPORTED:
        if find_class(model, ops.models):
            return why_bypassed(model) or _unsupported_part(ops, model)
    return _unknown_class(model)


def attention_width(model: Any) -> int:
    """The width of the model's attention: number of heads times head size."""
    attn = model.blocks[0].attn
    return attn.num_heads * attn.head_dim


def some_tensor(model: nn.Module) -> Tensor:
    """A parameter of ``model``, whose device and type are taken for those of the whole model.

    The replicas that ``nn.DataParallel`` makes have tensors for attributes, and no parameters.
    """
    for parameter in model.parameters():
        return parameter
    return next(
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.is_floating_point()
    )


def _unknown_class(model: Any) -> str:
    """The reason why a model of an unknown class is not supported."""
    reason = "its forward pass is not that of timm's VisionTransformer or Eva"
    if not isinstance(model, nn.Module):
        return reason
    if hasattr(model, "merge_and_unload"):
        return (
            "it wraps a model with adapters: give model.get_base_model(), which has them in its "
            "layers, or model.merge_and_unload()"
        )
    for attribute, way in WRAPPERS.items():
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module) and any(find_class(inner, ops.models) for ops in SUPPORTED):
            return f"it wraps a {type(inner).__name__}: give {way}, then wrap the pruned model"
    if any(
        "rel_pos" in name or "relative_position" in name for name, _ in model.named_parameters()
    ):
        return (
            f"{reason}, and its attention adds a bias for each pair of places (relative "
            "positions), which would have to follow the tokens that survive"
        )
    return f"{reason}, which is a plain sequence of blocks"


def _unsupported_part(ops: ModelOps, model: Any) -> str | None:
    """The reason why a model of a known class is not supported, or None if it is."""
    if not len(model.blocks):
        return "it has no blocks"
    for i, block in enumerate(model.blocks):
        if not find_class(block, ops.blocks):
            return f"block {i} is a {type(block).__name__}, none of {_names(ops.blocks)}"
        if not find_class(block.attn, ops.attentions):
            return (
                f"the attention of block {i} is a {type(block.attn).__name__}, "
                f"none of {_names(ops.attentions)}"
            )
    patches = model.patch_embed
    padded = getattr(patches, "dynamic_img_pad", False)
    if padded and patches.dynamic_feat_size(patches.img_size) != tuple(patches.grid_size):
        return (
            f"it pads images of {patches.img_size} pixels to more patches than its grid of "
            f"{patches.grid_size} has: choose a multiple of the patch size as img_size"
        )
    return None


def _names(classes: Any) -> str:
    return "timm's " + ", ".join(cls.__name__ for cls in classes)
