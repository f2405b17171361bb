"""``ViewedModel``: a ViT with the ways to prune it that can be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from prunevit.agents import saving
from prunevit.agents.policies.heuristics import Score, TopK
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.staged_vit import OnPrune, StagedViT

# the name of the ViT for the digits with the policy for it, which has the same name
DIGITS = "digits"
OWN = "own policy"
HALVINGS = 20  # of the share that top-k keeps: far below what one patch makes


class Untrained(NamedTuple):
    """Top-k by a score, which needs no training."""

    score: Score
    on_prune: OnPrune = "drop"


UNTRAINED = {
    "class attention": Untrained("attention"),
    "class attention, merging": Untrained("attention", "merge"),
    "embedding norm": Untrained("norm"),
    "random": Untrained("random"),
}


class ViewedModel:
    """A ViT with the ways to prune it that can be looked at.

    Args:
        backbone: the ViT, with the stages of all of them.
        own: the ViT with the policy that it came with, if it came with one.

    Attributes:
        methods: names of the ways to prune it.
    """

    def __init__(self, backbone: StagedViT, own: PrunedViT | None = None) -> None:
        self.backbone = backbone
        self._own = own
        self.methods = (*([OWN] if own else []), *UNTRAINED)

    def pruned(self, method: str, compute: float) -> tuple[PrunedViT, str]:
        """The ViT pruned by one of its ``methods``.

        Args:
            method: the name.
            compute: share of the dense multiply-accumulates to take.

        Returns:
            the pruned ViT, and a remark where it may take another share than ``compute``; empty
            where it doesn't.

        Raises:
            UnsupportedBackboneError: the ViT can't be pruned in this way.
        """
        if method == OWN and self._own is not None:
            return self._own, _set_compute(self._own, compute)
        score, on_prune = UNTRAINED[method]
        mine = self.backbone
        backbone = mine
        if on_prune != mine.on_prune:
            backbone = StagedViT(
                mine.model, mine.prune_before, on_prune=on_prune, prune_at=mine.prune_at
            )
        tokens = tokens_for(backbone, compute, score == "attention")
        return PrunedViT(backbone, TopK(tokens, score)), ""


def _set_compute(model: PrunedViT, compute: float) -> str:
    """Sets a model to ``compute``, or as near as its policy gets; returns a remark on that."""
    known = getattr(model.policy, "calibration", None)
    if known is None:
        return (
            f"The {OWN} was not calibrated (prunevit.agents.calibrate): it takes what it takes, "
            "whatever compute is set to."
        )
    reached = min(max(compute, known.lowest), known.highest)
    model.compute = reached
    if reached == compute:
        return (
            f"The {OWN} takes {compute:.0%} of the dense compute on average: less of images that "
            "are easy for it, more of others."
        )
    return (
        f"The {OWN} takes {known.lowest:.0%} to {known.highest:.0%} of the dense compute: it is "
        f"shown at {reached:.0%}."
    )


def tokens_for(backbone: StagedViT, compute: float, with_attention: bool) -> tuple[int, ...]:
    """How many patches to keep at each stage, the same share of what each stage gets, for at most
    ``compute``, a share of the dense multiply-accumulates; at least one.
    """

    def tokens(share: float) -> tuple[int, ...]:
        shares = (share**stage for stage in range(1, backbone.num_stages + 1))
        return tuple(max(1, round(backbone.num_patches * each)) for each in shares)

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if backbone.uniform_macs(tokens(middle), with_attention) > compute * backbone.dense_macs:
            high = middle
        else:
            low = middle
    return tokens(low)


def read_model(
    name: str, checkpoint: Path | None = None, img_size: int | None = None
) -> ViewedModel:
    """Reads the model that a user names.

    Args:
        name: "digits"; a run of trainers.mappo or a folder of ``PrunedViT.save_pretrained``; or
            timm's name of a ViT, which is pruned before three of its blocks.
        checkpoint: weights of timm's ViT, in place of those that timm downloads.
        img_size: image size of timm's ViT.

    Raises:
        ValueError: there is no such model, its files are damaged, or it can't be pruned.
    """
    folder = Path(name)
    if name != DIGITS and not folder.is_dir():
        kwargs: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
        vit: Any = create_backbone(name, checkpoint is None, checkpoint, **kwargs)
        return ViewedModel(StagedViT(vit, stages_for(len(vit.blocks))))
    if checkpoint is not None or img_size is not None:
        raise ValueError(f"{name} has weights of its own: leave out --checkpoint and --img-size")
    if name == DIGITS:
        own = PrunedViT.from_policy(create_backbone(DIGITS_VIT), DIGITS)
    elif (folder / saving.WEIGHTS).is_file():
        own = PrunedViT.from_pretrained(folder)
    else:
        own = PrunedViT.from_run(folder)
    return ViewedModel(own.backbone, own)


def stages_for(depth: int) -> tuple[int, ...]:
    """Before a quarter, a half and three quarters of ``depth`` blocks, as RL4EViT's of 12."""
    return tuple(sorted({max(1, depth * part // 4) for part in (1, 2, 3)} - {depth}))
