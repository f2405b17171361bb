"""Differences between methods come from the same images, and say when they are apart."""

import numpy as np
import pandas as pd
import pytest

from prunevit.benchmarks.differences import (
    answers,
    check_one_origin,
    difference,
    differences,
    mean_loss,
    summary,
)
from prunevit.benchmarks.records import pack_answers

IMAGES = 400
SHARES = {"dense": 0.95, "mappo": 0.93, "close": 0.925, "far": 0.7}


def record(method, seed=0, point=0.5, images=IMAGES, **more):
    """Answers are nested: whoever is more accurate is right wherever the other is."""
    rank = (np.arange(IMAGES) * 7919 % IMAGES) / IMAGES
    right = (rank < SHARES[method] + 0.001 * seed)[:images]
    return {
        "method": method, "seed": seed, "point": point, "accuracy": right.mean(),
        "dense_accuracy": SHARES["dense"], "images": images, "right": pack_answers(right),
        "gmacs": point, "dense_gmacs": 1.0, "agreement": 0.9, "kl": 0.02, "matched": True,
    } | more  # fmt: skip


def table(*rows):
    data = pd.DataFrame(rows)
    return data, [(name, group) for name, group in data.groupby("method") if name != "dense"]


def rows_of(text):
    """The cells of each table's rows by its first column's title and theirs."""
    tables = {}
    for part in text.split("\n\n"):
        header, _, *lines = [line.strip("|").split("|") for line in part.split("\n")]
        tables[header[0].strip()] = {
            first.strip(): [cell.strip() for cell in cells] for first, *cells in lines
        }
    return tables


def test_answers_come_back_a_row_a_seed():
    data, _ = table(record("far"), record("far", 1))
    assert answers(data).shape == (2, IMAGES)
    assert answers(data).mean(1).tolist() == data["accuracy"].tolist()


def test_what_is_apart_is_bold_and_ours_is_not_compared_with_itself():
    rows = [record(name, seed) for name in ("mappo", "close", "far") for seed in range(3)]
    dense = record("dense", point=1.0, sources=list(range(IMAGES)))
    data, methods = table(dense, *rows)
    found = rows_of(differences(methods, data))
    assert found["loss against dense"].keys() == {"mappo", "close", "far"}
    leads = found["accuracy of ours less that of"]
    assert leads.keys() == {"close", "far"}
    (far,), (close,) = leads["far"], leads["close"]
    assert far.startswith("**23.00 [")
    assert far.endswith("]**")
    assert close.startswith("0.50 [")


def test_images_of_one_source_are_no_evidence_of_their_own():
    rows = [record("mappo"), record("far")]
    widths = []
    for sources in (list(range(IMAGES)), [i // 40 for i in range(IMAGES)]):
        data, _ = table(record("dense", point=1.0, sources=sources), *rows)
        by = dict(iter(data.groupby("method")))
        found = difference(by["mappo"], by["far"], data)
        assert found.mean == pytest.approx(0.23)
        widths.append(found.high - found.low)
    assert widths[1] != pytest.approx(widths[0], rel=0.05)


@pytest.mark.parametrize(
    "other",
    [record("far", images=IMAGES // 2), record("far", right=None), record("far", point=0.3)],
)
def test_other_images_or_unknown_answers_are_not_compared(other):
    data, methods = table(record("dense", point=1.0), record("mappo"), other)
    assert rows_of(differences(methods, data))["loss against dense"]["mappo"][-1]
    leads = rows_of(differences(methods, data)).get("accuracy of ours less that of", {"far": [""]})
    assert not any(leads["far"])


def test_records_without_answers_have_no_table():
    data, methods = table(*({**record(name), "right": None} for name in SHARES))
    assert differences(methods, data) == ""
    assert differences(methods, data.drop(columns=["right"])) == ""


def test_what_is_not_at_its_point_is_left_out():
    data, methods = table(
        record("dense", point=1.0), record("mappo"), record("far", matched=False), record("close")
    )
    assert "far" not in differences(methods, data)
    assert "far" not in summary(methods)


def test_the_mean_loss_is_the_area_to_dense_over_the_range_of_compute():
    losses = {0.2: 0.1, 0.4: 0.05, 0.8: 0.01}
    rows = [
        record("far", seed, point, accuracy=0.95 - loss + sign * 0.01)
        for point, loss in losses.items()
        for seed, sign in ((0, 1), (1, -1))
    ]
    area = 0.2 * (0.1 + 0.05) / 2 + 0.4 * (0.05 + 0.01) / 2
    assert mean_loss(pd.DataFrame(rows)) == pytest.approx(area / 0.6)
    assert mean_loss(pd.DataFrame(rows[:2])) == pytest.approx(0.1)


def test_a_method_that_lacks_a_point_has_no_mean_over_them():
    rows = [record("mappo", point=0.3), record("mappo", point=0.5), record("far", point=0.5)]
    _, methods = table(*rows)
    assert "mappo" in summary(methods)
    assert "far" not in summary(methods)


def test_means_are_over_the_points_of_ours():
    rows = [record(name, point=point) for name in ("mappo", "far") for point in (0.3, 0.5)]
    _, methods = table(*rows)
    _, with_more = table(*rows, record("far", point=0.2, accuracy=0.1))
    assert "mean loss, 30% to 50%" in summary(methods)
    assert summary(with_more) == summary(methods)


def test_a_table_is_of_one_commit_and_one_machine():
    origin = {"commit": "abc", "hardware": "a"}
    data, _ = table(*(record(name, **origin) for name in SHARES))
    check_one_origin(data)
    for other in ({"commit": "abd"}, {"hardware": "b"}, {"commit": None}):
        mixed = pd.concat([data, pd.DataFrame([record("far", 1, **origin | other)])])
        with pytest.raises(ValueError, match=r"of one commit and machine: .*abc on a"):
            check_one_origin(mixed)
    check_one_origin(data.drop(columns=["commit", "hardware"]))


def test_speeds_of_a_table_come_from_one_process():
    first, second = "2026-01-01T10:00:00+00:00", "2026-01-01T11:00:00+00:00"
    origin = {"commit": "abc", "hardware": "a"}
    data, _ = table(record("dense", **origin), record("far", **origin, timed=first))
    check_one_origin(data)
    mixed = pd.concat([data, pd.DataFrame([record("close", **origin, timed=second)])])
    with pytest.raises(
        ValueError, match=f"speeds of one process: .*{first}, {second}".replace("+", "[+]")
    ):
        check_one_origin(mixed)


def test_a_difference_says_where_seeds_are_missing():
    rows = [
        record(name, seed, point)
        for name in ("mappo", "far")
        for seed in (0, 1)
        for point in (0.3, 0.5)
    ]
    dense = record("dense", point=1.0)
    data, methods = table(
        dense,
        *(row for row in rows if (row["method"], row["seed"], row["point"]) != ("far", 1, 0.3)),
    )
    for cells in rows_of(differences(methods, data)).values():
        assert cells["far"][0].endswith(", 1 seeds")
        assert "seeds" not in cells["far"][1]
