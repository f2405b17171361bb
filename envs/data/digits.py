"""Draws scanned digits in clutter, the data of the default game. Nothing is downloaded.

A handwritten digit (an 8x8 scan of ``sklearn.datasets.load_digits``) is enlarged to 14..46 pixels
and placed on a textured background, among fragments of other digits of the same brightness. How
many patches matter, and which, differs from image to image, and brightness does not tell.

A seed gives the same images on every machine: every pixel is a sum of integers up to 2**24, scaled
by powers of two, which is exact in float32 in any order, and NumPy has frozen ``RandomState``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunevit.choices import check_choice

Split = Literal["train", "validation", "test"]

IMAGE_SIZE = 64
SCAN_SIZE = 8
SCAN_MAX = 16  # load_digits counts inked sub-pixels: 0..16
SIZES = (14, 46)  # smallest and largest side of a digit, pixels
FRAGMENTS = 16
FRAGMENT_SCANS = (3, 4)  # side of the window cut out of another digit's scan, in scan pixels
FRAGMENT_MARGIN = 8  # how far a fragment may start beyond the canvas's edge, pixels
OFFSET_MARGIN = SIZES[1] + FRAGMENT_MARGIN
BRIGHTNESS = (170, 255)  # ink of digits and fragments
BACKGROUND = (20, 80)  # range of a background's mean level
# cells per side, amplitude: amplitude falls as 1/frequency
OCTAVES = ((4, 40), (8, 20), (16, 10), (32, 5))
WEIGHT = 64  # interpolation weights are integers that sum to this
CHUNK = 100  # images that are drawn at once: bounds the memory
SHARES: dict[Split, tuple[float, float]] = {
    "train": (0.0, 0.7),
    "validation": (0.7, 0.82),
    "test": (0.82, 1.0),
}
SPLIT_SEEDS: dict[Split, int] = {"train": 1, "validation": 2, "test": 3}
PIXEL_MEAN, PIXEL_STD = 0.4, 0.25


@lru_cache(maxsize=1)
def _scans() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    return scans.reshape(-1, SCAN_SIZE, SCAN_SIZE).astype(np.float32), labels.astype(np.int64)


@lru_cache(maxsize=8)
def scan_indices(split: Split) -> NDArray[np.int64]:
    """Indices of the scans of ``split``. Splits share no scan, and each has some of every class."""
    _, labels = _scans()
    shuffled = np.random.RandomState(0).permutation(len(labels))
    low, high = SHARES[split]
    parts = []
    for digit in range(10):
        of_digit = shuffled[labels[shuffled] == digit]
        parts.append(of_digit[int(low * len(of_digit)) : int(high * len(of_digit))])
    return np.sort(np.concatenate(parts))


@lru_cache(maxsize=1)
def _interpolation() -> NDArray[np.float32]:
    """Bilinear weights that enlarge one side of a scan, for every size and offset.

    Returns:
        integers 0..WEIGHT as float32, [size - SIZES[0], offset + OFFSET_MARGIN, IMAGE_SIZE,
        SCAN_SIZE]: the weights of the scan's samples at each pixel, if the scan covers ``size``
        pixels starting at pixel ``offset``; zero at pixels that it does not cover.
    """
    size = np.arange(SIZES[0], SIZES[1] + 1)[:, None, None]
    offset = np.arange(-OFFSET_MARGIN, IMAGE_SIZE)[None, :, None]
    pixel = np.arange(IMAGE_SIZE)[None, None, :] - offset
    # a pixel's centre in scan coordinates, in units of 1/WEIGHT
    position = ((2 * pixel + 1) * SCAN_SIZE * WEIGHT) // (2 * size) - WEIGHT // 2
    position = np.clip(position, 0, (SCAN_SIZE - 1) * WEIGHT)
    distance = np.abs(position[..., None] - np.arange(SCAN_SIZE) * WEIGHT)
    inside = (pixel >= 0) & (pixel < size)
    return (np.maximum(WEIGHT - distance, 0) * inside[..., None]).astype(np.float32)


def _enlarge(
    scans: NDArray[np.float32],
    size: NDArray[np.int64],
    top: NDArray[np.int64],
    left: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Draws scans [n, SCAN_SIZE, SCAN_SIZE] on empty images.

    Returns:
        ink times WEIGHT**2, [n, IMAGE_SIZE, IMAGE_SIZE].
    """
    rows, columns = (
        _interpolation()[size - SIZES[0], place + OFFSET_MARGIN] for place in (top, left)
    )
    return np.matmul(np.matmul(rows, scans), columns.transpose(0, 2, 1))


def _background(random: np.random.RandomState, n: int) -> NDArray[np.float32]:
    """Draws 1/f texture from octaves of enlarged random grids, [n, IMAGE_SIZE, IMAGE_SIZE]."""
    level = random.randint(BACKGROUND[0], BACKGROUND[1] + 1, size=(n, 1, 1)).astype(np.float32)
    total = np.zeros((n, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for cells, amplitude in OCTAVES:
        grid = random.randint(-amplitude, amplitude + 1, size=(n, cells + 1, cells + 1))
        step = IMAGE_SIZE // cells
        position = np.arange(IMAGE_SIZE)
        low, fraction = position // step, position % step
        weights = np.zeros((IMAGE_SIZE, cells + 1), np.float32)
        weights[position, low] = step - fraction
        weights[position, low + 1] += fraction
        weights /= step
        total += weights @ grid.astype(np.float32) @ weights.T
    return level + total


def _draw(
    random: np.random.RandomState, split: Split, n: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    scans, labels = _scans()
    pool = scan_indices(split)

    def inked(indices: NDArray[np.int64]) -> NDArray[np.float32]:
        ink = random.randint(BRIGHTNESS[0], BRIGHTNESS[1] + 1, size=len(indices))
        return scans[indices] * ink[:, None, None].astype(np.float32)

    chosen = pool[random.randint(len(pool), size=n)]
    size = random.randint(SIZES[0], SIZES[1] + 1, size=n)
    top, left = (random.randint(0, IMAGE_SIZE - size + 1) for _ in range(2))
    light = _enlarge(inked(chosen), size, top, left)

    row, column = (
        (np.arange(IMAGE_SIZE) >= start[:, None])
        & (np.arange(IMAGE_SIZE) < (start + size)[:, None])
        for start in (top, left)
    )
    beside_digit = ~(row[:, :, None] & column[:, None, :])
    clutter = np.zeros_like(light)
    samples = np.arange(SCAN_SIZE)
    for _ in range(FRAGMENTS):
        fragment = inked(pool[random.randint(len(pool), size=n)])
        scale = random.randint(SIZES[0], SIZES[1] + 1, size=n)
        window = random.randint(FRAGMENT_SCANS[0], FRAGMENT_SCANS[1] + 1, size=(2, n))
        corner = random.randint(0, SCAN_SIZE - window + 1)
        cut = (samples >= corner[..., None]) & (samples < (corner + window)[..., None])
        # the window is spread evenly over the image, not the scan it was cut from
        place = (
            random.randint(-FRAGMENT_MARGIN, IMAGE_SIZE, size=(2, n)) - corner * scale // SCAN_SIZE
        )
        cropped = fragment * cut[0][:, :, None] * cut[1][:, None, :]
        np.maximum(clutter, _enlarge(cropped, scale, *place), out=clutter)
    ink = np.maximum(light, clutter * beside_digit)
    pixels = np.maximum(_background(random, n), ink / np.float32(SCAN_MAX * WEIGHT * WEIGHT))
    return np.clip(pixels, 0, 255).astype(np.uint8), labels[chosen]


def draw_digits(split: Split, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draws images of digits.

    Args:
        split: "train", "validation" or "test"; they share no scan.
        size: number of images.
        seed: 0 or more. The same seed gives the same images; a longer draw begins with a shorter
            one.

    Returns:
        images uint8 [size, 1, IMAGE_SIZE, IMAGE_SIZE] and labels int64 [size].

    Raises:
        ValueError: ``split`` is unknown.
    """
    check_choice("split", split, get_args(Split))
    images = np.empty((size, 1, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    labels = np.empty(size, np.int64)
    for start in range(0, size, CHUNK):
        random = _random(split, seed, start)
        n = min(CHUNK, size - start)
        images[start : start + n, 0], labels[start : start + n] = (
            part[:n] for part in _draw(random, split, CHUNK)
        )
    return torch.from_numpy(images), torch.from_numpy(labels)


def _random(split: Split, seed: int, start: int) -> np.random.RandomState:
    """The random stream of a chunk: it has its own, so that a longer draw extends a shorter one."""
    return np.random.RandomState([SPLIT_SEEDS[split], seed, start // CHUNK])


def drawn_scans(split: Split, size: int, seed: int = 0) -> Tensor:
    """Which scan each of the images of ``draw_digits`` shows: an index into ``load_digits``, int64
    [size].
    """
    pool = scan_indices(split)
    chosen = [
        pool[_random(split, seed, start).randint(len(pool), size=CHUNK)]
        for start in range(0, size, CHUNK)
    ]
    return torch.from_numpy(np.concatenate(chosen)[:size])


def normalise(images: Tensor) -> Tensor:
    """Normalises uint8 pixels to float32 of about zero mean and unit standard deviation."""
    return (images.float() / 255.0 - PIXEL_MEAN) / PIXEL_STD
