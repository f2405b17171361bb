"""``prune`` and ``PrunedViT``: a backbone and a policy as one module, the thing people deploy."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from prunevit.agents import saving
from prunevit.agents.policies.actor_critic import LearnedPolicy
from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.agents.policies.policy import Policy
from prunevit.envs.observations import View
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.tokens import Tokens


@dataclass(frozen=True)
class Trace:
    """What a forward pass did.

    Attributes:
        logits: [B, classes].
        alive: bool [B, T, N], who survived each stage.
        macs: multiply-accumulates of each image, the policy's included, int64 [B].
    """

    logits: Tensor
    alive: Tensor
    macs: Tensor


class PrunedViT(
    nn.Module,
    ModelHubMixin,
    library_name="prunevit",
    license="apache-2.0",
    tags=["vision-transformer", "token-pruning"],
):
    """Classifies images with the tokens that its policy keeps, in the place of the timm model.

    A pass leaves nothing on the module. In training mode pruned tokens are masked, not removed, so
    that timm's regularisers are those of the whole model. Gradients are the same either way, and
    cheaper where tokens are removed: ``trainers.finetune`` stays in evaluation mode.

    Args:
        backbone: the staged ViT; used as it is. ``prune`` makes one of a copy.
        policy: who stays.
        model_kwargs: arguments beyond the name that ``create_backbone`` needs to build the backbone
            anew from what ``save_pretrained`` writes.

    Raises:
        ValueError: the policy is of another backbone.
    """

    def __init__(
        self,
        backbone: StagedViT,
        policy: Policy,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(policy, LearnedPolicy | DynamicViTPolicy):
            policy.check_fits(backbone)
        self.backbone = backbone
        self.policy = policy
        self.model_kwargs = dict(model_kwargs or {})
        # a module begins in training mode, in which nothing is removed: go on in the backbone's
        self.train(backbone.model.training)

    @overload
    def forward(self, images: Tensor, return_keep: Literal[False] = ...) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, return_keep: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, images: Tensor, return_keep: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Classifies images.

        Args:
            images: float [B, C, H, W].
            return_keep: also tell who survived each stage.

        Returns:
            logits [B, classes]; with them, where asked for, bool [B, T, N].

        Raises:
            ValueError: images of another size or number of channels, or a policy whose answer is
                not bool [B, N] or not a number.
        """
        tokens, alive = self._run(images)
        logits = self.backbone.finish(tokens)
        return (logits, alive) if return_keep else logits

    def forward_features(self, images: Tensor) -> Tensor:
        """timm's: tokens after the last norm, each in its slot, zeros where pruned: [B, L, D]."""
        return self.backbone.features(self._run(images)[0])

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's, on what ``forward_features`` returned: logits [B, classes]."""
        return self.backbone.classify(features, pre_logits)

    def trace(self, images: Tensor) -> Trace:
        """As ``forward``, with what was pruned and what it cost."""
        tokens, alive = self._run(images)
        # every patch is decided on at the first stage, later on those that survived the one before
        decisions = self.backbone.num_patches + alive[:, :-1].sum((1, 2))
        return Trace(
            logits=self.backbone.finish(tokens),
            alive=alive,
            macs=self.backbone.total_macs(tokens) + decisions * self.policy.macs_per_decision,
        )

    # torch.compile is left what the time goes to, the blocks: what is decided between them has
    # other shapes and other ways each time
    @torch.compiler.disable(recursive=False)
    def _run(self, images: Tensor) -> tuple[Tokens, Tensor]:
        """All blocks; the last tokens, and who survived each stage [B, T, N]."""
        backbone, policy = self.backbone, self.policy
        execution = "masked" if self.training else backbone.execution
        tokens = backbone.begin(images, policy.needs_attention, execution)
        alpha = torch.zeros(len(images), device=images.device)
        alive = []
        for stage in range(backbone.num_stages):
            view = View(backbone, tokens, stage, alpha, images=images)
            tokens = backbone.advance(tokens, self._decide(view), stage, policy.needs_attention)
            alive.append(tokens.alive[:, backbone.num_prefix :])
        return tokens, torch.stack(alive, dim=1)

    @torch.compiler.disable
    @torch.no_grad()
    def _decide(self, view: View) -> Tensor:
        device = view.alive.device.type
        if torch.is_autocast_enabled(device):
            # for the blocks, not for the policy: rounding would move its decisions
            with torch.autocast(device, enabled=False):
                return self._decide(view)
        keep = self.policy(view)
        if keep.dtype != torch.bool or keep.shape != view.alive.shape:
            raise ValueError(
                f"the policy must answer bool {list(view.alive.shape)}: "
                f"got {keep.dtype} {list(keep.shape)}"
            )
        return keep

    # what code written for timm models asks them

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        return self.backbone.width

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        # timm leaves input_size as it was where a model is built for another
        return dict(self.backbone.model.pretrained_cfg) | {"input_size": self.backbone.image_shape}

    @property
    def default_cfg(self) -> dict[str, Any]:
        return self.pretrained_cfg

    # files

    def _save_pretrained(self, save_directory: Path) -> None:
        saving.write(
            save_directory, self.backbone, self.policy, self.model_kwargs, self.state_dict()
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **hub_options: Any
    ) -> PrunedViT:
        """Reads what ``save_pretrained`` wrote, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the hub.
            hub_options: of ``ModelHubMixin.from_pretrained``, as ``revision`` or ``token``.

        Raises:
            SavedModelError: files are missing, damaged or of another version, or the hub can't be
                reached.
        """
        config, weights = saving.locate(str(pretrained_model_name_or_path), hub_options)
        backbone, policy, model_kwargs = saving.rebuild(config)
        model = cls(backbone, policy, model_kwargs)
        saving.load_weights(model, weights)
        return model.eval()

    @classmethod
    def from_run(cls, folder: str | Path) -> PrunedViT:
        """What a finished run of ``trainers.mappo`` or ``trainers.dynamic_vit`` learned, in
        evaluation mode.

        Raises:
            SavedModelError: the folder holds no finished run of the token game, its files are
                damaged, or its backbone's weights were random and are gone.
            BackboneError: the backbone can't be built or loaded.
        """
        backbone, policy, model_kwargs = saving.read_run(Path(folder))
        return cls(backbone, policy, model_kwargs).eval()


def prune(
    vit: nn.Module,
    policy: Policy,
    prune_before: Sequence[int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> PrunedViT:
    """Makes a timm ViT drop tokens.

    Args:
        vit: timm's model; it is copied, not changed.
        policy: who stays; copied likewise.
        prune_before: 0-based blocks before which tokens are dropped, ascending; before every block
            but the first where None.
        model_kwargs: what ``vit`` was built with beside its name, where that is not to be seen on
            it (``depth``, ``embed_dim``, ...); only ``save_pretrained`` needs it.

    Raises:
        UnsupportedBackboneError: the model can't be run on a part of its tokens.
        ValueError: stages out of range, or a policy of another backbone.
    """
    backbone = StagedViT(copy.deepcopy(vit), prune_before)
    return PrunedViT(backbone, copy.deepcopy(policy), model_kwargs)
