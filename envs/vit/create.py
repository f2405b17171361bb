"""Backbones: the embedded ViT for the digits, and any timm model by name."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.envs.data import digits
from prunevit.envs.old_names import rename_metadata

ASSETS = Path(__file__).parents[1] / "assets"
DIGITS_VIT = "digits_vit"
DESCRIPTION = "prunevit-backbone"  # key of the weights file's metadata
HUB_PREFIXES = ("hf-hub:", "hf_hub:")


class BackboneError(ValueError):
    """A backbone that is unknown, can't be built or can't be loaded; the message says why."""


class ConvStem(nn.Module):
    """Patch embedding by strided 3x3 convolutions.

    After "Early Convolutions Help Transformers See Better" (arXiv 2106.14881). Takes the place of
    timm's ``PatchEmbed`` as ``embed_layer``: [B, C, H, W] -> [B, patches, embed_dim].

    Args:
        convs: 3x3 convolutions at each scale, the first of which halves the image.
    """

    def __init__(
        self,
        img_size: int = 64,
        patch_size: int = 8,
        in_chans: int = 1,
        embed_dim: int = 128,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        convs: int = 1,
        **factory: Any,
    ) -> None:
        super().__init__()
        if patch_size & (patch_size - 1) or img_size % patch_size:
            raise ValueError(
                f"ConvStem needs a patch size that is a power of two and divides the image: "
                f"got patch_size={patch_size}, img_size={img_size}"
            )
        if dynamic_img_pad:
            raise ValueError("ConvStem takes images of one size: dynamic_img_pad must be False")
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        halvings = patch_size.bit_length() - 1
        layers: list[nn.Module] = []
        channels = in_chans
        for i in range(halvings):
            width = 3 * embed_dim // 4 // 2 ** (halvings - 1 - i)
            for conv in range(convs):
                stride = 1 if conv else 2
                layers += [
                    nn.Conv2d(channels, width, 3, stride, padding=1, bias=False, **factory),
                    nn.BatchNorm2d(width, **factory),
                    nn.GELU(),
                ]
                channels = width
        layers.append(nn.Conv2d(channels, embed_dim, 1, bias=bias, **factory))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.img_size:
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} pixels, the model takes {self.img_size}"
            )
        if self.training:
            return self.layers(images).flatten(2).transpose(1, 2)
        features = images
        for i in range(0, len(self.layers) - 1, 3):
            conv, norm, activation = self.layers[i : i + 3]
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            features = activation(_conv_with_norm(features, conv, norm))
        return self.layers[-1](features).flatten(2).transpose(1, 2)


# names of embed_layer where arguments are JSON
STEMS = {"conv_stem": ConvStem, "deep_conv_stem": partial(ConvStem, convs=2)}


def _conv_with_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """``norm(conv(x))`` with fixed statistics, as one convolution: scaling its few weights costs
    less than another pass over its large output.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight, bias = conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


def build_digits_vit(num_classes: int = 10, **kwargs: Any) -> VisionTransformer:
    """The untrained ViT for the digits: 64 patches of 8x8 pixels, 8 blocks, 1.1M parameters.

    Args:
        num_classes: outputs of the head.
        kwargs: what the ``VisionTransformer`` shall have otherwise.
    """
    arguments: dict[str, Any] = {
        "img_size": digits.IMAGE_SIZE,
        "patch_size": 8,
        "in_chans": 1,
        "embed_dim": 128,
        "depth": 8,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "embed_layer": ConvStem,
    }
    model = VisionTransformer(num_classes=num_classes, **(arguments | kwargs))
    model.pretrained_cfg = {
        "architecture": DIGITS_VIT,
        "input_size": (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE),
        "mean": (digits.PIXEL_MEAN,),
        "std": (digits.PIXEL_STD,),
        "num_classes": num_classes,
    }
    return model


def create_backbone(
    name: str = DIGITS_VIT,
    pretrained: bool = False,
    checkpoint: Path | str | None = None,
    num_classes: int | None = None,
    untrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Builds a backbone, in evaluation mode on the CPU; ``pretrained_cfg`` fits what was built.

    Args:
        name: "digits_vit", or any name that ``timm.create_model`` takes.
        pretrained: download timm's weights; nothing else here uses the network. "digits_vit" has
            its trained weights in the package, and with them it comes, whatever stands here.
        checkpoint: local weights instead: safetensors, or a PyTorch file of plain tensors. A file
            that ``trainers.backbone`` wrote knows its ``num_classes`` and ``kwargs``.
        num_classes: outputs of the head; the model's own where None.
        untrained: leave the weights random, even those of "digits_vit".
        kwargs: further arguments of the model, as ``img_size``, ``patch_size`` or ``depth``;
            ``embed_layer`` also takes the names of ``STEMS``.

    Raises:
        BackboneError: the name or an argument is unknown, weights can't be downloaded, or the
            checkpoint is missing, damaged or of another model.
    """
    if (checkpoint is not None) + pretrained + untrained > 1:
        raise BackboneError("of checkpoint, pretrained and untrained, choose one")
    file = None if checkpoint is None else Path(checkpoint)
    if name == DIGITS_VIT and file is None and not untrained:
        file = _shipped_weights()
    described = {} if file is None else read_description(file, name)
    kwargs = described.get("model_kwargs", {}) | kwargs
    if num_classes is None:
        num_classes = described.get("num_classes")
    stem = kwargs.get("embed_layer")
    if isinstance(stem, str):
        if stem not in STEMS:
            raise BackboneError(f"unknown embed_layer {stem!r}: choose from {', '.join(STEMS)}")
        kwargs["embed_layer"] = STEMS[stem]
    model = _build(name, pretrained, num_classes, kwargs)
    _fit_data_config(model, kwargs)
    if file is not None:
        _load(model, name, file)
    return model.eval()


def write_weights(
    path: Path,
    weights: Mapping[str, Tensor],
    name: str,
    num_classes: int,
    model_kwargs: Mapping[str, Any],
) -> None:
    """Writes a state dict as safetensors, with what ``create_backbone`` needs to rebuild its model.

    Args:
        path: the file to write.
        weights: the model's state dict.
        name: as for ``create_backbone``, like ``num_classes`` and ``model_kwargs``.
        num_classes: outputs of the head.
        model_kwargs: JSON values only.
    """
    description = {"backbone": name, "num_classes": num_classes, "model_kwargs": dict(model_kwargs)}
    # safetensors refuses tensors that share memory, and those that are not contiguous
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in weights.items()}
    path.write_bytes(save(copies, {DESCRIPTION: json.dumps(description, sort_keys=True)}))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shipped_weights() -> Path:
    weights, facts = ASSETS / f"{DIGITS_VIT}.safetensors", ASSETS / f"{DIGITS_VIT}.json"
    for path in (weights, facts):
        if not path.is_file():
            raise BackboneError(f"{path} is missing: install the package again")
    expected = json.loads(facts.read_text(encoding="utf-8"))["sha256"]
    if sha256(weights) != expected:
        raise BackboneError(f"{weights} is not the file that {facts.name} describes")
    return weights


def read_description(path: Path, name: str) -> dict[str, Any]:
    """What ``write_weights`` noted beside the weights; empty for a file of another origin.

    Raises:
        BackboneError: there is no such file, it is damaged, or of another backbone than ``name``.
    """
    if not path.is_file():
        raise BackboneError(f"no checkpoint {path}")
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads(rename_metadata(file.metadata() or {}).get(DESCRIPTION, "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise BackboneError(f"the checkpoint {path} is damaged: {error}") from error
    if described.get("backbone", name) != name:
        raise BackboneError(
            f"the checkpoint {path} holds the backbone {described['backbone']}, not {name}"
        )
    return described


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
    # models, and the downloads behind timm, have errors of their own kinds
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
    if name.startswith(HUB_PREFIXES) and not pretrained:
        raise BackboneError(f"{name} lies on a hub: only pretrained=True may use the network")
    architecture = name.split(".")[0]
    if ":" in name or timm.is_model(architecture):
        return
    known = [DIGITS_VIT, *timm.list_models()]
    near = [model for model in known if architecture and architecture in model][:5]
    near = near or difflib.get_close_matches(architecture, known, n=5)
    hint = f"near it are {', '.join(near)}" if near else "timm.list_models() has the names"
    raise BackboneError(f"unknown backbone {name!r}: {hint}")


def _fit_data_config(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Puts the size and the channels that were asked for where timm's data configuration looks."""
    config: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    channels, *size = config.get("input_size") or (3, 224, 224)
    img_size = kwargs.get("img_size", size)
    size = list(img_size) if isinstance(img_size, Sequence) else [img_size, img_size]
    wanted = kwargs.get("in_chans", channels)
    config["input_size"] = (wanted, *size)
    if wanted != channels:
        for key in ("mean", "std"):
            config[key] = (sum(config[key]) / len(config[key]),) * wanted
    model.pretrained_cfg = config  # type: ignore[assignment]


def _load(model: nn.Module, name: str, path: Path) -> None:
    try:
        weights = load_state_dict(str(path), weights_only=True)
        shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    # PyTorch reports files that are cut off, not its own, or not of tensors, as any of these
    except (
        SafetensorError,
        UnpicklingError,
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"the checkpoint {path} is damaged, or not a file of plain tensors: {reason}"
        ) from error
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    differences = [
        f"{key} is {shapes[key]} in the file and {own[key]} in the model"
        for key in own.keys() & shapes.keys()
        if own[key] != shapes[key]
    ]
    differences += [f"{key} is missing in the file" for key in own.keys() - shapes.keys()]
    differences += [f"{key} is unknown to the model" for key in shapes.keys() - own.keys()]
    if differences:
        more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
        raise BackboneError(
            f"the checkpoint {path} doesn't fit {name}: {'; '.join(sorted(differences)[:3])}{more}"
        )
    model.load_state_dict(weights)
