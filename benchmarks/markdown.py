"""Markdown tables, and numbers as they stand in their cells."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from prunevit.benchmarks.bootstrap import interval


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without a newline at its end.

    Args:
        header: titles of the columns.
        rows: cells, as many in each row.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("|" + "|".join(_cell(cell) for cell in line) + "|" for line in lines)


def _cell(text: str) -> str:
    return text if text == "---" else f" {text} " if text else " "


def mean_and_interval(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """``1.23 [1.20, 1.26]``: the mean and its 95% interval; the mean alone where all are equal."""
    low, high = interval(values)
    mean = f"{sum(values) / len(values):.{digits}f}{unit}"
    return mean if low == high else f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"


def mean_and_deviation(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """``1.23 ± 0.04``: the mean and the standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}{unit}"
