"""What all trainings on labelled images share: epochs of images, and a learner that takes steps."""

from __future__ import annotations

import math
import platform
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers, muon
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from prunevit.envs.data.datasets import ImageSet, Reseedable, open_images
from prunevit.envs.data.prefetch import prefetch
from prunevit.trainers.common.checkpoint import CheckpointError
from prunevit.trainers.common.distributed import ALONE, Ranks
from prunevit.trainers.common.run_folder import TrainingError
from prunevit.trainers.common.signals import finishing_first
from prunevit.versions import version_of

EVALUATION_BATCH = 250
MAX_GRAD_NORM = 1.0
MAX_SEED = 4_000_000  # the seeds of its epochs stay below 2**32, which NumPy asks for
MOST_WORKERS = 256
SEEDS_A_RUN = 1_000  # for its epochs: another run seed doesn't see the draws of this one
SECONDS_AT_STAKE = 300.0  # of an epoch, that a kill may cost
PACKAGES = ("prunevit", "torch", "timm", "numpy")

# the model to call; inputs float32 [B, C, H, W]; targets int64 [B], or float32 [B, classes] where
# they were mixed; the number of the step, counted from 0 over all epochs -> a scalar, the mean
Loss = Callable[[nn.Module, Tensor, Tensor, int], Tensor]

Precision = Literal["float32", "bfloat16"]


# how far an epoch is: the losses until then, and the states of the global generators; as a tree
# that save_checkpoint takes
Place = dict[str, Any]


class Recipe(Protocol):
    """The settings that trainings share; ``BackboneConfig`` says what each means."""

    augmentation: dict[str, Any]
    epochs: int
    epoch_size: int
    batch_size: int
    accumulate: int
    precision: Precision
    workers: int | None
    optimizer: str
    lr: float
    warmup: float
    weight_decay: float
    ema_decay: float
    seed: int


def unfit(recipe: Recipe) -> dict[str, bool]:
    """Which of the shared settings have values that make no sense."""
    return {
        "epochs": recipe.epochs < 1,
        "epoch_size": recipe.epoch_size < 1,
        "batch_size": recipe.batch_size < 1,
        "accumulate": not 1 <= recipe.accumulate <= recipe.batch_size,
        "precision": recipe.precision not in get_args(Precision),
        "workers": recipe.workers is not None and not 0 <= recipe.workers <= MOST_WORKERS,
        "optimizer": recipe.optimizer not in list_optimizers(),
        "lr": not 0 < recipe.lr < math.inf,
        "warmup": not 0 <= recipe.warmup <= 1,
        "weight_decay": not 0 <= recipe.weight_decay < math.inf,
        "ema_decay": not 0 <= recipe.ema_decay < 1,
        "seed": not 0 <= recipe.seed <= MAX_SEED,
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a training gives."""
    packages = {package: version_of(package) for package in PACKAGES}
    return {"python": platform.python_version()} | packages


def batches(size: int, batch_size: int, seed: int, ranks: Ranks = ALONE) -> Iterator[Tensor]:
    """This rank's part, int64, of all whole batches of ``size`` images in an order drawn from
    ``seed``.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    mine = batch_size // ranks.count
    for start in range(0, len(order) - batch_size + 1, batch_size):
        yield order[start + ranks.rank * mine :][:mine]


@torch.no_grad()
def accuracy(
    model: nn.Module,
    images: ImageSet,
    device: torch.device,
    ranks: Ranks = ALONE,
    workers: int = 0,
) -> float:
    """Share of ``images`` that ``model``, in evaluation mode, classifies correctly; ``ranks`` share
    them, and ``workers`` of each read them.
    """
    correct = 0
    starts = range(0, len(images), EVALUATION_BATCH)[ranks.rank :: ranks.count]
    parts = (range(start, min(start + EVALUATION_BATCH, len(images))) for start in starts)
    for inputs, labels in prefetch(images, parts, workers, device):
        correct += int((model(inputs.to(device)).argmax(1).cpu() == labels).sum())
    return ranks.total(correct) / len(images)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(1, int(recipe.warmup * steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def seed_global_generators(seed: int) -> None:
    """Seeds what models (dropout, stochastic depth) and timm's mixup draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def global_generators() -> dict[str, Any]:
    """The states of what ``seed_global_generators`` seeds; CUDA's apart, where no run repeats bit
    for bit anyway.
    """
    kind, key, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(key).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }


def restore_global_generators(states: Mapping[str, Any]) -> None:
    """Goes back to what ``global_generators`` gave."""
    edition, key, gauss = states["python"]
    random.setstate((edition, tuple(key), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])


class TrainingImages:
    """The training split of a dataset, an epoch at a time.

    Args:
        dataset: as ``open_images`` takes it.
        recipe: how many images an epoch and a batch have, and how they are augmented.
        data_config: timm's, of the backbone.
        device: where it is.
        ranks: who share each batch.

    Raises:
        DatasetError: the split can't be opened.
        TrainingError: there are fewer images than a batch holds, or a batch can't be shared evenly.
    """

    def __init__(
        self,
        dataset: str,
        recipe: Recipe,
        data_config: Mapping[str, Any],
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self._dataset = dataset
        self._device = device
        self._recipe = recipe
        self._data_config = data_config
        self._ranks = ranks
        try:
            ranks.share_of("batch_size", recipe.batch_size)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        images = len(self._open(seed=0))
        self.steps_an_epoch = images // recipe.batch_size
        if not self.steps_an_epoch:
            raise TrainingError(
                f"{images} training images of {dataset} don't fill a batch of {recipe.batch_size}"
            )

    def _open(self, seed: int) -> ImageSet:
        return open_images(
            self._dataset,
            "train",
            self._data_config,
            size=self._recipe.epoch_size,
            seed=seed,
            augment=self._recipe.augmentation or True,
        )

    def epoch(self, seed: int) -> Generator[tuple[Tensor, Tensor]]:
        """The batches of an epoch; ``seed`` draws the images, their order and the augmentation.
        Where it is left before its end, it is to be closed.
        """
        images = self._open(seed)
        if isinstance(images, Reseedable):
            images.reseed(self._ranks.own_seed(seed))
        order = batches(len(images), self._recipe.batch_size, seed, self._ranks)
        workers = self._ranks.workers(self._recipe.workers, self._device)
        return prefetch(images, order, workers, self._device)


@contextmanager
def orthogonalise_in(dtype: torch.dtype) -> Iterator[None]:
    """Has timm's Muon compute in ``dtype``. It has no option for that, and CPUs emulate the
    bfloat16 that it uses: the optimizer then takes longer than the model.
    """
    original = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(original, dtype=dtype)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = original


class Learner:
    """A model that learns: its weights, their average, and the optimizer.

    Args:
        model: what to train, on its device and in the mode in which it learns; parameters that need
            no gradient stay as they are.
        loss: of a batch; it runs ``model``, or what has to be called in its place.
        recipe: how.
        steps: of the whole training, all epochs together.
        ranks: who learns together.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        recipe: Recipe,
        steps: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
        self.optimizer = create_optimizer_v2(
            model, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.recipe = recipe
        self.steps = steps
        self._loss = loss
        self._wrapped = ranks.wrap(model)

    def learn(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Takes step number ``step``; arguments as of ``Loss``, this rank's part of a batch.

        Returns:
            the loss of all ranks, a scalar that carries no gradient.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, step, self.steps)
        inputs = inputs.to(memory_format=torch.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._accumulate(inputs, targets, step)
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        with orthogonalise_in(torch.float32):
            self.optimizer.step()
        self.ema.update(self.model, step=step)
        return self.ranks.average(loss)

    def _accumulate(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Gradients of the batch, a part after the other; returns the loss."""
        recipe, total = self.recipe, torch.zeros((), device=inputs.device)
        parts = list(
            zip(inputs.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True)
        )
        for i, (some, theirs) in enumerate(parts):
            is_last = i + 1 == len(parts)
            with (
                self.ranks.averages_gradients(self._wrapped, when=is_last),
                torch.autocast(
                    inputs.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"
                ),
            ):
                loss = self._loss(self._wrapped, some, theirs, step) * (len(some) / len(inputs))
            with self.ranks.averages_gradients(self._wrapped, when=is_last):
                loss.backward()
            total += loss.detach()
        return total

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on, as a tree that ``save_checkpoint`` takes."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to what ``state_dict`` gave.

        Raises:
            CheckpointError: the state is of another model or version.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint is of another backbone: {reason}") from error


def train_epoch(
    learner: Learner,
    images: TrainingImages,
    epoch: int,
    device: torch.device,
    mixup: Mixup | None = None,
    place: Place | None = None,
    save: Callable[[Place], object] | None = None,
) -> float:
    """Takes a step a batch of epoch number ``epoch``, counted from 0; returns the mean loss.

    Args:
        learner: who learns.
        images: from what.
        epoch: which one.
        device: where the model lies.
        mixup: mixes the images of a batch, if any.
        place: where to go on in the epoch, as ``save`` was given it; the images of the steps before
            are read once more, for what their augmentation draws.
        save: called from time to time, and where the training is stopped, with the place that the
            learner has come to; None where nobody can go on from there.

    Raises:
        TrainingError: the loss is not finite.
    """
    recipe, ranks = learner.recipe, learner.ranks
    # images of an epoch are a draw of their own: seed 0 is what the game trains on
    seed = recipe.seed * SEEDS_A_RUN + epoch + 1
    seed_global_generators(ranks.own_seed(seed))
    losses: list[Tensor] = []
    if place is not None:
        losses = list(place["losses"].to(device))
        restore_global_generators(place["generators"])
    done = len(losses)
    title = f"epoch {epoch + 1}/{recipe.epochs}"
    silent = None if ranks.is_first else True
    all_batches = images.epoch(seed)
    batches_left = islice(all_batches, done, None)
    progress = tqdm(batches_left, title, images.steps_an_epoch, initial=done, disable=silent)
    saved_at = time.monotonic()
    try:
        for step, (inputs, labels) in enumerate(progress, epoch * images.steps_an_epoch + done):
            ranks.stop_if_asked()
            with finishing_first():
                inputs, labels = (
                    part.to(device, non_blocking=part.is_pinned()) for part in (inputs, labels)
                )
                if mixup is not None:
                    inputs, labels = mixup(inputs, labels)
                losses.append(learner.learn(inputs, labels, step))
            if save is not None and time.monotonic() - saved_at >= SECONDS_AT_STAKE:
                save(_place(losses))
                saved_at = time.monotonic()
    except KeyboardInterrupt as stopped:
        if save is not None and losses:
            save(_place(losses))
            stopped.add_note(f"{len(losses)} steps of epoch {epoch + 1} are saved")
        raise
    finally:
        all_batches.close()
    return _mean(losses)


def _place(losses: list[Tensor]) -> Place:
    _mean(losses)  # what has diverged is not worth going on from
    return {"losses": torch.stack(losses), "generators": global_generators()}


def _mean(losses: list[Tensor]) -> float:
    loss = float(torch.stack(losses).mean())
    if not math.isfinite(loss):
        raise TrainingError("the loss is not finite: try a smaller lr")
    return loss
