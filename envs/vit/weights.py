"""Files of backbone weights: safetensors that know how their model was built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models import load_state_dict
from torch import Tensor, nn

from prunevit.envs.old_names import rename_metadata
from prunevit.envs.vit.described import description_problem

DESCRIPTION = "prunevit-backbone"  # key of the weights file's metadata


class BackboneError(ValueError):
    """A backbone is unknown, can't be built or can't be loaded; the message says why."""


def write_weights(
    path: Path,
    weights: Mapping[str, Tensor],
    name: str,
    num_classes: int,
    model_kwargs: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes a state dict as safetensors, with what ``create_backbone`` needs to rebuild its model.

    Args:
        path: the file to write.
        weights: the model's state dict.
        name: name of the model, as for ``create_backbone``.
        num_classes: outputs of the head.
        model_kwargs: further arguments of ``create_backbone``, JSON values only.
        class_names: names of the head's outputs in order, if known.
    """
    description = {"backbone": name, "num_classes": num_classes, "model_kwargs": dict(model_kwargs)}
    if class_names is not None:
        description["class_names"] = list(class_names)
    # safetensors refuses tensors that share memory or are not contiguous
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in weights.items()}
    path.write_bytes(save(copies, {DESCRIPTION: json.dumps(description, sort_keys=True)}))


def read_description(path: Path, name: str) -> dict[str, Any]:
    """Reads what ``write_weights`` stored beside the weights; empty for files of other origin.

    Raises:
        BackboneError: the file is missing, damaged, of another backbone than ``name``, or asks for
            what no file may (see ``description_problem``).
    """
    if not path.is_file():
        raise BackboneError(f"no checkpoint {path}")
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads(rename_metadata(file.metadata() or {}).get(DESCRIPTION, "{}"))
        if not isinstance(described, dict):
            raise ValueError("its description is no JSON object")
    # JSON that is nested too deeply is a RecursionError
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"the checkpoint {path} is damaged: {error}") from error
    if described.get("backbone", name) != name:
        raise BackboneError(
            f"the checkpoint {path} holds the backbone {described['backbone']}, not {name}"
        )
    problem = description_problem(name, described.get("model_kwargs", {})) or description_problem(
        name, {"num_classes": described.get("num_classes")}
    )
    if problem is not None:
        raise BackboneError(f"the checkpoint {path} is refused: {problem}")
    return described


def load_weights(model: nn.Module, name: str, path: Path) -> None:
    """Loads the weights in ``path`` into ``model``, the backbone ``name``.

    Raises:
        BackboneError: the file is damaged, or its tensors don't fit the model.
    """
    try:
        weights = load_state_dict(str(path), weights_only=True)
        shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    # what PyTorch raises for files that are truncated, not its own, or not of plain tensors
    except (
        SafetensorError,
        UnpicklingError,
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"the checkpoint {path} is damaged, or not a file of plain tensors: {reason}"
        ) from error
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    differences = [
        f"{key} is {shapes[key]} in the file and {own[key]} in the model"
        for key in own.keys() & shapes.keys()
        if own[key] != shapes[key]
    ]
    differences += [f"{key} is missing in the file" for key in own.keys() - shapes.keys()]
    differences += [f"{key} is unknown to the model" for key in shapes.keys() - own.keys()]
    if differences:
        more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
        raise BackboneError(
            f"the checkpoint {path} doesn't fit {name}: {'; '.join(sorted(differences)[:3])}{more}"
        )
    model.load_state_dict(weights)


def sha256(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
