"""``ImageDataset``: images of a folder or of a timm data set as an ``ImageSet``."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import get_worker_info

from prunevit.envs.data.image_set import ReadRequest
from prunevit.envs.data.image_sources import DECODING_THREADS, DatasetError, ImageSource

COLOUR_MODES = {1: "L", 3: "RGB"}  # PIL's, by number of channels


class ImageDataset:
    """Images of an ``ImageSource``, prepared by timm's transforms.

    Args:
        source: where the images are stored.
        indices: which of them belong to the set, and in which order, int64.
        data_config: timm's data configuration of the backbone.
        augmentation: None for evaluation. For training, arguments of
            ``timm.data.create_transform``, whose random numbers are drawn on every load.
        seed: seed of the augmentation.

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
        timms = {key: value for key, value in data_config.items() if key != "classes"}
        try:
            self._transform = create_transform(
                **(timms | dict(augmentation or {})), is_training=augmentation is not None
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
        return self.read(self.request(indices))

    def request(self, indices: Sequence[int] | Tensor, seed: int | None = None) -> ReadRequest:
        chosen = tuple(int(i) for i in indices)
        if self._random is None:
            return ReadRequest(chosen, None)
        random = self._random if seed is None else torch.Generator().manual_seed(seed)
        return ReadRequest(chosen, int(torch.randint(2**31, (), generator=random)))

    def read(self, request: ReadRequest) -> tuple[Tensor, Tensor]:
        chosen = [int(self._indices[i]) for i in request.indices]
        # in a worker process, one thread is enough: each worker has a core of its own
        threads = DECODING_THREADS if get_worker_info() is None else 1
        with ThreadPoolExecutor(threads) as pool:
            if request.seed is None:
                read = list(pool.map(self._read_transformed, chosen))
            else:
                decoded = pool.map(lambda i: self._source.read(i, self._mode), chosen)
                # timm draws from the global generators, so one thread must do it alone
                with _global_generators(request.seed):
                    read = [(self._transform(image), label) for image, label in decoded]
        images, labels = zip(*read, strict=True)
        return torch.stack(images), torch.tensor(labels)

    def _read_transformed(self, index: int) -> tuple[Tensor, int]:
        image, label = self._source.read(index, self._mode)
        return self._transform(image), label


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, NumPy and PyTorch (CPU), and restores them later."""
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
