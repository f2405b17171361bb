"""Figures are drawn from the records alone, and show what these say."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from prunevit.benchmarks.artifacts import read_pictures, thin_curve, write_pictures
from prunevit.benchmarks.figures import (
    draw,
    draw_curves,
    draw_line,
    draw_pruned,
    draw_tradeoff,
    in_percent,
    main,
    methods_of,
)
from prunevit.benchmarks.records import FIELDS, Records


def record(method, seed, point, accuracy, **more):
    row = dict.fromkeys(FIELDS, 0)
    return row | {
        "task": "digits", "method": method, "seed": seed, "point": point, "accuracy": accuracy,
        "dense_accuracy": 0.95, "gmacs": point, "dense_gmacs": 1.0, "speedup": 1 / point,
        "kept": [0.5, 0.2], "left": [1, 2, 3],
    } | more  # fmt: skip


ROWS = [
    record(method, seed, point, accuracy + seed / 100, **knob)
    for method, accuracy, knob in (("a", 0.8, {}), ("mappo", 0.9, {"alpha": 0.1}))
    for seed in (0, 1)
    for point in (0.5, 0.3)
]


def test_ours_comes_first():
    assert methods_of([row["method"] for row in ROWS]) == ["mappo", "a"]


def test_a_line_goes_through_the_means():
    axes = Figure().subplots()
    rows = [row for row in ROWS if row["method"] == "a"] + [record("a", 0, 0.7, 0.9, speedup=None)]
    draw_line(axes, in_percent(rows), "speedup", "percent")
    (line,) = axes.lines
    assert line.get_xdata() == pytest.approx([1 / 0.3, 2.0])  # what was not timed is out
    assert line.get_ydata() == pytest.approx([80.5, 80.5])


def put(folder, rows):
    records = Records(folder / "records.jsonl")
    for row in rows:
        records.put(row)


def more(*names):
    return [record(name, 0, 0.3, 0.9, alpha=0.2) for name in names]


CURVE = {"method": "mappo", "iteration": [1.5, 3.5], "accuracy": [0.8, 0.9], "keep_ratio": [1, 0.5]}
PICTURES = {
    "images": np.arange(2 * 4 * 8 * 3, dtype=np.uint8).reshape(2, 4, 8, 3),
    "labels": np.array(["three", "seven"]),
    "grid": np.array([2, 4]),
    "alive attention": np.ones((2, 2, 8), bool),
    "alive mappo": np.zeros((2, 1, 8), bool),
}


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (ROWS, ["tradeoff.png", "knob.png", "adaptive.png"]),
        (ROWS[:4], ["tradeoff.png", "adaptive.png"]),
        ([*ROWS, *more("no-stage")], ["tradeoff.png", "ablations.png", "knob.png", "adaptive.png"]),
        (more("no-stage"), ["ablations.png"]),
        (more("benchmarl-qmix"), ["libraries.png"]),
        (
            [*ROWS, *more("mappo-fine-tuned")],
            ["tradeoff.png", "fine_tuning.png", "knob.png", "adaptive.png"],
        ),
        (
            [*ROWS[:4], CURVE, PICTURES],
            ["tradeoff.png", "adaptive.png", "pruned.png", "curves.png"],
        ),
    ],
)
def test_what_the_records_show_is_drawn(tmp_path, rows, names):
    if rows[-1] is PICTURES:
        rows = rows[:-2]
        write_pictures(tmp_path, PICTURES)
        lines = [json.dumps(CURVE | {"seed": seed}) + "\n" for seed in (0, 1)]
        (tmp_path / "curves.jsonl").write_text("".join(lines))
    put(tmp_path, rows)
    figures = draw(tmp_path)
    assert list(figures) == names
    for figure in figures.values():
        assert any(axes.has_data() for axes in figure.axes)


def lines_of(figure):
    """The lines of a figure's first panel by their label."""
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_fine_tuned_methods_are_dashed_and_ours_is_black():
    lines = lines_of(draw_tradeoff(in_percent([*ROWS, *more("mappo-fine-tuned")])))
    styles = {name: (line.get_linestyle(), line.get_color()) for name, line in lines.items()}
    assert styles["mappo"] == ("-", "black")
    assert styles["mappo-fine-tuned"][0] == "--"
    assert len({color for _, color in styles.values()}) == 4


def test_methods_judged_on_fewer_images_are_left_out(tmp_path):
    bound = record("oracle", 0, 0.3, 1.0, dense_accuracy=0.5, left=[0, 1, 0])
    put(tmp_path, [bound, *ROWS])
    lines = lines_of(draw(tmp_path)["tradeoff.png"])
    assert set(lines) == {"mappo", "a", "dense"}
    assert lines["dense"].get_ydata()[0] == pytest.approx(95)


def test_a_curve_is_the_mean_of_what_seeds_share():
    """Of trainings with other iterations, as far as the shorter goes."""
    curves = [
        {"method": "a", "seed": 0, "iteration": [1, 2, 3, 4], "accuracy": [0.0, 0.2, 0.4, 0.6]},
        {"method": "a", "seed": 1, "iteration": [1, 3], "accuracy": [0.2, 0.8]},
    ]
    line = lines_of(draw_curves(curves))["a"]
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata().tolist() == pytest.approx([0.1, 0.35, 0.6])


def test_pruned_images_say_what_is_left():
    figure = draw_pruned(PICTURES)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "mappo\nthree: 8 0", "attention\nthree: 8 8 8", "seven: 8 0", "seven: 8 8 8"
    ]  # fmt: skip
    assert all(len(axes.images) == 1 for axes in figure.axes)


def test_pictures_come_back_and_damaged_ones_are_named(tmp_path):
    write_pictures(tmp_path, PICTURES)
    again = read_pictures(tmp_path)
    assert again.keys() == PICTURES.keys()
    assert all(np.array_equal(again[name], PICTURES[name]) for name in PICTURES)
    file = tmp_path / "pictures.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"pictures.npz is damaged: remove it"):
        read_pictures(tmp_path)


def test_long_trainings_are_thinned(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"iteration": i + 1, "accuracy": i / 1_000, "lr": 1} for i in range(1_000)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = thin_curve(metrics)
    assert set(curve) == {"iteration", "accuracy"}
    assert len(curve["iteration"]) == 100
    assert curve["iteration"][0] == 5.5
    assert curve["accuracy"][-1] == pytest.approx(0.9945, abs=1e-3)


def test_folders_without_records_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no records: python -m benchmarks.compare"):
        main([str(tmp_path)])
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(SystemExit, match="holds no records"):
        main([str(tmp_path)])
