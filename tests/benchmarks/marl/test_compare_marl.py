"""Ours and its peers learn the same games under the same conditions, and are judged alike."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch

from prunevit.benchmarks.marl import compare, protocol
from prunevit.benchmarks.marl.compare import METHODS, MarlCompareConfig, draw, main, table
from prunevit.benchmarks.marl.protocol import (
    EVALUATION_SEED,
    SHARED,
    TASKS,
    Curve,
    configuration,
    mean_return,
)
from prunevit.benchmarks.records import origin
from prunevit.cli import prog

pytestmark = [
    pytest.mark.integration("marl-peers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
TINY = {"num_envs": 2, "rollout_steps": 8, "hidden": (8, 4), "epochs": 1, "minibatches": 2}
AGENTS, SEEN, ACTIONS = 3, 18, 5  # of simple_spread


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def leftwards(observation):
    """Always action 1."""
    return (
        torch.nn.functional.one_hot(torch.ones(len(observation), dtype=torch.long), ACTIONS) * 9.0
    )


@pytest.fixture
def tiny(monkeypatch):
    for name, value in TINY.items():
        monkeypatch.setitem(SHARED, name, value)


# --- the judge ---


def test_greedy_returns_are_those_of_the_raw_game():
    from mpe2 import simple_spread_v3

    env = simple_spread_v3.parallel_env()
    returns = []
    for episode in range(2):
        env.reset(seed=EVALUATION_SEED + episode)
        rewards = []
        while env.agents:
            rewards.append(list(env.step(dict.fromkeys(env.agents, 1))[1].values()))
        assert len(rewards) == 25
        returns.append(np.sum(rewards, 0).mean())
    assert mean_return("simple_spread", leftwards, 2, greedy=True) == pytest.approx(
        np.mean(returns)
    )


def test_drawn_actions_follow_the_policy_and_repeat():
    drawn = [mean_return("simple_spread", lambda o: leftwards(o) * 9, 2, False) for _ in range(2)]
    assert drawn[0] == drawn[1] == mean_return("simple_spread", leftwards, 2, True)
    uniform = mean_return("simple_spread", lambda o: torch.zeros(len(o), ACTIONS), 2, False)
    assert uniform != drawn[0]


def test_a_curve_has_its_points_and_its_clock_stops_while_it_judges(monkeypatch):
    now = itertools.count()
    clock = {"now": 0.0}
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: clock["now"])

    def judged(game, act, episodes, greedy):
        clock["now"] += 1_000
        return float(next(now))

    monkeypatch.setattr(protocol, "mean_return", judged)
    monkeypatch.setitem(SHARED, "num_envs", 2)
    monkeypatch.setitem(SHARED, "rollout_steps", 2)
    config = configuration("simple_spread", "mappo", 0, frames=33)
    assert config.iterations == 9
    curve = Curve("simple_spread", config, 3, 1)
    for iteration in range(10):
        clock["now"] += 1  # an iteration takes a second; the first stands for setting up
        curve.after(iteration, leftwards)
    assert curve.frames == [0, 12, 24, 36]
    assert curve.greedy == [0, 2, 4, 6]
    assert curve.sampled == [1, 3, 5, 7]
    assert curve.seconds == 9


# --- those who are judged ---


class Watched:
    """Stands for a curve, keeps the logits that it is shown, and checks that agents that see the
    same act alike: nobody's agents are told which of the agents they are.
    """

    def __init__(self):
        self.seen = torch.randn(AGENTS, SEEN, generator=torch.Generator().manual_seed(0))
        self.logits = []

    def after(self, iteration, act):
        assert iteration == len(self.logits)
        with torch.no_grad():
            self.logits.append(act(self.seen).clone().log_softmax(-1))
            alike = act(self.seen[:1].expand(AGENTS, -1))
        torch.testing.assert_close(alike, alike[:1].expand(AGENTS, -1))


def trained(name, seed):
    (_, library, algorithm), watched = METHODS[name], Watched()
    config = configuration("simple_spread", algorithm, seed, frames=32)
    compare.learner(library)("simple_spread", algorithm, config, watched)
    return watched.logits


@pytest.mark.parametrize("name", METHODS)
def test_everybody_learns_is_seen_after_each_iteration_and_repeats(tiny, name):
    logits = trained(name, 0)
    assert [tuple(each.shape) for each in logits] == [(AGENTS, ACTIONS)] * 3
    for before, after in itertools.pairwise(logits):
        assert not torch.equal(before, after)
    torch.testing.assert_close(logits, trained(name, 0))
    assert not torch.equal(logits[-1], trained(name, 1)[-1])


def test_settings_reach_everybody(monkeypatch):
    from prunevit.benchmarks.marl import benchmarl

    changes = {
        "num_envs": 4, "rollout_steps": 8, "hidden": (7,), "epochs": 3, "minibatches": 2,
        "lr": 1e-3, "gamma": 0.9, "max_grad_norm": 2.0,
    }  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setitem(SHARED, name, value)
    own = configuration("simple_reference", "ippo", 3, frames=64)
    assert (own.env, own.critic, own.seed) == (
        "pettingzoo:mpe2.simple_reference_v3", "local", 3,
    )  # fmt: skip
    assert (own.hidden, own.critic_hidden, own.lr_schedule) == ((7,), (7,), "constant")
    theirs = benchmarl.experiment_config(own, "somewhere")
    for config in (own, theirs):
        assert (config.lr, config.gamma) == (1e-3, 0.9)
    assert (own.iterations, theirs.max_n_iters) == (2, 2)
    assert (own.epochs, theirs.on_policy_n_minibatch_iters) == (3, 3)
    assert (own.minibatches, theirs.on_policy_minibatch_size) == (2, 16)
    assert (own.max_grad_norm, theirs.clip_grad_val) == (2.0, 2.0)
    assert theirs.on_policy_collected_frames_per_batch == 32


def test_sb3s_copies_play_episodes_of_their_own_and_hear_of_their_end():
    from prunevit.benchmarks.marl import sb3

    first, again, other = (sb3.make_envs("simple_spread", 2, seed) for seed in (0, 0, 1))
    seen = first.reset()
    assert seen.shape == (2 * AGENTS, SEEN)
    assert not np.array_equal(seen[:AGENTS], seen[AGENTS:])
    assert np.array_equal(seen, again.reset())
    assert not np.array_equal(seen, other.reset())
    for step in range(25):
        _, _, done, infos = first.step(np.zeros(2 * AGENTS, np.int64))
        assert done.tolist() == [step == 24] * 2 * AGENTS
    assert all(info["TimeLimit.truncated"] for info in infos)
    assert all("terminal_observation" in info for info in infos)


def test_benchmarls_copies_play_episodes_of_their_own():
    from prunevit.benchmarks.marl import benchmarl

    make, again = (
        benchmarl.GameTask("simple_spread").get_env_fun(2, False, 0, "cpu") for _ in range(2)
    )
    first, second = (make().reset()["agent", "observation"] for _ in range(2))
    assert first.shape == (AGENTS, SEEN)
    assert not torch.equal(first, second)
    assert torch.equal(first, again().reset()["agent", "observation"])


# --- the protocol ---


def record(config, task, method, seed):
    """As ``compare.train`` makes it, of a training that never was."""
    _, library, algorithm = METHODS[method]
    end = {"mappo": -20.0, "ippo": -21.0, "ppo": -22.0}[algorithm] + seed
    return {
        "task": task, "library": library, "algorithm": algorithm, "seed": seed,
        "frames": 40, "points": [0, 20, 40], "greedy": [-50.0, -30.0, end],
        "sampled": [-27.0, -26.0, end - 1], "wall_seconds": 7.0, "cpu_seconds": 5.0, "threads": 1,
        "settings": compare.settings_of(config), "versions": {}, "command": "",
        **origin(torch.device("cpu")),
    }  # fmt: skip


def rows_of(methods=tuple(METHODS), seeds=2):
    config = MarlCompareConfig()
    return [
        record(config, task, name, seed)
        for seed in range(seeds)
        for task in TASKS
        for name in methods
    ]


def test_a_record_says_all_that_was_done(tiny, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare", "--seeds", "1"])
    config = MarlCompareConfig(frames=32, evaluations=2, episodes=1)
    row = compare.train(config, "simple_reference", "ours-ippo", 4)
    assert row.keys() == compare.FIELDS | {"commit", "hardware"}
    assert (row["library"], row["algorithm"], row["seed"]) == ("ours", "ippo", 4)
    assert (row["frames"], row["points"]) == (32, [0, 16, 32])
    assert len(row["greedy"]) == len(row["sampled"]) == 3
    assert row["cpu_seconds"] > 0
    assert row["wall_seconds"] > 0
    assert row["versions"].keys() == {"torch", "pettingzoo", "mpe2", "prunevit"}
    assert row["command"] == f"{prog()} --seeds 1"
    assert json.loads(json.dumps(row)) == row


def test_a_killed_comparison_goes_on_where_it_stood(tmp_path, monkeypatch):
    config = MarlCompareConfig(methods=("ours-mappo", "sb3-ppo"), seeds=2, out=tmp_path / "new")
    calls = []

    def training(config, task, method, seed):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((seed, task, method))
        return record(config, task, method, seed)

    monkeypatch.setattr(compare, "train", training)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(config)
    file = tmp_path / "new" / "records.jsonl"
    whole = file.read_text()
    assert whole.count("\n") == 3
    file.write_text(whole[:-9])  # the last is measured anew
    first = calls[:2]
    calls.clear()
    monkeypatch.setattr(compare, "train", lambda *args: calls.append(args[1:4]) or record(*args))
    rows = compare.compare(config)
    assert first == [(0, "simple_spread", "ours-mappo"), (0, "simple_spread", "sb3-ppo")]
    assert [(seed, task) for task, _, seed in calls] == [
        (0, "simple_reference"), (0, "simple_reference"),
        (1, "simple_spread"), (1, "simple_spread"),
        (1, "simple_reference"), (1, "simple_reference"),
    ]  # fmt: skip
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    calls.clear()
    assert compare.compare(config) == rows
    assert not calls


def test_records_of_other_settings_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "train", record)
    arguments = ["--methods", "ours-mappo", "--seeds", "1", "--out", str(tmp_path)]
    main([*arguments, "--frames", "5000"])
    with pytest.raises(SystemExit, match=r"\(episodes 100 for 7, frames 5000 for 6000\)"):
        main([*arguments, "--episodes", "7", "--frames", "6000"])


def test_the_table_has_means_and_intervals_ours_first():
    lines = table(rows_of(methods=("sb3-ppo", "ours-mappo"))).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| **our MAPPO**", "| SB3's PPO"]
    cells = "-19.50 [-25.85, -13.15] | -20.50 [-26.85, -14.15] | 5"
    assert lines[2] == f"| **our MAPPO** | {cells} | {cells} |"
    assert lines[0].count("simple_") == 2


def test_the_table_of_a_killed_comparison_has_gaps():
    rows = [
        row for row in rows_of(seeds=1)
        if (row["task"], row["library"]) != ("simple_reference", "sb3")
    ]  # fmt: skip
    assert table(rows).splitlines()[-1] == "| SB3's PPO | -22.00 | -23.00 | 5 | | | |"


def test_old_flags_are_still_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train", record)
    arguments = ["--entrants", "sb3-ppo", "--games=simple_spread", "--seeds", "1"]
    main([*arguments, "--out", str(tmp_path)])
    shown = capsys.readouterr()
    assert "warning: --entrants is called --methods now\n" in shown.err
    assert "warning: --games is called --tasks now\n" in shown.err
    assert "| SB3's PPO | -22.00 | -23.00 | 5 |" in shown.out


def test_the_curves_are_means_over_the_seeds():
    panels = draw(rows_of()).axes
    titles = [axes.get_title() for axes in panels]
    assert titles == [f"{task}, {kind} actions" for task in TASKS for kind in ("greedy", "sampled")]
    for axes in panels:
        assert [line.get_label() for line in axes.lines] == list(METHODS)
    assert panels[0].lines[0].get_ydata().tolist() == [-50, -30, -19.5]
    assert panels[1].lines[4].get_ydata().tolist() == [-27, -26, -22.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "chess"], "unknown tasks chess: there are simple_spread, simple_reference"),
        (["--methods", "rllib-ppo"], "unknown methods rllib-ppo: there are ours-mappo, ours-"),
        (["--seeds", "0"], "seeds=0 must be at least 1"),
        (["--episodes", "-1"], "episodes=-1 must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, refusal, arguments, message):
    assert message in refusal(main, [*arguments, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("missing", "method"), [("supersuit", "sb3-ppo"), ("benchmarl.algorithms", "benchmarl-ippo")]
)
def test_a_missing_library_is_told_before_anything_is_trained(
    tmp_path, monkeypatch, missing, method
):
    library = METHODS[method].library
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"prunevit.benchmarks.marl.{library}")
    with pytest.raises(SystemExit, match=rf"{missing} is missing\..*\[marl-peers\]"):
        main(["--methods", "ours-mappo", method, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.learning
def test_ours_and_sb3_get_better_at_spreading(tmp_path, capsys):
    main(
        ["--games", "simple_spread", "--methods", "ours-mappo", "ours-ippo", "sb3-ppo", "--seeds",
        "1", "--frames", "8192", "--evaluations", "1", "--out", str(tmp_path)]
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    for row in rows:
        before, after = row["sampled"]
        assert after > before + 1
    assert (tmp_path / "curves.png").is_file()
    shown = capsys.readouterr().out.splitlines()
    titles = [METHODS[name].title for name in ("ours-mappo", "ours-ippo", "sb3-ppo")]
    assert [line.split(" | ")[0] for line in shown[-3:]] == [f"| {title}" for title in titles]
