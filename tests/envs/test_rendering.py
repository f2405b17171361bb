"""Pictures, pixel by pixel."""

import numpy as np
import pytest
import torch

from prunevit.envs.rendering import FADE, GAP, denormalise, stage_strip

GRID = (2, 3)
LIVING = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 1, 0]]).bool()


def draw(channels, height=8, width=12):
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_whites_out_what_is_pruned(channels):
    pixels = draw(channels)
    strip = stage_strip(pixels, LIVING, GRID)
    assert strip.shape == (8, 2 * 12 + GAP, 3)
    assert strip.dtype == np.uint8
    assert (strip[:, 12 : 12 + GAP] == 255).all()
    for picture, living in ((strip[:, :12], LIVING[0]), (strip[:, -12:], LIVING[1])):
        for y in range(8):
            for x in range(12):
                pixel = pixels[:, y, x].expand(3)
                if not living[y // 4 * 3 + x // 4]:
                    pixel = pixel + FADE * (1 - pixel)
                expected = (pixel * 255).round().int()
                assert np.abs(picture[y, x].astype(int) - expected.numpy()).max() <= 1


def test_one_stage_is_one_picture():
    assert stage_strip(draw(3), LIVING[:1], GRID).shape == (8, 12, 3)


def test_values_outside_the_range_do_not_wrap_around():
    strip = stage_strip(torch.tensor([-0.5, 1.5]).repeat(1, 2, 1), LIVING[:1, :1], (1, 1))
    assert strip[0, :, 0].tolist() == [0, 255]


def test_denormalise_undoes_a_normalisation():
    pixels, mean, std = draw(3), (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    normalised = torch.stack(
        [(pixels[c] - m) / s for c, (m, s) in enumerate(zip(mean, std, strict=True))]
    )
    torch.testing.assert_close(denormalise(normalised, mean, std), pixels)
    torch.testing.assert_close(
        denormalise(normalised.repeat(2, 1, 1, 1), mean, std), pixels.repeat(2, 1, 1, 1)
    )
    assert denormalise(torch.tensor([[[-9.0, 9.0]]]), (0.5,), (0.5,)).tolist() == [[[0.0, 1.0]]]
