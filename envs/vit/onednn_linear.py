"""Linear layers and MLPs through oneDNN, which is faster on a CPU for few rows."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from prunevit.envs.vit.untouched import is_plain, is_untouched

# Measured on two AVX2 cores, widths of 64 to 768. Below this many multiply-accumulates, oneDNN's
# fixed cost outweighs what it saves. For 24 to 200 rows of width 384 or more it is 1.3 to 1.5 times
# as fast; for thousands of rows, at most 1.1 times.
MIN_MACS = 1 << 22
MAX_ROWS = 256
# oneDNN builds a kernel of about 0.7 MB in 0.8 ms for each new number of rows. Rows are padded to a
# multiple of this, so that it builds few.
ROW_STEP = 8

_MKLDNN = torch.ops.mkldnn
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(_MKLDNN, "_linear_pointwise")

if HAS_ONEDNN and _MKLDNN._linear_pointwise not in flop_registry:  # a module can be reloaded
    # so that FLOP counters count these operations too

    @register_flop_formula(_MKLDNN._linear_pointwise)
    def _flops(rows: Any, weight: Any, *arguments: Any, **options: Any) -> int:
        count = 2 * weight[0] * weight[1]
        for size in rows[:-1]:
            count *= size
        return count


def uses_onednn(layer: nn.Module, x: Tensor) -> bool:
    """Whether ``linear`` runs ``layer`` on ``x`` [..., in] through oneDNN.

    It does for plain float32 weights on a CPU, without gradients, if the product is large enough
    and nobody has put anything in the layer's way.
    """
    if not HAS_ONEDNN or type(layer) is not nn.Linear:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # compilers and exporters know nn.Linear, not oneDNN's operator
    weight = layer.weight
    rows = x.numel() // layer.in_features
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and 0 < rows <= MAX_ROWS
        and rows * weight.numel() >= MIN_MACS
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and is_plain(weight)
        and is_untouched(layer)
    )


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Computes ``layer(x)``."""
    if not uses_onednn(layer, x):
        return layer(x)
    rows, count = _padded(x)
    return _onednn(layer, rows)[:count].unflatten(0, x.shape[:-1])


def mlp(layer: nn.Module, x: Tensor) -> Tensor:
    """Computes ``layer(x)`` for the MLP of a block.

    Through oneDNN, the first layer of timm's ``Mlp`` and its GELU are one operation.
    """
    parts: Any = layer
    if type(layer) is not Mlp or layer.training or not uses_onednn(parts.fc1, x):
        return layer(x)
    if not is_untouched(layer):
        return layer(x)
    rows, count = _padded(x)
    if type(parts.act) is nn.GELU:
        hidden = _onednn(parts.fc1, rows, "gelu", parts.act.approximate)
    else:
        hidden = parts.act(_onednn(parts.fc1, rows))
    out = linear(parts.fc2, parts.norm(hidden))
    return out[:count].unflatten(0, x.shape[:-1])


def _padded(x: Tensor) -> tuple[Tensor, int]:
    """Flattens ``x`` [..., D] to rows padded with zeros; returns them and the number of x's own."""
    rows = x.flatten(0, -2)
    return F.pad(rows, (0, 0, 0, -len(rows) % ROW_STEP)), len(rows)


def _onednn(layer: Any, rows: Tensor, activation: str = "none", algorithm: str = "") -> Tensor:
    weight, bias = layer.weight, layer.bias
    out = _MKLDNN._linear_pointwise(rows, weight, bias, activation, [], algorithm)
    assert isinstance(out, Tensor)
    return out
