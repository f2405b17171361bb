"""Pictures of an episode: the image at every stage, with pruned patches faded to white, also as an
animation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gymnasium import logger
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from prunevit.envs.data_config import model_data_config
from prunevit.envs.game import GameError, TokenGame

GAP = 2  # white pixels between pictures
FADE = 0.85  # share of white in a pruned patch
HOLD = 3  # frames' time that the last frame of an animation stays


def stage_strip(pixels: Tensor, alive: Tensor, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """Draws an image K times side by side, with the pruned patches of each stage faded.

    Args:
        pixels: values 0..1, [C, H, W] with 1 or 3 channels.
        alive: which patches are alive in each picture, bool [K, N].
        grid: rows and columns of patches.

    Returns:
        uint8 [H, K * W + (K - 1) * GAP, 3].
    """
    channels, height, width = pixels.shape
    colour = pixels.expand(3, -1, -1) if channels == 1 else pixels[:3]
    pictures = []
    for patches in alive:
        mask = patches.float().view(1, 1, *grid)
        shown = F.interpolate(mask, size=(height, width), mode="nearest")[0]
        pictures.append(colour * (1 - FADE * (1 - shown)) + FADE * (1 - shown))
        pictures.append(torch.ones(3, height, GAP))
    strip = torch.cat(pictures[:-1], dim=2).clamp(0, 1)
    return (strip.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


class EpisodePictures:
    """Remembers which patches were alive at each stage, for an environment's ``render``.

    Args:
        render_mode: one of ``modes``, or None, which draws nothing.
        modes: the modes that the environment has.

    Raises:
        ValueError: another mode.
    """

    def __init__(self, render_mode: str | None, modes: Sequence[str]) -> None:
        if render_mode is not None and render_mode not in modes:
            raise ValueError(f"render_mode={render_mode!r}: choose {' or '.join(modes)}, or None")
        self._render_mode = render_mode
        self._modes = modes
        self._alive: list[Tensor] = []

    def begin(self, alive: Tensor) -> None:
        """Forgets earlier episodes and begins others, whose patches are alive as in bool [B, N]."""
        self._alive = [alive]

    def add(self, alive: Tensor) -> None:
        """Adds a stage that left the patches ``alive``, bool [B, N]."""
        self._alive.append(alive)

    def draw(self, game: TokenGame, pixels: Tensor) -> list[NDArray[np.uint8]] | None:
        """Draws each image before the first and after each stage so far.

        Args:
            game: the game that is played.
            pixels: the images as the backbone gets them, [B, C, H, W].

        Returns:
            B pictures uint8 [H, W, 3], white where later stages will be, so that all pictures of an
            episode have one size. None, with a warning, without a render mode.

        Raises:
            GameError: no episode has begun.
        """
        if self._render_mode is None:
            modes = " or ".join(map(repr, self._modes))
            logger.warn(f"nothing is rendered: give render_mode={modes} when the env is made")
            return None
        if not self._alive:
            raise GameError("nothing to render before reset")
        config = model_data_config(game.backbone.model)
        shown = denormalise(pixels.float().cpu(), tuple(config["mean"]), tuple(config["std"]))
        width = pixels.shape[-1]
        pictures = []
        for image, stages in zip(shown, torch.stack(self._alive, dim=1).cpu(), strict=True):
            strip = stage_strip(image, stages, game.backbone.grid_size)
            whole = (game.num_stages + 1) * (width + GAP) - GAP
            missing = ((0, 0), (0, whole - strip.shape[1]), (0, 0))
            pictures.append(np.pad(strip, missing, constant_values=255))
        return pictures


def save_animation(
    frames: Sequence[NDArray[np.uint8]], file: str | Path, fps: float = 2, zoom: int = 1
) -> None:
    """Writes what ``render`` returned after ``reset`` and after each step as an animation without
    an end.

    Args:
        frames: pictures uint8 [H, W, 3] of one size.
        file: GIF, APNG (.png) or WebP, by its suffix.
        fps: frames a second; the last one stays ``HOLD`` times as long.
        zoom: enlarge each pixel to a square of so many.

    Raises:
        ValueError: there are no frames, or the suffix is another.
    """
    if not frames:
        raise ValueError("no frames: env.render() returns one where render_mode is 'rgb_array'")
    pictures = [
        Image.fromarray(frame.repeat(zoom, axis=0).repeat(zoom, axis=1)) for frame in frames
    ]
    shown = 1000 / fps  # milliseconds
    durations = [round(shown)] * (len(frames) - 1) + [round(HOLD * shown)]
    if Path(file).suffix not in (".gif", ".png", ".webp"):
        raise ValueError(f"{file}: an animation ends with .gif, .png or .webp")
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def denormalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Reverts the normalisation of pixels [..., C, H, W] to values 0..1."""
    shape = (-1, 1, 1)
    shifted = pixels * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return shifted.clamp(0, 1)
