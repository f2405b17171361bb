"""The comparison's pictures, from its records alone: ``python -m benchmarks.figures RESULTS``.

Drawn beside the records: ``tradeoff.png``, accuracy against the share of the dense compute and
against measured speed-up; ``knob.png``, patches kept and compute against the price of compute;
``adaptive.png``, how many patches images have left. Lines are means over seeds, bands the 95%
intervals of the means.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenprune.benchmarks.records import FILE, Record, interval, read
from tokenprune.trainers.checkpoint import write_atomically

matplotlib.use("Agg", force=False)

OURS = "mappo"
MARKERS = "osD^vP*X<>hp"


@dataclass
class FiguresConfig:
    """Which records."""

    results: tyro.conf.Positional[Path]
    """A folder that benchmarks.compare wrote."""


def grouped(rows: Sequence[Record]) -> dict[str, dict[float, list[Record]]]:
    """Records by policy, ours first, and operating point, ascending."""
    names = sorted({row["policy"] for row in rows}, key=lambda name: (name != OURS, name))
    return {
        name: {
            point: [row for row in rows if (row["policy"], row["point"]) == (name, point)]
            for point in sorted({row["point"] for row in rows if row["policy"] == name})
        }
        for name in names
    }


def draw_line(
    axes: Axes,
    points: dict[float, list[Record]],
    x: Callable[[Record], float | None],
    y: Callable[[Record], float],
    **style: Any,
) -> None:
    """Means over seeds with a band; points where ``x`` is not known are left out."""
    places, means, lows, highs = [], [], [], []
    for group in points.values():
        known = [value for row in group if (value := x(row)) is not None]
        if not known:
            continue
        values = [y(row) for row in group]
        low, high = interval(values)
        places.append(float(np.mean(known)))
        means.append(float(np.mean(values)))
        lows.append(low)
        highs.append(high)
    if places:
        (line,) = axes.plot(places, means, **style)
        axes.fill_between(places, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)


def draw_tradeoff(rows: Sequence[Record], path: Path) -> None:
    """Accuracy against compute and, where that was timed, against measured speed."""
    panels: list[tuple[str, Callable[[Record], float | None]]] = [
        ("GMACs, % of dense", lambda row: 100 * row["gmacs"] / row["dense_gmacs"]),
        ("measured speed-up over timm's dense model", lambda row: row["speedup"]),
    ]
    if all(row["speedup"] is None for row in rows):
        panels.pop()
    figure = Figure(figsize=(5.5 * len(panels), 4.6), layout="constrained")
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, x) in zip(columns, panels, strict=True):
        for i, (name, points) in enumerate(grouped(rows).items()):
            is_ours = name == OURS
            draw_line(
                axes,
                points,
                x,
                lambda row: 100 * row["accuracy"],
                label=name,
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                color="black" if is_ours else f"C{(i - 1) % 10}",
                linewidth=2.2 if is_ours else 1.2,
                zorder=3 if is_ours else 2,
            )
        axes.axhline(100 * rows[0]["dense_accuracy"], color="grey", linestyle=":", label="dense")
        axes.set_xlabel(title)
        axes.set_ylabel("test accuracy, %")
        axes.grid(alpha=0.3)
    columns[0].legend(fontsize=8)
    save(figure, path)


def draw_knob(rows: Sequence[Record], path: Path) -> bool:
    """What one policy for all budgets keeps and spends by its budget; False where none is there."""
    priced = sorted((row for row in rows if "budget" in row), key=lambda row: row["budget"])
    if not priced:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in sorted({row["policy"] for row in priced}):
        mine = [row for row in priced if row["policy"] == name]
        prices = [row["budget"] for row in mine]
        spent = [100 * row["gmacs"] / row["dense_gmacs"] for row in mine]
        kept = [100 * float(np.mean(row["kept"])) for row in mine]
        axes.plot(prices, spent, "o", markersize=4, label=f"{name}: GMACs")
        axes.plot(prices, kept, "^", markersize=4, label=f"{name}: patches kept")
    axes.set_xscale("log")
    axes.set_xlabel("price of compute (alpha; beta is 1)")
    axes.set_ylabel("% of dense")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)
    return True


def draw_adaptive(rows: Sequence[Record], path: Path) -> None:
    """Patches that images have left at the end, at the operating point in the middle."""
    policies = grouped(rows)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in policies.items():
        group = list(points.values())[len(points) // 2]
        left = np.sum([row["left"] for row in group], axis=0)
        share = 100 * left / left.sum()
        style = {"color": "black", "linewidth": 2.2} if name == OURS else {"linewidth": 1.2}
        axes.step(range(len(share)), share, where="mid", label=name, **style)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("patches left behind the last stage")
    axes.set_ylabel("images, %")
    axes.legend(fontsize=8)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG file, atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def draw(folder: Path) -> list[Path]:
    """Draws all that the records of ``folder`` can show; returns the files.

    Raises:
        ValueError: there are no records, or they are damaged.
    """
    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {FILE}: python -m benchmarks.compare --out {folder}")
    rows = read(file)
    if not rows:
        raise ValueError(f"{file} is empty: python -m benchmarks.compare --out {folder}")
    paths = [folder / name for name in ("tradeoff.png", "adaptive.png", "knob.png")]
    draw_tradeoff(rows, paths[0])
    draw_adaptive(rows, paths[1])
    return paths if draw_knob(rows, paths[2]) else paths[:2]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(FiguresConfig, description=__doc__, args=arguments)
    try:
        for path in draw(config.results):
            print(path)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
