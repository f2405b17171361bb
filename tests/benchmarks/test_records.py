"""Records survive what interrupts their writing, and old ones are still read."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from prunevit import __version__
from prunevit.benchmarks import records as provenance
from prunevit.benchmarks.markdown import mean_and_deviation, mean_and_interval
from prunevit.benchmarks.records import (
    FIELDS,
    Records,
    differences,
    pack_answers,
    read,
    unpack_answers,
)

OLD = Path(__file__).parent / "data" / "records_0.1.jsonl"


def record(method="a", seed=0, point=0.4, accuracy=0.9, **more):
    row = dict.fromkeys(FIELDS, 0)
    return row | {
        "task": "digits", "method": method, "seed": seed, "point": point, "accuracy": accuracy,
        "dense_accuracy": 0.95, "gmacs": 0.4, "dense_gmacs": 1.0, "speedup": None, "left": [0, 9],
    } | more  # fmt: skip


@pytest.fixture
def file(tmp_path):
    return tmp_path / "new" / "records.jsonl"


def put(file, *rows):
    records = Records(file)
    for row in rows:
        records.put(row)
    return records


def test_records_come_back(file):
    put(file, record(seed=0), record(seed=1))
    put(file, record("b"))
    again = Records(file)
    assert again.rows == [record(seed=0), record(seed=1), record("b")]
    assert again.find("a", 1, 0.4) == record(seed=1)
    for other in (("a", 2, 0.4), ("b", 1, 0.4), ("a", 1, 0.5)):
        assert again.find(*other) is None


def test_a_record_takes_the_place_of_the_one_with_its_key(file):
    records = put(file, record(), record("b"), record(accuracy=0.5))
    assert records.rows == read(file) == [record("b"), record(accuracy=0.5)]


def test_two_processes_lose_none_of_each_others_records(file):
    first, second = put(file, record()), Records(file)
    second.put(record("b"))
    first.put(record("c"))
    first.rows[0]["speedup"] = 2.0
    first.save()
    second.put(record("d"))
    assert {row["method"] for row in read(file)} == {"a", "b", "c", "d"}
    assert [row["method"] for row in second.rows] == [row["method"] for row in read(file)]


@pytest.mark.parametrize("cut", [1, 20, 5_000])
def test_a_line_that_was_cut_off_is_measured_again(file, cut):
    put(file, *[record(seed=seed) for seed in range(3)])
    text = file.read_text()
    file.write_text(text[:-cut])
    whole = text[:-cut].count("\n")
    put(file, record(seed=9))
    assert [row["seed"] for row in read(file)] == [*range(whole), 9]


def test_records_of_before_are_read_with_a_warning(capsys):
    rows = read(OLD)
    assert [(row["task"], row["method"]) for row in rows] == [("digits", "mappo")] * 2
    assert rows[0]["alpha"] == json.loads(OLD.read_text().splitlines()[0])["budget"]
    warned = capsys.readouterr().err
    assert warned.endswith("has fields of a version before 0.2: budget, game, policy\n")
    assert warned.count("\n") == 1


def test_records_of_other_settings_are_refused(file):
    records = put(file, record(settings={"size": 1, "kind": "a"}), record("of the first"))
    records.require({"size": 1, "kind": "a"})
    with pytest.raises(ValueError, match=r"other settings \(kind a for b, size 1 for 2\): give"):
        records.require({"size": 2, "kind": "b"})
    with pytest.raises(ValueError, match=r"\(task digits for cifar10\)"):
        records.require({"task": "cifar10"}, lambda row: {"task": row["task"]})
    assert differences({"a": 1}, {"b": 2}) == "a 1 for None, b None for 2"


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 2 is no record"), ("{}", "line 2 lacks accuracy"), ("7", "2")]
)
def test_what_is_no_record_is_named(tmp_path, line, message):
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(record()) + "\n" + line + "\n" + json.dumps(record()) + "\n")
    with pytest.raises(ValueError, match=message):
        read(file)


def test_a_file_that_is_no_text_is_named(file):
    file.parent.mkdir()
    file.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"records.jsonl holds no records: .*codec"):
        Records(file)


def test_cells_tell_mean_and_spread():
    # 2.5 -+ 3.182 (t, 3 degrees of freedom) * 1.291 / 2
    assert mean_and_interval([1.0, 2.0, 3.0, 4.0], unit="x") == "2.50x [0.45, 4.55]"
    assert mean_and_interval([2.1, 2.1, 2.1]) == mean_and_interval([2.1]) == "2.10"
    assert mean_and_deviation([1.0, 3.0], unit="%") == "2.00 ± 1.41%"


def test_answers_are_packed_and_unpacked():
    right = np.random.default_rng(4).random(5_003) < 0.9
    packed = pack_answers(right)
    assert len(packed) < 840
    assert (unpack_answers(packed, 5_003) == right).all()
    with pytest.raises(ValueError, match="5008 bits are not the answers to 5009 images"):
        unpack_answers(packed, 5_009)


# --- where records come from ---


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository in place of this one: ``repository(path, text)`` changes a file, and
    ``repository()`` commits what was changed.
    """

    def git(*arguments):
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def change(path=None, text=""):
        provenance.commit.cache_clear()
        if path is None:
            git("add", ".")
            git("commit", "-qm", "a change")
            return
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    git("init", "-q")
    for folder in ("envs", "agents", "trainers", "benchmarks", "prunevit"):
        change(f"{folder}/a.py", "1")
    change()
    yield change
    provenance.commit.cache_clear()


def test_the_commit_is_that_of_the_source_code(repository):
    first = provenance.commit()
    assert re.fullmatch("[0-9a-f]{7,}", first)
    for path in ("README.md", "tests/a.py", "benchmarks/results/digits/records.jsonl"):
        repository(path, "records of this commit")
        assert provenance.commit() == first
        repository()
        assert provenance.commit() == first
    repository("envs/a.py", "2")
    changed = provenance.commit()
    assert re.fullmatch(f"{first}[+][0-9a-f]{{8}}", changed)
    repository("envs/a.py", "3")
    assert provenance.commit() not in (first, changed)
    changed = provenance.commit()
    for content in "12":  # a file that git doesn't know
        repository("envs/b.py", content)
        assert provenance.commit() != changed
        changed = provenance.commit()
    repository()
    assert provenance.commit() not in (first, changed)
    assert "+" not in provenance.commit()


def test_without_git_it_is_the_version(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    provenance.commit.cache_clear()
    assert provenance.commit() == f"prunevit {__version__}"
    provenance.commit.cache_clear()
