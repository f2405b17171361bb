"""What the blocks before the first stage make of images, kept so that it is computed once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import record_function

from prunevit.envs.data.datasets import ImageSet
from prunevit.envs.game import InitialState, TokenGame
from prunevit.envs.vit.rope import RotaryEmbedding


class PrefixCache:
    """The images of a set as they stand before the first stage, as many as memory is given for.

    Those that came first are kept: images are drawn evenly, and none is likelier to come again than
    another.

    Args:
        game: that begins with them.
        images: the same each time they are loaded.
        limit: bytes of the host's memory; used up as images come.

    Attributes:
        hits: share of the images of the last ``load`` that were there.
    """

    def __init__(self, game: TokenGame, images: ImageSet, limit: float) -> None:
        self._game = game
        self._images = images
        self._limit = limit
        self._slot = torch.full((len(images),), -1, dtype=torch.int64)  # -1: not there
        self._used = 0
        self._kept: dict[str, Tensor] = {}  # [capacity, ...], by part of a beginning
        self._rotary: RotaryEmbedding | None = None
        self.hits = 0.0

    def load(self, indices: Tensor) -> tuple[InitialState, Tensor]:
        """Images int64 [n] as they begin, and their labels int64 [n]; raises what ``ImageSet.load``
        and ``TokenGame.begin`` raise.
        """
        slot = self._slot[indices]
        known = slot >= 0
        missing = indices[~known].unique()
        fresh = self._run(missing) if len(missing) else {}
        place = torch.searchsorted(missing, indices[~known])
        parts = {}
        for name, kept in (self._kept or fresh).items():
            device = self._game.backbone.device
            part = torch.empty(len(indices), *kept.shape[1:], dtype=kept.dtype, device=device)
            if known.any():
                part[known.to(device)] = kept[slot[known]].to(device)
            if len(missing):
                part[~known.to(device)] = fresh[name][place.to(device)]
            parts[name] = part
        self._keep(missing, fresh)
        self.hits = float(known.float().mean())
        tokens = self._game.backbone.restore(parts["x"], parts.get("attention"), self._rotary)
        return InitialState(tokens, parts.get("dense_logits")), parts["label"]

    def _run(self, indices: Tensor) -> dict[str, Tensor]:
        """What is to be kept of each of the images [n], on the backbone's device."""
        with record_function("load images"):
            pixels, labels = self._images.load(indices)
        begun, labels = self._game.begin(pixels, labels)
        self._rotary = begun.tokens.rotary
        per_image = (len(indices), self._game.backbone.num_slots)
        parts = {"x": begun.tokens.x.unflatten(0, per_image), "label": labels}
        if begun.tokens.attention is not None:
            parts["attention"] = begun.tokens.attention.unflatten(0, per_image)
        if begun.dense_logits is not None:
            parts["dense_logits"] = begun.dense_logits
        return parts

    def _keep(self, indices: Tensor, parts: dict[str, Tensor]) -> None:
        """Of the images that were missing as many as there is room for."""
        if parts and not self._kept:
            size = sum(part[0].numel() * part.element_size() for part in parts.values())
            capacity = min(int(self._limit // size), len(self._images))
            # memory that nobody has written to is not taken from the machine yet
            self._kept = {
                name: torch.empty(capacity, *part.shape[1:], dtype=part.dtype)
                for name, part in parts.items()
            }
        for name, part in parts.items():
            kept = self._kept[name]
            room = kept[self._used : self._used + len(indices)]
            room.copy_(part[: len(room)])
        if parts:
            count = min(len(indices), len(self._kept["x"]) - self._used)
            self._slot[indices[:count]] = torch.arange(self._used, self._used + count)
            self._used += count
