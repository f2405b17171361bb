"""``merge_tokens``: pruned patches leave their content to the survivors that are most like them.

The averages, weighted with the number of patches that a token stands for, are those of ToMe (arXiv
2210.09461), and so is the attention in proportion to that number. Who goes is decided elsewhere.
ToMe compares keys; between two blocks there are none, so embeddings are compared.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from prunevit.envs.vit.tokens import Tokens, nonzero, remove_tokens


def merge_tokens(tokens: Tokens, alive: Tensor, num_prefix: int) -> Tokens:
    """Leaves only the tokens that are ``alive``, bool [B, L]. Each patch that goes is averaged into
    the most similar patch of its image that stays. Where none stays, its content is lost.
    """
    left = remove_tokens(tokens, alive)
    gone, into = _find_survivors(tokens, alive, num_prefix)
    if not len(gone):
        return left
    source, target = tokens.row[gone], left.row[into]
    wide = torch.promote_types(left.x.dtype, torch.float32)  # sums of half precision lose shares
    size = left.x.new_ones(len(left.x), dtype=wide) if left.size is None else left.size
    moved = size.new_ones(len(source)) if tokens.size is None else tokens.size[source]
    total = size.index_add(0, target, moved)
    share = (moved / total[target])[:, None]
    x = left.x * (size / total)[:, None]  # [S, D]
    x = x.index_add(0, target, tokens.x[source] * share)
    return replace(left, x=x.to(left.x.dtype), size=total)


@torch.no_grad()
def _find_survivors(tokens: Tokens, alive: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Slots in [B, L] of the patches that go, and of the patch that each goes into, int64 [R]."""
    patches = torch.arange(alive.shape[1], device=alive.device) >= num_prefix
    stays = alive & patches
    goes = tokens.alive & ~alive & stays.any(1, keepdim=True)
    counts = torch.stack([goes.sum(1), stays.sum(1)])  # [2, B]
    each = counts.cpu()
    slots = [
        nonzero(mask.view(1, -1), int(count.sum()))[1]
        for mask, count in zip((goes, stays), each, strict=True)
    ]
    if not len(slots[0]):
        return slots[0], slots[0]
    (units, cell), (others, _) = (
        pad_units(tokens.x[tokens.row[slot]].float(), mask, slot, int(count.max()))
        for mask, slot, count in zip((goes, stays), slots, each, strict=True)
    )
    is_padding = torch.arange(others.shape[1], device=alive.device) >= counts[1, :, None]
    similar = (units @ others.mT).masked_fill(is_padding[:, None], -torch.inf)
    nearest = similar.argmax(2).flatten().index_select(0, cell)  # among the survivors of the image
    first = (counts[1].cumsum(0) - counts[1]).index_select(0, slots[0] // alive.shape[1])
    return slots[0], slots[1].index_select(0, first + nearest)


def pad_units(rows: Tensor, mask: Tensor, places: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Scales tokens to length 1, so that products are cosines, and pads images to one length.

    Args:
        rows: the tokens that ``mask`` marks, [R, D].
        mask: bool [B, L].
        places: their flat indices in it, ascending, int64 [R].
        longest: the most of them in an image.

    Returns:
        [B, longest, D] with zeros for padding, and the place of each of the rows in its first two
        dimensions, int64 [R].
    """
    images, slots = mask.shape
    rank = mask.cumsum(1).flatten().index_select(0, places) - 1
    cell = places // slots * longest + rank
    unit = rows.new_zeros(images * longest, rows.shape[1])
    unit[cell] = F.normalize(rows, dim=1)
    return unit.unflatten(0, (images, longest)), cell
