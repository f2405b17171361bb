"""The script for a GPU's first minutes, rehearsed on a CPU: what it has, it keeps."""

import json
import math
import subprocess
import sys
import time
from importlib import import_module

import pytest
import torch

from prunevit.benchmarks.speed import gpu_check
from prunevit.benchmarks.speed.gpu_check import (
    GPU_TESTS,
    GpuCheckConfig,
    Report,
    agreement,
    check,
    fine_tune,
    run_module,
    train,
    workloads,
)

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "run_module", lambda arguments, seconds: list(arguments))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    return GpuCheckConfig(out=tmp_path / "gpu.json", device="cpu", tiny=True)


def test_it_is_rehearsed_on_a_cpu(config):
    results = check(config)
    assert json.loads(config.out.read_text()) == results
    machine, *steps = results
    assert machine == "machine"
    assert {"packed against masked", "host waits", "tests", "profile"} < set(steps)
    assert {"training", "fine-tuning"} < set(steps)
    assert results["machine"]["varlen_kernel"] is False
    assert not [results[step] for step in steps if "result" not in results[step]]
    (timed,) = (results[step]["result"] for step in steps if step.startswith("test_vit"))
    variants = timed["variants"]
    assert variants.keys() >= {"dense", "dense, compiled", "packed", "padded", "tome", "unpruned"}
    assert variants["packed"]["gmacs"] < variants["dense"]["gmacs"]
    assert variants["dense"]["speedup"] == variants["unpruned"]["speedup_same_kernels"] == 1


def test_packed_and_masked_agree_in_all_precisions():
    found = agreement(CPU, tiny=True)
    assert len(found) == 9
    for name, error in found.items():
        assert error < (1e-4 if "float32" in name else 0.1), name


def test_a_step_that_fails_leaves_its_error_and_the_next_one_runs(tmp_path):
    report = Report(tmp_path / "r.json", math.inf)
    report.step("bad", lambda: 1 / 0)
    report.step("good", lambda: 7)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["bad"]["error"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in written["bad"]["trace"]
    assert written["good"]["result"] == 7


def test_what_would_begin_too_late_is_left_out(tmp_path):
    report = Report(tmp_path / "r.json", time.monotonic() - 1)
    report.step("late", lambda: pytest.fail("it began"))
    assert report.results["late"] == {"left_out": "no time was left"}


def test_what_a_gpu_is_asked_for():
    plan = [name for name, *_ in workloads(GpuCheckConfig())]
    models = ("deit_small_patch16_224", "deit_base_patch16_224", "vit_small_patch14_dinov2")
    wanted = {f"{model} bfloat16 batch {batch}" for model in models for batch in (1, 32, 256, 1024)}
    assert wanted < set(plan[: len(plan) // 2])
    assert {"deit_small 384 px bfloat16 batch 256", "deit_small 512 px bfloat16 batch 256"} < set(
        plan
    )


@pytest.mark.skipif(not (gpu_check.ROOT / "tests").is_dir(), reason="needs the checkout")
def test_it_runs_all_tests_that_need_cuda():
    marked = {
        file.relative_to(gpu_check.ROOT).as_posix()
        for file in (gpu_check.ROOT / "tests").rglob("test_*.py")
        if "skipif(not torch.cuda.is_available()" in file.read_text(encoding="utf-8")
    }
    assert marked - {"tests/benchmarks/speed/test_gpu_check.py"} <= set(GPU_TESTS)
    assert all((gpu_check.ROOT / file).is_file() for file in GPU_TESTS)


def test_a_module_that_takes_too_long_leaves_what_it_said(monkeypatch):
    ended = run_module(["timeit", "-n", "1", "-r", "1", "print('begun', flush=True)"], 60)
    assert ended["exit_status"] == 0
    assert ended["output"].startswith("begun")

    def stop(command, stdout, timeout, **_):
        stdout.write("begun")
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", stop)
    assert run_module(["timeit"], 60) == {"exit_status": None, "output": "begun"}


@pytest.mark.stress
def test_the_training_and_the_fine_tuning_run(tmp_path, monkeypatch):
    def run_here(arguments, seconds):
        """On few digits, as all tests."""
        monkeypatch.setattr(sys, "argv", arguments)
        import_module(f"prunevit.{arguments[0]}").main()

    monkeypatch.setattr(gpu_check, "run_module", run_here)
    config, run = GpuCheckConfig(device="cpu", tiny=True), tmp_path / "run"
    train(config, run, 600)
    fine_tune(config, run, 600)
    assert (tmp_path / "run-finetuned" / "report.json").is_file()
