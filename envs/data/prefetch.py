"""Reads images ahead in other processes, as ``torch.utils.data.DataLoader`` does."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from prunevit.envs.data.image_set import ImageSet, Prefetchable, ReadRequest
from prunevit.envs.data.image_sources import DatasetError

BATCHES_AHEAD = 2  # per process


class Prefetcher(Iterator[tuple[Tensor, Tensor]]):
    """Yields the batches that ``images.read`` returns for each of ``requests``, in their order.

    Args:
        images: the images; forked workers share their memory.
        requests: what to read; consumed as batches are taken.
        workers: number of processes, at least 1. Each reads whole batches.
        device: where the batches go; those for a GPU are put in pinned memory.

    Raises:
        DatasetError: from ``next``, if an image of the batch is damaged or a process has ended.
    """

    def __init__(
        self,
        images: Prefetchable,
        requests: Iterable[ReadRequest],
        workers: int,
        device: torch.device,
    ) -> None:
        # If another thread of ours is in the middle of an import, that module stays locked for ever
        # in a process that is forked then. Pillow imports formats when they are first read.
        Image.init()
        self._pending: deque[ReadRequest] = deque()
        loader = DataLoader(
            _Batches(images),
            batch_size=None,
            sampler=_recorded(requests, self._pending),
            num_workers=workers,
            prefetch_factor=BATCHES_AHEAD,
            pin_memory=device.type == "cuda",
            multiprocessing_context=_start_method(),
            worker_init_fn=_ignore_signals,
            # without it, the loader would draw from the global generator
            generator=torch.Generator(),
        )
        self._batches: Iterator[tuple[Tensor, Tensor] | str] | None
        with _without_sigchld_handler():
            self._batches = iter(loader)

    @property
    def next_request(self) -> ReadRequest | None:
        """The request of the batch that ``next`` returns; None if there are no more."""
        return self._pending[0] if self._pending else None

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
        self._pending.popleft()
        if not self._pending:
            self.close()
        if isinstance(batch, str):
            raise DatasetError(batch)
        return batch

    def close(self) -> None:
        """Ends the processes; afterwards ``next`` raises ``StopIteration``."""
        self._pending.clear()
        self._batches = None


def _start_method() -> str | None:
    """How processes start: forked on Linux, where anything else copies all images and imports
    everything anew (16 to 26 s to the first batch of two processes for 0.2 s, on a busy core).

    A fork can hang if another thread draws from torch's global generator at that moment. None of
    ours does. Who has such threads calls ``multiprocessing.set_start_method("forkserver")``, which
    is heeded; "spawn" is not, since importing TorchRL sets it.
    """
    if sys.platform != "linux":
        return None
    chosen = multiprocessing.get_start_method(allow_none=True)
    return "forkserver" if chosen == "forkserver" else "fork"


@contextmanager
def _without_sigchld_handler() -> Iterator[None]:
    """Keeps torch from setting its handler of SIGCHLD, which it does once per process.

    That handler would raise an error wherever the main thread is when one of our processes ends,
    even while it writes a checkpoint. It is early enough to raise it when the batch is due. Other
    ``DataLoader``s of this process still get their handler.
    """
    is_set = signal_handling._SIGCHLD_handler_set
    signal_handling._SIGCHLD_handler_set = True
    try:
        yield
    finally:
        signal_handling._SIGCHLD_handler_set = is_set


def _recorded(
    requests: Iterable[ReadRequest], pending: deque[ReadRequest]
) -> Iterator[ReadRequest]:
    """Yields ``requests``, and appends each to ``pending`` first."""
    for request in requests:
        pending.append(request)
        yield request


class _Batches(Dataset[tuple[Tensor, Tensor] | str]):
    """What a worker returns for a ``ReadRequest``: the batch, or what is wrong with it."""

    def __init__(self, images: Prefetchable) -> None:
        self._images = images

    def __getitem__(self, request: ReadRequest) -> tuple[Tensor, Tensor] | str:
        try:
            return self._images.read(request)
        except DatasetError as error:
            # an exception would arrive with the worker's traceback in its message
            return str(error)


def _ignore_signals(worker: int) -> None:
    """Leaves Ctrl-C and SIGTERM, which may reach all processes, to the main process.

    It ends the workers. If it is gone, they notice.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    show = sys.excepthook

    def show_others(kind: type[BaseException], *details: Any) -> None:
        # the main process may stop while it takes a batch, and reports that itself
        if not issubclass(kind, ConnectionError):
            show(kind, *details)

    sys.excepthook = show_others


def prefetch(
    images: ImageSet, batches: Iterable[Sequence[int] | Tensor], workers: int, device: torch.device
) -> Generator[tuple[Tensor, Tensor]]:
    """Yields ``images.load(indices)`` for each of ``batches``, read ahead by worker processes.

    Without workers, or if the images are in memory anyway, each batch is loaded when it is due.
    Closing the generator ends the processes.

    Args:
        images: the images.
        batches: indices of the images of each batch.
        workers: number of processes.
        device: where the batches go.
    """
    if not workers or not isinstance(images, Prefetchable):
        for indices in batches:
            yield images.load(indices)
        return
    ahead = Prefetcher(images, map(images.request, batches), workers, device)
    try:
        yield from ahead
    finally:
        ahead.close()
