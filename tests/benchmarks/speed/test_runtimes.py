"""The runtimes' benchmark: each runtime gives what PyTorch gives, and its records are complete."""

import numpy as np
import pytest
import torch

from prunevit.agents import KeepAll, prune
from prunevit.benchmarks.speed import runtimes
from prunevit.benchmarks.speed.runtimes import (
    RuntimesConfig,
    classifier,
    judge,
    load,
    measure,
    table,
)

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
        assert {"hardware", "commit", "command", "versions"} <= record.keys()
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


def tiny_config(**settings):
    sizes = {"batch_sizes": (1, 3), "threads": (1,), "images": 3, "rounds": 1}
    return RuntimesConfig(prune_before=(1,), keep=(0.5,), **(sizes | settings))


def test_a_runtime_that_cannot_run_the_pruned_model_is_measured_dense(
    make_vit, monkeypatch, capsys
):
    monkeypatch.setattr(runtimes, "create_backbone", lambda *_, **__: make_vit(depth=2))

    def broken(runtime, dense, *others):
        def refuse(images):
            raise RuntimeError("Eltwise shape infer\nfailed")

        works = dense or runtime == "pytorch"
        return classifier("pytorch", dense, *others) if works else refuse

    monkeypatch.setattr(runtimes, "classifier", broken)
    for records in measure(tiny_config(runtimes=("pytorch", "compile"))):
        assert [each["variant"] for each in records] == [
            "pytorch dense", "pytorch pruned", "compile dense"
        ]  # fmt: skip
    said = capsys.readouterr().err
    assert said == "warning: compile can't run the pruned model: Eltwise shape infer failed\n"


def test_each_number_of_threads_compiles_anew(make_vit, monkeypatch):
    """torch runs uncompiled what it has compiled too often, and says so in its log alone."""
    monkeypatch.setattr(runtimes, "create_backbone", lambda *_, **__: make_vit(depth=2))
    called = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: called.append("reset"))
    monkeypatch.setattr(runtimes, "compare", lambda *_: called.append(torch.get_num_threads()))
    list(measure(tiny_config(runtimes=("pytorch",), threads=(1, 2))))
    assert called == ["reset", 1, 1, "reset", 2, 2]


@pytest.mark.parametrize("classes", [0, 5])
def test_a_run_is_judged_if_it_classifies(make_vit, make_images, tmp_path, monkeypatch, classes):
    (tmp_path / "config.json").write_text('{"dataset": "photos:PATH"}')
    model = prune(make_vit(num_classes=classes), KeepAll(), (1,))
    monkeypatch.setattr(runtimes.PrunedViT, "from_run", lambda run: model)
    monkeypatch.setattr(runtimes, "open_images", lambda *_: make_images())
    _, images, judged = load(RuntimesConfig(run=tmp_path, images=4, batch_sizes=(3,), judged=7))
    assert len(images) == 6
    assert (judged is None) == (classes == 0)
    assert judged is None or len(judged[0]) == len(judged[1]) == 7
