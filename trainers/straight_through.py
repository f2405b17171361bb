"""Teaches our actor by gradients through the backbone: ``python -m trainers.straight_through``.

Keep masks are drawn as DynamicViT draws them, with a straight-through gradient (arXiv 2106.02034),
from the logits of the same actor that ``trainers.mappo`` trains. The loss is what the team reward
pays, negated: the distance from the dense model's answers, or from the labels, plus alpha times
compute, with an alpha of each image's own. The backbone is frozen and runs masked.

``trainers.mappo --init`` starts from such a run. To be fair, its passes through the backbone count
as part of that training: a step runs each of its images once forwards as a whole, once masked, and
once backwards, which is about as much as two more. The report says how many images there were.
Images are of the training split, and the test split is never read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from prunevit.agents.policies.actor_critic import TokenActor, logits_of
from prunevit.agents.policies.heuristics import KeepAll
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data_config import model_data_config
from prunevit.envs.observations import View
from prunevit.envs.rewards import LARGEST_NUMBER
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.tokens import Tokens
from prunevit.trainers.common import loop
from prunevit.trainers.common.actors import ActorSettings, greedy_policy, make_actor
from prunevit.trainers.common.backbones import load_backbone
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.classification import check_can_classify, learning_rate, versions
from prunevit.trainers.common.closing import AFTER_RUN, say_where_and_what_next
from prunevit.trainers.common.evaluation import evaluate
from prunevit.trainers.common.loop import NotFiniteError
from prunevit.trainers.common.masked_vit import (
    Outputs,
    check_masks_act,
    draw_images,
    mask_monitor,
    run_dense,
    run_judged,
)
from prunevit.trainers.common.report import table
from prunevit.trainers.common.run import (
    COMMAND_ERRORS,
    RUNS,
    iteration_seed,
    open_run,
    resume_flags,
)
from prunevit.trainers.common.settings import Count, Positive, Seed, Share, parse_arguments
from prunevit.trainers.common.signals import ends_in_one_line, says_how_to_go_on

Loss = Literal["kl", "labels"]
ADAM_EPS = 1e-5  # as in trainers.mappo
CERTAIN = 1e4  # a logit whose draw no noise changes


@dataclass
class StraightThroughConfig(ActorSettings):
    """How the actor is taught."""

    env: Annotated[Literal["token-prune"], tyro.conf.Suppress] = "token-prune"
    """Marks the run as one whose policy plays the token game, as trainers.mappo's do."""
    observation: tuple[str, ...] = ("token", "cls", "stage", "cls_attention", "alpha")
    """What an agent sees: token cls stage position cls_attention redundancy alive_fraction
    alpha, which is needed."""
    alpha_range: tuple[float, float] | None = (0.002, 1.0)
    """Lowest and highest alpha: each image gets its own, which the agents observe."""
    loss: Loss = "kl"
    """What is lost by pruning: kl, the divergence from the dense model's answers, or labels, the
    cross entropy."""
    augment: bool = True
    """Augment training images (photographs: with timm's training transform)."""
    iterations: Count = 480
    """Steps of the optimizer, one batch each."""
    batch_size: Count = 16
    """Images per step."""
    lr: Positive = 3e-3
    """Adam's peak learning rate: it warms up linearly, then falls to zero along a cosine."""
    warmup: Share = 5 / 30
    """Share of all steps in which the learning rate warms up."""
    eval_every: Count = 120
    """Iterations between two evaluations on the validation split."""
    eval_size: Count = 1_000
    """Validation images per evaluation during the training."""
    checkpoint_every: Count = 50
    """Iterations between two checkpoints."""
    seed: Seed = 0
    """Seeds weights, images, alphas and the noise of the masks."""
    run_name: str = "straight-through"
    """The run is written to runs/RUN_NAME."""
    resume: Path | None = None
    """Run folder to continue, with the settings it was started with. No other option goes with
    it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha_range is None:
            raise ValueError("give --alpha-range, and alpha in --observation")
        low, high = self.alpha_range
        if not 0 < low <= high <= LARGEST_NUMBER:
            raise ValueError(
                f"alpha_range={self.alpha_range}: two positive numbers of at most "
                f"{LARGEST_NUMBER:g}, the lower one first"
            )
        if not self.run_name:
            raise ValueError("run_name is empty")

    @property
    def folder(self) -> Path:
        """Where a new run is written."""
        return RUNS / self.run_name


class Trainer:
    """Teaches the actor, one step per iteration.

    Args:
        backbone: the frozen ViT.
        actor: the actor.
        images: the training images.
        config: the settings.

    Raises:
        TrainingError, DatasetError: as of ``check_masks_act``.
    """

    is_resumable = True  # each step draws its images, alphas and noise from a seed of its own

    def __init__(
        self,
        backbone: StagedViT,
        actor: TokenActor,
        images: ImageSet,
        config: StraightThroughConfig,
    ) -> None:
        check_masks_act(backbone, images, config.batch_size)
        self.backbone = backbone
        self.actor = actor.to(backbone.device)
        self.images = images
        self.config = config
        self.iteration = 0
        learned = [p for p in actor.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learned, lr=config.lr, eps=ADAM_EPS)

    def iterate(self) -> dict[str, float]:
        """Takes a step; returns its losses and metrics."""
        config, backbone = self.config, self.backbone
        seed = iteration_seed(config.seed, self.iteration)
        drawn = draw_images(self.images, config.batch_size, seed)
        pixels, labels = (part.to(backbone.device) for part in drawn)
        noise = torch.Generator(backbone.device).manual_seed(seed)
        alpha = self._draw_alphas(noise)
        observes = "cls_attention" in config.observation
        with torch.no_grad():
            begun = backbone.begin(pixels, observes, execution="masked")
            dense = run_dense(backbone, begun).logits
        student = run_judged(backbone, partial(self.judge, alpha), begun, noise, observes)
        lost = lost_by_pruning(config.loss, student.logits, dense, labels)
        compute = compute_of(backbone, student)
        loss = (lost + alpha * compute).mean()
        if not loss.isfinite():
            raise NotFiniteError("loss")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        rate = learning_rate(config.lr, config.warmup, self.iteration, config.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.iteration += 1
        correct = (student.logits.argmax(1) == labels).float()
        parts = {"loss": loss, config.loss: lost, "compute": compute, "accuracy": correct}
        parts["keep_ratio"] = student.kept
        return {name: float(part.detach().mean()) for name, part in parts.items()}

    def _draw_alphas(self, generator: torch.Generator) -> Tensor:
        """Alphas of a step's images, log-uniform in their range, as in the game: [B]."""
        assert self.config.alpha_range is not None
        low, high = map(math.log, self.config.alpha_range)
        device = generator.device
        uniform = torch.rand(self.config.batch_size, generator=generator, device=device)
        return (low + (high - low) * uniform).exp()

    def judge(self, alpha: Tensor, stage: int, tokens: Tokens, kept: Tensor) -> Tensor:
        """The actor's logits for living patches, as a ``Judge``. Patches that are gone would be
        kept from there on: so what a decision at an earlier stage is told includes the later ones.
        """
        view = View(self.backbone, tokens, stage, alpha)
        logits = logits_of(self.actor, view.living(self.config.observation), view.image)
        certain = logits.new_tensor([0.0, CERTAIN]).repeat(kept.numel(), 1)
        return certain.index_put((view.alive.flatten().nonzero().squeeze(1),), logits)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {
            "iteration": self.iteration,
            "actor": self.actor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.actor.load_state_dict(state["actor"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]


def lost_by_pruning(loss: Loss, logits: Tensor, dense_logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each image [B], from the pruned and the dense model's logits [B, classes] and
    from labels int64 [B].
    """
    if loss == "labels":
        return F.cross_entropy(logits, labels, reduction="none")
    pruned, dense = logits.log_softmax(1), dense_logits.log_softmax(1)
    return F.kl_div(pruned, dense, reduction="none", log_target=True).sum(1)


def compute_of(backbone: StagedViT, outputs: Outputs) -> Tensor:
    """Compute of the blocks from the first stage on, as a share of the dense model's, as the reward
    counts it, with the gradient to the keep masks: [B].
    """
    spent = [backbone.segment_macs(kept.sum(1), stage) for stage, kept in enumerate(outputs.kept)]
    return torch.stack(spent).sum(0) / backbone.dense_macs


def train(config: StraightThroughConfig) -> dict[str, Any]:
    """Trains in the run's folder. Returns the report that it writes there.

    Raises:
        CheckpointError: the run to resume is missing or damaged.
        TrainingError: the run can't begin, or the loss is not finite.
        ValueError: backbone, dataset, stages or fields are unknown or don't fit each other.
        OSError: the disk is full or not writable; the last checkpoint is left as it was.
    """
    run, config = open_run(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load_backbone(config)
    data_config = model_data_config(model)
    backbone = config.stage(model)
    check_can_classify(config.dataset, backbone.num_classes)
    torch.manual_seed(config.seed)
    actor = make_actor(config, backbone)
    images = open_images(config.dataset, "train", data_config, augment=config.augment)
    validation = open_images(config.dataset, "validation", data_config)
    trainer = Trainer(backbone, actor, images, config)
    run.restore(trainer)
    run.create(config)
    pruned = PrunedViT(backbone, greedy_policy(config, backbone, actor))
    monitor = mask_monitor(pruned, validation, config.eval_size, config.batch_size)
    with says_how_to_go_on(run.path, resume_flags(run.path, config)):
        loop.train(run, trainer, monitor, config)
    run.write_networks(policy=actor)
    policies = {"dense": PrunedViT(backbone, KeepAll()), "learned": pruned}
    results = {name: evaluate(model, validation) for name, model in policies.items()}
    report = {
        "split": "validation",
        "policies": {
            name: {"accuracy": result.accuracy, "gmacs": result.gmacs, "kept": list(result.kept)}
            for name, result in results.items()
        },
        "images": config.iterations * config.batch_size,
        "versions": versions(),
        "seconds": run.seconds,
        "seed": config.seed,
    }
    write_json(run.path / "report.json", report)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m trainers.straight_through``."""
    with ends_in_one_line(*COMMAND_ERRORS):
        config = parse_arguments(StraightThroughConfig, arguments, __doc__)
        report = train(config)
        print(table(report["policies"], "validation"))
        print(f"{report['seconds']:.0f} s, seed {report['seed']}, {report['images']} images")
        folder = config.resume or config.folder
        say_where_and_what_next(folder, "prunevit train --init FOLDER", *AFTER_RUN)


if __name__ == "__main__":
    main()
