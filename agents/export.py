"""Exports a pruned ViT to ONNX: ``prunevit export MODEL --out model.onnx``.

The numbers of surviving tokens stay dynamic. How images are prepared, the names of the classes and
what share of the compute the model takes are in the file's metadata.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from torch import Tensor

from prunevit.agents import saving
from prunevit.agents.onnx_graphs import (
    KNOWN_POLICIES,
    ExportError,
    ImageBatch,
    OneImage,
    own_alpha,
)
from prunevit.agents.onnx_int8 import Int8, quantize_onnx
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.agents.viewer.photographs import SAMPLES
from prunevit.choices import check_choice
from prunevit.cli import prog
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.digits import Split
from prunevit.envs.data.image_dataset import ImageDataset
from prunevit.envs.data.image_set import NO_LABEL, ImageSet
from prunevit.envs.data.image_sources import PhotoSource
from prunevit.envs.data_config import model_data_config
from prunevit.extras import needs

Batch = Literal["one", "any"]
OPSET = 18
OLDEST_RUNTIME = (1, 20)  # the extra's floor
TOLERANCE = 1e-4  # by how much the outputs of onnxruntime may differ
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
PHOTOS = "photos:"
CHECKED_TOGETHER = 8  # images that a graph for any number is given at once
NOISE_IMAGES = 4  # on which policies that are not ours are checked


@dataclass(frozen=True)
class Agreement:
    """How far an ONNX file agrees with PyTorch on some images.

    Attributes:
        images: how many there are.
        error: largest difference of an output.
        decisions: share of all decisions on patches that are the same.
        classes: share of images of the same most likely class; None for embeddings.
        accuracy: share of images that PyTorch and the file classify right; None without labels.
    """

    images: int
    error: float
    decisions: float
    classes: float | None
    accuracy: tuple[float, float] | None

    def __str__(self) -> str:
        said = [f"{self.decisions:.2%} of the decisions", f"outputs within {self.error:.1e}"]
        if self.classes is not None:
            said.insert(0, f"{self.classes:.2%} of the classes")
        if self.accuracy is not None:
            said.append("accuracy {:.2%} in PyTorch, {:.2%} in the file".format(*self.accuracy))
        return f"agrees with PyTorch on {self.images} images: {', '.join(said)}"


def export_onnx(
    model: PrunedViT,
    file: Path | str,
    check: Tensor | None = None,
    batch: Batch = "one",
    int8: Int8 | None = None,
    calibration: Tensor | None = None,
) -> None:
    """Exports ``model``.

    The graph's input is "image", [1, C, H, W], or [B, C, H, W] for any B. For a policy that
    observes alpha there is another, "alpha", float32 [1], or [B] for an alpha of each image. It may
    be left out, and then is the policy's own.

    Its outputs are "logits" [B, classes], or "embedding" [B, D] of a backbone without a classifier,
    and "keep", bool [B, T, N]: which patches survived each stage.

    Its metadata are JSON: "preprocessing" with timm's names for how images are prepared,
    "class_names" if they are known, "compute", the share of the dense model's compute, if the
    policy was calibrated, and "calibration", which alpha costs which share.

    Args:
        model: the pruned ViT.
        file: where the graph is written. Weights beyond 2 GB go to a second file beside it.
        check: images [n, C, H, W] on which onnxruntime has to give what PyTorch gives. Without
            any, policies of your own are checked on noise, and others are not.
        batch: "one" for a graph of one image, the fastest for one; "any" for a graph of any number
            of images, padded to the longest after each stage.
        int8: quantise the linear layers, see ``quantize_onnx``. The graph is checked before.
        calibration: images [n, C, H, W], for ``int8="static"``.

    Raises:
        ExportError: the model can't be exported, or onnxruntime gives something else: then nothing
            is written.
        ImportError: the libraries of the extra ``onnx`` are missing.
    """
    check_choice("batch", batch, get_args(Batch))
    if int8 is not None:
        check_choice("int8", int8, get_args(Int8))
    if int8 == "static" and (calibration is None or not len(calibration)):
        raise ExportError("int8='static' needs images to calibrate on")
    # of merging there is one form: a batch, of one image too
    merges = isinstance(model, PrunedViT) and model.backbone.on_prune == "merge"
    one = batch == "one" and not merges
    graph = (OneImage if one else ImageBatch)(model).eval()
    _check_runtime()
    program = _trace(graph, batch)
    program.model.metadata_props.update(_metadata(model))
    file = Path(file)
    if check is None and type(model.policy) not in KNOWN_POLICIES:
        noise = torch.Generator().manual_seed(0)
        check = torch.randn(NOISE_IMAGES, *model.backbone.image_shape, generator=noise)
    with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as scratch:
        written = Path(scratch, "float32" if int8 else "", file.name)
        written.parent.mkdir(exist_ok=True)
        program.save(str(written))
        if check is not None:
            check_onnx(model, written, check)
        if int8 is not None:
            quantize_onnx(written, Path(scratch, file.name), int8, calibration)
        for each in Path(scratch).iterdir():
            if each.is_file():
                each.replace(file.with_name(each.name))


def _check_runtime() -> None:
    """Raises ImportError if the extra ``onnx`` is missing, ExportError if it is too old."""
    with needs("onnx"):
        import onnx_ir  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    version = re.findall(r"\d+", onnxruntime.__version__)
    if tuple(map(int, version[:2])) < OLDEST_RUNTIME:
        needed = ".".join(map(str, OLDEST_RUNTIME))
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} is too old for what is exported (opset "
            f"{OPSET}): install {needed} or newer"
        )


def _trace(graph: OneImage, batch: Batch) -> Any:
    """The graph as an ``onnx_ir`` program of torch."""
    import onnx_ir

    backbone, alpha = graph.backbone, own_alpha(graph.policy)
    count = 1 if batch == "one" else 2  # an exporter takes a dimension of 1 for a constant
    inputs = {"image": torch.zeros(count, *backbone.image_shape, device=backbone.device)}
    if alpha is not None:
        inputs["alpha"] = torch.full((count,), alpha, device=backbone.device)
    images = torch.export.Dim("images")
    shapes = None if batch == "one" else tuple({0: images} for _ in inputs)
    # torch prints what it traced before it says what it could not trace
    nowhere = contextlib.redirect_stderr(io.StringIO())
    try:
        with nowhere:
            traced = torch.export.export(
                graph, tuple(inputs.values()), dynamic_shapes=shapes, strict=False
            )
        program = torch.onnx.export(
            traced,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["logits" if backbone.num_classes else "embedding", "keep"],
        )
    # whatever a policy's code raises, and torch's own, which have no class in common
    except Exception as error:
        raise ExportError(f"the model can't be traced: {_reason(error)}") from error
    assert program is not None
    if alpha is not None:
        # an input that has an initial value may be left out
        value = program.model.graph.inputs[1]
        value.const_value = onnx_ir.tensor([alpha], onnx_ir.DataType.FLOAT, name="alpha")
        if batch == "any":
            value.shape = onnx_ir.Shape(["alphas"])  # one for all, or as many as images
        program.model.graph.register_initializer(value)
    return program


def _reason(error: BaseException) -> str:
    """Which operation an exporter could not follow, and in which line of whose code it is."""
    while error.__cause__ is not None:
        error = error.__cause__
    if (unknown := re.search(r"OpOverload\(op='([^']+)'", str(error))) is not None:
        return f"ONNX has no operation for torch's {unknown[1]}"
    torchs = str(Path(torch.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(torchs)]
    first = str(error).strip().partition("\n")[0]
    return f"{own[-1].line!r} in {Path(own[-1].filename).name}, line {own[-1].lineno}: {first}"


def _metadata(model: PrunedViT) -> dict[str, str]:
    config, policy = model_data_config(model.backbone.model), model.policy
    metadata: dict[str, Any] = {"preprocessing": {key: config[key] for key in PREPROCESSING}}
    if "classes" in config and config["classes"].names:
        metadata["class_names"] = config["classes"].names
    if model.compute is not None:
        metadata["compute"] = model.compute
    if own_alpha(policy) is not None and (known := getattr(policy, "calibration", None)):
        metadata["calibration"] = {"alpha": known.values, "compute": known.compute}
    return {key: json.dumps(value) for key, value in metadata.items()}


@torch.inference_mode()
def compare_onnx(
    model: PrunedViT, file: Path | str, images: Tensor, labels: Tensor | None = None
) -> Agreement:
    """How far onnxruntime gives what ``model`` gives.

    Args:
        model: the pruned ViT, of which ``file`` was exported.
        file: the ONNX file.
        images: [n, C, H, W].
        labels: their classes, int64 [n], if they are known.

    Raises:
        ExportError: onnxruntime can't run the file.
        ImportError: onnxruntime is missing.
    """
    with needs("onnx"):
        import onnxruntime
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class in common
        raise ExportError(f"onnxruntime {onnxruntime.__version__}: {error}") from error
    size = 1 if session.get_inputs()[0].shape[0] == 1 else CHECKED_TOGETHER
    ours, theirs = [], []
    for some in images.split(size):
        theirs.append(session.run(None, {"image": some.cpu().numpy()}))
        found = model(some.to(model.backbone.device), return_keep=True)
        ours.append([each.cpu().numpy() for each in found])
    (expected, survivors), (outputs, kept) = (
        [np.concatenate(parts) for parts in zip(*pairs, strict=True)] for pairs in (ours, theirs)
    )
    best = [each.argmax(1) for each in (expected, outputs)]
    accuracy = None
    if labels is not None:
        right = [float((each == labels.numpy()).mean()) for each in best]
        accuracy = (right[0], right[1])
    return Agreement(
        images=len(images),
        error=float(np.abs(outputs - expected).max()),
        decisions=float((kept == survivors).mean()),
        classes=float((best[0] == best[1]).mean()) if model.num_classes else None,
        accuracy=accuracy,
    )


def check_onnx(model: PrunedViT, file: Path | str, images: Tensor) -> None:
    """Checks that onnxruntime gives what ``model`` gives for ``images`` [n, C, H, W].

    Raises:
        ExportError: survivors differ, or outputs by more than ``TOLERANCE``.
        ImportError: onnxruntime is missing.
    """
    found = compare_onnx(model, file, images)
    if found.decisions < 1 or not found.error <= TOLERANCE:
        raise ExportError(f"onnxruntime differs from PyTorch: it {found}")


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
    batch: Batch = "one"
    """How many images a call takes. "one" is the fastest for one image; a graph of "any" number
    pads each batch to its longest image after each stage."""
    int8: Int8 | None = None
    """Quantise the linear layers of the ViT. "dynamic" scales activations in each call, "static"
    by what they are on the images of --calibrate."""
    calibrate: str | None = None
    """Images for --int8 static: photos:PATH or another --dataset of the training, of which training
    images are taken."""
    calibrate_images: int = 64
    """How many of them."""
    check: str | None = "samples"
    """Images to check on, as --calibrate; of a dataset, test images; "samples" are the photographs
    that come with the package, and None leaves the check out. The file is only written if
    onnxruntime gives what PyTorch gives on the first of them. With --int8, how far the int8 model
    agrees with PyTorch is printed."""
    check_images: int = 16
    """How many of them."""

    def __post_init__(self) -> None:
        for name in ("check_images", "calibrate_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.out.parent.is_dir():
            raise ValueError(f"out={self.out}: there is no folder {self.out.parent}")
        if self.int8 == "static" and self.calibrate is None:
            raise ValueError("int8='static' needs images to calibrate on: --calibrate photos:PATH")
        if self.int8 != "static" and self.calibrate is not None:
            raise ValueError(f"calibrate={self.calibrate}: only --int8 static is calibrated")


def run_export(config: ExportConfig) -> str:
    """Exports the model; returns what was done, in a line.

    Raises:
        ValueError: the model or images can't be loaded, the model not be exported, or the compute
            not be reached.
        ImportError: the libraries of the extra ``onnx`` are missing.
    """
    if (config.model / saving.WEIGHTS).is_file():
        model = PrunedViT.from_pretrained(config.model)
    else:
        model = PrunedViT.from_run(config.model, config.backbone)
    if config.compute is not None:
        model.compute = config.compute
    images = labels = calibration = None
    if config.check is not None:
        images, labels = _load(model, config.check, "test", config.check_images)
    if config.calibrate is not None:
        calibration, _ = _load(model, config.calibrate, "train", config.calibrate_images)
    export_onnx(model, config.out, images, config.batch, config.int8, calibration)
    said = f"exported to {config.out}"
    if images is None:
        return f"{said}, unchecked"
    kind = f"in {config.int8} int8 it " if config.int8 else "it "
    return f"{said}; {kind}{compare_onnx(model, config.out, images, labels)}"


def _load(model: PrunedViT, dataset: str, split: Split, count: int) -> tuple[Tensor, Tensor | None]:
    """Images [n, C, H, W] of a data set, and their labels if it has any, int64 [n]."""
    data_config = model_data_config(model.backbone.model)
    images: ImageSet
    if dataset == "samples":
        dataset = f"{PHOTOS}{SAMPLES}"
    if dataset.startswith(PHOTOS) or Path(dataset).is_dir():
        source = PhotoSource(dataset.removeprefix(PHOTOS))
        count = min(count, len(source))
        images = ImageDataset(source, np.arange(count) * len(source) // count, data_config)
    else:
        images = open_images(dataset, split, data_config, count)
    pixels, labels = images.load(range(min(count, len(images))))
    return pixels, None if (labels == NO_LABEL).any() else labels


def main(arguments: Sequence[str] | None = None) -> None:
    """``prunevit export``."""
    try:
        config = tyro.cli(ExportConfig, args=arguments, description=__doc__, prog=prog())
        print(run_export(config))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
