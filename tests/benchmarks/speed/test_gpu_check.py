"""The script for a GPU's first minutes, rehearsed on a CPU: what it has, it keeps."""

import json
import math
import time

import pytest
import torch

from prunevit.benchmarks.speed import gpu_check
from prunevit.benchmarks.speed.gpu_check import GpuCheckConfig, Report, agreement, check

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "run_tests", lambda seconds: {"exit_status": 0})
    monkeypatch.setattr(gpu_check, "profile", lambda config, seconds: {"exit_status": 0})
    monkeypatch.setattr(torch, "compile", lambda model: model)
    return GpuCheckConfig(out=tmp_path / "gpu.json", device="cpu", tiny=True)


def test_it_is_rehearsed_on_a_cpu(config):
    results = check(config)
    assert json.loads(config.out.read_text()) == results
    machine, *steps = results
    assert machine == "machine"
    assert {"packed against masked", "host waits", "tests", "profile"} < set(steps)
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
