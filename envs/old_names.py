"""Maps names in files of versions before 0.2 to today's names, and tells defaults of that time that
files leave out. Nothing else knows them.

The project was called tokenprune then.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

# settings and record fields, and the observation field of that name
SETTINGS = {"budget": "alpha"}
# fields of records in benchmarks/results, beside those
RECORDS = {"game": "task", "policy": "method"}
# flags of benchmarks.compare and benchmarks.marl.compare
COMPARE_FLAGS = {
    "--game": "--task", "--games": "--tasks", "--policies": "--methods", "--entrants": "--methods",
}  # fmt: skip
# flags of the trainers
TRAINER_FLAGS = {"--budget": "--alpha"}
# last part of a parameter's name
PARAMETERS = {"budget_weight": "alpha_weight"}
# metadata of safetensors files: keys, and values of "format"
METADATA = {
    "tokenprune-backbone": "prunevit-backbone",
    "tokenprune-checkpoint-1": "prunevit-checkpoint-1",
    "tokenprune-checkpoint-2": "prunevit-checkpoint-2",
}
TEAM_ALPHA = 0.08  # of the team reward, where a run's settings name none


def rename_settings(values: Any) -> Any:
    """A run's or a model's settings, or a record, as read from JSON, under today's names. What is
    no object is returned as it is: its reader says what is wrong with it.
    """
    if not isinstance(values, dict):
        return values
    renamed = {SETTINGS.get(key, key): value for key, value in values.items()}
    if isinstance(renamed.get("observation"), list):
        renamed["observation"] = [SETTINGS.get(name, name) for name in renamed["observation"]]
    if isinstance(renamed.get("policy"), dict):
        renamed["policy"] = rename_settings(renamed["policy"])
    return renamed


def fill_in_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run begun before 0.2, with the alpha that its reward had then."""
    is_default = values.get("reward") == "team" and values.get("alpha_range") is None
    if is_default and "alpha" in values and values["alpha"] is None:
        return {**values, "alpha": TEAM_ALPHA}
    return dict(values)


def rename_record(values: Mapping[str, Any]) -> dict[str, Any]:
    """A benchmark's record as read from JSON, under today's names."""
    names = SETTINGS | RECORDS
    return {names.get(key, key): value for key, value in values.items()}


def rename_flags(arguments: Sequence[str], flags: Mapping[str, str]) -> list[str]:
    """A command line under today's flags, with a line of warning for each old one.

    Args:
        arguments: what follows the command.
        flags: old flag -> new flag.
    """
    renamed = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in flags:
            print(f"warning: {flag} is called {flags[flag]} now", file=sys.stderr)
            flag = flags[flag]
        renamed.append(flag + equals + value)
    return renamed


def rename_observation(arguments: Sequence[str]) -> list[str]:
    """A command line with old names behind ``--observation`` replaced; warns like
    ``rename_flags``.
    """
    renamed, flag = [], ""
    for argument in arguments:
        flag = argument if argument.startswith("--") else flag
        new = SETTINGS.get(argument, argument) if flag == "--observation" else argument
        if new != argument:
            print(f"warning: the observation {argument} is called {new} now", file=sys.stderr)
        renamed.append(new)
    return renamed


def rename_parameters(weights: Mapping[Any, Any]) -> dict[Any, Any]:
    """Renames the parameters of a state dict, nested ones included."""
    renamed = {}
    for name, weight in weights.items():
        if isinstance(name, str):
            *owner, last = name.split(".")
            name = ".".join([*owner, PARAMETERS.get(last, last)])
        renamed[name] = rename_parameters(weight) if isinstance(weight, dict) else weight
    return renamed


def rename_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Renames the metadata of a safetensors file."""
    renamed = {METADATA.get(key, key): text for key, text in metadata.items()}
    if "format" in renamed:
        renamed["format"] = METADATA.get(renamed["format"], renamed["format"])
    return renamed
