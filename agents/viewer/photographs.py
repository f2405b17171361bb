"""Photographs for the viewer: samples, files that may be damaged or huge, and what a ViT sees."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_sample_image
from timm.data import create_transform
from torch import Tensor

from prunevit.envs.data.digits import draw_digits
from prunevit.envs.data.image_dataset import COLOUR_MODES
from prunevit.envs.data.image_sources import DatasetError, decode
from prunevit.envs.data_config import model_data_config
from prunevit.envs.rendering import denormalise
from prunevit.envs.vit.staged_vit import StagedViT

SAMPLES = Path(__file__).parent / "samples"
OF_SKLEARN = {"pagoda": "china.jpg", "dahlia": "flower.jpg"}
DIGITS = 4  # test images among the samples
MAX_PIXELS = 50_000_000  # more than cameras take; decoded, 150 MB
# readers of other formats run programs (EPS), or are seldom looked at
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SHOWN = 224  # pixels: pictures of smaller images are enlarged about to this side


def samples() -> dict[str, Image.Image]:
    """Photographs and digits that may be shown to anybody, by name."""
    found = {file.stem: Image.open(file).convert("RGB") for file in sorted(SAMPLES.glob("*.jpg"))}
    found |= {name: Image.fromarray(load_sample_image(file)) for name, file in OF_SKLEARN.items()}
    digits, _ = draw_digits("test", DIGITS)
    for i, digit in enumerate(digits):
        found[f"digits-{i}"] = Image.fromarray(digit[0].numpy())
    return found


def open_photograph(file: Path, name: str) -> Image.Image:
    """Decodes a photograph, upright, whose file may be anything.

    Raises:
        DatasetError: it is no image, is damaged or too large. The message calls it ``name``.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
    except UnidentifiedImageError as error:
        raise DatasetError(f"{name} is no image: {', '.join(FORMATS)} are taken") from error
    # Pillow's plugins raise errors of any kind, and one for more pixels than they ever open
    except Exception as error:
        raise DatasetError(f"{name} can't be read as an image: {error}") from error
    if width * height > MAX_PIXELS:
        raise DatasetError(
            f"{name} has {width} x {height} pixels: at most {MAX_PIXELS // 10**6} million are taken"
        )
    return ImageOps.exif_transpose(decode(file, "RGB", name))


def prepare(image: Image.Image, backbone: StagedViT) -> tuple[Tensor, Tensor]:
    """What a backbone sees of an image, and the same part of it to be shown.

    An image that has the size of the backbone's is taken as it is; others are scaled and cut by
    timm's transform.

    Returns:
        normalised pixels [C, H, W], and values 0..1 [C, kH, kW] with a whole k.

    Raises:
        DatasetError: the backbone takes neither grey nor RGB images.
    """
    channels, height, width = backbone.image_shape
    if channels not in COLOUR_MODES:
        raise DatasetError(f"the backbone takes images of {channels} channels")
    image = image.convert(COLOUR_MODES[channels])
    config = model_data_config(backbone.model)
    config.pop("classes", None)
    if image.size == (width, height):
        config["crop_pct"] = 1.0
    zoom = max(1, round(SHOWN / min(height, width)))
    larger = config | {"input_size": (channels, zoom * height, zoom * width)}
    pixels, shown = (
        create_transform(**each, is_training=False)(image) for each in (config, larger)
    )
    return pixels, denormalise(shown, tuple(config["mean"]), tuple(config["std"]))
