"""The backbone's blocks compiled with ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from prunevit.envs.vit.blocks import packed_block


@cache
def compile_block() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Returns ``packed_block`` compiled.

    It compiles with and without padding, with and without the attention received, and for a single
    row, but not for each number of tokens or images, or each block.
    """
    return torch.compile(packed_block, dynamic=True)


def check_compiler(device: torch.device) -> None:
    """Checks that ``torch.compile`` works for ``device`` by compiling something small.

    Raises:
        ValueError: it doesn't, for lack of a C++ compiler or, on a GPU, of Triton.
    """
    compiled: Any = torch.compile(torch.sin)
    try:
        compiled(torch.ones(2, device=device))
    # torch reports a missing compiler by several kinds of RuntimeError
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"blocks can't be compiled for {device} here: {reason}") from error
