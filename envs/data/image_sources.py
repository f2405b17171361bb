"""``ImageSource``: images as they are stored; folders of image files are one kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data.readers import get_img_extensions
from timm.utils import natural_key

from prunevit.envs.data.digits import Split

# names that a dataset may use for each split, the preferred one first
SPLIT_NAMES: Mapping[Split, Sequence[str]] = {
    "train": ("train",),
    "validation": ("validation", "val"),
    "test": ("test",),
}
DECODING_THREADS = min(8, os.cpu_count() or 1)


class DatasetError(ValueError):
    """A dataset is unknown, empty or damaged; the message says which and why."""


class ImageSource(Protocol):
    """The images of one split, not yet decoded.

    Attributes:
        class_names: names in the order of the labels.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def prepare(self, indices: NDArray[np.int64]) -> None:
        """Is called once before the first ``read``, with the indices of all images to be read."""
        ...

    def read(self, index: int, mode: str) -> tuple[Image.Image, int]:
        """Decodes image ``index`` in PIL's colour ``mode``; threads may call it at the same time.

        Returns:
            the image and its label, an index into ``class_names``.

        Raises:
            DatasetError: the image is damaged, or its label lies outside the classes.
        """
        ...


Openers = dict[Split, Callable[[], ImageSource]]


def decode(file: IO[bytes] | Path, mode: str, name: str) -> Image.Image:
    """Decodes an image in PIL's colour ``mode``; raises a ``DatasetError`` with its name."""
    try:
        with Image.open(file) as image:
            return _in_eight_bits(image).convert(mode)
    # Pillow's plugins raise errors of any kind for damaged files
    except Exception as error:
        raise DatasetError(f"{name} can't be read as an image: {error}") from error


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit images to 8 bits; Pillow's ``convert`` would turn all above 255 white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))


def folder_openers(path: str, skip: Collection[str] = ()) -> Openers:
    """Finds the splits in a folder. Opening one lists its files, except those in ``skip``.

    Raises:
        DatasetError: the folder or its train folder is missing, or a split has two folders.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DatasetError(f"no folder {root}")
    openers: Openers = {}
    for split, names in SPLIT_NAMES.items():
        found = [root / name for name in names if (root / name).is_dir()]
        if len(found) > 1:
            raise DatasetError(f"{found[0]} and {found[1]} both exist: keep one of them")
        if found:
            openers[split] = partial(FolderSource, found[0], skip)
    if "train" not in openers:
        raise DatasetError(f"no folder {root / 'train'}: images are expected in PATH/train/CLASS")
    return openers


class FolderSource:
    """Image files in ROOT/CLASS, of every type that timm knows, with classes in natural order.

    Args:
        root: the folder of one split.
        skip: files to leave out.

    Raises:
        DatasetError: there are no classes, or a class has no images.
    """

    def __init__(self, root: Path, skip: Collection[str] = ()) -> None:
        folders = [
            entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."
        ]
        if not folders:
            raise DatasetError(f"{root} is empty: images are expected in {root}/CLASS")
        # natural order takes "a" and "A" for equal: the name itself decides
        self.class_names = tuple(sorted(folders, key=lambda name: (natural_key(name), name)))
        self._files: list[str] = []
        self._labels: list[int] = []
        for label, name in enumerate(self.class_names):
            files = [file for file in _image_files(root / name) if file not in skip]
            if not files:
                raise DatasetError(f"every image of the class folder {root / name} is skipped")
            self._files += files
            self._labels += [label] * len(files)

    def __len__(self) -> int:
        return len(self._files)

    def bad_files(self) -> dict[str, str]:
        """Decodes every image; returns what is wrong with the damaged ones, by file."""
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            found = zip(self._files, pool.map(_damage, self._files), strict=True)
            return {file: damage for file, damage in found if damage is not None}

    def prepare(self, indices: NDArray[np.int64]) -> None:
        del indices

    def read(self, index: int, mode: str) -> tuple[Image.Image, int]:
        file = self._files[index]
        return decode(Path(file), mode, file), self._labels[index]


def _damage(file: str) -> str | None:
    try:
        decode(Path(file), "RGB", file)
    except DatasetError as error:
        return str(error)
    return None


def _image_files(folder: Path) -> list[str]:
    extensions = get_img_extensions(as_set=True)
    files = sorted(
        os.path.join(inside, name)
        for inside, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in extensions and name[0] != "."
    )
    if not files:
        raise DatasetError(
            f"the class folder {folder} holds no images (of {' '.join(sorted(extensions))})"
        )
    return files
