"""Fine-tunes a ViT under its pruning policy: ``python -m trainers.finetune --run runs/NAME``.

The policy is that of a finished run of ``trainers.mappo``, or of a saved pruned ViT, and stays as
it is. The ViT's blocks learn to work with the tokens that the policy keeps: from the outputs of the
unpruned model with its original weights, and from the labels. The result is evaluated on the
validation split; the test split is never read.

A run writes to ``runs/NAME-finetuned``: ``config.json``, ``metrics.jsonl`` (one line before the
first epoch and one after each), checkpoints, and at the end ``report.json`` and the folder
``model``, which ``PrunedViT.from_pretrained`` loads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.agents import saving
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.data.datasets import is_on_disk, open_images
from prunevit.envs.data_config import model_data_config
from prunevit.envs.devices import pick_device
from prunevit.envs.vit.staged_vit import Execution
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.classification import (
    Learner,
    TrainingImages,
    check_can_classify,
    train_from,
    versions,
)
from prunevit.trainers.common.closing import say_where_and_what_next
from prunevit.trainers.common.distributed import ALONE, Ranks, join_ranks
from prunevit.trainers.common.epochs import train_epochs
from prunevit.trainers.common.evaluation import accuracy, evaluate
from prunevit.trainers.common.recipe import Recipe
from prunevit.trainers.common.report import table
from prunevit.trainers.common.run import (
    COMMAND_ERRORS,
    RUNS,
    Record,
    TrainingError,
    device_of,
    open_run,
)
from prunevit.trainers.common.settings import (
    Count,
    Decay,
    Positive,
    Threads,
    Weight,
    parse_arguments,
)
from prunevit.trainers.common.signals import ends_in_one_line

Frozen = Literal["nothing", "before-first-stage", "before-last-stage"]
ATTENTION_PARTS = ("norm1", "attn", "ls1", "gamma_1")  # of a block, up to its first residual


@dataclass
class FinetuneConfig(Recipe):
    """How the ViT of a finished run is fine-tuned under its policy."""

    LATER: ClassVar[Mapping[str, object]] = {
        "layer_decay": 1.0,
        "dataset": None,
        "backbone": None,
    }

    epochs: Count = 2
    epoch_size: Count = 10_000
    lr: Positive = 3e-4
    ema_decay: Decay = 0.98

    run: Path | None = None
    """The finished run of trainers.mappo, such as runs/NAME. Its policy, backbone and dataset are
    used. Or a folder that PrunedViT.save_pretrained wrote, with any policy; then --dataset has to
    be given. Needed unless --resume is given."""
    backbone: str | None = None
    """The run's --backbone, hf-hub:OWNER/NAME or local-dir:PATH, which has to be given again: a
    folder can't choose that alone. By default the run's own."""
    dataset: str | None = None
    """The dataset. By default the run's own, which has to be given if a library may fetch it, as
    hfds/OWNER/NAME: a folder can't choose that alone."""
    alpha: float | None = None
    """Alpha under which a policy for a range of alphas acts. By default the geometric middle of its
    range."""
    dither: bool = False
    """Let the policy dither: its threshold varies from patch to patch. This can help on
    photographs."""
    frozen: Frozen = "before-first-stage"
    """Part of the ViT that isn't trained. before-first-stage: the stem and the blocks before the
    first stage, so that the first decisions stay the same. before-last-stage: the blocks before the
    last stage too, so that all decisions and the GMACs stay the same. nothing: all of it is
    trained."""
    execution: Execution = "packed"
    """packed runs only the tokens that survive. masked runs all tokens: the same gradients, for
    more compute than the unpruned model needs."""
    distillation: Weight = 1.0
    """Weight of the KL divergence from the unpruned model with its original weights."""
    labels: Weight = 0.5
    """Weight of the cross entropy with the labels; 0 learns without labels."""
    validation_size: Count = 4_000
    """Validation images per evaluation, or all of them if there are fewer."""
    threads: Threads | None = None
    """CPU threads. By default torch's own choice."""
    run_name: str | None = None
    """The run is written to runs/RUN_NAME. By default NAME-finetuned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run_name == "":
            raise ValueError("run_name is empty")
        if not self.distillation and not self.labels:
            raise ValueError("nothing to learn from: give --distillation or --labels a weight")

    @property
    def folder(self) -> Path:
        """Where a new run is written; raises TrainingError if no run was given."""
        if self.run is None:
            raise TrainingError("nothing to fine-tune: give --run runs/NAME")
        return RUNS / (self.run_name or f"{self.run.resolve().name}-finetuned")


class Distillation:
    """The loss of a pruned ViT that learns from the unpruned one and from labels.

    Args:
        teacher: timm's model with its original weights.
        config: the weights of both terms.
    """

    def __init__(self, teacher: nn.Module, config: FinetuneConfig) -> None:
        self._teacher = teacher
        self._config = config

    def __call__(self, student: nn.Module, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """A ``Loss``; raises TrainingError if the student has diverged."""
        try:
            logits = student(inputs).float()
        # a policy refuses tokens that are not finite
        except ValueError as error:
            raise TrainingError(f"{error}; or try a smaller --lr") from error
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
    """Turns gradients off for the policy and for the part of the ViT that ``frozen`` names."""
    backbone = model.backbone
    model.requires_grad_(False)
    if frozen == "nothing":
        backbone.model.requires_grad_(True)
        return
    first = backbone.prune_before[0 if frozen == "before-first-stage" else -1]
    train_from(backbone.model, first)
    if backbone.prune_at == "mlp":
        block = backbone.model.blocks[first]
        for part in (getattr(block, name, None) for name in ATTENTION_PARTS):
            if part is not None:
                part.requires_grad_(False)


def load_run(config: FinetuneConfig, device: torch.device) -> tuple[PrunedViT, str]:
    """Loads the pruned ViT to fine-tune, of a run or saved as it is, and the name of its dataset:
    the run's, or the one given.

    It also trains in evaluation mode. Dropout, stochastic depth and BatchNorm's batch statistics
    would change the tokens that the policy sees, and it was trained and will be used without them.

    Raises:
        ValueError: the folder holds no finished run of the token game, its backbone is missing, or
            its policy doesn't take this alpha or can't dither, or its dataset or backbone has to be
            given.
    """
    run, given = config.run, config.backbone
    assert run is not None
    file = run / saving.CONFIG
    is_saved_model = (run / saving.WEIGHTS).is_file()
    if is_saved_model and (given is not None or config.dataset is None):
        raise ValueError(
            f"{run} is a saved model, which has its backbone and no dataset: give --dataset and no "
            "--backbone"
        )
    # if it is missing, the run's reader says so
    own = saving.read_json(file) if file.is_file() and not is_saved_model else {}
    backbone = str(own.get("backbone", given))
    if given is None and ":" in backbone:
        raise ValueError(
            f"{run} has its backbone from {backbone}, which no folder may choose: if you trust it, "
            f"give --backbone {backbone}"
        )
    if given not in (None, backbone):
        raise ValueError(f"--backbone {given}: the backbone of {run} is {backbone}")
    model = PrunedViT.from_pretrained(run) if is_saved_model else PrunedViT.from_run(run, given)
    policy = model.policy
    if isinstance(policy, LearnedPolicy):
        policy.dither = config.dither
        if config.alpha is not None:
            policy.alpha = config.alpha
    elif config.dither or config.alpha is not None:
        raise ValueError(
            f"the policy of {run} has no alpha and can't dither: leave out --alpha and --dither"
        )
    model.backbone.execution = config.execution
    freeze(model, config.frozen)
    model = model.to(device).to(memory_format=torch.channels_last)
    if config.dataset is not None:
        return model, config.dataset
    dataset = str(own["dataset"])
    if not is_on_disk(dataset):
        raise ValueError(
            f"{run} was trained on {dataset}, which a library may fetch: if you trust it, give "
            f"--dataset {dataset}"
        )
    return model, dataset


def train(config: FinetuneConfig, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Fine-tunes in a run folder of its own. Returns the report that it writes there; ranks other
    than the first return an empty one.

    Raises:
        ValueError: the run holds no finished token-pruning policy, its backbone or dataset can't be
            loaded, or there is no such device.
        CheckpointError: the run to resume is missing or damaged.
        TrainingError: the run can't begin for another reason, or the loss is not finite.
        OSError: the disk is full or not writable; the last epoch's files are left as they were.
        RanksError: another rank has ended.
    """
    run, config = open_run(config, ranks)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    model, dataset = load_run(config, device)
    check_can_classify(dataset, model.num_classes)
    # what can't be saved is better known before the training than after it
    with torch.random.fork_rng(devices=[]):
        saving.describe_backbone(model.backbone, model.model_kwargs)
    teacher = copy.deepcopy(model.backbone.model).requires_grad_(False)
    data_config = model_data_config(teacher)
    workers = ranks.workers(config.workers, device)
    images = TrainingImages(dataset, config, data_config, device, ranks)
    validation = open_images(dataset, "validation", data_config, size=config.validation_size)
    learner = Learner(model, Distillation(teacher, config), config, images.steps, ranks)
    averaged = learner.ema.module

    def evaluate_averaged() -> Record:
        result = evaluate(averaged, validation, None, ranks, workers)
        return {
            "validation_accuracy": result.accuracy,
            "validation_gmacs": result.gmacs,
            "validation_kept": list(result.kept),
        }

    def evaluate_first() -> Record:
        dense = accuracy(teacher, validation, device, ranks, workers)
        return evaluate_averaged() | {"dense_accuracy": dense}

    train_epochs(run, learner, images, evaluate_averaged, evaluate_first)
    if not ranks.is_first:
        return {}
    averaged.save_pretrained(run.path / "model")
    dense_gmacs = averaged.backbone.dense_macs / 1e9
    unpruned = accuracy(averaged.backbone.model, validation, device, workers=workers)
    names = ("accuracy", "gmacs", "kept")
    report = {
        "validation_images": len(validation),
        "models": {
            "dense": {"accuracy": run.records[0]["dense_accuracy"], "gmacs": dense_gmacs},
            "pruned": {name: run.records[0][f"validation_{name}"] for name in names},
            "fine-tuned": {name: run.records[-1][f"validation_{name}"] for name in names},
            # shows what pruning costs after fine-tuning, and how far the ViT has changed
            "fine-tuned, unpruned": {"accuracy": unpruned, "gmacs": dense_gmacs},
        },
        "config": config.to_json(),
        "versions": versions(),
        "seconds": run.seconds,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    write_json(run.path / "report.json", report)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m trainers.finetune``."""
    with ends_in_one_line(*COMMAND_ERRORS):
        config = parse_arguments(FinetuneConfig, arguments, __doc__)
        report = train(config, join_ranks(device_of(config)))
        if report:
            print(table(report["models"], "validation"))
            print(f"{report['seconds']:.0f} s, {report['validation_images']} images")
            folder = config.resume or config.folder
            say_where_and_what_next(folder, "prunevit viewer --model FOLDER/model")


if __name__ == "__main__":
    main()
