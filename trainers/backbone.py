"""Trains a backbone: ``python -m trainers.backbone``.

Its defaults trained the digits' ViT that comes with the package. A run writes
``backbone.safetensors`` and ``backbone.json``, in the same form as ``digits_vit.safetensors`` and
``digits_vit.json`` in ``envs/assets``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.data import resolve_model_data_config
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.envs.data.datasets import DIGITS, open_images, read_class_names
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.devices import pick_device
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.weights import sha256
from prunevit.trainers.common.backbones import BackboneSettings, all_model_kwargs, write_backbone
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.classification import (
    Learner,
    TrainingImages,
    make_mixup,
    versions,
)
from prunevit.trainers.common.closing import say_where_and_what_next
from prunevit.trainers.common.distributed import ALONE, Ranks, join_ranks
from prunevit.trainers.common.epochs import train_epochs
from prunevit.trainers.common.evaluation import accuracy
from prunevit.trainers.common.frozen import CachedFeatures, FrozenPart, freeze, frozen_blocks
from prunevit.trainers.common.recipe import Recipe
from prunevit.trainers.common.run import (
    COMMAND_ERRORS,
    RUNS,
    Record,
    TrainingError,
    device_of,
    open_run,
)
from prunevit.trainers.common.settings import Decay, Threads, Weight, parse_arguments
from prunevit.trainers.common.signals import ends_in_one_line

PATCH_DROPOUTS = 4  # shares of patches that steps leave out in turn, from none to the largest


@dataclass
class BackboneConfig(Recipe, BackboneSettings):
    """Which backbone is trained on what, and how."""

    LATER: ClassVar[Mapping[str, object]] = {
        "freeze": "none",
        "layer_decay": 1.0,
        "augment": True,
        "cache_gb": 0.0,
        "threads": None,
    }

    freeze: str = "none"
    """What keeps its weights: none, all (but for the head: a linear probe), or blocks:N (all before
    block N, counted from 0; the later ones learn)."""
    cache_gb: Weight = 0.0
    """Memory, in GB, that keeps what the frozen part made of images, so that it is computed once:
    of validation images, and of training images if nothing varies them (--no-augment
    --patch-dropout 0). Digits of the training are drawn anew in any case. The frozen part is then
    in evaluation mode, and a resumed run ends like one that was not stopped up to rounding."""
    augment: bool = True
    """Vary training images each time they are seen (photographs: timm's training transform)."""
    mixup: Weight = 0.0
    """Alpha of mixup; 0 turns it off."""
    cutmix: Weight = 0.0
    """Alpha of CutMix; 0 turns it off. With mixup as well, each batch gets one of the two."""
    patch_dropout: Decay = 0.75
    """Largest share of the patches that a step leaves out. In turn, steps see all patches, or leave
    out a third, two thirds or all of this share. The ViT then tolerates pruning. 0 turns it off."""
    label_smoothing: Decay = 0.05
    """Share of the target that is spread over all classes."""
    threads: Threads | None = None
    """CPU threads. By default torch's own choice."""
    run_name: str = "backbone"
    """The run is written to runs/RUN_NAME."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run_name:
            raise ValueError("run_name is empty")
        if self.freeze not in ("none", "all") and frozen_blocks(self.freeze) is None:
            raise ValueError(f"freeze={self.freeze!r}: give none, all or blocks:N, as in blocks:8")
        if self.freeze != "none" and not self.pretrained and self.checkpoint is None:
            raise ValueError(
                f"freeze={self.freeze!r} would keep random weights: give --checkpoint FILE or "
                "--pretrained"
            )
        if self.cache_gb and self.freeze == "none":
            raise ValueError("cache_gb keeps what the frozen part computes: give --freeze too")
        if self.cache_gb and not self.augment and (self.patch_dropout or self.mixup or self.cutmix):
            raise ValueError(
                "with cache_gb and --no-augment training images stay as they are: give "
                "--patch-dropout 0, and neither --mixup nor --cutmix"
            )
        if self.augmentation and not self.augment:
            raise ValueError("give --augmentation or --no-augment, not both")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, got {self.batch_size}")

    @property
    def folder(self) -> Path:
        """Where a new run is written."""
        return RUNS / self.run_name

    @property
    def caches_training(self) -> bool:
        """Whether features of training images are kept too."""
        return bool(self.cache_gb) and not self.augment and self.dataset != DIGITS


def patch_dropout(config: BackboneConfig, step: int) -> float:
    """Share of the patches that step number ``step`` (from 0) leaves out."""
    return config.patch_dropout * (step % PATCH_DROPOUTS) / (PATCH_DROPOUTS - 1)


class CrossEntropy:
    """The cross entropy of a backbone that is trained with patch dropout.

    Args:
        model: the backbone; its ``patch_drop`` is replaced.
        config: the settings.

    Attributes:
        answer: what computes logits from the model and its inputs.

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
        self.answer: Callable[[nn.Module, Tensor], Tensor] = lambda model, inputs: model(inputs)

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """A ``Loss``. Mixed targets are smoothed already."""
        if self._config.patch_dropout:
            self._patch_drop.prob = patch_dropout(self._config, step)
        smoothing = self._config.label_smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(
            self.answer(model, inputs).float(), targets, label_smoothing=smoothing
        )


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


def keep_features(
    config: BackboneConfig,
    learner: Learner,
    loss: CrossEntropy,
    images: TrainingImages,
    validation: ImageSet,
) -> tuple[Callable[[Tensor], Tensor], ImageSet]:
    """Has what the frozen part makes of images computed once, as ``cache_gb`` says.

    Returns:
        what computes logits from features with the averaged weights, and the validation images as
        features.
    """
    averaged, device = learner.ema.module, images.device
    frozen = FrozenPart(averaged, config.freeze)
    frozen.stay_in_evaluation_mode(learner.model)
    whole = images.open_whole() if config.caches_training else None
    count = len(validation) + (0 if whole is None else len(whole))
    room = config.cache_gb * 1e9 / count  # bytes an image
    if whole is not None:
        dtype = torch.bfloat16 if config.precision == "bfloat16" else None
        features = partial(frozen.features, dtype=dtype)
        images.whole = CachedFeatures(whole, features, device, room * len(whole))
        rest = frozen.rest_of(learner.model)
        loss.answer = lambda _, features: rest(features)
    kept = CachedFeatures(validation, frozen.features, device, room * len(validation))
    return frozen.rest_of(averaged), kept


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
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.caches_training and ranks.count > 1:
        raise TrainingError("--cache-gb with --no-augment is for one process, without torchrun")
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
    validation: ImageSet
    validation, test = (
        open_images(config.dataset, split, data_config) for split in ("validation", "test")
    )
    workers = ranks.workers(config.workers, device)
    images = TrainingImages(config.dataset, config, data_config, device, ranks, config.augment)
    loss = CrossEntropy(model, config)
    mixup = make_mixup(config.mixup, config.cutmix, config.label_smoothing, num_classes)
    learner = Learner(model.train(), loss, config, images.steps, ranks, mixup)
    averaged = learner.ema.module
    answer: Callable[[Tensor], Tensor] = averaged
    if config.cache_gb:
        answer, validation = keep_features(config, learner, loss, images, validation)

    def evaluate() -> Record:
        result = accuracy(answer, validation, device, ranks, workers)
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
            name, dataset = (report["config"][key] for key in ("backbone", "dataset"))
            say_where_and_what_next(
                config.resume or config.folder,
                f"prunevit train --backbone {name} --checkpoint FOLDER/backbone.safetensors "
                f"--dataset {shlex.quote(dataset)}",
            )


if __name__ == "__main__":
    main()
