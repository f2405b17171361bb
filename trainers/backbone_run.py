"""How the training of a backbone is configured, and what it leaves on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from timm.optim import list_optimizers
from torch import Tensor

from tokenprune.envs.models import write_weights
from tokenprune.trainers.checkpoint import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
    write_json,
    write_text,
)

MAX_SEED = 4_000_000  # the seeds of its epochs stay below 2**32, which NumPy asks for
OWN_OPTIONS = ("pretrained", "checkpoint", "num_classes", "untrained")  # not for model_kwargs

Record = dict[str, Any]


class TrainingError(RuntimeError):
    """A training that can't begin or can't go on; the message says why."""


def _parse_json_object(arguments: list[str]) -> dict[str, Any]:
    value = json.loads(arguments[0])
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, as {{}}, got {arguments[0]}")
    return value


JsonObject = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_parse_json_object,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


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
    """Images a step."""
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
        allowed = {
            "epochs": self.epochs >= 1,
            "epoch_size": self.epoch_size >= 1,
            "batch_size": self.batch_size >= 1,
            "optimizer": self.optimizer in list_optimizers(),
            "lr": self.lr > 0,
            "warmup": 0 <= self.warmup <= 1,
            "weight_decay": self.weight_decay >= 0,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "ema_decay": 0 <= self.ema_decay < 1,
            "mixup": self.mixup >= 0,
            "cutmix": self.cutmix >= 0,
            "patch_dropout": 0 <= self.patch_dropout < 1,
            "seed": 0 <= self.seed <= MAX_SEED,
            "run_name": bool(self.run_name),
            "model_kwargs": not self.model_kwargs.keys() & {"name", *OWN_OPTIONS},
        }
        for name, is_allowed in allowed.items():
            if not is_allowed:
                raise ValueError(f"{name} can't be {getattr(self, name)!r}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, got {self.batch_size}")


def describe(config: BackboneConfig) -> dict[str, Any]:
    """``config`` as JSON values, without what is of one process only."""
    values = asdict(config)
    del values["resume"]
    return values | {"checkpoint": config.checkpoint and str(config.checkpoint)}


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; ``create`` makes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.safetensors"
        self._metrics = path / "metrics.jsonl"

    def create(self, config: BackboneConfig) -> None:
        write_json(self.path / "config.json", describe(config))

    def read_config(self) -> BackboneConfig:
        file = self.path / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{self.path} is no run: it has no config.json")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            values["checkpoint"] = values.get("checkpoint") and Path(values["checkpoint"])
            return BackboneConfig(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged or of another version: {error}") from error

    def save_epoch(self, state: Mapping[str, Any], records: list[Record]) -> None:
        """Notes that so many epochs are done as there are ``records``."""
        # a kill before the checkpoint is there leaves one record too many, which reading drops
        write_text(self._metrics, "".join(json.dumps(record) + "\n" for record in records))
        save_checkpoint(self.checkpoint, {"epoch": len(records), **state})

    def read_epochs(self) -> tuple[dict[str, Any], list[Record]]:
        """The state at the end of the last epoch, and the records up to there.

        Raises:
            CheckpointError: the files are damaged, or don't belong together.
        """
        state = load_checkpoint(self.checkpoint)
        try:
            lines = self._metrics.read_text(encoding="utf-8").splitlines()[: state["epoch"]]
            records = [json.loads(line) for line in lines]
        except (KeyError, ValueError, OSError) as error:
            raise CheckpointError(f"{self.path} can't be resumed: {error}") from error
        if len(records) < state["epoch"]:
            raise CheckpointError(f"{self._metrics} lacks epochs that {self.checkpoint} has")
        return state, records

    def write_backbone(
        self, weights: Mapping[str, Tensor], config: BackboneConfig, num_classes: int
    ) -> Path:
        """Writes the weights in the form that is shipped; returns the file."""
        path = self.path / "backbone.safetensors"
        write = partial(
            write_weights,
            weights=weights,
            name=config.backbone,
            num_classes=num_classes,
            model_kwargs=config.model_kwargs,
        )
        write_atomically(path, write)
        return path


def open_run(config: BackboneConfig) -> tuple[RunFolder, BackboneConfig]:
    """The folder of a run, new or to be resumed, and the configuration that holds there.

    Raises:
        TrainingError: the folder exists and is not to be resumed, or options go with ``resume``.
        CheckpointError: there is nothing to resume, or it is damaged.
    """
    if config.resume is None:
        folder = Path("runs") / config.run_name
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise TrainingError(
                f"{folder} exists: go on with it by --resume {folder}, or give another --run-name"
            )
        return RunFolder(folder), config
    default = describe(BackboneConfig())
    changed = [name for name, value in describe(config).items() if value != default[name]]
    if changed:
        raise TrainingError(
            f"--resume goes on in the run's own configuration: leave out {', '.join(changed)}"
        )
    run = RunFolder(config.resume)
    return run, run.read_config()
