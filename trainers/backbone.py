"""Trains a backbone: ``python -m trainers.backbone``. Its defaults made the ViT that the package ships."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tokenprune.envs.datasets import ImageSet, open_images
from tokenprune.envs.models import create_backbone
from tokenprune.trainers.checkpoint import load_checkpoint, save_checkpoint, write_atomically, write_json


@dataclass
class BackboneConfig:
    """How a backbone is trained."""

    backbone: str = "digits_vit"
    """digits_vit, or any timm model name."""
    dataset: str = "digits"
    """digits, folder:PATH, or any name that timm.data.create_dataset takes."""
    epochs: int = 24
    """Passes over epoch_size images; the digits are drawn anew each time."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 2e-3
    """Peak learning rate; linear warm-up, then a cosine to zero."""
    warmup: float = 0.05
    """Share of all steps that warms up."""
    weight_decay: float = 0.05
    """AdamW's, on weights only."""
    label_smoothing: float = 0.05
    """Share of the target that is spread over all classes."""
    ema_decay: float = 0.999
    """Decay a step of the averaged weights, which are the ones evaluated and saved."""
    epoch_size: int = 30_000
    """Training images an epoch, where the dataset is drawn (digits)."""
    seed: int = 0
    """Seeds the weights, the order and the drawn images."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    run_name: str = "backbone"
    """The run is written to runs/RUN_NAME."""
    resume: Path | None = None
    """A run folder to go on with; its own configuration is used."""


def batches(images: ImageSet, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All whole batches of ``images`` in an order drawn from ``seed``."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        yield images.load(order[start : start + batch_size])


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, batch_size: int, device: torch.device) -> float:
    """Share of ``images`` that ``model`` classifies correctly."""
    was_training = model.training
    model.eval()
    correct = 0
    for start in range(0, len(images), batch_size):
        inputs, labels = images.load(range(start, min(start + batch_size, len(images))))
        correct += int((model(inputs.to(device)).argmax(1).cpu() == labels).sum())
    model.train(was_training)
    return correct / len(images)


def learning_rate(config: BackboneConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(1, int(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(config: BackboneConfig) -> dict[str, Any]:
    """Trains one backbone and returns its report."""
    start_time = time.monotonic()
    device = torch.device("cpu")
    torch.manual_seed(config.seed)
    model = create_backbone(config.backbone).to(device).to(memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay
    )
    folder = Path("runs") / config.run_name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", asdict(config) | {"resume": None})
    validation = open_images(config.dataset, "validation", {})
    steps_an_epoch = config.epoch_size // config.batch_size
    first = 0
    checkpoint = folder / "checkpoint.safetensors"
    if config.resume is not None:
        saved = load_checkpoint(checkpoint)
        model.load_state_dict(saved["model"])
        ema.module.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
    for epoch in range(first, config.epochs):
        # images of an epoch are a draw of their own: seed 0 is what the game trains on
        draw = config.seed * 1_000 + epoch + 1
        images = open_images(
            config.dataset, "train", {}, size=config.epoch_size, seed=draw, augment=True
        )
        losses = []
        progress = tqdm(
            batches(images, config.batch_size, draw), total=steps_an_epoch, desc=f"epoch {epoch}",
            disable=None,
        )
        for i, (inputs, labels) in enumerate(progress):
            step = epoch * steps_an_epoch + i
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, config.epochs * steps_an_epoch)
            logits = model(inputs.to(device).to(memory_format=torch.channels_last))
            loss = F.cross_entropy(
                logits, labels.to(device), label_smoothing=config.label_smoothing
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.update(model, step=step)
            losses.append(loss.detach())
        record = {
            "epoch": epoch,
            "loss": float(torch.stack(losses).mean()),
            "validation_accuracy": accuracy(ema.module, validation, 250, device),
            "seconds": time.monotonic() - start_time,
        }
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(record, flush=True)
        save_checkpoint(
            checkpoint,
            {
                "epoch": epoch + 1,
                "model": model.state_dict(),
                "ema": ema.module.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
        )
        weights = {k: v.contiguous().clone() for k, v in ema.module.state_dict().items()}
        write_atomically(folder / "backbone.safetensors", lambda path: save_file(weights, path))
    report = {"test_accuracy": accuracy(ema.module, open_images(config.dataset, "test", {}), 250, device)}
    write_json(folder / "report.json", report)
    return report


if __name__ == "__main__":
    print(train(tyro.cli(BackboneConfig)))
