"""``PrefixCache``: what the blocks before the first stage make of images, computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.rope import RotaryEmbedding
from prunevit.envs.vit.tokens import Tokens


class PrefixCache:
    """Keeps the tokens of images before the first stage, up to a limit of memory.

    The images that come first are kept. Images are drawn uniformly, so none is more likely than
    another to come again. The backbone may move to another device. What it computed in another type
    of numbers is forgotten.

    Args:
        backbone: the staged ViT.
        run: computes what is missing: image indices int64 [n] -> their tokens before the first
            stage, and further tensors of theirs by name, each [n, ...]. It must return the same
            for an image each time.
        num_images: number of images in the data set.
        limit: bytes of host memory, used up as images come.

    Attributes:
        hits: share of the images of the last ``load`` that were in the cache.
    """

    def __init__(
        self,
        backbone: StagedViT,
        run: Callable[[Tensor], tuple[Tokens, dict[str, Tensor]]],
        num_images: int,
        limit: float,
    ) -> None:
        self._backbone = backbone
        self._run = run
        self._limit = limit
        self._slot = torch.full((num_images,), -1, dtype=torch.int64)  # -1: not in the cache
        self._used = 0
        self._cached: dict[str, Tensor] = {}  # [capacity, ...], by name
        self._dtype = backbone.dtype
        self._rotary: RotaryEmbedding | None = None
        self.hits = 0.0

    def load(self, indices: Tensor) -> tuple[Tokens, dict[str, Tensor]]:
        """Returns what ``run`` returns for the images ``indices``, int64 [n].

        Raises what ``run`` raises.
        """
        if self._dtype != self._backbone.dtype:
            self._slot.fill_(-1)
            self._used, self._cached, self._dtype = 0, {}, self._backbone.dtype
        slot = self._slot[indices]
        known = slot >= 0
        missing = indices[~known].unique()
        computed = self._compute(missing) if len(missing) else {}
        place = torch.searchsorted(missing, indices[~known])
        device = self._backbone.device
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
        x, attention = tensors.pop("x"), tensors.pop("attention", None)
        rotary = self._rotary
        if rotary is not None:
            rotary = replace(rotary, sin_cos=rotary.sin_cos.to(device))
        return self._backbone.restore(x, attention, rotary), tensors

    def _compute(self, indices: Tensor) -> dict[str, Tensor]:
        """What is to be cached of each of the images [n], on the backbone's device."""
        tokens, extras = self._run(indices)
        self._rotary = tokens.rotary
        per_image = (len(indices), self._backbone.num_slots)
        tensors = {"x": tokens.x.unflatten(0, per_image), **extras}
        if tokens.attention is not None:
            tensors["attention"] = tokens.attention.unflatten(0, per_image)
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
        for name, tensor in tensors.items():
            room = self._cached[name][self._used : self._used + len(indices)]
            room.copy_(tensor[: len(room)])
        count = min(len(indices), len(self._cached["x"]) - self._used)
        self._slot[indices[:count]] = torch.arange(self._used, self._used + count)
        self._used += count
