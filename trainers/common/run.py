"""A run's folder, with its settings, metrics and checkpoints: how a run begins and is resumed."""

from __future__ import annotations

import json
import re
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import nn

from prunevit.agents.run_reader import CHECKPOINT_SHA256
from prunevit.envs.data.datasets import DIGITS, is_on_disk
from prunevit.envs.old_names import fill_in_defaults, rename_settings
from prunevit.envs.vit.described import description_problem
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.weights import sha256
from prunevit.trainers.common.checkpoint import (
    CheckpointError,
    existing,
    load_newest,
    read_records,
    save_checkpoint,
    write_json,
    write_network,
    write_records,
)
from prunevit.trainers.common.distributed import ALONE, Ranks, RanksError
from prunevit.trainers.common.settings import Settings
from prunevit.versions import __version__

RUNS = Path("runs")
COUNTERS = ("iteration", "epoch")  # a checkpoint has one of them: its number of records

Record = dict[str, Any]


class TrainingError(RuntimeError):
    """A training can't begin or continue; the message says why."""


# reported in one line, without a traceback
COMMAND_ERRORS = (ValueError, OSError, CheckpointError, TrainingError, RanksError)


class RunSettings(Settings, ABC):
    """Settings of a training that has a run folder.

    Attributes:
        backbone: the ViT's name.
        dataset: the images' name.
        device: where it trains, as ``pick_device`` takes it.
        resume: the folder of a run to resume; None begins a new one.
    """

    backbone: str | None
    dataset: str | None
    device: str
    resume: Path | None = None

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where a new run is written."""

    def reaching_out(self) -> list[str]:
        """Settings that have code imported or something fetched. A run's files may be a
        stranger's, so whoever resumes the run gives these again.
        """
        names = ["backbone"] if ":" in (self.backbone or "") else []
        return names if is_on_disk(self.dataset or DIGITS) else [*names, "dataset"]


S = TypeVar("S", bound=RunSettings)


class Stateful(Protocol):
    """What can be restored from a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> object: ...


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; ``create`` makes it.
        ranks: the processes that train together. All read the folder, only the first writes to it.

    Attributes:
        records: the lines of ``metrics.jsonl``.
    """

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self.path = path
        self.ranks = ranks
        self.checkpoint = path / "checkpoint.safetensors"
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.records: list[Record] = []
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Duration of the run, including the time before it was resumed."""
        return time.monotonic() - self._start

    def create(self, settings: Settings) -> None:
        """Writes the settings; does nothing if the run already has a file of them."""
        if not self.ranks.is_first or self.config.exists():
            return
        values = {"version": __version__} | settings.to_json()
        checkpoint = getattr(settings, "checkpoint", None)
        if checkpoint is not None:  # a policy is worth nothing on other weights
            values[CHECKPOINT_SHA256] = sha256(checkpoint)
        write_json(self.config, values)

    def read_settings(self, kind: type[S]) -> S:
        """Reads the settings that ``create`` wrote.

        Raises:
            CheckpointError: there is no such file, it is damaged, it was written by a version with
                other settings, or its backbone's weights were replaced.
        """
        if not self.config.is_file():
            raise CheckpointError(f"{self.path} is no run: it has no config.json")
        try:
            values = json.loads(self.config.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it holds no JSON object")
        # JSON that is nested too deeply is a RecursionError
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.config} is damaged: {error}") from error
        values = rename_settings(values)
        digest = values.pop(CHECKPOINT_SHA256, None)
        version = values.pop("version", None)
        writer = "tokenprune, before 0.2" if version is None else f"prunevit {version}"
        if version is not None and _version(version) > _version(__version__):
            raise CheckpointError(
                f"{self.config} was written by {writer}, here is prunevit {__version__}: "
                "resume the run with the version that began it"
            )
        if version is None:
            values = fill_in_defaults(values)
        try:
            settings = kind.from_json(values)
        except ValueError as error:
            raise CheckpointError(
                f"{self.config} can't be read by prunevit {__version__}, it was written by "
                f"{writer}: {error}"
            ) from error
        checkpoint = getattr(settings, "checkpoint", None)
        if digest and checkpoint and checkpoint.is_file() and sha256(checkpoint) != digest:
            raise CheckpointError(
                f"{checkpoint} holds other weights than those that {self.path} began with: put "
                "them back, or train again"
            )
        return settings

    @property
    def is_begun(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        return bool(existing(self.checkpoint))

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes metrics and a checkpoint. If the process is killed between the two, resuming drops
        the records that have no checkpoint.

        Args:
            state: everything that the run needs to continue. Its ``iteration`` or ``epoch`` is the
                number of records that belong to it.
        """
        if self.ranks.is_first:
            write_records(self.metrics, self.records[: _count(state)])
            save_checkpoint(self.checkpoint, {"seconds": self.seconds, **state})

    def load(self) -> dict[str, Any]:
        """Loads the newest checkpoint, and restores ``records`` and ``seconds``.

        Raises:
            CheckpointError: the files are damaged or don't belong together, or a single process
                wrote them within an epoch and this run has many.
        """
        state = load_newest(self.checkpoint)
        if state.get("place") and self.ranks.count > 1:
            raise CheckpointError(
                f"{self.path} was stopped by a single process within an epoch: only a single "
                "process can continue it"
            )
        try:
            count = _count(state)
            self.records = read_records(self.metrics, count)
            # before 0.2, checkpoints after whole epochs had no "seconds"
            last: float = self.records[-1]["seconds"] if self.records else 0.0
            self._start -= float(state.get("seconds", last) or 0.0)
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path} can't be resumed: {error}") from error
        return state

    def restore(self, trainer: Stateful) -> dict[str, Any] | None:
        """Restores ``trainer`` from the checkpoint, if there is one, and returns its state.

        Raises:
            CheckpointError: as of ``load``; or the checkpoint is of another model.
        """
        if not self.is_begun:
            return None
        state = self.load()
        try:
            trainer.load_state_dict(state)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.checkpoint} doesn't fit the run in {self.config}: {reason}"
            ) from error
        return state

    def write_networks(self, **networks: nn.Module | None) -> None:
        """Writes each network that isn't None to NAME.safetensors."""
        for name, network in networks.items():
            if network is not None and self.ranks.is_first:
                write_network(self.path / f"{name}.safetensors", network)


def _count(state: Mapping[str, Any]) -> int:
    """The number of records of ``state``; raises KeyError if it has no counter."""
    name = next((name for name in COUNTERS if name in state), COUNTERS[0])
    return int(state[name])


def _version(text: object) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", str(text))))


def device_of(settings: RunSettings) -> str:
    """The device of the run that ``settings`` begin or resume. If it can't be resumed, ``open_run``
    will raise the error.
    """
    if settings.resume is not None:
        with suppress(CheckpointError):
            return RunFolder(settings.resume).read_settings(type(settings)).device
    return settings.device


def open_run(settings: S, ranks: Ranks = ALONE) -> tuple[RunFolder, S]:
    """Opens the folder of a run, new or resumed, and returns it with the run's settings.

    Raises:
        TrainingError: a new run's folder exists, or other settings were given with ``resume``, or
            those weren't that have to be (``RunSettings.reaching_out``).
        CheckpointError: there is no run to resume, or its settings can't be read, or its backbone
            is nothing that a file may choose.
    """
    if settings.resume is None:
        folder = Path(ranks.agreed(str(settings.folder)))
        if ranks.is_first and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            can_resume = "resume" in settings.__dataclass_fields__
            resume = f"resume it with --resume {folder}, or " if can_resume else ""
            raise TrainingError(f"{folder} exists: {resume}give another --run-name")
        return RunFolder(folder, ranks), settings
    run = RunFolder(settings.resume, ranks)
    found = run.read_settings(type(settings))
    given, default, saved = settings.to_json(), settings.defaults(), found.to_json()
    again = found.reaching_out()
    # settings that equal the run's own are fine
    changed = [n for n in given if given[n] not in (default[n], saved[n]) and n not in again]
    if changed:
        raise TrainingError(
            f"--resume continues with the run's own settings: leave out {', '.join(changed)}"
        )
    if any(given[name] != saved[name] for name in again):
        raise TrainingError(
            f"{run.config} has code imported or something fetched: if you trust it, resume it with "
            f"{resume_flags(run.path, found)}"
        )
    backbone = found.backbone or DIGITS_VIT
    problem = description_problem(
        DIGITS_VIT if ":" in backbone else backbone, getattr(found, "model_kwargs", {})
    )
    if problem is not None:
        raise CheckpointError(f"{run.config} is refused: {problem}")
    return run, found


def resume_flags(folder: Path, settings: RunSettings) -> str:
    """What to type to resume the run in ``folder`` that has these settings."""
    saved = settings.to_json()
    again = [
        f"--{name.replace('_', '-')} {shlex.quote(_text(saved[name]))}"
        for name in settings.reaching_out()
    ]
    return " ".join(["--resume", shlex.quote(str(folder)), *again])


def _text(value: Any) -> str:
    """``value`` as on a command line, without characters that a terminal would act on."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if text.isprintable() else ascii(text)


def iteration_seed(seed: int, iteration: int) -> int:
    """A seed for each iteration, so that resuming a run needs no generator's state."""
    return seed * 1_000_003 + iteration
