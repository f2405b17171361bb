"""How the training of a backbone is configured, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from prunevit.envs.vit.weights import write_weights
from prunevit.trainers.common.checkpoint import write_atomically
from prunevit.trainers.common.classification import Precision, unfit
from prunevit.trainers.common.run_folder import RUNS, JsonObject

OWN_OPTIONS = ("pretrained", "checkpoint", "num_classes", "untrained")  # not for model_kwargs


@dataclass
class BackboneConfig:
    """How a backbone is trained."""

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
    mixup: float = 0.0
    """Alpha of mixup; 0 turns it off."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 turns it off. With mixup as well, each batch gets one of them."""
    patch_dropout: float = 0.75
    """Share of the patches that is left out of a step, at most: every fourth step sees all of them,
    the others leave out a third, two thirds and all of this share. A ViT trained so stands pruning;
    0 turns it off."""
    epochs: int = 10
    """Passes over epoch_size images."""
    epoch_size: int = 30_000
    """Images an epoch: as many digits are drawn anew; of photographs a new random part is taken,
    or all of them where they are fewer."""
    batch_size: int = 128
    """Images a step, of all ranks together."""
    accumulate: int = 1
    """Parts of a rank's batch whose gradients are added up before the step, for less memory."""
    precision: Precision = "float32"
    """bfloat16 has the model compute in it (autocast); its weights, the loss and the optimizer stay
    in float32."""
    workers: int | None = None
    """Processes a rank that read and vary photographs ahead; 0 reads them when they are needed, in
    threads. If not given, 0 on a CPU, and beside a GPU as many as a rank has cores, up to 8."""
    optimizer: str = "adamw"
    """One of timm.optim.list_optimizers(). nmuon learns photographs in far fewer steps."""
    lr: float = 2e-3
    """Peak learning rate; linear warm-up, then a cosine to zero."""
    warmup: float = 0.05
    """Share of all steps that warms up."""
    weight_decay: float = 0.05
    """The optimizer's, on weights only."""
    label_smoothing: float = 0.05
    """Share of the target that is spread over all classes."""
    ema_decay: float = 0.999
    """Decay a step of the averaged weights, which are the ones evaluated and saved."""
    seed: int = 0
    """Seeds the weights, the order and the drawn images."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    run_name: str = "backbone"
    """The run is written to runs/RUN_NAME."""
    resume: Path | None = None
    """A run folder to go on with, in its own configuration; no other option goes with it."""

    def __post_init__(self) -> None:
        refused = unfit(self) | {
            "label_smoothing": not 0 <= self.label_smoothing < 1,
            "mixup": self.mixup < 0,
            "cutmix": self.cutmix < 0,
            "patch_dropout": not 0 <= self.patch_dropout < 1,
            "run_name": not self.run_name,
            "model_kwargs": bool(self.model_kwargs.keys() & {"name", *OWN_OPTIONS}),
        }
        for name, is_refused in refused.items():
            if is_refused:
                raise ValueError(f"{name} can't be {getattr(self, name)!r}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, got {self.batch_size}")

    @property
    def folder(self) -> Path:
        return RUNS / self.run_name


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
