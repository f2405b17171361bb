"""How well embeddings of a pruned model stand in for those of the dense one: whether searches find
the same photographs, and classifiers that were fitted on dense embeddings still work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from prunevit.benchmarks.differences import is_matched
from prunevit.benchmarks.markdown import markdown_table, mean_and_interval
from prunevit.benchmarks.protocol import Benchmark, FixedScheduleModel, Knobs, Method
from prunevit.benchmarks.records import pack_answers
from prunevit.envs.data.image_set import ImageSet
from prunevit.extras import needs
from prunevit.trainers.common.evaluation import Traced, traces

with needs("benchmarks"):
    import pandas as pd

RECALLED = 10  # nearest photographs of the index, of which a share is found again
NEIGHBOURS = 20  # that vote in the k-NN classifier
LOW = 5  # percentile of the cosine similarities
COLUMNS = {
    "cosine": "cosine",
    "cosine_low": "5th percentile",
    "accuracy": "nearest neighbour kept",
    "recall": "recall@10",
    "pruned_index_accuracy": "nearest kept, pruned index",
    "pruned_index_recall": "recall@10, pruned index",
    "knn": "k-NN",
    "probe": "linear probe",
}


@dataclass(frozen=True)
class Embedded:
    """Photographs as a model embeds them.

    Attributes:
        vectors: of length one, float32 [I, D].
        labels: int64 [I].
        gmacs: mean 1e9 multiply-accumulates of a photograph.
        kept: mean share of the patches that survive each stage.
        left: how many photographs have 0, 1, ... N patches left at the end.
    """

    vectors: Tensor
    labels: NDArray[np.int64]
    gmacs: float
    kept: tuple[float, ...]
    left: tuple[int, ...]


def embed(model: Traced, images: ImageSet, size: int) -> Embedded:
    """Embeds ``size`` evenly spread images."""
    vectors, all_labels, survivors, macs = [], [], [], 0
    for trace, labels in traces(model, images, size):
        vectors.append(F.normalize(trace.logits.float(), dim=1).cpu())
        all_labels.append(labels.cpu())
        survivors.append(trace.alive.sum(2).cpu())
        macs += int(trace.macs.sum())
    alive = torch.cat(survivors)  # [I, T]
    patches = model.backbone.num_patches
    return Embedded(
        torch.cat(vectors),
        torch.cat(all_labels).numpy(),
        macs / len(alive) / 1e9,
        tuple((alive.double().mean(0) / patches).tolist()),
        tuple(alive[:, -1].bincount(minlength=patches + 1).tolist()),
    )


@dataclass(frozen=True)
class Dense:
    """What the dense model makes of index and queries.

    Attributes:
        index: photographs that are searched, of the training.
        queries: photographs that judge.
        knn: classifier by the nearest of the index.
        probe: linear classifier, fitted on the index.
    """

    index: Embedded
    queries: Embedded
    knn: KNeighborsClassifier
    probe: Any


@cache
def dense_embeddings(bench: Benchmark, size: int) -> Dense:
    """The dense model's, computed once; ``size`` queries."""
    backbone = bench.backbone
    kept = [backbone.num_patches] * backbone.num_stages
    model = FixedScheduleModel(bench.model, backbone, backbone.dense_macs, kept)
    assert bench.index is not None
    index = embed(model, bench.index, bench.index_size)
    knn = KNeighborsClassifier(min(NEIGHBOURS, len(index.labels)), metric="cosine")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000))
    for classifier in (knn, probe):
        classifier.fit(index.vectors.numpy(), index.labels)
    return Dense(index, embed(model, bench.test, size), knn, probe)


def judge_embeddings(method: Method, knobs: Knobs, bench: Benchmark, size: int) -> dict[str, Any]:
    """What a record says of a method's embeddings of ``size`` queries.

    ``accuracy`` is the share of queries whose nearest neighbour in the dense index is the one that
    the dense query has, ``right`` says of which, and ``pruned_index_accuracy`` is the same share
    where the index is pruned too. ``cosine`` and ``cosine_low`` are mean and 5th percentile of the
    cosine similarity to the dense embedding, ``recall`` is the share of the 10 nearest that are
    found again, and ``knn`` and ``probe`` are the accuracies of classifiers that were fitted on the
    dense index.
    """
    assert method.make is not None
    assert bench.index is not None
    model = method.make(knobs)
    return judged(
        embed(model, bench.test, size), embed(model, bench.index, bench.index_size), bench
    )


def judge_dense_embeddings(bench: Benchmark, size: int) -> dict[str, Any]:
    """The same of the dense model."""
    dense = dense_embeddings(bench, size)
    return judged(dense.queries, dense.index, bench)


def judged(queries: Embedded, index: Embedded, bench: Benchmark) -> dict[str, Any]:
    """See ``judge_embeddings``."""
    dense = dense_embeddings(bench, len(queries.labels))
    wanted = nearest(dense.queries, dense.index)
    same = nearest(queries, dense.index)[:, 0] == wanted[:, 0]
    pruned = nearest(queries, index)
    cosines = (queries.vectors * dense.queries.vectors).sum(1).double().numpy()
    return {
        "accuracy": float(same.double().mean()),
        "dense_accuracy": 1.0,
        "images": len(same),
        "right": pack_answers(same.numpy()),
        "pruned_index_accuracy": float((pruned[:, 0] == wanted[:, 0]).double().mean()),
        "recall": recall(nearest(queries, dense.index), wanted),
        "pruned_index_recall": recall(pruned, wanted),
        "cosine": float(cosines.mean()),
        "cosine_low": float(np.percentile(cosines, LOW)),
        **scores(queries, {"knn": dense.knn, "probe": dense.probe}),
        "gmacs": queries.gmacs,
        "kept": list(queries.kept),
        "left": list(queries.left),
    }


def nearest(queries: Embedded, index: Embedded) -> Tensor:
    """The nearest photographs of the index by cosine similarity, the nearest first, int64
    [I, RECALLED].
    """
    similarity = queries.vectors @ index.vectors.T
    return similarity.topk(min(RECALLED, len(index.labels)), dim=1).indices


def recall(found: Tensor, wanted: Tensor) -> float:
    """Mean share of ``wanted`` [I, K] that is in ``found`` [I, K]."""
    return float((found[:, :, None] == wanted[:, None]).any(1).double().mean())


def scores(queries: Embedded, classifiers: Mapping[str, Any]) -> dict[str, float]:
    """The classifiers' accuracies."""
    vectors = queries.vectors.numpy()
    return {
        name: float(classifier.score(vectors, queries.labels))
        for name, classifier in classifiers.items()
    }


def embeddings_tables(data: pd.DataFrame, methods: Sequence[tuple[str, pd.DataFrame]]) -> str:
    """A table for each operating point, with a row for each method: what ``judge_embeddings``
    measures, in percent, as means with 95% intervals over seeds. Empty for records of classifiers.

    Args:
        data: all records of the comparison, that of the dense model included.
        methods: title and records of each.
    """
    if "cosine" not in data:
        return ""
    of_dense = data[data["point"] == 1.0]
    tables = []
    for point in sorted({point for _, rows in methods for point in rows["point"]}):
        parts = [("dense", of_dense)]
        parts += [
            (title, rows[is_matched(rows) & (rows["point"] == point)]) for title, rows in methods
        ]
        lines = [
            [title, *(mean_and_interval((100 * rows[field]).tolist()) for field in COLUMNS)]
            for title, rows in parts
            if len(rows)
        ]
        tables.append(markdown_table([f"at {point:.0%}", *COLUMNS.values()], lines))
    return "\n\n".join(tables)
