"""The folder of a training that goes on in epochs: its settings, records and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import tyro

from prunevit.envs.old_names import rename_settings
from prunevit.trainers.common.checkpoint import (
    CheckpointError,
    existing,
    load_newest,
    read_records,
    save_checkpoint,
    write_json,
    write_records,
)
from prunevit.trainers.common.distributed import ALONE, Ranks

RUNS = Path("runs")

Record = dict[str, Any]


class TrainingError(RuntimeError):
    """A training that can't begin or can't go on; the message says why."""


def _parse_json_object(arguments: list[str]) -> dict[str, Any]:
    value = json.loads(arguments[0])
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, as {{}}, got {arguments[0]}")
    try:
        # Python reads NaN where no other JSON has it, and a game of NaN steps never ends
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError(f"expected finite numbers, got {arguments[0]}") from None
    return value


JsonObject = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_parse_json_object,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


class Settings(Protocol):
    """A dataclass with the settings of a training, all of which have defaults.

    Attributes:
        resume: a run folder to go on with; None for a new run.
        device: where it trains, as ``pick_device`` takes it.
        folder: where a new run is written.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    resume: Path | None
    device: str

    @property
    def folder(self) -> Path: ...


S = TypeVar("S", bound=Settings)


def describe(settings: Settings) -> dict[str, Any]:
    """``settings`` as JSON values, without what is of one process only."""
    values = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(settings).items()
    }
    del values["resume"]
    return values


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; ``create`` makes it.
        ranks: who trains; all of them read the folder, the first alone writes there.
    """

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self.path = path
        self._ranks = ranks
        self.checkpoint = path / "checkpoint.safetensors"
        self._metrics = path / "metrics.jsonl"

    def create(self, settings: Settings) -> None:
        if self._ranks.is_first:
            write_json(self.path / "config.json", describe(settings))

    def read_settings(self, kind: type[S]) -> S:
        """What ``create`` wrote.

        Raises:
            CheckpointError: there is no such file, it is damaged, or of another kind of run.
        """
        file = self.path / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{self.path} is no run: it has no config.json")
        try:
            values = rename_settings(json.loads(file.read_text(encoding="utf-8")))
            for field in fields(kind):
                if "Path" in str(field.type) and values.get(field.name) is not None:
                    values[field.name] = Path(values[field.name])
            return kind(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged or of another version: {error}") from error

    @property
    def is_begun(self) -> bool:
        """Whether there is an epoch to go on from."""
        return bool(existing(self.checkpoint))

    def save_epoch(self, state: Mapping[str, Any], records: list[Record]) -> None:
        """Notes that so many epochs are done as there are ``records``, and in ``state`` what goes
        on from there, in the course of the next epoch too.
        """
        if not self._ranks.is_first:
            return
        write_records(self._metrics, records)
        save_checkpoint(self.checkpoint, {"epoch": len(records), **state})

    def read_epochs(self) -> tuple[dict[str, Any], list[Record]]:
        """The last state, and the records up to there.

        Raises:
            CheckpointError: the files are damaged, don't belong together, or are of one process
                within an epoch, and here are many.
        """
        state = load_newest(self.checkpoint)
        if state.get("place") and self._ranks.count > 1:
            raise CheckpointError(
                f"{self.path} was stopped in the course of an epoch of a single process: "
                "only a single one can go on from there"
            )
        try:
            count = int(state["epoch"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{self.path} can't be resumed: {error}") from error
        return state, read_records(self._metrics, count)


def device_of(settings: Settings) -> str:
    """Where the run trains that ``settings`` begin or go on with; what is wrong with one to be
    resumed, ``open_run`` says.
    """
    if settings.resume is not None:
        with suppress(CheckpointError):
            return RunFolder(settings.resume).read_settings(type(settings)).device
    return settings.device


def open_run(settings: S, ranks: Ranks = ALONE) -> tuple[RunFolder, S]:
    """The folder of a run, new or to be resumed, and the settings that hold there.

    Raises:
        TrainingError: the folder exists and is not to be resumed, or options go with ``resume``.
        CheckpointError: there is nothing to resume, or it is damaged.
    """
    if settings.resume is None:
        folder = settings.folder
        if ranks.is_first and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise TrainingError(
                f"{folder} exists: go on with it by --resume {folder}, or give another --run-name"
            )
        return RunFolder(folder, ranks), settings
    kind = type(settings)
    default = describe(kind())
    changed = [name for name, value in describe(settings).items() if value != default[name]]
    if changed:
        raise TrainingError(
            f"--resume goes on in the run's own configuration: leave out {', '.join(changed)}"
        )
    run = RunFolder(settings.resume, ranks)
    return run, run.read_settings(kind)
