"""Multiply-accumulates of a staged ViT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunevit.envs.vit.heads import classify_normed, classify_prefix, pools_tokens
from prunevit.envs.vit.ragged import Layout
from prunevit.envs.vit.supported import attention_width, model_ops


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of a backbone's parts, in closed form, as ``torch.utils.flop_counter``
    counts them.
    """

    embed: int
    per_token: tuple[int, ...]  # linear layers of each block
    width: int  # attention: heads times head size
    head_fit: tuple[int, int, int]  # constant, linear and quadratic in the number of tokens

    @staticmethod
    def of(model: Any, image_shape: tuple[int, int, int]) -> Macs:
        """Counts the parts of ``model``, which takes images of ``image_shape`` (C, H, W)."""
        blank = next(model.parameters()).new_zeros(1, *image_shape)
        sizes = [model.num_prefix_tokens + n for n in (1, 2, 3)]
        costs = []
        with _in_eval_mode(model):
            embedding = _count_macs(partial(model_ops(model).embed, model, blank))
            for n in sizes:
                layout = Layout.of(np.array([n]), attention_width(model), blank.device)
                rows = blank.new_zeros(n, model.embed_dim)
                if pools_tokens(model):
                    costs.append(_count_macs(partial(classify_normed, model, rows, layout)))
                else:
                    prefix = rows[None, : model.num_prefix_tokens]
                    costs.append(_count_macs(partial(classify_prefix, model, prefix)))
        # three points fix the head's cost: attention pooling is at most quadratic in the tokens
        quadratic = (costs[2] - 2 * costs[1] + costs[0]) // 2
        linear = costs[1] - costs[0] - quadratic * (sizes[1] ** 2 - sizes[0] ** 2)
        constant = costs[0] - linear * sizes[0] - quadratic * sizes[0] ** 2
        return Macs(
            embed=embedding,
            per_token=tuple(
                sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
                for block in model.blocks
            ),
            width=attention_width(model),
            head_fit=(constant, linear, quadratic),
        )

    def blocks(self, tokens: Any, start: int, stop: int) -> Any:
        """Blocks ``start``..``stop - 1`` on ``tokens`` tokens an image (an int or an int64
        tensor).
        """
        return tokens * sum(self.per_token[start:stop]) + tokens**2 * (
            2 * self.width * (stop - start)
        )

    def attention_received(self, tokens: Any) -> Any:
        """One query against every key: the observed row of the attention matrix."""
        return tokens * self.width

    def head(self, tokens: Any) -> Any:
        constant, linear, quadratic = self.head_fit
        return constant + tokens * linear + tokens**2 * quadratic

    def dense(self, tokens: int) -> int:
        """The unpruned model."""
        return self.embed + self.blocks(tokens, 0, len(self.per_token)) + self.head(tokens)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """In training mode a forward pass would move batch statistics, drop patches and draw random
    numbers.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# the counter's module hooks fail without a graph where a module takes a parameter as its input
# (attention pooling)
@torch.enable_grad()
def _count_macs(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2
