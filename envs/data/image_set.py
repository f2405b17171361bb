"""``ImageSet``: what a set of images offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

NO_LABEL = -1  # the label of images without labels


class ImageSet(Protocol):
    """A fixed, indexed set of images, labelled or not.

    Attributes:
        num_classes: labels are 0..num_classes - 1. Without labels it is 0, and they are
            ``NO_LABEL``.
        class_names: names in the order of the labels.
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


@runtime_checkable
class Reseedable(Protocol):
    """An ``ImageSet`` with random numbers of its own, such as those of augmentation."""

    def reseed(self, seed: int) -> None:
        """Seeds them: from here on the same calls of ``load`` return the same images."""


@runtime_checkable
class Sourced(Protocol):
    """An ``ImageSet`` with several images of one source, which are no independent samples."""

    @property
    def sources(self) -> Tensor:
        """The number of each image's source, int64 [I]."""


@dataclass(frozen=True)
class ReadRequest:
    """A batch to read. Any process that reads it, at any time, gets the same images.

    Attributes:
        indices: indices of the images.
        seed: seed of their augmentation; None without augmentation.
    """

    indices: tuple[int, ...]
    seed: int | None


@runtime_checkable
class Prefetchable(Protocol):
    """An ``ImageSet`` whose ``load`` is ``read(request(indices))``.

    The two steps may happen in different processes.
    """

    def request(self, indices: Sequence[int] | Tensor, seed: int | None = None) -> ReadRequest:
        """Draws what ``load`` would draw, without reading anything.

        Args:
            indices: indices of the images.
            seed: act as if ``reseed`` had been called with this seed, and leave the set's own
                random numbers untouched.
        """

    def read(self, request: ReadRequest) -> tuple[Tensor, Tensor]:
        """Returns what ``load`` returns; changes nothing."""
