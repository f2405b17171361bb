"""Trains a backbone: ``python -m trainers.backbone``.

Its defaults trained the digits' ViT that comes with the package. A run writes
``backbone.safetensors`` and ``backbone.json``, in the same form as ``digits_vit.safetensors`` and
``digits_vit.json`` in ``envs/assets``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.data import resolve_model_data_config
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.envs.data.datasets import open_images, read_class_names
from prunevit.envs.devices import pick_device
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.weights import sha256
from prunevit.trainers.common.backbones import BackboneSettings, all_model_kwargs, write_backbone
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.classification import (
    Learner,
    TrainingImages,
    make_mixup,
    train_from,
    versions,
)
from prunevit.trainers.common.distributed import ALONE, Ranks, join_ranks
from prunevit.trainers.common.epochs import train_epochs
from prunevit.trainers.common.evaluation import accuracy
from prunevit.trainers.common.recipe import Recipe
from prunevit.trainers.common.run import (
    COMMAND_ERRORS,
    RUNS,
    Record,
    TrainingError,
    device_of,
    open_run,
)
from prunevit.trainers.common.settings import Decay, Weight, parse_arguments
from prunevit.trainers.common.signals import ends_in_one_line

FROZEN_BLOCKS = re.compile(r"blocks:(\d+)")
PATCH_DROPOUTS = 4  # shares of patches that steps leave out in turn, from none to the largest


@dataclass
class BackboneConfig(Recipe, BackboneSettings):
    """Which backbone is trained on what, and how."""

    LATER: ClassVar[Mapping[str, object]] = {"freeze": "none", "layer_decay": 1.0}

    freeze: str = "none"
    """What keeps its weights: none, all (but for the head: a linear probe), or blocks:N (all before
    block N, counted from 0; the later ones learn)."""
    mixup: Weight = 0.0
    """Alpha of mixup; 0 turns it off."""
    cutmix: Weight = 0.0
    """Alpha of CutMix; 0 turns it off. With mixup as well, each batch gets one of the two."""
    patch_dropout: Decay = 0.75
    """Largest share of the patches that a step leaves out. In turn, steps see all patches, or leave
    out a third, two thirds or all of this share. The ViT then tolerates pruning. 0 turns it off."""
    label_smoothing: Decay = 0.05
    """Share of the target that is spread over all classes."""
    run_name: str = "backbone"
    """The run is written to runs/RUN_NAME."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run_name:
            raise ValueError("run_name is empty")
        if self.freeze not in ("none", "all") and not FROZEN_BLOCKS.fullmatch(self.freeze):
            raise ValueError(f"freeze={self.freeze!r}: give none, all or blocks:N, as in blocks:8")
        if self.freeze != "none" and not self.pretrained and self.checkpoint is None:
            raise ValueError(
                f"freeze={self.freeze!r} would keep random weights: give --checkpoint FILE or "
                "--pretrained"
            )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, got {self.batch_size}")

    @property
    def folder(self) -> Path:
        """Where a new run is written."""
        return RUNS / self.run_name


def patch_dropout(config: BackboneConfig, step: int) -> float:
    """Share of the patches that step number ``step`` (from 0) leaves out."""
    return config.patch_dropout * (step % PATCH_DROPOUTS) / (PATCH_DROPOUTS - 1)


def freeze(model: Any, what: str) -> None:
    """Lets the weights of ``model`` that ``what`` names keep their values.

    Args:
        model: timm's ViT.
        what: as the setting ``freeze``.

    Raises:
        TrainingError: the model has fewer blocks.
    """
    if what == "none":
        return
    model.requires_grad_(False)
    if what == "all":
        model.get_classifier().requires_grad_(True)
        return
    blocks, first = getattr(model, "blocks", ()), int(what.removeprefix("blocks:"))
    if first > len(blocks):
        raise TrainingError(f"--freeze {what}: the backbone has {len(blocks)} blocks")
    train_from(model, first)


class CrossEntropy:
    """The cross entropy of a backbone that is trained with patch dropout.

    Args:
        model: the backbone; its ``patch_drop`` is replaced.
        config: the settings.

    Raises:
        TrainingError: ``patch_dropout`` is set, and the model doesn't support it.
    """

    def __init__(self, model: nn.Module, config: BackboneConfig) -> None:
        if config.patch_dropout:
            if not isinstance(getattr(model, "patch_drop", None), nn.Identity | PatchDropout):
                raise TrainingError(
                    f"{config.backbone} has no patch dropout: give --patch-dropout 0"
                )
            # arXiv 2208.07220. Not an argument of the model: those are saved with the weights
            prefix: Any = model.num_prefix_tokens
            model.patch_drop = self._patch_drop = PatchDropout(num_prefix_tokens=prefix)
        self._config = config

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """A ``Loss``. Mixed targets are smoothed already."""
        if self._config.patch_dropout:
            self._patch_drop.prob = patch_dropout(self._config, step)
        smoothing = self._config.label_smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(model(inputs).float(), targets, label_smoothing=smoothing)


def build(config: BackboneConfig, num_classes: int, has_weights: bool) -> nn.Module:
    """Builds the backbone. With ``has_weights`` its weights will come from the run's checkpoint."""
    torch.manual_seed(config.seed)
    checkpoint = None if has_weights else config.checkpoint
    pretrained = config.pretrained and not has_weights
    return create_backbone(
        config.backbone,
        pretrained=pretrained,
        checkpoint=checkpoint,
        num_classes=num_classes,
        untrained=not pretrained and checkpoint is None,
        new_head=True,
        **config.model_kwargs,
    )


def train(config: BackboneConfig, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Trains a backbone in its run folder. Returns the report that it writes there; ranks other
    than the first return an empty one.

    Raises:
        BackboneError: the backbone is unknown, or can't be built or loaded.
        DatasetError: the dataset is unknown or damaged, or doesn't fit the backbone.
        CheckpointError: the run to resume is missing or damaged.
        TrainingError: the run can't begin for another reason, or the loss is not finite.
        ValueError: there is no such device, or the ranks can't share a batch evenly.
        OSError: the disk is full or not writable; the last epoch's files are left as they were.
        RanksError: another rank has ended.
    """
    run, config = open_run(config, ranks)
    device = pick_device(config.device)
    num_classes = len(read_class_names(config.dataset))
    resumed = run.is_begun
    if not resumed:
        # the run's files must describe the whole model, whose arguments a checkpoint may hold
        config = replace(config, model_kwargs=all_model_kwargs(config))
    model = build(config, num_classes, has_weights=resumed)
    model = model.to(device).to(memory_format=torch.channels_last)
    freeze(model, config.freeze)
    data_config = resolve_model_data_config(model)
    validation, test = (
        open_images(config.dataset, split, data_config) for split in ("validation", "test")
    )
    workers = ranks.workers(config.workers, device)
    images = TrainingImages(config.dataset, config, data_config, device, ranks)
    loss = CrossEntropy(model, config)
    mixup = make_mixup(config.mixup, config.cutmix, config.label_smoothing, num_classes)
    learner = Learner(model.train(), loss, config, images.steps, ranks, mixup)
    averaged = learner.ema.module

    def evaluate() -> Record:
        result = accuracy(averaged, validation, device, ranks, workers)
        return {"validation_accuracy": result}

    def write_weights_so_far() -> None:
        if ranks.is_first:
            write_backbone(run.path, averaged, config, test.class_names)

    train_epochs(run, learner, images, evaluate, after_epoch=write_weights_so_far)
    if not ranks.is_first:
        return {}
    facts = {
        "test_accuracy": accuracy(averaged, test, device, workers=workers),
        "validation_accuracy": run.records[-1]["validation_accuracy"],
        "seed": config.seed,
        "config": config.to_json(),
        "versions": versions(),
    }
    weights = write_backbone(run.path, averaged, config, test.class_names)
    shipped = {
        "backbone": config.backbone,
        "model_kwargs": config.model_kwargs,
        "class_names": list(test.class_names),
        "parameters": sum(parameter.numel() for parameter in averaged.parameters()),
        "sha256": sha256(weights),
    }
    write_json(run.path / "backbone.json", shipped | facts)
    report = facts | {
        "seconds": run.seconds,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    write_json(run.path / "report.json", report)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m trainers.backbone``."""
    with ends_in_one_line(*COMMAND_ERRORS):
        config = parse_arguments(BackboneConfig, arguments, __doc__)
        report = train(config, join_ranks(device_of(config)))
        if report:
            print(f"test accuracy {report['test_accuracy']:.4f} after {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
