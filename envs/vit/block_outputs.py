"""``BlockOutputs``: the tokens after some blocks, collected while a ``StagedViT`` runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise

from prunevit.envs.vit.tokens import Tokens


class BlockOutputs:
    """Collects the tokens after each of ``blocks``.

    Sublayer 2 b is the attention of block b, sublayer 2 b + 1 its MLP.

    Args:
        blocks: 0-based blocks, at least one.
        stop_early: run nothing after the last of them.

    Attributes:
        tokens: what each of the blocks left, in the order in which they run.
    """

    def __init__(self, blocks: Collection[int], stop_early: bool = False) -> None:
        self.tokens: list[Tokens] = []
        self._ends = sorted({2 * (block + 1) for block in blocks})
        self._stop_early = stop_early

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cuts the sublayers ``start`` to ``stop - 1`` after the blocks, each part a start and a
        stop.
        """
        if self._stop_early:
            stop = min(stop, self._ends[-1])
        inside = [end for end in self._ends if start < end < stop]
        return pairwise((start, *inside, stop))

    def add(self, tokens: Tokens, stop: int) -> None:
        """Takes the tokens before sublayer ``stop``, if one of the blocks ends there."""
        if stop in self._ends:
            self.tokens.append(tokens)

    def end_before(self, edge: int) -> bool:
        """Whether nothing has to run from sublayer ``edge`` on."""
        return self._stop_early and self._ends[-1] <= edge
