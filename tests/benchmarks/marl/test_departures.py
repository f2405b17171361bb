"""Changes of the defaults for PettingZoo games are trained alike and written down."""

import pytest
import torch

from prunevit.benchmarks.marl import departures
from prunevit.benchmarks.marl.departures import CHANGES, TASKS, DeparturesConfig, main, settings
from prunevit.benchmarks.records import FILE, read
from prunevit.trainers.common.config import defaults_for


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("task", TASKS)
def test_a_change_is_all_that_differs(task):
    config = DeparturesConfig(iterations=7, episodes=9)
    none = settings(config, task, "none", 3)
    assert (none.iterations, none.eval_size, none.seed) == (7, 9, 3)
    default = defaults_for(none.env)
    own = {"iterations", "eval_size", "seed", "device", "env_kwargs"}
    for name, value in vars(default).items():
        assert getattr(none, name) == value or name in own, name
    for name, changes in CHANGES.items():
        assert vars(settings(config, task, name, 3)) == vars(none) | changes


def test_it_goes_on_after_the_last_training(walk, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        departures, "TASKS", {"walk": (walk.removeprefix("pettingzoo:"), {"max_cycles": 5})}
    )
    monkeypatch.setattr(departures, "CHANGES", {"none": {}, "15-epochs": {"epochs": 15}})
    tiny = {"num_envs": 2, "rollout_steps": 5, "hidden": (4,), "critic_hidden": (4,)}
    monkeypatch.setattr(
        departures, "defaults_for", lambda env: departures.replace(defaults_for(env), **tiny)
    )
    common = ["--tasks", "walk", "--iterations", "2", "--episodes", "2", "--out", str(tmp_path)]
    main([*common, "--seeds", "1", "--changes", "none"])
    (first,) = read(tmp_path / FILE, departures.FIELDS)
    main([*common, "--seeds", "2", "--changes", "none", "15-epochs"])
    rows = read(tmp_path / FILE, departures.FIELDS)
    assert rows[0] == first
    keys = [(row["change"], row["seed"]) for row in rows]
    assert keys == [("none", 0), ("15-epochs", 0), ("none", 1), ("15-epochs", 1)]
    assert len({row["greedy"] for row in rows}) > 2
    assert "| walk | 15-epochs | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "chess"], "unknown tasks chess: there are simple_spread, "),
        (["--changes", "better"], "unknown changes better: there are none, "),
    ],
)
def test_unknown_names_are_told_what_exists(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main([*arguments, "--out", str(tmp_path)])
