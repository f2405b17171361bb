"""Exports a pruned ViT for one image to ONNX: ``prunevit export MODEL --out model.onnx``.

The numbers of surviving tokens stay dynamic. How images are prepared, and the names of the classes,
are in the file's metadata.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from prunevit.agents import saving
from prunevit.agents.policies.dynamic_vit import DynamicViTPolicy
from prunevit.agents.policies.heuristics import AttentionThreshold, KeepAll, TopK
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.policies.serialization import own_additions
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.cli import prog
from prunevit.envs.data.image_dataset import ImageDataset
from prunevit.envs.data.image_sources import PhotoSource
from prunevit.envs.data_config import model_data_config
from prunevit.envs.observations import View
from prunevit.envs.vit.blocks import BlockCall, dense_block, masked_attention_received
from prunevit.envs.vit.execution import split_at_blocks
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.heads import is_head_untouched, pools_tokens
from prunevit.envs.vit.tokens import Tokens
from prunevit.envs.vit.untouched import is_untouched
from prunevit.extras import needs

OPSET = 18
TOLERANCE = 1e-4  # by how much the outputs of onnxruntime may differ
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
EXPORTED_POLICIES = (KeepAll, TopK, AttentionThreshold, DynamicViTPolicy, LearnedPolicy)


class ExportError(ValueError):
    """The pruned ViT can't be exported; the message says why."""


class OneImage(nn.Module):
    """A ``PrunedViT`` for one image, in operations that an exporter can follow.

    A batch of one needs no layout: its surviving rows are gathered, and go through timm's blocks.

    Args:
        model: the pruned ViT.

    Raises:
        ExportError: it has a policy or a backbone that has no such form; the message says why.
    """

    def __init__(self, model: PrunedViT) -> None:
        super().__init__()
        reason = _why_no_policy(model.policy, model.backbone) or _why_no_backbone(model.backbone)
        if reason is not None:
            raise ExportError(reason)
        self.backbone: StagedViT = model.backbone
        self.policy: Any = model.policy

    def forward(self, image: Tensor, alpha: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Classifies an image [1, C, H, W].

        Args:
            image: the image.
            alpha: for a policy that observes it, float32 [1]; its own by default.

        Returns:
            logits [1, classes], and which patches survived each stage, bool [1, T, N].
        """
        backbone, policy = self.backbone, self.policy
        x, rotary = backbone.ops.embed(backbone.model, image)
        everyone = torch.ones(1, backbone.num_slots, dtype=torch.bool, device=x.device)
        tokens = replace(Tokens.of_slots(x, everyone), rotary=rotary)
        if alpha is None:
            alpha = torch.full((1,), own_alpha(policy) or 0.0, device=x.device)
        kept = []
        for stage, (start, stop) in enumerate(pairwise((0, *backbone.edges))):
            last = stage == backbone.num_stages
            tokens = self._run(tokens, start, stop, policy.needs_attention and not last)
            if not last:
                view = View(backbone, tokens, stage, alpha, images=image)
                tokens = self._prune(tokens, self._decide(view))
                kept.append(tokens.alive[:, backbone.num_prefix :])
        return self._classify(tokens.x[None]), torch.stack(kept, dim=1)

    def _classify(self, x: Tensor) -> Tensor:
        backbone, model = self.backbone, self.backbone.model
        if backbone.keeps_last_patch:
            torch._check(x.shape[1] > backbone.num_prefix)
        # what was put into a head may look at all tokens
        if not pools_tokens(model) and is_head_untouched(model):
            x = x[:, : backbone.num_prefix]
        return model.forward_head(model.norm(x))

    def _decide(self, view: View) -> Tensor:
        policy = self.policy
        # without a look at the values, which a graph can't take
        if isinstance(policy, LearnedPolicy):
            logits = policy.logits(view)
            return policy.keep(view, view.scatter(logits[:, 1] - logits[:, 0]))
        if isinstance(policy, DynamicViTPolicy):
            return policy.choose(view, policy.margin(view))
        return policy(view)

    def _prune(self, tokens: Tokens, keep: Tensor) -> Tokens:
        alive, prefix = self.backbone.survivors(tokens, keep), self.backbone.num_prefix
        slot = alive[0].nonzero().squeeze(1)
        source = tokens.row.index_select(0, slot)
        # rows are in the order of their slots, so a slot's row is the number of survivors before it
        row = alive[0].long().cumsum(0) - 1
        rotary = tokens.rotary
        if rotary is not None:
            patch = source[prefix:] - prefix
            rotary = replace(rotary, sin_cos=rotary.sin_cos.index_select(2, patch))
        return replace(
            tokens,
            x=tokens.x.index_select(0, source),
            alive=alive,
            row=row.clamp(min=0),
            attention=None,
            rotary=rotary,
        )

    def _run(self, tokens: Tokens, start: int, stop: int, with_attention: bool) -> Tokens:
        backbone, image, attention = self.backbone, tokens.x[None], None
        torch._check(image.shape[1] > 0)  # the class token or a patch always stays
        blocks = split_at_blocks(start, stop)
        for i, sublayer in blocks:
            block = backbone.model.blocks[i]
            rotary = tokens.rotary.of_block(i) if tokens.rotary else None
            call = BlockCall(
                backbone.ops, block, rotary, backbone.num_query_tokens, sublayer=sublayer
            )
            if with_attention and i == blocks[-1][0]:
                whole = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
                attention = masked_attention_received(call, image, whole).squeeze(0)
            # without a mask, whose dynamic length an exporter would compare with 1
            image = dense_block(call, image, None, rotary.patches(1) if rotary else None)
        return replace(tokens, x=image.squeeze(0), attention=attention)


def own_alpha(policy: Any) -> float | None:
    """The alpha of a policy that observes it; None of others."""
    return policy.alpha if isinstance(policy, LearnedPolicy) else None


def _why_no_policy(policy: Any, backbone: StagedViT) -> str | None:
    """Why a policy can't be exported, or None if it can."""
    kind = type(policy)
    if kind not in EXPORTED_POLICIES:
        names = ", ".join(known.__name__ for known in EXPORTED_POLICIES)
        return f"a {kind.__name__} can't be exported: only {names} can be"
    if isinstance(policy, nn.Module) and (added := own_additions(policy)) is not None:
        return f"the policy can't be exported: {added}"
    if isinstance(policy, TopK) and policy.score == "random":
        return (
            "top-k by random scores can't be exported: a graph has no generator that draws as "
            "torch's does"
        )
    if isinstance(policy, TopK) and policy.score == "attention" and not backbone.has_attended(0):
        return (
            "top-k by attention before block 0 can't be exported: there all patches have the same, "
            "and which of them torch keeps is not defined"
        )
    return None


def _why_no_backbone(backbone: StagedViT) -> str | None:
    """Why a backbone can't be exported, or None if it can."""
    if backbone.on_prune == "merge":
        return (
            "a model that merges what it prunes can't be exported, since exported attention "
            "takes each token for a single one: only on_prune='drop' can be"
        )
    if pools_tokens(backbone.model) and not backbone.model.global_pool:
        return (
            "a backbone without pooling (global_pool='') can't be exported, since an image has no "
            "single output"
        )
    if backbone.dtype != torch.float32:
        return f"a model in {backbone.dtype} can't be exported: export it in float32"
    if not all(is_untouched(block) for block in backbone.model.blocks):
        return (
            "blocks with hooks, replaced or quantised layers can't be exported: remove or merge "
            "them"
        )
    return None


def export_onnx(model: PrunedViT, file: Path | str, check: Tensor | None = None) -> None:
    """Exports ``model`` for images [1, C, H, W].

    The graph's input is "image". For a policy that observes alpha there is another, "alpha",
    float32 [1]. It may be left out, and then is the policy's own.

    Its outputs are "logits" [1, classes], or "embedding" [1, D] of a backbone without a classifier,
    and "keep", bool [1, T, N]: which patches survived each stage.

    Its metadata are JSON: "preprocessing" with timm's names for how images are prepared, and
    "class_names" if they are known.

    Args:
        model: the pruned ViT.
        file: where the graph is written. Weights beyond 2 GB go to a second file beside it.
        check: images [n, C, H, W] on which onnxruntime has to give what PyTorch gives; None to
            write the file without a check.

    Raises:
        ExportError: the model can't be exported, or onnxruntime gives something else: then nothing
            is written.
        ImportError: the libraries of the extra ``onnx`` are missing.
    """
    one = OneImage(model).eval()
    with needs("onnx"):
        import onnx_ir
        import onnxscript  # noqa: F401
    device, alpha = model.backbone.device, own_alpha(model.policy)
    inputs = {"image": torch.zeros(1, *model.backbone.image_shape, device=device)}
    if alpha is not None:
        inputs["alpha"] = torch.tensor([alpha], device=device)
    program = torch.onnx.export(
        one,
        tuple(inputs.values()),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=["logits" if model.num_classes else "embedding", "keep"],
    )
    assert program is not None
    graph = program.model.graph
    if alpha is not None:
        # an input that has an initial value may be left out
        graph.inputs[1].const_value = onnx_ir.tensor([alpha], onnx_ir.DataType.FLOAT, name="alpha")
        graph.register_initializer(graph.inputs[1])
    program.model.metadata_props.update(_metadata(model))
    file = Path(file)
    with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as scratch:
        program.save(str(Path(scratch, file.name)))
        if check is not None:
            check_onnx(model, Path(scratch, file.name), check)
        for written in Path(scratch).iterdir():
            written.replace(file.with_name(written.name))


def _metadata(model: PrunedViT) -> dict[str, str]:
    config = model_data_config(model.backbone.model)
    metadata: dict[str, Any] = {"preprocessing": {key: config[key] for key in PREPROCESSING}}
    if "classes" in config and config["classes"].names:
        metadata["class_names"] = config["classes"].names
    return {key: json.dumps(value) for key, value in metadata.items()}


@torch.inference_mode()
def check_onnx(model: PrunedViT, file: Path, images: Tensor) -> None:
    """Checks that onnxruntime gives what ``model`` gives for each of ``images`` [n, C, H, W].

    Raises:
        ExportError: survivors differ, or outputs by more than ``TOLERANCE``.
        ImportError: onnxruntime is missing.
    """
    with needs("onnx"):
        import onnxruntime
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for i, image in enumerate(images.split(1)):
        output, kept = session.run(None, {"image": image.cpu().numpy()})
        expected, survivors = model(image.to(model.backbone.device), return_keep=True)
        different = int((kept != survivors.cpu().numpy()).sum())
        error = float(np.abs(output - expected.cpu().numpy()).max())
        if different or not error <= TOLERANCE:
            raise ExportError(
                f"onnxruntime differs from PyTorch on image {i}: by {error:.1e} in an output, and "
                f"in {different} decisions"
            )


@dataclass
class ExportConfig:
    """Which model is exported, and where to."""

    model: tyro.conf.Positional[Path]
    """A finished run, as runs/NAME, or a folder of PrunedViT.save_pretrained."""
    out: Path
    """Where the ONNX file is written."""
    backbone: str | None = None
    """The run's --backbone, if it is on a hub (hf-hub:OWNER/NAME): a folder can't choose that."""
    compute: float | None = None
    """Share of the dense model's compute to take on average, as 0.6. By default the policy's own
    setting."""
    check: Path | None = None
    """A folder of photographs. The file is only written if onnxruntime gives what PyTorch gives on
    the first of them."""
    check_images: int = 16
    """How many photographs that are."""

    def __post_init__(self) -> None:
        if self.check_images < 1:
            raise ValueError(f"check_images={self.check_images} must be at least 1")
        if not self.out.parent.is_dir():
            raise ValueError(f"out={self.out}: there is no folder {self.out.parent}")


def run_export(config: ExportConfig) -> str:
    """Exports the model; returns what was done, in a line.

    Raises:
        ValueError: the model can't be loaded or exported, or the compute not be reached.
        ImportError: the libraries of the extra ``onnx`` are missing.
    """
    if (config.model / saving.WEIGHTS).is_file():
        model = PrunedViT.from_pretrained(config.model)
    else:
        model = PrunedViT.from_run(config.model, config.backbone)
    if config.compute is not None:
        model.compute = config.compute
    images: Tensor | None = None
    checked = "unchecked"
    if config.check is not None:
        source = PhotoSource(str(config.check))
        first = np.arange(min(config.check_images, len(source)))
        data_config = model_data_config(model.backbone.model)
        images = ImageDataset(source, first, data_config).load(range(len(first)))[0]
        checked = f"checked on {len(images)} photographs"
    export_onnx(model, config.out, images)
    return f"exported to {config.out}, {checked}"


def main(arguments: Sequence[str] | None = None) -> None:
    """``prunevit export``."""
    try:
        config = tyro.cli(ExportConfig, args=arguments, description=__doc__, prog=prog())
        print(run_export(config))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
