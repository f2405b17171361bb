"""Methods that are trained for each operating point, as their papers do it: LTMP and DiffRate. One
factor then brings the compute to within the tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor

from prunevit.benchmarks.baselines import diffrate as diffrate_baseline
from prunevit.benchmarks.baselines.ltmp import LTMPViT, learn_thresholds
from prunevit.benchmarks.methods.learned import is_trained, shared_settings
from prunevit.benchmarks.protocol import (
    Benchmark,
    FixedScheduleModel,
    Knobs,
    Method,
    check_matched,
    nearest,
    search_knob,
)
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_set import ImageSet, Reseedable
from prunevit.envs.data_config import model_data_config
from prunevit.trainers.common.backbones import StagedViTSettings
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.settings import Count, Positive, Range, Seed

RESULT = "learned.json"
FACTORS = (1e-2, 1e2)  # of thresholds, between which the compute is searched
SHARES = 1_000  # up to all patches of what goes, and as many beyond, that are tried


@dataclass
class EachPointConfig(StagedViTSettings):
    """How a method is trained for one operating point."""

    compute: Annotated[float, Range(0, 1, open_low=True)] = 0.5
    """What a pass should cost, as a share of the dense model."""
    iterations: Count | None = None
    """Steps of the optimizer, one batch each. By default an epoch."""
    batch_size: Count = 32
    """Images per step."""
    seed: Seed = 0
    """Seeds the images."""
    run_name: str = "each-point"
    """The folder."""

    @property
    def folder(self) -> Path:
        """Where settings and result are written."""
        return Path(self.run_name)

    def steps(self, images: ImageSet) -> int:
        """How many there are."""
        return self.iterations or max(1, len(images) // self.batch_size)


@dataclass
class LTMPConfig(EachPointConfig):
    """How thresholds are trained."""

    merge_lr: Positive = 5e-3
    """Learning rate of the merging thresholds, the paper's."""
    prune_lr: Positive = 1.5e-5
    """Learning rate of the pruning thresholds. The paper has 5e-6 for 197 tokens; of 65 tokens each
    gets three times as much attention."""


C = TypeVar("C", bound=EachPointConfig)


def batches(
    images: ImageSet, config: EachPointConfig, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training's images [B, C, H, W] and labels [B], every image once in an epoch."""
    if isinstance(images, Reseedable):
        images.reseed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(config.steps(images)):
        if len(left) < config.batch_size:
            left = torch.randperm(len(images), generator=generator)
        pixels, labels = images.load(left[: config.batch_size])
        left = left[config.batch_size :]
        yield pixels.to(device), labels.to(device)


def learned(
    bench: Benchmark,
    kind: type[C],
    name: str,
    seed: int,
    gmacs: float,
    learn: Callable[[C, ImageSet], Any],
) -> Any:
    """What ``learn`` returned for an operating point, in this process or an earlier one."""
    compute = round(1e9 * gmacs / bench.backbone.dense_macs, 4)
    folder = bench.runs / f"{name}-{100 * compute:g}-{seed}"
    config = kind(compute=compute, **shared_settings(bench, folder, seed))
    if not is_trained(folder, config.to_json(), RESULT):
        images = open_images(config.dataset, "train", model_data_config(bench.model), augment=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config.to_json())
        write_json(folder / RESULT, learn(config, images))
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def ltmp(bench: Benchmark, seed: int) -> Method:
    """LTMP. The knob is a factor of the pruning thresholds, and of how far the merging thresholds
    are below 1.
    """
    backbone = bench.backbone

    def learn(config: LTMPConfig, images: ImageSet) -> list[list[float]]:
        drawn = batches(images, config, backbone.device)
        rates = config.merge_lr, config.prune_lr
        return [*learn_thresholds(backbone, drawn, config.compute, *rates)]

    def make(knobs: Knobs) -> LTMPViT:
        return LTMPViT(backbone, knobs["merge_thresholds"], knobs["prune_thresholds"])

    def tune(gmacs: float) -> Knobs:
        merge, prune = learned(bench, LTMPConfig, "ltmp", seed, gmacs, learn)

        def scaled(factor: float) -> Knobs:
            return {
                "factor": factor,
                "merge_thresholds": [1 - factor * (1 - each) for each in merge],
                "prune_thresholds": [factor * each for each in prune],
            }

        def cost(factor: float) -> float:
            return bench.cost(make(scaled(factor)))

        return search_knob(cost, *FACTORS, gmacs, scaled)

    return Method(tune, make)


def diffrate(bench: Benchmark, seed: int) -> Method:
    """DiffRate. The knob is a factor of how many patches go."""
    backbone, model = bench.backbone, bench.model
    patches = backbone.num_patches
    count = diffrate_baseline.macs_counter(model, backbone.image_shape)

    def learn(config: EachPointConfig, images: ImageSet) -> list[tuple[int, int]]:
        drawn, steps = batches(images, config, backbone.device), config.steps(images)
        return diffrate_baseline.learn_schedule(backbone, drawn, steps, config.compute)

    def make(knobs: Knobs) -> FixedScheduleModel:
        schedule = knobs["schedule"]
        counts = diffrate_baseline.token_counts(patches, schedule)
        kept = [counts[block] for block in backbone.whole_from]
        pruned = diffrate_baseline.DiffRateViT(model, schedule)
        return FixedScheduleModel(pruned, backbone, count(schedule), kept)

    def tune(gmacs: float) -> Knobs:
        stay = learned(bench, EachPointConfig, "diffrate", seed, gmacs, learn)

        def scaled(factor: float) -> tuple[tuple[int, int], ...]:
            return tuple(
                (max(1, round(patches - factor * (patches - pruned))),
                 max(1, round(patches - factor * (patches - merged))))
                for pruned, merged in stay
            )  # fmt: skip

        factors = (i / SHARES for i in range(2 * SHARES, -1, -1))
        choices = list(dict.fromkeys(map(scaled, factors)))
        schedule, macs = nearest(choices, count, gmacs * 1e9)
        knobs = {"schedule": [list(kept) for kept in schedule]}
        check_matched(macs / 1e9, gmacs, knobs)
        return knobs

    return Method(tune, make)
