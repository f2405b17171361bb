"""The comparison trains what it must, sets every policy to one cost, and goes on when killed."""

from pathlib import Path

import pytest
import torch

from tokenprune.agents import PrunedViT, TopK
from tokenprune.benchmarks import compare as comparison
from tokenprune.benchmarks import entrants
from tokenprune.benchmarks.compare import CompareConfig, compare, main, open_arena
from tokenprune.benchmarks.entrants import (
    ENTRANTS,
    RECIPES,
    Entry,
    Peer,
    UnreachableError,
    bisected,
)
from tokenprune.benchmarks.records import Records
from tokenprune.trainers.evaluation import evaluate

SETTINGS = {"eval_size": 20, "test_size": 30, "speed": False, "iterations": 1, "threads": 1}


@pytest.fixture(autouse=True)
def small_digits(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokenprune.envs.datasets.DEFAULT_SIZES", dict.fromkeys(
        ("train", "validation", "test"), 256))  # fmt: skip
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def arena():
    return open_arena(CompareConfig(**SETTINGS))[0]


# --- knobs ---


@pytest.mark.parametrize("at_least", [False, True])
def test_a_knob_is_set_from_the_side_that_was_asked_for(at_least):
    knob = bisected(lambda k: 1 / k, 0.01, 100.0, 0.37, at_least)
    assert 1 / knob == pytest.approx(0.37, rel=0.01)
    assert (1 / knob >= 0.37) == at_least
    with pytest.raises(UnreachableError, match="GMACs at the"):
        bisected(lambda k: 1 / k, 0.01, 100.0, 200.0 if at_least else 0.001, at_least)


@pytest.mark.parametrize(
    "name", ["random", "attention", "threshold", "ats", "tome", "evit", "evit-unfused"]
)
def test_who_is_compared_with_spends_at_least_as_much(arena, name):
    target = 0.4 * arena.backbone.dense_macs / 1e9
    entry = ENTRANTS[name].open(arena, 0)(target)
    spent = evaluate(entry.model, arena.validation, arena.size).gmacs
    assert target <= spent < 1.06 * target
    assert entry.knobs


@pytest.mark.parametrize("name", ["mappo", "mappo-one-price"])
def test_ours_spend_at_most_as_much(arena, name, monkeypatch):
    """With an actor whose patches differ: price and threshold both move what it costs."""
    recipe = RECIPES[name]
    folder = entrants.trained_run(arena, name, 0, recipe.settings(arena))
    model = PrunedViT.from_run(folder)
    with torch.no_grad():
        model.policy.actor.prior_weight.fill_(0.1)
        model.policy.actor.keep_bias.fill_(0.0)
        if recipe.many_prices:
            model.policy.actor.budget_weight.fill_(-0.1)
            model.policy.actor.keep_bias.fill_(-0.3)
    monkeypatch.setattr(PrunedViT, "from_run", lambda folder: model)
    at = ENTRANTS[name].open(arena, 0)
    for point in (0.3, 0.5):
        target = point * arena.backbone.dense_macs / 1e9
        entry = at(target)
        spent = evaluate(entry.model, arena.validation, arena.size).gmacs
        assert 0.85 * target < spent <= target
        knob = "budget" if recipe.many_prices else "threshold"
        assert entry.knobs == {knob: getattr(entry.model.policy, knob)}


def test_a_peer_tells_what_it_was_given(arena):
    model = PrunedViT(arena.backbone, TopK((20, 9)))
    peer = Peer(model, arena.backbone, macs=7, kept=(20, 9))
    images, _ = arena.validation.load(range(3))
    told, traced = peer.trace(images), model.trace(images)
    assert torch.equal(told.logits, traced.logits)
    assert torch.equal(told.alive.sum(2), traced.alive.sum(2))
    assert told.macs.tolist() == [7] * 3


# --- the protocol ---


def test_records_are_complete_and_nothing_is_measured_twice(tmp_path, monkeypatch):
    config = CompareConfig(
        policies=("attention", "random"), seeds=2, points=(0.4, 0.5), out=tmp_path / "r", **SETTINGS
    )
    rows = compare(config)
    # attention has no seed
    assert [(row["policy"], row["seed"], row["point"]) for row in rows] == [
        ("attention", 0, 0.4), ("attention", 0, 0.5), ("random", 0, 0.4), ("random", 0, 0.5),
        ("random", 1, 0.4), ("random", 1, 0.5),
    ]  # fmt: skip
    for row in rows:
        assert row["gmacs"] >= row["point"] * row["dense_gmacs"]
        assert sum(row["left"]) == 30
        assert len(row["kept"]) == 2
        assert 0 <= row["accuracy"] <= 1
        assert row["speedup"] is None
    file = tmp_path / "r" / "records.jsonl"
    whole = file.read_text()
    file.write_text(whole[: whole.rindex("{") + 9])  # killed while the last record was written
    opened = []

    def note(entrant, arena, seed, points):
        opened.append((seed, points))
        return original(entrant, arena, seed, points)

    original = comparison.entries
    monkeypatch.setattr(comparison, "entries", note)
    again = compare(config)
    assert opened == [(1, [0.5])]
    assert again == rows


@pytest.mark.slow
def test_what_learns_is_trained_once(tmp_path, monkeypatch):
    config = CompareConfig(
        policies=("mappo", "released"), seeds=1, points=(0.9,), out=tmp_path / "r", **SETTINGS
    )
    compare(config)
    for name in ("mappo-0", "released-0"):
        assert (tmp_path / "r" / "runs" / name / "policy.safetensors").is_file()
    monkeypatch.setattr(entrants, "learn", None)  # not called again
    Path(tmp_path / "r" / "records.jsonl").unlink()
    compare(config)
    other = CompareConfig(**(vars(config) | {"iterations": 2}))
    Path(tmp_path / "r" / "records.jsonl").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"other settings \(iterations\)"):
        compare(other)


@pytest.mark.slow
def test_speeds_are_ratios_to_the_dense_model(arena):
    """Of two policies the one that keeps next to nothing is faster, whatever else runs."""
    one, all_of_them = (
        Entry(PrunedViT(arena.backbone, TopK((kept, kept))), {}) for kept in (1, 64)
    )
    speeds = comparison.timed({0.2: one, 1.0: all_of_them}, arena, arena.validation)
    assert speeds[0.2] > speeds[1.0] > 0.3


# --- what is refused ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--game chess", "unknown game 'chess': choose from digits, cifar10, imagenet"),
        ("--policies mapo", "unknown policies mapo: there are random"),
        ("--seeds 0", "seeds=0"),
        ("--points 1.5", r"points=(1.5,): shares"),
        ("--game cifar10", "where are its images? Give --data"),
        ("--game cifar10 --data folder:x", "needs a trained backbone: give --checkpoint"),
        ("--game cifar10 --data folder:x --checkpoint y", "no checkpoint y"),
    ],
)
def test_bad_input_is_refused_at_once(line, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(line.split())
    assert message in str(error.value)


def test_a_folder_of_another_game_is_refused(tmp_path):
    Records(tmp_path, "digits")
    (tmp_path / "records.jsonl").write_text("")
    compare_again = CompareConfig(out=tmp_path, policies=("attention",), points=(0.4,), **SETTINGS)
    rows = compare(compare_again)
    assert rows[0]["game"] == "digits"
    with pytest.raises(SystemExit, match="holds records of digits"):
        main(["--game", "cifar10", "--out", str(tmp_path)])
