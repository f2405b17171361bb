"""``PrunedViT``: a backbone and a policy as one module, to be deployed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from huggingface_hub import ModelHubMixin
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from prunevit.agents import policy_file, run_reader, saving
from prunevit.agents.policies.calibration import Calibration
from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.policies.policy import Policy, count_policy_macs
from prunevit.agents.policy_library import find_policy
from prunevit.envs.observations import View
from prunevit.envs.vit.block_outputs import BlockOutputs
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError
from prunevit.envs.vit.tokens import Tokens

Decide = Callable[[View], Tensor]
BACKBONE_PREFIX = "backbone.model."
PATTERN_START = re.compile(r"(?<![\[\\])\^")
SAVE_OPTIONS = {"config", "model_card_kwargs", "push_to_hub"}  # others are for the push
NO_GRAPH = (
    "a pruned ViT can't be exported, traced or scripted, since each image keeps another number of "
    "tokens: use prunevit.agents.export.export_onnx, or torch.compile"
)


@dataclass(frozen=True)
class Trace:
    """What a forward pass did.

    Attributes:
        logits: [B, classes].
        alive: which patches survived each stage, bool [B, T, N].
        macs: multiply-accumulates of each image, the policy included, int64 [B].
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
    """A ViT that classifies images with the tokens that its policy keeps; it replaces timm's model.

    A forward pass stores nothing on the module. In training mode pruned tokens are masked instead
    of removed, so that timm's regularisers act as on the dense model. Gradients are the same either
    way, but cheaper if tokens are removed, so ``trainers.finetune`` uses evaluation mode.

    Decisions are made without gradients: those who train all parameters leave out the policy's, or
    take ``prune``, whose copy of the policy asks for none.

    Args:
        backbone: the staged ViT, used as it is. ``prune`` makes a copy.
        policy: decides which patches stay. It may be any callable that takes a ``View`` and returns
            keep, bool [B, N]. One that doesn't say ``needs_attention`` can observe attention; one
            without ``macs_per_decision`` counts as free.
        model_kwargs: arguments that ``create_backbone`` needs, besides the name, to rebuild the
            backbone when ``from_pretrained`` reads the saved model.

    Raises:
        ValueError: the policy was made for another backbone.
    """

    def __init__(
        self,
        backbone: StagedViT,
        policy: Policy | Decide,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not callable(policy):
            raise ValueError(f"the policy must be callable: got {policy!r}")
        if isinstance(policy, LearnedPolicy | DynamicViTPolicy):
            policy.check_fits(backbone)
        self.backbone = backbone
        # where it lacks a protocol's attribute, the default is read
        self.policy: Policy = cast(Policy, policy)
        self.model_kwargs = dict(model_kwargs or {})
        # modules are created in training mode, which removes nothing: adopt the backbone's mode
        self.train(backbone.model.training)

    @overload
    def forward(self, images: Tensor, return_keep: Literal[False] = ...) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, return_keep: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, images: Tensor, return_keep: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Classifies images.

        Args:
            images: float [B, C, H, W].
            return_keep: also return which patches survived each stage.

        Returns:
            logits [B, classes]; with ``return_keep`` also bool [B, T, N].

        Raises:
            ValueError: the images have another size or number of channels than the model, or the
                policy's decisions are not bool [B, N] or its logits not finite.
        """
        if isinstance(images, FakeTensor) or torch.jit.is_tracing():
            raise RuntimeError(NO_GRAPH)
        logits, alive = self._classify(images)
        return (logits, alive) if return_keep else logits

    # torch.compile compiles only the blocks, which take most of the time: what happens between them
    # has different shapes and branches each time. Those with hooks, and all where gradients may be
    # needed, run uncompiled
    @torch.compiler.disable(recursive=False)
    def _classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens, alive = self._run(images)
        return self.backbone.finish(tokens), torch.stack(alive, dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        """As in timm: tokens after the last norm [B, L, D], with zeros for pruned ones."""
        return self.backbone.features(self._run(images)[0])

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """As in timm: classifies what ``forward_features`` returned; logits [B, classes]."""
        return self.backbone.classify(features, pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As in timm: what blocks leave, with zeros for the patches that were pruned before.

        Args:
            x: images, float [B, C, H, W].
            indices: the blocks, negative from the end; the last n if int, all if None.
            return_prefix_tokens: pair patches with the prefix tokens [B, P, D].
            norm: apply the last norm to the living tokens of each block.
            stop_early: run no stage and no block after the last of ``indices``.
            output_fmt: "NCHW" for [B, D, H, W] on the grid of patches, "NLC" for [B, N, D].
            intermediates_only: leave out the tokens after the last norm, [B, L, D].
            output_dict: return a dictionary, as timm's VisionTransformer.
            attn_mask: not supported.
            is_causal: not supported.

        Returns:
            (tokens after the last norm, list of what each block left) or that list alone; with
            ``output_dict`` a dictionary of them.

        Raises:
            AssertionError: as in timm, ``indices`` are out of range or ``output_fmt`` is unknown.
            ValueError: ``attn_mask`` or ``is_causal`` was given, or as in ``forward``.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise AssertionError("Output format must be one of NCHW or NLC.")
        _check_no_mask(attn_mask, is_causal)
        blocks, _ = feature_take_indices(self.backbone.depth, indices)
        outputs = BlockOutputs(blocks, stop_early)
        last = self._run(x, outputs)[0]
        prefix = self.backbone.num_prefix
        slots = [self.backbone.features(tokens, norm) for tokens in outputs.tokens]  # [B, L, D]
        patches = [tokens[:, prefix:] for tokens in slots]
        if output_fmt == "NCHW":
            grid = self.backbone.grid_size
            patches = [tokens.mT.unflatten(2, grid).contiguous() for tokens in patches]
        prefixes = [tokens[:, :prefix] for tokens in slots]
        with_prefix = return_prefix_tokens and prefix > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                found["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                found["image_features"] = self.backbone.features(last)
            return found
        intermediates = list(zip(patches, prefixes, strict=True)) if with_prefix else patches
        if intermediates_only:
            return intermediates
        return self.backbone.features(last), intermediates

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list[Any]:
        """As in timm, DINO's name for ``forward_intermediates`` of the last ``n`` blocks."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )

    def trace(self, images: Tensor) -> Trace:
        """Classifies images, and reports which patches survived and what it cost."""
        tokens, survivors = self._run(images)
        alive = torch.stack(survivors, dim=1)  # [B, T, N]
        # the first stage decides on every patch, a later one on the survivors of the stage before
        living = F.pad(alive[:, :-1].sum(2), (1, 0), value=self.backbone.num_patches)  # [B, T]
        return Trace(
            logits=self.backbone.finish(tokens),
            alive=alive,
            macs=self.backbone.total_macs(tokens)
            + count_policy_macs(self.policy, self.backbone, living),
        )

    @torch.compiler.disable(recursive=False)
    def _run(
        self, images: Tensor, outputs: BlockOutputs | None = None
    ) -> tuple[Tokens, list[Tensor]]:
        """Runs the blocks; returns the last tokens and the survivors of each stage, T of [B, N].

        ``outputs`` collects the tokens after some of the blocks, and may ask for no more blocks.
        """
        backbone, policy = self.backbone, self.policy
        execution = "masked" if self.training else backbone.execution
        needs_attention = getattr(policy, "needs_attention", True)
        tokens = backbone.begin(images, needs_attention, execution, outputs)
        alive = []
        for stage in range(backbone.num_stages):
            if outputs is not None and outputs.end_before(backbone.edges[stage]):
                break
            keep = self._decide(images, tokens, stage)
            tokens = backbone.advance(tokens, keep, stage, needs_attention, outputs)
            alive.append(tokens.alive[:, backbone.num_prefix :])
        return tokens, alive

    @torch.compiler.disable
    @torch.no_grad()
    def _decide(self, images: Tensor, tokens: Tokens, stage: int) -> Tensor:
        """Which patches the policy keeps at a stage, bool [B, N]."""
        device = images.device.type
        if torch.is_autocast_enabled(device):
            # autocast is for the blocks: rounding would change the decisions of the policy
            with torch.autocast(device, enabled=False):
                return self._decide(images, tokens, stage)
        alpha = torch.zeros(len(images), dtype=torch.float32, device=images.device)
        view = View(self.backbone, tokens, stage, alpha, images=images)
        keep = self.policy(view)
        is_tensor, wanted = isinstance(keep, Tensor), view.alive.shape
        if not is_tensor or keep.dtype != torch.bool or keep.shape != wanted:
            got = f"{keep.dtype} {list(keep.shape)}" if is_tensor else type(keep).__name__
            raise ValueError(f"the policy must answer bool {list(wanted)}: got {got}")
        return keep

    @property
    def compute(self) -> float | None:
        """Share of the dense multiply-accumulates that the model takes on average, as its policy
        was calibrated (``calibrate``); None where it wasn't, or has a setting that wasn't measured.
        Setting it sets the policy's alpha, or its threshold if it observes no alpha.

        Raises:
            ValueError: the policy can't cost that, or was not calibrated.
        """
        policy: Any = self.policy
        known: Calibration | None = getattr(policy, "calibration", None)
        if known is None or policy.dither != known.dither:
            return None
        return known.compute_at(getattr(policy, known.knob))

    @compute.setter
    def compute(self, share: float) -> None:
        policy: Any = self.policy
        known: Calibration | None = getattr(policy, "calibration", None)
        if known is None:
            raise ValueError(
                f"compute={share}: the model's {type(policy).__name__} was not calibrated: call "
                "prunevit.agents.calibrate(model, images), which learned policies allow"
            )
        setattr(policy, known.knob, known.value_at(share))
        policy.dither = known.dither

    # attributes that code for timm models expects

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        return self.backbone.width

    head_hidden_size = num_features

    @property
    def in_chans(self) -> int:
        return self.backbone.image_shape[0]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        # timm does not update input_size if a model is built for another size
        return dict(getattr(self.backbone.model, "pretrained_cfg", {})) | {
            "input_size": self.backbone.image_shape
        }

    default_cfg = pretrained_cfg  # timm's older name

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """timm's description of what each block leaves, with the names of modules here."""
        described = self.backbone.model.feature_info
        return [info | {"module": BACKBONE_PREFIX + info["module"]} for info in described]

    def get_classifier(self) -> nn.Module:
        return self.backbone.model.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.backbone.reset_classifier(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters without weight decay, by their names here."""
        return {BACKBONE_PREFIX + name for name in self.backbone.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layers of the backbone, by the names here."""
        groups = self.backbone.model.group_matcher(coarse=coarse)
        return {name: _with_prefix(patterns) for name, patterns in groups.items()}

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script asks for what it is to compile
        raise RuntimeError(NO_GRAPH)

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, **options: Any
    ) -> str | None:
        """Writes all files of the model to a folder, or none.

        Args:
            save_directory: the folder.
            repo_id: name on the hub, if it is pushed there too; the folder's name by default.
            options: of ``ModelHubMixin.save_pretrained``.

        Raises:
            SavedModelError: the model would come back as another one; the message says why.
        """
        if options and not options.keys() <= SAVE_OPTIONS and not options.get("push_to_hub"):
            ignored = ", ".join(sorted(options.keys() - SAVE_OPTIONS))
            raise TypeError(f"{ignored}: save_pretrained has no such option")
        # the mixin deletes the old configuration before it knows whether there will be a new one
        folder = Path(save_directory)
        with saving.all_or_nothing(folder) as scratch:
            return super().save_pretrained(scratch, repo_id=repo_id or folder.name, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        saving.write(
            save_directory, self.backbone, self.policy, self.model_kwargs, self.state_dict()
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **hub_options: Any
    ) -> PrunedViT:
        """Loads a model that ``save_pretrained`` wrote, in evaluation mode and float32.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the hub.
            hub_options: arguments of ``hf_hub_download``, such as ``revision`` or ``token``.

        Raises:
            SavedModelError: files are missing, damaged or of another version, or the hub can't be
                reached.
            TypeError: an option that would do nothing.
        """
        config, weights = saving.locate(str(pretrained_model_name_or_path), hub_options)
        backbone, policy, model_kwargs = saving.rebuild(config, weights)
        model = cls(backbone, frozen(policy), model_kwargs)
        saving.load_weights(model, weights)
        return model.eval()

    @classmethod
    def from_run(cls, folder: str | Path, hub_backbone: str | None = None) -> PrunedViT:
        """Loads a finished run of ``trainers.mappo``, ``straight_through`` or ``dynamic_vit``.

        The model is in evaluation mode.

        Args:
            folder: the run's.
            hub_backbone: the run's ``--backbone`` if it is on a hub, "hf-hub:OWNER/NAME": the
                run's files, which may be a stranger's, can't choose that alone.

        Raises:
            SavedModelError: the folder has no finished run of the token game, its files are
                damaged, or the weights of its backbone were random and are lost.
            BackboneError: the backbone can't be built or loaded.
        """
        backbone, policy, model_kwargs = run_reader.read_run(Path(folder), hub_backbone)
        return cls(backbone, frozen(policy), model_kwargs).eval()

    def save_policy(self, file: str | Path) -> None:
        """Writes the policy, with its calibration and the stages, to a file of some kilobytes.

        Raises:
            SavedModelError: the policy would come back as another one; the message says why.
        """
        policy_file.write_policy(Path(file), self.backbone, self.policy)

    @classmethod
    def from_policy(cls, vit: nn.Module, file: str | Path) -> PrunedViT:
        """Prunes timm's ``vit`` by the policy that ``save_policy`` wrote.

        Args:
            vit: the backbone that the policy was trained for, by timm's name; it is copied, not
                changed.
            file: the file, or the name of a policy that comes with the package, such as "digits";
                ``policy_names()`` lists them.

        Raises:
            SavedModelError: there is neither such a file nor such a name, the file is damaged, or
                its policy is one for another backbone.
            UnsupportedBackboneError: the model can't be copied.
        """
        backbone, policy = policy_file.read_policy(find_policy(file), copied(vit))
        return cls(backbone, frozen(policy)).eval()


def _check_no_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError(
            "attn_mask and is_causal: a pruned ViT attends among the tokens that survive, which "
            "a mask over all tokens doesn't fit"
        )


def frozen(policy: Any) -> Any:
    """``policy`` with parameters that ask for no gradients, since they would never get any."""
    return policy.requires_grad_(False) if isinstance(policy, nn.Module) else policy


def _with_prefix(patterns: Any) -> Any:
    """timm's patterns of parameter names, for a model that is part of this one."""
    if isinstance(patterns, str):
        return f"{re.escape(BACKBONE_PREFIX)}(?:{PATTERN_START.sub('', patterns)})"
    return [(_with_prefix(pattern), *others) for pattern, *others in patterns]


def copied(vit: nn.Module) -> nn.Module:
    """A copy of a backbone; raises UnsupportedBackboneError if there can be none."""
    try:
        return copy.deepcopy(vit)
    # torch says it by errors of many kinds
    except Exception as error:
        raise UnsupportedBackboneError(
            f"{type(vit).__name__} can't be copied ({error}): prune it before it is sharded or "
            "wrapped, or take PrunedViT(StagedViT(vit, prune_before), policy), which uses it itself"
        ) from error
