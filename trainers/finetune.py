"""Fine-tunes a pruned ViT under its policy: ``python -m trainers.finetune --run runs/NAME``.

The policy of a finished run of ``trainers.mappo`` stays as it is. The ViT's blocks learn to work
with the tokens that the policy keeps, from the answers of the unpruned model with its original
weights and from the labels. The result is evaluated on the validation split; the test split is
never read.

A run writes ``runs/NAME-finetuned``: ``config.json``, ``metrics.jsonl`` (a line before the first
epoch and one after each), checkpoints, and at the end ``report.json`` and the folder ``model``,
which ``PrunedViT.from_pretrained`` takes.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.agents import saving
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.devices import pick_device
from prunevit.envs.vit.staged_vit import Execution
from prunevit.trainers.common.checkpoint import write_json
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
from prunevit.trainers.common.evaluation import evaluate
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
    Threads,
    Weight,
    Workers,
    parse_arguments,
)
from prunevit.trainers.common.signals import ends_in_one_line

Frozen = Literal["nothing", "before-first-stage", "before-last-stage"]

AFTER_BLOCKS = ("norm", "fc_norm", "attn_pool", "head", "head_dist")  # of timm's models


@dataclass
class FinetuneConfig(RunSettings):
    """How the ViT of a finished run is fine-tuned under its policy."""

    LATER: ClassVar[Mapping[str, object]] = {
        "dither": False,
        "alpha": None,
        "accumulate": 1,
        "precision": "float32",
        "workers": None,
        "optimizer": "adamw",
    }

    run: Path | None = None
    """The run of trainers.mappo, as runs/NAME: its policy, backbone and dataset."""
    alpha: float | None = None
    """Alpha that a policy trained for a range of alphas acts under; the geometric middle of the
    range if not given."""
    dither: bool = False
    """Have the policy dither: photographs may want it, and the ViT learns what is left to it."""
    frozen: Frozen = "before-first-stage"
    """What of the ViT stays as it is: the stem and the blocks before the first stage, so that the
    first decisions stay as they were; those before the last stage, so that all do, and GMACs with
    them; or nothing."""
    execution: Execution = "packed"
    """How gradients are made: packed runs the surviving tokens alone; masked runs all of them, for
    the same gradients at more than the cost of the unpruned model."""
    distillation: Weight = 1.0
    """Weight of the divergence from the answers of the unpruned model with its original weights."""
    labels: Weight = 0.5
    """Weight of the cross entropy with the labels; 0 learns without any."""
    augmentation: JsonObject = field(default_factory=dict)
    """For photographs, arguments of timm.data.create_transform, as {"scale": [0.5, 1],
    "color_jitter": 0.2, "auto_augment": "rand-m9-mstd0.5"}; the digits have their own."""
    epochs: Count = 2
    """Passes over epoch_size images."""
    epoch_size: Count = 10_000
    """Images an epoch: as many digits are drawn anew; of photographs a new random part is taken,
    or all of them where they are fewer."""
    batch_size: Count = 128
    """Images a step, of all ranks together."""
    accumulate: Count = 1
    """Parts of a rank's batch whose gradients are added up before the step, for less memory."""
    precision: Precision = "float32"
    """bfloat16 has the ViT compute in it (autocast); its weights, the policy, the losses and the
    optimizer stay in float32."""
    workers: Workers | None = None
    """Processes a rank that read and vary photographs ahead; 0 reads them when they are needed, in
    threads. If not given, 0 on a CPU, and beside a GPU as many as a rank has cores, up to 8."""
    optimizer: str = "adamw"
    """One of timm.optim.list_optimizers(). nmuon learns photographs in far fewer steps."""
    lr: Positive = 3e-4
    """Peak learning rate; linear warm-up, then a cosine to zero."""
    warmup: Share = 0.05
    """Share of all steps that warms up."""
    weight_decay: Weight = 0.05
    """The optimizer's, on weights only."""
    ema_decay: Decay = 0.98
    """Decay a step of the averaged weights, which are the ones evaluated and saved."""
    validation_size: Count = 4_000
    """Validation images of an evaluation; all where there are fewer."""
    seed: RecipeSeed = 0
    """Seeds the order and the drawn images."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: Threads | None = None
    """CPU threads; torch's own choice if not given."""
    run_name: str | None = None
    """The run is written to runs/RUN_NAME; the name of the run to be fine-tuned with -finetuned
    behind it if not given."""
    resume: Path | None = None
    """A run folder to go on with, in its own configuration; no other option goes with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_recipe(self)
        if self.run_name == "":
            raise ValueError("run_name is empty")
        if not self.distillation and not self.labels:
            raise ValueError("give --distillation or --labels a weight: one is needed to learn")

    @property
    def folder(self) -> Path:
        if self.run is None:
            raise TrainingError("nothing to fine-tune: give --run runs/NAME")
        return RUNS / (self.run_name or f"{self.run.resolve().name}-finetuned")


class Distillation:
    """The loss of a pruned ViT that learns from the unpruned one and from labels.

    Args:
        teacher: timm's model with its original weights.
        config: what counts how much.
    """

    def __init__(self, teacher: nn.Module, config: FinetuneConfig) -> None:
        self._teacher = teacher
        self._config = config

    def __call__(self, student: nn.Module, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """As ``Loss``; raises TrainingError where the student has diverged."""
        try:
            logits = student(inputs).float()
        # a policy refuses tokens that are not finite
        except ValueError as error:
            raise TrainingError(f"{error}; or try a smaller lr") from error
        loss = self._config.labels * F.cross_entropy(logits, targets)
        if self._config.distillation:
            with torch.no_grad():
                taught = self._teacher(inputs).float().log_softmax(1)
            divergence = F.kl_div(
                logits.log_softmax(1), taught, log_target=True, reduction="batchmean"
            )
            loss = loss + self._config.distillation * divergence
        return loss


def freeze(model: PrunedViT, frozen: Frozen) -> None:
    """Leaves gradients to what of the ViT shall learn; the policy never does."""
    backbone = model.backbone
    model.requires_grad_(False)
    if frozen == "nothing":
        backbone.model.requires_grad_(True)
        return
    first = backbone.prune_before[0 if frozen == "before-first-stage" else -1]
    backbone.model.blocks[first:].requires_grad_(True)
    for name in AFTER_BLOCKS:
        part = getattr(backbone.model, name, None)
        if part is not None:
            part.requires_grad_(True)


def load_run(config: FinetuneConfig, device: torch.device) -> tuple[PrunedViT, str]:
    """The pruned ViT that is to learn, and the dataset of its run.

    In evaluation mode, in which it also learns: dropout, stochastic depth and a batch's own
    statistics (of BatchNorm in a convolutional stem) would show the policy other tokens than those
    that it was trained on and will decide on.

    Raises:
        ValueError: the folder holds no finished run of the token game, its backbone is gone, or its
            policy takes no such alpha or can't dither.
    """
    assert config.run is not None
    model = PrunedViT.from_run(config.run)
    policy = model.policy
    if isinstance(policy, LearnedPolicy):
        policy.dither = config.dither
        if config.alpha is not None:
            policy.alpha = config.alpha
    elif config.dither or config.alpha is not None:
        raise ValueError(
            f"the policy of {config.run} has no alpha and can't dither: leave out --alpha and "
            "--dither"
        )
    model.backbone.execution = config.execution
    freeze(model, config.frozen)
    model = model.to(device).to(memory_format=torch.channels_last)
    return model, saving.read_json(config.run / saving.CONFIG)["dataset"]


def evaluate_model(
    model: PrunedViT, validation: ImageSet, ranks: Ranks = ALONE, workers: int = 0
) -> Record:
    """How ``model`` does on validation, by the names of records; ``ranks`` share the work, and
    ``workers`` of each read the images.
    """
    result = evaluate(model, validation, None, ranks, workers)
    return {
        "validation_accuracy": result.accuracy,
        "validation_gmacs": result.gmacs,
        "validation_kept": list(result.kept),
    }


def write_model(model: PrunedViT, folder: Path) -> None:
    """Writes ``model`` as ``save_pretrained`` does; there is no folder before it is whole."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        written = Path(temporary) / folder.name
        model.save_pretrained(written)
        if folder.exists():
            shutil.rmtree(folder)
        written.replace(folder)


def finish(
    run: RunFolder,
    config: FinetuneConfig,
    model: PrunedViT,
    validation: ImageSet,
    workers: int,
) -> dict[str, Any]:
    """Writes the model and what it is worth; returns the report."""
    backbone = model.backbone
    write_model(model, run.path / "model")
    dense_gmacs = backbone.dense_macs / 1e9
    unpruned = accuracy(backbone.model, validation, backbone.device, workers=workers)
    names = ("accuracy", "gmacs", "kept")
    report = {
        "validation_images": len(validation),
        "models": {
            "dense": {"accuracy": run.records[0]["dense_accuracy"], "gmacs": dense_gmacs},
            "pruned": {name: run.records[0][f"validation_{name}"] for name in names},
            "fine-tuned": {name: run.records[-1][f"validation_{name}"] for name in names},
            # what pruning it costs, and whether it became another model meanwhile
            "fine-tuned, unpruned": {"accuracy": unpruned, "gmacs": dense_gmacs},
        },
        "config": config.to_json(),
        "versions": versions(),
        "seconds": run.seconds,
        "device": str(backbone.device),
        "threads": torch.get_num_threads(),
    }
    write_json(run.path / "report.json", report)
    return report


def train(config: FinetuneConfig, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Fine-tunes in a run folder of its own, and returns the report that was written there; nothing
    on other ranks than the first.

    Raises:
        ValueError: the run holds no finished policy for token pruning, or its backbone or dataset
            can't be had; there is no such device.
        CheckpointError: the fine-tuning to be resumed is missing or damaged.
        TrainingError: it can't begin for another reason, or diverged.
        OSError: the disk is full or not writable; the last epoch's files are left as they were.
        RanksError: another rank has ended.
    """
    run, config = open_run(config, ranks)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    model, dataset = load_run(config, device)
    teacher = copy.deepcopy(model.backbone.model).requires_grad_(False)
    data_config = resolve_model_data_config(teacher)
    workers = ranks.workers(config.workers, device)
    images = TrainingImages(dataset, config, data_config, device, ranks)
    validation = open_images(dataset, "validation", data_config, size=config.validation_size)
    steps = config.epochs * images.steps_an_epoch
    learner = Learner(model, Distillation(teacher, config), config, steps, ranks)
    averaged = learner.ema.module

    def evaluate_averaged() -> Record:
        return evaluate_model(averaged, validation, ranks, workers)

    def evaluate_first() -> Record:
        dense = accuracy(teacher, validation, device, ranks, workers)
        return evaluate_averaged() | {"dense_accuracy": dense}

    train_epochs(run, config, learner, images, evaluate_averaged, evaluate_first=evaluate_first)
    return finish(run, config, averaged, validation, workers) if ranks.is_first else {}


def table(report: dict[str, Any]) -> str:
    """The report's models as text, compared with dense."""
    dense = report["models"]["dense"]
    lines = [f"{'validation':<22}{'accuracy':>9}{'below dense':>13}{'GMACs':>9}{'of dense':>10}"]
    for name, row in report["models"].items():
        lines.append(
            f"{name:<22}{100 * row['accuracy']:>8.2f}%"
            f"{100 * (dense['accuracy'] - row['accuracy']):>13.2f}"
            f"{row['gmacs']:>9.4f}{100 * row['gmacs'] / dense['gmacs']:>9.1f}%"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m trainers.finetune``."""
    with ends_in_one_line(*COMMAND_ERRORS):
        config = parse_arguments(FinetuneConfig, arguments, "finetune", __doc__)
        report = train(config, join_ranks(device_of(config)))
        if report:
            size = report["validation_images"]
            print(f"{table(report)}\n{report['seconds']:.0f} s, {size} images")


if __name__ == "__main__":
    main()
