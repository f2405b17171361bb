"""``TensorCache``: what was computed of images, kept in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class TensorCache:
    """Keeps tensors that were computed of images, up to a limit of memory.

    The images that come first are kept. Images are drawn uniformly, so none is more likely than
    another to come again.

    Args:
        compute: computes what is missing: image indices int64 [n] -> tensors by name, each
            [n, ...]. It must return the same for an image each time.
        num_images: number of images in the data set.
        limit: bytes of host memory, used up as images come.

    Attributes:
        hits: share of the images of the last ``load`` that were in the cache.
    """

    def __init__(
        self, compute: Callable[[Tensor], dict[str, Tensor]], num_images: int, limit: float
    ) -> None:
        self._compute = compute
        self._limit = limit
        self._slot = torch.full((num_images,), -1, dtype=torch.int64)  # -1: not in the cache
        self._used = 0
        self._cached: dict[str, Tensor] = {}  # [capacity, ...], by name
        self.hits = 0.0

    def forget(self) -> None:
        """Drops what is kept."""
        self._slot.fill_(-1)
        self._used, self._cached = 0, {}

    def load(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Returns what ``compute`` returns for the images ``indices``, int64 [n], on ``device``.

        Raises what ``compute`` raises.
        """
        slot = self._slot[indices]
        known = slot >= 0
        missing = indices[~known].unique()
        computed = self._compute(missing) if len(missing) else {}
        place = torch.searchsorted(missing, indices[~known])
        tensors = {}
        for name, cached in (self._cached or computed).items():
            tensor = torch.empty(len(indices), *cached.shape[1:], dtype=cached.dtype, device=device)
            if known.any():
                tensor[known.to(device)] = cached[slot[known]].to(device)
            if len(missing):
                tensor[~known.to(device)] = computed[name][place.to(device)]
            tensors[name] = tensor
        self._store(missing, computed)
        self.hits = float(known.float().mean())
        return tensors

    def _store(self, indices: Tensor, tensors: dict[str, Tensor]) -> None:
        """Caches as many of the computed images as there is room for."""
        if not tensors:
            return
        if not self._cached:
            size = sum(tensor[0].numel() * tensor.element_size() for tensor in tensors.values())
            capacity = min(int(self._limit // size), len(self._slot))
            # the system provides memory only when it is written to
            self._cached = {
                name: torch.empty(capacity, *tensor.shape[1:], dtype=tensor.dtype)
                for name, tensor in tensors.items()
            }
        room = len(next(iter(self._cached.values()))) - self._used
        count = min(len(indices), room)
        for name, tensor in tensors.items():
            self._cached[name][self._used : self._used + count].copy_(tensor[:count])
        self._slot[indices[:count]] = torch.arange(self._used, self._used + count)
        self._used += count
