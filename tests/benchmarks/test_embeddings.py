"""Embeddings of pruned models are compared with dense ones as people use them: by search, and by
classifiers that were fitted on dense embeddings.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from prunevit.agents import KeepAll, PrunedViT
from prunevit.benchmarks import compare as comparison
from prunevit.benchmarks import embeddings
from prunevit.benchmarks.compare import CompareConfig, compare, open_benchmark
from prunevit.benchmarks.embeddings import (
    Dense,
    Embedded,
    dense_embeddings,
    embed,
    embeddings_tables,
    judge_embeddings,
    judged,
    nearest,
    recall,
)
from prunevit.benchmarks.methods.recipes import RECIPES
from prunevit.benchmarks.methods.registry import METHODS
from prunevit.benchmarks.protocol import Method, UnreachableError
from prunevit.benchmarks.records import unpack_answers
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.weights import write_weights

VIT = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 4}
QUERIES = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A small ViT without a classifier, and photographs of four classes, each of its own colour."""
    root = tmp_path_factory.mktemp("photographs")
    noise = np.random.RandomState(0)
    for split, count in (("train", 15), ("test", 6)):
        for name in range(4):
            folder = root / split / f"class{name}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = noise.randint(0, 128, (4, 4, 3), dtype=np.uint8)
                pixels[..., name % 3] += np.uint8(40 * (1 + name // 3))
                Image.fromarray(pixels).resize((32, 32)).save(folder / f"{i}.png")
    weights = root / "vit.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_backbone(VIT, untrained=True, num_classes=0, **SMALL)
    write_weights(weights, model.state_dict(), VIT, 0, SMALL)
    return CompareConfig(
        task="embeddings", data=f"folder:{root}", backbone=VIT, model_kwargs=SMALL,
        checkpoint=weights, prune_before=(1, 2), points=(0.7, 0.9), seeds=1, iterations=1,
        eval_size=4, test_size=QUERIES, index_size=40, speed=False, device="cpu", threads=1,
        methods=("attention", "tome"),
    )  # fmt: skip


@pytest.fixture
def bench(config, tmp_path):
    return open_benchmark(replace(config, out=tmp_path))


def unit(*rows, labels=()):
    vectors = F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)
    return Embedded(vectors, np.array(labels or [0] * len(rows)), 1.0, (), ())


class Answers:
    """A classifier that is right so often."""

    def __init__(self, share):
        self.share = share

    def score(self, vectors, labels):
        return self.share


def test_the_nearest_is_the_one_of_the_smallest_angle():
    index = unit([1, 0], [5, 5], [0, 1])
    queries = unit([2, 0.1], [0.1, 3], [1, 0.9])
    assert nearest(queries, index)[:, 0].tolist() == [0, 2, 1]
    assert nearest(queries, index)[0].tolist() == [0, 1, 2]


def test_recall_counts_what_is_found_again_in_any_order():
    wanted = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    found = torch.tensor([[4, 3, 2, 1], [1, 9, 8, 2]])
    assert recall(found, wanted) == 0.75


def test_queries_meet_the_dense_index_and_the_pruned_one(monkeypatch):
    index = unit([1, 0], [0, 1])
    dense = Dense(index, unit([1, 0.1], [1, 0.2], [0.1, 1]), *2 * [Answers(0.5)])
    monkeypatch.setattr(embeddings, "dense_embeddings", lambda bench, size: dense)
    queries = unit([1, 0.1], [0.2, 1], [0.1, 1])  # the second one finds another
    found = judged(queries, unit([0, 1], [1, 0]), None)  # and a pruned index has changed places
    assert unpack_answers(found["right"], 3).tolist() == [True, False, True]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["pruned_index_accuracy"] == pytest.approx(1 / 3)
    angle = 0.4 / 1.04
    assert found["cosine"] == pytest.approx((2 + angle) / 3)
    assert found["cosine_low"] == pytest.approx(angle + 0.1 * (1 - angle))
    assert (found["knn"], found["probe"]) == (0.5, 0.5)


def test_nothing_pruned_is_as_dense(bench):
    method = Method(lambda gmacs: {}, lambda knobs: PrunedViT(bench.backbone, KeepAll()))
    found = judge_embeddings(method, {}, bench, QUERIES)
    dense = dense_embeddings(bench, QUERIES)
    for name in ("accuracy", "pruned_index_accuracy", "recall", "pruned_index_recall"):
        assert found[name] == 1
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["cosine_low"] == pytest.approx(1, abs=1e-5)
    assert found["gmacs"] == pytest.approx(bench.backbone.dense_macs / 1e9)
    assert found["left"][-1] == QUERIES
    labels = [int(bench.test.load([i * len(bench.test) // QUERIES])[1]) for i in range(QUERIES)]
    assert dense.queries.labels.tolist() == labels
    right = dense.knn.predict(dense.queries.vectors.numpy()) == labels
    assert found["knn"] == right.mean()


@pytest.mark.learning
def test_methods_are_compared(config, tmp_path, capsys):
    config = replace(config, out=tmp_path, methods=("mappo", "random", "attention"))
    rows = compare(config)
    dense, *others = rows
    assert dense["method"] == "dense"
    assert dense["accuracy"] == dense["recall"] == dense["pruned_index_recall"] == 1
    assert {row["method"] for row in others} == {"mappo", "random", "attention"}
    bench = open_benchmark(config)
    for row in others:
        right = unpack_answers(row["right"], QUERIES)
        assert row["accuracy"] == right.mean()
        if row["matched"]:
            assert row["gmacs"] / row["dense_gmacs"] == pytest.approx(row["point"], rel=0.1)
        assert -1 <= row["cosine_low"] <= row["cosine"] < 1
        assert row["settings"]["index_size"] == 40
    attention = next(row for row in others if row["method"] == "attention")
    model = METHODS["attention"].open(bench, 0).make(attention)
    queries = embed(model, bench.test, QUERIES)
    dense_queries = dense_embeddings(bench, QUERIES).queries
    angles = F.cosine_similarity(queries.vectors, dense_queries.vectors)
    assert attention["cosine"] == pytest.approx(float(angles.mean()), abs=1e-5)
    assert compare(config) == rows  # nothing is measured again
    comparison.report(config)
    printed = capsys.readouterr().out
    assert "loss against dense" in printed
    assert "nearest kept, pruned index" in printed


@pytest.mark.parametrize(
    "name", sorted(name for name, spec in METHODS.items() if spec.embeds and name not in RECIPES)
)
def test_each_method_without_training_prunes_embeddings(bench, name):
    method = METHODS[name].open(bench, 0)
    try:
        knobs = method.tune(bench.gmacs_at(0.8))
    except UnreachableError as error:  # of 16 patches, one is more than the tolerance
        knobs = error.nearest
    found = judge_embeddings(method, knobs, bench, 4)
    assert found["gmacs"] < bench.backbone.dense_macs / 1e9
    assert 0 < found["cosine"] < 1


def test_classifiers_have_no_such_table():
    assert embeddings_tables(pd.DataFrame([{"method": "tome", "point": 0.5}]), []) == ""


def test_what_learns_from_labels_is_refused(config):
    with pytest.raises(ValueError, match="dynamic-vit, oracle can't learn without labels: there"):
        replace(config, methods=("mappo", "dynamic-vit", "oracle"))


def test_photographs_without_classes_are_refused(config, tmp_path):
    data = config.data.replace("folder:", "photos:")
    with pytest.raises(ValueError, match="photos:"):
        open_benchmark(replace(config, out=tmp_path, data=data))
