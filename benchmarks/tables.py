"""Writes the tables of figures in README.md and docs from the committed records:
``python -m benchmarks.tables``.

A table stands between the lines ``<!-- table: NAME -->`` and ``<!-- end -->``. With ``--check``
nothing is written, and the command fails if a table does not say what the records say.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from prunevit.benchmarks.machine import MIB
from prunevit.benchmarks.markdown import markdown_table, mean_and_deviation, mean_and_interval
from prunevit.benchmarks.marl import compare as marl
from prunevit.benchmarks.records import FILE, Record, read
from prunevit.trainers.common.checkpoint import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
INTERVAL = re.compile(r"\[(-?\d+\.\d+), (-?\d+\.\d+)\]")
TOLERANCE = 0.0201  # of an interval's ends, which depend on what a version of scipy draws

# methods and their titles
DIGITS = {
    "mappo": "**ours, one policy for every alpha**",
    "dynamic-vit": "DynamicViT, frozen backbone",
    "evit": "EViT, the rest fused",
    "tome": "ToMe",
    "attention": "class attention, top-k",
    "threshold": "class attention, threshold",
    "ats": "ATS",
    "random": "random, top-k",
    "norm": "norm, top-k",
}
ABLATIONS = {
    "mappo": "**ours** (`mappo`)",
    "mappo-fine-tuned": "ours, the backbone fine-tuned under the policy",
    "dynamic-vit-fine-tuned": "DynamicViT as published, fine-tuned",
    "mappo-each-price": "ours, trained for each operating point (`mappo-each-price`)",
    "no-attention-prior": "without the attention prior",
    "no-stage": "doesn't observe the stage",
    "one-stage": "prunes only at the first stage",
    "confidence": "paid for the true class's probability",
    "agreement": "paid for agreement with the dense model (`agreement`)",
    "ippo": "IPPO: a local critic as baseline (`ippo`)",
    "no-image-baseline": "a central critic as the only baseline (`no-image-baseline`)",
    "with-critic": "a central critic in addition (`with-critic`)",
    "no-team-reward": "survivors share a reward, one alpha (`no-team-reward`)",
    "paper": "the paper's way (`paper`)",
    "released": "RL4EViT's released code at its own rate (`released`)",
    "released-faster": "the same at a hundred times its rate (`released-faster`)",
    "evit-unfused": "no training: EViT unfused",
    "brightness": "brightness, top-k",
}
BENCHMARL = {
    f"benchmarl-{name}": f"BenchMARL's {name.upper()}"
    for name in ("mappo", "ippo", "qmix", "vdn", "isac", "masac", "iql")
}
CIFAR10 = {
    name: DIGITS[name]
    for name in ("mappo", "tome", "ats", "evit", "threshold", "attention", "dynamic-vit", "random")
} | {
    "released": "RL4EViT's released code at its own rate (`released`), not timed",
    "norm": DIGITS["norm"],
}
FINE_TUNING = {
    "mappo": "frozen backbone",
    "mappo-fine-tuned": "fine-tuned under the policy, once, at 60%",
}
VARIANTS = {
    "dense": "dense: timm's own model",
    "packed": "**packed: ours**, policy included",
    "masked": "masked: all tokens are computed",
    "padded": "padded to the longest of the batch",
    "tome": "ToMe, merging",
    "uniform": "one length for all images (EViT's way)",
    "unpruned": "ours with nothing pruned",
}
# the adapter in the records, and on how many images it is timed
ADAPTERS = {
    "Gymnasium": ("gymnasium vector, tensors", "256"),
    "Stable-Baselines3": ("sb3", "256"),
    "TorchRL, BenchMARL": ("torchrl", "256"),
    "RLlib": ("rllib", "256"),
    "EPyMARL": ("epymarl", "1"),
}
MARL = {
    "ours-mappo": "**our MAPPO**",
    "ours-ippo": "**our IPPO**",
    "benchmarl-mappo": "BenchMARL's MAPPO",
    "benchmarl-ippo": "BenchMARL's IPPO",
    "sb3-ppo": "SB3's PPO",
}


def load(name: str) -> Any:
    """A JSON file of the results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


# --- comparisons ---


def method_rows(
    title: str, rows: Sequence[Record], points: Sequence[float], with_speeds: bool
) -> list[list[str]]:
    """A method's row: test accuracy at each point and, where it was timed, the speed-up in the same
    cell, or in a row of its own if there are intervals. A cell with fewer seeds says how many.
    """
    groups = [[row for row in rows if row["point"] == point] for point in points]
    most = max(len(group) for group in groups)
    accuracies, speeds = [title], [""]
    for group in groups:
        cell = "not reached"
        if group:
            cell = mean_and_interval([100 * row["accuracy"] for row in group])
            cell += f", {len(group)} seeds" if len(group) < most else ""
        accuracies.append(cell)
        timed = [row["speedup"] for row in group if row["speedup"] is not None]
        speeds.append(mean_and_interval(timed, unit="x") if timed and with_speeds else "")
    if not any(speeds):
        return [accuracies]
    if most > 1:
        return [accuracies, speeds]
    both = zip(accuracies[1:], speeds[1:], strict=True)
    return [[title, *(f"{accuracy}, {speed}" for accuracy, speed in both)]]


def comparison(
    *parts: tuple[str, Mapping[str, str]], with_speeds: bool = False, seed: int | None = None
) -> str:
    """A row for each method, a column for each operating point.

    Args:
        parts: folders of the results, and methods with their titles.
        with_speeds: show how many times as fast as dense each is.
        seed: take this seed alone.
    """
    lines: list[list[str]] = []
    points: list[float] = []
    for folder, titles in parts:
        rows = read(RESULTS / folder / FILE)
        rows = [row for row in rows if seed is None or row["seed"] == seed]
        points = points or sorted({row["point"] for row in rows if row["method"] in titles})
        for method, title in titles.items():
            of_method = [row for row in rows if row["method"] == method]
            lines += method_rows(title, of_method, points, with_speeds)
    first, *others = (f"at {point:.0%}" for point in points)
    return markdown_table(["method", f"{first} of dense GMACs", *others], lines)


# --- runs, speeds, MARL ---


def reports(name: str) -> list[dict[str, dict[str, float]]]:
    """Policies of the reports ``digits/NAME-SEED.json``."""
    files = sorted((RESULTS / "digits").glob(f"{name}-*.json"))
    return [load(f"digits/{file.name}")["policies"] for file in files]


def run_row(title: str, runs: Sequence[dict[str, dict[str, float]]], policy: str) -> list[str]:
    """A policy's accuracy, GMACs and speed over the seeds."""
    own, dense = ([run[name] for run in runs] for name in (policy, "dense"))
    pairs = list(zip(own, dense, strict=True))
    accuracy = [100 * row["accuracy"] for row in own]
    costs = [100 * row["gmacs"] / base["gmacs"] for row, base in pairs]
    speeds = [row["images_per_second"] / base["images_per_second"] for row, base in pairs]
    if policy == "dense":
        return [title, f"{accuracy[0]:.2f}", "100%", "1.00x"]
    cost, speed = mean_and_deviation(costs, 1, "%"), mean_and_deviation(speeds, 2, "x")
    return [title, mean_and_deviation(accuracy), cost, speed]


def default_run() -> str:
    """The default run's policies."""
    titles = {
        "dense": "dense (timm's own model)",
        "learned": "**learned**",
        "attention": "class-attention top-k, at no less compute",
        "random": "random, at no less compute",
    }
    runs = reports("default")
    header = ["policy", "test accuracy", "GMACs, share of dense", "measured speed"]
    return markdown_table(header, [run_row(title, runs, name) for name, title in titles.items()])


def accuracy_rewards() -> str:
    """The learned policy of the default run, and of one that is paid for confidence."""
    titles = {
        "default": "default: no critic, paid for staying near the dense model's answer",
        "confidence": "paid for the true class's probability instead (`--accuracy confidence`)",
    }
    rows = [run_row(title, reports(name), "learned")[:3] for name, title in titles.items()]
    return markdown_table(["set-up", "test accuracy", "GMACs, share of dense"], rows)


def throughput() -> str:
    """Speed-ups of all variants."""
    records = {"DeiT-S": load("throughput/deit_small.json")}
    records["DeiT-B"] = load("throughput/deit_base.json")
    lines = []
    for variant, title in VARIANTS.items():
        own = {
            (model, row["batch_size"]): row
            for model, rows in records.items()
            for row in rows
            if row["variant"] == variant
        }
        gmacs = ", ".join(f"{own[model, 32]['gmacs']:.2f}" for model in records)
        lines.append([title, gmacs, *(f"{row['speedup']:.2f}x" for row in own.values())])
    columns = [f"{model}, batch {batch}" for model in records for batch in (1, 32)]
    return markdown_table(["variant", "GMACs", *columns], lines)


def iteration_cost() -> str:
    """What an iteration of MAPPO costs an episode, by tokens and episodes."""
    cells = {
        (row["tokens"], row["episodes"]): row
        for row in load("speed/train_speed_grid.json")
        if row["stages"] == 2
    }
    episodes = (32, 128, 512, 1_024)

    def cell(row: Record) -> str:
        each = 1e3 * row["seconds"] / row["episodes"]
        peak = row["peak_memory"] / MIB
        return f"{each:.1f} ms, {row['over_forward']:.2f}x, {peak:,.0f} MiB"

    lines = [
        [f"{tokens:,}", *(cell(cells[tokens, count]) for count in episodes)]
        for tokens in (64, 256, 1_024)
    ]
    titles = [f"{count:,} episodes" for count in episodes]
    return markdown_table(["tokens, 2 stages", *titles], lines)


def adapters() -> str:
    """Time of the adapters over the bare game."""
    files = {
        "digits, stages before blocks 1 and 3": "speed/env_speed.json",
        "digits, all seven stages": "speed/env_speed_all_stages.json",
        "DeiT-S": "speed/env_speed_deit_small.json",
    }
    records = [load(file)["adapters"] for file in files.values()]
    lines = [
        [title, *(f"{record[images][name]['over_bare_game']:.2f}x" for record in records)]
        for title, (name, images) in ADAPTERS.items()
    ]
    return markdown_table(["library", *files], lines)


def marl_trainers() -> str:
    """Returns and CPU seconds of the MARL trainers."""
    tasks = marl.grouped(read(RESULTS / "marl" / FILE, marl.FIELDS))
    lines = []
    for method, title in MARL.items():
        cells = [title]
        for task in tasks.values():
            group = task[method]
            cells += [
                mean_and_interval([row[kind][-1] for row in group])
                for kind in ("greedy", "sampled")
            ]
            cells.append(f"{sum(row['cpu_seconds'] for row in group) / len(group):.0f}")
        lines.append(cells)
    header = [column for task in tasks for column in (f"{task}, greedy", "sampled", "CPU s")]
    return markdown_table(["method", *header], lines)


TABLES: Mapping[str, Callable[[], str]] = {
    "default-run": default_run,
    "accuracy-rewards": accuracy_rewards,
    "digits": partial(comparison, ("digits/compare", DIGITS), with_speeds=True),
    "digits-ablations": partial(comparison, ("digits/compare", ABLATIONS)),
    "digits-benchmarl": partial(
        comparison,
        ("digits/compare", {"mappo": "**ours** (5 seeds)"}),
        ("digits/two-minutes", {"mappo": "ours, within two minutes (3 seeds)"}),
        ("digits/compare", BENCHMARL),
    ),
    "cifar10": partial(comparison, ("cifar10/compare", CIFAR10), with_speeds=True),
    "cifar10-fine-tuning": partial(comparison, ("cifar10/compare", FINE_TUNING), seed=0),
    "throughput": throughput,
    "iteration-cost": iteration_cost,
    "adapters": adapters,
    "marl": marl_trainers,
}


# --- pages ---


def same(found: str, wanted: str) -> bool:
    """Whether a table is as it should be, but for the last digits of its intervals."""
    if INTERVAL.sub("[]", found) != INTERVAL.sub("[]", wanted):
        return False
    pairs = zip(INTERVAL.finditer(found), INTERVAL.finditer(wanted), strict=True)
    return all(
        abs(float(mine) - float(theirs)) <= TOLERANCE
        for ours, other in pairs
        for mine, theirs in zip(ours.groups(), other.groups(), strict=True)
    )


def refresh(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> tuple[str, list[str]]:
    """A page with its tables written anew, and the names of those that were stale.

    Raises:
        ValueError: an unknown table, or one without an end.
    """
    stale: list[str] = []

    def write(match: re.Match[str]) -> str:
        start, name, found, end = match.groups()
        if name not in tables:
            raise ValueError(f"unknown table {name!r}: there are {', '.join(tables)}")
        wanted = tables[name]() + "\n"
        if same(found, wanted):
            return match[0]
        stale.append(name)
        return start + wanted + end

    if text.count("<!-- table: ") != len(TABLE.findall(text)):
        raise ValueError("a table has no <!-- end -->")
    return TABLE.sub(write, text), stale


def pages() -> list[Path]:
    """README.md and the pages of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass
class TablesConfig:
    """What is done."""

    check: bool = False
    """Write nothing, and fail if a table is stale."""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    prog = "python -m benchmarks.tables"
    config = tyro.cli(TablesConfig, description=__doc__, args=arguments, prog=prog)
    all_stale = []
    for page in pages():
        try:
            text, stale = refresh(page.read_text(encoding="utf-8"))
        except ValueError as error:
            sys.exit(f"error: {page.relative_to(ROOT)}: {error}")
        if stale and not config.check:
            write_text(page, text)
        all_stale += [f"{page.relative_to(ROOT)}: {name}" for name in stale]
    if config.check and all_stale:
        sys.exit("error: stale tables, run python -m benchmarks.tables: " + ", ".join(all_stale))
    print("\n".join(all_stale) or "all tables are as the records say")


if __name__ == "__main__":
    main()
