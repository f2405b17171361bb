"""timm's own scripts run on a pruned ViT. They are in its repository, not in its package: give the
folder that has them as TIMM_SCRIPTS.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPTS = os.environ.get("TIMM_SCRIPTS")
pytestmark = [
    pytest.mark.stress,
    pytest.mark.skipif(not SCRIPTS, reason="needs TIMM_SCRIPTS, a folder with timm's train.py"),
]
RUN = """
import runpy, sys

import timm
from prunevit.agents import TopK, prune

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}

@timm.models.register_model
def pruned_tiny(pretrained=False, num_classes=2, in_chans=3, drop_path_rate=0.0, **_):
    vit = timm.create_model(
        "vit_tiny_patch16_224", **SMALL, num_classes=num_classes, in_chans=in_chans,
        drop_path_rate=drop_path_rate,
    )
    return prune(vit, TopK((9, 4)), (1, 3))

@timm.models.register_model
def tiny_teacher(pretrained=False, num_classes=2, in_chans=3, **_):
    return timm.create_model(
        "vit_tiny_patch16_224", **SMALL, num_classes=num_classes, in_chans=in_chans
    )

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TRAIN = [
    "--epochs",
    "1",
    "--opt",
    "adamw",
    "--output",
    "out",
    "--experiment",
    "e",
    "--num-classes",
    "2",
    "--no-prefetcher",
]
DATA = ["--data-dir", "data", "--workers", "0", "--input-size", "3", "32", "32"]


@pytest.fixture
def run(tmp_path):
    """Runs a script of timm's on 16 images of noise, in two classes."""
    rng = np.random.default_rng(0)
    for i in range(16):
        for split in ("train", "validation"):
            folder = tmp_path / "data" / split / str(i % 2)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "run.py").write_text(RUN)

    def run_script(name, *arguments):
        command = ["run.py", str(Path(SCRIPTS) / name), "--model", "pruned_tiny", "-b", "4"]
        ended = subprocess.run(
            [sys.executable, *command, "--device", "cpu", *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr[-3000:]
        return json.loads(ended.stdout.partition("--result")[2])

    return run_script


def test_train_and_validate(run):
    options = ["--layer-decay", "0.75", "--grad-checkpointing", "--model-ema", "--drop-path", "0.1"]
    (epoch,) = run("train.py", *DATA, *TRAIN, *options)
    found = run("validate.py", *DATA, "--num-classes", "2", "--checkpoint", "out/e/last.pth.tar")
    assert found["top1"] == epoch["validation"]["top1"]


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_train_with_a_teacher(run, kind):
    teacher = ["--kd-model-name", "tiny_teacher", "--kd-distill-type", kind]
    assert run("train.py", *DATA, *TRAIN, *teacher)[0]["train"]["loss"] > 0


def test_train_compiled(run):
    assert run("train.py", *DATA, *TRAIN, "--torchcompile", "eager")[0]["train"]["loss"] > 0


def test_benchmark(run):
    steps = ["--num-bench-iter", "10", "--num-warm-iter", "1", "--img-size", "32"]
    found = run("benchmark.py", "--bench", "both", *steps)
    assert found["infer_samples_per_sec"] > 0
    assert found["train_samples_per_sec"] > 0
