"""Reads the policy and the backbone of a finished training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunevit.agents.policies.policy import Policy
from prunevit.agents.policies.serialization import (
    SavedModelError,
    dynamic_vit_policy,
    learned_policy,
)
from prunevit.agents.saving import CONFIG, load_weights, read_json
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import read_description

RUN_WEIGHTS = "policy.safetensors"
RUN_BACKBONE = "backbone.safetensors"  # if the run trained its backbone too


def default_alpha(config: Mapping[str, Any]) -> float | None:
    """The default alpha of a policy trained with ``config``, None if it doesn't observe alpha.

    It is the geometric mean of the lowest and the highest alpha of the training.
    """
    if "alpha" not in config["observation"]:
        return None
    low, high = config["alpha_range"]
    return math.sqrt(low * high)


def read_run(folder: Path) -> tuple[StagedViT, Policy, dict[str, Any]]:
    """Reads a finished run of ``trainers.mappo`` or ``trainers.dynamic_vit``.

    Returns:
        the backbone, the trained policy, and the arguments that the backbone was built with.

    Raises:
        SavedModelError: the folder has no finished run of the token game, its files are damaged,
            or the weights of its backbone were random and are lost.
        BackboneError: the backbone can't be built or loaded.
    """
    for name in (CONFIG, RUN_WEIGHTS):
        if not (folder / name).is_file():
            raise SavedModelError(f"{folder} holds no finished run: {name} is missing")
    config = read_json(folder / CONFIG)
    try:
        if config.get("policy") == "dynamic-vit":
            backbone, kwargs = _run_backbone(folder, config, config["fine_tune"])
            predictors = dynamic_vit_policy(backbone, config["keep"], config["hidden"])
            load_weights(predictors, folder / RUN_WEIGHTS)
            return backbone, predictors, kwargs
        if config["env"] != "token-prune":
            raise SavedModelError(f"{folder} is a run of {config['env']}, which prunes no ViT")
        backbone, kwargs = _run_backbone(folder, config)
        policy = learned_policy(
            backbone,
            config["observation"],
            config["hidden"],
            bool(config["attention_prior"]),
            default_alpha(config),
        )
    except (KeyError, TypeError) as error:
        raise SavedModelError(f"{folder / CONFIG} is damaged: {error!r}") from error
    load_weights(policy.actor, folder / RUN_WEIGHTS)
    return backbone, policy, kwargs


def _run_backbone(
    folder: Path, config: Mapping[str, Any], was_trained: bool = False
) -> tuple[StagedViT, dict[str, Any]]:
    """Builds the backbone of a run, with the run's own weights if it ``was_trained``."""
    name, kwargs = config["backbone"], config["model_kwargs"]
    pretrained, checkpoint = config["pretrained"], config["checkpoint"]
    if was_trained:
        pretrained, checkpoint = False, folder / RUN_BACKBONE
    if not pretrained and checkpoint is None and config["dataset"] != "digits":
        raise SavedModelError(
            f"{folder}: the backbone {name} had random weights, which were not kept"
        )
    if checkpoint is not None:
        kwargs = read_description(Path(checkpoint), name).get("model_kwargs", {}) | kwargs
    model = create_backbone(name, pretrained=pretrained, checkpoint=checkpoint, **kwargs)
    return StagedViT(model, config["prune_before"]), kwargs
