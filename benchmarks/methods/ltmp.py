"""LTMP as a method: its thresholds are trained for each operating point, as in the paper. Then one
factor brings the compute to within the tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from prunevit.benchmarks.baselines.ltmp import LTMPViT, learn_thresholds
from prunevit.benchmarks.methods.learned import is_trained, shared_settings
from prunevit.benchmarks.protocol import Benchmark, Knobs, Method, search_knob
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_set import Reseedable
from prunevit.envs.data_config import model_data_config
from prunevit.trainers.common.backbones import StagedViTSettings
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.settings import Count, Positive, Range, Seed

THRESHOLDS = "thresholds.json"
FACTORS = (1e-2, 1e2)  # of the thresholds, between which the compute is searched


@dataclass
class LTMPConfig(StagedViTSettings):
    """How thresholds are trained."""

    compute: Annotated[float, Range(0, 1, open_low=True)] = 0.5
    """What a pass should cost, as a share of the dense model."""
    iterations: Count | None = None
    """Steps of the optimizer, one batch each. By default an epoch, as in the paper."""
    batch_size: Count = 32
    """Images per step. The paper has 128, and eight times as many steps as an epoch of ours."""
    merge_lr: Positive = 5e-3
    """Learning rate of the merging thresholds, the paper's."""
    prune_lr: Positive = 1e-4
    """Learning rate of the pruning thresholds. The paper has 5e-6 for 10,000 steps and 197 tokens,
    which get a third of the attention that each gets among 65."""
    seed: Seed = 0
    """Seeds the images."""
    run_name: str = "ltmp"
    """The folder."""

    @property
    def folder(self) -> Path:
        """Where settings and thresholds are written."""
        return Path(self.run_name)


def train(bench: Benchmark, config: LTMPConfig) -> None:
    """Trains thresholds and writes them into the folder of ``config``."""
    images = open_images(config.dataset, "train", model_data_config(bench.model), augment=True)
    size = min(config.batch_size, len(images))
    steps = config.iterations or len(images) // size
    if isinstance(images, Reseedable):
        images.reseed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        left = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(left) < size:
                left = torch.randperm(len(images), generator=generator)
            pixels, labels = images.load(left[:size])
            left = left[size:]
            yield pixels.to(bench.backbone.device), labels.to(bench.backbone.device)

    config.folder.mkdir(parents=True, exist_ok=True)
    write_json(config.folder / "config.json", config.to_json())
    merge, prune = learn_thresholds(
        bench.backbone, batches(), config.compute, config.merge_lr, config.prune_lr
    )
    write_json(config.folder / THRESHOLDS, {"merge": merge, "prune": prune})


def ltmp(bench: Benchmark, seed: int) -> Method:
    """Thresholds trained for each point. The knob is a factor of the pruning thresholds, and of how
    far the merging thresholds are below 1.
    """

    def make(knobs: Knobs) -> LTMPViT:
        return LTMPViT(bench.backbone, knobs["merge_thresholds"], knobs["prune_thresholds"])

    def tune(gmacs: float) -> Knobs:
        compute = round(1e9 * gmacs / bench.backbone.dense_macs, 4)
        folder = bench.runs / f"ltmp-{100 * compute:g}-{seed}"
        config = LTMPConfig(compute=compute, **shared_settings(bench, folder, seed))
        if not is_trained(folder, config.to_json(), THRESHOLDS):
            train(bench, config)
        learned = json.loads((folder / THRESHOLDS).read_text(encoding="utf-8"))

        def scaled(factor: float) -> Knobs:
            return {
                "factor": factor,
                "merge_thresholds": [1 - factor * (1 - each) for each in learned["merge"]],
                "prune_thresholds": [factor * each for each in learned["prune"]],
            }

        def cost(factor: float) -> float:
            return bench.validate(make(scaled(factor))).gmacs

        return search_knob(cost, *FACTORS, gmacs, scaled)

    return Method(tune, make)
