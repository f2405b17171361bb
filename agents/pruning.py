"""``prune``: makes a ViT of timm or of transformers drop tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from prunevit.agents.policies.policy import Policy
from prunevit.agents.pruned_transformers_vit import PrunedTransformersViT
from prunevit.agents.pruned_vit import Decide, PrunedViT, copied, frozen
from prunevit.envs.vit.from_transformers import ImageSize, from_transformers, is_of_transformers
from prunevit.envs.vit.staged_vit import OnPrune, PruneAt, StagedViT


def prune(
    vit: nn.Module,
    policy: Policy | Decide,
    prune_before: Sequence[int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    prune_at: PruneAt = "block",
    on_prune: OnPrune = "drop",
    img_size: ImageSize | None = None,
) -> PrunedViT:
    """Makes a ViT drop tokens.

    The pruned model is in evaluation mode, whichever mode ``vit`` is in: timm builds models in
    training mode, in which tokens would be masked instead of removed and nothing would be faster.

    Args:
        vit: timm's model, or one of Hugging Face's transformers that ``from_transformers`` takes,
            which becomes a ``PrunedTransformersViT``. It is copied, not changed.
        policy: decides which patches stay: a ``Policy``, or any callable that takes a ``View`` and
            returns keep, bool [B, N]. It is also copied, and its copy asks for no gradients.
        prune_before: 0-based blocks before which tokens are dropped, ascending. None stands for
            every block but the first.
        model_kwargs: arguments that ``vit`` was built with and that can't be read off it, such as
            ``depth`` or ``embed_dim``. Only ``save_pretrained`` needs them.
        prune_at: "block" drops tokens before these blocks begin, "mlp" between their attention and
            their MLP.
        on_prune: "drop" removes pruned patches with what they hold; "merge" averages each into the
            most similar one that stays, see ``StagedViT``.
        img_size: size of the images that a model of transformers will get, by default that of its
            configuration. For timm's models call ``set_input_size``.

    Raises:
        UnsupportedBackboneError: the model can't run on part of its tokens, or can't be copied.
        ValueError: stages are out of range, ``on_prune`` is unknown, or the policy was made for
            another backbone.
    """
    theirs = is_of_transformers(vit)
    if img_size is not None and not theirs:
        raise ValueError(
            "img_size is for models of transformers: call timm's vit.set_input_size(img_size)"
        )
    own = from_transformers(vit, img_size) if theirs else copied(vit)
    backbone = StagedViT(own, prune_before, prune_at=prune_at, on_prune=on_prune)
    kept = frozen(copy.deepcopy(policy))
    if theirs:
        return PrunedTransformersViT(backbone, kept, vit).eval()
    return PrunedViT(backbone, kept, model_kwargs).eval()
