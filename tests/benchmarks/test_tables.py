"""The tables of figures in README.md and docs are what the committed records say."""

import json

import pandas as pd
import pytest

from prunevit.benchmarks import tables
from prunevit.benchmarks.compare import one_image_table, table
from prunevit.benchmarks.records import FILE, read
from prunevit.benchmarks.tables import TABLES, comparison, main, refresh

UPPER_BOUNDS = {"oracle", "oracle-no-labels"}  # judged on few images
PAGE = "Before.\n<!-- table: a -->\n{}<!-- end -->\nAfter.\n"


@pytest.mark.skipif(not tables.RESULTS.is_dir(), reason="needs the checkout")
def test_no_table_is_stale():
    main(["--check"])


@pytest.mark.skipif(not tables.RESULTS.is_dir(), reason="needs the checkout")
def test_each_table_and_each_method_is_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in tables.pages())
    assert all(f"<!-- table: {name} -->" in text for name in TABLES)
    for folder, titles in (
        ("digits/compare", {*tables.DIGITS, *tables.NARROW, "dense"}),
        ("digits/parts", {*tables.PARTS, *tables.IDEAS, *tables.BENCHMARL, "dense"}),
        ("digits/fine-tuning", (*tables.FINE_TUNING, "dense")),
        ("cifar10/compare", (*tables.CIFAR10, "dense")),
    ):
        methods = {row["method"] for row in read(tables.RESULTS / folder / FILE)}
        assert methods - UPPER_BOUNDS == set(titles)


def record(point, accuracy, speedup=None, method="m", seed=0):
    return {
        "method": method, "seed": seed, "point": point, "accuracy": accuracy, "speedup": speedup
    }  # fmt: skip


def cells(rows, **options):
    """The cells of a table, line by line."""
    lines = table([("M", pd.DataFrame(rows))], **options).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_one_seed_has_its_speed_in_the_same_cell():
    rows = [record(0.3, 0.9, 2.0), record(0.5, 0.95), record(0.7, 0.95, 1.5)]
    assert cells(rows)[2] == ["M", "90.00, 2.00x", "95.00", "95.00, 1.50x"]
    assert cells(rows, with_speeds=False)[2] == ["M", "90.00", "95.00", "95.00"]
    rows[0]["speedup_same_kernels"] = 1.8
    assert cells(rows)[2] == ["M", "90.00, 2.00x (1.80x)", "95.00", "95.00, 1.50x"]


def test_seeds_have_means_and_their_speeds_a_row():
    rows = [record(0.3, accuracy, accuracy, seed=i) for i, accuracy in enumerate((0.5, 0.9))]
    header, _, accuracies, speeds = cells([*rows, record(0.5, 0.9, 2.0)])
    assert header == ["method", "at 30% of dense GMACs", "at 50%"]
    assert accuracies == ["M", "70.00 [-184.12, 324.12]", "90.00, 1 seeds"]
    assert speeds == ["", "0.70x [-1.84, 3.24]", "2.00x"]


def test_speeds_image_by_image_have_a_table_of_their_own():
    timed = record(0.3, 0.9, 2.0) | {
        "speedup_one_image": 1.5, "speedup_same_kernels_one_image": 1.25
    }  # fmt: skip
    untimed = pd.DataFrame([record(0.3, 0.9)])
    methods = [("M", pd.DataFrame([timed, record(0.5, 0.9)])), ("N", untimed)]
    lines = one_image_table(methods).splitlines()
    assert lines[0] == "| image by image | at 30% | at 50% |"
    assert lines[2:] == ["| M | 1.50x (1.25x) | |"]
    assert one_image_table([("N", untimed)]) == ""


def test_what_is_not_at_its_point_stands_under_no_column():
    reached = record(0.3, 0.9) | {"matched": True}
    # the nearest to the last two is the same
    missed = [
        record(point, accuracy) | {"matched": False, "gmacs": gmacs, "dense_gmacs": 0.1}
        for point, accuracy, gmacs in ((0.5, 0.95, 0.062), (0.7, 0.97, 0.085), (0.9, 0.97, 0.085))
    ]
    lines = table([("M", pd.DataFrame([reached, *missed]))]).splitlines()
    assert lines[2] == "| M | 90.00 | not reached | not reached | not reached |"
    assert lines[3:] == ["", "M, at points of its own: 95.00 at 62.0%, 97.00 at 85.0%"]


def test_points_that_another_method_was_judged_at_are_gaps():
    methods = [(name, pd.DataFrame([record(point, 0.9)])) for name, point in (("A", 1), ("B", 0.5))]
    assert table(methods).splitlines()[2:] == ["| A | | 90.00 |", "| B | 90.00 | |"]


def test_a_comparison_reads_the_records_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(
        tables,
        "read",
        lambda path: [record(point, 0.9, method=path.parent.name) for point in (0.3, 0.5)],
    )
    assert comparison("tome", ["tome"], points=[0.3]).splitlines() == [
        "| method | at 30% of dense GMACs |",
        "|---|---|",
        "| ToMe: token merging (`tome`) | 90.00 |",
    ]


def test_a_stale_table_is_written_anew():
    fresh = {"a": lambda: "| 2 |"}
    assert refresh(PAGE.format("| 1 |\n"), fresh) == (PAGE.format("| 2 |\n"), ["a"])
    assert refresh(PAGE.format("| 2 |\n"), fresh) == (PAGE.format("| 2 |\n"), [])


def test_wrong_marks_are_refused():
    with pytest.raises(ValueError, match="unknown table 'a': there are b"):
        refresh(PAGE.format(""), {"b": lambda: ""})
    with pytest.raises(ValueError, match="has no <!-- end -->"):
        refresh("<!-- table: a -->\n", {"a": lambda: ""})


def test_the_check_names_what_is_stale_and_writes_nothing(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text(PAGE.format("old\n").replace("table: a", "table: marl"))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    before = page.read_text()
    with pytest.raises(SystemExit, match=r"stale tables.*README.md: marl"):
        main(["--check"])
    assert page.read_text() == before
    main([])
    assert "**our MAPPO**" in page.read_text()
    main(["--check"])
    assert "all tables are as the records say" in capsys.readouterr().out


def timed(runtime, kind, threads, speedup, own=1.0):
    gmacs = {"dense": 4.0, "pruned": 1.6}[kind]
    return {
        "variant": f"{runtime} {kind}", "model": "vit", "hardware": "a CPU", "batch_size": 1,
        "threads": threads, "images_per_second": 10.0 * speedup, "speedup": speedup,
        "speedup_own": own, "gmacs": gmacs, "accuracy": 0.8 if kind == "dense" else 0.79,
    }  # fmt: skip


def test_runtimes_of_a_file_have_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.runtimes() == tables.UNMEASURED
    records = [
        timed(runtime, kind, threads, speedup * threads, own)
        for threads in (1, 2)
        for runtime, kind, speedup, own in (
            ("pytorch", "dense", 1.0, 1.0), ("pytorch", "pruned", 1.7, 1.7),
            ("int8", "dense", 2.0, 1.0), ("int8", "pruned", 4.2, 2.1),
            ("openvino", "dense", 1.4, 1.0),
        )
    ]  # fmt: skip
    (tmp_path / "runtimes").mkdir()
    for name in ("a", "b"):
        (tmp_path / "runtimes" / f"{name}.json").write_text(json.dumps(records))
    first, _, *rest = tables.runtimes().split("\n")
    assert first == "vit, pruned to 40% of the GMACs, which promise 2.50x. On a CPU:"
    assert rest[:7] == [
        "| runtime | accuracy | batch 1, 1 thread | batch 1, 2 threads |",
        "|---|---|---|---|",
        "| PyTorch, dense | 80.00% | 10.0 images/s | 20.0 images/s |",
        "| PyTorch, pruned | 79.00% | 1.70x (1.70x) | 3.40x (1.70x) |",
        "| ONNX Runtime, int8, dense | 80.00% | 2.00x | 4.00x |",
        "| ONNX Runtime, int8, pruned | 79.00% | 4.20x (2.10x) | 8.40x (2.10x) |",
        "| OpenVINO, dense | 80.00% | 1.40x | 2.80x |",
    ]
    assert rest[7:9] == ["", first]


def test_gpus_have_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.gpus() == tables.UNMEASURED
    speedups = {"dense": 1.0, "dense, compiled": 1.1, "packed": 1.5, "padded": 1.2, "tome": 1.4}
    variants = {
        name: {"images_per_second": 2_000 * faster, "speedup": faster, "efficiency": faster / 1.6}
        for name, faster in speedups.items()
    }
    report = {
        "machine": {"hardware": "a GPU", "versions": {"torch": "2.11"}},
        "host waits": {"result": {"waits": 3}, "seconds": 1.0},
        "ViT float32 batch 1": {"result": {"variants": variants}, "seconds": 1.0},
        "ViT float32 batch 32": {"error": "OutOfMemoryError"},
        "ViT float32 batch 256": {"left_out": "no time was left"},
    }
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "a.json").write_text(json.dumps(report))
    title, _, _, _, *lines = tables.gpus().split("\n")
    assert title == "On a GPU, torch 2.11:"
    assert lines == [
        "| ViT float32 batch 1 | 2,000 images/s | 1.10x | 1.50x (efficiency 0.94) | 1.20x | 1.40x |"
    ]


def test_servers_have_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.serving() == tables.UNMEASURED
    record = {
        "model": "int8", "clients": 16, "answered": 500, "images_per_second": 30.04, "p50": 0.5124,
        "p95": 0.9,
    }  # fmt: skip
    (tmp_path / "serving.json").write_text(json.dumps([record]))
    assert tables.serving().split("\n")[2] == "| int8 | 16 | 500 | 30.0 | 512 | 900 |"
