"""What ``benchmarks.throughput`` shows: its table and its figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from prunevit.trainers.common.checkpoint import write_atomically

Record = dict[str, Any]

RIVALS = ("tome", "padded", "masked", "uniform")
MIB = 2**20

matplotlib.use("Agg", force=False)


def table(records: Sequence[Record]) -> str:
    """Records of one image size and batch size as text, and by how much ours leads."""
    first = records[0]
    lines = [
        f"{first['model']}, {first['image_size']} px, batch {first['batch_size']} "
        f"({first['device']}, {first['dtype']}, {first['threads']} threads, "
        f"load {first['load']:.2f})",
        f"{'variant':<9}{'images/s':>10}{'spread':>8}{'GMACs':>9}{'speed-up':>10}"
        f"{'efficiency':>12}{'p50 ms':>9}{'p95 ms':>9}{'peak MiB':>10}",
    ]
    for row in records:
        lines.append(
            f"{row['variant']:<9}{row['images_per_second']:>10.2f}{row['spread']:>8.1%}"
            f"{row['gmacs']:>9.4f}{row['speedup']:>9.2f}x{row['efficiency']:>12.2f}"
            + _cell(row.get("p50"), 1e3, 9)
            + _cell(row.get("p95"), 1e3, 9)
            + _cell(row.get("peak_memory"), 1 / MIB, 10)
        )
    return "\n".join(lines + leads(records))


def _cell(value: float | None, scale: float, width: int) -> str:
    return f"{'-' if value is None else format(value * scale, '.1f'):>{width}}"


def leads(records: Sequence[Record]) -> list[str]:
    """One line for each rival: how many times its images a second ours makes."""
    speed = {row["variant"]: row["speedup"] for row in records}
    if "packed" not in speed:
        return []
    return [
        f"packed is {speed['packed'] / speed[rival]:.2f}x as fast as {rival}"
        for rival in RIVALS
        if rival in speed
    ]


def draw(records: Sequence[Record], path: Path) -> None:
    """Speed-ups over dense by image size, a panel for each batch size; a line over a bar stands at
    what the GMACs promise.
    """
    batch_sizes = list(dict.fromkeys(row["batch_size"] for row in records))
    sizes = list(dict.fromkeys(row["image_size"] for row in records))
    variants = [v for v in dict.fromkeys(row["variant"] for row in records) if v != "dense"]
    width = 0.8 / max(len(variants), 1)
    figure = Figure(figsize=(2 + 3.5 * len(batch_sizes), 3.5), layout="constrained")
    panels = figure.subplots(1, len(batch_sizes), squeeze=False, sharey=True).flat
    for axes, batch_size in zip(panels, batch_sizes, strict=True):
        shown = [row for row in records if row["batch_size"] == batch_size]
        for i, variant in enumerate(variants):
            rows = [row for row in shown if row["variant"] == variant]
            left = [sizes.index(row["image_size"]) - 0.4 + i * width for row in rows]
            heights = [row["speedup"] for row in rows]
            errors = [row["speedup"] * row["spread"] / 2 for row in rows]
            axes.bar(left, heights, width, yerr=errors, align="edge", label=variant)
            promised = [row["speedup"] / row["efficiency"] for row in rows]
            axes.hlines(promised, left, [x + width for x in left], colors="black", linewidth=1)
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
        axes.set_title(f"{records[0]['model']}, batch {batch_size}", fontsize=10)
    figure.axes[0].set_ylabel("speed-up over dense")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
