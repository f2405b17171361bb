"""What a file may say about the backbone to build.

Files come from strangers. So they name one of timm's own models, and give it plain values for what
its class takes: no hub, no path, no download and no callable.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

# the part of timm's data configuration by which images and labels are prepared
DATA_KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")
CFG = "pretrained_cfg"  # timm's attribute that has them
OVERLAY = f"{CFG}_overlay"  # timm's argument that sets them
NORM_EPS = "norm_eps"  # an argument of create_backbone
# arguments of modules that decide where a model lies
PLACEMENT = {"self", "device", "dtype"}
MOST_BLOCKS = 200
LARGEST_NUMBER = 1_000_000
# numbers that a model may compute instead of reading them: tables of rotary embeddings
MOST_COMPUTED = 1 << 26


def description_problem(name: object, kwargs: object) -> str | None:
    """Why a file may not have a backbone built from this name and these arguments; None if it may.

    ``embed_layer`` is a name in ``STEMS``, which ``create_backbone`` checks.
    """
    if not isinstance(name, str):
        return f"its backbone is {name!r}, no name"
    if ":" in name:
        return (
            f"a file can't choose the backbone {name}, only timm's own models: it may be on a hub"
        )
    if not isinstance(kwargs, Mapping):
        return f"its model_kwargs are {kwargs!r}, no JSON object"
    surplus = sorted(map(str, kwargs.keys() - _arguments(name) - {OVERLAY, NORM_EPS}))
    if surplus:
        return f"a file can't set {', '.join(surplus)} of {name}: its class takes no such values"
    problems = (_value_problem(key, value) for key, value in kwargs.items() if key != OVERLAY)
    return next(filter(None, problems), data_config_problem(kwargs.get(OVERLAY) or {}))


def data_config_problem(config: object) -> str | None:
    """Why a file may not have images prepared by ``config``; None if it may."""
    if not isinstance(config, Mapping):
        return f"its {CFG} is {config!r}, no JSON object"
    surplus = sorted(config.keys() - {*DATA_KEYS})
    if surplus:
        return f"a file can't set {', '.join(surplus)} of {CFG}, only {', '.join(DATA_KEYS)}"
    return next(filter(None, map(_value_problem, config, config.values())), None)


def size_problem(make: Callable[[], object], file: Path) -> str | None:
    """Why the module that ``make`` makes can't have its weights from ``file``, which would be too
    small; None if it can. It is made without memory, so that it can't take all there is.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = make()
    if not isinstance(module, nn.Module):
        return None
    numbers = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
    size = file.stat().st_size
    # a number takes a byte or more
    if numbers <= size + MOST_COMPUTED:
        return None
    return f"{file} can't hold the weights of its model: {numbers:,} numbers in {size:,} bytes"


def _arguments(name: str) -> set[str]:
    """Names of arguments that modules of the model's source file take."""
    architecture = name.partition(".")[0]
    classes: list[Any] = [VisionTransformer]
    # of an unknown name nothing is built
    if timm.is_model(architecture):
        source = sys.modules[timm.model_entrypoint(architecture).__module__]
        classes = [value for value in vars(source).values() if isinstance(value, type)]
    modules = [kind for kind in classes if issubclass(kind, nn.Module)]
    return {key for kind in modules for key in inspect.signature(kind).parameters} - PLACEMENT


def _value_problem(key: str, value: object) -> str | None:
    values = list(value) if isinstance(value, list | tuple) else [value]
    for each in values:
        if not isinstance(each, bool | int | float | str | None):
            return f"a file can't set {key} to {value!r}: values are numbers, texts and lists"
        largest = MOST_BLOCKS if key == "depth" else LARGEST_NUMBER
        if isinstance(each, int | float) and not abs(each) <= largest:
            return f"{key}={each!r} is more than a model of a file may have: {largest:,} at most"
    return None
