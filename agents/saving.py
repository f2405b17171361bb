"""Saves a ``PrunedViT``: its weights as safetensors, everything else as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunevit.agents.policies.policy import Policy
from prunevit.agents.policies.serialization import SavedModelError, describe_policy, make_policy
from prunevit.envs.old_names import rename_parameters, rename_settings
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import BackboneError
from prunevit.versions import version_of

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# arguments of a backbone that can be read off the built model
SHOWN_KWARGS = ("num_classes", "in_chans", "global_pool")
# the part of timm's data configuration by which images are prepared
DATA_KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def write(
    folder: Path,
    backbone: StagedViT,
    policy: Policy,
    model_kwargs: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> None:
    """Writes ``config.json`` and ``model.safetensors`` to ``folder``.

    Raises:
        SavedModelError: policies of this class can't be saved, or the backbone can't be rebuilt
            from its name and ``model_kwargs``.
    """
    config = {
        "format": FORMAT,
        "backbone": describe_backbone(backbone, model_kwargs),
        "prune_before": list(backbone.prune_before),
        "policy": describe_policy(policy),
        "versions": {name: version_of(name) for name in ("prunevit", "timm", "torch")},
    }
    # safetensors refuses tensors that share memory or are not contiguous
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in weights.items()}
    save_file(copies, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def describe_backbone(backbone: StagedViT, model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Finds the name and arguments with which ``create_backbone`` builds the same architecture.

    Raises:
        SavedModelError: they build another one.
    """
    model = backbone.model
    pretrained_cfg: Mapping[str, Any] = model.pretrained_cfg
    name = pretrained_cfg["architecture"]
    kwargs = {key: getattr(model, key) for key in SHOWN_KWARGS}
    kwargs["img_size"] = list(backbone.image_shape[1:])
    kwargs |= model_kwargs
    again = build(name, kwargs).state_dict()
    own = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if {key: tensor.shape for key, tensor in again.items()} != own:
        raise SavedModelError(
            f"the backbone is not what its name and arguments build, {name} with {kwargs}: "
            "give prune(..., model_kwargs={...}) the arguments it was made with"
        )
    data_config = {key: pretrained_cfg[key] for key in DATA_KEYS if key in pretrained_cfg}
    return {"name": name, "kwargs": kwargs, "data_config": data_config}


def build(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Builds a backbone whose weights will be overwritten, without touching random numbers."""
    arguments = dict(kwargs)
    if isinstance(arguments.get("img_size"), list):
        arguments["img_size"] = tuple(arguments["img_size"])
        if len(set(arguments["img_size"])) == 1:
            arguments["img_size"] = arguments["img_size"][0]
    with torch.random.fork_rng(devices=[]):
        return create_backbone(name, untrained=True, **arguments)


def locate(name: str, hub_options: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """Finds the configuration and the weights file of a folder, or of a name on the hub.

    Raises:
        SavedModelError: files are missing or damaged, or the hub can't be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        config, weights = folder / CONFIG, folder / WEIGHTS
    else:
        try:
            config, weights = (
                Path(hf_hub_download(repo_id=name, filename=file, **hub_options))
                for file in (CONFIG, WEIGHTS)
            )
        # the hub, the network and invalid names raise errors of many kinds
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SavedModelError(
                f"{name!r} is no local folder, and can't be fetched from the hub: {reason}"
            ) from error
    for file in (config, weights):
        if not file.is_file():
            raise SavedModelError(f"{folder} holds no pruned ViT: {file.name} is missing")
    return read_json(config), weights


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; raises SavedModelError if ``file`` has none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SavedModelError(f"{file} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise SavedModelError(f"{file} holds no JSON object")
    return rename_settings(config)


def rebuild(config: Mapping[str, Any]) -> tuple[StagedViT, Policy, dict[str, Any]]:
    """Builds the backbone and the policy of a configuration, without their weights.

    Returns:
        the backbone, the policy, and the arguments that the backbone was built with.

    Raises:
        SavedModelError: the configuration is damaged or of another version.
    """
    if config.get("format") != FORMAT:
        raise SavedModelError(
            f"the model was written in format {config.get('format')!r}, this version reads {FORMAT}"
        )
    try:
        described = config["backbone"]
        model = build(described["name"], described["kwargs"])
        model.pretrained_cfg = {  # type: ignore[assignment]
            **model.pretrained_cfg,  # type: ignore[dict-item]
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in described["data_config"].items()
            },
        }
        backbone = StagedViT(model, config["prune_before"])
        policy = make_policy(config["policy"], backbone)
    except BackboneError as error:
        made_by = config.get("versions", {}).get("timm")
        raise SavedModelError(
            f"{error} (the model was written with timm {made_by}, here is {version_of('timm')})"
        ) from error
    except (KeyError, TypeError) as error:
        raise SavedModelError(f"the model's configuration is damaged: {error!r}") from error
    return backbone, policy, described["kwargs"]


def load_weights(module: nn.Module, file: Path) -> None:
    """Loads the weights of ``module`` from a safetensors file.

    Raises:
        SavedModelError: the file is damaged, or has the weights of another module.
    """
    try:
        weights = rename_parameters(load_file(file))
    except (SafetensorError, OSError) as error:
        raise SavedModelError(f"{file} is damaged: {error}") from error
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise SavedModelError(f"{file} doesn't fit its configuration: {reason}") from error
