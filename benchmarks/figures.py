"""The comparison's pictures, from its records alone: ``python -m benchmarks.figures RESULTS``.

Drawn beside the records, as far as they hold what it takes:

- ``tradeoff.png``: accuracy against the share of the dense compute and against measured speed-up;
- ``ablations.png``: the same for ours with one thing taken away or put in another's place;
- ``libraries.png``: the same for another library's algorithms;
- ``fine_tuning.png``: with and without fine-tuning the backbone;
- ``knob.png``: patches that ours keeps, and its compute, against the price of compute;
- ``pruned.png``: images after each stage, pruned patches white;
- ``curves.png``: how trainings went;
- ``adaptive.png``: how many patches images have left.

Lines are means over seeds, bands the 95% intervals of the means.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunevit.benchmarks.records import FILE, Record, interval, intervals, read
from prunevit.benchmarks.shown import Curve, Pictures, read_curves, read_pictures
from prunevit.benchmarks.trained import RECIPES
from prunevit.envs.rendering import stage_strip
from prunevit.trainers.common.checkpoint import write_atomically

matplotlib.use("Agg", force=False)

OURS = "mappo"
LIBRARY = "benchmarl-"  # before the name of another library's algorithm
FINE_TUNED = "-fine-tuned"  # behind the name of the policy that was not
# ours with one thing taken away or put in another's place
ABLATIONS = {*RECIPES, "mappo-each-price"} - {OURS, "paper", "released", "released-faster"}
SHOWN = 12.0  # points under dense: who loses more is off the chart
MARKERS = "osD^vP*X<>hp"
COLORS = [matplotlib.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
CURVE_TITLES = {
    "accuracy": "accuracy on training images, sampled",
    "keep_ratio": "share of patches kept, sampled",
}


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


def draw_tradeoff(
    rows: Sequence[Record], path: Path, style_of: Callable[[str, int], dict[str, Any]]
) -> None:
    """Accuracy against compute and, where that was timed, against measured speed.

    Args:
        rows: the records.
        path: of the PNG file.
        style_of: a policy and its place among all -> how its line looks.
    """
    panels: list[tuple[str, Callable[[Record], float | None]]] = [
        ("GMACs, % of dense", lambda row: 100 * row["gmacs"] / row["dense_gmacs"]),
        ("measured speed-up over timm's dense model", lambda row: row["speedup"]),
    ]
    if len({row["policy"] for row in rows if row["speedup"] is not None}) < 2:
        panels.pop()  # one line compares nothing
    figure = Figure(figsize=(5.5 * len(panels), 4.6), layout="constrained")
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    dense = rows[0]["dense_accuracy"]
    for axes, (title, x) in zip(columns, panels, strict=True):
        for i, (name, points) in enumerate(grouped(rows).items()):
            draw_line(axes, points, x, lambda row: 100 * row["accuracy"], **style_of(name, i))
        axes.axhline(100 * dense, color="grey", linestyle=":", label="dense")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 100 * dense - SHOWN))
        axes.set_xlabel(title)
        axes.set_ylabel("test accuracy, %")
        axes.grid(alpha=0.3)
    # beside the panels: with many policies it would cover lines
    figure.legend(*columns[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save(figure, path)


def among_all(name: str, place: int) -> dict[str, Any]:
    """A colour and a marker a policy; ours stands out."""
    is_ours = name == OURS
    return {
        "label": name,
        "marker": MARKERS[place % len(MARKERS)],
        "markersize": 4,
        "color": "black" if is_ours else COLORS[(place - 1) % len(COLORS)],
        "linewidth": 2.2 if is_ours else 1.2,
        "zorder": 3 if is_ours else 2,
    }


def in_pairs(name: str, place: int) -> dict[str, Any]:
    """A colour a policy, dashed where it is not fine-tuned."""
    base = name.removesuffix(FINE_TUNED)
    return {
        "label": name,
        "marker": "o",
        "markersize": 4,
        "color": "black" if base == OURS else f"C{sum(map(ord, base)) % 10}",
        "linestyle": "--" if base == name else "-",
    }


def draw_knob(rows: Sequence[Record], path: Path) -> None:
    """What one policy for all budgets keeps and spends by its alpha."""
    points = grouped(rows)[OURS]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    shares: list[tuple[str, str, Callable[[Record], float]]] = [
        ("GMACs", "o", lambda row: 100 * row["gmacs"] / row["dense_gmacs"]),
        ("patches kept, mean of the stages", "^", lambda row: 100 * float(np.mean(row["kept"]))),
    ]
    for label, marker, share in shares:
        draw_line(axes, points, lambda row: row["alpha"], share, marker=marker, label=label)
    axes.set_xscale("log")
    prices = [float(np.mean([row["alpha"] for row in group])) for group in points.values()]
    axes.set_xticks(prices, [f"{price:.2g}" for price in prices])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("price of compute (alpha; beta is 1)")
    axes.set_ylabel("% of dense")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def draw_pruned(pictures: Pictures, path: Path) -> None:
    """Images in rows; in columns policies, each with what it left after each stage."""
    names = sorted(pictures.alive, key=lambda name: (name != OURS, name))
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
            of_whom = f"{name}\n" if i == 0 else ""
            axes.set_title(f"{of_whom}{pictures.labels[i]}: {kept}", fontsize=7)
    save(figure, path)


def draw_curves(curves: Sequence[Curve], path: Path) -> None:
    """Metrics of training by iteration, of each policy; seeds that were cut to other parts of the
    training are met in between.
    """
    metrics = [name for name in CURVE_TITLES if any(name in curve for curve in curves)]
    figure = Figure(figsize=(5.5 * len(metrics), 4), layout="constrained")
    names = sorted({curve["policy"] for curve in curves}, key=lambda name: (name != OURS, name))
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        for i, name in enumerate(names):
            mine = [curve for curve in curves if curve["policy"] == name and metric in curve]
            if not mine:
                continue
            # as far as the shortest goes
            end = min(curve["iteration"][-1] for curve in mine)
            places = [x for x in mine[0]["iteration"] if x <= end]
            values = np.array([np.interp(places, c["iteration"], c[metric]) for c in mine])
            color = among_all(name, i)["color"]
            axes.plot(places, values.mean(0), color=color, label=name, linewidth=1.2)
            axes.fill_between(places, *intervals(values), color=color, alpha=0.2, linewidth=0)
        axes.set_xlabel("iteration")
        axes.set_title(CURVE_TITLES[metric], fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    save(figure, path)


def draw_adaptive(rows: Sequence[Record], path: Path) -> None:
    """Patches that images have left at the end, at the operating point in the middle."""
    points = sorted({row["point"] for row in rows})
    middle = points[(len(points) - 1) // 2]
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, groups) in enumerate(grouped(rows).items()):
        if middle not in groups:
            continue
        group = groups[middle]
        left = np.sum([row["left"] for row in group], axis=0)
        share = 100 * left / left.sum()
        style = {key: among_all(name, i)[key] for key in ("color", "linewidth", "zorder")}
        axes.step(range(len(share)), share, where="mid", label=name, **style)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel(f"patches left behind the last stage, at {middle:.0%} of dense GMACs")
    axes.set_ylabel("images, %")
    figure.legend(loc="outside right upper", fontsize=8)
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
    policies = {row["policy"] for row in rows}
    tuned = {name for name in policies if name.endswith(FINE_TUNED)}
    pairs = tuned | {name.removesuffix(FINE_TUNED) for name in tuned}
    libraries = {name for name in policies if name.startswith(LIBRARY)}
    # bounds, on fewer images than all others, would stretch the axes far beyond what prunes
    most = max(sum(row["left"]) for row in rows)
    bounds = {row["policy"] for row in rows if sum(row["left"]) < most}
    rivals = policies - ABLATIONS - libraries - bounds
    curves, pictures = read_curves(folder), read_pictures(folder)

    def of(names: Set[str]) -> list[Record]:
        return [row for row in rows if row["policy"] in names]

    tuned_or_not = partial(draw_tradeoff, style_of=in_pairs)
    tradeoff = partial(draw_tradeoff, style_of=among_all)
    figures: list[tuple[str, Callable[[Any, Path], None], Any]] = [
        ("tradeoff.png", tradeoff, of(rivals - tuned)),
        ("ablations.png", tradeoff, of(ABLATIONS | {OURS}) if policies & ABLATIONS else []),
        ("libraries.png", tradeoff, of(libraries | {OURS}) if libraries else []),
        ("fine_tuning.png", tuned_or_not, of(pairs)),
        ("knob.png", draw_knob, of({OURS})),
        ("pruned.png", draw_pruned, pictures),
        ("curves.png", draw_curves, curves),
        ("adaptive.png", draw_adaptive, of(rivals)),
    ]
    drawn = []
    for name, draw_figure, shown in figures:
        if shown:
            draw_figure(shown, folder / name)
            drawn.append(folder / name)
    return drawn


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
