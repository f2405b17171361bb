"""The backbone that a training starts from, and the one it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from prunevit.envs.data.datasets import DIGITS, has_classes, read_class_names
from prunevit.envs.devices import pick_device
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import OnPrune, PruneAt, StagedViT
from prunevit.envs.vit.weights import read_description, write_weights
from prunevit.trainers.common.checkpoint import write_atomically
from prunevit.trainers.common.run import RunSettings
from prunevit.trainers.common.settings import JsonObject, Threads

# arguments of create_backbone that are settings of their own, or follow from the dataset
OWN_SETTINGS = ("name", "pretrained", "checkpoint", "num_classes", "untrained", "new_head")


@dataclass
class BackboneSettings(RunSettings):
    """Which ViT, and which images."""

    backbone: str = "digits_vit"
    """digits_vit, which comes with the package, or any timm model name."""
    model_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of the backbone, such as {"img_size": 32, "patch_size": 4, "depth": 6,
    "embed_dim": 128, "num_heads": 4}. "embed_layer": "conv_stem" or "deep_conv_stem" puts
    convolutions before the blocks."""
    pretrained: bool = False
    """Start from the weights that timm downloads."""
    checkpoint: Path | None = None
    """Start from the weights in this file (safetensors, or a state dict of torch.save)."""
    dataset: str = "digits"
    """digits; folder:PATH, which has PATH/train/CLASS/NAME.jpg and the same in PATH/test;
    photos:PATH, any tree of images, where no labels are needed; or a name of
    timm.data.create_dataset, such as torch/cifar10:FOLDER or hfds/OWNER/NAME."""

    def __post_init__(self) -> None:
        super().__post_init__()
        surplus = [name for name in OWN_SETTINGS if name in self.model_kwargs]
        if surplus:
            raise ValueError(
                f"model_kwargs can't set {', '.join(surplus)}: num_classes follows from the "
                "dataset, the others have options of their own"
            )


@dataclass
class StagedViTSettings(BackboneSettings):
    """Which ViT is pruned before which blocks, on which images, and where it runs."""

    LATER: ClassVar[Mapping[str, object]] = {"prune_at": "block", "on_prune": "drop"}

    prune_before: tuple[int, ...] | None = (1, 3)
    """Blocks, counted from 0, before which tokens can be pruned. None: all but the first."""
    prune_at: PruneAt = "block"
    """block: prune before these blocks begin. mlp: prune inside of them, between their attention
    and their MLP."""
    on_prune: OnPrune = "drop"
    """drop: what a pruned patch holds is gone. merge: it is averaged into the most similar patch
    that stays, and its similarities count as compute. DynamicViT learns by masks all the same and
    merges in evaluations."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: Threads | None = None
    """CPU threads. By default torch's own choice."""

    def stage(self, model: nn.Module, torch_compile: bool = False) -> StagedViT:
        """``model`` with these stages."""
        return StagedViT(
            model,
            self.prune_before,
            torch_compile=torch_compile,
            on_prune=self.on_prune,
            prune_at=self.prune_at,
        )


def make_backbone(config: BackboneSettings, num_classes: int | None = None) -> nn.Module:
    """Makes the backbone, frozen, on the CPU.

    Args:
        config: the settings.
        num_classes: outputs of its head. With None they are the model's own, or for random weights
            the dataset's classes.

    Raises:
        BackboneError: it can't be built or loaded.
    """
    fits_data = (
        num_classes is None
        and not config.pretrained
        and config.checkpoint is None
        and config.dataset != DIGITS
        and has_classes(config.dataset)
    )
    return create_backbone(
        config.backbone,
        pretrained=config.pretrained,
        checkpoint=config.checkpoint,
        num_classes=len(read_class_names(config.dataset)) if fits_data else num_classes,
        **config.model_kwargs,
    ).requires_grad_(False)


def load_backbone(config: BackboneSettings, num_classes: int | None = None) -> nn.Module:
    """``make_backbone``, on its device."""
    # convolutional stems run faster on this layout; nothing else depends on it but the last bits
    model = make_backbone(config, num_classes).to(pick_device(config.device))
    return model.to(memory_format=torch.channels_last)


def all_model_kwargs(config: BackboneSettings) -> dict[str, Any]:
    """The model's arguments: those that its checkpoint describes, then those in the settings.

    Raises:
        BackboneError: the checkpoint is of another backbone, or can't be read.
    """
    described: dict[str, Any] = {}
    if config.checkpoint is not None:
        described = read_description(config.checkpoint, config.backbone).get("model_kwargs", {})
    return described | config.model_kwargs


def write_backbone(
    folder: Path, model: nn.Module, config: BackboneSettings, class_names: Sequence[str] | None
) -> Path:
    """Writes a trained model's weights with the description of the model; returns the file.

    Raises:
        OSError: the disk is full or not writable.
    """
    path = folder / "backbone.safetensors"
    num_classes: Any = model.num_classes
    write = partial(
        write_weights,
        weights=model.state_dict(),
        name=config.backbone,
        num_classes=num_classes,
        model_kwargs=config.model_kwargs,
        class_names=class_names,
    )
    write_atomically(path, write)
    return path
