"""Summarises runs of ``trainers.mappo`` in a table: ``python -m benchmarks.summary runs/*``.

Runs whose settings differ only in the seed share a row: mean and standard deviation over the seeds
of the learned policy, and of its lead over the others in the runs' reports.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from prunevit.benchmarks.markdown import markdown_table, mean_and_deviation

ONE_RUNS_OWN = ("seed", "run_name", "resume", "device", "threads", "accumulate")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its folder's name, settings and report."""

    name: str
    config: dict[str, Any]
    report: dict[str, Any]


def read_run(folder: Path) -> FinishedRun:
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
    return FinishedRun(folder.name, config, report)


def group_by_settings(runs: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """Groups of runs that differ only in the seed, in the order in which they were given."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in ONE_RUNS_OWN}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    return list(groups.values())


def columns_of(report: dict[str, Any]) -> dict[str, float]:
    """The figures of a report; accuracies and shares in percent."""
    policies = report["policies"]
    dense, learned = policies["dense"], policies["learned"]
    return {
        "loss": 100 * (dense["accuracy"] - learned["accuracy"]),
        "GMACs, % of dense": 100 * learned["gmacs"] / dense["gmacs"],
        "speed-up": learned["images_per_second"] / dense["images_per_second"],
        "over attention": 100 * (learned["accuracy"] - policies["attention"]["accuracy"]),
        "over random": 100 * (learned["accuracy"] - policies["random"]["accuracy"]),
        "seconds": report["seconds"],
    }


def table(runs: Sequence[FinishedRun]) -> str:
    """A row for each group of runs."""
    groups = group_by_settings(runs)
    columns = list(columns_of(groups[0][0].report))
    rows = []
    for group in groups:
        figures = [columns_of(run.report) for run in group]
        cells = [mean_and_deviation([row[column] for row in figures]) for column in columns]
        rows.append([group[0].name, str(len(group)), *cells])
    return markdown_table(["run", "seeds", *columns], rows)


@dataclass
class SummaryConfig:
    """Which runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs."""


def main() -> None:
    """The command line."""
    config = tyro.cli(SummaryConfig, description=__doc__, prog="python -m benchmarks.summary")
    if not config.runs:
        sys.exit("error: name at least one run folder, as runs/NAME")
    try:
        print(table([read_run(folder) for folder in config.runs]))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
