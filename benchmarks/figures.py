"""Draws accuracy against compute and against measured speed-up from a comparison's records:
``python -m benchmarks.figures RESULTS`` writes ``tradeoff.png`` beside them.

Lines are means over seeds, and bands their 95% intervals. A third panel shows each method's
accuracy less that of ours on the same images, with paired intervals. Ablations, another library's
algorithms, fine-tuned backbones and upper bounds are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from prunevit.benchmarks.differences import DENSE, OURS, difference, is_matched
from prunevit.benchmarks.intervals import t_interval
from prunevit.benchmarks.methods.recipes import RECIPES
from prunevit.benchmarks.records import FILE, read
from prunevit.cli import prog
from prunevit.extras import needs
from prunevit.trainers.common.report import save_figure

with needs("benchmarks"):
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

FIGURE = "tradeoff.png"
DPI = 110
NOT_SHOWN = {
    *RECIPES, "mappo-each-price", "straight-through", "warm-start", "dynamic-vit-narrow",
} - {OURS, "paper", "released", "released-faster"}  # fmt: skip
MOST_LOSS = 12.0  # points under dense that the chart shows
ABOVE = 1.0  # points over dense that the chart shows
MARKERS = "osD^vP*X<>hp"
# families of methods, each in one colour of Okabe and Ito's palette, which colour-blind people can
# tell apart; within a family, markers and lines differ
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "#0072B2": ("dynamic-vit", "ltmp", "diffrate", "paper", "released", "released-faster"),
    "#009E73": ("tome", "pitome"),
    "#D55E00": ("attention", "threshold", "ats", "evit", "evit-unfused", "zero-tprune"),
    "#7F7F7F": ("random", "norm", "brightness"),
}
LINES = ("-", "--", "-.", ":")
PANEL = (3.8, 3.6)  # inches of a panel
LABELS = 0.8  # inches beside the last one
LABEL_STEP = 0.045  # between two labels, as a share of the height


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


def style_of(name: str) -> dict[str, Any]:
    """Colour, line and marker of a method: the colour of its family, and ours in bold black."""
    if name == OURS:
        return {"color": "black", "linewidth": 2.4, "marker": "o", "markersize": 5, "zorder": 3}
    for color, family in FAMILIES.items():
        for i, member in enumerate(family):
            # a method with a change, as attention-merge, is drawn as the method itself, but hollow
            if name == member or name.startswith(f"{member}-"):
                line = LINES[i % len(LINES)]
                return {
                    "color": color, "linestyle": line, "linewidth": 1.3,
                    "marker": MARKERS[i], "markersize": 4,
                    "markerfacecolor": color if name == member else "white",
                }  # fmt: skip
    return {"color": "#CC79A7", "linewidth": 1.3, "marker": "p", "markersize": 4}


def label_lines(axes: Axes, ends: Mapping[str, tuple[float, Mapping[str, Any]]]) -> None:
    """Writes names beside the right ends of lines, moved apart where they would overlap, each
    behind its line's marker.

    Args:
        axes: with its final limits.
        ends: name -> the line's last value, and its ``style_of``.
    """
    low, high = axes.get_ylim()
    heights = {name: np.clip((y - low) / (high - low), 0, 1) for name, (y, _) in ends.items()}
    groups: list[list[str]] = []  # of labels that touch, from below
    for name in sorted(heights, key=lambda name: heights[name]):
        groups.append([name])
        while len(groups) > 1 and places(groups[-1], heights)[0] < (
            places(groups[-2], heights)[-1] + LABEL_STEP
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    for group in groups:
        for name, place in zip(group, places(group, heights), strict=True):
            style = {**ends[name][1], "linewidth": 0.6, "markevery": [1]}
            beside: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
            axes.add_line(Line2D([1, 1.05], [heights[name], place], **style, **beside))
            title = f"ours ({name})" if name == OURS else name
            axes.text(1.065, place, title, fontsize=8, va="center", color=style["color"], **beside)


def places(group: Sequence[str], heights: Mapping[str, float]) -> NDArray[np.float64]:
    """Places of labels around the middle of their lines' ends, ``LABEL_STEP`` apart."""
    offsets = (np.arange(len(group)) - (len(group) - 1) / 2) * LABEL_STEP
    return np.mean([heights[name] for name in group]) + offsets


def draw_line(axes: Axes, data: pd.DataFrame, x: str, y: str, **style: Any) -> None:
    """Draws a method's means over seeds, point by point, with a band. Records without ``x`` are
    left out.
    """
    groups = [group for _, group in data.dropna(subset=[x]).groupby("point")]
    if groups:
        places = [group[x].mean() for group in groups]
        (line,) = axes.plot(places, [group[y].mean() for group in groups], **style)
        low, high = np.array([t_interval(group[y]) for group in groups]).T
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.12, linewidth=0)


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
    # two in a row, so that a page's width leaves them readable; the differences below both
    rows = ["ab"[: len(panels)], *(["g" * len(panels)] if has_gaps else [])]
    size = PANEL[0] * len(panels) + LABELS, PANEL[1] * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    columns = list(figure.subplot_mosaic(";".join(rows)).values())
    dense = 100 * data["dense_accuracy"].iloc[0]
    styles = {name: style_of(name) | {"label": name} for name in names}
    for axes, (x, title) in zip(columns, panels.items(), strict=False):
        for name, style in styles.items():
            draw_line(axes, shown[shown["method"] == name], x, "percent", **style)
        axes.axhline(dense, color="black", linestyle=":", linewidth=1, label="dense")
        axes.annotate(
            "dense", (0.01, dense), (0, 2), ("axes fraction", "data"), "offset points", fontsize=8
        )
        axes.set_ylim(max(axes.get_ylim()[0], dense - MOST_LOSS), dense + ABOVE)
        axes.set_xlabel(title)
        axes.set_ylabel("test accuracy, %")
    if has_gaps:
        axes = columns[-1]
        for name, gap in gaps.items():
            axes.plot(gap["cost"], gap["mean"], **styles[name])
            band = {"color": styles[name]["color"], "alpha": 0.12, "linewidth": 0}
            axes.fill_between(gap["cost"], gap["low"], gap["high"], **band)
        axes.axhline(0, color="black", linewidth=2.4)
        axes.set_ylim(max(axes.get_ylim()[0], -MOST_LOSS / 2), min(axes.get_ylim()[1], 2 * ABOVE))
        axes.set_xlabel("GMACs, % of dense")
        axes.set_ylabel("accuracy less that of ours, points")
        ends = {name: gap["mean"][-1] for name, gap in gaps.items() if gap["mean"].size} | {OURS: 0}
    else:
        last = {name: shown[shown["method"] == name].groupby("point") for name in names}
        ends = {name: points["percent"].mean().iloc[-1] for name, points in last.items()}
    for axes in columns:
        axes.grid(alpha=0.3)
    label_lines(columns[-1], {name: (y, styles[name]) for name, y in ends.items()})
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
