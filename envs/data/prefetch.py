"""Images that other processes read while whoever needs them is busy with those before."""

from __future__ import annotations

import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunevit.envs.data.datasets import DatasetError, ImageSet, Load, Prefetchable

BATCHES_AHEAD = 2  # that a process has read or is reading


class Prefetcher(Iterator[tuple[Tensor, Tensor]]):
    """Batches as ``images.read`` gives them, in the order of ``loads``.

    Args:
        images: which ones; a worker that is forked shares them.
        loads: what is to be read, as far as is known; drawn from as batches are taken.
        workers: processes, 1 at least, each of which reads whole batches.
        device: that the batches are for; memory that goes to a GPU is pinned.

    ``next`` raises what ``read`` raises, when the batch is due.

    Raises:
        DatasetError: from ``next``, also where a process has ended.
    """

    def __init__(
        self, images: Prefetchable, loads: Iterable[Load], workers: int, device: torch.device
    ) -> None:
        self._due: deque[Load] = deque()
        loader = DataLoader(
            _Batches(images),
            batch_size=None,
            sampler=_noted(loads, self._due),
            num_workers=workers,
            prefetch_factor=BATCHES_AHEAD,
            pin_memory=device.type == "cuda",
            # importing TorchRL makes "spawn" everybody's default, which copies all images
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            worker_init_fn=_leave_the_end_to_the_trainer,
            # otherwise it would draw from the global one
            generator=torch.Generator(),
        )
        before = signal.getsignal(signal.SIGCHLD)
        self._batches: Iterator[tuple[Tensor, Tensor] | str] | None = iter(loader)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and before is not None:
            # torch would raise the end of a process wherever the main thread is, writing a
            # checkpoint too; it is soon enough when its batch is due
            signal.signal(signal.SIGCHLD, before)

    @property
    def due(self) -> Load | None:
        """What ``next`` gives; None where nothing is left."""
        return self._due[0] if self._due else None

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._batches is None:
            raise StopIteration
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise DatasetError(
                f"a process that reads images was ended by something else, as a lack of memory: "
                f"{error}"
            ) from error
        self._due.popleft()
        if not self._due:
            self.close()
        if isinstance(batch, str):
            raise DatasetError(batch)
        return batch

    def close(self) -> None:
        """Ends the processes; there is nothing more to come."""
        self._due.clear()
        self._batches = None


def _noted(loads: Iterable[Load], due: deque[Load]) -> Iterator[Load]:
    """``loads``, each in ``due`` before it is taken."""
    for load in loads:
        due.append(load)
        yield load


class _Batches(Dataset[tuple[Tensor, Tensor] | str]):
    """What a process gives for a ``Load``: the batch, or what is wrong with an image of it."""

    def __init__(self, images: Prefetchable) -> None:
        self._images = images

    def __getitem__(self, load: Load) -> tuple[Tensor, Tensor] | str:
        try:
            return self._images.read(load)
        except DatasetError as error:
            # as an error it would come with the process's traceback in its message
            return str(error)


def _leave_the_end_to_the_trainer(worker: int) -> None:
    """Ctrl-C and SIGTERM may go to all processes: the first one says what then becomes of these;
    where it is gone, they notice.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    show = sys.excepthook

    def show_others(kind: type[BaseException], *details: Any) -> None:
        # it may be stopped while it takes a batch, and says so itself
        if not issubclass(kind, ConnectionError):
            show(kind, *details)

    sys.excepthook = show_others


def prefetch(
    images: ImageSet,
    batches: Iterable[Sequence[int] | Tensor],
    workers: int,
    device: torch.device,
) -> Generator[tuple[Tensor, Tensor]]:
    """``images.load`` of each of ``batches``, read by ``workers`` processes before they are asked
    for: where there are none, or the images are in memory anyway, here and then.

    Closing the generator ends the processes.
    """
    if not workers or not isinstance(images, Prefetchable):
        for indices in batches:
            yield images.load(indices)
        return
    ahead = Prefetcher(images, map(images.plan, batches), workers, device)
    try:
        yield from ahead
    finally:
        ahead.close()
