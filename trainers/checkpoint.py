"""Checkpoints without pickle: tensors as safetensors, everything else as JSON, written atomically.

A checkpoint is a tree of dicts and lists whose leaves are tensors or JSON values. It is one safetensors file; the tree's
skeleton stands in the file's metadata.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "tokenprune-checkpoint-1"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of another run, model or version."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary path beside ``path``, then moves it there: readers see all of it or nothing.

    Raises:
        OSError: the disk is full or not writable; the previous file at ``path`` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except SafetensorError as error:
        # safetensors reports a full disk as its own error
        raise OSError(f"could not write {path}: {error}") from error
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _split(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        tensors[prefix] = tree.detach().contiguous().cpu()
        return {"$tensor": prefix}
    if isinstance(tree, Mapping):
        # JSON turns integer keys (optimizer state) into strings: keep the pairs
        return {
            "$dict": [[key, _split(value, f"{prefix}/{key}", tensors)] for key, value in tree.items()]
        }
    if isinstance(tree, (list, tuple)):
        return [_split(value, f"{prefix}/{i}", tensors) for i, value in enumerate(tree)]
    return tree


def _join(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(skeleton, dict):
        if "$tensor" in skeleton:
            return tensors[skeleton["$tensor"]]
        return {key: _join(value, tensors) for key, value in skeleton["$dict"]}
    if isinstance(skeleton, list):
        return [_join(value, tensors) for value in skeleton]
    return skeleton


def save_checkpoint(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes ``tree`` to ``path``, atomically.

    Raises:
        OSError: the disk is full or not writable; the previous checkpoint is left as it was.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_split(tree, "", tensors))
    # tensors that share storage are refused by safetensors
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    write_atomically(
        path,
        lambda temporary: save_file(
            tensors, temporary, metadata={"format": FORMAT, "skeleton": skeleton}
        ),
    )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what ``save_checkpoint`` wrote.

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
            skeleton = json.loads(metadata["skeleton"])
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged and can't be read: {error}") from error
    return _join(skeleton, tensors)
