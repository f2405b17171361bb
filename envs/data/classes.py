"""Which output of a model is which class of a dataset."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset

from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data.image_sources import CLASS_LIST, DatasetError, FolderSource, ImageSource

SHOWN = 4  # names in a message


@dataclass(frozen=True)
class ModelClasses:
    """The classes that a model distinguishes.

    Attributes:
        count: outputs of its head.
        names: their names in order; None if unknown.
    """

    count: int
    names: tuple[str, ...] | None = None

    def vocabularies(self) -> list[tuple[str, ...]]:
        """Ways to name all outputs in order. A model of as many classes as ImageNet may be one of
        ImageNet: whether it is, the names of the dataset tell.
        """
        if self.names is not None and len(self.names) == self.count:
            return [self.names]
        subset = infer_imagenet_subset({"num_classes": self.count})
        if subset is None:
            return []
        return list(_imagenet_vocabularies(subset))


@lru_cache
def _imagenet_vocabularies(subset: str) -> tuple[tuple[str, ...], ...]:
    """WordNet ids, lists of synonyms, and first synonyms of ImageNet's classes in order."""
    info = ImageNetInfo(subset)
    ids = info.label_names()
    words = [info.index_to_description(place) for place in range(len(ids))]
    return tuple(ids), tuple(words), tuple(word.split(",")[0] for word in words)


class RelabelledSource:
    """An ``ImageSource`` with the labels of a model.

    Args:
        source: the images.
        outputs: the model's output for each class of ``source``, int64 [classes].
        class_names: names of all outputs.
    """

    def __init__(
        self, source: ImageSource, outputs: NDArray[np.int64], class_names: tuple[str, ...]
    ) -> None:
        self._source = source
        self._outputs = outputs.tolist()
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self._source)

    def prepare(self, indices: NDArray[np.int64]) -> None:
        self._source.prepare(indices)

    def read(self, index: int, mode: str) -> tuple[Image.Image, int]:
        image, label = self._source.read(index, mode)
        return image, self._outputs[label]


def with_labels_of(classes: ModelClasses, dataset: str, source: ImageSource) -> ImageSource:
    """Returns ``source`` with labels that are outputs of the model.

    Where names of the model are known and contain all names of the dataset, they decide. Otherwise
    the dataset's order does, and the numbers of classes must be equal. A warning shows both orders
    where one may be wrong.

    Raises:
        DatasetError: the dataset has other classes than the model.
    """
    names = source.class_names
    vocabularies = classes.vocabularies()
    for words in vocabularies:
        outputs = _find(names, words)
        if outputs is not None:
            same = outputs.tolist() == list(range(classes.count))
            return source if same else RelabelledSource(source, outputs, words)
    if len(names) != classes.count:
        raise DatasetError(
            f"{dataset} has {len(names)} classes ({_some(names)}), the backbone distinguishes "
            f"{classes.count}{_known(vocabularies)}: take a backbone of as many classes, name the "
            "classes as the backbone does (by WordNet id, or in words), or for a folder list the "
            f"backbone's classes in PATH/{CLASS_LIST}, one a line in the order of its outputs"
        )
    in_folders = isinstance(source, FolderSource) and not source.is_listed
    if vocabularies:
        warnings.warn(
            f"{dataset} has the classes {_some(names)}, the backbone{_known(vocabularies)}: as "
            f"many, but other names. Labels follow the dataset's order; PATH/{CLASS_LIST} of a "
            "folder can give another",
            stacklevel=3,
        )
    elif in_folders and list(names) != sorted(names):
        warnings.warn(
            f"{dataset}: labels follow the natural order of the class folders, {_some(names)}, as "
            f"timm's do; torchvision's order is {_some(sorted(names))}. If the backbone was "
            f"trained with that, list its classes in PATH/{CLASS_LIST}, one a line",
            stacklevel=3,
        )
    return source


def check_labels(classes: ModelClasses | None, images: ImageSet) -> None:
    """Checks that labels of ``images``, however they were opened, are outputs of the model. Images
    without labels pass.

    Where names of the model's outputs are unknown, or are others than those of the images, only
    numbers of classes can be compared; a warning shows both where one may be wrong.

    Raises:
        DatasetError: the images have other classes than the model, or in another order.
    """
    if classes is None or not images.num_classes:
        return
    names = tuple(getattr(images, "class_names", ()))
    vocabularies = classes.vocabularies()
    orders = [_find(names, words) for words in vocabularies] if names else []
    found = [order.tolist() for order in orders if order is not None]
    fits = images.num_classes == classes.count
    if fits and [*range(classes.count)] in found:
        return
    if found or not fits:
        raise DatasetError(
            f"the dataset has {images.num_classes} classes ({_some(names)}), the backbone "
            f"distinguishes {classes.count}{_known(vocabularies)}: labels must be outputs of the "
            "backbone, in its order, as open_images(..., model_data_config(backbone)) makes them"
        )
    if vocabularies and names:
        warnings.warn(
            f"the dataset has the classes {_some(names)}, the backbone{_known(vocabularies)}: as "
            "many, but other names. Labels must be in the order of the backbone's outputs",
            stacklevel=3,
        )


def _find(names: Sequence[str], words: Sequence[str]) -> NDArray[np.int64] | None:
    """Places of ``names`` in ``words``; None if one is missing or ambiguous."""
    wanted, known = [_plain(name) for name in names], [_plain(word) for word in words]
    if wanted == known:
        return np.arange(len(known))
    places: dict[str, list[int]] = {}
    for place, word in enumerate(known):
        places.setdefault(word, []).append(place)
    found = [places.get(name, []) for name in wanted]
    if len(set(wanted)) < len(wanted) or any(len(each) != 1 for each in found):
        return None
    return np.array([each[0] for each in found], np.int64)


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ").strip()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _known(vocabularies: Sequence[Sequence[str]]) -> str:
    return f" ({_some(vocabularies[0])})" if vocabularies else ""
