"""Datasets by their names in ``timm.data.create_dataset``: torchvision, Hugging Face, others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from prunevit.envs.data.digits import Split
from prunevit.envs.data.image_sources import (
    SPLIT_NAMES,
    DatasetError,
    ImageSource,
    Openers,
    decode,
    folder_openers,
)

TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
# if a split is missing, timm silently takes another one: hence the names of those that exist
TORCH_HELD_OUT: Mapping[str, Split] = {
    "cifar10": "test",
    "cifar100": "test",
    "mnist": "test",
    "kmnist": "test",
    "fashion_mnist": "test",
    "qmnist": "test",
    "imagenet": "validation",
    "inaturalist": "validation",
    "places365": "validation",
}

Result = TypeVar("Result")


def timm_openers(dataset: str) -> Openers:
    """Finds the splits of the dataset ``NAME`` or ``NAME:ROOT``.

    Raises:
        DatasetError: the name is unknown, its library is not installed, or it can't be opened.
    """
    name, _, root = dataset.partition(":")
    library, _, name = name.partition("/")
    library = library.lower()
    folder = str(Path(root).expanduser()) if root else None
    keys: Mapping[str, str] = {}
    if library == "torch":
        name = name.lower()
        if name in ("folder", "image_folder"):
            return folder_openers(root)
        if name not in TORCH_HELD_OUT:
            known = ", ".join(f"torch/{known}" for known in TORCH_HELD_OUT)
            raise DatasetError(f"unknown dataset torch/{name}: choose from {known}")
        if folder is None:
            raise DatasetError(f"where does torch/{name} lie? Write torch/{name}:FOLDER")
        splits: Sequence[str] = ("train", TORCH_HELD_OUT[name])
    else:
        splits, keys = _ask(dataset, partial(_describe, library, name, folder))
    openers: Openers = {}
    for split, names in SPLIT_NAMES.items():
        for known in [known for known in names if known in splits][:1]:
            source = partial(_open, f"{library}/{name}", folder, known, keys)
            openers[split] = partial(_ask, dataset, source)
    return openers


def _ask(dataset: str, call: Callable[[], Result]) -> Result:
    try:
        return call()
    # the libraries behind timm raise errors of many kinds for unknown, missing or offline datasets
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"can't open the dataset {dataset}: {reason}") from error


def _describe(
    library: str, name: str, folder: str | None
) -> tuple[Sequence[str], Mapping[str, str]]:
    """Looks up the names of the splits, and timm's ``input_key`` and ``target_key`` if known."""
    if library == "tfds":
        tfds = import_module("tensorflow_datasets")
        return list(tfds.builder(name, data_dir=folder).info.splits), {}
    if library == "wds":
        reader = import_module("timm.data.readers.reader_wds")
        return list(reader._load_info(folder or "").get("splits", ())), {}
    datasets = import_module("datasets")
    if library == "hfds":
        splits = datasets.load_dataset(name, cache_dir=folder)
        features = splits["train"].features if "train" in splits else {}
    else:
        info = datasets.load_dataset_builder(name, cache_dir=folder).info
        splits, features = info.splits or {}, info.features or {}
    keys: dict[str, str] = {}
    for key, feature in features.items():
        if isinstance(feature, datasets.Image):
            keys.setdefault("input_key", key)
        elif isinstance(feature, datasets.ClassLabel):
            keys.setdefault("target_key", key)
    return list(splits), keys


def _open(name: str, folder: str | None, split: str, keys: Mapping[str, str]) -> ImageSource:
    dataset = create_dataset(name, root=folder, split=split, **keys)
    return TimmSource(f"{name} ({split})", dataset)


class TimmSource:
    """A dataset that ``timm.data.create_dataset`` made.

    A dataset that can only be streamed is read in ``prepare`` and kept in memory.

    Args:
        title: name of the dataset and its split in messages.
        dataset: yields pairs of a PIL image and a label, by index or as a stream.
    """

    def __init__(self, title: str, dataset: Any) -> None:
        self._title = title
        self._size = len(dataset)
        self._is_stream = isinstance(dataset, IterableDataset)
        # timm's own __getitem__ silently replaces a damaged image by the next one
        indexed = getattr(dataset, "reader", dataset)
        self._items: Any = dataset if self._is_stream else indexed
        self.class_names = _class_names(indexed) or _number_classes(dataset)

    def __len__(self) -> int:
        return self._size

    def prepare(self, indices: NDArray[np.int64]) -> None:
        if not self._is_stream:
            return
        wanted = set(indices.tolist())
        self._items = {i: item for i, item in enumerate(self._items) if i in wanted}
        if len(self._items) < len(wanted):
            raise DatasetError(
                f"{self._title} announces {self._size} images, but not all of them can be read"
            )

    def read(self, index: int, mode: str) -> tuple[Image.Image, int]:
        name = f"image {index} of {self._title}"
        try:
            item, label = self._items[index]
        except (OSError, SyntaxError) as error:
            raise DatasetError(f"{name} can't be read: {error}") from error
        # timm's readers return the open file, torchvision and streams return the image
        if isinstance(item, Image.Image):
            image = item.convert(mode)
        else:
            with item:
                image = decode(item, mode, name)
        label = int(label)
        if not 0 <= label < len(self.class_names):
            raise DatasetError(
                f"{name} has the label {label}, outside the classes 0..{len(self.class_names) - 1}"
            )
        return image, label


def _class_names(dataset: Any) -> tuple[str, ...]:
    """Looks for the names of the classes; empty if the library does not provide them."""
    by_name: Mapping[str, int] = getattr(dataset, "class_to_idx", None) or {}
    listed = getattr(dataset, "all_categories", None) or getattr(dataset, "classes", None) or ()
    names = sorted(by_name, key=by_name.__getitem__) or list(listed)
    # torchvision's ImageNet lists the synonyms of each class
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)


def _number_classes(dataset: Any) -> tuple[str, ...]:
    reader = getattr(dataset, "reader", None)
    targets = getattr(reader, "iter_targets", None)
    labels = targets() if targets else (label for _, label in dataset)
    return tuple(str(label) for label in range(max(map(int, labels), default=-1) + 1))
