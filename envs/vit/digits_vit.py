"""The small ViT for scanned digits, whose trained weights come with the package."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.envs.vit.weights import BackboneError, sha256

DIGITS_VIT = "digits_vit"
ASSETS = Path(__file__).parents[1] / "assets"
# size and normalisation of the images in envs/data/digits.py
IMAGE_SIZE = 64
PIXEL_MEAN, PIXEL_STD = 0.4, 0.25


class ConvStem(nn.Module):
    """Patch embedding by strided 3x3 convolutions, [B, C, H, W] -> [B, patches, embed_dim].

    From "Early Convolutions Help Transformers See Better" (arXiv 2106.14881). Pass it as
    ``embed_layer`` to use it instead of timm's ``PatchEmbed``.

    Args:
        img_size: side of the images, pixels.
        patch_size: side of a patch, pixels; a power of two that divides ``img_size``.
        in_chans: C.
        embed_dim: D.
        bias: whether the last layer has a bias.
        dynamic_img_pad: must be False.
        convs: number of 3x3 convolutions at each scale. The first of them halves the image.
        factory: device and dtype of the parameters.

    Raises:
        ValueError: the patch size doesn't fit, or padding is asked for.
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


def _conv_with_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Computes ``norm(conv(x))`` with fixed statistics as one convolution.

    Scaling the few weights costs less than another pass over the large output.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight, bias = conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


# names that ``embed_layer`` has in JSON
STEMS = {"conv_stem": ConvStem, "deep_conv_stem": partial(ConvStem, convs=2)}


def build_digits_vit(num_classes: int = 10, **kwargs: Any) -> VisionTransformer:
    """Builds the untrained ViT for the digits: 64 patches of 8x8 pixels, 8 blocks, 1.1M parameters.

    Args:
        num_classes: outputs of the head.
        kwargs: arguments of ``VisionTransformer`` that differ from the defaults.
    """
    arguments: dict[str, Any] = {
        "img_size": IMAGE_SIZE,
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
        "input_size": (1, IMAGE_SIZE, IMAGE_SIZE),
        "mean": (PIXEL_MEAN,),
        "std": (PIXEL_STD,),
        "num_classes": num_classes,
        "classifier": "head",
    }
    return model


def shipped_weights() -> Path:
    """Returns the file with the trained weights that the package contains.

    Raises:
        BackboneError: it is missing or damaged.
    """
    weights, facts = ASSETS / f"{DIGITS_VIT}.safetensors", ASSETS / f"{DIGITS_VIT}.json"
    for path in (weights, facts):
        if not path.is_file():
            raise BackboneError(f"{path} is missing: install the package again")
    expected = json.loads(facts.read_text(encoding="utf-8"))["sha256"]
    if sha256(weights) != expected:
        raise BackboneError(f"{weights} is not the file that {facts.name} describes")
    return weights
