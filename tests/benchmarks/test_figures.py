"""Figures are drawn from the records alone, and show what these say."""

import pytest
from matplotlib.figure import Figure

from prunevit.benchmarks.figures import (
    draw,
    draw_line,
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
    ],
)
def test_what_the_records_show_is_drawn(tmp_path, rows, names):
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


def test_folders_without_records_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no records: python -m benchmarks.compare"):
        main([str(tmp_path)])
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(SystemExit, match="holds no records"):
        main([str(tmp_path)])
