"""Records survive what interrupts their writing, and tell means with honest intervals."""

import json

import numpy as np
import pytest

from prunevit.benchmarks.records import FIELDS, Records, cell, interval, read, table


def record(policy="a", seed=0, point=0.4, accuracy=0.9, **more):
    row = dict.fromkeys(FIELDS, 0)
    return row | {
        "game": "digits", "policy": policy, "seed": seed, "point": point, "accuracy": accuracy,
        "dense_accuracy": 0.95, "gmacs": 0.4, "dense_gmacs": 1.0, "speedup": None, "left": [0, 9],
    } | more  # fmt: skip


def test_records_come_back(tmp_path):
    records = Records(tmp_path / "new", "digits")
    records.add([record(seed=0), record(seed=1)])
    records.add([record("b")])
    again = Records(tmp_path / "new", "digits")
    assert again.rows == [record(seed=0), record(seed=1), record("b")]
    assert again.has("a", 1, 0.4)
    for other in (("a", 2, 0.4), ("b", 1, 0.4), ("a", 1, 0.5)):
        assert not again.has(*other)


@pytest.mark.parametrize("cut", [1, 20, 5_000])
def test_a_line_that_was_cut_off_is_measured_anew(tmp_path, cut):
    Records(tmp_path, "digits").add([record(seed=seed) for seed in range(3)])
    file = tmp_path / "records.jsonl"
    text = file.read_text()
    file.write_text(text[:-cut])
    records = Records(tmp_path, "digits")
    whole = text[:-cut].count("\n")
    assert len(records.rows) == whole
    records.add([record(seed=9)])
    assert [row["seed"] for row in read(file)] == [*range(whole), 9]


def test_records_of_another_game_are_refused(tmp_path):
    Records(tmp_path, "digits").add([record()])
    with pytest.raises(ValueError, match=r"holds records of digits: give another --out for cifar"):
        Records(tmp_path, "cifar10")


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 2 is no record"), ("{}", "line 2 lacks accuracy"), ("7", "2")]
)
def test_what_is_no_record_is_named(tmp_path, line, message):
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(record()) + "\n" + line + "\n" + json.dumps(record()) + "\n")
    with pytest.raises(ValueError, match=message):
        read(file)


def test_intervals_hold_the_mean_as_often_as_they_say():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        low, high = interval(generator.normal(size=20).tolist())
        held += low <= 0 <= high
    assert 50 <= held <= 60
    assert interval([0.5]) == interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_a_cell_tells_mean_and_interval():
    low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert cell([1.0, 2.0, 3.0, 4.0], unit="x") == f"2.50x [{low:.2f}, {high:.2f}]"
    assert cell([2.0, 2.0]) == "2.00"


def test_the_table_says_who_was_judged_on_fewer_images():
    text = table([record("oracle", left=[1, 2]), record("b")])
    assert "| oracle (3 images) |" in text
    assert "| b |" in text


def test_the_table_ranks_policies_at_each_point():
    rows = [
        record("worse", accuracy=0.8),
        record("better", accuracy=0.94, speedup=2.0),
        record("better", seed=1, accuracy=0.92, speedup=3.0),
        record("worse", point=0.3, accuracy=0.5),
    ]
    lines = table(rows).splitlines()[2:]
    cells = [[part.strip() for part in line.split("|")[1:-1]] for line in lines]
    assert [row[:3] for row in cells] == [
        ["30%", "worse", "1"], ["40%", "better", "2"], ["40%", "worse", "1"],
    ]  # fmt: skip
    assert cells[1][3].startswith("93.00 [")
    assert cells[1][4].startswith("2.00 [")
    assert cells[1][5] == "40.0"
    assert cells[1][6].startswith("2.50x [")
    assert cells[0][6] == "not timed"
