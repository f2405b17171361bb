"""Pictures, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from prunevit import TokenPruneEnv
from prunevit.envs.rendering import FADE, GAP, HOLD, denormalise, save_animation, stage_strip

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


@pytest.mark.parametrize("suffix", [".png", ".gif"])  # a GIF has 256 colours: enough for grey
def test_an_animation_has_every_frame_of_an_episode(suffix, tmp_path):
    env = TokenPruneEnv(prune_before=(1, 2), render_mode="rgb_array")
    env.reset(seed=0)
    frames = [env.render()]
    while env.agents:
        env.step({agent: int(i % 3 > len(frames) - 1) for i, agent in enumerate(env.agents)})
        frames.append(env.render())
    save_animation(frames, tmp_path / f"episode{suffix}", fps=4, zoom=2)
    with Image.open(tmp_path / f"episode{suffix}") as animation:
        assert animation.n_frames == len(frames) == 3
        for i, frame in enumerate(frames):
            animation.seek(i)
            shown = np.asarray(animation.convert("RGB"))
            assert np.array_equal(shown[::2, ::2], frame)
            assert np.array_equal(shown[1::2, 1::2], frame)
            assert animation.info["duration"] == (250 if i < 2 else 250 * HOLD)


def test_what_is_no_animation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no frames"):
        save_animation([], tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"ends with \.gif, \.png or \.webp"):
        save_animation([np.zeros((2, 2, 3), np.uint8)], tmp_path / "a.jpg")
