"""``open_images``: opens a data set by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from prunevit.choices import check_choice
from prunevit.envs.data import digits
from prunevit.envs.data.classes import with_labels_of
from prunevit.envs.data.cluttered_digits import ClutteredDigits
from prunevit.envs.data.digits import Split
from prunevit.envs.data.image_dataset import ImageDataset
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data.image_sources import (
    SPLIT_NAMES,
    DatasetError,
    FileSource,
    ImageSource,
    Openers,
    PhotoSource,
    folder_openers,
)
from prunevit.envs.data.timm_sources import TIMM_PREFIXES, timm_openers

DIGITS = "digits"
FOLDER_PREFIX = "folder:"
PHOTOS_PREFIX = "photos:"
HELD_OUT_NAMES = (SPLIT_NAMES["validation"], SPLIT_NAMES["test"])
VALIDATION_SHARE = 0.1  # of the training images, if a data set has no validation split
PHOTOS_SHARE = 0.1  # of the photographs, for validation and for test


def open_images(
    dataset: str,
    split: Split,
    data_config: Mapping[str, Any],
    size: int | None = None,
    seed: int = 0,
    augment: bool | Mapping[str, Any] = False,
    skip: Collection[str] = (),
) -> ImageSet:
    """Opens one split of a dataset, with its images prepared for the backbone.

    Folders and timm's datasets have one or two held-out splits. Two are "validation" and "test".
    A single one is "test", whatever its name. "validation" is then the share ``VALIDATION_SHARE``
    of the training images, always the same ones, and "train" is without them. So nothing is ever
    chosen on the images that results are reported on. Photographs without classes have no splits of
    their own: shares of ``PHOTOS_SHARE``, always the same ones, are "validation" and "test", and
    the rest is "train".

    Args:
        dataset: one of

            - "digits";
            - "folder:PATH", with images in PATH/train/CLASS and in at least one of
              PATH/validation/CLASS (or val, valid) and PATH/test/CLASS. PATH/classes.txt may list
              the classes in the order of their labels, one a line;
            - "photos:PATH", any tree of images, for whatever needs no labels: all labels are
              ``NO_LABEL``, and there are no classes;
            - a name of ``timm.data.create_dataset``, followed by a colon and its folder if it
              needs one: "torch/cifar10:FOLDER", "hfds/OWNER/NAME", "wds/:FOLDER".
        split: "train", "validation" or "test".
        data_config: ``model_data_config(backbone)``, or timm's ``resolve_model_data_config``, which
            doesn't say what classes the backbone has: then labels are in the dataset's order.
        size: for digits, the number of images to draw (``DEFAULT_SIZES`` if None). For others, the
            size of a random subset (all images if None or if there are no more).
        seed: seed of the draw, of the subset and of the augmentation.
        augment: True for the training transform, drawn on every load. Except for digits, also a
            mapping of arguments of ``timm.data.create_transform``.
        skip: files of a folder to leave out, as ``find_bad_images`` names them.

    Raises:
        DatasetError: the dataset is unknown, missing, empty or has no such split, its splits have
            different classes, or the backbone takes other images or has other classes.
    """
    check_choice("split", split, get_args(Split), DatasetError)
    if size is not None and size < 1:
        raise DatasetError(f"a set of {size} images of {dataset}: at least 1 is needed")
    if dataset == DIGITS:
        if not isinstance(augment, bool):
            raise DatasetError("digits have an augmentation of their own, which has no arguments")
        _check_takes_digits(data_config)
        return ClutteredDigits(split, size, seed, augment)
    source, indices = _open_split(dataset, split, skip)
    if "classes" in data_config and source.class_names:
        source = with_labels_of(data_config["classes"], dataset, source)
    if size is not None and size < len(indices):
        indices = np.random.RandomState(seed).permutation(indices)[:size]
    augmentation = None if augment is False else {} if augment is True else augment
    return ImageDataset(source, indices, data_config, augmentation, seed)


def is_on_disk(dataset: str) -> bool:
    """Whether opening ``dataset`` reads image files and nothing else. The libraries behind the
    others may fetch what is named, or run it: webdataset takes commands for addresses.
    """
    return dataset == DIGITS or dataset.startswith((FOLDER_PREFIX, PHOTOS_PREFIX))


def find_bad_images(dataset: str) -> dict[str, str]:
    """Decodes all images of a folder, in all splits; returns what is wrong with the damaged files.

    Raises:
        DatasetError: the dataset is not a folder, or ``open_images`` could not open it.
    """
    if dataset.startswith(PHOTOS_PREFIX):
        return _open_photos(dataset).bad_files()
    if not dataset.startswith(FOLDER_PREFIX):
        raise DatasetError(
            f"images can be skipped in folder:PATH and photos:PATH only, not in {dataset}"
        )
    bad: dict[str, str] = {}
    for opener in _openers(dataset).values():
        source = opener()
        assert isinstance(source, FileSource)
        bad |= source.bad_files()
    return bad


def has_classes(dataset: str) -> bool:
    """Whether the images of ``dataset`` have labels."""
    return not dataset.startswith(PHOTOS_PREFIX)


def read_class_names(dataset: str) -> tuple[str, ...]:
    """Reads the names of the classes in the order of labels.

    Raises:
        DatasetError: ``open_images`` could not open the dataset, or it has no classes.
    """
    if dataset == DIGITS:
        return ClutteredDigits.class_names
    check_has_classes(dataset)
    return _openers(dataset)["train"]().class_names


def check_has_classes(dataset: str) -> None:
    """Raises a ``DatasetError`` if the images of ``dataset`` have no labels."""
    if not has_classes(dataset):
        raise DatasetError(
            f"{dataset} has no classes, and labels are needed here: give folder:PATH, with images "
            "in PATH/train/CLASS"
        )


def _check_takes_digits(data_config: Mapping[str, Any]) -> None:
    shape = (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
    taken = tuple(data_config.get("input_size", shape))
    if taken != shape:
        raise DatasetError(
            f"digits are images of {_times(shape)}, the backbone takes {_times(taken)}: choose "
            "another dataset, or a backbone with in_chans=1 and img_size=64"
        )


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _openers(dataset: str, skip: Collection[str] = ()) -> Openers:
    if dataset.startswith(FOLDER_PREFIX):
        openers = folder_openers(dataset.removeprefix(FOLDER_PREFIX), skip)
    elif dataset.lower().startswith(TIMM_PREFIXES):
        openers = timm_openers(dataset)
    else:
        raise DatasetError(
            f"unknown dataset {dataset!r}: choose digits, folder:PATH, photos:PATH, or a name of "
            f"timm.data.create_dataset, as torch/cifar10:FOLDER or hfds/OWNER/NAME "
            f"(it begins with {', '.join(TIMM_PREFIXES)})"
        )
    if "train" not in openers:
        raise DatasetError(f"{dataset} has no split named train")
    return openers


def _open_split(
    dataset: str, split: Split, skip: Collection[str]
) -> tuple[ImageSource, NDArray[np.int64]]:
    """Opens the source that contains ``split``; returns it and the split's indices."""
    if dataset.startswith(PHOTOS_PREFIX):
        return _open_part_of_photos(dataset, split, skip)
    openers = _openers(dataset, skip)
    held_out: list[Split] = [name for name in ("validation", "test") if name in openers]
    train = openers["train"]()
    if split == "test" and not held_out:
        looked_for = ", ".join(name for names in HELD_OUT_NAMES for name in names)
        raise DatasetError(
            f"{dataset} has nothing but training images: it needs another split (named one of "
            f"{looked_for})"
        )
    if split == "test" or (split == "validation" and len(held_out) == 2):
        stored_as = held_out[-1] if split == "test" else split
        source = openers[stored_as]()
        _check_same_classes(dataset, stored_as, source.class_names, train.class_names)
        return source, np.arange(len(source))
    if len(held_out) == 2:
        return train, np.arange(len(train))
    order = np.random.RandomState(0).permutation(len(train))
    for_validation = max(1, round(VALIDATION_SHARE * len(train)))
    chosen = order[:for_validation] if split == "validation" else order[for_validation:]
    if not len(chosen):
        raise DatasetError(f"{dataset} has too few images to hold some of them out for validation")
    return train, np.sort(chosen)


def _open_photos(dataset: str) -> PhotoSource:
    return PhotoSource(dataset.removeprefix(PHOTOS_PREFIX))


def _open_part_of_photos(
    dataset: str, split: Split, skip: Collection[str]
) -> tuple[ImageSource, NDArray[np.int64]]:
    """Does what ``_open_split`` does. A photograph's split doesn't depend on which are skipped."""
    source = _open_photos(dataset)
    order = np.random.RandomState(0).permutation(len(source))
    held_out = max(1, round(PHOTOS_SHARE * len(source)))
    first = {"test": 0, "validation": held_out, "train": 2 * held_out}[split]
    last = len(source) if split == "train" else first + held_out
    chosen = [i for i in order[first:last] if source.files[i] not in skip]
    if not chosen:
        raise DatasetError(
            f"{dataset}: of {len(source)} photographs none are left for {split} "
            f"({len(skip)} are skipped)"
        )
    return source, np.sort(chosen)


def _check_same_classes(
    dataset: str, split: Split, names: Sequence[str], train_names: Sequence[str]
) -> None:
    if tuple(names) == tuple(train_names):
        return
    only_here = ", ".join(sorted(set(names) - set(train_names)))
    only_in_train = ", ".join(sorted(set(train_names) - set(names)))
    raise DatasetError(
        f"{dataset}: the classes of {split} and train differ; only in {split}: "
        f"{only_here or 'none'}; only in train: {only_in_train or 'none'}"
    )
