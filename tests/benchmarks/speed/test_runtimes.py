"""The runtimes' benchmark: each runtime gives what PyTorch gives, and its records are complete."""

import numpy as np
import pytest
import torch

from prunevit.benchmarks.speed import runtimes
from prunevit.benchmarks.speed.runtimes import RuntimesConfig, classifier, judge, measure, table

pytestmark = pytest.mark.integration("onnx")


def test_all_runtimes_do_the_same_work(make_vit, monkeypatch):
    monkeypatch.setattr(runtimes, "create_backbone", lambda *_, **__: make_vit(depth=2))
    outputs = {}

    def watched(runtime, dense, model, folder, batch_size, threads):
        classify = classifier(runtime, dense, model, folder, batch_size, threads)
        outputs[runtime, dense] = classify(torch.zeros(2, 3, 32, 32))
        return classify

    monkeypatch.setattr(runtimes, "classifier", watched)
    names = ["pytorch", "onnxruntime", "int8"]
    config = RuntimesConfig(
        prune_before=(1,),
        keep=(0.5,),
        runtimes=tuple(names),
        batch_sizes=(2,),
        threads=(1,),
        images=4,
        rounds=2,
    )
    (records,) = measure(config)
    assert [each["variant"] for each in records] == [
        f"{name} {kind}" for name in names for kind in ("dense", "pruned")
    ]
    for (runtime, dense), found in outputs.items():
        distance = np.abs(found - outputs["pytorch", dense]).max()
        assert distance < (0.2 if runtime == "int8" else 1e-4)
        assert (distance > 0) == (runtime != "pytorch")
    assert records[1]["gmacs"] < records[0]["gmacs"]
    assert records[2]["speedup_own"] == 1
    for record in records:
        assert record["images_per_second"] > 0
        share = record["gmacs"] / records[0]["gmacs"]
        assert record["efficiency"] == pytest.approx(record["speedup_own"] * share)
    assert table(records).startswith("deit_small_patch16_224, batch 2, 1 threads (load ")


def test_accuracy_is_the_share_of_right_answers():
    images = torch.eye(5).repeat(4, 1)  # 20 images, more than are judged at once
    labels = torch.arange(20) % 5
    assert judge(lambda some: some.numpy(), images, labels) == 1
    labels[:5] = 4
    assert judge(lambda some: some.numpy(), images, labels) == 0.8


def test_a_runtime_that_gives_something_else_is_refused(make_vit, monkeypatch):
    monkeypatch.setattr(runtimes, "create_backbone", lambda *_, **__: make_vit(depth=2))

    def wrong(runtime, dense, *others):
        classify = classifier("pytorch", dense, *others)
        return (lambda images: classify(images)[:0]) if runtime == "compile" else classify

    monkeypatch.setattr(runtimes, "classifier", wrong)
    config = RuntimesConfig(prune_before=(1,), keep=(0.5,), runtimes=("compile",))
    with pytest.raises(ValueError, match="compile gives something else than PyTorch for the dense"):
        next(measure(config))
