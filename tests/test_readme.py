"""Tables of policies in docs/benchmarks.md say what the records say, and leave no policy out."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

from prunevit.benchmarks.records import interval, read

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS = ("digits/compare", "digits/two-minutes", "cifar10/compare")
# who knows the answers is judged on few images: the text has what it reaches
BOUNDS = {"oracle", "oracle-no-labels"}

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="needs the checkout")

NUMBER = r"\d+\.\d\d"
FIGURE = re.compile(rf"({NUMBER})(x?)(?: \[({NUMBER}), ({NUMBER})\])?")


def tables():
    """``(header, rows)`` of the page's tables whose columns are operating points, as cells; the
    speeds that have a row of their own beneath the accuracies' stand in these cells.
    """
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        header, _, *rows = (
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in block.splitlines()
        )
        if not re.fullmatch(r"(at )?\d+%( of dense GMACs)?", header[1]):
            continue
        whole = []
        for row in rows:
            if row[0]:
                whole.append(row)
            else:
                above = whole[-1]
                pairs = zip(above[1:], row[1:], strict=True)
                whole[-1] = above[:1] + [", ".join(pair) for pair in pairs]
        found.append((header, whole))
    return found


def points_of(header, row):
    """A row's cells by operating point; none where the point is not reached."""
    cells = {}
    for title, cell in zip(header[1:], row[1:], strict=True):
        percent = re.match(r"(?:at )?(\d+)%", title)
        if percent is None or cell == "not reached":
            continue
        same = re.fullmatch(r"as at (\d+)%", cell)
        cells[int(percent[1])] = cells[int(same[1])] if same else cell
    return cells


def recorded():
    """``{(folder, policy, seeds): {percent: (accuracies, speeds)}}``, all seeds and each alone."""
    groups = defaultdict(lambda: defaultdict(lambda: ([], [])))
    for folder in FOLDERS:
        for row in read(RESULTS / folder / "records.jsonl"):
            for seeds in ("all", row["seed"]):
                values = groups[folder, row["policy"], seeds][round(100 * row["point"])]
                values[0].append(100 * row["accuracy"])
                if row["speedup"] is not None:
                    values[1].append(row["speedup"])
    return groups


def says(cell, accuracies, speeds):
    """Whether the cell has this accuracy, and this speed if it has one."""
    figures = {figure[2]: figure.groups() for figure in FIGURE.finditer(cell)}
    return (
        "" in figures
        and is_of(figures[""], accuracies)
        and ("x" not in figures or is_of(figures["x"], speeds))
    )


def is_of(figure, values):
    """Whether mean and interval are these values'; the interval may differ by what another version
    of scipy draws.
    """
    mean, _, low, high = figure
    if not values or mean != f"{sum(values) / len(values):.2f}":
        return False
    if low is None:
        return len(set(values)) == 1
    return (float(low), float(high)) == pytest.approx(interval(values), abs=0.02)


def agree(cells, points):
    return cells.keys() == points.keys() and all(
        says(cell, *points[percent]) for percent, cell in cells.items()
    )


ROWS = [
    pytest.param(points_of(header, row), id=f"{number}: {row[0]}")
    for number, (header, rows) in enumerate(tables() if PAGE.is_file() else [])
    for row in rows
]


@pytest.mark.parametrize("cells", ROWS)
def test_each_row_has_records(cells):
    assert any(agree(cells, points) for points in recorded().values())


def test_each_policy_has_a_row():
    rows = [param.values[0] for param in ROWS]
    missing = {
        key
        for key, points in recorded().items()
        if key[2] == "all" and key[1] not in BOUNDS
        if not any(agree(cells, points) for cells in rows)
    }
    assert not missing
