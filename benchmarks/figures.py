"""Draws a comparison's figures from its records: ``python -m benchmarks.figures RESULTS``.

These are drawn beside the records, where they hold what is needed:

- ``tradeoff.png``: accuracy against the share of the dense compute and against measured speed-up;
- ``ablations.png``: the same for ours with one part removed or replaced;
- ``libraries.png``: the same for another library's algorithms;
- ``fine_tuning.png``: with and without fine-tuning the backbone;
- ``knob.png``: the patches that ours keeps, and its compute, against alpha;
- ``adaptive.png``: how many patches the images have left.

Lines are means over seeds, and bands their 95% intervals.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunevit.benchmarks.bootstrap import interval
from prunevit.benchmarks.methods.recipes import RECIPES
from prunevit.benchmarks.records import FILE, Record, read
from prunevit.trainers.common.checkpoint import write_atomically

OURS = "mappo"
LIBRARY = "benchmarl-"  # before the name of another library's algorithm
FINE_TUNED = "-fine-tuned"  # after the name of the method that is not
ABLATIONS = {*RECIPES, "mappo-each-price"} - {OURS, "paper", "released", "released-faster"}
MOST_LOSS = 12.0  # points under dense that a chart shows
MARKERS = "osD^vP*X<>hp"
COLORS = [matplotlib.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]


@dataclass
class FiguresConfig:
    """Which records."""

    results: tyro.conf.Positional[Path]
    """A folder that benchmarks.compare wrote."""


def load(folder: Path) -> pd.DataFrame:
    """The records of a folder, with costs and accuracies in percent.

    Raises:
        ValueError: there are no records, or they are damaged.
    """
    file = folder / FILE
    rows = read(file) if file.is_file() else []
    if not rows:
        raise ValueError(f"{file} holds no records: python -m benchmarks.compare --out {folder}")
    return in_percent(rows)


def in_percent(rows: Sequence[Record]) -> pd.DataFrame:
    """Records as a table, with ``percent`` (accuracy), ``cost`` (of the dense compute), ``kept``
    (mean of the stages) and ``images`` (judged on).
    """
    data = pd.DataFrame(rows)
    data["percent"] = 100 * data["accuracy"]
    data["cost"] = 100 * data["gmacs"] / data["dense_gmacs"]
    data["kept"] = [100 * float(np.mean(kept)) for kept in data["kept"]]
    data["images"] = data["left"].map(sum)
    data["speedup"] = data["speedup"].astype(float)
    return data


def methods_of(names: Sequence[str]) -> list[str]:
    """Different names in alphabetical order, after ours."""
    return sorted(set(names), key=lambda name: (name != OURS, name))


def draw_line(axes: Axes, data: pd.DataFrame, x: str, y: str, **style: Any) -> None:
    """Draws a method's means over seeds, point by point, with a band. Records without ``x`` are
    left out.
    """
    groups = [group for _, group in data.dropna(subset=[x]).groupby("point")]
    if groups:
        places = [group[x].mean() for group in groups]
        (line,) = axes.plot(places, [group[y].mean() for group in groups], **style)
        low, high = np.array([interval(group[y]) for group in groups]).T
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def style_of(name: str, place: int) -> dict[str, Any]:
    """How a method is drawn: ours stands out, fine-tuned ones are dashed.

    Args:
        name: of the method.
        place: among all methods of the figure.
    """
    is_ours = name == OURS
    return {
        "label": name,
        "color": "black" if is_ours else COLORS[(place - 1) % len(COLORS)],
        "linewidth": 2.2 if is_ours else 1.2,
        "linestyle": "--" if name.endswith(FINE_TUNED) else "-",
        "zorder": 3 if is_ours else 2,
    }


def draw_tradeoff(data: pd.DataFrame) -> Figure:
    """Accuracy against compute and, where that was timed, against measured speed."""
    panels = {"cost": "GMACs, % of dense"}
    if data.dropna(subset=["speedup"])["method"].nunique() > 1:  # a single line compares nothing
        panels["speedup"] = "measured speed-up over timm's dense model"
    figure = Figure(figsize=(5.5 * len(panels), 4.6), layout="constrained")
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    dense = 100 * data["dense_accuracy"].iloc[0]
    for axes, (x, title) in zip(columns, panels.items(), strict=True):
        for i, name in enumerate(methods_of(data["method"])):
            style = style_of(name, i) | {"marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            draw_line(axes, data[data["method"] == name], x, "percent", **style)
        axes.axhline(dense, color="grey", linestyle=":", label="dense")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], dense - MOST_LOSS))
        axes.set_xlabel(title)
        axes.set_ylabel("test accuracy, %")
        axes.grid(alpha=0.3)
    # outside, since with many methods it would cover lines
    figure.legend(*columns[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def draw_knob(data: pd.DataFrame) -> Figure:
    """What one policy for all alphas keeps and spends against its alpha."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    draw_line(axes, data, "alpha", "cost", marker="o", label="GMACs, % of dense")
    draw_line(axes, data, "alpha", "kept", marker="^", label="patches kept, mean of the stages")
    axes.set_xscale("log")
    alphas = data.groupby("point")["alpha"].mean().tolist()
    axes.set_xticks(alphas, [f"{alpha:.2g}" for alpha in alphas])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("alpha (beta is 1)")
    axes.set_ylabel("% of dense")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_adaptive(data: pd.DataFrame) -> Figure:
    """The share of images by patches left at the end, at the middle operating point."""
    points = sorted(set(data["point"]))
    middle = points[(len(points) - 1) // 2]
    data = data[data["point"] == middle]
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(methods_of(data["method"])):
        left = np.sum(data[data["method"] == name]["left"].tolist(), axis=0)
        axes.step(range(len(left)), 100 * left / left.sum(), where="mid", **style_of(name, i))
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel(f"patches left after the last stage, at {middle:.0%} of dense GMACs")
    axes.set_ylabel("images, %")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG file, atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def draw(folder: Path) -> dict[str, Figure]:
    """All figures that the records of ``folder`` can show, by file name.

    Raises:
        ValueError: there are no records, or they are damaged.
    """
    data = load(folder)
    methods = set(data["method"])
    tuned = {name for name in methods if name.endswith(FINE_TUNED)}
    libraries = {name for name in methods if name.startswith(LIBRARY)}
    # upper bounds, judged on fewer images, would stretch the axes
    bounds = set(data[data["images"] < data["images"].max()]["method"])
    rivals = methods - ABLATIONS - libraries - bounds
    parts: dict[str, tuple[Callable[[pd.DataFrame], Figure], set[str]]] = {
        "tradeoff.png": (draw_tradeoff, rivals - tuned),
        "ablations.png": (draw_tradeoff, ABLATIONS | {OURS} if methods & ABLATIONS else set()),
        "libraries.png": (draw_tradeoff, libraries | {OURS} if libraries else set()),
        "fine_tuning.png": (
            draw_tradeoff, tuned | {name.removesuffix(FINE_TUNED) for name in tuned},
        ),
        "knob.png": (draw_knob, {OURS}),
        "adaptive.png": (draw_adaptive, rivals),
    }  # fmt: skip
    return {
        name: draw_part(data[data["method"].isin(shown)])
        for name, (draw_part, shown) in parts.items()
        if methods & shown
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    prog = "python -m benchmarks.figures"
    config = tyro.cli(FiguresConfig, description=__doc__, args=arguments, prog=prog)
    try:
        for name, figure in draw(config.results).items():
            save_figure(figure, config.results / name)
            print(config.results / name)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
