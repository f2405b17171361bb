"""Finished runs are summarised from their reports."""

import json
import sys
from importlib import import_module

import pytest

from prunevit.benchmarks.summary import main


@pytest.fixture
def make_run(tmp_path):
    def make(name, seed, alpha, accuracy):
        def policy(accuracy, gmacs, speed):
            return {"accuracy": accuracy, "gmacs": gmacs, "images_per_second": speed}

        policies = {
            "dense": policy(0.95, 0.08, 100.0),
            "learned": policy(accuracy, 0.02, 250.0),
            "random": policy(0.80, 0.02, 250.0),
            "attention": policy(0.90, 0.02, 250.0),
        }
        folder = tmp_path / name
        folder.mkdir()
        settings = {"seed": seed, "alpha": alpha, "run_name": name}
        (folder / "config.json").write_text(json.dumps(settings))
        report = {"policies": policies, "seconds": 60.0}
        (folder / "report.json").write_text(json.dumps(report))
        return str(folder)

    return make


def test_runs_that_differ_in_the_seed_alone_share_a_row(make_run, monkeypatch, capsys):
    runs = [
        make_run("first", 0, 0.1, 0.93),
        make_run("other", 0, 0.2, 0.92),
        make_run("second", 1, 0.1, 0.94),
    ]
    monkeypatch.setattr(sys, "argv", ["summary", *runs])
    main()
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| run | seeds | loss | GMACs, % of dense | speed-up |")
    first, other = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)
    assert first[:5] == ["first", "2", "1.50 ± 0.71", "25.00 ± 0.00", "2.50 ± 0.00"]
    assert other[:3] == ["other", "1", "3.00 ± 0.00"]


def test_what_is_no_finished_run_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["summary", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no finished run"):
        main()


def test_what_trains_can_also_summarise(monkeypatch):
    """The README's table of runs needs no extra but that of training."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.delitem(sys.modules, "prunevit.benchmarks.summary")
    import_module("prunevit.benchmarks.summary")
