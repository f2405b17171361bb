"""Linear layers the way a CPU likes them: few rows through oneDNN, very many in parts."""

from __future__ import annotations

import math
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
# An MLP's hidden rows of 32 MiB and more come from the system anew each time, page by page, and
# leave the caches before they are read again. In parts of at most 16 MiB an MLP is 1.2 to 1.5 times
# as fast for 12,800 rows of width 192 and 384, 1.1 times for 4,000 of 768; few rows gain nothing.
HIDDEN_BYTES = 1 << 24

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


def runs_by_onednn(layer: nn.Module, x: Tensor) -> bool:
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


def runs_in_parts(layer: nn.Module, x: Tensor) -> bool:
    """Whether ``mlp`` cuts ``x`` [..., in]: for timm's plain MLP on a CPU, where nobody asks for
    gradients and the hidden rows are large.
    """
    if type(layer) is not Mlp or layer.training or x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    return _hidden_bytes(layer, x) > HIDDEN_BYTES and not _watched(layer)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``."""
    if not runs_by_onednn(layer, x):
        return layer(x)
    rows, count = _padded(x)
    return _onednn(layer, rows)[:count].unflatten(0, x.shape[:-1])


def mlp(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` of a block's MLP. Of timm's plain one, through oneDNN the first product and its
    GELU are one; very many rows go through it in parts.
    """
    parts: Any = layer
    if runs_in_parts(layer, x):
        rows = x.flatten(0, -2)
        out = rows.new_empty(len(rows), parts.fc2.out_features)
        count = math.ceil(_hidden_bytes(layer, x) / HIDDEN_BYTES)
        for part, place in zip(rows.tensor_split(count), out.tensor_split(count), strict=True):
            place.copy_(layer(part))
        return out.unflatten(0, x.shape[:-1])
    if type(layer) is not Mlp or layer.training or not runs_by_onednn(parts.fc1, x):
        return layer(x)
    if _watched(layer):
        return layer(x)
    rows, count = _padded(x)
    if type(parts.act) is nn.GELU:
        hidden = _onednn(parts.fc1, rows, "gelu", parts.act.approximate)
    else:
        hidden = parts.act(_onednn(parts.fc1, rows))
    out = linear(parts.fc2, parts.norm(hidden))
    return out[:count].unflatten(0, x.shape[:-1])


def _hidden_bytes(layer: Any, x: Tensor) -> int:
    rows = x.numel() // layer.fc1.in_features
    return rows * layer.fc1.out_features * x.element_size()


def _watched(layer: nn.Module) -> bool:
    """Whether somebody waits for what passes through a module or its parts."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())


def _padded(x: Tensor) -> tuple[Tensor, int]:
    """[..., D] as rows, zeros behind them up to a multiple of ``ROW_STEP``; how many are x's."""
    rows = x.flatten(0, -2)
    return F.pad(rows, (0, 0, 0, -len(rows) % ROW_STEP)), len(rows)


def _onednn(layer: Any, rows: Tensor, activation: str = "none", algorithm: str = "") -> Tensor:
    weight, bias = layer.weight, layer.bias
    out = _MKLDNN._linear_pointwise(rows, weight, bias, activation, [], algorithm)
    assert isinstance(out, Tensor)
    return out
