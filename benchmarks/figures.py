"""Draws a comparison's figures from its records: ``python -m benchmarks.figures RESULTS``.

These are drawn beside the records, where they hold what is needed:

- ``tradeoff.png``: accuracy against the share of the dense compute and against measured speed-up;
- ``ablations.png``: the same for ours with one part removed or replaced;
- ``libraries.png``: the same for another library's algorithms;
- ``fine_tuning.png``: with and without fine-tuning the backbone;
- ``knob.png``: the patches that ours keeps, and its compute, against alpha;
- ``pruned.png``: images after each stage, with pruned patches white;
- ``curves.png``: training curves;
- ``adaptive.png``: how many patches the images have left.

Lines are means over seeds, and bands their 95% intervals.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunevit.benchmarks.artifacts import Pictures, open_curves, read_pictures
from prunevit.benchmarks.bootstrap import interval, intervals
from prunevit.benchmarks.methods.recipes import RECIPES
from prunevit.benchmarks.records import FILE, Record, read
from prunevit.envs.rendering import stage_strip
from prunevit.trainers.common.checkpoint import write_atomically

OURS = "mappo"
LIBRARY = "benchmarl-"  # before the name of another library's algorithm
FINE_TUNED = "-fine-tuned"  # after the name of the method that is not
ABLATIONS = {*RECIPES, "mappo-each-price"} - {OURS, "paper", "released", "released-faster"}
MOST_LOSS = 12.0  # points under dense that a chart shows
MARKERS = "osD^vP*X<>hp"
COLORS = [matplotlib.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
CURVE_TITLES = {
    "accuracy": "accuracy on training images, sampled",
    "keep_ratio": "share of patches kept, sampled",
}

Style = dict[str, Any]


@dataclass
class FiguresConfig:
    """Which records."""

    results: tyro.conf.Positional[Path]
    """A folder that benchmarks.compare wrote."""


def ours_first(names: Set[str]) -> list[str]:
    """Names in alphabetical order, after ours."""
    return sorted(names, key=lambda name: (name != OURS, name))


def grouped(rows: Sequence[Record]) -> dict[str, dict[float, list[Record]]]:
    """Records by method, ours first, and operating point, ascending."""
    return {
        name: {
            point: [row for row in rows if (row["method"], row["point"]) == (name, point)]
            for point in sorted({row["point"] for row in rows if row["method"] == name})
        }
        for name in ours_first({row["method"] for row in rows})
    }


def cost_percent(row: Record) -> float:
    """GMACs in percent of dense."""
    return 100 * row["gmacs"] / row["dense_gmacs"]


def draw_line(
    axes: Axes,
    points: dict[float, list[Record]],
    x: Callable[[Record], float | None],
    y: Callable[[Record], float],
    **style: Any,
) -> None:
    """Draws means over seeds with a band. Points where ``x`` is unknown are left out."""
    places, means, lows, highs = [], [], [], []
    for group in points.values():
        pairs = [(place, y(row)) for row in group if (place := x(row)) is not None]
        if not pairs:
            continue
        known, values = zip(*pairs, strict=True)
        low, high = interval(values)
        places.append(float(np.mean(known)))
        means.append(float(np.mean(values)))
        lows.append(low)
        highs.append(high)
    if places:
        (line,) = axes.plot(places, means, **style)
        axes.fill_between(places, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)


def style_of(name: str, place: int) -> Style:
    """A colour and a marker for each method; ours stands out, fine-tuned ones are
    dashed.

    Args:
        name: of the method.
        place: among all methods of the figure.
    """
    is_ours = name == OURS
    return {
        "label": name,
        "marker": MARKERS[place % len(MARKERS)],
        "markersize": 4,
        "linestyle": "--" if name.endswith(FINE_TUNED) else "-",
        "color": "black" if is_ours else COLORS[(place - 1) % len(COLORS)],
        "linewidth": 2.2 if is_ours else 1.2,
        "zorder": 3 if is_ours else 2,
    }


def draw_tradeoff(rows: Sequence[Record]) -> Figure:
    """Accuracy against compute and, where that was timed, against measured speed."""
    panels: list[tuple[str, Callable[[Record], float | None]]] = [
        ("GMACs, % of dense", cost_percent),
        ("measured speed-up over timm's dense model", lambda row: row["speedup"]),
    ]
    if len({row["method"] for row in rows if row["speedup"] is not None}) < 2:
        panels.pop()  # a single line compares nothing
    figure = Figure(figsize=(5.5 * len(panels), 4.6), layout="constrained")
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    dense = 100 * rows[0]["dense_accuracy"]
    for axes, (title, x) in zip(columns, panels, strict=True):
        for i, (name, points) in enumerate(grouped(rows).items()):
            draw_line(axes, points, x, lambda row: 100 * row["accuracy"], **style_of(name, i))
        axes.axhline(dense, color="grey", linestyle=":", label="dense")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], dense - MOST_LOSS))
        axes.set_xlabel(title)
        axes.set_ylabel("test accuracy, %")
        axes.grid(alpha=0.3)
    # outside, since with many methods it would cover lines
    figure.legend(*columns[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def draw_knob(rows: Sequence[Record]) -> Figure:
    """What one policy for all budgets keeps and spends against its alpha."""
    points = grouped(rows)[OURS]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    shares: list[tuple[str, str, Callable[[Record], float]]] = [
        ("GMACs", "o", cost_percent),
        ("patches kept, mean of the stages", "^", lambda row: 100 * float(np.mean(row["kept"]))),
    ]
    for label, marker, share in shares:
        draw_line(axes, points, lambda row: row["alpha"], share, marker=marker, label=label)
    axes.set_xscale("log")
    alphas = [float(np.mean([row["alpha"] for row in group])) for group in points.values()]
    axes.set_xticks(alphas, [f"{alpha:.2g}" for alpha in alphas])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("alpha (beta is 1)")
    axes.set_ylabel("% of dense")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_pruned(pictures: Pictures) -> Figure:
    """A row for each image and a column for each method, with what it left after each stage."""
    names = ours_first(pictures.alive.keys())
    count, height, width = pictures.images.shape[:3]
    stages = 1 + max(alive.shape[1] for alive in pictures.alive.values())
    figure = Figure(
        figsize=(1.1 * stages * len(names) * width / height, 1.25 * count), layout="constrained"
    )
    pixels = torch.from_numpy(pictures.images).permute(0, 3, 1, 2) / 255
    for i, row in enumerate(figure.subplots(count, len(names), squeeze=False)):
        for axes, name in zip(row, names, strict=True):
            alive = torch.from_numpy(pictures.alive[name][i])
            alive = torch.cat([torch.ones_like(alive[:1]), alive])
            axes.imshow(stage_strip(pixels[i], alive, pictures.grid))
            axes.set_axis_off()
            kept = " ".join(str(int(patches)) for patches in alive.sum(1))
            title = f"{name}\n" if i == 0 else ""
            axes.set_title(f"{title}{pictures.labels[i]}: {kept}", fontsize=7)
    return figure


def draw_curves(curves: Sequence[Record]) -> Figure:
    """Training curves of each method. Seeds with other iterations are interpolated."""
    metrics = [name for name in CURVE_TITLES if any(name in curve for curve in curves)]
    figure = Figure(figsize=(5.5 * len(metrics), 4), layout="constrained")
    names = ours_first({curve["method"] for curve in curves})
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        for i, name in enumerate(names):
            mine = [curve for curve in curves if curve["method"] == name and metric in curve]
            if not mine:
                continue
            end = min(curve["iteration"][-1] for curve in mine)  # of the shortest
            places = [x for x in mine[0]["iteration"] if x <= end]
            values = np.array([np.interp(places, c["iteration"], c[metric]) for c in mine])
            color = style_of(name, i)["color"]
            axes.plot(places, values.mean(0), color=color, label=name, linewidth=1.2)
            axes.fill_between(places, *intervals(values), color=color, alpha=0.2, linewidth=0)
        axes.set_xlabel("iteration")
        axes.set_title(CURVE_TITLES[metric], fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def draw_adaptive(rows: Sequence[Record]) -> Figure:
    """The share of images by patches left at the end, at the middle operating point."""
    points = sorted({row["point"] for row in rows})
    middle = points[(len(points) - 1) // 2]
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, groups) in enumerate(grouped(rows).items()):
        if middle not in groups:
            continue
        left = np.sum([row["left"] for row in groups[middle]], axis=0)
        share = 100 * left / left.sum()
        style = {key: style_of(name, i)[key] for key in ("color", "linewidth", "zorder")}
        axes.step(range(len(share)), share, where="mid", label=name, **style)
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
    file = folder / FILE
    rows = read(file) if file.is_file() else []
    if not rows:
        raise ValueError(f"{file} holds no records: python -m benchmarks.compare --out {folder}")
    methods = {row["method"] for row in rows}
    tuned = {name for name in methods if name.endswith(FINE_TUNED)}
    libraries = {name for name in methods if name.startswith(LIBRARY)}
    # upper bounds, judged on fewer images, would stretch the axes
    most = max(sum(row["left"]) for row in rows)
    bounds = {row["method"] for row in rows if sum(row["left"]) < most}
    rivals = methods - ABLATIONS - libraries - bounds

    def of(names: Set[str]) -> list[Record]:
        return [row for row in rows if row["method"] in names]

    figures: dict[str, tuple[Callable[[Any], Figure], Any]] = {
        "tradeoff.png": (draw_tradeoff, of(rivals - tuned)),
        "ablations.png": (draw_tradeoff, of(ABLATIONS | {OURS}) if methods & ABLATIONS else []),
        "libraries.png": (draw_tradeoff, of(libraries | {OURS}) if libraries else []),
        "fine_tuning.png": (
            draw_tradeoff,
            of(tuned | {name.removesuffix(FINE_TUNED) for name in tuned}),
        ),
        "knob.png": (draw_knob, of({OURS})),
        "pruned.png": (draw_pruned, read_pictures(folder)),
        "curves.png": (draw_curves, open_curves(folder).rows),
        "adaptive.png": (draw_adaptive, of(rivals)),
    }
    return {name: draw_one(shown) for name, (draw_one, shown) in figures.items() if shown}


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
