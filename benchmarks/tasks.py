"""The tasks of ``benchmarks.compare``: data sets, each with its backbone and stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunevit.envs.vit.staged_vit import PruneAt
from prunevit.trainers.common.config import MappoConfig


@dataclass(frozen=True)
class Task:
    """A data set with its backbone.

    Attributes:
        dataset: as ``open_images`` takes it; None where the user has to name it, and to give the
            backbone's weights.
        prune_before: stages of every method that doesn't bring its own.
        released_stages: three stages like RL4EViT's (3, 6, 9) of 12.
        points: operating points, shares of the dense model's compute.
        alpha_range: alphas that one policy for many of them is trained under.
        prune_at: where in these blocks they stand, as ``StagedViT`` takes it.
        dithers: whether learned policies, DynamicViT, ATS and the threshold on class attention may
            dither, where that is better on validation. In photographs neighbouring patches are
            alike, and would all go at once.
        training: further options of ``trainers.mappo``.
        ours: options that ours and its variants have here besides, chosen on validation.
        model_kwargs: arguments of the backbone.
        speed_batch: images of a call when methods are timed; they are also timed image by image.
        speed_images: how many images they are timed on, and an eighth of them image by image.
        fine_tuning: options of ``trainers.finetune``.
        dynamic_vit: options of ``trainers.dynamic_vit``, such that each of its trainings computes
            about as much in the backbone as ours: a backward pass counts as two forward passes, and
            a pruned one as its share.
    """

    name: str
    backbone: str
    dataset: str | None
    prune_before: tuple[int, ...]
    released_stages: tuple[int, ...]
    points: tuple[float, ...]
    alpha_range: tuple[float, float]
    prune_at: PruneAt = "block"
    dithers: bool = True
    training: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    speed_batch: int = 64
    speed_images: int = 256
    fine_tuning: Mapping[str, Any] = field(default_factory=dict)
    dynamic_vit: Mapping[str, Any] = field(default_factory=dict)

    @property
    def embeds(self) -> bool:
        """Whether the backbone plays without a classifier."""
        return self.training.get("accuracy") == "embedding"

    def config(self, dataset: str | None, checkpoint: Path | None, pretrained: bool) -> MappoConfig:
        """The settings that a training on this task starts from.

        Raises:
            ValueError: the data or the backbone's weights are not named.
        """
        dataset = self.dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError(f"task {self.name}: where are its images? Give --data folder:PATH")
        if self.dataset is None and checkpoint is None and not pretrained:
            raise ValueError(
                f"task {self.name} needs a trained backbone: give --checkpoint FILE "
                "(python -m trainers.backbone makes one) or --pretrained"
            )
        return MappoConfig(
            backbone=self.backbone,
            dataset=dataset,
            checkpoint=checkpoint,
            pretrained=pretrained,
            model_kwargs=dict(self.model_kwargs),
            prune_before=self.prune_before,
            prune_at=self.prune_at,
            **self.training,
        )


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="digits",
            backbone="digits_vit",
            dataset="digits",
            dithers=False,
            prune_before=(0, 2),
            prune_at="mlp",
            released_stages=(2, 4, 6),
            points=(0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
            alpha_range=(0.002, 1.0),
            training={"iterations": 400, "eval_every": 200},
            dynamic_vit={"iterations": 800},
        ),
        Task(
            name="cifar10",
            backbone="vit_tiny_patch16_224",
            dataset=None,
            prune_before=(1, 3, 5),
            prune_at="mlp",
            released_stages=(2, 4, 6),
            points=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
            alpha_range=(0.01, 4.0),
            training={"iterations": 500, "eval_every": 250},
            ours={"on_prune": "merge"},
            # as the backbone was trained
            fine_tuning={
                "augmentation": {"scale": [0.5, 1], "color_jitter": 0.0},
                "epochs": 8,
                "epoch_size": 45_000,
                "labels": 1.0,
                "optimizer": "nmuon",
                "lr": 2e-3,
            },
            dynamic_vit={"iterations": 1_500},
        ),
        Task(
            name="imagenet",
            backbone="deit_small_patch16_224",
            dataset=None,
            prune_before=(3, 6, 9),
            released_stages=(3, 6, 9),
            points=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
            alpha_range=(0.05, 1.0),
            training={"eval_every": 250, "eval_size": 5_000},
            speed_batch=32,
            speed_images=64,
            fine_tuning={"epochs": 1, "epoch_size": 1_300_000},
            dynamic_vit={"iterations": 1_500},
        ),
        Task(
            name="embeddings",
            backbone="vit_small_patch14_dinov2",
            dataset=None,
            prune_before=(2, 5, 8),
            prune_at="mlp",
            released_stages=(3, 6, 9),
            points=(0.4, 0.6, 0.8),
            alpha_range=(0.005, 0.5),
            training={"eval_every": 250, "accuracy": "embedding"},
            model_kwargs={"img_size": 224},
            speed_batch=32,
            speed_images=64,
        ),
    )
}
