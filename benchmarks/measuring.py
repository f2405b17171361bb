"""Time and memory of calls that do the same work in different ways."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

PROCESS_STATUS = Path("/proc/self/status")
CPU_INFO = Path("/proc/cpuinfo")


def hardware(device: torch.device) -> str:
    """What computes on ``device``, as far as the machine says."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if CPU_INFO.is_file():
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    name = f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return name if device.type == "cpu" else f"{device.type}, {name}"


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed pass over all batches and, where it was asked for, of each call."""

    passes: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median pass."""
        return statistics.median(self.passes)

    @property
    def spread(self) -> float:
        """Distance between the quartiles of the passes, relative to the median."""
        low, high = np.percentile(self.passes, [25, 75])
        return float(high - low) / self.seconds

    def latency(self, percent: float) -> float:
        """Seconds within which so many percent of the calls were done."""
        return float(np.percentile(self.calls, percent))


def speedup(baseline: Timing, timing: Timing) -> float:
    """How many times faster than ``baseline``: the median of the rounds' own ratios, which a change
    of the machine's pace between rounds does not touch.
    """
    pairs = zip(baseline.passes, timing.passes, strict=True)
    return statistics.median(slow / fast for slow, fast in pairs)


@torch.inference_mode()
def interleaved(
    variants: Mapping[str, Sequence[Callable[[], object]]],
    rounds: int,
    warmup: int,
    device: torch.device,
    each_call: bool = False,
) -> dict[str, Timing]:
    """Times all variants in turns: in every round each makes one pass over its calls, and a round
    begins with another variant than the one before.

    Args:
        variants: the calls of one pass, by name.
        rounds: timed rounds.
        warmup: rounds before them that are not timed.
        device: where the calls work; waited for after a pass.
        each_call: wait for every call and time it by itself, too.
    """
    names = list(variants)
    timings = {name: Timing() for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            edges = [now(device)]
            for call in variants[name]:
                call()
                if each_call:
                    edges.append(now(device))
            if turn >= warmup:
                timings[name].passes.append(now(device) - edges[0])
                timings[name].calls.extend(np.diff(edges).tolist())
    return timings


def now(device: torch.device) -> float:
    """The clock, in seconds, once ``device`` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def cuda_peak(calls: Sequence[Callable[[], object]], device: torch.device) -> int:
    """Most bytes of tensors on a CUDA device during a pass, weights and images included."""
    torch.cuda.reset_peak_memory_stats(device)
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def resident_peak() -> int:
    """Most bytes of memory that this process has held so far.

    Linux hands getrusage's figure on from the process that started this one: its own is read where
    the kernel tells it.
    """
    if PROCESS_STATUS.is_file():
        for line in PROCESS_STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
