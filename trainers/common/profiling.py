"""Where an iteration goes: a trace of torch.profiler, and a table of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from prunevit.trainers.common.checkpoint import write_atomically

ITERATIONS = 2  # that are traced
BEFORE = 2  # that are not: the first is like no other, in the next the profiler begins
TRACE = "trace.json"
WHOLE = "iteration"
# what is marked by ``record_function``; none of them is inside another
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
    """Traces some iterations to ``folder`` and prints their table; what it gives is to be called
    after each iteration.
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
    """Milliseconds of an iteration and of its parts, on the host and, where there is one, on the
    GPU.
    """
    events = {event.key: event for event in profiler.key_averages()}
    on_gpu = ProfilerActivity.CUDA in profiler.activities
    spent = {
        name: tuple(
            microseconds / 1e3 / ITERATIONS
            for microseconds in (events[name].cpu_time_total, events[name].device_time_total)
        )
        for name in (*PARTS, WHOLE)
        if name in events
    }
    host, device = spent.pop(WHOLE)
    rest = tuple(
        whole - sum(part[i] for part in spent.values()) for i, whole in enumerate((host, device))
    )
    lines = [f"{'where an iteration goes':<32}{'ms':>9}{'share':>8}" + f"{'GPU ms':>9}" * on_gpu]
    for name, (ms, gpu_ms) in (spent | {"the rest": rest, WHOLE: (host, device)}).items():
        gpu = f"{gpu_ms:>9.1f}" if on_gpu else ""
        lines.append(f"{name:<32}{ms:>9.1f}{100 * ms / host:>7.1f}%{gpu}")
    return "\n".join(lines)
