"""Checkpoints without pickle, written atomically: tensors as safetensors, the rest as JSON.

A checkpoint is a tree of dicts and lists whose leaves are tensors or JSON values. It is saved as
one safetensors file, with the tree's skeleton and a checksum in the file's metadata. The previous
checkpoints are kept: if the newest is damaged, the run continues from the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from prunevit.envs.old_names import rename_metadata, rename_parameters

FORMAT = "prunevit-checkpoint-2"
FORMAT_WITHOUT_CHECKSUM = "prunevit-checkpoint-1"
KEPT = 3  # checkpoints of a run, the newest included


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or of another run, model or version."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path and moves the result to ``path``: readers see all of it
    or nothing.

    A file that a killed process left half-written is overwritten by the next write to ``path``.

    Raises:
        OSError: the disk is full or not writable; the previous file at ``path`` is left as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a link that came with a run from elsewhere would have another file overwritten
        temporary.unlink(missing_ok=True)
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


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``records`` as JSON lines, atomically; raises what ``write_atomically`` raises."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def read_records(path: Path, count: int) -> list[dict[str, Any]]:
    """Reads the first ``count`` records that ``write_records`` wrote. The file has more if the run
    was killed before it saved their checkpoint, or continues from an older checkpoint.

    Raises:
        CheckpointError: the file can't be read, or has fewer records.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:count]
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be resumed: {error}") from error
    if len(records) < count:
        raise CheckpointError(f"{path} lacks records: it has {len(records)} of {count}")
    return records


def write_network(path: Path, network: nn.Module) -> None:
    """Writes a network's weights as safetensors, atomically; raises what ``write_atomically``
    raises.
    """
    weights = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    # save_file has an error of its own for a full disk
    write_atomically(path, lambda temporary: temporary.write_bytes(save(weights)))


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


def _checksum(skeleton: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a checkpoint's content, in hexadecimal digits."""
    digest = hashlib.sha256(skeleton.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _names(path: Path) -> list[Path]:
    return [path, *(path.with_stem(f"{path.stem}-{age}") for age in range(1, KEPT))]


def existing(path: Path) -> list[Path]:
    """The checkpoints at ``path`` that exist, the newest first."""
    return [file for file in _names(path) if file.exists()]


def _keep(path: Path) -> None:
    """Keeps the checkpoint at ``path`` under a second name, without ever removing the first."""
    files = _names(path)
    for age in range(KEPT - 1, 1, -1):
        if files[age - 1].exists():
            files[age - 1].replace(files[age])
    # renaming a hard link onto its own file would do nothing
    files[1].unlink(missing_ok=True)
    if path.exists():
        try:
            os.link(path, files[1])
        # not every file system has hard links
        except OSError:
            shutil.copyfile(path, files[1])


def save_checkpoint(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes ``tree`` to ``path`` atomically, and keeps the checkpoints before it.

    Args:
        path: the file to write.
        tree: keys are strings or integers; tuples come back as lists.

    Raises:
        OSError: the disk is full or not writable; the previous checkpoint is left as it was.
        TypeError: a leaf is neither a tensor nor a JSON value.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_split(tree, tensors))
    checksum = _checksum(skeleton, tensors)
    # safetensors' save_file leaves a temporary file behind when it is killed
    content = save(tensors, {"format": FORMAT, "skeleton": skeleton, "sha256": checksum})

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)
        _keep(path)

    write_atomically(path, write)


def load_newest(path: Path) -> dict[str, Any]:
    """Loads the newest intact checkpoint of ``path``. Damaged ones are named on the standard error
    output.

    Raises:
        CheckpointError: none of them is intact; the message is about the newest.
    """
    damaged: list[CheckpointError] = []
    for file in existing(path) or [path]:
        try:
            state = load_checkpoint(file)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for damage in damaged:
            print(f"warning: {damage}; going on from {file}", file=sys.stderr)
        return state
    raise damaged[0]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what ``save_checkpoint`` wrote; tensors come back on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or no checkpoint of this version.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = rename_metadata(file.metadata() or {})
            if metadata.get("format") not in (FORMAT, FORMAT_WITHOUT_CHECKSUM):
                raise CheckpointError(
                    f"{path} is of format {metadata.get('format')!r}, this version reads {FORMAT!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged and can't be read: {error}") from error
    try:
        skeleton = metadata["skeleton"]
        if metadata["format"] == FORMAT and metadata["sha256"] != _checksum(skeleton, tensors):
            raise CheckpointError(f"{path} is damaged: its checksum doesn't match")
        return rename_parameters(_join(json.loads(skeleton), tensors))
    # JSON that is nested too deeply is a RecursionError
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its tensors don't match its index") from error
