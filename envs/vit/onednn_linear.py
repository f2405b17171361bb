"""Linear layers the way a CPU likes few rows: through oneDNN."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

# Measured on two AVX2 cores, widths of 64 to 768. Below so many multiply-accumulates oneDNN's fixed
# cost weighs more than what it saves; for 24 to 200 rows of width 384 and more it is 1.3 to 1.5
# times as fast, for thousands no more than 1.1 times.
WORTH_MACS = 1 << 22
MOST_ROWS = 256
# oneDNN builds a kernel, of about 0.7 MB in 0.8 ms, for each number of rows that it meets: rows are
# padded to multiples of this, so that it meets few.
ROW_STEP = 8

_MKLDNN = torch.ops.mkldnn
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(_MKLDNN, "_linear_pointwise")

if HAS_ONEDNN:
    # those who count the operations of a model that we run shall find these too

    @register_flop_formula(_MKLDNN._linear_pointwise)
    def _flops(rows: Any, weight: Any, *arguments: Any, **options: Any) -> int:
        count = 2 * weight[0] * weight[1]
        for size in rows[:-1]:
            count *= size
        return count


def uses_onednn(layer: nn.Module, x: Tensor) -> bool:
    """Whether ``linear`` takes ``x`` [..., in] through oneDNN: in float32 on a CPU, where nobody
    asks for gradients and the product is large enough.
    """
    if not HAS_ONEDNN or type(layer) is not nn.Linear:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # whoever reads the graph knows the layer, not this
    weight = layer.weight
    rows = x.numel() // layer.in_features
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and 0 < rows <= MOST_ROWS
        and rows * weight.numel() >= WORTH_MACS
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody waits for what passes through a module or its parts."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``."""
    if not uses_onednn(layer, x):
        return layer(x)
    rows, count = _padded(x)
    return _onednn(layer, rows)[:count].unflatten(0, x.shape[:-1])


def mlp(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` of a block's MLP. Of timm's plain one, through oneDNN the first product and its
    GELU are one.
    """
    parts: Any = layer
    if type(layer) is not Mlp or layer.training or not uses_onednn(parts.fc1, x):
        return layer(x)
    if has_hooks(layer):
        return layer(x)
    rows, count = _padded(x)
    if type(parts.act) is nn.GELU:
        hidden = _onednn(parts.fc1, rows, "gelu", parts.act.approximate)
    else:
        hidden = parts.act(_onednn(parts.fc1, rows))
    out = linear(parts.fc2, parts.norm(hidden))
    return out[:count].unflatten(0, x.shape[:-1])


def _padded(x: Tensor) -> tuple[Tensor, int]:
    """[..., D] as rows, zeros behind them up to a multiple of ``ROW_STEP``; how many are x's."""
    rows = x.flatten(0, -2)
    return F.pad(rows, (0, 0, 0, -len(rows) % ROW_STEP)), len(rows)


def _onednn(layer: Any, rows: Tensor, activation: str = "none", algorithm: str = "") -> Tensor:
    weight, bias = layer.weight, layer.bias
    out = _MKLDNN._linear_pointwise(rows, weight, bias, activation, [], algorithm)
    assert isinstance(out, Tensor)
    return out
