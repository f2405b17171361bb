"""Trains a backbone: ``python -m trainers.backbone``. Its defaults made the ViT that is shipped.

A run writes ``backbone.safetensors`` and ``backbone.json`` in the form of the files in
``envs/assets``: to ship the default run, copy them there as ``digits_vit.safetensors`` and
``digits_vit.json``.
"""

from __future__ import annotations

import json
import math
import platform
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import tyro
from timm.data import Mixup, resolve_model_data_config
from timm.layers import PatchDropout
from timm.optim import create_optimizer_v2, muon
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tokenprune.envs.datasets import DatasetError, ImageSet, open_images, read_class_names
from tokenprune.envs.models import BackboneError, create_backbone, sha256
from tokenprune.envs.token_prune import pick_device
from tokenprune.trainers.backbone_run import (
    BackboneConfig,
    Record,
    RunFolder,
    TrainingError,
    describe,
    open_run,
)
from tokenprune.trainers.checkpoint import CheckpointError, write_json

EVALUATION_BATCH = 250
MAX_GRAD_NORM = 1.0
PATCH_DROPOUTS = 4  # that take turns, from none to the most
SEEDS_A_RUN = 1_000  # for its epochs: another run seed doesn't see the draws of this one
PACKAGES = ("tokenprune", "torch", "timm", "numpy")


def batches(images: ImageSet, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All whole batches of ``images`` in an order drawn from ``seed``."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        yield images.load(order[start : start + batch_size])


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, device: torch.device) -> float:
    """Share of ``images`` that ``model``, in evaluation mode, classifies correctly."""
    correct = 0
    for start in range(0, len(images), EVALUATION_BATCH):
        stop = min(start + EVALUATION_BATCH, len(images))
        inputs, labels = images.load(range(start, stop))
        correct += int((model(inputs.to(device)).argmax(1).cpu() == labels).sum())
    return correct / len(images)


def patch_dropout(config: BackboneConfig, step: int) -> float:
    """Share of the patches that step number ``step`` leaves out."""
    return config.patch_dropout * (step % PATCH_DROPOUTS) / (PATCH_DROPOUTS - 1)


def learning_rate(config: BackboneConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(1, int(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@contextmanager
def orthogonalise_in(dtype: torch.dtype) -> Iterator[None]:
    """Has timm's Muon compute in ``dtype``. It has no option for that, and CPUs emulate the
    bfloat16 that it uses: the optimizer then takes longer than the model.
    """
    original = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(original, dtype=dtype)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = original


class Learner:
    """A backbone that learns: its weights, their average, and the optimizer.

    Args:
        model: what to train, on its device.
        config: how.
        steps: of the whole training, all epochs together.

    Raises:
        TrainingError: patches shall be left out, and the model has no place for it.
    """

    def __init__(self, model: nn.Module, config: BackboneConfig, steps: int) -> None:
        if config.patch_dropout:
            if not isinstance(getattr(model, "patch_drop", None), nn.Identity | PatchDropout):
                raise TrainingError(f"{config.backbone} has no patch dropout: give 0")
            # arXiv 2208.07220; not among the model's arguments, which the weights are stored with
            prefix: Any = model.num_prefix_tokens
            model.patch_drop = self._patch_drop = PatchDropout(num_prefix_tokens=prefix)
        self.model = model.train()
        self.ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
        self.optimizer = create_optimizer_v2(
            model, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay
        )
        self.config = config
        self.steps = steps

    def learn(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Takes step number ``step``.

        Args:
            inputs: float32 [B, C, H, W].
            targets: labels int64 [B], or float32 [B, classes] where they were mixed and smoothed.
            step: counted from 0, over all epochs.

        Returns:
            the loss, a scalar that carries no gradient.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, self.steps)
        if self.config.patch_dropout:
            self._patch_drop.prob = patch_dropout(self.config, step)
        logits = self.model(inputs.to(memory_format=torch.channels_last))
        smoothing = self.config.label_smoothing if targets.ndim == 1 else 0.0
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        with orthogonalise_in(torch.float32):
            self.optimizer.step()
        self.ema.update(self.model, step=step)
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on, as a tree that ``save_checkpoint`` takes."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to what ``state_dict`` gave.

        Raises:
            CheckpointError: the state is of another model or version.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint is of another backbone: {reason}") from error


def train_epoch(
    learner: Learner,
    data: Iterable[tuple[Tensor, Tensor]],
    first_step: int,
    mixup: Mixup | None,
    device: torch.device,
) -> float:
    """Takes a step a batch of ``data``; returns the mean loss.

    Raises:
        TrainingError: the loss is not finite.
    """
    losses = []
    for step, (inputs, labels) in enumerate(data, start=first_step):
        inputs, labels = inputs.to(device), labels.to(device)
        if mixup is not None:
            inputs, labels = mixup(inputs, labels)
        losses.append(learner.learn(inputs, labels, step))
    loss = float(torch.stack(losses).mean())
    if not math.isfinite(loss):
        raise TrainingError("the loss is not finite: try a smaller lr")
    return loss


def seed_global_generators(seed: int) -> None:
    """Seeds what models (dropout, stochastic depth) and timm's mixup draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Data:
    """The splits of a dataset as a backbone takes them.

    Args:
        config: of the run.
        data_config: timm's, of the backbone.

    Raises:
        DatasetError: one of the splits can't be opened.
        TrainingError: there are fewer training images than a batch holds.
    """

    def __init__(self, config: BackboneConfig, data_config: Mapping[str, Any]) -> None:
        self._config = config
        self._data_config = data_config
        self.validation = open_images(config.dataset, "validation", data_config)
        self.test = open_images(config.dataset, "test", data_config)
        images = len(self._training_images(seed=0))
        self.steps_an_epoch = images // config.batch_size
        if not self.steps_an_epoch:
            raise TrainingError(
                f"{images} training images of {config.dataset} don't fill a batch of "
                f"{config.batch_size}"
            )

    def _training_images(self, seed: int) -> ImageSet:
        config = self._config
        return open_images(
            config.dataset,
            "train",
            self._data_config,
            size=config.epoch_size,
            seed=seed,
            augment=config.augmentation or True,
        )

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch; ``seed`` draws the images, their order and the augmentation."""
        return batches(self._training_images(seed), self._config.batch_size, seed)


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
    learner: Learner,
    data: Data,
    records: Sequence[Record],
    device: torch.device,
    start_time: float,
) -> dict[str, Any]:
    """Measures on the test split and writes the weights and what they are; returns the report."""
    config = learner.config
    facts = {
        "test_accuracy": accuracy(learner.ema.module, data.test, device),
        "validation_accuracy": records[-1]["validation_accuracy"],
        "seed": config.seed,
        "config": describe(config),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }
    weights = run.write_backbone(learner.ema.module.state_dict(), config, data.test.num_classes)
    shipped = {
        "backbone": config.backbone,
        "model_kwargs": config.model_kwargs,
        "class_names": list(data.test.class_names),
        "parameters": sum(parameter.numel() for parameter in learner.model.parameters()),
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


def train(config: BackboneConfig) -> dict[str, Any]:
    """Trains one backbone in its run folder, and returns the report that was written there.

    Raises:
        BackboneError: the backbone is unknown, or can't be built or loaded.
        DatasetError: the dataset is unknown, damaged, or not what the backbone takes.
        CheckpointError: the run to be resumed is missing or damaged.
        TrainingError: the run can't begin for another reason, or diverged.
        OSError: the disk is full or not writable; the last epoch's files are left as they were.
    """
    start_time = time.monotonic()
    run, config = open_run(config)
    try:
        device = pick_device(config.device)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    num_classes = len(read_class_names(config.dataset))
    goes_on = run.checkpoint.exists()
    model = build(config, num_classes, has_weights=goes_on)
    model = model.to(device).to(memory_format=torch.channels_last)
    data = Data(config, resolve_model_data_config(model))
    learner = Learner(model, config, config.epochs * data.steps_an_epoch)
    records: list[Record] = []
    if goes_on:
        state, records = run.read_epochs()
        learner.load_state_dict(state)
    else:
        run.create(config)
    start_time -= records[-1]["seconds"] if records else 0.0
    mixup = make_mixup(config, num_classes)
    for epoch in range(len(records), config.epochs):
        # images of an epoch are a draw of their own: seed 0 is what the game trains on
        seed = config.seed * SEEDS_A_RUN + epoch + 1
        seed_global_generators(seed)
        title = f"epoch {epoch + 1}/{config.epochs}"
        progress = tqdm(data.epoch(seed), title, data.steps_an_epoch, disable=None)
        loss = train_epoch(learner, progress, epoch * data.steps_an_epoch, mixup, device)
        record = {
            "epoch": epoch,
            "loss": loss,
            "validation_accuracy": accuracy(learner.ema.module, data.validation, device),
            "seconds": time.monotonic() - start_time,
        }
        records.append(record)
        run.save_epoch(learner.state_dict(), records)
        run.write_backbone(learner.ema.module.state_dict(), config, num_classes)
        print(json.dumps(record), flush=True)
    return finish(run, learner, data, records, device, start_time)


def main() -> None:
    """The command line."""
    config = tyro.cli(BackboneConfig, description=__doc__)
    try:
        report = train(config)
    except (BackboneError, DatasetError, CheckpointError, TrainingError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"test accuracy {report['test_accuracy']:.4f} after {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
