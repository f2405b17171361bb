"""What to run first on a GPU, within minutes: ``python -m benchmarks.speed.gpu_check --out FILE``.

It needs torch, timm and this package's own requirements, and no network. Each step's result is
written as soon as it is there, a step that fails leaves its error, and a step that no longer fits
is left out. ``--device cpu --tiny`` rehearses all of it on a CPU.

1. The tests that need a GPU.
2. Packed execution against masked, in float32, float16 and bfloat16, with ragged and empty images.
3. How often a packed pass makes the host wait.
4. Throughput of timm's dense model, eager and compiled, of ours, padded, and of ToMe.
5. A profile of MAPPO's iterations.
6. A training and a fine-tuning, as far as the time lasts.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from torch import Tensor

from prunevit.agents.pruned_vit import PrunedViT
from prunevit.benchmarks.machine import hardware, peak_memory
from prunevit.benchmarks.records import command, commit
from prunevit.benchmarks.speed.variants import (
    VARIANTS,
    Name,
    ThroughputConfig,
    Workload,
    calls,
    load,
)
from prunevit.cli import prog
from prunevit.envs.devices import pick_device
from prunevit.envs.vit.attention import has_varlen_kernel
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.classification import versions
from prunevit.trainers.common.run import COMMAND_ERRORS
from prunevit.trainers.common.settings import Positive, Settings
from prunevit.trainers.common.signals import ends_in_one_line
from prunevit.trainers.common.timing import interleaved, speedup

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = (
    "tests/envs/vit/test_precision.py", "tests/envs/vit/test_layout.py",
    "tests/envs/vit/test_host_waits.py", "tests/envs/batched/test_token_prune.py",
    "tests/envs/test_token_prune.py", "tests/benchmarks/speed/test_throughput.py",
)  # fmt: skip
TIMED: tuple[Name, ...] = ("dense", "packed", "padded", "tome", "unpruned")
STAGES = (3, 6, 9)
MOST_TELLING = 4  # workloads that are timed first


@dataclass
class GpuCheckConfig(Settings):
    """What is checked, and for how long."""

    out: Path = Path("gpu_check.json")
    """The JSON file of the results."""
    minutes: Positive = 8.0
    """Steps that would begin later than this are left out."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where it runs; cpu to rehearse it."""
    tiny: bool = False
    """Small models and batches, to rehearse it."""
    train: str = ""
    """Further options of trainers.mappo for the training, as "--dataset folder:PATH --backbone NAME
    --checkpoint FILE". By default it trains on the digits."""


@dataclass
class Report:
    """Results by step, in a file that is always up to date."""

    file: Path
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)

    def step(self, name: str, run: Callable[[], Any]) -> None:
        """Runs a step and writes its result, or why there is none."""
        begun = time.monotonic()
        if begun > self.deadline:
            self.results[name] = {"left_out": "no time was left"}
        else:
            try:
                self.results[name] = {"result": run()}
            except Exception as error:  # the next steps may still work, and time is short
                trace = traceback.format_exc(limit=-4)
                self.results[name] = {"error": f"{type(error).__name__}: {error}", "trace": trace}
            self.results[name]["seconds"] = time.monotonic() - begun
        write_json(self.file, self.results)
        print(f"{name}: {self.results[name].get('error', 'done')}", flush=True)


# --- steps ---


def run_module(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """How ``python -m ARGUMENTS`` ends, and the end of what it printed; its exit status is None if
    it was stopped after so many seconds.
    """
    command = [sys.executable, "-m", *arguments]
    with tempfile.TemporaryFile("w+") as said:
        try:
            status: int | None = subprocess.run(
                command, cwd=ROOT, stdout=said, stderr=said, timeout=max(seconds, 1.0), check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        said.seek(0)
        return {"exit_status": status, "output": said.read()[-6000:]}


def run_tests(seconds: float) -> dict[str, Any]:
    """How the tests that need a GPU end."""
    files = [file for file in GPU_TESTS if (ROOT / file).is_file()]
    return run_module(["pytest", "-q", "-k", "cuda or gpu", *files], seconds)


def agreement(device: torch.device, tiny: bool) -> dict[str, Any]:
    """By how much packed logits differ from masked ones, relative to the largest of them."""
    name = "test_vit" if tiny else "deit_tiny_patch16_224"
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        model = create_backbone(name, untrained=True).to(device, dtype).eval()
        stages = (1, 2) if tiny else STAGES
        images = torch.randn(8, *StagedViT(model, stages).image_shape, device=device, dtype=dtype)
        for kind in ("ragged", "empty", "nothing pruned"):
            packed, masked = (
                outputs(StagedViT(model, stages, execution), images, kind)
                for execution in ("packed", "masked")
            )
            error = (packed - masked).abs().max() / masked.abs().max()
            found[f"{str(dtype).removeprefix('torch.')}, {kind}"] = float(error)
    return found


@torch.inference_mode()
def outputs(backbone: StagedViT, images: Tensor, kind: str) -> Tensor:
    """Logits under keep masks: of all lengths, with images that lose all patches, or of ones."""
    generator = torch.Generator().manual_seed(0)
    tokens = backbone.begin(images)
    for stage in range(backbone.num_stages):
        share = torch.rand(len(images), 1, generator=generator)
        keep = torch.rand(len(images), backbone.num_patches, generator=generator) < share
        if kind == "empty":
            keep[::2] = False
        elif kind == "nothing pruned":
            keep[:] = True
        tokens = backbone.advance(tokens, keep.to(images.device), stage)
    return backbone.finish(tokens).float()


@torch.inference_mode()
def count_waits(device: torch.device, workload: Workload) -> dict[str, Any]:
    """Where a packed pass makes the host wait for the GPU."""
    if device.type != "cuda":
        return {"waits": None}
    model = PrunedViT(workload.packed, workload.policy).eval()
    model(workload.images)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(workload.images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in caught]
    return {"waits": len(places), "stages": workload.packed.num_stages, "places": places}


def throughput(config: ThroughputConfig, image_size: int | None, batch_size: int) -> Any:
    """Images a second and speed-ups of each variant, the policy included."""
    config = replace(config, batch_sizes=(batch_size,), images=batch_size)
    workload = load(config, image_size)
    device, model = workload.images.device, workload.packed.model
    passes: dict[str, list[Callable[[], object]]] = {}
    for name in TIMED:
        passes[name] = list(calls(name, workload, batch_size))
    torch.compiler.reset()  # torch runs what it has compiled too often uncompiled
    compiled = torch.compile(model)
    passes["dense, compiled"] = [partial(compiled, workload.images)]
    timings = interleaved(passes, config.rounds, 2, device)
    dense = workload.packed.dense_macs
    found = {}
    costs = {name: VARIANTS[name].macs(workload, batch_size) for name in TIMED}
    for variant, timing in timings.items():
        macs = costs.get(cast("Name", variant), dense)  # compiled, it is the same model
        faster = speedup(timings["dense"], timing)
        found[variant] = {
            "images_per_second": batch_size / timing.seconds,
            "spread": timing.spread,
            "gmacs": macs / 1e9,
            "speedup": faster,
            "speedup_same_kernels": speedup(timings["unpruned"], timing),
            "efficiency": faster * macs / dense,
        }
    return {"variants": found, "peak_memory": peak_memory(device)}


def profile(config: GpuCheckConfig, seconds: float) -> dict[str, Any]:
    """The table that a profiled training of a few iterations prints."""
    with tempfile.TemporaryDirectory() as folder:
        return run_module(
            [*training(config, Path(folder, "run")), "--profile", "--iterations", "8"], seconds
        )


def training(config: GpuCheckConfig, run: Path) -> list[str]:
    """The command of a training."""
    options = ["--num-envs", "8", "--eval-size", "8"] if config.tiny else shlex.split(config.train)
    command = ["trainers.mappo", "--device", config.device, "--run-name", str(run.resolve())]
    return [*command, *options]


def train(config: GpuCheckConfig, run: Path, seconds: float) -> dict[str, Any]:
    """How a training ends."""
    return run_module([*training(config, run), *tiny(config, "--iterations", "2")], seconds)


def fine_tune(config: GpuCheckConfig, run: Path, seconds: float) -> dict[str, Any]:
    """How fine-tuning the ViT of ``run`` ends."""
    options = tiny(config, "--epoch-size", "16", "--batch-size", "8", "--validation-size", "8")
    precision = "float32" if config.device == "cpu" else "bfloat16"
    command = [
        "trainers.finetune", "--run", str(run.resolve()), "--device", config.device,
        "--run-name", f"{run.resolve()}-finetuned", "--precision", precision, "--epochs", "1",
    ]  # fmt: skip
    return run_module([*command, *options], seconds)


def tiny(config: GpuCheckConfig, *options: str) -> list[str]:
    """Options of a rehearsal."""
    return list(options) if config.tiny else []


def workloads(config: GpuCheckConfig) -> Iterator[tuple[str, ThroughputConfig, int | None, int]]:
    """What is timed, the most telling first: a name, settings, image size and batch size."""
    base = ThroughputConfig(device=config.device, rounds=3 if config.tiny else 15, memory=False)
    if config.tiny:
        small = replace(base, model="test_vit", prune_before=(1, 2))
        yield "test_vit float32 batch 2", small, 64, 2
        return
    for dtype in ("bfloat16", "float32"):
        for model in (
            "deit_small_patch16_224",
            "deit_base_patch16_224",
            "vit_small_patch14_dinov2",
        ):
            for batch in (256, 1024, 32, 1):
                named = replace(base, model=model, dtype=dtype)
                yield f"{model} {dtype} batch {batch}", named, 224, batch
        for size in (384, 512):
            large = replace(base, model="deit_small_patch16_224", dtype=dtype)
            yield f"deit_small {size} px {dtype} batch 256", large, size, 256


def check(config: GpuCheckConfig) -> dict[str, Any]:
    """Runs all steps; returns what is in the file.

    Raises:
        ValueError: there is no such device.
    """
    device = pick_device(config.device)
    deadline = time.monotonic() + 60 * config.minutes
    report = Report(config.out, deadline)
    report.results["machine"] = {
        "hardware": hardware(device), "versions": versions(), "commit": commit(),
        "command": command(),
        "varlen_kernel": has_varlen_kernel(torch.empty(0, device=device, dtype=torch.bfloat16)),
    }  # fmt: skip
    if device.type == "cuda" and not report.results["machine"]["varlen_kernel"]:
        print("no attention over rows of different length here, so images are padded", flush=True)
    plan = list(workloads(config))
    report.step("packed against masked", partial(agreement, device, config.tiny))
    _, first, size, _ = plan[0]
    small = replace(first, batch_sizes=(8,), images=8)
    report.step("host waits", lambda: count_waits(device, load(small, size)))

    def left() -> float:
        return deadline - time.monotonic()

    def time_all(plan: Sequence[tuple[str, ThroughputConfig, int | None, int]]) -> None:
        for name, settings, size, images in plan:
            report.step(name, partial(throughput, settings, size, images))

    # the most telling timings, then what else there is time for
    half = max(MOST_TELLING, len(plan) // 2)  # of bfloat16
    time_all(plan[:MOST_TELLING])
    report.step("tests", lambda: run_tests(left() / 2))
    report.step("profile", lambda: profile(config, left() / 2))
    time_all(plan[MOST_TELLING:half])
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        report.step("training", lambda: train(config, run, 2 * left() / 3))
        report.step("fine-tuning", lambda: fine_tune(config, run, left()))
    time_all(plan[half:])
    return report.results


def main() -> None:
    """The command line."""
    with ends_in_one_line(*COMMAND_ERRORS):
        config = tyro.cli(GpuCheckConfig, description=__doc__, prog=prog())
        check(config)


if __name__ == "__main__":
    main()
