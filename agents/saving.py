"""``PrunedViT`` on disk: its weights as safetensors, all else as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunevit.agents.policies.actor_critic import LearnedPolicy, TokenActor
from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.agents.policies.heuristics import AdaptiveSampling, AttentionThreshold, KeepAll, TopK
from prunevit.agents.policies.policy import Policy
from prunevit.envs.observations import field_slices
from prunevit.envs.old_names import rename_parameters, rename_settings
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import BackboneError, read_description
from prunevit.versions import version_of

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
RUN_WEIGHTS = "policy.safetensors"
RUN_BACKBONE = "backbone.safetensors"  # where the run trained its backbone too
# of a backbone's arguments, those that the built model shows
SHOWN_KWARGS = ("num_classes", "in_chans", "global_pool")
# policies without weights: their arguments are all there is to them, and attributes too
PLAIN_POLICIES: dict[str, tuple[type, tuple[str, ...]]] = {
    "keep-all": (KeepAll, ()),
    "top-k": (TopK, ("tokens", "score", "seed")),
    "threshold": (AttentionThreshold, ("thresholds",)),
    "adaptive-sampling": (AdaptiveSampling, ("samples",)),
}
# of timm's data configuration, what images are prepared by
DATA_KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


class SavedModelError(ValueError):
    """A model that can't be written, or files that hold none; the message says why."""


def write(
    folder: Path,
    backbone: StagedViT,
    policy: Policy,
    model_kwargs: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> None:
    """Writes ``config.json`` and ``model.safetensors`` to ``folder``.

    Raises:
        SavedModelError: the policy is of a kind that has no JSON form, or the backbone can't be
            built anew from its name and ``model_kwargs``.
    """
    config = {
        "format": FORMAT,
        "backbone": describe_backbone(backbone, model_kwargs),
        "prune_before": list(backbone.prune_before),
        "policy": describe_policy(policy),
        "versions": {name: version_of(name) for name in ("prunevit", "timm", "torch")},
    }
    # safetensors refuses tensors that share memory, and those that are not contiguous
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in weights.items()}
    save_file(copies, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def describe_backbone(backbone: StagedViT, model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name and arguments with which ``create_backbone`` builds the like of ``backbone``."""
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
    """The backbone with weights that are to be overwritten."""
    arguments = dict(kwargs)
    if isinstance(arguments.get("img_size"), list):
        arguments["img_size"] = tuple(arguments["img_size"])
        if len(set(arguments["img_size"])) == 1:
            arguments["img_size"] = arguments["img_size"][0]
    with torch.random.fork_rng(devices=[]):
        return create_backbone(name, untrained=True, **arguments)


def describe_policy(policy: Policy) -> dict[str, Any]:
    """``policy`` as JSON values; the weights of one that learned stand elsewhere."""
    for kind, (plain, arguments) in PLAIN_POLICIES.items():
        if type(policy) is plain:
            return {"kind": kind} | {name: getattr(policy, name) for name in arguments}
    if isinstance(policy, LearnedPolicy) and isinstance(policy.actor, TokenActor):
        return {
            "kind": "learned",
            "observation": list(policy.fields),
            "hidden": list(policy.actor.hidden),
            "attention_prior": policy.actor.attention is not None,
            "alpha": policy.alpha,
            "threshold": policy.threshold,
            "dither": policy.dither,
        }
    if isinstance(policy, DynamicViTPolicy):
        return {"kind": "dynamic-vit", "keep": policy.keep, "hidden": policy.hidden}
    raise SavedModelError(
        f"a {type(policy).__name__} has no form on disk: LearnedPolicy, DynamicViTPolicy and "
        f"{', '.join(plain.__name__ for plain, _ in PLAIN_POLICIES.values())} have"
    )


def make_policy(described: Mapping[str, Any], backbone: StagedViT) -> Policy:
    """The policy of ``describe_policy``, its weights untrained."""
    kind = described["kind"]
    if kind in PLAIN_POLICIES:
        plain, arguments = PLAIN_POLICIES[kind]
        return plain(**{name: described[name] for name in arguments})
    if kind == "dynamic-vit":
        return dynamic_vit_policy(backbone, described["keep"], described["hidden"])
    if kind != "learned":
        raise SavedModelError(f"unknown kind of policy {kind!r}: of another version?")
    policy = learned_policy(
        backbone,
        described["observation"],
        described["hidden"],
        described["attention_prior"],
        described.get("alpha"),
    )
    policy.threshold = described.get("threshold", 0.5)
    policy.dither = described.get("dither", False)
    return policy


def learned_policy(
    backbone: StagedViT,
    observation: Sequence[str],
    hidden: Sequence[int],
    with_prior: bool,
    alpha: float | None = None,
) -> LearnedPolicy:
    """An untrained policy of that form for ``backbone``."""
    slices = field_slices(backbone, observation)
    size = max(part.stop for part in slices.values())
    attention = slices["cls_attention"].start if with_prior else None
    price = slices["alpha"].start if "alpha" in slices else None
    with torch.random.fork_rng(devices=[]):
        actor = TokenActor(size, hidden, attention, alpha=price)
        return LearnedPolicy(actor, observation, backbone.num_prefix, alpha)


def dynamic_vit_policy(
    backbone: StagedViT, keep: float, hidden: int, seed: int = 0
) -> DynamicViTPolicy:
    """An untrained policy of that form for ``backbone``; ``seed`` draws its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DynamicViTPolicy(backbone.width, backbone.num_stages, keep, hidden)


def locate(name: str, hub_options: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """The configuration, and the file of weights, of a folder or of a name on the hub."""
    folder = Path(name)
    if folder.is_dir():
        config, weights = folder / CONFIG, folder / WEIGHTS
    else:
        try:
            config, weights = (
                Path(hf_hub_download(repo_id=name, filename=file, **hub_options))
                for file in (CONFIG, WEIGHTS)
            )
        # the hub, the network below it and names that can't be on it fail in ways of their own
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
    """A JSON object; raises SavedModelError where ``file`` holds none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SavedModelError(f"{file} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise SavedModelError(f"{file} holds no JSON object")
    return rename_settings(config)


def rebuild(config: Mapping[str, Any]) -> tuple[StagedViT, Policy, dict[str, Any]]:
    """Backbone and policy of a configuration, their weights still to be loaded, and the backbone's
    arguments.
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
    """Fills ``module`` from a safetensors file.

    Raises:
        SavedModelError: the file is damaged, or holds the weights of another module.
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


def middle_alpha(config: Mapping[str, Any]) -> float | None:
    """The price that a policy trained by ``config`` acts under unless it is told another: the
    middle, on a scale of ratios, of those it was trained for. None where it observes none.
    """
    if "alpha" not in config["observation"]:
        return None
    low, high = config["alpha_range"]
    return math.sqrt(low * high)


def read_run(folder: Path) -> tuple[StagedViT, Policy, dict[str, Any]]:
    """Backbone, trained policy and the backbone's arguments of a run of ``trainers.mappo`` or
    ``trainers.dynamic_vit``.
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
            middle_alpha(config),
        )
    except (KeyError, TypeError) as error:
        raise SavedModelError(f"{folder / CONFIG} is damaged: {error!r}") from error
    load_weights(policy.actor, folder / RUN_WEIGHTS)
    return backbone, policy, kwargs


def _run_backbone(
    folder: Path, config: Mapping[str, Any], was_trained: bool = False
) -> tuple[StagedViT, dict[str, Any]]:
    """The backbone of a run and its arguments; the run's own weights where it ``was_trained``."""
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
