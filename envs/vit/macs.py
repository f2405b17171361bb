"""``Macs``: multiply-accumulates of a ViT, in closed form in the number of tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
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


# constant, linear and quadratic coefficient
Polynomial = tuple[int, int, int]


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of a backbone's parts, equal to those of ``torch.utils.flop_counter``.

    Attributes:
        embed: of the patch embedding of an image.
        of_sublayers: of the attention and of the MLP of each block, in turn, as polynomials in the
            number of tokens.
        width: attention width: heads times head size.
        of_head: of the head, likewise.
    """

    embed: int
    of_sublayers: tuple[Polynomial, ...]
    width: int
    of_head: Polynomial

    @staticmethod
    def of(model: Any, image_shape: tuple[int, int, int]) -> Macs:
        """Counts the parts of ``model`` for images of ``image_shape`` (C, H, W)."""
        some = some_tensor(model)
        blank = torch.zeros(1, *image_shape, dtype=some.dtype, device=some.device)
        ops, width = model_ops(model), attention_width(model)

        def of_block(block: Any) -> tuple[Polynomial, Polynomial]:
            linear = count_linear_macs(block.attn)
            if not _has_other_products(block):
                return (0, linear, 2 * width), (0, count_linear_macs(block) - linear, 0)

            def fitted(run: Callable[[Tensor], Tensor]) -> Polynomial:
                def cost(tokens: int) -> int:
                    image = blank.new_zeros(1, tokens, model.embed_dim)
                    return _count_macs(model, partial(run, image))

                return _fit(cost, model.num_prefix_tokens)

            both = fitted(lambda image: ops.dense_block(block, image, None, None))
            mlp = fitted(partial(ops.steps(block).mlp, block))
            return (both[0] - mlp[0], both[1] - mlp[1], both[2] - mlp[2]), mlp

        def head_cost(tokens: int) -> int:
            if model.global_pool == "":
                return 0  # without pooling there is no output to pay for
            rows = blank.new_zeros(tokens, model.embed_dim)
            if pools_tokens(model):
                layout = Layout.of(np.array([tokens]), width, blank.device)
                return _count_macs(model, partial(classify_pooled, model, rows, layout))
            prefix = rows[None, : model.num_prefix_tokens]
            return _count_macs(model, partial(classify_prefix, model, prefix))

        with in_eval_mode(model), _without_hooks(model):
            return Macs(
                embed=_count_macs(model, partial(ops.embed, model, blank)),
                of_sublayers=tuple(chain.from_iterable(map(of_block, model.blocks))),
                width=width,
                of_head=_fit(head_cost, model.num_prefix_tokens),
            )

    def sublayers(self, tokens: Any, start: int, stop: int) -> Any:
        """Of the sublayers ``start`` to ``stop - 1`` on ``tokens`` tokens, int or int64 tensor."""
        total = [sum(each) for each in zip(*self.of_sublayers[start:stop], strict=True)]
        return _evaluate(total or (0, 0, 0), tokens)

    def attention_received(self, tokens: Any) -> Any:
        """Of one query against ``tokens`` keys, which gives the attention that each receives."""
        return tokens * self.width

    def head(self, tokens: Any) -> Any:
        """Of the pooling and the classifier, on ``tokens`` tokens."""
        return _evaluate(self.of_head, tokens)

    def dense(self, tokens: int) -> int:
        """Of the unpruned model on images of ``tokens`` tokens."""
        every = self.sublayers(tokens, 0, len(self.of_sublayers))
        return self.embed + every + self.head(tokens)


def merging_macs(merged: Any, survivors: Any, width: int) -> Any:
    """Of merging patches into survivors of their image: a similarity of each with every survivor,
    and the products of the averages, one for what comes and at most one for what it comes to.

    Args:
        merged: number of patches that go, an int or int64 tensor.
        survivors: number of patches that stay; where there are none, nothing merges.
        width: D, the embedding width.
    """
    return merged * (survivors + 2) * width * (survivors > 0)


def _evaluate(polynomial: Sequence[int], tokens: Any) -> Any:
    constant, linear, quadratic = polynomial
    return constant + tokens * linear + tokens**2 * quadratic


def _fit(cost: Callable[[int], int], prefix: int) -> Polynomial:
    """The cost for any number of tokens, which is at most quadratic: three points fix it."""
    first, second, third = (prefix + n for n in (1, 2, 3))
    costs = cost(first), cost(second), cost(third)
    quadratic = (costs[2] - 2 * costs[1] + costs[0]) // 2
    linear = costs[1] - costs[0] - quadratic * (second**2 - first**2)
    return costs[0] - linear * first - quadratic * first**2, linear, quadratic


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


def _has_other_products(module: nn.Module) -> bool:
    """Whether weights outside of linear layers may multiply tokens, as those of a convolution."""
    linear = {part for layer in module.modules() if _is_linear(layer) for part in layer.modules()}
    return any(
        weight.dim() > 1
        for part in module.modules()
        if part not in linear
        for weight in part.parameters(recurse=False)
    )


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
