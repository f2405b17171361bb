"""Trains a backbone: ``python -m trainers.backbone``. Its defaults made the ViT that is shipped.

A run writes ``backbone.safetensors`` and ``backbone.json`` in the form of the files in
``envs/assets``: to ship the default run, copy them there as ``digits_vit.safetensors`` and
``digits_vit.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.data import Mixup, resolve_model_data_config
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.envs.data.datasets import open_images, read_class_names
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.devices import pick_device
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.weights import read_description, sha256, write_weights
from prunevit.trainers.common.checkpoint import write_atomically, write_json
from prunevit.trainers.common.classification import (
    Learner,
    Precision,
    RecipeSeed,
    TrainingImages,
    accuracy,
    check_recipe,
    versions,
)
from prunevit.trainers.common.distributed import ALONE, Ranks, join_ranks
from prunevit.trainers.common.epochs import train_epochs
from prunevit.trainers.common.run import (
    COMMAND_ERRORS,
    RUNS,
    Record,
    RunFolder,
    RunSettings,
    TrainingError,
    device_of,
    open_run,
)
from prunevit.trainers.common.settings import (
    Count,
    Decay,
    JsonObject,
    Positive,
    Share,
    Weight,
    Workers,
    parse_arguments,
)
from prunevit.trainers.common.signals import ends_in_one_line

OWN_OPTIONS = ("pretrained", "checkpoint", "num_classes", "untrained")  # not for model_kwargs
PATCH_DROPOUTS = 4  # that take turns, from none to the most


@dataclass
class BackboneConfig(RunSettings):
    """How a backbone is trained."""

    LATER: ClassVar[Mapping[str, object]] = {
        "augmentation": {},
        "checkpoint": None,
        "model_kwargs": {},
        "pretrained": False,
        "mixup": 0.0,
        "cutmix": 0.0,
        "patch_dropout": 0.0,
        "accumulate": 1,
        "precision": "float32",
        "workers": None,
        "optimizer": "adamw",
    }

    backbone: str = "digits_vit"
    """digits_vit, or any timm model name."""
    model_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of the model, as {"img_size": 32, "patch_size": 4, "depth": 6, "embed_dim": 128,
    "num_heads": 4}; "embed_layer": "conv_stem" or "deep_conv_stem" puts convolutions before the
    blocks."""
    pretrained: bool = False
    """Begin with the weights that timm downloads."""
    checkpoint: Path | None = None
    """Begin with the weights in this file."""
    dataset: str = "digits"
    """digits; folder:PATH with PATH/train/CLASS/*.jpg and PATH/test like it; or a name that
    timm.data.create_dataset takes, as torch/cifar10:FOLDER or hfds/OWNER/NAME."""
    augmentation: JsonObject = field(default_factory=dict)
    """For photographs, arguments of timm.data.create_transform, as {"scale": [0.5, 1],
    "color_jitter": 0.2, "auto_augment": "rand-m9-mstd0.5"}; the digits have their own."""
    mixup: Weight = 0.0
    """Alpha of mixup; 0 turns it off."""
    cutmix: Weight = 0.0
    """Alpha of CutMix; 0 turns it off. With mixup as well, each batch gets one of them."""
    patch_dropout: Decay = 0.75
    """Share of the patches that is left out of a step, at most: every fourth step sees all of them,
    the others leave out a third, two thirds and all of this share. A ViT trained so stands pruning;
    0 turns it off."""
    epochs: Count = 10
    """Passes over epoch_size images."""
    epoch_size: Count = 30_000
    """Images an epoch: as many digits are drawn anew; of photographs a new random part is taken,
    or all of them where they are fewer."""
    batch_size: Count = 128
    """Images a step, of all ranks together."""
    accumulate: Count = 1
    """Parts of a rank's batch whose gradients are added up before the step, for less memory."""
    precision: Precision = "float32"
    """bfloat16 has the model compute in it (autocast); its weights, the loss and the optimizer stay
    in float32."""
    workers: Workers | None = None
    """Processes a rank that read and vary photographs ahead; 0 reads them when they are needed, in
    threads. If not given, 0 on a CPU, and beside a GPU as many as a rank has cores, up to 8."""
    optimizer: str = "adamw"
    """One of timm.optim.list_optimizers(). nmuon learns photographs in far fewer steps."""
    lr: Positive = 2e-3
    """Peak learning rate; linear warm-up, then a cosine to zero."""
    warmup: Share = 0.05
    """Share of all steps that warms up."""
    weight_decay: Weight = 0.05
    """The optimizer's, on weights only."""
    label_smoothing: Decay = 0.05
    """Share of the target that is spread over all classes."""
    ema_decay: Decay = 0.999
    """Decay a step of the averaged weights, which are the ones evaluated and saved."""
    seed: RecipeSeed = 0
    """Seeds the weights, the order and the drawn images."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    run_name: str = "backbone"
    """The run is written to runs/RUN_NAME."""
    resume: Path | None = None
    """A run folder to go on with, in its own configuration; no other option goes with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_recipe(self)
        if not self.run_name:
            raise ValueError("run_name is empty")
        if self.model_kwargs.keys() & {"name", *OWN_OPTIONS}:
            raise ValueError(
                f"model_kwargs={self.model_kwargs} can't set {', '.join(OWN_OPTIONS)} or name: "
                "they have options of their own, or follow from the dataset"
            )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, got {self.batch_size}")

    @property
    def folder(self) -> Path:
        return RUNS / self.run_name


def patch_dropout(config: BackboneConfig, step: int) -> float:
    """Share of the patches that step number ``step`` leaves out."""
    return config.patch_dropout * (step % PATCH_DROPOUTS) / (PATCH_DROPOUTS - 1)


class CrossEntropy:
    """The loss of a backbone whose patches are left out in turns.

    Args:
        model: what shall learn; gets a place for patches to be left out.
        config: how.

    Raises:
        TrainingError: patches shall be left out, and the model has no place for it.
    """

    def __init__(self, model: nn.Module, config: BackboneConfig) -> None:
        if config.patch_dropout:
            if not isinstance(getattr(model, "patch_drop", None), nn.Identity | PatchDropout):
                raise TrainingError(f"{config.backbone} has no patch dropout: give 0")
            # arXiv 2208.07220; not among the model's arguments, which the weights are stored with
            prefix: Any = model.num_prefix_tokens
            model.patch_drop = self._patch_drop = PatchDropout(num_prefix_tokens=prefix)
        self._config = config

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """As ``Loss``; targets that were mixed are smoothed already."""
        if self._config.patch_dropout:
            self._patch_drop.prob = patch_dropout(self._config, step)
        smoothing = self._config.label_smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(model(inputs).float(), targets, label_smoothing=smoothing)


def build(config: BackboneConfig, num_classes: int, has_weights: bool) -> nn.Module:
    """The backbone to train; untrained where the run already ``has_weights`` to restore."""
    torch.manual_seed(config.seed)
    checkpoint = None if has_weights else config.checkpoint
    pretrained = config.pretrained and not has_weights
    return create_backbone(
        config.backbone,
        pretrained=pretrained,
        checkpoint=checkpoint,
        num_classes=num_classes,
        untrained=not pretrained and checkpoint is None,
        **config.model_kwargs,
    )


def make_mixup(config: BackboneConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix, where one of them is turned on."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )


def write_backbone(
    folder: Path, weights: Mapping[str, Tensor], config: BackboneConfig, num_classes: int
) -> Path:
    """Writes the weights of a run in the form that is shipped; returns the file."""
    path = folder / "backbone.safetensors"
    write = partial(
        write_weights,
        weights=weights,
        name=config.backbone,
        num_classes=num_classes,
        model_kwargs=config.model_kwargs,
    )
    write_atomically(path, write)
    return path


def finish(
    run: RunFolder,
    config: BackboneConfig,
    model: nn.Module,
    test: ImageSet,
    device: torch.device,
    workers: int,
) -> dict[str, Any]:
    """Measures ``model`` on the test split and writes its weights and what they are; returns the
    report.
    """
    facts = {
        "test_accuracy": accuracy(model, test, device, workers=workers),
        "validation_accuracy": run.records[-1]["validation_accuracy"],
        "seed": config.seed,
        "config": config.to_json(),
        "versions": versions(),
    }
    weights = write_backbone(run.path, model.state_dict(), config, test.num_classes)
    shipped = {
        "backbone": config.backbone,
        "model_kwargs": config.model_kwargs,
        "class_names": list(test.class_names),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
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


def train(config: BackboneConfig, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Trains one backbone in its run folder, and returns the report that was written there; nothing
    on other ranks than the first.

    Raises:
        BackboneError: the backbone is unknown, or can't be built or loaded.
        DatasetError: the dataset is unknown, damaged, or not what the backbone takes.
        CheckpointError: the run to be resumed is missing or damaged.
        TrainingError: the run can't begin for another reason, or diverged.
        OSError: the disk is full or not writable; the last epoch's files are left as they were.
        RanksError: another rank has ended.
    """
    run, config = open_run(config, ranks)
    try:
        device = pick_device(config.device)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    num_classes = len(read_class_names(config.dataset))
    goes_on = run.is_begun
    if config.checkpoint is not None and not goes_on:
        # what this run writes has to tell the model's arguments too
        described = read_description(config.checkpoint, config.backbone).get("model_kwargs", {})
        config = replace(config, model_kwargs=described | config.model_kwargs)
    model = build(config, num_classes, has_weights=goes_on)
    model = model.to(device).to(memory_format=torch.channels_last)
    data_config = resolve_model_data_config(model)
    validation, test = (
        open_images(config.dataset, split, data_config) for split in ("validation", "test")
    )
    workers = ranks.workers(config.workers, device)
    images = TrainingImages(config.dataset, config, data_config, device, ranks)
    loss = CrossEntropy(model, config)
    steps = config.epochs * images.steps_an_epoch
    learner = Learner(model.train(), loss, config, steps, ranks)
    averaged = learner.ema.module

    def evaluate() -> Record:
        result = accuracy(averaged, validation, device, ranks, workers)
        return {"validation_accuracy": result}

    def write_weights_so_far() -> None:
        if ranks.is_first:
            write_backbone(run.path, averaged.state_dict(), config, num_classes)

    mixup = make_mixup(config, num_classes)
    train_epochs(run, config, learner, images, evaluate, mixup, after_epoch=write_weights_so_far)
    return finish(run, config, averaged, test, device, workers) if ranks.is_first else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m trainers.backbone``."""
    with ends_in_one_line(*COMMAND_ERRORS):
        config = parse_arguments(BackboneConfig, arguments, "backbone", __doc__)
        report = train(config, join_ranks(device_of(config)))
        if report:
            print(f"test accuracy {report['test_accuracy']:.4f} after {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
