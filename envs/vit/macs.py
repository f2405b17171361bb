"""``Macs``: multiply-accumulates of a ViT, in closed form in the number of tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_flop_count,
)

from prunevit.envs.vit.layout import Layout
from prunevit.envs.vit.timm_models.heads import classify_pooled, classify_prefix, pools_tokens
from prunevit.envs.vit.timm_models.supported import attention_width, model_ops, some_tensor
from prunevit.envs.vit.untouched import is_plain

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

if _CPU_ATTENTION not in flop_registry:  # before torch 2.15 fused attention on a CPU counts as 0

    @register_flop_formula(_CPU_ATTENTION)
    def _attention_flops(q: Any, k: Any, v: Any, *arguments: Any, **options: Any) -> int:
        return sdpa_flop_count(q, k, v)


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of a backbone's parts, equal to those of ``torch.utils.flop_counter``.

    Attributes:
        embed: of the patch embedding of an image.
        per_token: of the linear layers of each block, for one token.
        width: attention width: heads times head size.
        head_fit: of the head: constant, linear and quadratic coefficient in the number of tokens.
    """

    embed: int
    per_token: tuple[int, ...]
    width: int
    head_fit: tuple[int, int, int]

    @staticmethod
    def of(model: Any, image_shape: tuple[int, int, int]) -> Macs:
        """Counts the parts of ``model`` for images of ``image_shape`` (C, H, W)."""
        some = some_tensor(model)
        blank = torch.zeros(1, *image_shape, dtype=some.dtype, device=some.device)
        sizes = [model.num_prefix_tokens + n for n in (1, 2, 3)]
        costs = []
        with in_eval_mode(model), _without_hooks(model):
            embedding = _count_macs(model, partial(model_ops(model).embed, model, blank))
            for n in sizes:
                layout = Layout.of(np.array([n]), attention_width(model), blank.device)
                rows = blank.new_zeros(n, model.embed_dim)
                if model.global_pool == "":
                    costs.append(0)  # without pooling there is no output to pay for
                elif pools_tokens(model):
                    costs.append(_count_macs(model, partial(classify_pooled, model, rows, layout)))
                else:
                    prefix = rows[None, : model.num_prefix_tokens]
                    costs.append(_count_macs(model, partial(classify_prefix, model, prefix)))
        # attention pooling is at most quadratic in the tokens, so three points fix the head's cost
        quadratic = (costs[2] - 2 * costs[1] + costs[0]) // 2
        linear = costs[1] - costs[0] - quadratic * (sizes[1] ** 2 - sizes[0] ** 2)
        constant = costs[0] - linear * sizes[0] - quadratic * sizes[0] ** 2
        return Macs(
            embed=embedding,
            per_token=tuple(count_linear_macs(block) for block in model.blocks),
            width=attention_width(model),
            head_fit=(constant, linear, quadratic),
        )

    def blocks(self, tokens: Any, start: int, stop: int) -> Any:
        """Of the blocks ``start`` to ``stop - 1`` on ``tokens`` tokens, an int or int64 tensor."""
        return tokens * sum(self.per_token[start:stop]) + tokens**2 * (
            2 * self.width * (stop - start)
        )

    def attention_received(self, tokens: Any) -> Any:
        """Of one query against ``tokens`` keys, which gives the attention that each receives."""
        return tokens * self.width

    def head(self, tokens: Any) -> Any:
        """Of the pooling and the classifier, on ``tokens`` tokens."""
        constant, linear, quadratic = self.head_fit
        return constant + tokens * linear + tokens**2 * quadratic

    def dense(self, tokens: int) -> int:
        """Of the unpruned model on images of ``tokens`` tokens."""
        return self.embed + self.blocks(tokens, 0, len(self.per_token)) + self.head(tokens)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts ``model`` in evaluation mode for a while.

    In training mode a forward pass would update batch statistics, drop patches and draw random
    numbers.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Takes all hooks away for a while: what is counted here is none of theirs."""
    tables = ("_forward_hooks", "_forward_pre_hooks")
    kept = [(module, table, vars(module)[table]) for module in model.modules() for table in tables]
    for module, table, _ in kept:
        setattr(module, table, OrderedDict())
    try:
        yield
    finally:
        for module, table, hooks in kept:
            setattr(module, table, hooks)


def count_linear_macs(module: nn.Module) -> int:
    """Multiply-accumulates of the linear layers in ``module``, for one row."""
    return sum(layer.in_features * layer.out_features for layer in _linear_layers(module))


@torch.compiler.disable
def head_size(model: Any) -> tuple[str, int]:
    """What the multiply-accumulates of the head depend on."""
    return model.global_pool, count_linear_macs(model.head)


def _linear_layers(module: nn.Module) -> list[Any]:
    """The linear layers in ``module``: torch's, quantised ones, and those in adapters."""
    layers = [part for part in module.modules() if _is_linear(part)]
    # an adapter has the sizes of the layer that it wraps
    return [
        layer
        for layer in layers
        if not any(part is not layer and _is_linear(part) for part in layer.modules())
    ]


def _is_linear(module: nn.Module) -> bool:
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes)


# without gradients, the counter's module hooks fail on modules whose input is a parameter, such as
# attention pooling
@torch.enable_grad()
def _count_macs(model: nn.Module, run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        # the counter doesn't know the kernels of quantised layers: these count by their sizes
        counted, handles = [0], []
        for layer in _linear_layers(model):
            if type(layer) is not nn.Linear or not is_plain(layer.weight):
                handles += _count_by_size(layer, counter, counted)
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
    return counter.get_total_flops() // 2 + counted[0]


def _count_by_size(layer: Any, counter: FlopCounterMode, counted: list[int]) -> list[Any]:
    """Lets ``counted`` have what ``layer`` costs by its sizes beyond what ``counter`` has seen."""

    def before(_: Any, given: tuple[Tensor, ...]) -> None:
        counted[0] += given[0].numel() * layer.out_features + counter.get_total_flops() // 2

    def after(*_: Any) -> None:
        counted[0] -= counter.get_total_flops() // 2

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
