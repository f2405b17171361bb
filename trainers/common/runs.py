"""A run of ``trainers.mappo`` from its command line to its report: the folder, the log,
resuming.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save
from torch import nn
from torch.profiler import record_function
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from prunevit.envs.old_names import rename_settings
from prunevit.trainers.common.checkpoint import (
    CheckpointError,
    existing,
    load_newest,
    read_records,
    save_checkpoint,
    write_atomically,
    write_json,
    write_records,
)
from prunevit.trainers.common.config import MappoConfig, defaults_for
from prunevit.trainers.common.distributed import ALONE, Ranks, RanksError, join_ranks
from prunevit.trainers.common.experiments import Task, make_task
from prunevit.trainers.common.run_folder import RUNS
from prunevit.trainers.common.signals import ends_in_one_line, says_how_to_go_on
from prunevit.trainers.mappo import NotFiniteError, Trainer


class RunError(RuntimeError):
    """A run that can't begin, or can't go on; the message says why."""


class Run:
    """The files of one run.

    Args:
        folder: runs/NAME.
        config: its settings.
        ranks: who trains; all of them read the folder, the first alone writes there.
    """

    def __init__(self, folder: Path, config: MappoConfig, ranks: Ranks = ALONE) -> None:
        self.folder = folder
        self.config = config
        self.ranks = ranks
        self.checkpoint = folder / "checkpoint.safetensors"
        self._metrics = folder / "metrics.jsonl"
        self.records: list[dict[str, float]] = []

    def save(self, state: Mapping[str, Any], seconds: float) -> None:
        """Writes metrics and checkpoint: killed in between, the records beyond the checkpoint are
        dropped later.
        """
        if not self.ranks.is_first:
            return
        write_records(self._metrics, self.records[: state["iteration"]])
        save_checkpoint(self.checkpoint, {"seconds": seconds, **state})

    def restore(self, trainer: Trainer) -> float:
        """Puts ``trainer`` where the checkpoint stands; returns the seconds spent until then."""
        if not existing(self.checkpoint):
            return 0.0
        state = load_newest(self.checkpoint)
        try:
            trainer.load_state_dict(state)
            seconds = float(state["seconds"])
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.checkpoint} doesn't fit the run in {self.folder / 'config.json'}: {error}"
            ) from error
        self.records = read_records(self._metrics, trainer.iteration)
        return seconds

    def write_networks(self, trainer: Trainer) -> None:
        """Writes actor and critic as safetensors."""
        learner = trainer.learner
        networks: dict[str, nn.Module | None] = {"policy": learner.actor, "critic": learner.critic}
        for name, network in networks.items():
            if network is not None:
                weights = {k: v.detach().cpu() for k, v in network.state_dict().items()}
                # safetensors' own save_file has another error for a full disk
                write = partial(Path.write_bytes, data=save(weights))
                write_atomically(self.folder / f"{name}.safetensors", write)


def read_config(folder: Path) -> MappoConfig:
    """The settings of the run in ``folder``.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} is no run: it has no config.json")
    try:
        return MappoConfig.from_json(rename_settings(json.loads(file.read_text(encoding="utf-8"))))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged or of another version: {error}") from error


def device_of(config: MappoConfig) -> str:
    """Where the run trains that ``config`` begins or goes on with; what is wrong with one to be
    resumed, ``open_run`` says.
    """
    if config.resume is not None:
        with suppress(CheckpointError):
            return read_config(config.resume).device
    return config.device


def open_run(config: MappoConfig, ranks: Ranks = ALONE) -> Run:
    """The run to begin, or to go on with.

    Raises:
        RunError: the folder exists and is not to be resumed, or settings go with ``resume``.
        CheckpointError: there is nothing to resume, or its configuration is damaged.
    """
    if config.resume is not None:
        saved = read_config(config.resume)
        default = defaults_for(config.env).to_json()
        changed = [
            name
            for name, value in config.to_json().items()
            if value != default[name] and name not in ("resume", "env")
        ]
        # naming the run's own game is no change
        if config.env not in (MappoConfig.env, saved.env):
            changed.insert(0, "env")
        if changed:
            raise RunError(
                f"--resume goes on under the run's own settings: leave out {', '.join(changed)}"
            )
        return Run(config.resume, saved, ranks)
    kind = config.env.split(":")[-1]
    name = config.run_name or f"{kind}-seed{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RUNS / ranks.agreed(name)
    if ranks.is_first and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            f"{folder} exists: go on with it by --resume {folder}, or give another --run-name"
        )
    return Run(folder, config, ranks)


def execute(config: MappoConfig, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Trains and reports, in the run's folder.

    Returns:
        the report; nothing on other ranks than the first, which writes it without them.

    Raises:
        RunError: the run can't begin.
        CheckpointError: the run to be resumed is missing or damaged.
        ValueError: settings that don't go together, an unknown name, a bad image; the message says
            which.
        OSError: the disk is full or not writable; the last checkpoint is left as it was.
        RanksError: another rank has ended.
    """
    run = open_run(config, ranks)
    with says_how_to_go_on(run.folder):
        start = time.monotonic()
        task, trainer, before = learn(run)
        start -= before
        if not ranks.is_first:
            task.env.close()
            return {}
        report = task.report(trainer.learner.actor, run.folder)
        report |= {"seconds": time.monotonic() - start, "seed": run.config.seed}
        write_json(run.folder / "report.json", report)
    task.env.close()
    return report


def learn(run: Run) -> tuple[Task, Trainer, float]:
    """Trains to the end, from where the run's checkpoint stands, and writes the networks; raises
    what ``execute`` raises.

    Returns:
        the game, the trainer, and the seconds that went into the run before this call.
    """
    config, ranks = run.config, run.ranks
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    start = time.monotonic()
    task = make_task(config, ranks)
    trainer = Trainer(task.env, task.make_actor(), config, ranks)
    before = run.restore(trainer)
    ranks.wait()  # all have read what there was
    if ranks.is_first and not (run.folder / "config.json").exists():
        write_json(run.folder / "config.json", config.to_json())
    task.announce(trainer.seeds_to_come())
    try:
        with ranks.stop_together():
            train(run, task, trainer, start - before)
    except BaseException:
        task.env.close()
        raise
    if ranks.is_first:
        run.write_networks(trainer)
    return task, trainer, before


def train(run: Run, task: Task, trainer: Trainer, start: float) -> None:
    """Iterates to the end, logs, evaluates and writes checkpoints on the way, and one of the last
    whole iteration where it is stopped or fails.

    Raises:
        RunError: a reward, a loss or a gradient is not finite.
    """
    config, ranks = run.config, run.ranks
    board = open_board(run, trainer.iteration + 1)
    bar = tqdm(
        total=config.iterations,
        initial=trainer.iteration,
        disable=None if ranks.is_first else True,
        desc=run.folder.name,
    )
    # what an iteration changed before it was stopped is of no use
    whole = copy.deepcopy(trainer.state_dict())
    try:
        with board or nullcontext(), bar, profiled_if_asked(run) as after_iteration:
            while trainer.iteration < config.iterations:
                ranks.stop_if_asked()
                run.records.append(_iterate(task, trainer, board, bar, start))
                after_iteration()
                if trainer.is_resumable:
                    whole = copy.deepcopy(trainer.state_dict())
                iteration = trainer.iteration
                if iteration % config.checkpoint_every == 0 or iteration == config.iterations:
                    run.save(whole, time.monotonic() - start)
    except (KeyboardInterrupt, RunError, RanksError) as ended:
        run.save(whole, time.monotonic() - start)
        ended.add_note(f"iteration {whole['iteration']} is saved")
        raise


def profiled_if_asked(run: Run) -> AbstractContextManager[Callable[[], object]]:
    """What is to be called after each iteration; the first rank traces some where it shall."""
    if run.config.profile and run.ranks.is_first:
        from prunevit.trainers.common.profiling import profiled

        return profiled(run.folder)
    return nullcontext(lambda: None)


def open_board(run: Run, step: int) -> SummaryWriter | None:
    """Where TensorBoard reads what is logged from ``step`` on; None where another rank logs."""
    return SummaryWriter(str(run.folder), purge_step=step) if run.ranks.is_first else None


def _iterate(
    task: Task, trainer: Trainer, board: SummaryWriter | None, bar: tqdm, start: float
) -> dict[str, float]:
    """Plays and learns once, evaluates when it is time to; returns what was logged."""
    config = trainer.config
    try:
        with record_function("iteration"):
            record = trainer.iterate()
    except NotFiniteError as error:
        raise RunError(
            f"the {error} of iteration {trainer.iteration + 1} is not finite, playing "
            f"{task.played()}: try a smaller --lr, or look at them"
        ) from error
    iteration = trainer.iteration
    # a mean over the episodes that ended, where none did
    record = {name: value for name, value in record.items() if not math.isnan(value)}
    bar.update()
    bar.set_postfix_str(task.progress(record))
    if iteration % config.eval_every == 0 or iteration == config.iterations:
        record |= task.evaluate(trainer.learner.actor)
        shown = {k: v for k, v in record.items() if k.startswith("validation_")}
        text = " ".join(f"{k.removeprefix('validation_')} {v:.4f}" for k, v in shown.items())
        if trainer.ranks.is_first:
            bar.write(f"iteration {iteration}: validation {text}")
    if board is not None:
        for name, value in record.items():
            board.add_scalar(name, value, iteration)
    return record | {"iteration": iteration, "seconds": time.monotonic() - start}


def parse(arguments: list[str]) -> MappoConfig:
    """The command line; defaults depend on the kind of game, so ``--env`` is read first."""
    env = MappoConfig.env
    for i, argument in enumerate(arguments):
        if argument == "--env" and i + 1 < len(arguments):
            env = arguments[i + 1]
        elif argument.startswith("--env="):
            env = argument.removeprefix("--env=")
    return tyro.cli(
        MappoConfig, args=arguments, default=defaults_for(env), prog="python -m trainers.mappo"
    )


def main(arguments: list[str] | None = None) -> None:
    """``python -m trainers.mappo``."""
    with ends_in_one_line(RunError, CheckpointError, ValueError, OSError, RanksError):
        config = parse(sys.argv[1:] if arguments is None else arguments)
        report = execute(config, join_ranks(device_of(config)))
        if report:
            print(format_report(report))


def format_report(report: dict[str, Any]) -> str:
    """What the end of a run prints."""
    from prunevit.trainers.common.report import table

    if "dense" in report["policies"]:
        text = table(report)
    else:
        text = "\n".join(
            f"{name}: " + " ".join(f"{k} {v:.3f}" for k, v in row.items())
            for name, row in report["policies"].items()
        )
    return f"{text}\n{report['seconds']:.0f} s, seed {report['seed']}"
