"""Progress of long commands: a bar on the terminal, and lines that don't break it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

# tqdm's own, but for the rate, which would be seconds an item where it is low
FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


def progress_bar(
    total: int,
    unit: str,
    done: int = 0,
    title: str | None = None,
    silent: bool = False,
    items: Iterable[Any] | None = None,
) -> tqdm:
    """A bar with what is done, how fast, and an estimate of what is left. It is on the standard
    error output, if that is a terminal.

    Args:
        total: of how many.
        unit: of what, in the plural.
        done: how many were done before.
        title: what stands before the bar.
        silent: show none at all.
        items: what the bar then goes through; without them, ``update`` tells it what is done.
    """
    return tqdm(
        items,
        total=total,
        unit=f" {unit}",
        initial=done,
        desc=title,
        disable=True if silent else None,
        dynamic_ncols=True,
        bar_format=FORMAT,
    )


def say(text: str) -> None:
    """Prints a line at once, above any bar."""
    tqdm.write(text)
    sys.stdout.flush()
