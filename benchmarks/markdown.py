"""Markdown tables, and numbers as they stand in their cells."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prunevit.benchmarks.intervals import t_interval


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without a newline at its end; a row has as many cells as the header."""
    lines = [[f" {cell} " if cell else " " for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def records_table(
    records: Iterable[Mapping[str, Any]], columns: Mapping[str, tuple[str, float, str]]
) -> str:
    """A row for each record.

    Args:
        records: a field that one doesn't have leaves its cell empty.
        columns: title -> field, its unit (1 for text), and how it is formatted. Those whose field
            no record has are left out.
    """
    records = list(records)
    measured = {field for record in records for field in record}
    columns = {title: column for title, column in columns.items() if column[0] in measured}

    def cell(record: Mapping[str, Any], field: str, unit: float, form: str) -> str:
        if field not in record:
            return ""
        return format(record[field] if unit == 1 else record[field] / unit, form)

    rows = ([cell(record, *column) for column in columns.values()] for record in records)
    return markdown_table(list(columns), rows)


def mean_and_interval(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """``1.23 [1.20, 1.26]``: the mean and its 95% interval; the mean alone where all are equal."""
    mean = f"{sum(values) / len(values):.{digits}f}{unit}"
    if min(values) == max(values):
        return mean
    low, high = t_interval(values)
    return f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"


def mean_and_deviation(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """``1.23 ± 0.04``: the mean and the standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}{unit}"
