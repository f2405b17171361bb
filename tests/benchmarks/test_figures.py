"""Figures are drawn from the records alone, and show what these say."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from tokenprune.benchmarks.figures import draw, draw_line, grouped, main
from tokenprune.benchmarks.records import FIELDS, Records


def record(policy, seed, point, accuracy, **more):
    row = dict.fromkeys(FIELDS, 0)
    return row | {
        "game": "digits", "policy": policy, "seed": seed, "point": point, "accuracy": accuracy,
        "dense_accuracy": 0.95, "gmacs": point, "dense_gmacs": 1.0, "speedup": 1 / point,
        "kept": [0.5, 0.2], "left": [1, 2, 3],
    } | more  # fmt: skip


ROWS = [
    record(policy, seed, point, accuracy + seed / 100, **knob)
    for policy, accuracy, knob in (("a", 0.8, {}), ("mappo", 0.9, {"budget": 0.1}))
    for seed in (0, 1)
    for point in (0.5, 0.3)
]


def test_records_are_grouped_ours_first():
    groups = grouped(ROWS)
    assert list(groups) == ["mappo", "a"]
    assert list(groups["a"]) == [0.3, 0.5]
    assert [row["seed"] for row in groups["a"][0.3]] == [0, 1]


def test_a_line_goes_through_the_means():
    axes = Figure().subplots()
    points = grouped([*ROWS, record("a", 0, 0.7, 0.9, speedup=None)])["a"]
    draw_line(axes, points, lambda row: row["speedup"], lambda row: row["accuracy"])
    (line,) = axes.lines
    assert line.get_xdata().tolist() == pytest.approx([1 / 0.3, 2.0])  # what was not timed is out
    assert line.get_ydata().tolist() == pytest.approx([0.805, 0.805])


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (ROWS, ["tradeoff.png", "adaptive.png", "knob.png"]),
        (ROWS[:4], ["tradeoff.png", "adaptive.png"]),
    ],
)
def test_what_the_records_show_is_drawn(tmp_path, rows, names):
    Records(tmp_path, "digits").add(rows)
    paths = draw(tmp_path)
    assert [path.name for path in paths] == names
    for path in paths:
        with Image.open(path) as picture:
            assert len(picture.convert("L").getcolors(256)) > 20


def test_folders_without_records_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no records.jsonl: python -m benchmarks.compare"):
        main([str(tmp_path)])
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(SystemExit, match="is empty"):
        main([str(tmp_path)])
