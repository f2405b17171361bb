"""Settings of the trainings on labelled images: ``trainers.backbone`` and ``trainers.finetune``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from timm.optim import list_optimizers

from prunevit.trainers.common.run import RunSettings
from prunevit.trainers.common.settings import (
    Count,
    Decay,
    JsonObject,
    Positive,
    Range,
    Share,
    Weight,
    Workers,
)

Precision = Literal["float32", "bfloat16"]
# so that the seeds of its epochs stay below 2**32, as NumPy requires
RecipeSeed = Annotated[int, Range(0, 4_000_000)]


@dataclass
class Recipe(RunSettings):
    """How a model is trained on labelled images."""

    augmentation: JsonObject = field(default_factory=dict)
    """Arguments of timm.data.create_transform for photographs, such as {"scale": [0.5, 1],
    "color_jitter": 0.2, "auto_augment": "rand-m9-mstd0.5"}. Digits have their own augmentation."""
    epochs: Count = 10
    """Passes over epoch_size images."""
    epoch_size: Count = 30_000
    """Images per epoch. Digits are drawn anew for each epoch. Of photographs, each epoch takes
    another random part, or all of them if there are fewer."""
    batch_size: Count = 128
    """Images per step, over all ranks together."""
    accumulate: Count = 1
    """Micro-batches per step and rank whose gradients are added up, to need less memory."""
    precision: Precision = "float32"
    """bfloat16 runs the model in bfloat16 (autocast). Weights, losses, optimizer and pruning policy
    stay in float32."""
    workers: Workers | None = None
    """Processes per rank that load photographs ahead of time. 0 loads them when they are needed, in
    threads. By default 0 on a CPU, and with a GPU one for each core of the rank, up to 8."""
    optimizer: str = "adamw"
    """One of timm.optim.list_optimizers(). On photographs nmuon needs far fewer steps."""
    lr: Positive = 2e-3
    """Peak learning rate: it warms up linearly, then falls to zero along a cosine."""
    warmup: Share = 0.05
    """Share of all steps in which the learning rate warms up."""
    layer_decay: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    """Learning rate of each layer over that of the layer after it, as timm groups them. Pretrained
    ViTs are often fine-tuned with 0.65 to 0.75, so that early layers change little."""
    weight_decay: Weight = 0.05
    """Weight decay. Biases and norms have none."""
    ema_decay: Decay = 0.999
    """Decay per step of the moving average of the weights. The averaged weights are evaluated and
    saved."""
    seed: RecipeSeed = 0
    """Seeds new weights, and which images are drawn in which order."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    resume: Path | None = None
    """Run folder to continue, with the settings it was started with. No other option goes with
    it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate={self.accumulate} must be at most batch_size={self.batch_size}"
            )
        if self.optimizer not in list_optimizers():
            raise ValueError(
                f"optimizer={self.optimizer!r} is unknown: choose from timm.optim.list_optimizers()"
            )
