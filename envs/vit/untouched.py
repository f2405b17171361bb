"""Whether a part of a backbone is as timm made it, so that its arithmetic may be done another way.

Packed rows, oneDNN's kernels and chunks of images give what timm's own modules give. They call
fewer modules, though, and with tensors of other shapes. Nobody notices as long as nothing but
timm's own code runs in those modules. Hooks, replaced forwards, layers of other classes, quantised
weights and dropout in training all do notice: modules that have any are called as timm calls them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import timm.layers
import torch
from timm.layers import Attention, activations
from timm.models import eva, vision_transformer, vitamin
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

# classes that work on each row by itself, or whose steps the runtime knows
_TORCH = (
    nn.Linear, nn.Identity, nn.Dropout, nn.LayerNorm, nn.RMSNorm,
    nn.GELU, nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.Tanh, nn.Sigmoid,
    nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.Softplus,
)  # fmt: skip
_TIMM_LAYERS = (
    "AttentionPoolLatent", "AttentionPoolPrr", "AttentionRope", "DropPath", "GluMlp", "LayerNorm",
    "LayerNormFp32", "LayerScale", "Mlp", "RmsNorm", "RmsNormFp32", "SimpleNorm",
    "SimpleNormFp32", "SwiGLU",
)  # fmt: skip
_BLOCKS = (
    vision_transformer.Block, vision_transformer.ResPostBlock, vision_transformer.LayerScale,
    eva.EvaBlock, eva.EvaBlockPostNorm, eva.EvaAttention, Attention, vitamin.GeGluMlp,
)  # fmt: skip


def _known_classes() -> dict[type[nn.Module], Any]:
    """Each class with the forward that it had when this module was imported."""
    classes: list[type[nn.Module]] = [*_TORCH, *_BLOCKS]
    classes += [getattr(timm.layers, name) for name in _TIMM_LAYERS if hasattr(timm.layers, name)]
    # PReLU has weights for channels, which it finds by the number of dimensions
    classes += [
        cls
        for cls in vars(activations).values()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and not issubclass(cls, nn.PReLU)
    ]
    # unless somebody replaced it before
    own = ("timm.", "torch.nn.")
    return {cls: cls.forward for cls in classes if cls.forward.__module__.startswith(own)}


KNOWN = _known_classes()


@torch.compiler.disable
def is_untouched(module: nn.Module, may_draw: bool = False) -> bool:
    """Whether ``module`` and all its submodules are timm's own, without anything added.

    False if any of them has hooks, a replaced forward, another class than those of timm's models,
    another attention scale, or parameters other than plain ones. Hooks on all modules together are
    left to ``has_global_hooks``.

    Args:
        module: a part of the model.
        may_draw: whether it may draw random numbers, as dropout does in training mode.
    """
    # half a microsecond a module: it runs for each module of a model in each pass
    own = module.__dict__
    cls = type(module)
    if KNOWN.get(cls) is not cls.forward or "forward" in own or has_own_hooks(module):
        return False
    for parameter in own["_parameters"].values():
        if parameter is not None and not is_plain(parameter):
            return False
    if "head_dim" in own and own["scale"] != own["head_dim"] ** -0.5:
        return False  # an attention scale that our kernels don't know
    if own["training"] and not may_draw and _draws(module):
        return False
    for child in own["_modules"].values():
        if child is not None and not is_untouched(child, may_draw):
            return False
    return True


# what of a model's class makes its forward pass
_FORWARD = (
    "__call__", "forward", "forward_features", "forward_head", "pool", "_pos_embed",
)  # fmt: skip


def find_class(module: Any, classes: Iterable[type]) -> Any:
    """The one of ``classes`` by whose forward pass ``module`` runs, or None.

    Frameworks swap a module's class for a subclass of their own (FSDP does). Those pass, but a
    subclass that overrides the forward pass doesn't.
    """
    for cls in type(module).__mro__:
        if cls in classes:
            return cls
        if any(name in vars(cls) for name in _FORWARD):
            return None
    return None


@torch.compiler.disable
def why_bypassed(model: Any) -> str | None:
    """What of the model as a whole would never run, since its parts are called one by one.

    Returns:
        the reason to refuse the model, or None.
    """
    for name, part in (("the model", model), ("its blocks as a whole", model.blocks)):
        own = vars(part)
        if has_own_hooks(part):
            return (
                f"{name} has hooks, which would never run: register them on the blocks or other "
                "parts, or on the pruned model"
            )
        for method in ("forward", "forward_features"):
            if method in own:
                return f"the method {method} of {name} was replaced and would never run"
    return None


@torch.compiler.disable
def why_indivisible(block: nn.Module) -> str | None:
    """What of a block as a whole would never run if its attention and its MLP are run one by one.

    Returns:
        the reason not to, or None.
    """
    known = find_class(block, KNOWN)
    if "forward" in vars(block) or known is None or known.forward is not KNOWN[known]:
        return "its forward pass was replaced"
    return "it has hooks" if has_own_hooks(block) else None


def has_own_hooks(module: nn.Module) -> bool:
    """Whether hooks run around the module's forward or backward pass."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


@torch.compiler.disable
def has_global_hooks() -> bool:
    """Whether hooks were registered on all modules together, as tracing tools do."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a module or one of its submodules has hooks."""
    return has_global_hooks() or any(has_own_hooks(part) for part in module.modules())


def is_plain(tensor: Any) -> bool:
    """Whether a parameter is nothing but numbers: neither quantised nor sharded."""
    return type(tensor) is nn.Parameter or type(tensor) is Tensor


def is_random(model: nn.Module) -> bool:
    """Whether the same images may have another output next time.

    In training mode they may: dropout draws, batch norms learn, positions are jittered. A layer
    that was put into a model in evaluation mode may be in training mode, if it does none of that.
    """
    return model.training or any(part.training and _draws(part) for part in model.modules())


def _draws(module: Any) -> bool:
    """Whether a module that is in training mode draws random numbers."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    return getattr(module, "drop_prob", 0) > 0 or getattr(module, "attn_drop", _OFF).p > 0


_OFF = nn.Dropout(0.0)
