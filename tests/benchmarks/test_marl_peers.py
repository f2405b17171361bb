"""Ours and its peers learn the same games under the same conditions, and are judged alike."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mpe2")
pytest.importorskip("benchmarl")
pytest.importorskip("supersuit")

from mpe2 import simple_spread_v3

from prunevit.benchmarks import marl_games, marl_peers
from prunevit.benchmarks.marl_games import EVALUATION_SEED, GAMES, Curve, Settings, mean_return
from prunevit.benchmarks.marl_peers import ENTRANTS, MarlPeersConfig, compare, draw, main, table
from prunevit.benchmarks.peers import marl_benchmarl, marl_ours, marl_sb3

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
TINY = Settings(frames=32, num_envs=2, rollout_steps=8, hidden=(8, 4), epochs=1, minibatches=2)
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


# --- the judge ---


def test_greedy_returns_are_those_of_the_raw_game():
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
    monkeypatch.setattr(marl_games.time, "perf_counter", lambda: clock["now"])

    def judged(game, act, episodes, greedy):
        clock["now"] += 1_000
        return float(next(now))

    monkeypatch.setattr(marl_games, "mean_return", judged)
    settings = Settings(frames=33, num_envs=2, rollout_steps=2)
    assert settings.iterations == 9
    curve = Curve("simple_spread", settings, 3, 1)
    for iteration in range(10):
        clock["now"] += 1  # an iteration takes a second; the first stands for setting up
        curve.after(iteration, leftwards)
    assert curve.frames == [0, 12, 24, 36]
    assert curve.greedy == [0, 2, 4, 6]
    assert curve.sampled == [1, 3, 5, 7]
    assert curve.seconds == 9


# --- those who are judged ---


class Watched:
    """Stands for a curve, and keeps the logits that it is shown."""

    def __init__(self):
        self.seen = torch.randn(AGENTS, SEEN, generator=torch.Generator().manual_seed(0))
        self.logits = []

    def after(self, iteration, act):
        assert iteration == len(self.logits)
        with torch.no_grad():
            self.logits.append(act(self.seen).clone().log_softmax(-1))


def trained(name, seed):
    entrant, watched = ENTRANTS[name], Watched()
    learn = marl_peers.learner(entrant.library)
    learn("simple_spread", entrant.algorithm, seed, TINY, watched)
    return watched.logits


@pytest.mark.parametrize("name", ENTRANTS)
def test_everybody_learns_is_seen_after_each_iteration_and_repeats(name):
    logits = trained(name, 0)
    assert [tuple(each.shape) for each in logits] == [(AGENTS, ACTIONS)] * (TINY.iterations + 1)
    for before, after in itertools.pairwise(logits):
        assert not torch.equal(before, after)
    torch.testing.assert_close(logits, trained(name, 0))
    assert not torch.equal(logits[-1], trained(name, 1)[-1])


def test_settings_reach_everybody():
    settings = Settings(
        frames=64, num_envs=4, rollout_steps=8, hidden=(7,), epochs=3, minibatches=2, lr=1e-3,
        gamma=0.9, max_grad_norm=2.0,
    )  # fmt: skip
    ours = marl_ours.configuration("simple_reference", "ippo", 3, settings)
    assert (ours.env, ours.critic, ours.seed) == (
        "pettingzoo:mpe2.simple_reference_v3", "local", 3,
    )  # fmt: skip
    assert (ours.hidden, ours.critic_hidden, ours.lr_schedule) == ((7,), (7,), "constant")
    theirs = marl_benchmarl.experiment_config(settings, "somewhere")
    for config in (ours, theirs):
        assert (config.lr, config.gamma) == (1e-3, 0.9)
    assert (ours.iterations, theirs.max_n_iters) == (2, 2)
    assert (ours.epochs, theirs.on_policy_n_minibatch_iters) == (3, 3)
    assert (ours.minibatches, theirs.on_policy_minibatch_size) == (2, 16)
    assert (ours.max_grad_norm, theirs.clip_grad_val) == (2.0, 2.0)
    assert theirs.on_policy_collected_frames_per_batch == 32


def test_sb3s_copies_play_episodes_of_their_own_and_hear_of_their_end():
    first, again, other = (marl_sb3.make_envs("simple_spread", 2, seed) for seed in (0, 0, 1))
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
    make, again = (
        marl_benchmarl.GameTask("simple_spread").get_env_fun(2, False, 0, "cpu") for _ in range(2)
    )
    first, second = (make().reset()["agent", "observation"] for _ in range(2))
    assert first.shape == (AGENTS, SEEN)
    assert not torch.equal(first, second)
    assert torch.equal(first, again().reset()["agent", "observation"])


# --- the protocol ---


def record(config, game, entrant, seed, settings):
    """As ``marl_peers.train`` makes it, of a training that never was."""
    end = {"mappo": -20.0, "ippo": -21.0, "ppo": -22.0}[entrant.algorithm] + seed
    return {
        "game": game, "library": entrant.library, "algorithm": entrant.algorithm, "seed": seed,
        "frames": 40, "points": [0, 20, 40], "greedy": [-50.0, -30.0, end],
        "sampled": [-27.0, -26.0, end - 1], "wall_seconds": 7.0, "cpu_seconds": 5.0, "threads": 1,
        "settings": marl_peers.described(config, settings), "versions": {}, "command": "",
    }  # fmt: skip


def rows_of(entrants=tuple(ENTRANTS), seeds=2):
    config = MarlPeersConfig()
    return [
        record(config, game, ENTRANTS[name], seed, Settings(frames=40))
        for seed in range(seeds)
        for game in GAMES
        for name in entrants
    ]


def test_a_record_says_all_that_was_done(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["marl_peers", "--seeds", "1"])
    config = MarlPeersConfig(evaluations=2, episodes=1)
    row = marl_peers.train(config, "simple_reference", ENTRANTS["ours-ippo"], 4, TINY)
    assert row.keys() == marl_peers.FIELDS
    assert (row["library"], row["algorithm"], row["seed"]) == ("ours", "ippo", 4)
    assert (row["frames"], row["points"]) == (32, [0, 16, 32])
    assert len(row["greedy"]) == len(row["sampled"]) == 3
    assert row["cpu_seconds"] > 0
    assert row["wall_seconds"] > 0
    assert row["versions"].keys() == {"torch", "pettingzoo", "mpe2", "prunevit"}
    assert row["command"] == "python -m benchmarks.marl_peers --seeds 1"
    assert json.loads(json.dumps(row)) == row


def test_a_killed_comparison_goes_on_where_it_stood(tmp_path, monkeypatch):
    config = MarlPeersConfig(entrants=("ours-mappo", "sb3-ppo"), seeds=2, out=tmp_path / "new")
    calls = []

    def training(config, game, entrant, seed, settings):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((seed, game, entrant.name))
        return record(config, game, entrant, seed, settings)

    monkeypatch.setattr(marl_peers, "train", training)
    with pytest.raises(KeyboardInterrupt):
        compare(config)
    file = tmp_path / "new" / "records.jsonl"
    whole = file.read_text()
    assert whole.count("\n") == 3
    file.write_text(whole[:-9])  # the last is measured anew
    first = calls[:2]
    calls.clear()
    monkeypatch.setattr(marl_peers, "train", lambda *args: calls.append(args[1:4]) or record(*args))
    rows = compare(config)
    assert first == [(0, "simple_spread", "ours-mappo"), (0, "simple_spread", "sb3-ppo")]
    assert [(seed, game) for game, _, seed in calls] == [
        (0, "simple_reference"), (0, "simple_reference"),
        (1, "simple_spread"), (1, "simple_spread"),
        (1, "simple_reference"), (1, "simple_reference"),
    ]  # fmt: skip
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    calls.clear()
    assert compare(config) == rows
    assert not calls


def test_records_of_other_settings_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(marl_peers, "train", record)
    arguments = ["--entrants", "ours-mappo", "--seeds", "1", "--out", str(tmp_path)]
    main([*arguments, "--frames", "5000"])
    with pytest.raises(SystemExit, match=r"other settings \(episodes, frames\): give another"):
        main([*arguments, "--episodes", "7", "--frames", "6000"])


def test_the_table_has_means_and_intervals_ours_first(capsys):
    lines = table(rows_of(entrants=("sb3-ppo", "ours-mappo"))).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| simple_spread", "ours-mappo"], ["| simple_spread", "sb3-ppo"],
        ["| simple_reference", "ours-mappo"], ["| simple_reference", "sb3-ppo"],
    ]  # fmt: skip
    ended = "| 2 | 40 | -19.50 [-20.00, -19.00] | -20.50 [-21.00, -20.00] | 7 | 5 |"
    assert lines[2].endswith(ended)


def test_the_curves_are_drawn(tmp_path):
    draw(rows_of(), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        colours = set(picture.convert("RGB").getdata())
    for line in ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)):
        assert line in colours  # matplotlib's first five, one for each entrant


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--games", "chess"], "unknown games chess: there are simple_spread, simple_reference"),
        (["--entrants", "rllib-ppo"], "unknown entrants rllib-ppo: there are ours-mappo, ours-"),
        (["--seeds", "0"], "seeds=0 must be at least 1"),
        (["--episodes", "-1"], "episodes=-1 must be at least 1"),
    ],
)
def test_wrong_settings_end_in_one_line(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as ended:
        main([*arguments, "--out", str(tmp_path)])
    assert str(ended.value).startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("missing", "entrant"), [("supersuit", "sb3-ppo"), ("benchmarl.algorithms", "benchmarl-ippo")]
)
def test_a_missing_library_is_told_before_anything_is_trained(
    tmp_path, monkeypatch, missing, entrant
):
    library = ENTRANTS[entrant].library
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"prunevit.benchmarks.peers.marl_{library}")
    with pytest.raises(SystemExit, match=rf"{missing} is missing: .*prunevit\[marl-peers\]"):
        main(["--entrants", "ours-mappo", entrant, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.learning
def test_ours_and_sb3_get_better_at_spreading(tmp_path, capsys):
    main(
        ["--games", "simple_spread", "--entrants", "ours-mappo", "ours-ippo", "sb3-ppo", "--seeds",
        "1", "--frames", "8192", "--evaluations", "1", "--out", str(tmp_path)]
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    for row in rows:
        before, after = row["sampled"]
        assert after > before + 1
    assert (tmp_path / "curves.png").is_file()
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in shown[-3:]] == ["ours-mappo", "ours-ippo", "sb3-ppo"]
