"""A run of ``trainers.dynamic_vit`` from its command line to its report.

It is judged on the validation split alone; the test split is never read.
"""

from __future__ import annotations

import copy
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save
from timm.data import resolve_model_data_config
from tqdm import tqdm

from prunevit.agents.policies.heuristics import KeepAll
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.agents.saving import dynamic_vit_policy
from prunevit.envs.data.datasets import ImageSet, open_images
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import read_description, write_weights
from prunevit.trainers.common.checkpoint import CheckpointError, write_atomically, write_json
from prunevit.trainers.common.classification import versions
from prunevit.trainers.common.evaluation import evaluate
from prunevit.trainers.common.experiments import load_backbone
from prunevit.trainers.common.run_folder import Record, RunFolder, TrainingError, open_run
from prunevit.trainers.common.signals import ends_in_one_line, says_how_to_go_on
from prunevit.trainers.dynamic_vit import DynamicViTConfig, Trainer


def execute(config: DynamicViTConfig) -> dict[str, Any]:
    """Trains in the run's folder, and returns the report that was written there.

    Raises:
        CheckpointError: the run to be resumed is missing or damaged.
        TrainingError: the run can't begin, or diverged.
        ValueError: a backbone, a dataset or stages that are unknown or don't go together.
        OSError: the disk is full or not writable; the last checkpoint is left as it was.
    """
    start = time.monotonic()
    run, config = open_run(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load_backbone(config)
    data_config = resolve_model_data_config(model)
    backbone = StagedViT(model, config.prune_before)
    policy = dynamic_vit_policy(backbone, config.keep, config.hidden, config.seed)
    images = open_images(config.dataset, "train", data_config, augment=config.augment)
    validation = open_images(config.dataset, "validation", data_config)
    dense = evaluate(PrunedViT(backbone, KeepAll()), validation)
    trainer = Trainer(backbone, policy, images, config)
    records: list[Record] = []
    if run.is_begun:
        records = _restore(run, trainer)
    else:
        run.create(config)
    start -= records[-1]["seconds"] if records else 0.0
    with says_how_to_go_on(run.path):
        train(run, trainer, records, validation, start)
    _write_networks(run.path, trainer)

    result = evaluate(PrunedViT(backbone, policy), validation)
    decisions = backbone.num_patches * (1 + sum(result.kept[:-1]))
    report = {
        "split": "validation",
        "policies": {
            "dense": {"accuracy": dense.accuracy, "gmacs": dense.gmacs},
            "dynamic-vit": {
                "accuracy": result.accuracy,
                "gmacs": result.gmacs,
                "kept": list(result.kept),
                "policy_gmacs": decisions * policy.macs_per_decision / 1e9,
            },
        },
        "versions": versions(),
        "seconds": time.monotonic() - start,
        "seed": config.seed,
    }
    write_json(run.path / "report.json", report)
    return report


def _restore(run: RunFolder, trainer: Trainer) -> list[Record]:
    """Puts ``trainer`` where the checkpoint stands; returns the records until then."""
    state, records = run.read_epochs()
    try:
        trainer.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{run.checkpoint} doesn't fit the run in {run.path / 'config.json'}: {reason}"
        ) from error
    return records


def train(
    run: RunFolder, trainer: Trainer, records: list[Record], validation: ImageSet, start: float
) -> None:
    """Iterates to the end, evaluates and writes checkpoints on the way; a record an iteration.

    Raises:
        TrainingError: the loss is not finite.
    """
    whole = copy.deepcopy(trainer.state_dict())  # after the last whole iteration
    done = len(records)
    try:
        with tqdm(
            total=trainer.config.iterations, initial=done, disable=None, desc=run.path.name
        ) as bar:
            while trainer.iteration < trainer.config.iterations:
                records.append(_iterate(trainer, validation, bar, start))
                whole, done = copy.deepcopy(trainer.state_dict()), len(records)
                last = done == trainer.config.iterations
                if done % trainer.config.checkpoint_every == 0 or last:
                    run.save_epoch(whole, records)
    except KeyboardInterrupt as stopped:
        run.save_epoch(whole, records[:done])
        stopped.add_note(f"iteration {done} is saved")
        raise


def _iterate(trainer: Trainer, validation: ImageSet, bar: tqdm, start: float) -> Record:
    """Learns once, evaluates when it is time to; returns the record."""
    config = trainer.config
    record: Record = trainer.iterate()
    iteration = trainer.iteration
    if not math.isfinite(record["loss"]):
        raise TrainingError(f"the loss of iteration {iteration} is not finite: lower --lr")
    bar.update()
    bar.set_postfix_str(f"loss {record['loss']:.3f} kept {record['keep_ratio']:.3f}")
    if iteration % config.eval_every == 0 or iteration == config.iterations:
        pruned = PrunedViT(trainer.backbone, trainer.policy)
        result = evaluate(pruned, validation, config.eval_size)
        record["validation_accuracy"] = result.accuracy
        record["validation_gmacs"] = result.gmacs
        bar.write(
            f"iteration {iteration}: validation accuracy {result.accuracy:.4f} "
            f"gmacs {result.gmacs:.4f}"
        )
    return record | {"iteration": iteration, "seconds": time.monotonic() - start}


def _write_networks(folder: Path, trainer: Trainer) -> None:
    """Writes the predictors, and the backbone where it was trained."""
    policy, config, model = trainer.policy, trainer.config, trainer.backbone.model
    weights = {key: value.detach().cpu() for key, value in policy.state_dict().items()}
    write_atomically(folder / "policy.safetensors", partial(Path.write_bytes, data=save(weights)))
    if config.fine_tune:
        described: dict[str, Any] = {}
        if config.checkpoint is not None:
            described = read_description(config.checkpoint, config.backbone)
        write = partial(
            write_weights,
            weights=model.state_dict(),
            name=config.backbone,
            num_classes=model.num_classes,
            model_kwargs=described.get("model_kwargs", {}) | config.model_kwargs,
        )
        write_atomically(folder / "backbone.safetensors", write)


def format_report(report: dict[str, Any]) -> str:
    """What the end of a run prints."""
    dense, pruned = report["policies"]["dense"], report["policies"]["dynamic-vit"]
    kept = " ".join(f"{100 * share:.0f}" for share in pruned["kept"])
    return (
        f"validation: dense {100 * dense['accuracy']:.2f}% at {dense['gmacs']:.4f} GMACs, "
        f"pruned {100 * pruned['accuracy']:.2f}% at {pruned['gmacs']:.4f}\n"
        f"of dense: {pruned['gmacs'] / dense['gmacs']:.1%} of the GMACs, "
        f"{pruned['policy_gmacs'] / dense['gmacs']:.1%} of them the policy's own; "
        f"patches kept, % after each stage: {kept}\n"
        f"{report['seconds']:.0f} s, seed {report['seed']}"
    )


def main(arguments: list[str] | None = None) -> None:
    """``python -m trainers.dynamic_vit``."""
    with ends_in_one_line(CheckpointError, TrainingError, ValueError, OSError):
        config = tyro.cli(DynamicViTConfig, args=arguments, prog="python -m trainers.dynamic_vit")
        print(format_report(execute(config)))
