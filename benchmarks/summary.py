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
from prunevit.cli import prog

ONE_RUNS_OWN = {"seed", "run_name", "resume", "device", "threads", "accumulate"}


def read_run(folder: Path) -> dict[str, Any]:
    """A run's name, its settings and the figures of its report; accuracies and shares in percent.

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
    policies = report.get("policies", {})
    if "dense" not in policies:
        raise ValueError(f"{folder} is no run of the token game")
    dense, learned = policies["dense"], policies["learned"]
    settings = {key: value for key, value in config.items() if key not in ONE_RUNS_OWN}
    return {
        "run": folder.name,
        "settings": json.dumps(settings, sort_keys=True),
        "loss": 100 * (dense["accuracy"] - learned["accuracy"]),
        "GMACs, % of dense": 100 * learned["gmacs"] / dense["gmacs"],
        "speed-up": learned["images_per_second"] / dense["images_per_second"],
        "over attention": 100 * (learned["accuracy"] - policies["attention"]["accuracy"]),
        "over random": 100 * (learned["accuracy"] - policies["random"]["accuracy"]),
        "seconds": report["seconds"],
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A row for each group of runs with the same settings."""
    figures = list(runs[0])[2:]
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["settings"], []).append(run)
    rows = []
    for group in groups.values():
        cells = [mean_and_deviation([run[figure] for run in group]) for figure in figures]
        rows.append([group[0]["run"], str(len(group)), *cells])
    return markdown_table(["run", "seeds", *figures], rows)


@dataclass
class SummaryConfig:
    """Which runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs."""


def main() -> None:
    """The command line."""
    config = tyro.cli(SummaryConfig, description=__doc__, prog=prog())
    if not config.runs:
        sys.exit("error: name at least one run folder, as runs/NAME")
    try:
        print(table([read_run(folder) for folder in config.runs]))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
