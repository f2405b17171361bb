"""Trains a backbone: ``python -m trainers.backbone``. Its defaults made the ViT that is shipped.

A run writes ``backbone.safetensors`` and ``backbone.json`` in the form of the files in
``envs/assets``: to ship the default run, copy them there as ``digits_vit.safetensors`` and
``digits_vit.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import tyro
from timm.data import Mixup, resolve_model_data_config
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.envs.data.datasets import DatasetError, ImageSet, open_images, read_class_names
from prunevit.envs.token_prune import pick_device
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.weights import BackboneError, read_description, sha256
from prunevit.trainers.backbone_run import BackboneConfig, write_backbone
from prunevit.trainers.common.checkpoint import CheckpointError, write_json
from prunevit.trainers.common.classification import (
    Learner,
    Place,
    TrainingImages,
    accuracy,
    train_epoch,
    versions,
)
from prunevit.trainers.common.distributed import ALONE, Ranks, RanksError, join_ranks
from prunevit.trainers.common.run_folder import (
    Record,
    RunFolder,
    TrainingError,
    describe,
    device_of,
    open_run,
)
from prunevit.trainers.common.signals import ends_in_one_line, says_how_to_go_on

PATCH_DROPOUTS = 4  # that take turns, from none to the most


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


def finish(
    run: RunFolder,
    config: BackboneConfig,
    model: nn.Module,
    test: ImageSet,
    records: Sequence[Record],
    device: torch.device,
    workers: int,
    start_time: float,
) -> dict[str, Any]:
    """Measures ``model`` on the test split and writes its weights and what they are; returns the
    report.
    """
    facts = {
        "test_accuracy": accuracy(model, test, device, workers=workers),
        "validation_accuracy": records[-1]["validation_accuracy"],
        "seed": config.seed,
        "config": describe(config),
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
        "seconds": time.monotonic() - start_time,
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
    start_time = time.monotonic()
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
    records: list[Record] = []
    place: Place | None = None
    if goes_on:
        state, records = run.read_epochs()
        learner.load_state_dict(state)
        place = state.get("place")
        start_time -= state["seconds"] if place else records[-1]["seconds"]
        ranks.wait()  # all have read what there was
    else:
        run.create(config)
    mixup = make_mixup(config, num_classes)

    def save(place: Place) -> None:
        seconds = time.monotonic() - start_time
        run.save_epoch(learner.state_dict() | {"place": place, "seconds": seconds}, records)

    # within an epoch each rank's generators stand elsewhere, and rank zero knows its own alone
    saver = save if ranks.count == 1 else None
    with says_how_to_go_on(run.path), ranks.stop_together():
        for epoch in range(len(records), config.epochs):
            loss_of_epoch = train_epoch(learner, images, epoch, device, mixup, place, saver)
            place = None
            record = {
                "epoch": epoch,
                "loss": loss_of_epoch,
                "validation_accuracy": accuracy(averaged, validation, device, ranks, workers),
                "seconds": time.monotonic() - start_time,
            }
            records.append(record)
            run.save_epoch(learner.state_dict(), records)
            if ranks.is_first:
                write_backbone(run.path, averaged.state_dict(), config, num_classes)
                print(json.dumps(record), flush=True)
    if not ranks.is_first:
        return {}
    return finish(run, config, averaged, test, records, device, workers, start_time)


def main() -> None:
    """The command line."""
    config = tyro.cli(BackboneConfig, description=__doc__)
    with ends_in_one_line(
        BackboneError, DatasetError, CheckpointError, TrainingError, OSError, RanksError
    ):
        report = train(config, join_ranks(device_of(config)))
        if report:
            print(f"test accuracy {report['test_accuracy']:.4f} after {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
