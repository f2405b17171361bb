"""Saves a ``PrunedViT``: its weights as safetensors, everything else as JSON."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prunevit.agents.policies.policy import Policy
from prunevit.agents.policies.serialization import (
    SavedModelError,
    check_policy_rebuilds,
    describe_policy,
    make_policy,
)
from prunevit.envs.old_names import rename_parameters, rename_settings
from prunevit.envs.vit.create import check_described, create_backbone
from prunevit.envs.vit.described import (
    DATA_KEYS,
    data_config_problem,
    description_problem,
    size_problem,
)
from prunevit.envs.vit.macs import in_eval_mode
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import some_tensor
from prunevit.envs.vit.weights import BackboneError
from prunevit.versions import version_of

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# what hf_hub_download takes, and what is as true of a local folder
HUB_OPTIONS = {
    "cache_dir", "endpoint", "etag_timeout", "force_download", "local_files_only", "repo_type",
    "revision", "subfolder", "token",
}  # fmt: skip
ANYWHERE_OPTIONS = {"cache_dir", "local_files_only", "token"}
# builds timm's VisionTransformer with the class's own defaults
HAND_BUILT = "vit_base_patch16_224"
# by how much the outputs of a rebuilt model may differ, relative to the largest number; the weights
# are the same, so in practice they don't
PROBE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LARGEST_CONFIG = 1 << 20  # bytes; some hundred are usual


def write(
    folder: Path,
    backbone: StagedViT,
    policy: Policy,
    model_kwargs: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> None:
    """Writes ``config.json`` and ``model.safetensors`` to ``folder``.

    Raises:
        SavedModelError: policies of this class can't be saved, the policy was changed in a way that
            its description doesn't have, the backbone can't be rebuilt from its name and
            ``model_kwargs``, or weights are no plain tensors.
    """
    for name, tensor in weights.items():
        # other things in a quantised model's state are refused below
        if isinstance(tensor, Tensor) and type(tensor.detach()) is not Tensor:
            raise SavedModelError(
                f"{name} is a {type(tensor).__name__}, which safetensors can't hold: save the "
                "model before its weights are quantised or sharded"
            )
    described = describe_policy(policy)
    if isinstance(policy, nn.Module):
        check_policy_rebuilds(policy, make_policy(described, backbone), backbone)
    config = {
        "format": FORMAT,
        "backbone": describe_backbone(backbone, model_kwargs),
        "prune_before": list(backbone.prune_before),
        "prune_at": backbone.prune_at,
        "on_prune": backbone.on_prune,
        "policy": described,
        "versions": {name: version_of(name) for name in ("prunevit", "timm", "torch")},
    }
    # safetensors refuses tensors that share memory or are not contiguous
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in weights.items()}
    save_file(copies, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """Gives a folder to write a model to, and moves its files to ``folder`` once all are there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        scratch = Path(name)
        yield scratch
        # without its configuration the folder holds no model: never new weights beside an old one
        (folder / CONFIG).unlink(missing_ok=True)
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == CONFIG):
            if file.name in (WEIGHTS, CONFIG) or not (folder / file.name).exists():
                file.replace(folder / file.name)


def describe_backbone(backbone: StagedViT, model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Finds the name and arguments with which ``create_backbone`` builds the same model.

    Raises:
        SavedModelError: they build another one.
    """
    model = backbone.model
    pretrained_cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    name = pretrained_cfg.get("architecture")
    if name is None:
        name, recorded = _guess_arguments(model)
    else:
        recorded = getattr(model, "_model_args", {})  # timm's record of how the model was built
    shown = {
        "num_classes": backbone.num_classes,
        "in_chans": backbone.image_shape[0],
        "global_pool": model.global_pool,
        "img_size": list(backbone.image_shape[1:]),
    }
    asked = {**recorded, **model_kwargs, **shown}
    # those that from_pretrained will take: no callables, nothing of timm's loaders
    taken = (key for key in sorted(asked) if not description_problem(name, {key: asked[key]}))
    kwargs = {key: asked[key] for key in taken}
    try:
        _check_rebuilds(model, build(name, kwargs))
    except (BackboneError, SavedModelError) as error:
        left_out = sorted(asked.keys() - kwargs.keys())
        without = f", without {', '.join(left_out)}, which a file can't set" if left_out else ""
        raise SavedModelError(
            f"the backbone is not what its name and arguments build, {name} with {kwargs}"
            f"{without}: {error}. Give prune(..., model_kwargs={{...}}) the arguments it was made "
            "with. Hooks, wrapped and quantised layers can't be saved: remove or merge them, and "
            "add them again after loading"
        ) from error
    data_config = {key: pretrained_cfg[key] for key in DATA_KEYS if key in pretrained_cfg}
    return {"name": name, "kwargs": kwargs, "data_config": data_config}


def _guess_arguments(model: Any) -> tuple[str, dict[str, Any]]:
    """A name and arguments for a ``VisionTransformer`` that timm's factory did not make.

    ``_check_rebuilds`` finds out whether they are right.

    Raises:
        SavedModelError: it is another model.
    """
    if type(model) is not VisionTransformer:
        raise SavedModelError(
            f"a {type(model).__name__} that timm.create_model did not make can't be saved, since "
            "nothing says how to build it: make it by timm.create_model and load its weights"
        )
    block = model.blocks[0]
    arguments: dict[str, Any] = {
        "depth": len(model.blocks),
        "embed_dim": model.embed_dim,
        "num_heads": block.attn.num_heads,
        "patch_size": list(model.patch_embed.patch_size),
        "class_token": model.cls_token is not None,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "qkv_bias": block.attn.qkv.bias is not None,
    }
    if hasattr(block.mlp, "fc1"):
        arguments["mlp_ratio"] = block.mlp.fc1.out_features / model.embed_dim
    return HAND_BUILT, arguments


def _check_rebuilds(model: Any, again: Any) -> None:
    """Checks that ``again`` with the weights of ``model`` is the same model.

    Raises:
        SavedModelError: its weights have other names or shapes, or an image gets another output.
    """
    weights = model.state_dict()
    own = {key: _shape(value) for key, value in weights.items()}
    other = {key: _shape(value) for key, value in again.state_dict().items()}
    if own != other:
        key = min(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
        raise SavedModelError(f"{key} is {own.get(key)} in it, {other.get(key)} in what they build")
    for name, rate in _drop_rates(model).items():
        if _drop_rates(again).get(name) != rate:
            raise SavedModelError(f"{name} drops {rate} in it, not in what they build")
    some = some_tensor(model)
    again.to(some.device, some.dtype).load_state_dict(weights, assign=True)
    shape = (1, model.in_chans, *model.patch_embed.img_size)
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(some)
    with torch.no_grad(), in_eval_mode(model), in_eval_mode(again):
        for ours, rebuilt in zip(_outputs(model, probe), _outputs(again, probe), strict=True):
            tolerance = PROBE_TOLERANCE.get(some.dtype, 1e-2) * ours.abs().max().nan_to_num()
            if not torch.allclose(ours, rebuilt, rtol=0, atol=float(tolerance), equal_nan=True):
                off = float((ours - rebuilt).abs().max())
                raise SavedModelError(f"their outputs on one image are {off:.2g} apart")


def _shape(value: Any) -> tuple[int, ...] | str:
    """Of a weight; a quantised layer has other things in its state too."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _drop_rates(model: nn.Module) -> dict[str, float]:
    """What each layer drops in training, which no output shows in evaluation."""
    rates = {
        name: float(getattr(part, "drop_prob", getattr(part, "p", 0)))
        for name, part in model.named_modules()
        if isinstance(part, nn.Dropout | DropPath)
    }
    return {name: rate for name, rate in rates.items() if rate}


def _outputs(model: Any, image: Tensor) -> list[Tensor]:
    features = model.forward_features(image)
    return [features, model.forward_head(features)]


def build(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Builds a backbone whose weights will be overwritten, without touching random numbers.

    Raises:
        BackboneError: it can't be built, or not from what a file may say.
    """
    check_described(name, kwargs)
    arguments = _with_tuples(kwargs)
    size = arguments.get("img_size")
    if isinstance(size, tuple) and len(set(size)) == 1:
        arguments["img_size"] = size[0]
    with torch.random.fork_rng(devices=[]):
        return create_backbone(name, untrained=True, **arguments)


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values, with tuples where they have lists."""
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }


def locate(name: str, hub_options: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """Finds the configuration and the weights file of a folder, or of a name on the hub.

    Raises:
        SavedModelError: files are missing or damaged, or the hub can't be reached.
        TypeError: an option that would do nothing.
    """
    unknown = hub_options.keys() - HUB_OPTIONS
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: from_pretrained has no such option")
    folder = Path(name)
    if folder.is_dir():
        ignored = [key for key in hub_options if key not in ANYWHERE_OPTIONS]
        if ignored:
            raise TypeError(f"{', '.join(ignored)}: is of the hub, and {name} is a local folder")
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
        if file.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
        config = json.loads(file.read_text(encoding="utf-8"))
    # JSON that is nested too deeply is a RecursionError
    except (OSError, ValueError, RecursionError) as error:
        raise SavedModelError(f"{file} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise SavedModelError(f"{file} holds no JSON object")
    return rename_settings(config)


def rebuild(config: Mapping[str, Any], weights: Path) -> tuple[StagedViT, Policy, dict[str, Any]]:
    """Builds the backbone and the policy of a configuration, without their weights.

    Args:
        config: what ``write`` wrote; it may come from a stranger.
        weights: the file with their weights, which says how large they can be.

    Returns:
        the backbone, the policy, and the arguments that the backbone was built with.

    Raises:
        SavedModelError: the configuration is damaged, of another version, or asks for what no file
            may.
    """
    if config.get("format") != FORMAT:
        raise SavedModelError(
            f"the model was written in format {config.get('format')!r}, this version reads {FORMAT}"
        )
    try:
        described = config["backbone"]
        name, kwargs, data_config = (described[key] for key in ("name", "kwargs", "data_config"))
        _refuse(data_config_problem(data_config))
        _refuse(size_problem(partial(build, name, kwargs), weights))
        model = build(name, kwargs)
        cfg: Any = model.pretrained_cfg
        vars(model)["pretrained_cfg"] = {**cfg, **_with_tuples(data_config)}
        # older models have neither
        prune_at, on_prune = config.get("prune_at", "block"), config.get("on_prune", "drop")
        backbone = StagedViT(model, config["prune_before"], prune_at=prune_at, on_prune=on_prune)
        _refuse(size_problem(partial(make_policy, config["policy"], backbone), weights))
        policy = make_policy(config["policy"], backbone)
    except BackboneError as error:
        made_by = config.get("versions", {}).get("timm")
        raise SavedModelError(
            f"{error} (the model was written with timm {made_by}, here is {version_of('timm')})"
        ) from error
    except (KeyError, TypeError) as error:
        raise SavedModelError(f"the model's configuration is damaged: {error!r}") from error
    return backbone, policy, kwargs


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise SavedModelError(f"the model's configuration is refused: {problem}")


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
