"""Checkpoints without pickle: tensors as safetensors, the rest as JSON, written atomically.

A checkpoint is a tree of dicts and lists whose leaves are tensors or JSON values. It is one
safetensors file; the tree's skeleton stands in the file's metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "tokenprune-checkpoint-1"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of another run, model or version."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a path beside ``path``, then moves it there: readers see all or nothing.

    A file that a killed process left half-written is overwritten by the next write to ``path``.

    Raises:
        OSError: the disk is full or not writable; the previous file at ``path`` is left as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically; raises what ``write_atomically`` raises."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically; raises what ``write_atomically`` raises."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _split(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        # safetensors refuses tensors that share memory, and those that are not contiguous
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"$tensor": name}
    if isinstance(tree, Mapping):
        # JSON turns integer keys (optimizer state) into strings: keep the pairs
        return {"$dict": [[key, _split(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return [_split(value, tensors) for value in tree]
    return tree


def _join(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(skeleton, dict):
        if "$tensor" in skeleton:
            return tensors[skeleton["$tensor"]]
        return {key: _join(value, tensors) for key, value in skeleton["$dict"]}
    if isinstance(skeleton, list):
        return [_join(value, tensors) for value in skeleton]
    return skeleton


def save_checkpoint(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes ``tree`` to ``path``, atomically.

    Args:
        path: the file to write.
        tree: keys are strings or integers; tuples come back as lists.

    Raises:
        OSError: the disk is full or not writable; the previous checkpoint is left as it was.
        TypeError: a leaf is neither a tensor nor a JSON value.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {"format": FORMAT, "skeleton": json.dumps(_split(tree, tensors))}
    # safetensors' own save_file leaves a file of another name behind when it is killed
    content = save(tensors, metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what ``save_checkpoint`` wrote; tensors come back on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, or no checkpoint of this version.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is of format {metadata.get('format')!r}, this version reads {FORMAT!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged and can't be read: {error}") from error
    try:
        return _join(json.loads(metadata["skeleton"]), tensors)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: its tensors and its index differ") from error
