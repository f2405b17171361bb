"""DynamicViT's training (arXiv 2106.02034): ``python -m trainers.dynamic_vit``.

From top to bottom: settings, decide, mask, run, loss, step. Files are written by
``dynamic_vit_run``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.envs.data.datasets import ImageSet, Reseedable
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.tokens import Tokens
from prunevit.trainers.common.run_folder import RUNS, JsonObject, TrainingError

# the paper's: of the answers' distance to the dense model's, and of the tokens'
KL_WEIGHT, TOKEN_WEIGHT = 0.5, 0.5
# the paper's: the backbone learns so much slower than the predictors, and after so much of the run
BACKBONE_LR, BACKBONE_START = 0.01, 5 / 30
# what a pruned token's key counts for, instead of nothing: its logarithm must be finite
FLOOR = 1e-12
# Most that a patch can be worth of its image's loss. Not in the paper: the gradient to a pruned key
# is linear in exp(score), while its effect saturates. Where attention is sharp that gradient
# reached 1e7 here, and no predictor learned from it.
MOST_WORTH = 1.0
WEIGHT_DECAY = 0.05  # AdamW's, as in DeiT


@dataclass
class DynamicViTConfig:
    """DynamicViT: predictors of who is kept, trained through Gumbel-softmax masks."""

    policy: Annotated[Literal["dynamic-vit"], tyro.conf.Suppress] = "dynamic-vit"
    """What the run's config.json is told apart by."""
    backbone: str = "digits_vit"
    """digits_vit (trained, comes with the package) or any timm model name."""
    model_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of the backbone, as {"img_size": 32, "patch_size": 4}."""
    pretrained: bool = False
    """Download the timm model's weights."""
    checkpoint: Path | None = None
    """A file with the backbone's weights (safetensors, or a state dict of torch.save)."""
    dataset: str = "digits"
    """digits, folder:PATH, or a name that timm.data.create_dataset takes."""
    augment: bool = True
    """Vary training images each time they are seen (photographs: timm's training transform)."""
    prune_before: tuple[int, ...] | None = (1, 3)
    """Blocks, 0-based, before which tokens are pruned; None: all but the first."""
    keep: float = 0.5
    """Share of the patches that is kept from stage to stage."""
    hidden: int = 32
    """Width of the predictors, a multiple of 4; in the paper the backbone's own."""
    ratio_weight: float = 2.0
    """Weight of the kept shares' distance from what is asked for; 2 in the paper."""
    fine_tune: bool = False
    """Train the backbone too, as in the paper; otherwise it is frozen."""
    iterations: int = 480
    """Steps of the optimizer."""
    batch_size: int = 16
    """Images a step."""
    lr: float = 3e-3
    """Peak learning rate of the predictors; a cosine to zero. A backbone that is trained gets a
    hundredth of it."""
    eval_every: int = 120
    """Iterations between two evaluations on validation."""
    eval_size: int = 1_000
    """Validation images of each such evaluation."""
    checkpoint_every: int = 50
    """Iterations between two checkpoints."""
    seed: int = 0
    """Seeds weights, images and the Gumbel noise."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: int | None = None
    """CPU threads; torch's own choice if not given."""
    run_name: str = "dynamic-vit"
    """The run is written to runs/RUN_NAME."""
    resume: Path | None = None
    """A run folder to go on with, in its own configuration; no other option goes with it."""

    def __post_init__(self) -> None:
        allowed = {
            "keep": 0 < self.keep <= 1,
            "hidden": self.hidden >= 4 and not self.hidden % 4,
            "iterations": self.iterations >= 1,
            "ratio_weight": 0 <= self.ratio_weight < math.inf,
            "batch_size": self.batch_size >= 1,
            "lr": 0 < self.lr < math.inf,
            "eval_every": self.eval_every >= 1,
            "eval_size": self.eval_size >= 1,
            "checkpoint_every": self.checkpoint_every >= 1,
            "threads": self.threads is None or self.threads >= 1,
            "run_name": bool(self.run_name),
        }
        for name, is_allowed in allowed.items():
            if not is_allowed:
                raise ValueError(f"{name} can't be {getattr(self, name)!r}")

    @property
    def folder(self) -> Path:
        """Where a new run is written."""
        return RUNS / self.run_name


def gumbel_keep(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draws who is kept, 1 or 0, with the gradient of the Gumbel-softmax behind it (eq. 8).

    Args:
        logits: of prune and keep, [..., 2].
        generator: of the noise, on the logits' device.

    Returns:
        [...].
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
    noise = -(-uniform.clamp(min=1e-10).log()).log()
    soft = (logits + noise).softmax(-1)[..., 1]
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


def attention_bias(kept: Tensor, num_prefix: int) -> Tensor:
    """What is added to the scores so that nobody attends to pruned tokens but they to themselves
    (eqs. 10-12), with the gradient to those masks.

    The paper multiplies exp(score) by G, which is D of the key and 1 on the diagonal; that is
    adding log G.

    Args:
        kept: D of the patches, 1 or 0, [B, N].
        num_prefix: tokens before them that are always kept.

    Returns:
        [B, 1, L, L].
    """
    seen = F.pad(kept, (num_prefix, 0), value=1.0)[:, None, None, :]
    own = torch.eye(seen.shape[-1], dtype=seen.dtype, device=seen.device)
    return (seen * (1 - own) + own + FLOOR).log()


@dataclass(frozen=True)
class Run:
    """What a model made of a batch.

    Attributes:
        logits: [B, classes].
        patches: embeddings behind the last norm, [B, N, D].
        kept: D of each stage, 1 or 0, [T, B, N].
    """

    logits: Tensor
    patches: Tensor
    kept: Tensor


def run_dense(backbone: StagedViT, begun: Tokens) -> Run:
    """The unpruned model, from where ``begun`` stands before the first stage."""
    x = begun.x.unflatten(0, begun.alive.shape)
    x = _blocks(backbone, x, backbone.prune_before[0], backbone.depth, None, begun)
    everyone = x.new_ones(backbone.num_stages, len(x), backbone.num_patches)
    return _finished(backbone, begun, x, everyone)


def run_masked(
    backbone: StagedViT, policy: DynamicViTPolicy, begun: Tokens, generator: torch.Generator
) -> Run:
    """The model with masks that the predictors draw, from where ``begun`` stands."""
    x = begun.x.unflatten(0, begun.alive.shape)
    batch, prefix = len(x), backbone.num_prefix
    image = torch.arange(batch, device=x.device).repeat_interleave(backbone.num_patches)
    kept = x.new_ones(batch, backbone.num_patches)
    history = []
    edges = (*backbone.prune_before, backbone.depth)
    for stage, predictor in enumerate(policy.predictors):
        patches = x[:, prefix:].flatten(0, 1)
        logits = predictor(patches, image, batch, kept.flatten())
        kept = kept * gumbel_keep(logits, generator).view_as(kept)
        if kept.requires_grad:
            kept.register_hook(
                partial(torch.clamp, min=-MOST_WORTH / batch, max=MOST_WORTH / batch)
            )
        history.append(kept)
        bias = attention_bias(kept, prefix)
        x = _blocks(backbone, x, edges[stage], edges[stage + 1], bias, begun)
    return _finished(backbone, begun, x, torch.stack(history))


def _blocks(
    backbone: StagedViT, x: Tensor, start: int, stop: int, bias: Tensor | None, begun: Tokens
) -> Tensor:
    """timm's own blocks on all tokens, [B, L, D]."""
    for i in range(start, stop):
        turn = begun.rotary.patches(i, len(x)) if begun.rotary else None
        x = backbone.ops.dense_block(backbone.model.blocks[i], x, bias, turn)
    return x


def _finished(backbone: StagedViT, begun: Tokens, x: Tensor, kept: Tensor) -> Run:
    """Norm and head; where the head pools over patches, over those that are kept."""
    ended = backbone.prune(replace(begun, x=x.flatten(0, 1)), kept[-1] > 0)
    return Run(
        logits=backbone.finish(ended),
        patches=backbone.model.norm(x)[:, backbone.num_prefix :],
        kept=kept,
    )


def losses(
    student: Run, teacher: Run, labels: Tensor, shares: Sequence[float], ratio_weight: float
) -> dict[str, Tensor]:
    """The paper's four losses and their weighted sum, "loss" (section 3.3).

    Args:
        student: the model with masks.
        teacher: the dense one.
        labels: int64 [B].
        shares: of the patches that each stage shall keep.
        ratio_weight: of the distance from these.
    """
    last = student.kept[-1]
    distance = (student.patches - teacher.patches).square().mean(2)
    wanted = torch.tensor(shares, device=labels.device)[:, None]
    terms = {
        "classification": F.cross_entropy(student.logits, labels),
        "kl": F.kl_div(
            student.logits.log_softmax(-1),
            teacher.logits.log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        ),
        "tokens": (distance * last).sum() / last.sum().clamp(min=1),
        "ratio": (student.kept.mean(2) - wanted).square().mean(),
    }
    loss = (
        terms["classification"]
        + KL_WEIGHT * terms["kl"]
        + TOKEN_WEIGHT * terms["tokens"]
        + ratio_weight * terms["ratio"]
    )
    return {"loss": loss, **terms}


def iteration_seed(config: DynamicViTConfig, iteration: int) -> int:
    """A seed of its own for every iteration, so that a resumed run needs no generator's state."""
    return config.seed * 1_000_003 + iteration


class Trainer:
    """Steps of the optimizer; what a resumed run must know stands in ``state_dict``.

    The backbone runs in evaluation mode, trained or not: its statistics and its regularisers are
    those of the model that is pruned.

    Args:
        backbone: whose tokens are pruned; trained in place where the settings say so.
        policy: what learns.
        images: to learn from.
        config: the settings.

    Raises:
        TrainingError: there are fewer images than a step needs, or more classes than the backbone
            tells apart.
    """

    def __init__(
        self,
        backbone: StagedViT,
        policy: DynamicViTPolicy,
        images: ImageSet,
        config: DynamicViTConfig,
    ) -> None:
        if len(images) < config.batch_size:
            raise TrainingError(
                f"a step takes batch_size={config.batch_size} images, the dataset has {len(images)}"
            )
        if images.num_classes > backbone.num_classes:
            raise TrainingError(
                f"the dataset has {images.num_classes} classes, "
                f"the backbone tells {backbone.num_classes} apart"
            )
        self.backbone = backbone
        self.policy = policy.to(backbone.device)
        self.images = images
        self.config = config
        self.iteration = 0
        self._teacher = backbone
        groups: list[dict[str, Any]] = [{"params": list(policy.parameters()), "scale": 1.0}]
        if config.fine_tune:
            self._teacher = copy.deepcopy(backbone)
            backbone.model.requires_grad_(True)
            groups.append({"params": list(backbone.model.parameters()), "scale": BACKBONE_LR})
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=WEIGHT_DECAY)

    def iterate(self) -> dict[str, float]:
        """Takes a step; returns what there is to log."""
        seed = iteration_seed(self.config, self.iteration)
        device = self.backbone.device
        pixels, labels = (part.to(device) for part in self._draw(seed))
        with torch.no_grad():
            begun = self._teacher.begin(pixels, with_attention=False, execution="masked")
            teacher = run_dense(self._teacher, begun)
        if self.config.fine_tune:
            begun = self.backbone.begin(pixels, with_attention=False, execution="masked")
        noise = torch.Generator(device).manual_seed(seed)
        student = run_masked(self.backbone, self.policy, begun, noise)
        shares, weight = self.policy.shares(), self.config.ratio_weight
        terms = losses(student, teacher, labels, shares, weight)
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        self._set_rates()
        self.optimizer.step()
        self.iteration += 1
        correct = (student.logits.argmax(1) == labels).float().mean()
        return {
            **{name: float(term.detach()) for name, term in terms.items()},
            "accuracy": float(correct),
            "keep_ratio": float(student.kept.detach().mean()),
        }

    def _draw(self, seed: int) -> tuple[Tensor, Tensor]:
        """A step's images and labels, drawn without repeats."""
        if isinstance(self.images, Reseedable):
            self.images.reseed(seed)
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        return self.images.load(order[: self.config.batch_size])

    def _set_rates(self) -> None:
        done = self.iteration / self.config.iterations
        rate = self.config.lr * 0.5 * (1 + math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            waits = group["scale"] < 1 and done < BACKBONE_START
            group["lr"] = 0.0 if waits else rate * group["scale"]

    def state_dict(self) -> dict[str, Any]:
        """All that the next iteration depends on."""
        trained = {"backbone": self.backbone.model.state_dict()} if self.config.fine_tune else {}
        return {
            "iteration": self.iteration,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **trained,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state`` was taken."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.config.fine_tune:
            self.backbone.model.load_state_dict(state["backbone"])
        self.iteration = state["iteration"]


if __name__ == "__main__":
    # the installed module, so that its classes are the ones that everybody else imports
    from prunevit.trainers.dynamic_vit_run import main

    main()
