"""The machine that a benchmark runs on: its name, and how much memory was used."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import torch

MIB = 2**20
PROCESS_STATUS = Path("/proc/self/status")
CPU_INFO = Path("/proc/cpuinfo")


def hardware(device: torch.device) -> str:
    """The name of the hardware behind ``device``, as far as the machine tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if CPU_INFO.is_file():
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    name = f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return name if device.type == "cpu" else f"{device.type}, {name}"


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: by tensors on a CUDA device, else by this process.

    On Linux getrusage starts from the parent process's peak, so the kernel's own figure is read.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if PROCESS_STATUS.is_file():
        for line in PROCESS_STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
