"""The command ``prunevit``: each subcommand runs a module as ``python -m`` does."""

from __future__ import annotations

import difflib
import runpy
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

from prunevit.versions import __version__


class Command(NamedTuple):
    """What a subcommand runs.

    Attributes:
        module: the module, which takes the rest of the arguments.
        summary: what it does, in one line.
    """

    module: str
    summary: str


TYPED = "__typed__"  # what ``main`` tells a subcommand's module, among its globals
COMMANDS = {
    "train": Command("prunevit.trainers.mappo", "train a pruning policy with MAPPO"),
    "sb3": Command("prunevit.trainers.sb3", "train a policy with Stable-Baselines3"),
    "rllib": Command("prunevit.trainers.rllib", "train a policy with RLlib"),
    "benchmarl": Command("prunevit.trainers.benchmarl", "train a policy with BenchMARL"),
    "backbone": Command("prunevit.trainers.backbone", "train a ViT to classify images"),
    "finetune": Command("prunevit.trainers.finetune", "fine-tune a ViT under a learned policy"),
    "dynamic-vit": Command("prunevit.trainers.dynamic_vit", "train DynamicViT's predictors"),
    "straight-through": Command(
        "prunevit.trainers.straight_through", "teach a policy by gradients through the ViT"
    ),
    "embed": Command("prunevit.agents.embed", "embed photographs with a pruned ViT"),
    "viewer": Command(
        "prunevit.agents.viewer.page", "look at what a pruned ViT drops, in a browser"
    ),
    "picture": Command("prunevit.agents.viewer.picture", "draw what a pruned ViT drops"),
    "export": Command("prunevit.agents.export", "export a pruned ViT to ONNX"),
    "compare": Command("prunevit.benchmarks.compare", "compare ways to choose tokens"),
    "figures": Command("prunevit.benchmarks.figures", "draw what a comparison measured"),
    "summary": Command("prunevit.benchmarks.summary", "tabulate finished runs"),
    "throughput": Command("prunevit.benchmarks.speed.throughput", "time pruned models"),
    "runtimes": Command("prunevit.benchmarks.speed.runtimes", "time a model in other runtimes"),
    "env-speed": Command("prunevit.benchmarks.speed.env_speed", "time the environment"),
    "train-speed": Command("prunevit.benchmarks.speed.train_speed", "time the trainer"),
    "marl": Command("prunevit.benchmarks.marl.compare", "compare MARL trainers"),
}


def prog() -> str:
    """What was typed to begin this process's command, without its arguments: ``prunevit train`` or
    ``python -m trainers.mappo``.
    """
    begun = sys.modules["__main__"]
    if TYPED in vars(begun):
        return vars(begun)[TYPED]
    spec = begun.__spec__
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name}"


def usage() -> str:
    """The help text."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: prunevit [--help] [--version] COMMAND [ARGUMENTS]",
            "",
            "Token pruning in Vision Transformers, learned by multi-agent reinforcement learning.",
            "",
            "commands:",
            *lines,
            "",
            "'prunevit COMMAND --help' lists a command's options.",
        ]
    )


def _fail(message: str) -> NoReturn:
    print(f"prunevit: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(arguments: list[str] | None = None) -> None:
    """Runs a subcommand with the rest of the arguments.

    PyTorch is imported by the subcommand alone, so ``--help`` and ``--version`` are fast.

    Raises:
        SystemExit: with the subcommand's exit code; 2 where no subcommand has that name.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"prunevit {__version__}")
    elif not name:
        _fail("name a command, or see prunevit --help")
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS)
        advice = f"did you mean {' or '.join(near)}?" if near else "see prunevit --help"
        _fail(f"unknown command {name!r}: {advice}")
    else:
        sys.argv[1:] = rest
        typed = {TYPED: f"prunevit {name}"}
        runpy.run_module(COMMANDS[name].module, typed, run_name="__main__", alter_sys=True)
