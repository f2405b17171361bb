"""Linear layers on few rows: through oneDNN, where a CPU's default matrix product is slow."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

# Multiply-accumulates below which oneDNN's fixed cost weighs more than what it saves. Measured on
# two AVX2 cores, widths of 64 to 768: half as fast at 1e6, about as fast at 5e6, faster above; for
# 24 to 200 rows of width 384 and more 1.3 to 1.5 times as fast, for thousands 1.1 times.
WORTH_MACS = 1 << 22

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
    if not HAS_ONEDNN or torch.compiler.is_compiling() or type(layer) is not nn.Linear:
        return False
    weight = layer.weight
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * layer.out_features >= WORTH_MACS
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``."""
    if runs_by_onednn(layer, x):
        return _onednn(layer, x, "none", "")
    return layer(x)


def mlp(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` of a block's MLP, GELU in one with the first product where timm's is plain."""
    if type(layer) is not Mlp or layer.training or not runs_by_onednn(layer.fc1, x):
        return layer(x)
    if type(layer.act) is nn.GELU:
        approximate = layer.act.approximate
        assert isinstance(approximate, str)
        hidden = _onednn(layer.fc1, x, "gelu", approximate)
    else:
        hidden = layer.act(linear(layer.fc1, x))
    return linear(layer.fc2, layer.norm(hidden))


def _onednn(layer: Any, x: Tensor, activation: str, algorithm: str) -> Tensor:
    out = _MKLDNN._linear_pointwise(x, layer.weight, layer.bias, activation, [], algorithm)
    assert isinstance(out, Tensor)
    return out
