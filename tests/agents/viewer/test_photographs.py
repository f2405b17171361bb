"""What a model sees of a photograph, and files that are none."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from prunevit.agents.viewer.photographs import MAX_PIXELS, open_photograph, prepare, samples
from prunevit.envs.data.cluttered_digits import ClutteredDigits
from prunevit.envs.data.image_sources import DatasetError
from prunevit.envs.data_config import model_data_config
from prunevit.envs.rendering import denormalise
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT


def png(path, width, height):
    """A black image, of so many pixels in a file of a few kilobytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((-(-width // 8) + 1) * height))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    return path


def test_samples_of_digits_are_those_of_the_data_set():
    staged = StagedViT(create_backbone(), (1,))
    images = samples()
    pixels, _ = ClutteredDigits("test").load(range(4))
    for i in range(4):
        seen, shown = prepare(images[f"digits-{i}"], staged)
        torch.testing.assert_close(seen, pixels[i], atol=1e-6, rtol=0)
        assert shown.shape == (1, 256, 256)


def test_there_are_photographs_among_the_samples():
    photographs = {name for name, image in samples().items() if image.mode == "RGB"}
    assert photographs == {"cat", "coffee", "pagoda", "dahlia"}


def test_what_is_shown_is_the_part_that_the_model_sees(staged):
    ramp = np.tile(np.linspace(0, 255, 300).astype(np.uint8)[:, None], (200, 1, 3))
    seen, shown = prepare(Image.fromarray(ramp), staged)
    config = model_data_config(staged.model)
    assert seen.shape == (3, 32, 32)
    assert shown.shape == (3, 224, 224)
    small = F.interpolate(shown[None], size=(32, 32), mode="area")[0]
    wanted = denormalise(seen, tuple(config["mean"]), tuple(config["std"]))
    torch.testing.assert_close(small, wanted, atol=0.01, rtol=0)
    assert wanted.min() > 0.15  # a third of the width is cut away, and a tenth of the rest
    assert wanted.max() < 0.85


def test_a_photograph_stands_upright(tmp_path):
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10] = 255  # left half
    turned = Image.Exif()
    turned[274] = 6  # is shown turned right by a quarter
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    upright = np.asarray(open_photograph(tmp_path / "a.png", "a"))
    assert upright.shape == (20, 10, 3)
    assert (upright[:10] == 255).all()
    assert not upright[10:].any()


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (8000, 8000, "x has 8000 x 8000 pixels: at most 50 million are taken"),
        (20_000, 20_000, "x can't be read as an image: .*decompression bomb"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, width, height, message):
    file = png(tmp_path / "a.png", width, height)
    assert file.stat().st_size < 100_000
    assert width * height > MAX_PIXELS
    with pytest.raises(DatasetError, match=message):
        open_photograph(file, "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x is no image: BMP, GIF, JPEG, "),
        (b"no image", "x is no image: "),
        (b"\x89PNG\r\n\x1a\nnonsense", "x can't be read as an image: "),
        # Pillow would run Ghostscript
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nx\n", "x is no image: "),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        open_photograph(tmp_path / "a.png", "x")


def test_half_a_photograph_is_refused(tmp_path):
    samples()["cat"].save(tmp_path / "a.jpg")
    half = (tmp_path / "a.jpg").read_bytes()[:5000]
    (tmp_path / "a.jpg").write_bytes(half)
    with pytest.raises(DatasetError, match="x can't be read as an image: image file is truncated"):
        open_photograph(tmp_path / "a.jpg", "x")
