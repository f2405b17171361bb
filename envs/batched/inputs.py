"""Checks what callers pass to the token game: actions, seeds, image indices and reset options."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

PRUNE, KEEP = 0, 1
MAX_SEED = 2**63 - 1  # torch.Generator takes larger seeds for negative ones


def to_actions(values: ArrayLike | Tensor, device: torch.device) -> Tensor:
    """Converts actions of any type to the int64 tensor that the game takes.

    Raises:
        ValueError: they are not numbers, or floating point other than exactly 0.0 and 1.0.
    """
    try:
        actions = torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"actions must be 0 (prune) or 1 (keep): got {values!r} ({error})"
        ) from error
    # Stable-Baselines3 samples MultiBinary actions as floats
    whole = not actions.is_floating_point() or bool(((actions == KEEP) | (actions == PRUNE)).all())
    if actions.is_complex() or not whole:
        raise ValueError(
            f"actions must be 0 (prune) or 1 (keep): got {actions.dtype} {list(actions.shape)} "
            "with other values"
        )
    return actions.to(torch.int64)


def image_indices(options: Mapping[str, Any] | None) -> Any:
    """Reads ``options["indices"]`` of a reset, or None if images are to be drawn.

    Other options cause a warning, not an error, since PettingZoo's own test passes some without a
    meaning.

    Raises:
        ValueError: ``options`` is not a mapping.
    """
    if options is None:
        return None
    if not isinstance(options, Mapping):
        raise ValueError(f"options must be a mapping, as {{'indices': [0]}}: got {options!r}")
    unknown = sorted(map(str, set(options) - {"indices"}))
    if unknown:
        warnings.warn(f"reset ignores the options {unknown}: there is only 'indices'", stacklevel=3)
    return options.get("indices")


def checked_seed(seed: int) -> int:
    """Returns the seed for a generator of torch, which only reads the low 32 bits: larger seeds are
    mixed, so that they don't repeat what small ones draw. Raises ValueError if ``seed`` is not a
    whole number from 0 to ``MAX_SEED``.
    """
    try:
        number = index(seed)  # accepts numpy's integers too
    except TypeError:
        number = -1
    if not 0 <= number <= MAX_SEED:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to {MAX_SEED}")
    return number if number < 2**32 else int(np.random.SeedSequence(number).generate_state(1)[0])


def whole_numbers(indices: Sequence[int] | Tensor) -> Tensor:
    """Converts image indices to int64 on the CPU; raises ValueError for other than integers."""
    try:
        numbers = torch.as_tensor(indices)
        if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
            raise TypeError(f"they are {numbers.dtype}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"image indices must be whole numbers: got {indices!r} ({error})"
        ) from error
    return numbers.to("cpu", torch.int64)
