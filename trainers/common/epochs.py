"""The loop over epochs and steps of a training on labelled images, with its checkpoints."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prunevit.progress import progress_bar, say
from prunevit.trainers.common.classification import SEEDS_PER_RUN, Learner, TrainingImages
from prunevit.trainers.common.run import Record, RunFolder, TrainingError, resume_flags
from prunevit.trainers.common.signals import finishing_first, says_how_to_go_on

SAVE_SECONDS = 300.0  # between two checkpoints within an epoch: the most that a kill can cost

# position within an epoch, for save_checkpoint: losses so far, states of the global generators
Place = dict[str, Any]


def train_epochs(
    run: RunFolder,
    learner: Learner,
    images: TrainingImages,
    evaluate: Callable[[], Record],
    evaluate_first: Callable[[], Record] | None = None,
    after_epoch: Callable[[], object] = lambda: None,
) -> None:
    """Trains to the last epoch, starting from the run's checkpoint if it has one.

    Args:
        run: the run's folder, to which a new run writes the learner's settings. Each epoch adds a
            record and a checkpoint.
        learner: the model with its optimizer.
        images: the training images.
        evaluate: returns the results for an epoch's record.
        evaluate_first: returns the results for a record before the first epoch, if given.
        after_epoch: called after each epoch's checkpoint.

    Raises:
        CheckpointError: the run's checkpoint is damaged, or of another model.
        TrainingError: the loss is not finite.
    """
    ranks = run.ranks

    def record(results: Record) -> None:
        run.records.append({"epoch": len(run.records), **results, "seconds": run.seconds})
        run.save(learner.state_dict() | {"epoch": len(run.records)})
        after_epoch()
        if ranks.is_first:
            say(json.dumps(run.records[-1]))

    def save(place: Place) -> None:
        run.save(learner.state_dict() | {"epoch": len(run.records), "place": place})

    state = run.restore(learner)
    ranks.wait()  # all must have read the checkpoint before the first overwrites it
    if state is None:
        run.create(learner.recipe)
        if evaluate_first is not None:
            record(evaluate_first())
    # within an epoch the ranks' generators differ, and only the first rank saves its own
    saver = save if ranks.count == 1 else None
    done = len(run.records) - (evaluate_first is not None)
    place: Place | None = None if state is None else state.get("place")
    flags = resume_flags(run.path, learner.recipe)
    begun = done * images.steps_an_epoch + (0 if place is None else len(place["losses"]))
    bar = progress_bar(images.steps, "steps", begun, run.path.name, not ranks.is_first)
    with bar, says_how_to_go_on(run.path, flags), ranks.stop_together():
        for epoch in range(done, learner.recipe.epochs):
            loss = train_epoch(learner, images, epoch, bar, place, saver)
            place = None
            results = evaluate()
            record({"loss": loss} | results)
            numbers = {k: v for k, v in results.items() if isinstance(v, float)}
            bar.set_postfix(loss=loss, **numbers)


def train_epoch(
    learner: Learner,
    images: TrainingImages,
    epoch: int,
    bar: tqdm,
    place: Place | None = None,
    save: Callable[[Place], object] | None = None,
) -> float:
    """Takes one step for each batch of an epoch; returns the mean loss.

    Args:
        learner: the model with its optimizer.
        images: the training images.
        epoch: number of the epoch, from 0.
        bar: counts the steps of all epochs.
        place: where to continue within the epoch, as it was passed to ``save``. Images of earlier
            steps are loaded again, so that the augmentation draws the same numbers.
        save: called with the place reached, from time to time and when the training is stopped.
            None if the run can't continue within an epoch.

    Raises:
        TrainingError: the loss is not finite.
    """
    recipe, ranks, device = learner.recipe, learner.ranks, images.device
    # never 0: policies are trained on the digits drawn with that seed
    seed = recipe.seed * SEEDS_PER_RUN + epoch + 1
    seed_global_generators(ranks.own_seed(seed))
    losses: list[Tensor] = []
    if place is not None:
        losses = list(place["losses"].to(device))
        restore_global_generators(place["generators"])
    done = len(losses)
    all_batches = images.epoch(seed)
    batches_left = islice(all_batches, done, None)
    saved_at = time.monotonic()
    try:
        for step, (inputs, labels) in enumerate(batches_left, epoch * images.steps_an_epoch + done):
            ranks.stop_if_asked()
            with finishing_first():
                inputs, labels = (
                    part.to(device, non_blocking=part.is_pinned()) for part in (inputs, labels)
                )
                losses.append(learner.learn(inputs, labels, step))
            bar.update()
            if save is not None and time.monotonic() - saved_at >= SAVE_SECONDS:
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
    _mean(losses)  # raises if the training has diverged: don't save that
    return {"losses": torch.stack(losses), "generators": global_generators()}


def _mean(losses: list[Tensor]) -> float:
    loss = float(torch.stack(losses).mean())
    if not math.isfinite(loss):
        raise TrainingError("the loss is not finite: try a smaller --lr")
    return loss


def seed_global_generators(seed: int) -> None:
    """Seeds the generators of dropout, stochastic depth and timm's mixup."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def global_generators() -> dict[str, Any]:
    """States of the generators that ``seed_global_generators`` seeds. CUDA's is left out, as runs
    there aren't repeatable bit for bit anyway.
    """
    kind, key, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(key).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }


def restore_global_generators(states: Mapping[str, Any]) -> None:
    """Restores what ``global_generators`` returned."""
    edition, key, gauss = states["python"]
    random.setstate((edition, tuple(key), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
