"""Figures are drawn from the records alone, and show what these say."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from prunevit.benchmarks.figures import (
    LABEL_STEP,
    draw,
    draw_line,
    label_lines,
    load,
    main,
    style_of,
)
from prunevit.benchmarks.records import FIELDS, Records, pack_answers


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


@pytest.fixture
def loaded(tmp_path):
    """What is shown of records."""

    def write_and_load(rows):
        records = Records(tmp_path / "records.jsonl")
        for row in rows:
            records.put(row)
        return load(tmp_path)

    return write_and_load


def lines_of(figure):
    """The lines of a figure's first panel by their label."""
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_a_line_goes_through_the_means(loaded):
    axes = Figure().subplots()
    rows = [row for row in ROWS if row["method"] == "a"] + [record("a", 0, 0.7, 0.9, speedup=None)]
    draw_line(axes, loaded(rows), "speedup", "percent")
    (line,) = axes.lines
    assert line.get_xdata() == pytest.approx([1 / 0.3, 2.0])  # what was not timed is out
    assert line.get_ydata() == pytest.approx([80.5, 80.5])


def test_records_without_answers_have_no_panel_of_differences(loaded):
    assert len(draw(loaded(ROWS)).axes) == 2


def answers(share):
    return {"right": pack_answers([i < share for i in range(100)]), "images": 100, "left": [100]}


def test_differences_to_ours_have_a_panel_where_answers_are_known(loaded):
    """Ours is right about 90 of 100 images, the other method about 80 of them."""
    rows = [record("dense", 0, 1.0, 0.95, speedup=None, **answers(95))]
    rows += [
        record(method, seed, point, right / 100, **answers(right))
        for method, right in (("mappo", 90), ("a", 80))
        for seed in (0, 1)
        for point in (0.5, 0.3)
    ]
    figure = draw(loaded(rows))
    assert len(figure.axes) == 3
    line, zero, *_ = figure.axes[-1].lines
    assert line.get_label() == "a"
    assert line.get_xdata() == pytest.approx([30, 50])
    assert line.get_ydata() == pytest.approx([-10, -10])
    assert set(zero.get_ydata()) == {0}
    above, gaps = figure.axes[0].get_subplotspec(), figure.axes[-1].get_subplotspec()
    assert (above.rowspan.start, gaps.rowspan.start) == (0, 1)
    assert len(gaps.colspan) == 2  # as wide as both above
    assert figure.get_figwidth() < 9  # inches: a page's width makes small print of more
    assert lines_of(figure).keys() == {"mappo", "a", "dense"}
    assert lines_of(figure)["dense"].get_linestyle() == ":"


def test_ours_comes_first_and_is_black(loaded):
    figure = draw(loaded(ROWS))
    lines = lines_of(figure)
    assert list(lines) == ["mappo", "a", "dense"]
    assert lines["mappo"].get_color() == "black"
    assert lines["a"].get_color() != "black"
    assert lines["dense"].get_ydata()[0] == pytest.approx(95)
    assert len(figure.axes) == 2


def test_labels_stand_in_the_order_of_their_lines_and_apart():
    axes = Figure().subplots()
    axes.set_ylim(0, 10)
    values = {"a": 5.0, "b": 5.1, "c": 5.1, "d": 1.0, "e": -40.0, "mappo": 4.9}
    label_lines(axes, {name: (y, style_of(name)) for name, y in values.items()})
    places = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert sorted(places, key=places.get) == ["e", "d", "ours (mappo)", "a", "b", "c"]
    assert np.diff(sorted(places.values())).min() >= 0.999 * LABEL_STEP
    assert places["d"] == pytest.approx(0.1)  # at its line, where nothing is near


def test_a_label_stands_behind_the_marker_of_its_line():
    axes = Figure().subplots()
    names = ("attention", "ats", "evit")
    label_lines(axes, {name: (0.5, style_of(name)) for name in names})
    markers = {line.get_ydata()[1]: line.get_marker() for line in axes.lines}
    shown = {text.get_text(): markers[text.get_position()[1]] for text in axes.texts}
    assert shown == {name: style_of(name)["marker"] for name in names}


def test_no_two_methods_of_a_figure_look_alike():
    rivals = {
        "dynamic-vit", "dynamic-vit-merge", "ltmp", "tome", "pitome", "attention",
        "attention-merge", "ats", "evit", "random", "norm",
    }  # fmt: skip
    assert len({tuple(style_of(name).items()) for name in rivals}) == len(rivals)


def test_speed_is_shown_where_it_was_measured(loaded):
    rows = [row | {"speedup": None} for row in ROWS]
    assert len(draw(loaded(rows)).axes) == 1


@pytest.mark.parametrize(
    "other",
    [
        record("no-stage", 0, 0.3, 0.9),
        record("benchmarl-qmix", 0, 0.3, 0.9),
        record("mappo-fine-tuned", 0, 0.3, 0.9, fine_tuned=True),
        record("oracle", 0, 0.3, 1.0, dense_accuracy=0.5, left=[0, 1, 0]),  # on fewer images
    ],
)
def test_what_is_no_rival_is_left_out(loaded, other):
    assert set(loaded([other, *ROWS])["method"]) == {"mappo", "a"}


def test_the_command_writes_a_figure(tmp_path, capsys):
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    main([str(tmp_path)])
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{tmp_path / 'tradeoff.png'}\n"


def test_records_that_are_not_shown_alone_are_refused(loaded):
    with pytest.raises(ValueError, match="no records of methods that are shown"):
        loaded([record("no-stage", 0, 0.3, 0.9)])


def test_folders_without_records_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no records: python -m benchmarks.compare"):
        main([str(tmp_path)])
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(SystemExit, match="holds no records"):
        main([str(tmp_path)])
