"""``pick_device``, the device by name or the best that is there, and ``now``, its clock."""

from __future__ import annotations

import time

import torch


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Returns the named device, or for "auto" the accelerator of this machine, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if device == "auto":
        found = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        return found or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).cpu()  # "meta" can be made, but holds nothing
    except (RuntimeError, AssertionError, ImportError) as error:
        # the rest of the message is for developers of PyTorch, and thousands of characters long
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device {str(device)!r} can't be used here: {reason}") from error
    return chosen


def now(device: torch.device) -> float:
    """The clock in seconds, once ``device`` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
