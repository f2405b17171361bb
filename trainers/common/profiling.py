"""Profiles iterations: a trace of torch.profiler, and a table of where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from prunevit.trainers.common.checkpoint import write_atomically

ITERATIONS = 2  # traced
BEFORE = 2  # not traced: the first is untypical, and in the second the profiler starts
TRACE = "trace.json"
WHOLE = "iteration"
# ranges that ``record_function`` marks; none contains another
PARTS = (
    "load images",
    "blocks before the first stage",
    "blocks after it",
    "policy and critic",
    "advantages",
    "update",
)


@contextmanager
def profiled(folder: Path) -> Iterator[Callable[[], None]]:
    """A context that traces ``ITERATIONS`` iterations to ``folder`` and prints their table.

    Yields:
        A function to call after each iteration.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(
        activities=activities,
        schedule=schedule(wait=BEFORE - 1, warmup=1, active=ITERATIONS, repeat=1),
        on_trace_ready=partial(_report, folder),
    ) as profiler:
        yield profiler.step


def _report(folder: Path, profiler: profile) -> None:
    write_atomically(folder / TRACE, lambda path: profiler.export_chrome_trace(str(path)))
    print(f"{table(profiler)}\ntrace: {folder / TRACE} (open it in ui.perfetto.dev)", flush=True)


def table(profiler: profile) -> str:
    """Formats the milliseconds of an iteration and of its parts, on the host and on a GPU if there
    is one.
    """
    events = {event.key: event for event in profiler.key_averages()}
    on_gpu = ProfilerActivity.CUDA in profiler.activities
    spent = {
        name: np.array([events[name].cpu_time_total, events[name].device_time_total]) / 1e3
        for name in (*PARTS, WHOLE)
        if name in events
    }
    whole = spent.pop(WHOLE)
    lines = [f"{'where an iteration goes':<32}{'ms':>9}{'share':>8}" + f"{'GPU ms':>9}" * on_gpu]
    for name, ms in (spent | {"the rest": whole - sum(spent.values()), WHOLE: whole}).items():
        host, device = ms / ITERATIONS
        share = f"{host:>9.1f}{100 * ms[0] / whole[0]:>7.1f}%"
        lines.append(f"{name:<32}{share}" + f"{device:>9.1f}" * on_gpu)
    return "\n".join(lines)
