"""What the runtime needs to know of a class of timm models: ``ModelOps`` and ``BlockOps``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunevit.envs.vit.onednn_linear import mlp
from prunevit.envs.vit.timm_models.rope import RotaryEmbedding
from prunevit.envs.vit.untouched import find_class


@dataclass(frozen=True)
class BlockOps:
    """The steps of a transformer block around its attention; x is [..., D].

    Attributes:
        pre_attention: (block, x) -> the input of the attention.
        residual: (block, x, attention output) -> x with the attention added.
        mlp: (block, x) -> x with the MLP added, the output of the block.
    """

    pre_attention: Callable[[Any, Tensor], Tensor]
    residual: Callable[[Any, Tensor, Tensor], Tensor]
    mlp: Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class ModelOps:
    """How to run models of some timm classes on part of their tokens.

    Attributes:
        models: the classes. Subclasses that override the forward pass are not included.
        blocks: the steps of each supported class of block.
        attentions: the projection of each supported class of attention: (module, input [..., D],
            rope [..., heads, 2 * head_dim] or None) -> queries, keys and values
            [..., heads, head_dim].
        embed: (model, images [B, C, H, W]) -> tokens before the first block [B, L, D], and the
            rotary embedding, None if the model has none.
        dense_block: timm's own block on images of equal length: (block, x [B, L, D], attention
            mask or None, ``RotaryEmbedding.patches`` or None) -> [B, L, D].
    """

    models: tuple[type[nn.Module], ...]
    blocks: Mapping[type[nn.Module], BlockOps]
    attentions: Mapping[
        type[nn.Module], Callable[[Any, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
    ]
    embed: Callable[[Any, Tensor], tuple[Tensor, RotaryEmbedding | None]]
    dense_block: Callable[[Any, Tensor, Tensor | None, Tensor | None], Tensor]

    def project(self, block: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the queries, keys and values [..., heads, head_dim] of a block's attention."""
        return self.attentions[find_class(block.attn, self.attentions)](block.attn, x, rope)

    def steps(self, block: Any) -> BlockOps:
        """The steps of a block."""
        return self.blocks[find_class(block, self.blocks)]


def pre_norm(block: Any, x: Tensor) -> Tensor:
    """``BlockOps.pre_attention`` of blocks that normalise the input of their attention."""
    return block.norm1(x)


def _no_pre_norm(block: Any, x: Tensor) -> Tensor:
    return x


def _post_norm_residual(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    return x + block.drop_path1(block.norm1(mixed))


def _post_norm_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.norm2(mlp(block.mlp, x)))


POST_NORM = BlockOps(_no_pre_norm, _post_norm_residual, _post_norm_mlp)
