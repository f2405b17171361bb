"""The loop of a training in iterations: logging, evaluation, checkpoints and interruptions."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch.profiler import record_function
from tqdm import tqdm

from prunevit.extras import needs
from prunevit.progress import progress_bar, say
from prunevit.trainers.common.distributed import RanksError
from prunevit.trainers.common.profiling import profiled
from prunevit.trainers.common.run import Record, RunFolder, TrainingError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class NotFiniteError(ArithmeticError):
    """A reward, a loss or a gradient is not finite; the message is its name."""


class Trainer(Protocol):
    """A training in iterations.

    Attributes:
        iteration: number of finished iterations.
    """

    iteration: int

    @property
    def is_resumable(self) -> bool:
        """Whether a run resumed from here ends as if it had never stopped."""
        ...

    def iterate(self) -> dict[str, float]:
        """Trains for one iteration; returns what to log. Raises NotFiniteError if it diverged."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on, including ``iteration``."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        ...


@dataclass(frozen=True)
class Monitor:
    """What the loop evaluates and shows.

    Attributes:
        evaluate: returns results on the validation split, whose names begin with ``validation_``.
            All ranks call it and get the same.
        progress: returns what the progress bar shows of an iteration's record.
        activity: returns what the last iteration trained on, for the message of an error in it.
    """

    evaluate: Callable[[], dict[str, float]]
    progress: Callable[[dict[str, float]], str]
    activity: Callable[[], str]


class LoopSettings(Protocol):
    """Settings of the loop; ``MappoConfig`` describes each."""

    iterations: int
    eval_every: int
    checkpoint_every: int


def train(
    run: RunFolder,
    trainer: Trainer,
    monitor: Monitor,
    settings: LoopSettings,
    profile: bool = False,
) -> None:
    """Runs all iterations. If the run is stopped or fails, saves the last complete iteration.

    Args:
        run: the run's folder.
        trainer: the training.
        monitor: what to evaluate and show.
        settings: how many iterations, and how often to evaluate and save.
        profile: whether to trace two iterations.

    Raises:
        TrainingError: a reward, a loss or a gradient is not finite.
    """
    ranks = run.ranks
    board = _open_board(run, trainer.iteration + 1)
    bar = progress_bar(
        settings.iterations, "iterations", trainer.iteration, run.path.name, not ranks.is_first
    )
    tracing: AbstractContextManager[Callable[[], object]] = nullcontext(lambda: None)
    if profile and ranks.is_first:
        tracing = profiled(run.path)
    # a half-finished iteration must not be saved
    whole = copy.deepcopy(trainer.state_dict())
    try:
        with board or nullcontext(), bar, tracing as after_iteration:
            while trainer.iteration < settings.iterations:
                ranks.stop_if_asked()
                record = _iterate(trainer, monitor, bar)
                iteration = trainer.iteration
                is_last = iteration == settings.iterations
                if iteration % settings.eval_every == 0 or is_last:
                    record |= _evaluate(monitor, iteration, ranks.is_first)
                if board is not None:
                    for name, value in record.items():
                        board.add_scalar(name, value, iteration)
                run.records.append(record | {"iteration": iteration, "seconds": run.seconds})
                after_iteration()
                if trainer.is_resumable:
                    whole = copy.deepcopy(trainer.state_dict())
                if iteration % settings.checkpoint_every == 0 or is_last:
                    run.save(whole)
    except (KeyboardInterrupt, TrainingError, RanksError) as ended:
        run.save(whole)
        ended.add_note(f"iteration {whole['iteration']} is saved")
        raise


def _open_board(run: RunFolder, step: int) -> SummaryWriter | None:
    """Opens TensorBoard's log from iteration ``step`` on. None on ranks other than the first, or if
    TensorBoard is missing.
    """
    if not run.ranks.is_first:
        return None
    try:
        with needs("train"):
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        print(f"No TensorBoard log is written: {error}", file=sys.stderr)
        return None
    return SummaryWriter(str(run.path), purge_step=step)


def _iterate(trainer: Trainer, monitor: Monitor, bar: tqdm) -> Record:
    try:
        with record_function("iteration"):
            record = trainer.iterate()
    except NotFiniteError as error:
        raise TrainingError(
            f"the {error} of iteration {trainer.iteration + 1} is not finite, "
            f"{monitor.activity()}: try a smaller --lr, or look at them"
        ) from error
    # a mean over finished episodes is NaN if there were none
    record = {name: value for name, value in record.items() if not math.isnan(value)}
    bar.update()
    bar.set_postfix_str(monitor.progress(record))
    return record


def _evaluate(monitor: Monitor, iteration: int, is_first: bool) -> dict[str, float]:
    results = monitor.evaluate()
    text = " ".join(f"{k.removeprefix('validation_')} {v:.4f}" for k, v in results.items())
    if is_first:
        say(f"iteration {iteration}: validation {text}")
    return results
