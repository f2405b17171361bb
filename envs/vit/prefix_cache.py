"""``PrefixCache``: what the blocks before the first stage make of images, computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.tensor_cache import TensorCache
from prunevit.envs.vit.timm_models.rope import RotaryEmbedding
from prunevit.envs.vit.tokens import Tokens


class PrefixCache:
    """A ``TensorCache`` of the tokens of images before the first stage.

    The backbone may move to another device. What it computed in another type of numbers is
    forgotten.

    Args:
        backbone: the staged ViT.
        run: computes what is missing: image indices int64 [n] -> their tokens before the first
            stage, and further tensors of theirs by name, each [n, ...]. It must return the same
            for an image each time.
        num_images: number of images in the data set.
        limit: bytes of host memory, used up as images come.
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
        self._cache = TensorCache(self._compute, num_images, limit)
        self._dtype = backbone.dtype
        self._rotary: RotaryEmbedding | None = None

    @property
    def hits(self) -> float:
        """Share of the images of the last ``load`` that were in the cache."""
        return self._cache.hits

    def load(self, indices: Tensor) -> tuple[Tokens, dict[str, Tensor]]:
        """Returns what ``run`` returns for the images ``indices``, int64 [n].

        Raises what ``run`` raises.
        """
        if self._dtype != self._backbone.dtype:
            self._cache.forget()
            self._dtype = self._backbone.dtype
        device = self._backbone.device
        tensors = self._cache.load(indices, device)
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
