"""What ``benchmarks.compare`` leaves for the figures beside its records: training curves, and which
patches of a few images each method kept. Figures can then be drawn without runs and models.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.checkpoint import write_atomically

CURVES, PICTURES = "curves.jsonl", "pictures.npz"
CURVE_POINTS = 100  # a curve is thinned to so many
CURVE_METRICS = ("accuracy", "keep_ratio", "reward", "loss")
IMAGES = 6
PICTURED = ("mappo", "mappo-fine-tuned", "dynamic-vit", "attention")  # with seed 0
ALIVE = "alive "  # before a method's name


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


@dataclass(frozen=True)
class Pictures:
    """A few test images, and what methods left of them.

    Attributes:
        images: uint8 [n, H, W, C].
        labels: the name of each image's class.
        grid: rows and columns of patches.
        alive: by method, bool [n, T, N].
    """

    images: NDArray[np.uint8]
    labels: list[str]
    grid: tuple[int, int]
    alive: Mapping[str, NDArray[np.bool_]]

    def write(self, folder: Path) -> None:
        arrays = {
            "images": self.images,
            "labels": np.array(self.labels),
            "grid": np.array(self.grid),
            **{f"{ALIVE}{name}": alive for name, alive in self.alive.items()},
        }

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)

        write_atomically(folder / PICTURES, save)


def read_pictures(folder: Path) -> Pictures | None:
    """The pictures of a comparison; None where it left none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / PICTURES
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            rows, columns = arrays["grid"].tolist()
            alive = {
                name.removeprefix(ALIVE): arrays[name]
                for name in arrays.files
                if name.startswith(ALIVE)
            }
            return Pictures(arrays["images"], arrays["labels"].tolist(), (rows, columns), alive)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: remove it ({error})") from error


@torch.inference_mode()
def take_pictures(
    folder: Path, models: Mapping[str, PrunedViT], images: ImageSet, backbone: StagedViT
) -> None:
    """Notes what each model leaves of the same ``IMAGES`` images, evenly spread. What other methods
    left of these images earlier is kept.
    """
    indices = np.linspace(0, len(images) - 1, IMAGES).astype(int).tolist()
    pixels, labels = images.load(indices)
    data_config = model_data_config(backbone.model)
    shown = denormalise(pixels, tuple(data_config["mean"]), tuple(data_config["std"]))
    colours = (shown.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    before = read_pictures(folder)
    alive: dict[str, NDArray[np.bool_]] = {}
    if before is not None and np.array_equal(before.images, colours):
        alive.update(before.alive)
    on_device = pixels.to(backbone.device)
    for name, model in models.items():
        alive[name] = model.trace(on_device).alive.cpu().numpy()
    names = [images.class_names[int(label)] for label in labels]
    Pictures(colours, names, backbone.grid_size, alive).write(folder)


def leave_curves(folder: Path, field: Sequence[tuple[str, int]], bench: Benchmark) -> None:
    """Saves the training curves of ``field`` whose runs are there."""
    curves = open_curves(folder)
    for name, seed in field:
        metrics = bench.runs / f"{name}-{seed}" / "metrics.jsonl"
        # fine-tuning counts in epochs
        if metrics.is_file() and not METHODS[name].fine_tunes:
            curves.put({"method": name, "seed": seed, **thin_curve(metrics)})


def leave_pictures(
    folder: Path,
    field: Sequence[tuple[str, int]],
    records: Records,
    bench: Benchmark,
    test: ImageSet,
) -> None:
    """Saves what is left of a few images at the middle operating point."""
    models = {}
    for name, seed in field:
        row = records.find(name, seed, bench.middle_point)
        if seed or name not in PICTURED or row is None:
            continue
        try:
            model = rebuild(row, bench)
        except ValueError as error:
            print(f"no pictures of {name}: {error}", flush=True)
            continue
        assert isinstance(model, PrunedViT)
        models[name] = model
    if models:
        take_pictures(folder, models, test, bench.backbone)
