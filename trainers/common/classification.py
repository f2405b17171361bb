"""Parts of a training on labelled images: an epoch's images, and a learner that takes steps."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, muon
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from prunevit.envs.data.datasets import check_has_classes, open_images
from prunevit.envs.data.image_set import ImageSet, Reseedable
from prunevit.envs.data.prefetch import prefetch
from prunevit.trainers.common.distributed import ALONE, Ranks
from prunevit.trainers.common.recipe import Recipe
from prunevit.trainers.common.run import TrainingError
from prunevit.versions import version_of

MAX_GRAD_NORM = 1.0
SEEDS_PER_RUN = 1_000  # seeds of a run's epochs; runs with other seeds draw other images
AFTER_BLOCKS = ("norm", "fc_norm", "attn_pool", "head", "head_dist")  # of timm's models
PACKAGES = ("prunevit", "torch", "timm", "numpy")

# model, inputs float32 [B, ...], targets int64 [B] (float32 [B, classes] if mixed), number of
# the step from 0 over all epochs -> mean loss, a scalar
Loss = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect a training's result."""
    packages = {package: version_of(package) for package in PACKAGES}
    return {"python": platform.python_version()} | packages


def check_can_classify(dataset: str, num_classes: int) -> None:
    """Checks that a model of ``num_classes`` can be judged by the labels of ``dataset``.

    Raises:
        DatasetError: the dataset has no labels.
        TrainingError: the model has no classifier.
    """
    check_has_classes(dataset)
    if not num_classes:
        raise TrainingError(
            "the backbone has no classifier (num_classes=0), which is needed here: take another, "
            "or one that trainers.backbone gave a classifier"
        )


def batches(size: int, batch_size: int, seed: int, ranks: Ranks = ALONE) -> Iterator[Tensor]:
    """Yields this rank's share of each batch, as image indices int64 [batch_size / ranks]. ``seed``
    draws the order; an incomplete last batch is dropped.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    mine = batch_size // ranks.count
    for start in range(0, len(order) - batch_size + 1, batch_size):
        yield order[start + ranks.rank * mine :][:mine]


def learning_rate(peak: float, warmup: float, step: int, steps: int) -> float:
    """Learning rate of a step: a linear warm-up over a share ``warmup`` of all steps, then a cosine
    from the ``peak`` to zero.
    """
    first = max(1, int(warmup * steps))
    if step < first:
        return peak * (step + 1) / first
    return peak * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def make_mixup(
    mixup: float, cutmix: float, label_smoothing: float, num_classes: int
) -> Mixup | None:
    """timm's mixup and CutMix with these alphas; None if both are 0."""
    if not mixup and not cutmix:
        return None
    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )


def train_from(vit: Any, block: int) -> None:
    """Turns gradients on for the blocks of timm's ``vit`` from number ``block`` on, and for what
    follows them.
    """
    after = [getattr(vit, name, None) for name in AFTER_BLOCKS]
    for module in (*vit.blocks[block:], *filter(None, after)):
        module.requires_grad_(True)


class TrainingImages:
    """The training split of a dataset, an epoch at a time.

    Args:
        dataset: its name, as ``open_images`` takes it.
        recipe: the settings.
        data_config: the backbone's, from timm.
        device: the backbone's device.
        ranks: the processes that share each batch.
        augment: whether images are varied each time.

    Attributes:
        whole: the images of the split, each always under the same index, if epochs are to draw
            from those; None opens the split anew for each epoch.
        steps_an_epoch: number of batches of an epoch.
        steps: number of batches of the whole training.

    Raises:
        DatasetError: the split can't be opened.
        TrainingError: there are fewer images than a batch holds.
        ValueError: a batch can't be shared evenly.
    """

    def __init__(
        self,
        dataset: str,
        recipe: Recipe,
        data_config: Mapping[str, Any],
        device: torch.device,
        ranks: Ranks = ALONE,
        augment: bool = True,
    ) -> None:
        self._augment = augment
        self.whole: ImageSet | None = None
        self._dataset = dataset
        self.device = device
        self._recipe = recipe
        self._data_config = data_config
        self._ranks = ranks
        ranks.share_of("batch_size", recipe.batch_size)
        images = len(self._open(0, recipe.epoch_size))
        self.steps_an_epoch = images // recipe.batch_size
        self.steps = recipe.epochs * self.steps_an_epoch
        if not self.steps_an_epoch:
            raise TrainingError(
                f"{images} training images of {dataset} don't fill a batch of {recipe.batch_size}"
            )

    def open_whole(self) -> ImageSet:
        """All images of the split, for ``whole``."""
        return self._open(0, None)

    def _open(self, seed: int, size: int | None) -> ImageSet:
        return open_images(
            self._dataset,
            "train",
            self._data_config,
            size=size,
            seed=seed,
            augment=self._augment and (self._recipe.augmentation or True),
        )

    def epoch(self, seed: int) -> Generator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: images [B, C, H, W] and labels int64 [B]. ``seed`` draws the
        images, their order and the augmentation. Close the generator if you stop early.
        """
        images = self.whole
        if images is None:
            images = self._open(seed, self._recipe.epoch_size)
        if isinstance(images, Reseedable):
            images.reseed(self._ranks.own_seed(seed))
        order = batches(len(images), self._recipe.batch_size, seed, self._ranks)
        workers = self._ranks.workers(self._recipe.workers, self.device)
        return prefetch(images, islice(order, self.steps_an_epoch), workers, self.device)


@contextmanager
def orthogonalise_in(dtype: torch.dtype) -> Iterator[None]:
    """A context in which timm's Muon computes in ``dtype``, for which it has no option. On many
    CPUs its bfloat16 is so slow that the optimizer takes longer than the model.
    """
    original = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(original, dtype=dtype)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = original


class Learner:
    """A model with its optimizer and the moving average of its weights.

    Args:
        model: the model, on its device and in the mode (train or eval) it is trained in. Parameters
            with ``requires_grad=False`` aren't trained.
        loss: the loss of a batch.
        recipe: the settings.
        steps: number of steps of the whole training.
        ranks: the processes that train together.
        mixup: mixes the images of each batch, if given.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        recipe: Recipe,
        steps: int,
        ranks: Ranks = ALONE,
        mixup: Mixup | None = None,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
        self.optimizer = create_optimizer_v2(
            model,
            opt=recipe.optimizer,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            layer_decay=None if recipe.layer_decay == 1 else recipe.layer_decay,
        )
        self.recipe = recipe
        self.steps = steps
        self._loss = loss
        self._mixup = mixup
        self._wrapped = ranks.wrap(model)

    def learn(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Takes a step on this rank's share of a batch: inputs [B, ...], targets int64 [B] and the
        number of the step over all epochs.

        Returns:
            The mean loss over all ranks, a scalar without gradient.
        """
        if self._mixup is not None:
            inputs, targets = self._mixup(inputs, targets)
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            rate = learning_rate(recipe.lr, recipe.warmup, step, self.steps)
            group["lr"] = rate * group.get("lr_scale", 1.0)
        if inputs.ndim == 4:  # features of images may have fewer dimensions
            inputs = inputs.to(memory_format=torch.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._accumulate(inputs, targets, step)
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        with orthogonalise_in(torch.float32):
            self.optimizer.step()
        self.ema.update(self.model, step=step)
        return self.ranks.average(loss)

    def _accumulate(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Accumulates the gradients of the batch, one micro-batch at a time; returns the loss."""
        recipe, total = self.recipe, torch.zeros((), device=inputs.device)
        micro_batches = list(
            zip(inputs.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True)
        )
        autocast = torch.autocast(
            inputs.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"
        )
        for i, (some, theirs) in enumerate(micro_batches):
            is_last = i + 1 == len(micro_batches)
            with self.ranks.averages_gradients(self._wrapped, when=is_last):
                with autocast:
                    loss = self._loss(self._wrapped, some, theirs, step) * (len(some) / len(inputs))
                loss.backward()
            total += loss.detach()
        return total

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, for ``save_checkpoint``."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
