"""Several runs of ``trainers.mappo`` as one table: ``python -m benchmarks.summary runs/*``.

Runs whose settings differ in nothing but the seed stand in one row: mean and standard deviation
over the seeds of the learned policy and of what it is compared with.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ONE_RUNS_OWN = ("seed", "run_name", "resume", "device", "threads", "accumulate")


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder's name, settings and report."""

    name: str
    config: dict[str, Any]
    report: dict[str, Any]


def read_run(folder: Path) -> Finished:
    """Reads a run's settings and report.

    Raises:
        ValueError: the folder holds no finished run of the token game, or its files are damaged.
    """
    try:
        config, report = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("config.json", "report.json")
        )
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds no finished run: {error}") from error
    if "dense" not in report.get("policies", {}):
        raise ValueError(f"{folder} is no run of the token game")
    return Finished(folder.name, config, report)


def grouped(runs: Sequence[Finished]) -> list[list[Finished]]:
    """Runs that differ in their seed alone, in the order in which they were given."""
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in ONE_RUNS_OWN}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    return list(groups.values())


def figures(run: Finished) -> dict[str, float]:
    """What a row averages; accuracies and shares in percent."""
    policies = run.report["policies"]
    dense, learned = policies["dense"], policies["learned"]
    return {
        "loss": 100 * (dense["accuracy"] - learned["accuracy"]),
        "GMACs %": 100 * learned["gmacs"] / dense["gmacs"],
        "speed-up": learned["images_per_second"] / dense["images_per_second"],
        "over attention": 100 * (learned["accuracy"] - policies["attention"]["accuracy"]),
        "over random": 100 * (learned["accuracy"] - policies["random"]["accuracy"]),
        "seconds": run.report["seconds"],
    }


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def table(runs: Sequence[Finished]) -> str:
    """A row for each group of runs."""
    groups = grouped(runs)
    columns = list(figures(groups[0][0]))
    width = max(len(group[0].name) for group in groups) + 2
    lines = ["".join([f"{'run':<{width}}", "seeds", *(f"{c:>17}" for c in columns)])]
    for group in groups:
        measured = [figures(run) for run in group]
        cells = (f"{spread([row[column] for row in measured]):>17}" for column in columns)
        lines.append("".join([f"{group[0].name:<{width}}", f"{len(group):>5}", *cells]))
    return "\n".join(lines)


@dataclass
class SummaryConfig:
    """Which runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs."""


def main() -> None:
    """The command line."""
    config = tyro.cli(SummaryConfig, description=__doc__)
    if not config.runs:
        sys.exit("error: name at least one run folder, as runs/NAME")
    try:
        print(table([read_run(folder) for folder in config.runs]))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
