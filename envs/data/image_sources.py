"""``ImageSource``: images as they are stored; folders of image files are two kinds."""

from __future__ import annotations

import os
import warnings
from collections import Counter
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
from prunevit.envs.data.image_set import NO_LABEL

# names that a dataset may use for each split, the preferred one first
SPLIT_NAMES: Mapping[Split, Sequence[str]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
CLASS_LIST = "classes.txt"  # of a folder: its classes in the order of their labels, one a line
# those that torchvision looks for in folders; timm's, which can be added to, come on top
IMAGE_EXTENSIONS = (
    ".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
DECODING_THREADS = min(8, os.cpu_count() or 1)


class DatasetError(ValueError):
    """A dataset is unknown, empty or damaged; the message says which and why."""


class ImageSource(Protocol):
    """The images of one split, not yet decoded.

    Attributes:
        class_names: names in the order of the labels; empty for images without classes.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def prepare(self, indices: NDArray[np.int64]) -> None:
        """Is called once before the first ``read``, with the indices of all images to be read."""

    def read(self, index: int, mode: str) -> tuple[Image.Image, int]:
        """Decodes image ``index`` in PIL's colour ``mode``; threads may call it at the same time.

        Returns:
            the image and its label, an index into ``class_names``; ``NO_LABEL`` without classes.

        Raises:
            DatasetError: the image is damaged, or its label lies outside the classes.
        """


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
    listed = _listed_classes(root / CLASS_LIST)
    for split, names in SPLIT_NAMES.items():
        found = [root / name for name in names if (root / name).is_dir()]
        if len(found) > 1:
            raise DatasetError(f"{found[0]} and {found[1]} both exist: keep one of them")
        if found:
            openers[split] = partial(FolderSource, found[0], skip, listed)
    if "train" not in openers:
        raise DatasetError(f"no folder {root / 'train'}: images are expected in PATH/train/CLASS")
    return openers


def _listed_classes(file: Path) -> tuple[str, ...] | None:
    if not file.is_file():
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} can't be read: {error}") from error
    names = tuple(line.strip() for line in lines if line.strip())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DatasetError(f"{file} lists {', '.join(twice)} more than once")
    return names


class FileSource:
    """Image files and their labels.

    Args:
        files: the files.
        labels: their labels.
        class_names: names of the classes in the order of the labels.
    """

    def __init__(
        self, files: Sequence[str], labels: Sequence[int], class_names: tuple[str, ...]
    ) -> None:
        self.files = files
        self._labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.files)

    def bad_files(self) -> dict[str, str]:
        """Decodes every image; returns what is wrong with the damaged ones, by file."""
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            found = zip(self.files, pool.map(_damage, self.files), strict=True)
            return {file: damage for file, damage in found if damage is not None}

    def prepare(self, indices: NDArray[np.int64]) -> None:
        del indices

    def read(self, index: int, mode: str) -> tuple[Image.Image, int]:
        file = self.files[index]
        return decode(Path(file), mode, file), self._labels[index]


class PhotoSource(FileSource):
    """All image files in a folder and its folders, without classes, sorted by path.

    Files and folders whose names begin with a dot are left out.

    Args:
        path: the folder.

    Raises:
        DatasetError: there is no such folder, or it has no images.
    """

    def __init__(self, path: str) -> None:
        root = Path(path).expanduser()
        if not path or not root.is_dir():
            raise DatasetError(f"no folder {path or 'is named: write photos:PATH'}")
        others: Counter[str] = Counter()
        files = _image_files(root, others)
        _warn_of(others, root)
        super().__init__(files, [NO_LABEL] * len(files), ())


class FolderSource(FileSource):
    """Image files in ROOT/CLASS and its folders, with classes in natural order.

    Files and folders whose names begin with a dot are left out.

    Args:
        root: the folder of one split.
        skip: files to leave out.
        classes: all classes in the order of their labels, where somebody listed them; not each
            needs a folder.

    Attributes:
        is_listed: whether somebody did.

    Raises:
        DatasetError: there are no classes, one is not listed, or a class has no images.
    """

    def __init__(
        self, root: Path, skip: Collection[str] = (), classes: tuple[str, ...] | None = None
    ) -> None:
        folders = [
            entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."
        ]
        if not folders:
            raise DatasetError(f"{root} is empty: images are expected in {root}/CLASS")
        # natural order takes "a" and "A" for equal: the name itself decides
        folders.sort(key=lambda name: (natural_key(name), name))
        self.is_listed = classes is not None
        class_names = tuple(folders) if classes is None else classes
        places = {name: label for label, name in enumerate(class_names)}
        unlisted = [name for name in folders if name not in places]
        if unlisted:
            raise DatasetError(
                f"{root} has class folders that {CLASS_LIST} doesn't list: {', '.join(unlisted)}"
            )
        all_files: list[str] = []
        labels: list[int] = []
        others: Counter[str] = Counter()
        for name in sorted(folders, key=places.__getitem__):
            label = places[name]
            files = [file for file in _image_files(root / name, others) if file not in skip]
            if not files:
                raise DatasetError(f"every image of the class folder {root / name} is skipped")
            all_files += files
            labels += [label] * len(files)
        _warn_of(others, root)
        super().__init__(all_files, labels, class_names)


def _warn_of(others: Counter[str], root: Path) -> None:
    """Warns of images below ``root`` that are left out, counted by their types."""
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        warnings.warn(f"{root}: files of other types are left out ({kinds})", stacklevel=3)


def _damage(file: str) -> str | None:
    try:
        decode(Path(file), "RGB", file)
    except DatasetError as error:
        return str(error)
    return None


def _image_files(folder: Path, others: Counter[str]) -> list[str]:
    """Finds the images below ``folder``, and counts by extension the images of types that are not
    read.
    """
    extensions = {*IMAGE_EXTENSIONS, *get_img_extensions()}
    files, seen = [], {os.path.realpath(folder)}
    for inside, folders, names in os.walk(folder, followlinks=True):
        kept = []
        for name in folders:
            target = os.path.realpath(os.path.join(inside, name))
            # links may lead back, and then again and again
            if name[0] != "." and target not in seen:
                seen.add(target)
                kept.append(name)
        folders[:] = kept
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if name[0] == ".":
                continue
            if extension in extensions:
                files.append(os.path.join(inside, name))
            elif extension in Image.registered_extensions():
                others[extension] += 1
    if not files:
        raise DatasetError(
            f"the folder {folder} holds no images (of {' '.join(sorted(extensions))})"
        )
    return sorted(files)
