"""Zero-TPrune, written from the paper "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of
the Attention Graph in Pre-Trained Transformers" (arXiv 2305.17328), whose code is not public.

Attention is a graph, in which tokens vote for tokens. Behind some blocks, patches are pruned in
three steps. One round of voting ranks them (I'). Then those of the less important half that are
most like one of the other half go (S). On the graph of the rest, votes are weighted with the
importance of who votes, again and again (a weighted page rank), and the least important ones go
(I). Heads are aggregated by the root of the mean square of their scores; heads whose scores vary
too little or too much don't count.

Our reading, where the paper leaves it open: a head's variance is that of its scores over their
mean, and if all heads are out, all count; each of the two steps prunes half of what goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.benchmarks.baselines.timm_parts import (
    check_reads_class_token,
    chunks,
    embed,
    feed_forward,
    pass_counter,
    run_block,
    tokens_after_blocks,
)
from prunevit.envs.vit.onednn_linear import linear
from prunevit.envs.vit.timm_models.heads import classify_prefix

LEAST_VARIANCE, MOST_VARIANCE = 0.01, 0.7  # the paper's v_min and v_max
# the paper's rounds of voting: in the first three blocks, in the last three, and between
EARLY_ROUNDS, LATE_ROUNDS, ROUNDS = 30, 1, 5


def page_rank(attention: Tensor, rounds: int) -> Tensor:
    """Importance of tokens, of mean 1 for each head.

    Args:
        attention: what each token pays each, [B, heads, L, L].
        rounds: of voting; in the first one all votes weigh the same.

    Returns:
        [B, heads, L].
    """
    scores = torch.ones_like(attention[:, :, :1])
    for _ in range(rounds):
        scores = scores @ attention
        scores = scores / scores.mean(3, keepdim=True)
    return scores[:, :, 0]


def aggregate(scores: Tensor) -> Tensor:
    """Root of the mean square over the heads that tell tokens apart: [B, heads, L] -> [B, L]."""
    variance = scores.var(2, unbiased=False)
    counts = (variance >= LEAST_VARIANCE) & (variance <= MOST_VARIANCE)
    counts = counts | ~counts.any(1, keepdim=True)
    weight = counts.to(scores.dtype)[..., None]
    return ((scores**2 * weight).sum(1) / weight.sum(1)).sqrt()


def without_similar(importance: Tensor, keys: Tensor, count: int) -> Tensor:
    """Which patches stay if ``count`` of the less important half go: those that are most like one
    of the other half.

    Args:
        importance: [B, N].
        keys: [B, N, D].
        count: at most half of N, rounded down.

    Returns:
        Their places, ascending, int64 [B, N - count].
    """
    order = importance.argsort(dim=1, descending=True)
    unit = F.normalize(keys.take_along_dim(order[..., None], 1), dim=2)
    upper = order.shape[1] - order.shape[1] // 2
    most = (unit[:, upper:] @ unit[:, :upper].mT).amax(2)
    lower = order[:, upper:].take_along_dim(most.argsort(dim=1)[:, : most.shape[1] - count], 1)
    return torch.cat([order[:, :upper], lower], dim=1).sort(1).values


def choose(attention: Tensor, keys: Tensor, prefix: int, count: int, rounds: int) -> Tensor:
    """Which patches stay: places among the patches, ascending, int64 [B, count].

    Args:
        attention: what each token pays each, [B, heads, L, L].
        keys: of all tokens, [B, L, D].
        prefix: number of prefix tokens, which stay.
        count: patches that stay.
        rounds: see ``page_rank``.
    """
    patches = keys.shape[1] - prefix
    first = aggregate(page_rank(attention, 1))[:, prefix:]
    similar = min((patches - count) // 2, patches // 2)
    left = without_similar(first, keys[:, prefix:], similar)
    tokens = F.pad(left + prefix, (prefix, 0))
    tokens[:, :prefix] = torch.arange(prefix, device=tokens.device)
    graph = attention.take_along_dim(tokens[:, None, :, None], 2)
    graph = graph.take_along_dim(tokens[:, None, None], 3)
    graph = graph / graph.sum(3, keepdim=True)  # each token has one vote
    importance = aggregate(page_rank(graph, rounds))[:, prefix:]
    best = importance.argsort(dim=1, descending=True)[:, :count]
    return left.take_along_dim(best, 1).sort(1).values


class ZeroTPrune(nn.Module):
    """A timm VisionTransformer, neither changed nor copied, pruned by its attention graph.

    Args:
        model: the model, in evaluation mode.
        prune_before: 0-based blocks before which patches go, ascending, not the first.
        tokens: patches that stay at each of them.

    Raises:
        UnsupportedBackboneError: blocks that are not timm's plain ones, no class token, or a head
            that reads more than it.
        ValueError: stages out of range or order, or not a number of tokens for each.
    """

    def __init__(self, model: Any, prune_before: Sequence[int], tokens: Sequence[int]) -> None:
        super().__init__()
        self.model = check_reads_class_token(model, "pruning by the attention graph needs")
        self.tokens = tokens_after_blocks(model, prune_before, tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return torch.cat([self._logits(chunk) for chunk in chunks(self.model, images)])

    def _logits(self, images: Tensor) -> Tensor:
        prefix = self.model.num_prefix_tokens
        x = embed(self.model, images)
        for index, block in enumerate(self.model.blocks):
            count = self.tokens.get(index, x.shape[1])
            if count < x.shape[1] - prefix:
                x, attention, keys = _observed(block, x)
                stay = choose(attention, keys, prefix, count, self._rounds(index))
                patches = x[:, prefix:].take_along_dim(stay[..., None], 1)
                x = torch.cat([x[:, :prefix], patches], dim=1)
            else:
                x = run_block(block, x)
        return classify_prefix(self.model, x[:, :prefix])

    def _rounds(self, index: int) -> int:
        if index < 3:
            return EARLY_ROUNDS
        return LATE_ROUNDS if index >= len(self.model.blocks) - 3 else ROUNDS


def _observed(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """timm's ``Block``, and its attention [B, heads, L, L] and keys [B, L, D]."""
    attn, normed = block.attn, block.norm1(x)
    qkv = linear(attn.qkv, normed).unflatten(2, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    attention = (q @ k.mT * attn.scale).softmax(-1)
    mixed = attn.norm((attention @ v).transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(normed).sigmoid()
    x = feed_forward(block, x + block.ls1(linear(attn.proj, mixed)))
    return x, attention, k.transpose(1, 2).flatten(2)


def macs_counter(
    model: Any, image_shape: Sequence[int], prune_before: Sequence[int]
) -> Callable[[Sequence[int]], int]:
    """Counts what one image costs with given numbers of tokens, voting and matching included."""
    return pass_counter(
        model, image_shape, lambda model, tokens: ZeroTPrune(model, prune_before, tokens)
    )
