"""What ``benchmarks.compare`` leaves for the figures beside its records: training curves, and which
patches of a few images each method kept. Figures can then be drawn without runs and models.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prunevit.agents.pruned_vit import PrunedViT
from prunevit.benchmarks.methods.registry import METHODS, rebuild
from prunevit.benchmarks.protocol import Benchmark
from prunevit.benchmarks.records import Records
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data_config import model_data_config
from prunevit.envs.rendering import denormalise
from prunevit.trainers.common.checkpoint import write_atomically

CURVES, PICTURES = "curves.jsonl", "pictures.npz"
CURVE_POINTS = 100  # a curve is thinned to so many
CURVE_METRICS = ("accuracy", "keep_ratio", "reward", "loss")
IMAGES = 6
PICTURED = ("mappo", "mappo-fine-tuned", "dynamic-vit", "attention")  # with seed 0
ALIVE = "alive "  # before a method's name

Pictures = Mapping[str, NDArray[Any]]
"""A few test images, and what methods left of them: ``images`` uint8 [n, H, W, C], ``labels``, the
``grid`` of patches (rows, columns), and for each method ``alive NAME`` bool [n, T, N].
"""


def open_curves(folder: Path) -> Records:
    """Training curves: ``method``, ``seed``, and equally long lists ``iteration`` and metrics."""
    return Records(folder / CURVES, ("method", "seed"), {"method", "seed", "iteration"})


def thin_curve(metrics: Path) -> dict[str, list[float]]:
    """The curve of a run's ``metrics.jsonl``: means over at most ``CURVE_POINTS`` parts."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    parts = np.array_split(np.arange(len(records)), min(len(records), CURVE_POINTS))
    names = [name for name in CURVE_METRICS if all(name in record for record in records)]
    return {
        name: [float(f"{np.mean([records[i][name] for i in part]):.4g}") for part in parts]
        for name in ("iteration", *names)
    }


def leave_curves(folder: Path, field: Sequence[tuple[str, int]], bench: Benchmark) -> None:
    """Saves the training curves of ``field``, methods and seeds, whose runs are there."""
    curves = open_curves(folder)
    for name, seed in field:
        metrics = bench.runs / f"{name}-{seed}" / "metrics.jsonl"
        # fine-tuning counts in epochs
        if metrics.is_file() and not METHODS[name].fine_tunes:
            curves.put({"method": name, "seed": seed, **thin_curve(metrics)})


def write_pictures(folder: Path, pictures: Pictures) -> None:
    """Saves pictures, atomically."""

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **pictures)

    write_atomically(folder / PICTURES, save)


def read_pictures(folder: Path) -> Pictures:
    """The pictures of a comparison; empty where it left none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / PICTURES
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: remove it ({error})") from error


@torch.inference_mode()
def leave_pictures(
    folder: Path,
    field: Sequence[tuple[str, int]],
    records: Records,
    bench: Benchmark,
    test: ImageSet,
) -> None:
    """Saves what is left of ``IMAGES`` images, evenly spread, at the middle operating point. What
    other methods left of them in earlier calls is kept.
    """
    models = {}
    for name, seed in field:
        row = records.find(name, seed, bench.middle_point)
        if seed == 0 and name in PICTURED and row is not None:
            try:
                models[name] = rebuild(row, bench)
            except ValueError as error:
                print(f"no pictures of {name}: {error}", flush=True)
    if not models:
        return
    pixels, labels = test.load(np.linspace(0, len(test) - 1, IMAGES).astype(int).tolist())
    data_config = model_data_config(bench.model)
    shown = denormalise(pixels, tuple(data_config["mean"]), tuple(data_config["std"]))
    images = (shown.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    before = read_pictures(folder)
    pictures = dict(before) if np.array_equal(before.get("images", ()), images) else {}
    pictures |= {
        "images": images,
        "labels": np.array([test.class_names[int(label)] for label in labels]),
        "grid": np.array(bench.backbone.grid_size),
    }
    for name, model in models.items():
        assert isinstance(model, PrunedViT)
        alive = model.trace(pixels.to(bench.backbone.device)).alive
        pictures[ALIVE + name] = alive.cpu().numpy()
    write_pictures(folder, pictures)
