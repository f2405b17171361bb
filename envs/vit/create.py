"""``create_backbone``: the ViT for the digits, and any timm model by name."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from prunevit.choices import check_choice
from prunevit.envs.vit.described import description_problem, size_problem
from prunevit.envs.vit.digits_vit import DIGITS_VIT, STEMS, build_digits_vit, shipped_weights
from prunevit.envs.vit.weights import BackboneError, load_weights, read_description


def create_backbone(
    name: str = DIGITS_VIT,
    pretrained: bool = False,
    checkpoint: Path | str | None = None,
    num_classes: int | None = None,
    untrained: bool = False,
    new_head: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Builds a backbone in evaluation mode on the CPU.

    Its ``pretrained_cfg`` describes the model as it was built, image size and channels included.

    Args:
        name: "digits_vit", or any name that ``timm.create_model`` takes; those with a colon, which
            lie on a hub or in a folder, only with ``pretrained``.
        pretrained: download timm's weights, which is the only use of the network here.
            "digits_vit" always has its trained weights, which are part of the package.
        checkpoint: local weights instead: safetensors, or a PyTorch file of plain tensors, under
            timm's names or those that timm knows of the model's authors. Position embeddings are
            resampled to the model's image size. A file that ``trainers.backbone`` wrote contains
            its ``num_classes`` and ``kwargs``.
        num_classes: outputs of the head; the model's own if None. With 0 the model has no head,
            whether its weights have one or not, and gives embeddings.
        untrained: leave the weights random, even those of "digits_vit". Without it, random weights
            cause a warning.
        new_head: begin with a random head, with a warning, if the checkpoint has none of this size.
        kwargs: further arguments of the model, such as ``img_size``, ``patch_size`` or ``depth``.
            ``embed_layer`` may also be a name in ``STEMS``. ``norm_eps`` is the epsilon of all
            layer norms, which timm's models have no argument for.

    Raises:
        BackboneError: the name or an argument is unknown, weights can't be downloaded, or the
            checkpoint is missing, damaged or of another model.
    """
    if (checkpoint is not None) + pretrained + untrained > 1:
        raise BackboneError("of checkpoint, pretrained and untrained, choose one")
    file = None if checkpoint is None else Path(checkpoint)
    if name == DIGITS_VIT and file is None and not untrained:
        file = shipped_weights()
    described = {} if file is None else read_description(file, name)
    kwargs = described.get("model_kwargs", {}) | kwargs
    if num_classes is None:
        num_classes = described.get("num_classes")
    recorded = dict(kwargs)
    # what a file may describe, it may describe too large
    can_be_of_a_file = bool(kwargs) and description_problem(name, kwargs) is None
    stem = kwargs.get("embed_layer")
    if isinstance(stem, str):
        check_choice("embed_layer", stem, STEMS, BackboneError)
        kwargs["embed_layer"] = STEMS[stem]
    norm_eps = kwargs.pop("norm_eps", None)
    if file is not None and can_be_of_a_file:
        problem = size_problem(partial(_build, name, False, num_classes, kwargs), file)
        if problem is not None:
            raise BackboneError(problem)
    model = _build(name, pretrained, num_classes, kwargs)
    if norm_eps is not None:
        for part in model.modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = norm_eps
    # as timm does, for those who build the model again; stems by their names
    vars(model)["_model_args"] = getattr(model, "_model_args", {}) | recorded
    config: dict[str, Any] = {"input_size": (3, 224, 224), **cast(Any, model).pretrained_cfg}
    vars(model)["pretrained_cfg"] = as_built(config, model)
    if num_classes == described.get("num_classes") and "class_names" in described:
        # where timm keeps those of models from the hub
        vars(model)["pretrained_cfg"]["label_names"] = described["class_names"]
    if file is not None:
        load_weights(model, name, file, new_head)
    elif not pretrained and not untrained:
        warnings.warn(
            f"the weights of {name} are random: give pretrained weights or a checkpoint, or a "
            "model of your own, as timm.create_model(..., pretrained=True)",
            stacklevel=2,
        )
    return model.eval()


def check_described(name: object, kwargs: object) -> None:
    """Raises BackboneError for what no file may have built; see ``description_problem``."""
    problem = description_problem(name, kwargs)
    if problem is not None:
        raise BackboneError(problem)


def _build(
    name: str, pretrained: bool, num_classes: int | None, kwargs: Mapping[str, Any]
) -> nn.Module:
    if name != DIGITS_VIT:
        _check_known(name, pretrained)
    if num_classes is not None:
        kwargs = {"num_classes": num_classes, **kwargs}
    try:
        if name == DIGITS_VIT:
            return build_digits_vit(**kwargs)
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    # models, and the downloads behind timm, raise errors of many kinds
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        if pretrained:
            raise BackboneError(
                f"can't get {name}({arguments}) with its pretrained weights: {reason} "
                "(without a network, give local weights as the checkpoint)"
            ) from error
        raise BackboneError(f"can't build {name}({arguments}): {reason}") from error


def _check_known(name: str, pretrained: bool) -> None:
    if ":" in name and not pretrained:
        raise BackboneError(f"{name} names a hub or a folder: only pretrained=True may look there")
    architecture = name.split(".")[0]
    if ":" in name or timm.is_model(architecture):
        return
    known = [DIGITS_VIT, *timm.list_models()]
    near = [model for model in known if architecture and architecture in model][:5]
    near = near or difflib.get_close_matches(architecture, known, n=5)
    hint = f"near it are {', '.join(near)}" if near else "timm.list_models() has the names"
    raise BackboneError(f"unknown backbone {name!r}: {hint}")


def as_built(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """timm's data configuration with the image size and the channels that ``model`` has.

    What timm has describes the pretrained weights, and not a model built with other arguments.
    """
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    channels, *usual = config["input_size"]
    channels = getattr(model, "in_chans", channels)
    config = config | {"input_size": (channels, *(size or usual))}
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config
