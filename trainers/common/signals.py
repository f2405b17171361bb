"""How a command ends early: SIGTERM, Ctrl-C and errors, each reported in one line."""

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
EXIT_CODE = 128  # plus the signal's number, as shells report it
# parts of PyTorch's out-of-memory messages, on a CPU and on other devices
MEMORY_MESSAGES = ("not enough memory", "can't allocate memory", "out of memory")
MEMORY_REASON = 200  # characters shown of such a message


class Stopped(KeyboardInterrupt):
    """Raised on SIGTERM and Ctrl-C; its notes say what was saved and how to resume.

    It is no ``Exception``, so that handlers of ordinary errors don't catch it.

    Args:
        number: the signal's number.
        is_told: whether this process reports it; of ranks that stop together only one does.
    """

    def __init__(self, number: int, is_told: bool = True) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = EXIT_CODE + number
        self.is_told = is_told


def stop(number: int, is_told: bool = True) -> NoReturn:
    """Raises ``Stopped``, and ignores signals from then on so that they can't disturb saving."""
    # a process group can get the signal twice; the second must not stop the last checkpoint
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number, is_told)


def _stop(number: int, frame: FrameType | None) -> None:
    stop(number)


@contextmanager
def signals_are_noted(numbers: list[int]) -> Iterator[None]:
    """A context in which signals are appended to ``numbers`` instead of raised."""
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
    """The context of a command. ``errors`` and a lack of memory print a line and exit with code 1;
    signals exit with 128 plus their number.

    A signal raises ``Stopped`` wherever the main thread is, even in the middle of an iteration: a
    scheduler may not wait for the end of a long one.
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
        sys.exit(f"error: out of memory, try smaller batches or a smaller model: {reason}")
    except Stopped as stopped:
        if stopped.is_told:
            print("; ".join([str(stopped), *getattr(stopped, "__notes__", ())]), file=sys.stderr)
        sys.exit(stopped.exit_code)
    finally:
        _handle(before)


@contextmanager
def finishing_first() -> Iterator[None]:
    """A context that delays signals to its end, for short steps that can't be resumed half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
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
def says_how_to_go_on(folder: Path, flags: str) -> Iterator[None]:
    """A context that adds to an interruption or a disk error that ``flags`` resume the run in
    ``folder``.
    """
    try:
        yield
    except (KeyboardInterrupt, OSError) as stopped:
        if (folder / "config.json").is_file():
            stopped.add_note(f"continue with {flags}")
        raise
