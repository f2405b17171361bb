"""Times a pruned ViT and timm's dense one in several runtimes: ``python -m
benchmarks.speed.runtimes``.

Runtimes, each dense and pruned:

- ``pytorch``: timm's model, and ours;
- ``compile``: the same under ``torch.compile``;
- ``onnxruntime``: exported to ONNX, the pruned one for one image at batch 1 and else for batches,
  padded to the longest image inside of the graph;
- ``int8``: the same with linear layers in dynamic int8;
- ``openvino``: the float32 files in OpenVINO, if it is installed.

A runtime that gives something else than PyTorch is refused, and one that can't run the pruned model
is measured dense. All take turns in one process, on the same weights and images. "Over own dense"
compares with the dense model in the same runtime. Efficiency is that speed-up divided by what the
GMACs promise. A run brings its test images, on which accuracy is measured too.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from prunevit.agents.export import OPSET, export_onnx
from prunevit.agents.onnx_int8 import quantize_onnx
from prunevit.agents.policies.heuristics import TopK
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.benchmarks.markdown import records_table
from prunevit.benchmarks.records import Record, command, origin
from prunevit.benchmarks.speed.timed import FIRST_COLUMNS, LATENCIES, pace, show_and_keep
from prunevit.cli import prog
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data_config import model_data_config
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.extras import is_installed, needs
from prunevit.trainers.common.classification import versions
from prunevit.trainers.common.run import COMMAND_ERRORS
from prunevit.trainers.common.settings import Count, Settings, Share, Threads
from prunevit.trainers.common.signals import ends_in_one_line
from prunevit.trainers.common.timing import interleaved, speedup
from prunevit.versions import version_of

Runtime = Literal["pytorch", "compile", "onnxruntime", "int8", "openvino"]
Kind = tuple[Runtime, bool]  # and whether it is dense
Classify = Callable[[Tensor], NDArray[np.float32]]
CPU = torch.device("cpu")
TOLERANCE = 1e-3  # by how much outputs of a runtime may differ from PyTorch's
LIBRARIES = ("onnxruntime", "openvino")
JUDGED_TOGETHER = 8  # images a call when accuracy is measured


@dataclass
class RuntimesConfig(Settings):
    """What is measured."""

    model: str = "deit_small_patch16_224"
    """Any timm VisionTransformer, or digits_vit, with random weights."""
    run: Path | None = None
    """A run of trainers.mappo, which brings its own backbone, stages, policy and test images."""
    compute: float | None = None
    """Share of the dense compute that the run's policy is set to; its own setting by default."""
    prune_before: tuple[int, ...] = (3, 6, 9)
    """The stages, without a run."""
    keep: tuple[Share, ...] = (0.7, 0.49, 0.343)
    """Share of all patches that stays at each stage, without a run: those with the most class
    attention."""
    runtimes: tuple[Runtime, ...] = ("pytorch", "compile", "onnxruntime", "int8")
    """Which are measured."""
    batch_sizes: tuple[Count, ...] = (1, 8, 32)
    """Images a call."""
    threads: tuple[Threads, ...] = (1, 2)
    """CPU threads."""
    images: Count = 32
    """Different images a pass goes over, rounded up to a multiple of all batch sizes."""
    rounds: Count = 15
    """Timed passes of each, all of them in turns, after one that is not counted."""
    judged: int = 1000
    """Test images of a run on which accuracy is measured; 0 for none."""
    out: Path | None = None
    """Also write the records to this JSON file."""


def load(config: RuntimesConfig) -> tuple[PrunedViT, Tensor, tuple[Tensor, Tensor] | None]:
    """The pruned model, images [n, C, H, W] to time, and images with labels to judge by."""
    count = config.images + -config.images % math.lcm(*config.batch_sizes)
    if config.run is None:
        torch.manual_seed(0)
        vit = create_backbone(config.model, untrained=True)
        backbone = StagedViT(vit, config.prune_before)
        model = PrunedViT(backbone, TopK(config.keep, "attention")).eval()
        return model, torch.randn(count, *backbone.image_shape), None
    model = PrunedViT.from_run(config.run)
    if config.compute is not None:
        model.compute = config.compute
    dataset = json.loads((config.run / "config.json").read_text(encoding="utf-8"))["dataset"]
    test = open_images(dataset, "test", model_data_config(model.backbone.model))
    images = test.load([i % len(test) for i in range(count)])[0]
    judged = min(config.judged, len(test)) if model.num_classes else 0
    return model, images, test.load(range(judged)) if judged else None


def export_dense(model: PrunedViT, file: Path) -> None:
    """Exports timm's own model for any number of images."""
    with needs("onnx"):
        import onnxscript  # noqa: F401
    vit = model.backbone.model
    program = torch.onnx.export(
        vit,
        (torch.zeros(2, *model.backbone.image_shape),),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("images")},),
    )
    assert program is not None
    program.save(str(file))


def export_all(model: PrunedViT, folder: Path, config: RuntimesConfig, batches: bool) -> None:
    """Writes dense.onnx, one.onnx and, for ``batches``, any.onnx; int8-*.onnx if measured."""
    export_dense(model, folder / "dense.onnx")
    names = ["dense"]
    if 1 in config.batch_sizes:
        export_onnx(model, folder / "one.onnx", batch="one")
        names.append("one")
    if batches:
        export_onnx(model, folder / "any.onnx", batch="any")
        names.append("any")
    for name in names if "int8" in config.runtimes else ():
        quantize_onnx(folder / f"{name}.onnx", folder / f"int8-{name}.onnx", "dynamic")


def classifier(
    runtime: Runtime, dense: bool, model: PrunedViT, folder: Path, batch_size: int, threads: int
) -> Classify:
    """What classifies images [B, C, H, W] in a runtime."""
    if runtime in ("pytorch", "compile"):
        module = model.backbone.model if dense else model
        run = torch.compile(module) if runtime == "compile" else module
        return lambda images: run(images).numpy()
    name = "dense" if dense else "one" if batch_size == 1 else "any"
    if runtime == "openvino":
        import openvino

        # on some CPUs it would compute in bfloat16
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(folder / f"{name}.onnx"), "CPU", settings)
        return lambda images: compiled({"image": images.numpy()})[0]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    file = folder / (f"int8-{name}.onnx" if runtime == "int8" else f"{name}.onnx")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images.numpy()})[0]


@torch.no_grad()
def measure(config: RuntimesConfig) -> Iterator[list[Record]]:
    """Records of each number of threads and batch size, as soon as they are there.

    Raises:
        ValueError: these settings can't be measured.
        ImportError: what a runtime needs is missing.
    """
    if "openvino" in config.runtimes and not is_installed("openvino"):
        raise ImportError("openvino is missing: pip install openvino")
    model, images, judged = load(config)
    macs = {True: float(model.backbone.dense_macs)}
    macs[False] = float(model.trace(images).macs.double().mean())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if set(config.runtimes) - {"pytorch", "compile"}:
            export_all(model, folder, config, judged is not None or max(config.batch_sizes) > 1)
        sizes = {min(config.batch_sizes), max(config.batch_sizes)}
        kinds = find_kinds(config.runtimes, model, folder, [images[:size] for size in sizes])
        accuracy = {}
        if judged is not None:
            for kind in kinds:
                classify = classifier(*kind, model, folder, JUDGED_TOGETHER, config.threads[0])
                accuracy[kind] = judge(classify, *judged)
        for threads in config.threads:
            torch.set_num_threads(threads)
            # compiled code is for a number of threads, and torch runs what it has compiled too
            # often uncompiled
            torch.compiler.reset()
            for size in config.batch_sizes:
                runs = {kind: classifier(*kind, model, folder, size, threads) for kind in kinds}
                yield compare(config, runs, images, size, threads, macs, accuracy)


def find_kinds(
    runtimes: Sequence[Runtime], model: PrunedViT, folder: Path, batches: Sequence[Tensor]
) -> list[Kind]:
    """What can be measured: each runtime, dense and pruned, but for those that can't run the pruned
    model, which is said.

    Args:
        runtimes: by name.
        model: the pruned model.
        folder: where it was exported to.
        batches: images [B, C, H, W] that all are checked on.

    Raises:
        ValueError: a runtime can't run the dense model, or gives something else than PyTorch.
    """
    kinds: list[Kind] = []
    for runtime in runtimes:
        for dense in (True, False):
            try:
                for some in batches:
                    expected, found = (
                        classifier(name, dense, model, folder, len(some), 1)(some)
                        for name in ("pytorch", runtime)
                    )
                    check_same(runtime, dense, found, expected)
            except RuntimeError as error:  # OpenVINO's
                if dense:
                    raise ValueError(f"{runtime} can't run the model: {error}") from error
                why = " ".join(str(error).split())
                print(f"warning: {runtime} can't run the pruned model: {why}", file=sys.stderr)
                continue
            kinds.append((runtime, dense))
    return kinds


def check_same(
    runtime: Runtime, dense: bool, found: NDArray[np.float32], expected: NDArray[np.float32]
) -> None:
    """Raises ValueError if a runtime's outputs are not PyTorch's; int8's only have as many."""
    same = found.shape == expected.shape
    if same and runtime != "int8":
        same = bool(np.abs(found - expected).max() <= TOLERANCE)
    if not same:
        kind = "dense" if dense else "pruned"
        raise ValueError(
            f"{runtime} gives something else than PyTorch for the {kind} model: leave it out of "
            "--runtimes"
        )


def judge(classify: Classify, images: Tensor, labels: Tensor) -> float:
    """Share of the images that are classified right."""
    found = [classify(some).argmax(1) for some in images.split(JUDGED_TOGETHER)]
    return float((np.concatenate(found) == labels.numpy()).mean())


def compare(
    config: RuntimesConfig,
    runs: Mapping[Kind, Classify],
    images: Tensor,
    batch_size: int,
    threads: int,
    macs: Mapping[bool, float],
    accuracy: Mapping[Kind, float],
) -> list[Record]:
    """Records of all runtimes at one batch size and number of threads."""
    passes = {
        f"{runtime} {'dense' if dense else 'pruned'}": [
            partial(classify, batch) for batch in images.split(batch_size)
        ]
        for (runtime, dense), classify in runs.items()
    }
    timings = interleaved(passes, config.rounds, 1, CPU, each_call=batch_size == 1)
    baseline = timings[next(iter(timings))]
    about = {
        "model": config.model if config.run is None else config.run.name,
        "batch_size": batch_size,
        "threads": threads,
        "load": os.getloadavg()[0],
        "command": command(),
        "versions": versions()
        | {name: version_of(name) for name in LIBRARIES if is_installed(name)},
        **origin(CPU),
    }
    records = []
    for (kind, dense), (name, timing) in zip(runs, timings.items(), strict=True):
        own = speedup(timings[f"{kind} dense"], timing)
        record = {
            "variant": name,
            **about,
            **pace(timing, len(images)),
            "gmacs": macs[dense] / 1e9,
            "speedup": speedup(baseline, timing),
            "speedup_own": own,
            "efficiency": own * macs[dense] / macs[True],
        }
        if (kind, dense) in accuracy:
            record["accuracy"] = accuracy[kind, dense]
        records.append(record)
    return records


def table(records: Sequence[Record]) -> str:
    """Records of one batch size and number of threads as Markdown."""
    first = records[0]
    title = (
        f"{first['model']}, batch {first['batch_size']}, {first['threads']} threads "
        f"(load {first['load']:.2f})"
    )
    columns = {
        **FIRST_COLUMNS,
        f"over {first['variant']}": ("speedup", 1, ".2f"),
        "over own dense": ("speedup_own", 1, ".2f"),
        "efficiency": ("efficiency", 1, ".2f"),
        **LATENCIES,
        "accuracy": ("accuracy", 1, ".2%"),
    }
    return f"{title}\n\n{records_table(records, columns)}\n"


def main() -> None:
    """The command line."""
    with ends_in_one_line(*COMMAND_ERRORS):
        config = tyro.cli(RuntimesConfig, description=__doc__, prog=prog())
        show_and_keep(measure(config), table, config.out)


if __name__ == "__main__":
    main()
