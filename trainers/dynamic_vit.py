"""Trains DynamicViT's predictors (arXiv 2106.02034): ``python -m trainers.dynamic_vit``.

The predictors learn which patches to keep, through Gumbel-softmax masks. The result is evaluated on
the validation split; the test split is never read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from timm.optim import param_groups_weight_decay

from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.agents.policies.heuristics import KeepAll
from prunevit.agents.policies.serialization import dynamic_vit_policy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data_config import model_data_config
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common import loop
from prunevit.trainers.common.backbones import (
    StagedViTSettings,
    all_model_kwargs,
    load_backbone,
    write_backbone,
)
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.classification import (
    check_can_classify,
    learning_rate,
    make_mixup,
    versions,
)
from prunevit.trainers.common.closing import say_where_and_what_next
from prunevit.trainers.common.epochs import seed_global_generators
from prunevit.trainers.common.evaluation import evaluate
from prunevit.trainers.common.loop import NotFiniteError
from prunevit.trainers.common.masked_vit import (
    check_masks_act,
    draw_images,
    losses,
    mask_monitor,
    run_dense,
    run_masked,
)
from prunevit.trainers.common.report import table
from prunevit.trainers.common.run import (
    COMMAND_ERRORS,
    RUNS,
    iteration_seed,
    open_run,
    resume_flags,
)
from prunevit.trainers.common.settings import (
    Count,
    Decay,
    Positive,
    Range,
    Seed,
    Share,
    Weight,
    parse_arguments,
)
from prunevit.trainers.common.signals import ends_in_one_line, says_how_to_go_on

# the paper's: factor of the backbone's learning rate, and share of the run before it starts
BACKBONE_LR, BACKBONE_START = 0.01, 5 / 30
WEIGHT_DECAY = 0.05  # AdamW's, as in DeiT


@dataclass
class DynamicViTConfig(StagedViTSettings):
    """How DynamicViT's predictors are trained."""

    LATER: ClassVar[Mapping[str, object]] = {
        **StagedViTSettings.LATER,
        "warmup": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "label_smoothing": 0.0,
    }

    policy: Annotated[Literal["dynamic-vit"], tyro.conf.Suppress] = "dynamic-vit"
    """Marks the run's config.json as one of DynamicViT."""
    augment: bool = True
    """Augment training images (photographs: with timm's training transform)."""
    keep: Annotated[float, Range(0, 1, open_low=True)] = 0.5
    """Share of the remaining patches that each stage keeps."""
    hidden: Count | None = None
    """Width of the predictors, a multiple of 4. By default the backbone's, as in the paper."""
    mixup: Weight = 0.8
    """Alpha of mixup; 0 turns it off."""
    cutmix: Weight = 1.0
    """Alpha of CutMix; 0 turns it off. With mixup as well, each batch gets one of the two."""
    label_smoothing: Decay = 0.1
    """Share of the target that is spread over all classes."""
    ratio_weight: Weight = 2.0
    """Weight of the loss that brings the share of kept patches to --keep. The paper uses 2."""
    fine_tune: bool = False
    """Train the backbone too, as in the paper. By default it is frozen. Class token and position
    embedding always are."""
    iterations: Count = 480
    """Steps of the optimizer, one batch each."""
    batch_size: Count = 16
    """Images per step."""
    lr: Positive = 3e-3
    """Peak learning rate of the predictors: it warms up linearly, then falls to zero along a
    cosine. The backbone, if it is trained, has a hundredth of it."""
    warmup: Share = 5 / 30
    """Share of all steps in which the learning rate warms up."""
    eval_every: Count = 120
    """Iterations between two evaluations on the validation split."""
    eval_size: Count = 1_000
    """Validation images per evaluation during the training."""
    checkpoint_every: Count = 50
    """Iterations between two checkpoints."""
    seed: Seed = 0
    """Seeds weights, images and the Gumbel noise."""
    run_name: str = "dynamic-vit"
    """The run is written to runs/RUN_NAME."""
    resume: Path | None = None
    """Run folder to continue, with the settings it was started with. No other option goes with
    it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden is not None and self.hidden % 4:
            raise ValueError(f"hidden={self.hidden} must be a multiple of 4")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, got {self.batch_size}")
        if not self.run_name:
            raise ValueError("run_name is empty")

    @property
    def folder(self) -> Path:
        """Where a new run is written."""
        return RUNS / self.run_name


class Trainer:
    """Trains the predictors, and with ``fine_tune`` the backbone, one step per iteration.

    The backbone always runs in evaluation mode, as it will when it is pruned.

    Args:
        backbone: the ViT whose tokens are pruned; trained in place with ``fine_tune``.
        policy: the predictors.
        images: the training images.
        config: the settings.

    Raises:
        TrainingError: there are fewer images than a batch holds, or the backbone's blocks are not
            timm's own.
        DatasetError: the images have other classes than the backbone.
    """

    is_resumable = True  # each step draws its images and noise from a seed of its own

    def __init__(
        self,
        backbone: StagedViT,
        policy: DynamicViTPolicy,
        images: ImageSet,
        config: DynamicViTConfig,
    ) -> None:
        check_masks_act(backbone, images, config.batch_size)
        self.backbone = backbone
        self.policy = policy.to(backbone.device)
        self.images = images
        self.config = config
        self.iteration = 0
        self._teacher = backbone
        self._mixup = make_mixup(
            config.mixup, config.cutmix, config.label_smoothing, backbone.num_classes
        )
        trained = {policy: 1.0}
        if config.fine_tune:
            self._teacher = copy.deepcopy(backbone)
            # as in the authors' code: neither class token nor position embedding is trained
            for name, parameter in backbone.model.named_parameters():
                parameter.requires_grad_(name not in backbone.model.no_weight_decay())
            trained[backbone.model] = BACKBONE_LR
        groups = [
            group | {"scale": scale}
            for module, scale in trained.items()
            for group in param_groups_weight_decay(module, WEIGHT_DECAY)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr)

    def iterate(self) -> dict[str, float]:
        """Takes a step; returns its losses and metrics."""
        seed = iteration_seed(self.config.seed, self.iteration)
        device = self.backbone.device
        drawn = draw_images(self.images, self.config.batch_size, seed)
        pixels, labels = (part.to(device) for part in drawn)
        targets = labels
        if self._mixup is not None:
            seed_global_generators(seed)
            pixels, targets = self._mixup(pixels, labels)
        with torch.no_grad():
            begun = self._teacher.begin(pixels, with_attention=False, execution="masked")
            teacher = run_dense(self._teacher, begun)
        if self.config.fine_tune:
            begun = self.backbone.begin(pixels, with_attention=False, execution="masked")
        noise = torch.Generator(device).manual_seed(seed)
        student = run_masked(self.backbone, self.policy, begun, noise)
        shares, weight = self.policy.shares(), self.config.ratio_weight
        smoothing = 0.0 if self._mixup is not None else self.config.label_smoothing
        terms = losses(student, teacher, targets, shares, weight, smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        self._set_rates()
        self.optimizer.step()
        loss = float(terms["loss"].detach())
        if not math.isfinite(loss):
            raise NotFiniteError("loss")
        self.iteration += 1
        correct = (student.logits.argmax(1) == labels).float().mean()
        return {
            **{name: float(term.detach()) for name, term in terms.items()},
            "accuracy": float(correct),
            "keep_ratio": float(student.kept.detach().mean()),
        }

    def _set_rates(self) -> None:
        config, step = self.config, self.iteration
        rate = learning_rate(config.lr, config.warmup, step, config.iterations)
        for group in self.optimizer.param_groups:
            waits = group["scale"] < 1 and step / config.iterations < BACKBONE_START
            group["lr"] = 0.0 if waits else rate * group["scale"]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        trained = {"backbone": self.backbone.model.state_dict()} if self.config.fine_tune else {}
        return {
            "iteration": self.iteration,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **trained,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        if len(state["optimizer"]["param_groups"]) < len(self.optimizer.param_groups):
            raise ValueError("it was begun when biases and norms decayed too: begin a new run")
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.config.fine_tune:
            self.backbone.model.load_state_dict(state["backbone"])
        self.iteration = state["iteration"]


def train(config: DynamicViTConfig) -> dict[str, Any]:
    """Trains in the run's folder. Returns the report that it writes there.

    Raises:
        CheckpointError: the run to resume is missing or damaged.
        TrainingError: the run can't begin, or the loss is not finite.
        ValueError: backbone, dataset or stages are unknown or don't fit each other.
        OSError: the disk is full or not writable; the last checkpoint is left as it was.
    """
    run, config = open_run(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load_backbone(config)
    data_config = model_data_config(model)
    backbone = config.stage(model)
    check_can_classify(config.dataset, backbone.num_classes)
    policy = dynamic_vit_policy(backbone, config.keep, config.hidden, config.seed)
    images = open_images(config.dataset, "train", data_config, augment=config.augment)
    validation = open_images(config.dataset, "validation", data_config)
    dense = evaluate(PrunedViT(backbone, KeepAll()), validation)
    trainer = Trainer(backbone, policy, images, config)
    run.restore(trainer)
    run.create(config)
    pruned = PrunedViT(backbone, policy)
    monitor = mask_monitor(pruned, validation, config.eval_size, config.batch_size)
    with says_how_to_go_on(run.path, resume_flags(run.path, config)):
        loop.train(run, trainer, monitor, config)
    run.write_networks(policy=policy)
    if config.fine_tune:
        described = replace(config, model_kwargs=all_model_kwargs(config))
        names = backbone.model.pretrained_cfg.get("label_names")
        write_backbone(run.path, model, described, names)

    result = evaluate(pruned, validation)
    decisions = backbone.num_patches * (1 + sum(result.kept[:-1]))
    report = {
        "split": "validation",
        "policies": {
            "dense": {"accuracy": dense.accuracy, "gmacs": dense.gmacs},
            "dynamic-vit": {
                "accuracy": result.accuracy,
                "gmacs": result.gmacs,
                "kept": list(result.kept),
                "policy_gmacs": decisions * policy.macs_per_decision / 1e9,
            },
        },
        "versions": versions(),
        "seconds": run.seconds,
        "seed": config.seed,
    }
    write_json(run.path / "report.json", report)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m trainers.dynamic_vit``."""
    with ends_in_one_line(*COMMAND_ERRORS):
        config = parse_arguments(DynamicViTConfig, arguments, __doc__)
        report = train(config)
        print(table(report["policies"], "validation"))
        print(f"{report['seconds']:.0f} s, seed {report['seed']}")
        say_where_and_what_next(config.resume or config.folder, "prunevit viewer --model FOLDER")


if __name__ == "__main__":
    main()
