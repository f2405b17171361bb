"""Draws accuracy against compute and against measured speed-up from a comparison's records:
``python -m benchmarks.figures RESULTS`` writes ``tradeoff.png`` beside them.

Lines are means over seeds, and bands their 95% intervals. A third panel shows each method's
accuracy less that of ours on the same images, with paired intervals. Ablations, another library's
algorithms, fine-tuned backbones and upper bounds are left out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from prunevit.benchmarks.differences import DENSE, OURS, difference, is_matched
from prunevit.benchmarks.intervals import t_interval
from prunevit.benchmarks.methods.recipes import RECIPES
from prunevit.benchmarks.records import FILE, read
from prunevit.cli import prog
from prunevit.trainers.common.report import save_figure

FIGURE = "tradeoff.png"
DPI = 110
NOT_SHOWN = {*RECIPES, "mappo-each-price", "straight-through", "warm-start"} - {
    OURS, "paper", "released", "released-faster",
}  # fmt: skip
MOST_LOSS = 12.0  # points under dense that the chart shows
MARKERS = "osD^vP*X<>hp"
COLORS = [matplotlib.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]


@dataclass
class FiguresConfig:
    """Which records."""

    results: tyro.conf.Positional[Path]
    """A folder that benchmarks.compare wrote."""


def load(folder: Path) -> pd.DataFrame:
    """The records of the methods that are shown and of the dense model, with ``percent`` (accuracy)
    and ``cost`` (of the dense compute).

    Raises:
        ValueError: there are no records, or they are damaged.
    """
    file = folder / FILE
    rows = read(file) if file.is_file() else []
    if not rows:
        raise ValueError(f"{file} holds no records: python -m benchmarks.compare --out {folder}")
    data = pd.DataFrame(rows)
    data["percent"] = 100 * data["accuracy"]
    data["cost"] = 100 * data["gmacs"] / data["dense_gmacs"]
    data["speedup"] = data["speedup"].astype(float)
    images = data["left"].map(sum)  # upper bounds are judged on fewer
    hidden = data["method"].isin(NOT_SHOWN) | data["method"].str.startswith("benchmarl-")
    data = data[~hidden & ~data["fine_tuned"].astype(bool) & (images == images.max())]
    if data["method"].eq(DENSE).all():
        raise ValueError(f"{file} holds no records of methods that are shown")
    return data


def draw_line(axes: Axes, data: pd.DataFrame, x: str, y: str, **style: Any) -> None:
    """Draws a method's means over seeds, point by point, with a band. Records without ``x`` are
    left out.
    """
    groups = [group for _, group in data.dropna(subset=[x]).groupby("point")]
    if groups:
        places = [group[x].mean() for group in groups]
        (line,) = axes.plot(places, [group[y].mean() for group in groups], **style)
        low, high = np.array([t_interval(group[y]) for group in groups]).T
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def differences_to_ours(data: pd.DataFrame, name: str) -> dict[str, NDArray[np.float64]]:
    """A method's accuracy less that of ours at each point where both are, in percentage points:
    ``cost``, ``mean``, ``low`` and ``high``, each [P].
    """
    rows = data[is_matched(data)]
    ours, other = (rows[rows["method"] == method] for method in (OURS, name))
    found = []
    for point, group in other.groupby("point"):
        gap = difference(group, ours[ours["point"] == point], data)
        if gap is not None:
            found.append((group["cost"].mean(), 100 * gap.mean, 100 * gap.low, 100 * gap.high))
    columns = np.array(found).reshape(-1, 4).T
    return dict(zip(("cost", "mean", "low", "high"), columns, strict=True))


def draw(data: pd.DataFrame) -> Figure:
    """Accuracy against compute and, where that was timed, against measured speed, and the
    differences to ours where records hold each answer; ours stands out.
    """
    shown = data[data["method"] != DENSE]
    panels = {"cost": "GMACs, % of dense"}
    if shown.dropna(subset=["speedup"])["method"].nunique() > 1:  # a single line compares nothing
        panels["speedup"] = "measured speed-up over timm's dense model"
    names = sorted(set(shown["method"]), key=lambda name: (name != OURS, name))
    gaps = {name: differences_to_ours(data, name) for name in names if name != OURS}
    has_gaps = any(gap["cost"].size for gap in gaps.values())
    count = len(panels) + has_gaps
    figure = Figure(figsize=(5.5 * count, 4.6), layout="constrained")
    columns = figure.subplots(1, count, squeeze=False)[0]
    dense = 100 * data["dense_accuracy"].iloc[0]
    styles: dict[str, dict[str, Any]] = {
        name: {
            "color": COLORS[(i - 1) % len(COLORS)], "linewidth": 1.2, "label": name,
            "marker": MARKERS[i % len(MARKERS)], "markersize": 4,
        }
        for i, name in enumerate(names)
    }  # fmt: skip
    if OURS in styles:
        styles[OURS] |= {"color": "black", "linewidth": 2.2, "zorder": 3}
    for axes, (x, title) in zip(columns, panels.items(), strict=False):
        for name, style in styles.items():
            draw_line(axes, shown[shown["method"] == name], x, "percent", **style)
        axes.axhline(dense, color="grey", linestyle=":", label="dense")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], dense - MOST_LOSS))
        axes.set_xlabel(title)
        axes.set_ylabel("test accuracy, %")
    if has_gaps:
        axes = columns[-1]
        for name, gap in gaps.items():
            axes.plot(gap["cost"], gap["mean"], **styles[name])
            band = {"color": styles[name]["color"], "alpha": 0.2, "linewidth": 0}
            axes.fill_between(gap["cost"], gap["low"], gap["high"], **band)
        axes.axhline(0, color="black", linewidth=2.2)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -MOST_LOSS / 2))
        axes.set_xlabel("GMACs, % of dense")
        axes.set_ylabel("accuracy less that of ours, points")
    for axes in columns:
        axes.grid(alpha=0.3)
    # outside, since with many methods it would cover lines
    figure.legend(*columns[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(FiguresConfig, description=__doc__, args=arguments, prog=prog())
    try:
        save_figure(draw(load(config.results)), config.results / FIGURE, DPI)
        print(config.results / FIGURE)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
