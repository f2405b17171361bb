"""Writes the tables of figures in README.md, docs and cards of policies from the committed records:
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

from prunevit.agents.policy_file import describe_policy_file
from prunevit.agents.policy_library import find_policy
from prunevit.benchmarks.compare import one_image_table, table, title_of
from prunevit.benchmarks.differences import (
    DENSE,
    OURS,
    cell,
    check_one_origin,
    difference,
    differences,
    is_matched,
    summary,
)
from prunevit.benchmarks.machine import MIB
from prunevit.benchmarks.markdown import (
    markdown_table,
    mean_and_deviation,
    mean_and_interval,
    records_table,
)
from prunevit.benchmarks.marl import compare as marl
from prunevit.benchmarks.records import FILE, Record, read
from prunevit.cli import prog
from prunevit.extras import needs
from prunevit.trainers.common.checkpoint import write_text

with needs("benchmarks"):
    import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

DIGITS = (
    "mappo", "dynamic-vit", "ltmp", "ats", "evit", "pitome", "tome", "diffrate", "attention",
    "zero-tprune", "threshold", "random", "norm",
)  # fmt: skip
NARROW = ("mappo", "dynamic-vit", "dynamic-vit-narrow")
LOW = (0.2, 0.25, 0.3)
PARTS = (
    "mappo", "rloo", "no-image-baseline", "ippo", "no-attention-prior", "no-stage",
    "no-class-token", "one-stage", "larger-actor", "straight-through", "warm-start", "agreement",
    "confidence", "paper", "released-threshold", "released",
)  # fmt: skip
BENCHMARL = tuple(f"benchmarl-{name}" for name in ("mappo", "ippo", "qmix", "vdn"))
IDEAS = (
    "mappo", "longer", "three-stages", "actor-attention", "two-rounds", "budget-head", "redundancy",
    "merge", "between-blocks",
)  # fmt: skip
# ideas that were tried and taken out again; the commit of their records has them
TAKEN_OUT = {
    "two-rounds": "decides twice at each stage",
    "budget-head": "a head of its own for an image's budget",
}
FINE_TUNING = (
    "mappo", "mappo-fine-tuned", "dynamic-vit-fine-tuned", "evit-fine-tuned",
    "attention-fine-tuned",
)  # fmt: skip
CIFAR10 = (
    "mappo", "pitome", "tome", "dynamic-vit", "dynamic-vit-merge", "ats", "evit",
    "attention-merge", "attention", "threshold-merge", "threshold", "zero-tprune", "random", "norm",
)  # fmt: skip
# the points that the README shows, by folder, and rivals beside ours
HEADLINE = {
    "digits/compare": ("digits in clutter, 64 px", (0.25, 0.3, 0.4)),
    "cifar10/compare": ("CIFAR-10, 32 px", (0.4, 0.5, 0.6)),
}
KNOWN = {
    OURS: "ours", "ltmp": "LTMP", "dynamic-vit": "DynamicViT", "ats": "ATS", "pitome": "PiToMe",
    "tome": "ToMe", "evit": "EViT",
}  # fmt: skip
VARIANTS = {
    "dense": "dense: timm's own model",
    "packed": "**packed: ours**, policy included",
    "masked": "masked: all tokens are computed",
    "padded": "padded to the longest of the batch",
    "tome": "ToMe, merging",
    "uniform": "one length for all images (EViT's way)",
    "unpruned": "ours with nothing pruned",
}
RUNTIMES = {
    "pytorch": "PyTorch",
    "compile": "`torch.compile`",
    "onnxruntime": "ONNX Runtime",
    "int8": "ONNX Runtime, int8",
    "openvino": "OpenVINO",
}
UNMEASURED = "Nothing has been measured yet."
# the adapter in the records, and on how many images it is timed
ADAPTERS = {
    "Gymnasium": ("gymnasium vector, tensors", "256"),
    "Stable-Baselines3": ("sb3", "256"),
    "TorchRL, BenchMARL": ("torchrl", "256"),
    "RLlib": ("rllib", "256"),
    "EPyMARL": ("epymarl", "1"),
}


def load(name: str) -> Any:
    """A JSON file of the results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def records_of(folder: str, seed: int | None = None, points: Sequence[float] = ()) -> pd.DataFrame:
    """The committed records in a folder of the results, of one seed, or at the dense model's and
    these points alone, if they are given.

    Raises:
        ValueError: they come from several commits or machines.
    """
    data = pd.DataFrame(read(RESULTS / folder / FILE))
    data = data if seed is None else data[data["seed"] == seed]
    data = data[data["point"].isin((*points, 1.0))] if points else data
    check_one_origin(data)
    return data


def titled(data: pd.DataFrame, names: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Titles and records of these methods; ours stands out."""
    methods = []
    for name in names:
        rows = data[data["method"] == name]
        title = f"{TAKEN_OUT.get(name) or title_of(name, rows)} (`{name}`)"
        methods.append((f"**{title}**" if name == OURS else title, rows))
    return methods


def comparison(
    folder: str,
    names: Sequence[str],
    with_speeds: bool = False,
    points: Sequence[float] = (),
) -> str:
    """The table of ``benchmarks.compare`` of committed records.

    Args:
        folder: a folder of the results.
        names: methods.
        with_speeds: show how many times as fast as dense each is.
        points: take these operating points alone.
    """
    return table(titled(records_of(folder, points=points), names), with_speeds)


def paired(folder: str, names: Sequence[str], points: Sequence[float] = ()) -> str:
    """Losses against dense, and differences to ours, of committed records."""
    data = records_of(folder, points=points)
    return differences(titled(data, names), data)


def headline() -> str:
    """What ours and well-known rivals lose against dense at a few operating points, and how many
    times as fast as timm's dense model they are.
    """
    lines = []
    for folder, (images, points) in HEADLINE.items():
        data = records_of(folder, points=points)
        dense = data[data["method"] == DENSE]
        for point in points:
            cells = []
            for name in KNOWN:
                judged = data[(data["method"] == name) & (data["point"] == point)]
                rows = judged[is_matched(judged)]
                lost = cell(difference(dense, rows, data))
                why_not = "not judged" if judged.empty else "not reached"
                cells.append(f"{lost}, {rows['speedup'].mean():.2f}x" if lost else why_not)
            lines.append([images, f"{point:.0%}", *cells])
    return markdown_table(["images", "compute", *KNOWN.values()], lines)


def one_image(folder: str, names: Sequence[str]) -> str:
    """Speed-ups image by image of committed records."""
    return one_image_table(titled(records_of(folder), names))


def curves(folder: str, names: Sequence[str]) -> str:
    """Mean loss, agreement and divergence of committed records."""
    return summary(titled(records_of(folder), names))


def default_run() -> str:
    """The policies of default runs, from their reports ``digits/default-SEED.json``."""
    titles = {
        "dense": "dense (timm's own model)",
        "learned": "**learned**",
        "attention": "class-attention top-k, at no less compute",
        "random": "random, at no less compute",
    }
    runs = [load(str(file))["policies"] for file in sorted(RESULTS.glob("digits/default-*.json"))]
    lines = []
    for name, title in titles.items():
        accuracy = [100 * run[name]["accuracy"] for run in runs]
        compute = [100 * run[name]["gmacs"] / run["dense"]["gmacs"] for run in runs]
        lines.append([title, mean_and_deviation(accuracy), mean_and_deviation(compute, 1, "%")])
    return markdown_table(["policy", "test accuracy", "GMACs, share of dense"], lines)


def pettingzoo_defaults() -> str:
    """Returns of our defaults for PettingZoo games, and with one thing changed."""
    titles = {
        "default": "our default: the authors' networks, 16 games of 128 steps",
        "authors-sampling": "128 games of 25 steps (`--num-envs 128 --rollout-steps 25`)",
        "gelu": "GELU in place of ReLU and LayerNorm (`--hidden-layers gelu`)",
    }
    data = pd.DataFrame(read(RESULTS / "marl" / "defaults.jsonl", {"setup", "task", "greedy"}))
    tasks = list(data["task"].unique())
    lines = []
    for setup, title in titles.items():
        rows = data[data["setup"] == setup]
        cells = []
        for task in tasks:
            returns = rows[rows["task"] == task]["greedy"].tolist()
            cells.append(f"{mean_and_interval(returns)}, worst {min(returns):.1f}")
        lines.append([title, *cells])
    return markdown_table(["set-up", *tasks], lines)


def throughput() -> str:
    """Speed-ups of all variants."""
    files = {"DeiT-S": "throughput/deit_small.json", "DeiT-B": "throughput/deit_base.json"}
    rows = {
        (model, row["batch_size"], row["variant"]): row
        for model, file in files.items()
        for row in load(file)
    }
    speeds = {"speedup": "", "speedup_same_kernels": ", over ours unpruned"}
    columns = [
        (model, batch, field)
        for model in files
        for batch in (1, 32)
        for field in speeds
        if field in rows[model, batch, "packed"]
    ]
    lines = [
        [title, ", ".join(f"{rows[model, 32, variant]['gmacs']:.2f}" for model in files)]
        + [f"{rows[model, batch, variant][field]:.2f}x" for model, batch, field in columns]
        for variant, title in VARIANTS.items()
    ]
    header = [f"{model}, batch {batch}{speeds[field]}" for model, batch, field in columns]
    return markdown_table(["variant", "GMACs", *header], lines)


def runtimes() -> str:
    """Speed-ups of runtimes, dense and pruned: a table for each file in the folder ``runtimes``."""
    files = sorted(RESULTS.glob("runtimes/*.json"))
    return "\n\n".join(runtimes_table(load(str(file))) for file in files) or UNMEASURED


def runtimes_table(records: Sequence[Record]) -> str:
    """A file of ``benchmarks.speed.runtimes`` under a line that says what was measured."""
    settings = {(row["batch_size"], row["threads"]): None for row in records}
    rows = {(row["variant"], row["batch_size"], row["threads"]): row for row in records}
    kinds = {row["variant"]: row for row in records}
    dense, pruned = (
        next(row for row in kinds.values() if row["variant"].endswith(kind))
        for kind in (" dense", " pruned")
    )
    share = pruned["gmacs"] / dense["gmacs"]
    title = (
        f"{dense['model']}, pruned to {share:.0%} of the GMACs, which promise {1 / share:.2f}x. "
        f"On {dense['hardware']}:"
    )

    def speed_of(variant: str, batch: int, threads: int) -> str:
        row = rows[variant, batch, threads]
        if row is rows[dense["variant"], batch, threads]:
            return f"{row['images_per_second']:.1f} images/s"
        own = "" if variant.endswith(" dense") else f" ({row['speedup_own']:.2f}x)"
        return f"{row['speedup']:.2f}x{own}"

    header = [f"batch {size}, {count} thread{'s' * (count > 1)}" for size, count in settings]
    lines = []
    for variant, row in kinds.items():
        runtime, kind = variant.split()
        judged = [f"{row['accuracy']:.2%}"] if "accuracy" in row else []
        speeds = (speed_of(variant, *each) for each in settings)
        lines.append([f"{RUNTIMES[runtime]}, {kind}", *judged, *speeds])
    accuracy = ["accuracy"] if "accuracy" in dense else []
    return f"{title}\n\n{markdown_table(['runtime', *accuracy, *header], lines)}"


def gpus() -> str:
    """Speed-ups on GPUs: a table for each file of ``benchmarks.speed.gpu_check`` in the folder
    ``gpu``.
    """
    files = sorted(RESULTS.glob("gpu/*.json"))
    return "\n\n".join(gpu_table(load(str(file))) for file in files) or UNMEASURED


def gpu_table(report: Mapping[str, Any]) -> str:
    """What ``benchmarks.speed.gpu_check`` timed, under a line that says where."""
    machine = report["machine"]
    header = ["model", "dense", "compiled", "packed, policy included", "padded", "ToMe"]
    lines = []
    for name, step in report.items():
        if "variants" not in step.get("result", {}):
            continue
        timed = step["result"]["variants"]
        packed = timed["packed"]
        lines.append([
            name,
            f"{timed['dense']['images_per_second']:,.0f} images/s",
            f"{timed['dense, compiled']['speedup']:.2f}x",
            f"{packed['speedup']:.2f}x (efficiency {packed['efficiency']:.2f})",
            *(f"{timed[variant]['speedup']:.2f}x" for variant in ("padded", "tome")),
        ])  # fmt: skip
    title = f"On {machine['hardware']}, torch {machine['versions']['torch']}:"
    return f"{title}\n\n{markdown_table(header, lines)}"


def serving() -> str:
    """What clients of ``examples/serve.py`` waited for, by model: the file ``serving.json``."""
    if not (RESULTS / "serving.json").is_file():
        return UNMEASURED
    records = load("serving.json")
    columns = {
        "model": ("model", 1, ""),
        "clients": ("clients", 1, ""),
        "answered": ("answered", 1, ""),
        "images/s": ("images_per_second", 1, ".1f"),
        "p50, ms": ("p50", 1e-3, ".0f"),
        "p95, ms": ("p95", 1e-3, ".0f"),
    }
    return records_table(records, columns)


def iteration_cost() -> str:
    """What an iteration of MAPPO costs an episode, by tokens and episodes."""
    cells = {
        (row["tokens"], row["episodes"]): f"{1e3 * row['seconds'] / row['episodes']:.1f} ms, "
        f"{row['over_forward']:.2f}x, {row['peak_memory'] / MIB:,.0f} MiB"
        for row in load("speed/train_speed_grid.json")
        if row["stages"] == 2
    }
    episodes = (32, 128, 512, 1_024)
    lines = [
        [f"{tokens:,}", *(cells[tokens, count] for count in episodes)]
        for tokens in (64, 256, 1_024)
    ]
    return markdown_table(["tokens, 2 stages", *(f"{n:,} episodes" for n in episodes)], lines)


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


def policy_compute(name: str) -> str:
    """What share of the dense compute a policy of the package takes, as it was calibrated."""
    known = describe_policy_file(find_policy(name))["policy"]["calibration"]
    lines = [
        [f"{share:.1%}", f"{value:.2g}"]
        for share, value in zip(known["compute"], known["values"], strict=True)
    ]
    return markdown_table(["share of the dense compute", known["knob"]], lines)


def policy_figures(name: str, folder: str, seed: int) -> str:
    """Accuracy and speed of a policy of the package, in records of its run."""
    described = describe_policy_file(find_policy(name))
    data = records_of(folder, seed)
    mine = data[(data["method"] == OURS) & data["matched"].eq(True)].sort_values("gmacs")
    for settings in mine["settings"]:
        if any(settings.get(name) != described[name] for name in ("prune_before", "prune_at")):
            raise ValueError(f"{folder} has records of other stages than the policy {name}")
    lines = [
        [
            f"{row['gmacs'] / row['dense_gmacs']:.1%}",
            f"{row['accuracy']:.2%}",
            f"{row['dense_accuracy']:.2%}",
            f"{row['agreement']:.2%}",
            f"{row['speedup']:.2f}x",
        ]
        for row in mine.to_dict("records")
    ]
    header = [
        "compute",
        "accuracy",
        "dense model",
        "same answer",
        "speed-up over timm's dense model",
    ]
    return markdown_table(header, lines)


TABLES: Mapping[str, Callable[[], str]] = {
    "headline": headline,
    "default-run": default_run,
    "digits": partial(comparison, "digits/compare", DIGITS, with_speeds=True),
    "digits-differences": partial(paired, "digits/compare", DIGITS),
    "digits-one-image": partial(one_image, "digits/compare", DIGITS),
    "digits-narrow": partial(comparison, "digits/compare", NARROW, points=LOW, with_speeds=True),
    "digits-narrow-differences": partial(paired, "digits/compare", NARROW, LOW),
    "digits-curves": partial(curves, "digits/compare", DIGITS),
    "policy-digits": partial(policy_figures, "digits", "digits/compare", seed=0),
    "policy-digits-compute": partial(policy_compute, "digits"),
    "digits-ideas": partial(comparison, "digits/parts", IDEAS),
    "digits-ideas-differences": partial(paired, "digits/parts", IDEAS),
    "digits-parts": partial(comparison, "digits/parts", PARTS),
    "digits-parts-differences": partial(paired, "digits/parts", PARTS),
    "digits-benchmarl": partial(comparison, "digits/parts", (OURS, *BENCHMARL)),
    "digits-benchmarl-differences": partial(paired, "digits/parts", (OURS, *BENCHMARL)),
    "digits-fine-tuning": partial(comparison, "digits/fine-tuning", FINE_TUNING),
    "digits-fine-tuning-differences": partial(paired, "digits/fine-tuning", FINE_TUNING),
    "cifar10": partial(comparison, "cifar10/compare", CIFAR10, with_speeds=True),
    "cifar10-differences": partial(paired, "cifar10/compare", CIFAR10),
    "cifar10-one-image": partial(one_image, "cifar10/compare", CIFAR10),
    "cifar10-curves": partial(curves, "cifar10/compare", CIFAR10),
    "cifar10-merging": partial(comparison, "cifar10/ideas", [OURS, "drop"]),
    "throughput": throughput,
    "runtimes": runtimes,
    "serving": serving,
    "gpus": gpus,
    "iteration-cost": iteration_cost,
    "adapters": adapters,
    "pettingzoo-defaults": pettingzoo_defaults,
    "marl": lambda: marl.table(read(RESULTS / "marl" / FILE, marl.FIELDS)),
}


# --- pages ---


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
        if found == wanted:
            return match[0]
        stale.append(name)
        return start + wanted + end

    if text.count("<!-- table: ") != len(TABLE.findall(text)):
        raise ValueError("a table has no <!-- end -->")
    return TABLE.sub(write, text), stale


def pages() -> list[Path]:
    """README.md, the pages of docs, and the cards of policies."""
    cards = sorted((ROOT / "agents" / "assets").glob("*.md"))
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *cards]


@dataclass
class TablesConfig:
    """What is done."""

    check: bool = False
    """Write nothing, and fail if a table is stale."""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(TablesConfig, description=__doc__, args=arguments, prog=prog())
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
