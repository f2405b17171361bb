"""Labelled images behind one interface: the embedded digits, image folders, timm's datasets."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import create_transform
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import get_worker_info

from prunevit.envs.data import digits
from prunevit.envs.data.digits import Split
from prunevit.envs.data.image_sources import (
    DECODING_THREADS,
    DatasetError,
    FolderSource,
    ImageSource,
    Openers,
    folder_openers,
)
from prunevit.envs.data.timm_sources import TIMM_PREFIXES, timm_openers

__all__ = [
    "ClutteredDigits",
    "DatasetError",
    "ImageDataset",
    "ImageSet",
    "Load",
    "Prefetchable",
    "Split",
    "open_images",
]

DIGITS = "digits"
FOLDER_PREFIX = "folder:"
VALIDATION_SHARE = 0.1  # of the training images, where a dataset has no validation split
DEFAULT_SIZES: dict[Split, int] = {"train": 20_000, "validation": 2_000, "test": 5_000}
MAX_ROTATION = math.radians(10)
MAX_SHEAR = 0.15
COLOUR_MODES = {1: "L", 3: "RGB"}  # by number of channels


class ImageSet(Protocol):
    """A fixed, indexed set of labelled images.

    Attributes:
        num_classes: labels are 0..num_classes - 1.
        class_names: in the order of the labels.
    """

    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def load(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Reads images.

        Returns:
            images float32 [n, C, H, W], normalised for the backbone, and labels int64 [n], both on
            the CPU.

        Raises:
            DatasetError: an image is damaged.
        """
        ...


@runtime_checkable
class Reseedable(Protocol):
    """An ``ImageSet`` that draws something anew when images are loaded, as augmentation does."""

    def reseed(self, seed: int) -> None:
        """From here on the same loads give the same images."""
        ...


@dataclass(frozen=True)
class Load:
    """A batch that is to be read: whoever reads it, and when, gets the same.

    Attributes:
        indices: of the images.
        seed: of their augmentation; None where there is none.
    """

    indices: tuple[int, ...]
    seed: int | None


@runtime_checkable
class Prefetchable(Protocol):
    """An ``ImageSet`` whose ``load`` is ``read`` of what ``plan`` gives: one may be here, the other
    in another process.
    """

    def plan(self, indices: Sequence[int] | Tensor, seed: int | None = None) -> Load:
        """What ``load`` is going to read, and draws for it.

        Args:
            indices: of ``load``.
            seed: as if ``reseed`` had been called with it; what the set itself draws later is then
                left as it is.
        """
        ...

    def read(self, load: Load) -> tuple[Tensor, Tensor]:
        """As ``ImageSet.load``; it changes nothing of the set."""
        ...


class ClutteredDigits:
    """``digits.draw_digits`` as an ``ImageSet``; the images are drawn when first asked for.

    Args:
        split: "train", "validation" or "test".
        size: number of images; ``DEFAULT_SIZES`` where None.
        seed: another seed is another draw of images from the same scans.
        augment: rotate and shear each image a little, anew each time it is loaded.
    """

    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(
        self, split: Split, size: int | None = None, seed: int = 0, augment: bool = False
    ) -> None:
        self._split: Split = split
        self._size = DEFAULT_SIZES[split] if size is None else size
        self._seed = seed
        self._drawn: tuple[Tensor, Tensor] | None = None
        self._augmentation = torch.Generator().manual_seed(seed) if augment else None

    def __len__(self) -> int:
        return self._size

    def reseed(self, seed: int) -> None:
        if self._augmentation is not None:
            self._augmentation.manual_seed(seed)

    def load(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        if self._drawn is None:
            self._drawn = digits.draw_digits(self._split, self._size, self._seed)
        images, labels = self._drawn
        index = torch.as_tensor(indices, dtype=torch.long)
        chosen = digits.normalise(images[index])
        if self._augmentation is not None:
            chosen = _rotate_and_shear(chosen, self._augmentation)
        return chosen, labels[index]


def _rotate_and_shear(images: Tensor, generator: torch.Generator) -> Tensor:
    angle, shear = (
        (torch.rand(len(images), generator=generator) * 2 - 1) * most
        for most in (MAX_ROTATION, MAX_SHEAR)
    )
    zero = torch.zeros_like(angle)
    rows = torch.stack(
        [
            torch.stack([angle.cos(), angle.sin() + shear, zero], dim=1),
            torch.stack([-angle.sin(), angle.cos(), zero], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


class ImageDataset:
    """Images of an ``ImageSource`` as an ``ImageSet``, through timm's transforms.

    Args:
        source: where they are stored.
        indices: which of them, and in which order.
        data_config: timm's, of the backbone.
        augmentation: None for evaluation; for training, arguments of
            ``timm.data.create_transform``, drawn anew each time an image is loaded.
        seed: of the augmentation.

    Raises:
        DatasetError: the backbone takes neither grey nor RGB images, or an argument of
            ``augmentation`` is unknown.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: NDArray[np.int64],
        data_config: Mapping[str, Any],
        augmentation: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        channels = data_config["input_size"][0]
        if channels not in COLOUR_MODES:
            raise DatasetError(
                f"the backbone takes images of {channels} channels, photographs have 1 (grey) or 3"
            )
        self._mode = COLOUR_MODES[channels]
        self._source = source
        self._indices = indices
        try:
            self._transform = create_transform(
                **(dict(data_config) | dict(augmentation or {})),
                is_training=augmentation is not None,
            )
        except (TypeError, ValueError, AssertionError) as error:
            raise DatasetError(f"timm.data.create_transform: {error}") from error
        self._random = None if augmentation is None else torch.Generator().manual_seed(seed)
        self.class_names = source.class_names
        self.num_classes = len(source.class_names)
        source.prepare(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def reseed(self, seed: int) -> None:
        if self._random is not None:
            self._random.manual_seed(seed)

    def load(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        return self.read(self.plan(indices))

    def plan(self, indices: Sequence[int] | Tensor, seed: int | None = None) -> Load:
        chosen = tuple(int(i) for i in indices)
        if self._random is None:
            return Load(chosen, None)
        random = self._random if seed is None else torch.Generator().manual_seed(seed)
        return Load(chosen, int(torch.randint(2**31, (), generator=random)))

    def read(self, load: Load) -> tuple[Tensor, Tensor]:
        chosen = [int(self._indices[i]) for i in load.indices]
        # where processes share the work, each has a core of its own
        threads = DECODING_THREADS if get_worker_info() is None else 1
        with ThreadPoolExecutor(threads) as pool:
            if load.seed is None:
                read = list(pool.map(self._read_transformed, chosen))
            else:
                decoded = pool.map(lambda i: self._source.read(i, self._mode), chosen)
                # timm draws from the global generators: in one thread only, and for us alone
                with _global_generators(load.seed):
                    read = [(self._transform(image), label) for image, label in decoded]
        images, labels = zip(*read, strict=True)
        return torch.stack(images), torch.tensor(labels)

    def _read_transformed(self, index: int) -> tuple[Tensor, int]:
        image, label = self._source.read(index, self._mode)
        return self._transform(image), label


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, NumPy and PyTorch (CPU), then puts them back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def open_images(
    dataset: str,
    split: Split,
    data_config: Mapping[str, Any],
    size: int | None = None,
    seed: int = 0,
    augment: bool | Mapping[str, Any] = False,
    skip: Collection[str] = (),
) -> ImageSet:
    """Opens one split of a dataset, its images prepared as the backbone takes them.

    Photographs come with one or two held-out splits. Where there are two, they are "validation"
    and "test". Where there is one, that is "test", whatever its name, and "validation" is the
    share ``VALIDATION_SHARE`` of the training images, always the same ones, which "train" then
    lacks: nothing is chosen on the images that are reported.

    Args:
        dataset: "digits"; "folder:PATH" with PATH/train/CLASS/*.jpg and folders "validation" (or
            "val") and "test" like it, one of them at least; or a name of
            ``timm.data.create_dataset``, with its folder behind a colon where it needs one:
            "torch/cifar10:FOLDER", "hfds/OWNER/NAME", "wds/:FOLDER".
        split: "train", "validation" or "test".
        data_config: ``timm.data.resolve_model_data_config(backbone)``.
        size: digits: so many images are drawn, ``DEFAULT_SIZES`` where None; photographs: a random
            subset of so many at most, all where None.
        seed: of the draw, of the subset and of the augmentation.
        augment: True for the training transform, anew each time an image is loaded; for
            photographs also a mapping of arguments of ``timm.data.create_transform``.
        skip: of folders, files that are left out, as ``find_bad_images`` names them.

    Raises:
        DatasetError: the dataset is unknown, missing, empty or without such a split; its splits
            differ in their classes; the backbone takes other images.
    """
    if split not in get_args(Split):
        raise DatasetError(f"unknown split {split!r}: choose from {', '.join(get_args(Split))}")
    if size is not None and size < 1:
        raise DatasetError(f"a set of {size} images of {dataset}: at least 1 is needed")
    if dataset == DIGITS:
        if not isinstance(augment, bool):
            raise DatasetError("digits have an augmentation of their own, which has no arguments")
        _check_takes_digits(data_config)
        return ClutteredDigits(split, size, seed, augment)
    source, indices = _open_split(dataset, split, skip)
    if size is not None and size < len(indices):
        indices = np.random.RandomState(seed).permutation(indices)[:size]
    augmentation = None if augment is False else {} if augment is True else augment
    return ImageDataset(source, indices, data_config, augmentation, seed)


def find_bad_images(dataset: str) -> dict[str, str]:
    """The damaged files of all splits of a folder, and what is wrong with each; decodes them all.

    Raises:
        DatasetError: as ``open_images``, or the dataset is no folder.
    """
    if not dataset.startswith(FOLDER_PREFIX):
        raise DatasetError(f"images can be skipped in folder:PATH only, not in {dataset}")
    bad: dict[str, str] = {}
    for opener in _openers(dataset).values():
        source = opener()
        assert isinstance(source, FolderSource)
        bad |= source.bad_files()
    return bad


def read_class_names(dataset: str) -> tuple[str, ...]:
    """The classes of ``dataset`` by label; raises what ``open_images`` raises."""
    if dataset == DIGITS:
        return ClutteredDigits.class_names
    return _openers(dataset)["train"]().class_names


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
            f"unknown dataset {dataset!r}: choose digits, folder:PATH, or a name of "
            f"timm.data.create_dataset, as torch/cifar10:FOLDER or hfds/OWNER/NAME "
            f"(it begins with {', '.join(TIMM_PREFIXES)})"
        )
    if "train" not in openers:
        raise DatasetError(f"{dataset} has no split named train")
    return openers


def _open_split(
    dataset: str, split: Split, skip: Collection[str]
) -> tuple[ImageSource, NDArray[np.int64]]:
    """The source that holds ``split``, and which of its images are it."""
    openers = _openers(dataset, skip)
    held_out: list[Split] = [name for name in ("validation", "test") if name in openers]
    train = openers["train"]()
    if split == "test" and not held_out:
        raise DatasetError(f"{dataset} has nothing but training images: it needs a test split")
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
