"""Backbones: the embedded ViT for the digits, and any timm model by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenprune.envs import digits

ASSETS = Path(__file__).parent / "assets"
DIGITS_VIT = "digits_vit"


class ConvStem(nn.Module):
    """Patch embedding by strided 3x3 convolutions ("Early Convolutions Help Transformers See Better", 2106.14881).

    Takes the place of timm's ``PatchEmbed`` as ``embed_layer``: [B, C, H, W] -> [B, patches, embed_dim].
    """

    def __init__(
        self,
        img_size: int = 64,
        patch_size: int = 8,
        in_chans: int = 1,
        embed_dim: int = 128,
        bias: bool = True,
        dynamic_img_pad: bool = False,
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
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False, **factory),
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
        return self.layers(images).flatten(2).transpose(1, 2)


def build_digits_vit() -> VisionTransformer:
    """The untrained ViT for the digits: 64 patches of 8x8 pixels, 6 blocks, about 1.2M parameters."""
    model = VisionTransformer(
        img_size=digits.IMAGE_SIZE,
        patch_size=8,
        in_chans=1,
        num_classes=10,
        embed_dim=128,
        depth=6,
        num_heads=4,
        mlp_ratio=3.0,
        embed_layer=ConvStem,
    )
    model.pretrained_cfg = {
        "architecture": DIGITS_VIT,
        "input_size": (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE),
        "mean": (digits.PIXEL_MEAN,),
        "std": (digits.PIXEL_STD,),
        "num_classes": 10,
    }
    return model


def create_backbone(name: str = DIGITS_VIT) -> nn.Module:
    """Builds a backbone by name."""
    return build_digits_vit()
