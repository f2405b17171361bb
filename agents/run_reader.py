"""Reads the policy and the backbone of a finished training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prunevit.agents.policies.policy import Policy
from prunevit.agents.policies.serialization import (
    SavedModelError,
    dynamic_vit_policy,
    learned_policy,
    read_calibration,
)
from prunevit.agents.saving import CONFIG, load_weights, read_json
from prunevit.envs.vit.create import check_described, create_backbone
from prunevit.envs.vit.described import size_problem
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import BackboneError, read_description, sha256

CHECKPOINT_SHA256 = "checkpoint_sha256"  # beside the settings, of the weights that were pruned
RUN_WEIGHTS = "policy.safetensors"
RUN_CALIBRATION = "calibration.json"
RUN_BACKBONE = "backbone.safetensors"  # if the run trained its backbone too


def default_alpha(config: Mapping[str, Any]) -> float | None:
    """The default alpha of a policy trained with ``config``, None if it doesn't observe alpha.

    It is the geometric mean of the lowest and the highest alpha of the training.
    """
    if "alpha" not in config["observation"]:
        return None
    low, high = config["alpha_range"]
    return math.sqrt(low * high)


def read_run(
    folder: Path, hub_backbone: str | None = None
) -> tuple[StagedViT, Policy, dict[str, Any]]:
    """Reads a finished run of ``trainers.mappo``, ``straight_through`` or ``dynamic_vit``.

    Args:
        folder: the run's; its files may come from a stranger.
        hub_backbone: the run's backbone, if it is to be fetched from a hub.

    Returns:
        the backbone, the trained policy, and the arguments that the backbone was built with.

    Raises:
        SavedModelError: the folder has no finished run of the token game, its files are damaged,
            or the weights of its backbone were random and are lost, or are not the same any more.
        BackboneError: the backbone can't be built or loaded, or is nothing that a file may choose.
    """
    for name in (CONFIG, RUN_WEIGHTS):
        if not (folder / name).is_file():
            raise SavedModelError(f"{folder} holds no finished run: {name} is missing")
    config = read_json(folder / CONFIG)
    try:
        if config.get("policy") == "dynamic-vit":
            backbone, kwargs = _run_backbone(folder, config, hub_backbone, config["fine_tune"])
            make: Callable[[], Any] = partial(
                dynamic_vit_policy, backbone, config["keep"], config["hidden"]
            )
        elif config["env"] != "token-prune":
            raise SavedModelError(f"{folder} is a run of {config['env']}, which prunes no ViT")
        else:
            num_classes = 0 if config.get("accuracy") == "embedding" else None
            backbone, kwargs = _run_backbone(folder, config, hub_backbone, False, num_classes)
            make = partial(
                learned_policy,
                backbone,
                config["observation"],
                config["hidden"],
                bool(config["attention_prior"]),
                default_alpha(config),
                # runs of before 0.2 have neither
                config.get("actor_attention", 0),
                bool(config.get("redundancy_prior", 0)),
            )
        problem = size_problem(make, folder / RUN_WEIGHTS)
        if problem is not None:
            raise SavedModelError(problem)
        policy = make()
    except (KeyError, TypeError) as error:
        raise SavedModelError(f"{folder / CONFIG} is damaged: {error!r}") from error
    load_weights(getattr(policy, "actor", policy), folder / RUN_WEIGHTS)
    calibration = folder / RUN_CALIBRATION
    if calibration.is_file():  # runs of before have none
        policy.calibration = read_calibration(read_json(calibration))
    return backbone, policy, kwargs


def _run_backbone(
    folder: Path,
    config: Mapping[str, Any],
    hub_backbone: str | None,
    was_trained: bool = False,
    num_classes: int | None = None,
) -> tuple[StagedViT, dict[str, Any]]:
    """Builds the backbone of a run, with the run's own weights if it ``was_trained``."""
    name, kwargs = config["backbone"], config["model_kwargs"]
    if ":" in name and name != hub_backbone:
        raise BackboneError(
            f"{folder} has its backbone from {name}: no file may choose that, so call "
            f"from_run(..., hub_backbone={name!r}) if you trust it"
        )
    check_described(DIGITS_VIT if name == hub_backbone else name, kwargs)
    pretrained, checkpoint = config["pretrained"], config["checkpoint"]
    if was_trained:
        pretrained, checkpoint = False, folder / RUN_BACKBONE
    if not pretrained and checkpoint is None and name != DIGITS_VIT:
        raise SavedModelError(
            f"{folder}: the backbone {name} had random weights, which were not kept"
        )
    if checkpoint is not None:
        kwargs = read_description(Path(checkpoint), name).get("model_kwargs", {}) | kwargs
    model = create_backbone(
        name, pretrained=pretrained, checkpoint=checkpoint, num_classes=num_classes, **kwargs
    )
    digest = None if was_trained or checkpoint is None else config.get(CHECKPOINT_SHA256)
    if digest is not None and sha256(Path(checkpoint)) != digest:
        raise SavedModelError(
            f"{checkpoint} holds other weights than those that {folder} learned to prune: put them "
            "back, or train again"
        )
    # older runs have neither
    prune_at, on_prune = config.get("prune_at", "block"), config.get("on_prune", "drop")
    staged = StagedViT(model, config["prune_before"], prune_at=prune_at, on_prune=on_prune)
    return staged, kwargs
