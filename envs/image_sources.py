"""Photographs as they are stored: what a source of them is, and folders of image files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data.readers import get_img_extensions
from timm.utils import natural_key

from tokenprune.envs.digits import Split

# the names that a dataset may give to each split, the preferred one first
SPLIT_NAMES: Mapping[Split, Sequence[str]] = {
    "train": ("train",),
    "validation": ("validation", "val"),
    "test": ("test",),
}


class DatasetError(ValueError):
    """A dataset that is unknown, empty or damaged; the message says what is wrong with which."""


class ImageSource(Protocol):
    """The images of one split, not yet decoded.

    Attributes:
        class_names: in the order of the labels.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def prepare(self, indices: NDArray[np.int64]) -> None:
        """Announces, once and before the first ``read``, all that will ever be read."""
        ...

    def read(self, index: int, mode: str) -> tuple[Image.Image, int]:
        """Decodes image ``index`` to PIL's colour ``mode``; safe to call from several threads.

        Returns:
            the image and its label, an index into ``class_names``.

        Raises:
            DatasetError: the image is damaged, or its label lies outside the classes.
        """
        ...


Openers = dict[Split, Callable[[], ImageSource]]


def decode(file: IO[bytes] | Path, mode: str, name: str) -> Image.Image:
    """Decodes an image to PIL's colour ``mode``, or raises a ``DatasetError`` that has its name."""
    try:
        with Image.open(file) as image:
            return image.convert(mode)
    # Pillow's plugins report damage as any of these
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{name} can't be read as an image: {error}") from error


def folder_openers(path: str) -> Openers:
    """Finds the splits below ``path``; opening one lists its files.

    Raises:
        DatasetError: there is no such folder, no train folder in it, or a split has two folders.
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
            openers[split] = partial(FolderSource, found[0])
    if "train" not in openers:
        raise DatasetError(f"no folder {root / 'train'}: images are expected in PATH/train/CLASS")
    return openers


class FolderSource:
    """Image files of every kind that timm knows, below ROOT/CLASS; classes in natural order.

    Args:
        root: the folder of one split.

    Raises:
        DatasetError: there is no class, or a class without images.
    """

    def __init__(self, root: Path) -> None:
        folders = [
            entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."
        ]
        if not folders:
            raise DatasetError(f"{root} is empty: images are expected in {root}/CLASS")
        # the name itself decides between names that natural order takes for equal, as "a" and "A"
        self.class_names = tuple(sorted(folders, key=lambda name: (natural_key(name), name)))
        self._files: list[str] = []
        self._labels: list[int] = []
        for label, name in enumerate(self.class_names):
            files = _image_files(root / name)
            self._files += files
            self._labels += [label] * len(files)

    def __len__(self) -> int:
        return len(self._files)

    def prepare(self, indices: NDArray[np.int64]) -> None:
        del indices

    def read(self, index: int, mode: str) -> tuple[Image.Image, int]:
        file = self._files[index]
        return decode(Path(file), mode, file), self._labels[index]


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
