"""What comparisons measured: JSON lines, one a measurement."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from prunevit import __version__
from prunevit.benchmarks.machine import hardware
from prunevit.cli import prog
from prunevit.envs.old_names import rename_record
from prunevit.trainers.common.checkpoint import write_records

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("envs", "agents", "trainers", "benchmarks", "prunevit", ":!benchmarks/results")
FILE = "records.jsonl"
KEY = ("method", "seed", "point")
FIELDS = {
    "task", "method", "seed", "point", "fine_tuned", "accuracy", "dense_accuracy", "gmacs",
    "dense_gmacs", "kept", "left", "speedup", "command",
}  # fmt: skip


class Records:
    """The records of a file, which is created when the first one is put.

    A line that was cut off is dropped: it is measured again.

    Args:
        path: the file.
        key: fields that tell records apart.
        fields: fields that every record has.

    Raises:
        ValueError: a line is not a record.
    """

    def __init__(self, path: Path, key: Sequence[str] = KEY, fields: Set[str] = FIELDS) -> None:
        self.path = path
        self.rows: list[Record] = read(path, fields) if path.is_file() else []
        self._key = key
        self._fields = fields

    def require(
        self,
        wanted: Mapping[str, Any],
        found: Callable[[Record], Mapping[str, Any] | None] = lambda row: row.get("settings"),
    ) -> None:
        """Checks that all records were made under the settings ``wanted``. The first records don't
        tell theirs.

        Raises:
            ValueError: some were not; the message names the differences.
        """
        for row in self.rows:
            settings = found(row)
            if settings is not None and (differ := differences(settings, wanted)):
                raise ValueError(
                    f"{self.path} holds records of other settings ({differ}): give another --out"
                )

    def require_origin(self, device: torch.device) -> None:
        """Checks that all records come from this commit and the hardware behind ``device``.

        Raises:
            ValueError: some don't; the message names the differences.
        """
        wanted = origin(device)
        self.require(wanted, lambda row: {name: row.get(name) for name in wanted})

    def find(self, *key: Any) -> Record | None:
        """The record with these values of the key's fields; None where there is none."""
        return next((row for row in self.rows if self._key_of(row) == key), None)

    def put(self, row: Record) -> None:
        """Adds a record, in place of one with the same key, and writes all of them, atomically."""
        key = self._key_of(row)
        self.rows = [other for other in self.rows if self._key_of(other) != key] + [row]
        self.save()

    def save(self) -> None:
        """Writes the records as they are now, and keeps those that another process has put."""
        own = {self._key_of(row) for row in self.rows}
        written = read(self.path, self._fields) if self.path.is_file() else []
        self.rows[:0] = [row for row in written if self._key_of(row) not in own]
        write_records(self.path, self.rows)

    def _key_of(self, row: Record) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """``name VALUE for VALUE`` of all settings that differ, separated by commas."""
    return ", ".join(
        f"{name} {found.get(name)} for {wanted.get(name)}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    )


def read(path: Path, fields: Set[str] = FIELDS) -> list[Record]:
    """The records of a file up to the last whole line, under today's names.

    Args:
        path: the file.
        fields: fields that every record has.

    Raises:
        ValueError: a line before the last one is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} holds no records: {error}") from error
    rows: list[Record] = []
    renamed: set[str] = set()
    for number, line in enumerate(lines[:-1], start=1):  # the last line is cut off, or empty
        try:
            written = json.loads(line)
            row = rename_record(written)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is no record: {error}") from error
        renamed |= written.keys() - row.keys()
        if missing := fields - row.keys():
            raise ValueError(f"{path}, line {number} lacks {', '.join(sorted(missing))}")
        rows.append(row)
    if renamed:
        names = ", ".join(sorted(renamed))
        print(f"warning: {path} has fields of a version before 0.2: {names}", file=sys.stderr)
    return rows


def command() -> str:
    """The call of this process, as it can be typed again."""
    return f"{prog()} {shlex.join(sys.argv[1:])}"


@cache
def commit() -> str:
    """The last git commit that changed the source code, and behind a plus sign a hash of what has
    changed in it since, files that git doesn't know included. Commits of records, pages or tests
    leave it as it is. Without git it is the package's version.
    """

    def git(*arguments: str) -> str:
        call = ["git", *arguments, "--", *SOURCE]
        return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        last, changes = git("log", "-1", "--format=%h").strip(), git("diff", "HEAD").encode()
        for name in git("ls-files", "--others", "--exclude-standard", "-z").split("\0")[:-1]:
            changes += name.encode() + (ROOT / name).read_bytes()
    except (OSError, subprocess.CalledProcessError):
        return f"prunevit {__version__}"
    if not last:  # installed below somebody else's checkout
        return f"prunevit {__version__}"
    return f"{last}+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else last


def origin(device: torch.device) -> dict[str, str]:
    """What records of a table have in common: the commit, and the hardware behind ``device``."""
    return {"commit": commit(), "hardware": hardware(device)}


def pack_answers(right: ArrayLike) -> str:
    """Which images were answered right, bool [I], as a record holds it: bits in base 64."""
    return base64.b64encode(np.packbits(np.asarray(right, dtype=bool)).tobytes()).decode()


def unpack_answers(packed: str, images: int) -> NDArray[np.bool_]:
    """Reverts ``pack_answers``, [images].

    Raises:
        ValueError: ``packed`` is not of so many images.
    """
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), dtype=np.uint8))
    if not images <= len(bits) < images + 8:
        raise ValueError(f"{len(bits)} bits are not the answers to {images} images")
    return bits[:images].astype(bool)
