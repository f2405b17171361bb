"""How a command ends early: SIGTERM, Ctrl-C and errors, each reported in one line."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

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
def _handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = {each: signal.signal(each, handler) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler_before in before.items():
            signal.signal(each, handler_before)


def signals_are_noted(numbers: list[int]) -> AbstractContextManager[None]:
    """A context in which signals are appended to ``numbers`` instead of raised."""
    return _handled_by(lambda number, _: numbers.append(number))


def _told(error: BaseException) -> str:
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


@contextmanager
def ends_in_one_line(*errors: type[Exception]) -> Iterator[None]:
    """The context of a command. ``errors`` and a lack of memory print a line and exit with code 1;
    signals exit with 128 plus their number.

    A signal raises ``Stopped`` wherever the main thread is, even in the middle of an iteration: a
    scheduler may not wait for the end of a long one.
    """
    with _handled_by(_stop):
        try:
            yield
        except errors as error:
            sys.exit(f"error: {' '.join(_told(error).split())}")
        except (MemoryError, RuntimeError) as error:
            told = any(message in str(error) for message in MEMORY_MESSAGES)
            if not told and not isinstance(error, MemoryError):
                raise
            reason = " ".join(str(error).split())[:MEMORY_REASON]
            sys.exit(f"error: out of memory, try smaller batches or a smaller model: {reason}")
        except Stopped as stopped:
            if stopped.is_told:
                print(_told(stopped), file=sys.stderr)
            sys.exit(stopped.exit_code)


@contextmanager
def finishing_first() -> Iterator[None]:
    """A context that delays signals to its end, for short steps that can't be resumed half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    held: list[int] = []
    with signals_are_noted(held):
        yield
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
