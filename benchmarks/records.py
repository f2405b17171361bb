"""What ``benchmarks.compare`` measured, a JSON line a policy, seed and operating point."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from prunevit.envs.old_names import rename_settings
from prunevit.trainers.common.checkpoint import write_records

Record = dict[str, Any]
FILE = "records.jsonl"
CONFIDENCE = 0.95
RESAMPLES = 9_999
CURVE_RESAMPLES = 1_999  # of so many columns at once
FIELDS = {
    "game", "policy", "seed", "point", "fine_tuned", "accuracy", "dense_accuracy", "gmacs",
    "dense_gmacs", "kept", "left", "speedup", "command",
}  # fmt: skip


class Records:
    """The records of a folder.

    A line that was cut off is dropped, and what follows it: what it said is measured anew.

    Args:
        folder: where they lie; made when the first is added.
        game: what they are of.

    Raises:
        ValueError: the folder holds records of another game, or lines that are none.
    """

    def __init__(self, folder: Path, game: str) -> None:
        self._path = folder / FILE
        self.rows: list[Record] = []
        if self._path.is_file():
            self.rows = read(self._path)
        strange = sorted({row["game"] for row in self.rows} - {game})
        if strange:
            raise ValueError(
                f"{self._path} holds records of {', '.join(strange)}: give another --out for {game}"
            )

    def require(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError where a record was made under other ``settings``."""
        for row in self.rows:
            # the first records did not say
            found = row.get("settings", settings)
            keys = settings.keys() | found.keys()
            other = sorted(key for key in keys if found.get(key) != settings.get(key))
            if other:
                differ = ", ".join(
                    f"{key} {found.get(key)} for {settings.get(key)}" for key in other
                )
                raise ValueError(
                    f"{self._path} holds records of other settings ({differ}): give another --out"
                )

    def has(self, policy: str, seed: int, point: float) -> bool:
        return self.find(policy, seed, point) is not None

    def find(self, policy: str, seed: int, point: float) -> Record | None:
        for row in self.rows:
            if (row["policy"], row["seed"], row["point"]) == (policy, seed, point):
                return row
        return None

    def add(self, rows: Sequence[Record]) -> None:
        """Writes all records anew, atomically: readers see whole lines."""
        self.rows += rows
        self.save()

    def save(self) -> None:
        """Writes what ``rows`` say by now."""
        write_records(self._path, self.rows)


def read(path: Path, fields: Set[str] = FIELDS) -> list[Record]:
    """The records of a file up to the last whole line.

    Args:
        path: the file.
        fields: what each record has at least.

    Raises:
        ValueError: a line before that is no record.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    rows: list[Record] = []
    for number, line in enumerate(lines[:-1], start=1):  # behind the last newline nothing is whole
        try:
            row = rename_settings(json.loads(line))
            missing = fields - row.keys()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is no record: {error}") from error
        if missing:
            raise ValueError(f"{path}, line {number} lacks {', '.join(sorted(missing))}")
        rows.append(row)
    return rows


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The bootstrapped 95% confidence interval of the mean (BCa, scipy); where all values are one,
    or there is but one, that one.
    """
    if len(set(values)) < 2:
        return values[0], values[0]
    with warnings.catch_warnings():
        # of few values BCa's correction can be undefined: the percentiles serve then
        warnings.simplefilter("ignore")
        for method in ("BCa", "percentile"):
            found = bootstrap(
                (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES,
                method=method, rng=np.random.default_rng(0),
            ).confidence_interval  # fmt: skip
            if np.isfinite(found.low) and np.isfinite(found.high):
                break
    return float(found.low), float(found.high)


def intervals(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The bootstrapped 95% confidence interval (percentile) of the mean of each column."""
    if len(values) < 2:
        return values[0], values[0]
    found = bootstrap(
        (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=CURVE_RESAMPLES,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return found.low, found.high


def cell(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Mean and interval as text."""
    low, high = interval(values)
    mean = f"{np.mean(values):.{digits}f}{unit}"
    return mean if low == high else f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"


def table(rows: Sequence[Record]) -> str:
    """A line a policy and operating point, over the seeds; the best accuracy of a point first. What
    was judged on fewer images than others says on how many.
    """
    most = max((_images(row) for row in rows), default=0)
    lines = [
        "| point | policy | seeds | accuracy | loss | GMACs, % of dense | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in sorted({row["point"] for row in rows}):
        groups: dict[str, list[Record]] = {}
        for row in rows:
            if row["point"] == point:
                groups.setdefault(row["policy"], []).append(row)
        ranked = sorted(groups.items(), key=lambda item: -_mean(item[1], "accuracy"))
        for policy, group in ranked:
            images = min(_images(row) for row in group)
            name = policy if images == most else f"{policy} ({images} images)"
            accuracy = [100 * row["accuracy"] for row in group]
            loss = [100 * (row["dense_accuracy"] - row["accuracy"]) for row in group]
            cost = [100 * row["gmacs"] / row["dense_gmacs"] for row in group]
            speeds = [row["speedup"] for row in group if row["speedup"] is not None]
            lines.append(
                f"| {100 * point:.0f}% | {name} | {len(group)} | {cell(accuracy)} | {cell(loss)} "
                f"| {np.mean(cost):.1f} | {cell(speeds, unit='x') if speeds else 'not timed'} |"
            )
    return "\n".join(lines)


def _images(row: Record) -> int:
    return sum(row["left"])


def _mean(rows: Sequence[Record], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))
