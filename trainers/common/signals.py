"""How a training ends before its time: SIGTERM, Ctrl-C and errors, each in one line."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODE = 128  # what shells add a signal's number to
# what PyTorch says of memory that it doesn't get, on a CPU and on other devices
MEMORY_MESSAGES = ("not enough memory", "can't allocate memory", "out of memory")
MEMORY_REASON = 200  # characters of it that are shown


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C; its notes say what is left. No ``Exception``, as nothing is to go on.

    Args:
        number: of the signal.
        is_told: whether this process is to say so; of those that stop together one does.
    """

    def __init__(self, number: int, is_told: bool = True) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = EXIT_CODE + number
        self.is_told = is_told


def stop(number: int, is_told: bool = True) -> NoReturn:
    """Raises ``Stopped``, and lets no signal disturb what then remains to be done."""
    # a process group may get the signal twice: the second must not stop the last checkpoint
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number, is_told)


def _stop(number: int, frame: FrameType | None) -> None:
    stop(number)


@contextmanager
def signals_are_noted(numbers: list[int]) -> Iterator[None]:
    """Appends signals to ``numbers``, for whoever looks there, in the place of raising them."""
    before = {
        each: signal.signal(each, lambda number, _: numbers.append(number)) for each in SIGNALS
    }
    try:
        yield
    finally:
        _handle(before)


def _handle(handlers: Mapping[signal.Signals, Any]) -> None:
    for each, handler in handlers.items():
        signal.signal(each, handler)


def _is_lack_of_memory(error: Exception) -> bool:
    told = any(message in str(error) for message in MEMORY_MESSAGES)
    return told or isinstance(error, MemoryError)


@contextmanager
def ends_in_one_line(*errors: type[Exception]) -> Iterator[None]:
    """Surrounds a command: ``errors``, and memory that doesn't suffice, exit with code 1, signals
    with 128 and their number.

    Signals raise ``Stopped`` wherever the main thread is, in the middle of an iteration too: one
    may take longer than whoever asked us to stop is going to wait.
    """
    before = {each: signal.signal(each, _stop) for each in SIGNALS}
    try:
        yield
    except errors as error:
        message = "; ".join([str(error), *getattr(error, "__notes__", ())])
        sys.exit(f"error: {' '.join(message.split())}")
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:MEMORY_REASON]
        sys.exit(f"error: the memory doesn't suffice, make something smaller: {reason}")
    except Stopped as stopped:
        if stopped.is_told:
            print("; ".join([str(stopped), *getattr(stopped, "__notes__", ())]), file=sys.stderr)
        sys.exit(stopped.exit_code)
    finally:
        _handle(before)


@contextmanager
def finishing_first() -> Iterator[None]:
    """Holds signals back until what is inside is done: for steps that nobody could go on from
    half-way, and that are short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    held: list[int] = []
    before = {each: signal.signal(each, lambda number, _: held.append(number)) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if held:
        signal.raise_signal(held[0])


@contextmanager
def says_how_to_go_on(folder: Path) -> Iterator[None]:
    """Adds to an interruption, or a disk that is full, how the run in ``folder`` is resumed, if it
    has been begun.
    """
    try:
        yield
    except (KeyboardInterrupt, OSError) as stopped:
        if (folder / "config.json").is_file():
            stopped.add_note(f"go on by --resume {folder}")
        raise
