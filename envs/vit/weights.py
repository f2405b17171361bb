"""Files of backbone weights: safetensors that know how their model was built."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
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


def load_weights(model: nn.Module, name: str, path: Path, new_head: bool = False) -> None:
    """Loads the weights in ``path`` into ``model``, the backbone ``name``.

    Weights that timm's model doesn't have in this form go through timm's own filter for it, which
    knows the authors' names and resamples position embeddings to the model's image size.

    Args:
        model: the model.
        name: its name, for messages.
        path: safetensors, or a PyTorch file of plain tensors.
        new_head: keep the head that the model was built with, with a warning, if the file has none
            or one of another size.

    Raises:
        BackboneError: the file is damaged, or its tensors don't fit the model.
    """
    weights = _read_tensors(path)
    own = model.state_dict()
    wanted = _shapes(own)
    if _shapes(weights) != wanted:
        weights = _filtered(model, weights, path)
    found = _shapes(weights)
    begun_anew = [key for key in _head_keys(model) if found.get(key) != wanted.get(key)]
    has_head = model.num_classes != 0
    if new_head or not has_head:
        weights = {key: tensor for key, tensor in weights.items() if key not in begun_anew}
        weights |= {key: own[key] for key in begun_anew if key in own}
    differences = _differences(weights, own)
    if differences:
        more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
        hint = ""
        if len(differences) == len(begun_anew):
            hint = "; python -m trainers.backbone trains a head, and starts from such a file"
        raise BackboneError(
            f"the checkpoint {path} doesn't fit {name}: {'; '.join(differences[:3])}{more}{hint}"
        )
    model.load_state_dict(weights)
    if begun_anew and new_head and has_head:
        warnings.warn(
            f"{path} has no head for {model.num_classes} classes: {name} begins with a random one",
            stacklevel=3,
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        weights = load_state_dict(str(path), weights_only=True)
        if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise ValueError("it holds other things than tensors")
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
    return dict(weights)


def _filtered(model: nn.Module, weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """``weights`` under the names and in the shapes of ``model``, as far as timm can tell."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return weights
    try:
        return dict(adapt(weights, model))
    # filters of many models, which expect what their authors wrote
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BackboneError(f"timm can't adapt the checkpoint {path}: {reason}") from error


def _head_keys(model: nn.Module) -> list[str]:
    """Names of the weights of a timm model's classifiers, whether it has them or not."""
    heads = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    return [f"{head}.{part}" for head in heads for part in ("weight", "bias")]


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in weights.items()}


def _differences(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``weights`` from being those of a model that has ``own``, sorted."""
    found, wanted = _shapes(weights), _shapes(own)
    differences = [
        f"{key} is {found[key]} in the file and {wanted[key]} in the model"
        for key in wanted.keys() & found.keys()
        if wanted[key] != found[key]
    ]
    differences += [f"{key} is missing in the file" for key in wanted.keys() - found.keys()]
    differences += [f"{key} is unknown to the model" for key in found.keys() - wanted.keys()]
    return sorted(differences)


def sha256(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
