"""The backbone's blocks as ``torch.compile`` makes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from prunevit.envs.vit.blocks import packed_block


@cache
def compile_block() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """``packed_block``, compiled as it is needed: once for each kind of layout, with and without
    attention observed, and not for each number of tokens or for each block.
    """
    return torch.compile(packed_block, dynamic=True)


def check_compiler(device: torch.device) -> None:
    """Compiles something small for ``device``.

    Raises:
        ValueError: that fails, as there is no C++ compiler, or no Triton for a GPU.
    """
    compiled: Any = torch.compile(torch.sin)
    try:
        compiled(torch.ones(2, device=device))
    # what a compiler lacks is an error of torch's of many kinds
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"blocks can't be compiled for {device} here: {reason}") from error
