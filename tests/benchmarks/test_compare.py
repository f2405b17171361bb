"""The comparison trains what it must, sets every policy to one cost, and goes on when killed."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from prunevit.agents import PrunedViT, TopK
from prunevit.agents.policies.serialization import SavedModelError, dynamic_vit_policy
from prunevit.benchmarks import compare as comparison
from prunevit.benchmarks import method_speed
from prunevit.benchmarks.compare import (
    CompareConfig,
    compare,
    main,
    open_benchmark,
    settings_of,
)
from prunevit.benchmarks.machine import hardware
from prunevit.benchmarks.methods import learned
from prunevit.benchmarks.methods.recipes import RECIPES
from prunevit.benchmarks.methods.registry import METHODS
from prunevit.benchmarks.methods.untrained import DITHERS, nudged_merges
from prunevit.benchmarks.protocol import (
    Benchmark,
    FixedScheduleModel,
    Method,
    UnreachableError,
    search_knob,
    with_best_dither,
)
from prunevit.benchmarks.records import FIELDS, Records, command, commit, read, unpack_answers
from prunevit.benchmarks.tasks import TASKS
from prunevit.envs.vit.digits_vit import ASSETS
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.evaluation import evaluate
from prunevit.trainers.common.timing import Timing
from prunevit.trainers.dynamic_vit import DynamicViTConfig
from prunevit.trainers.finetune import FinetuneConfig

SETTINGS = {"eval_size": 12, "test_size": 16, "speed": False, "iterations": 1, "threads": 1}


@pytest.fixture(autouse=True)
def small_digits(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prunevit.envs.data.cluttered_digits.DEFAULT_SIZES", dict.fromkeys(
        ("train", "validation", "test"), 256))  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(SETTINGS["threads"])
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench():
    return open_benchmark(CompareConfig(**SETTINGS))


# --- knobs ---


def knob(cost, target):
    return search_knob(cost, 0.01, 100.0, target, lambda value: {"knob": value})["knob"]


def test_a_knob_is_set_to_within_a_percent_from_either_side():
    for target in np.geomspace(0.0101, 99, 40):
        assert 1 / knob(lambda value: 1 / value, target) == pytest.approx(target, rel=0.01)


def test_a_search_begins_where_earlier_ones_ended():
    asked = []

    def cost(value):
        asked.append(value)
        return 1 / value

    def searched(target, tried):
        asked.clear()
        search_knob(cost, 0.01, 100.0, target, lambda value: {"knob": value}, tried)
        return len(asked)

    tried = {}
    alone = [searched(target, {}) for target in (0.5, 0.6, 0.7, 0.8)]
    together = [searched(target, tried) for target in (0.5, 0.6, 0.7, 0.8)]
    assert max(alone) <= 12
    assert together[0] == alone[0]
    assert all(map(int.__lt__, together[1:], alone[1:]))
    assert searched(0.8, tried) == 0


def test_a_knob_is_found_where_only_a_narrow_range_of_it_matters():
    """Q-learners rate keep and prune alike to 1e-4: 12 halvings stepped over their whole range."""

    def cost(value):
        return 1 + np.clip((3.00002 - value) / 4e-5, 0, 1)

    for target in (1.2, 1.5, 1.9):
        assert cost(knob(cost, target)) == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize(
    ("target", "cost", "nearest"),
    [
        (200.0, lambda value: 1 / value, 0.01),
        (0.001, lambda value: 1 / value, 100.0),
        (0.5, lambda value: 1.0 if value < 3 else 0.4, 3.0),
    ],
)
def test_a_point_that_no_knob_reaches_has_the_nearest(target, cost, nearest):
    with pytest.raises(UnreachableError, match=r"the nearest it can cost is \d+\.\d% of") as error:
        knob(cost, target)
    assert cost(error.value.nearest["knob"]) == pytest.approx(cost(nearest))


@pytest.mark.parametrize(
    "name",
    [
        "random",
        "attention",
        "threshold",
        "ats",
        "tome",
        "pitome",
        "evit",
        "evit-unfused",
        "zero-tprune",
        "attention-merge",
        "threshold-merge",
    ],
)
@pytest.mark.parametrize("point", [0.4, 0.55, 0.7])
def test_methods_spend_what_the_point_says_or_say_that_they_do_not(bench, name, point):
    target = bench.gmacs_at(point)
    method = METHODS[name].open(bench, 0)
    try:
        knobs, is_matched = method.tune(target), True
    except UnreachableError as error:
        knobs, is_matched = error.nearest, False
    spent = evaluate(method.make(knobs), bench.validation, bench.size).gmacs
    assert (abs(spent - target) <= 0.01 * target) == is_matched
    assert spent == pytest.approx(target, rel=0.06)


@pytest.mark.parametrize("name", ["evit", "evit-unfused", "zero-tprune"])
def test_rivals_choose_among_the_schedules_that_top_k_chooses_among(bench, name, monkeypatch):
    """And among their authors', which keep the same share at every stage."""
    for point, wanted in ((0.4, 0), (0.6, 64)):
        rated = {}

        def rate(bench, model, wanted=wanted, rated=rated):
            return rated.setdefault(model.kept, -abs(model.kept[1] - wanted))

        monkeypatch.setattr(Benchmark, "validate", rate)
        method = METHODS[name].open(bench, 0)
        chosen = method.make(method.tune(bench.gmacs_at(point)))
        shares = [[after / before for before, after in pairwise((64, *kept))] for kept in rated]
        assert min(abs(first - second) for first, second in shares) < 0.15
        assert len(rated) > 1
        assert rated[chosen.kept] == max(rated.values())


def test_merges_are_nudged_to_the_points_between_their_schedules(bench):
    method = METHODS["pitome"].open(bench, 0)
    for point in np.linspace(0.4, 0.9, 11):
        knobs = method.tune(bench.gmacs_at(point))
        spent = evaluate(method.make(knobs), bench.validation, 1).gmacs
        assert spent == pytest.approx(bench.gmacs_at(point), rel=0.01)
    nudged = nudged_merges((32, 0, 2, 5), 64)
    assert {way[0] for way in nudged} == {30, 31, 32}  # half of the patches at most
    assert {way[1] for way in nudged} == {0, 1, 2}
    assert all(sum(a != b for a, b in zip(way, (32, 0, 2, 5), strict=True)) < 2 for way in nudged)


@pytest.mark.parametrize(("name", "dithers"), [("mappo", True), ("paper", False)])
def test_ours_spend_what_the_point_says(bench, name, dithers, monkeypatch):
    """With an actor whose patches differ: price and threshold both move what it costs."""
    bench = replace(
        bench, task=replace(bench.task, dithers=dithers), base=replace(bench.base, num_envs=64)
    )
    recipe = RECIPES[name]
    folder = learned.trained_run(bench, name, 0, recipe.settings(bench))
    model = PrunedViT.from_run(folder)
    with torch.no_grad():
        model.policy.actor.prior_weight.fill_(0.1)
        model.policy.actor.keep_bias.fill_(0.0)
        if recipe.alpha_range:
            model.policy.actor.alpha_weight.fill_(-0.1)
            model.policy.actor.keep_bias.fill_(-0.3)
    monkeypatch.setattr(PrunedViT, "from_run", lambda folder: model)
    method = METHODS[name].open(bench, 0)
    for point in (0.3, 0.5):
        target = bench.gmacs_at(point)
        knobs = method.tune(target)
        pruned = method.make(knobs | {"accuracy": 0.9})  # a record holds more than knobs
        spent = evaluate(pruned, bench.validation, bench.size).gmacs
        assert spent == pytest.approx(target, rel=0.01)
        knob = "alpha" if recipe.alpha_range else "threshold"
        trained_for = {} if recipe.alpha_range else {"alpha": 3.0}
        assert knobs == trained_for | {knob: getattr(pruned.policy, knob)} | (
            {"dither": pruned.policy.dither} if dithers else {}
        )


def test_a_threshold_goes_on_where_no_alpha_reaches(bench, monkeypatch):
    """An actor that hardly heeds alpha costs nearly the same under all."""
    bench = replace(bench, base=replace(bench.base, num_envs=64))
    folder = learned.trained_run(bench, "mappo", 0, RECIPES["mappo"].settings(bench))
    model = PrunedViT.from_run(folder)
    with torch.no_grad():
        model.policy.actor.prior_weight.fill_(0.1)
        model.policy.actor.keep_bias.fill_(0.0)
        model.policy.actor.alpha_weight.fill_(-1e-4)
    monkeypatch.setattr(PrunedViT, "from_run", lambda folder: model)
    method = METHODS["mappo"].open(bench, 0)
    low, high = bench.task.alpha_range
    thresholds = []
    for point in (0.4, 0.8):
        knobs = method.tune(bench.gmacs_at(point))
        spent = evaluate(method.make(knobs), bench.validation, bench.size).gmacs
        assert spent == pytest.approx(bench.gmacs_at(point), rel=0.01)
        assert knobs["alpha"] in (low / learned.ALPHAS_BEYOND, high * learned.ALPHAS_BEYOND)
        thresholds.append(knobs["threshold"])
    assert thresholds[0] > thresholds[1]


@pytest.mark.parametrize("name", ["threshold", "ats"])
def test_rivals_dither_where_that_is_better_on_validation(bench, name, monkeypatch):
    monkeypatch.setattr("prunevit.benchmarks.methods.untrained.DITHERS", (0.0, 0.5))
    bench = replace(bench, task=replace(bench.task, dithers=True), size=16)
    target = bench.gmacs_at(0.4)
    method, plain = METHODS[name].open(bench, 0), replace(bench.task, dithers=False)
    knobs = method.tune(target)
    assert knobs["dither"] in DITHERS
    chosen = evaluate(method.make(knobs), bench.validation, bench.size)
    again = evaluate(method.make(knobs), bench.validation, bench.size)
    assert (chosen.accuracy, chosen.gmacs) == (again.accuracy, again.gmacs)
    assert chosen.gmacs == pytest.approx(target, rel=0.01)
    without = METHODS[name].open(replace(bench, task=plain), 0)
    undithered = without.make(without.tune(target))
    assert (undithered if name == "ats" else undithered.policy).dither == 0
    assert chosen.accuracy >= evaluate(undithered, bench.validation, bench.size).accuracy


def test_the_most_accurate_strength_of_dither_is_taken(bench, monkeypatch):
    bench = replace(bench, task=replace(bench.task, dithers=True))
    accuracy = {0.0: 0.7, 0.25: 0.8, 0.5: 0.9, 1.0: 0.75}
    monkeypatch.setattr(type(bench), "validate", lambda _, model: accuracy[model])

    def tune(shared):
        if shared["dither"] in out_of_reach:
            raise UnreachableError("no", shared)
        return shared

    def best():
        return with_best_dither(bench, tune, lambda knobs: knobs["dither"], DITHERS)["dither"]

    out_of_reach = {1.0}
    assert best() == 0.5
    out_of_reach = {0.0, 0.5}
    assert best() == 0.25
    out_of_reach = set(DITHERS)
    with pytest.raises(UnreachableError):
        best()


@pytest.mark.integration("benchmarl")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_another_librarys_algorithm_is_trained_once_and_set_by_its_threshold(bench, monkeypatch):
    from prunevit.trainers import benchmarl

    trainings = []
    original = benchmarl.train
    monkeypatch.setattr(
        benchmarl, "train", lambda config: trainings.append(config) or original(config)
    )
    (bench.runs / "benchmarl-iql-3").mkdir(parents=True)  # killed before it wrote anything
    method = METHODS["benchmarl-iql"].open(bench, 3)
    for point in (0.4, 0.7):
        target = bench.gmacs_at(point)
        knobs = method.tune(target)
        spent = evaluate(method.make(knobs), bench.validation, bench.size).gmacs
        assert spent == pytest.approx(target, rel=0.01)
    assert [(config.algorithm, config.seed, config.iterations) for config in trainings] == [
        ("iql", 3, 1)
    ]
    with pytest.raises(ValueError, match="other settings"):
        METHODS["benchmarl-iql"].open(replace(bench, iterations=2), 3).tune(1.0)


def test_what_can_not_be_so_cheap_comes_as_near_as_it_can(bench):
    for name in ("attention", "random", "oracle"):
        with pytest.raises(UnreachableError) as error:
            METHODS[name].open(bench, 0).tune(bench.gmacs_at(0.1))
        assert error.value.nearest == {"tokens": [0, 0]}


def test_a_fixed_schedule_tells_what_it_was_given(bench):
    model = PrunedViT(bench.backbone, TopK((20, 9)))
    fixed = FixedScheduleModel(model, bench.backbone, macs=7, kept=(20, 9))
    images, _ = bench.validation.load(range(3))
    told, traced = fixed.trace(images), model.trace(images)
    assert torch.equal(told.logits, traced.logits)
    assert torch.equal(told.alive.sum(2), traced.alive.sum(2))
    assert told.macs.tolist() == [7] * 3


def spread_run(runs):
    """A run of ours whose policy tells patches and prices apart, as one iteration teaches none."""
    base = open_benchmark(CompareConfig(**SETTINGS, out=runs.parent))
    folder = learned.trained_run(base, "mappo", 0, RECIPES["mappo"].settings(base))
    weights = load_file(folder / "policy.safetensors")
    for name, value in {"prior_weight": 0.1, "keep_bias": -0.3, "alpha_weight": -0.1}.items():
        weights[name].fill_(value)
    save_file(weights, folder / "policy.safetensors")


@pytest.mark.learning
def test_what_draws_its_actions_has_one_compute(bench):
    method = METHODS["released"].open(bench, 0)
    drawn = {"threshold": 0.5, "dither": True}
    with pytest.raises(UnreachableError) as error:
        method.tune(bench.gmacs_at(0.99))
    assert error.value.nearest == drawn
    spent = evaluate(method.make(drawn), bench.validation, bench.size)
    assert spent.kept[0] == pytest.approx(0.5, abs=0.15)  # an untrained policy keeps every second
    assert method.tune(spent.gmacs) == drawn
    by_threshold = METHODS["released-threshold"].open(bench, 0)
    assert by_threshold.make({"threshold": 0.4}).policy.threshold == 0.4


# --- the protocol ---


def test_records_are_complete_and_nothing_is_measured_twice(tmp_path, monkeypatch):
    config = CompareConfig(
        methods=("attention", "random"), seeds=2, points=(0.4, 0.5), out=tmp_path / "r", **SETTINGS
    )
    rows = compare(config)
    # attention has no seed
    assert [(row["method"], row["seed"], row["point"]) for row in rows] == [
        ("dense", 0, 1.0), ("attention", 0, 0.4), ("attention", 0, 0.5), ("random", 0, 0.4),
        ("random", 0, 0.5), ("random", 1, 0.4), ("random", 1, 0.5),
    ]  # fmt: skip
    dense = rows[0]
    assert dense["accuracy"] == dense["dense_accuracy"]
    assert dense["agreement"] == 1
    assert dense["kl"] == 0
    assert dense["gmacs"] == dense["dense_gmacs"]
    assert len(dense["sources"]) == SETTINGS["test_size"]
    for row in rows[1:]:
        assert row["gmacs"] == pytest.approx(row["point"] * row["dense_gmacs"], rel=0.01)
        assert row["matched"]
        assert sum(row["left"]) == SETTINGS["test_size"]
        assert len(row["kept"]) == 2
        right = unpack_answers(row["right"], SETTINGS["test_size"])
        assert right.mean() == row["accuracy"]
        assert 0.5 < row["agreement"] <= 1
        assert row["kl"] > 0
        assert row["speedup"] is None
        assert row["on_prune"] == "drop"
        assert row.keys() >= FIELDS | {"settings", "versions", "images"}
        assert " cores, " in row["hardware"]
        assert row["commit"] == commit()
    file = tmp_path / "r" / "records.jsonl"
    whole = file.read_text()
    file.write_text(whole[: whole.rindex("{") + 9])  # killed while the last record was written
    judged = []

    def note(method, knobs, *rest):
        judged.append(knobs)
        return original(method, knobs, *rest)

    original = comparison.judge
    monkeypatch.setattr(comparison, "judge", note)
    again = compare(config)
    assert judged == [{"tokens": rows[-1]["tokens"]}]
    assert again == rows


@pytest.mark.learning
def test_what_learns_is_trained_once(tmp_path, monkeypatch):
    config = CompareConfig(
        methods=("mappo", "released"), seeds=1, points=(0.9,), out=tmp_path / "r", **SETTINGS
    )
    compare(config)
    for name in ("mappo-0", "released-0"):
        assert (tmp_path / "r" / "runs" / name / "policy.safetensors").is_file()
    monkeypatch.setattr(learned, "learn", None)  # not called again
    Path(tmp_path / "r" / "records.jsonl").unlink()
    compare(config)
    written = tmp_path / "r" / "runs" / "mappo-0" / "config.json"
    settings = json.loads(written.read_text())
    del settings["critic_norm"]  # a run of before it came
    written.write_text(json.dumps(settings))
    Path(tmp_path / "r" / "records.jsonl").unlink()
    compare(config)
    other = CompareConfig(**(vars(config) | {"iterations": 2}))
    Path(tmp_path / "r" / "records.jsonl").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"other settings \(iterations 1 for 2\)"):
        compare(other)


@pytest.mark.learning
def test_a_warm_start_begins_from_the_taught_actor(tmp_path, monkeypatch):
    config = CompareConfig(
        methods=("warm-start", "straight-through"), seeds=1, points=(0.9,), out=tmp_path, **SETTINGS
    )
    rows = compare(config)
    assert [row["method"] for row in rows[1:]] == ["warm-start", "straight-through"]
    runs = tmp_path / "runs"
    settings = json.loads((runs / "warm-start-0" / "config.json").read_text())
    assert Path(settings["init"]) == runs / "straight-through-0"
    taught, warm = (
        load_file(runs / f"{name}-0" / "policy.safetensors")
        for name in ("straight-through", "warm-start")
    )
    # one step of Adam away
    assert all((taught[key] - warm[key]).abs().max() < 0.02 for key in taught)
    monkeypatch.setattr(learned, "learn", None)  # not called again, wherever the runs lie now
    monkeypatch.setattr(learned, "train_straight_through", None)
    runs.rename(tmp_path / "moved")
    again = compare(replace(config, out=tmp_path / "again", runs=tmp_path / "moved"))
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]


def test_speeds_come_later_without_training_or_judging(tmp_path, monkeypatch):
    config = CompareConfig(
        methods=("attention", "oracle"), seeds=1, points=(0.9, 0.8),
        out=tmp_path, **SETTINGS,
    )  # fmt: skip
    monkeypatch.setattr("prunevit.benchmarks.methods.untrained.ORACLE_IMAGES", 2)
    rows = compare(config)
    assert all(row["speedup"] is None for row in rows)
    known = [dict(row) for row in rows]
    turns = []

    def time_models(process, models, images, batch_size, rounds):
        turns.append((batch_size, *models))
        assert models["dense"] is not models["0.9"]
        assert isinstance(models["0.9"], PrunedViT)
        # dense takes 1 s, ours unpruned 0.95 s, the others as long as their point says; of one
        # image all baselines take twice as long
        baselines = {"dense": 1.0, "unpruned": 0.95}
        if batch_size == 1:
            baselines = {name: 2 * seconds for name, seconds in baselines.items()}
        passes = {name: baselines.get(name) or float(name) for name in models}
        return {name: Timing([seconds] * rounds) for name, seconds in passes.items()}

    monkeypatch.setattr(method_speed.TimingProcess, "time_models", time_models)
    monkeypatch.setattr(comparison, "judge", None)
    monkeypatch.setattr(learned, "learn", None)
    timed = compare(replace(config, speed=True))
    assert timed == read(tmp_path / "records.jsonl")
    for before, after in zip(known, map(dict, timed), strict=True):
        called = command() if after["speedup"] is not None else None
        assert after.pop("speed_command", None) == called
        same_kernels = after.pop("speedup_same_kernels", None)
        assert same_kernels == pytest.approx(after["speedup"] and 0.95 * after["speedup"])
        for field in ("speedup", "speedup_same_kernels"):
            one_image = after.pop(f"{field}_one_image", None)
            of_batch = {"speedup": after["speedup"]}.get(field, same_kernels)
            assert one_image == pytest.approx(of_batch and 2 * of_batch)
        assert ("+00:00" in after.pop("timed", "")) == (called is not None)
        assert after.pop("speed_batch", None) == (64 if called else None)
        assert before == after | {"speedup": None}
    speeds = {(row["method"], row["point"]): row["speedup"] for row in timed}
    assert speeds["attention", 0.9] == pytest.approx(1 / 0.9)
    assert speeds["attention", 0.8] == pytest.approx(1 / 0.8)
    assert speeds["oracle", 0.9] is None  # a search has no speed
    assert turns == [(batch, "dense", "unpruned", "0.9", "0.8") for batch in (64, 1)]
    turns.clear()
    assert compare(replace(config, speed=True)) == timed
    assert not turns
    monkeypatch.undo()
    compare(replace(config, methods=("norm",)))
    monkeypatch.setattr(method_speed.TimingProcess, "time_models", time_models)
    later = compare(replace(config, methods=("norm",), speed=True))
    assert len(turns) == 4  # the first one again: one process times all
    assert len({row["timed"] for row in later if row["speedup"]}) == 1
    turns.clear()
    records = Records(tmp_path / "records.jsonl")
    records.find("norm", 0, 0.9)["timed"] = "2026-01-01T00:00:00+00:00"  # by another process
    records.save()
    again = compare(replace(config, methods=("norm",), speed=True))
    assert len(turns) == 4
    assert len({row["timed"] for row in again if row["speedup"]}) == 1


def test_a_policy_whose_run_is_gone_gets_no_speed(tmp_path, capsys):
    config = CompareConfig(
        methods=("mappo",), seeds=1, points=(0.9,), out=tmp_path, **SETTINGS | {"speed": True}
    )
    row = {"task": "digits", "method": "mappo", "point": 0.9, "alpha": 0.1, "speedup": None}
    row |= {"commit": commit(), "hardware": hardware(torch.device("cpu"))}
    records = Records(tmp_path / "records.jsonl")
    records.put(dict.fromkeys(FIELDS, 0) | row)
    records.put(dict.fromkeys(FIELDS, 0) | row | {"seed": 1, "speedup": 2.0, "timed": "before"})
    # a speed of another process is not kept either
    assert [row["speedup"] for row in compare(config) if row["method"] == "mappo"] == [None, None]
    assert "mappo, seed 0 can't be timed" in capsys.readouterr().out


def test_a_bound_is_judged_on_few_images(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("prunevit.benchmarks.methods.untrained.ORACLE_IMAGES", 3)
    methods = ("oracle", "oracle-no-labels")
    config = CompareConfig(methods=methods, points=(0.5,), out=tmp_path, **SETTINGS)
    for row in compare(config)[1:]:
        assert row["images"] == sum(row["left"]) == 3
        assert row["dense_accuracy"] * 3 == pytest.approx(round(row["dense_accuracy"] * 3))
        assert row["gmacs"] == pytest.approx(bench.gmacs_at(0.5), rel=0.01)
    bound = METHODS["oracle"].open(bench, 0)
    assert bound.make is None
    images, labels = bench.validation.load(range(2))
    search = bound.search({"tokens": [6, 3]})
    told, other = search(images, labels), search(images, (labels + 1) % 10)
    assert told.alive.sum(2).tolist() == [[6, 3]] * 2
    assert not torch.equal(told.alive, other.alive)  # it looks at the labels


# --- trainings of their own kind ---


@pytest.mark.learning
def test_the_backbone_is_fine_tuned_once_under_ours(bench, monkeypatch):
    tiny = {"epochs": 1, "epoch_size": 64, "batch_size": 32, "validation_size": 20}
    bench = replace(bench, task=replace(bench.task, points=(0.8,), fine_tuning=tiny))
    name = "mappo-fine-tuned"
    assert METHODS[name].fine_tunes
    spread_run(bench.runs)
    method = METHODS[name].open(bench, 0)
    knobs = method.tune(bench.gmacs_at(0.8))
    model = method.make(knobs)
    before = bench.model.blocks[-1].mlp.fc1.weight
    assert not torch.equal(model.backbone.model.blocks[-1].mlp.fc1.weight, before)
    # what runs before the first stage stays as it was
    assert torch.equal(
        model.backbone.model.blocks[0].attn.qkv.weight, bench.model.blocks[0].attn.qkv.weight
    )
    monkeypatch.setattr(learned.finetune, "train", None)  # not called again
    assert METHODS[name].open(bench, 0).tune(bench.gmacs_at(0.8)) == knobs
    other = replace(bench, task=replace(bench.task, fine_tuning=tiny | {"batch_size": 16}))
    with pytest.raises(ValueError, match=r"other settings \(batch_size 32 for 16\)"):
        METHODS[name].open(other, 0).tune(bench.gmacs_at(0.8))


@pytest.mark.learning
@pytest.mark.parametrize("name", ["attention-fine-tuned", "evit-fine-tuned"])
def test_the_backbone_is_fine_tuned_once_under_a_top_k(bench, monkeypatch, name):
    tiny = {"epochs": 1, "epoch_size": 64, "batch_size": 32, "validation_size": 20}
    bench = replace(bench, task=replace(bench.task, points=(0.5, 0.6, 0.7), fine_tuning=tiny))
    assert METHODS[name].fine_tunes
    frozen = METHODS[{"evit-fine-tuned": "evit-unfused"}.get(name, "attention")].open(bench, 0)
    method = METHODS[name].open(bench, 3)
    target = bench.gmacs_at(0.5)
    knobs = method.tune(target)
    model = method.make(knobs)
    spent = evaluate(model, bench.validation, bench.size).gmacs
    assert spent == pytest.approx(target, rel=0.01)
    assert type(model) is type(frozen.make(knobs))
    blocks = model.backbone.model.blocks
    assert torch.equal(blocks[0].attn.qkv.weight, bench.model.blocks[0].attn.qkv.weight)
    assert not torch.equal(blocks[-1].mlp.fc1.weight, bench.model.blocks[-1].mlp.fc1.weight)
    start = PrunedViT.from_pretrained(bench.runs / f"{name}-start")
    assert start.policy.score == "attention"
    middle = learned.nearest_knobs(frozen, bench.gmacs_at(0.6))
    assert list(start.policy.tokens) == list(middle["tokens"])
    # the same fine-tuning as ours
    written = json.loads((bench.runs / f"{name}-3" / "config.json").read_text())
    assert written == written | tiny | {"seed": 3, "alpha": None, "dataset": "digits"}
    monkeypatch.setattr(learned.finetune, "train", None)  # not called again
    assert METHODS[name].open(bench, 3).tune(target) == knobs


def test_what_is_fine_tuned_is_what_was_chosen_on_validation(bench, monkeypatch):
    class BegunError(Exception):
        pass

    def begin(config):
        assert (config.alpha, config.dither) == (0.07, True)
        raise BegunError

    monkeypatch.setattr(learned.finetune, "train", begin)
    ours = Method(lambda gmacs: {"alpha": 0.07, "dither": True}, None)
    monkeypatch.setattr(learned, "mappo", lambda *_: ours)
    with pytest.raises(BegunError):
        METHODS["mappo-fine-tuned"].open(bench, 0).tune(bench.gmacs_at(0.95))


@pytest.mark.learning
def test_each_operating_point_has_a_training_of_its_own(bench):
    spread_run(bench.runs)
    method = METHODS["mappo-each-price"].open(bench, 0)
    knobs = method.tune(bench.gmacs_at(0.95))
    assert knobs["run"] == "mappo-each-price-95-0"
    config = json.loads((bench.runs / knobs["run"] / "config.json").read_text())
    low, high = bench.task.alpha_range
    assert low / 8 <= config["alpha"] <= high * 8
    assert knobs["alpha"] == config["alpha"]
    assert "alpha" not in config["observation"]
    assert method.make(knobs).policy.threshold == knobs["threshold"]


@pytest.mark.learning
@pytest.mark.parametrize(("name", "knob"), [("ltmp", "prune_thresholds"), ("diffrate", "schedule")])
def test_rivals_are_trained_once_for_each_operating_point(bench, monkeypatch, name, knob):
    method = METHODS[name].open(replace(bench, iterations=8), 0)
    found = {point: method.tune(bench.gmacs_at(point)) for point in (0.4, 0.7)}
    for point, knobs in found.items():
        spent = evaluate(method.make(knobs), bench.validation, bench.size).gmacs
        assert spent == pytest.approx(bench.gmacs_at(point), rel=0.01)
        folder = bench.runs / f"{name}-{100 * point:g}-0"
        assert json.loads((folder / "config.json").read_text())["compute"] == point
    assert found[0.4][knob] != found[0.7][knob]
    monkeypatch.setattr("prunevit.benchmarks.methods.each_point.batches", None)  # not called again
    assert method.tune(bench.gmacs_at(0.4)) == found[0.4]
    with pytest.raises(ValueError, match=r"other settings \(iterations 8 for 9\)"):
        METHODS[name].open(replace(bench, iterations=9), 0).tune(bench.gmacs_at(0.4))


@pytest.mark.learning
def test_dynamic_vit_takes_part_with_and_without_its_backbone(bench):
    bench = replace(bench, task=replace(bench.task, dynamic_vit={"batch_size": 8}, dithers=True))
    # the backbone begins to learn after a sixth of the training
    for name, iterations in (
        ("dynamic-vit", 1),
        ("dynamic-vit-merge", 1),
        ("dynamic-vit-narrow", 1),
        ("dynamic-vit-fine-tuned", 6),
    ):
        method = METHODS[name].open(replace(bench, iterations=iterations), 0)
        knobs = method.tune(bench.gmacs_at(0.5))
        for dither in (False, True):
            model = method.make(knobs | {"dither": dither})
            spent = evaluate(model, bench.validation, bench.size).gmacs
            assert spent == pytest.approx(bench.gmacs_at(0.5), rel=0.01)
            assert model.policy.dither == dither
            assert model.policy.hidden == (32 if name == "dynamic-vit-narrow" else 128)
            assert (model.backbone.on_prune == "merge") == (name == "dynamic-vit-merge")
        assert "dither" in knobs
        learns = not torch.equal(
            model.backbone.model.blocks[-1].mlp.fc1.weight, bench.model.blocks[-1].mlp.fc1.weight
        )
        assert learns == METHODS[name].fine_tunes
    config = json.loads((bench.runs / "dynamic-vit-50-0" / "config.json").read_text())
    assert config["iterations"] == SETTINGS["iterations"]
    assert config["batch_size"] == 8
    # trained for what costs the point, predictors included
    policy = dynamic_vit_policy(bench.backbone, config["keep"], None)
    found = evaluate(PrunedViT(bench.backbone, policy), bench.validation, bench.size)
    assert found.gmacs == pytest.approx(bench.gmacs_at(0.5), rel=0.02)


@pytest.mark.learning
def test_dynamic_vit_keeps_numbers_of_patches_where_a_share_would_not_do(bench):
    """Where one share for all stages misses the point, or leaves no patch."""
    bench = replace(bench, task=replace(bench.task, dynamic_vit={"batch_size": 8}), iterations=1)
    method = METHODS["dynamic-vit"].open(bench, 0)
    images = bench.validation.load(range(4))[0]
    counted = 0
    policy = dynamic_vit_policy(bench.backbone, 0.12, None)
    # a share of 0.12 leaves 7 of 64 patches, then none
    least = learned.dynamic_vit_gmacs(bench.backbone, policy, (7, 0))
    for gmacs in (least, *map(bench.gmacs_at, (0.21, 0.22, 0.23, 0.24))):
        knobs = method.tune(gmacs)
        kept = method.make(knobs).trace(images).alive.sum(2)
        assert kept.min() > 0
        if "tokens" in knobs:
            counted += 1
            assert kept.tolist() == [knobs["tokens"]] * 4
    assert counted


def test_every_ablation_changes_one_thing(bench):
    settings = {name: recipe.settings(bench) for name, recipe in RECIPES.items()}
    ours = settings["mappo"]
    assert bench.base.critic == "central"  # MAPPO
    assert settings["rloo"] == ours | {"critic": "none"}
    between = {"prune_before": (1, 3), "prune_at": "block"}
    assert settings["between-blocks"] == ours | between
    assert settings["one-stage"] == ours | {"prune_before": bench.task.prune_before[:1]}
    assert settings["no-attention-prior"] == ours | {"attention_prior": 0.0}
    for field, name in (("stage", "no-stage"), ("cls", "no-class-token")):
        rest = tuple(other for other in ours["observation"] if other != field)
        assert settings[name] == ours | {"observation": rest}
    assert settings["no-image-baseline"]["rollouts_per_image"] == 1
    assert settings["ippo"]["critic"] == "local"
    assert settings["no-team-reward"]["reward"] == "markov-game"
    observation = (*ours["observation"][:-1], "redundancy", "alpha")
    assert settings["redundancy"] == ours | {"observation": observation}
    assert settings["merge"] == ours | {"on_prune": "merge"}
    assert settings["actor-attention"] == ours | {"actor_attention": 2}
    assert settings["larger-actor"] == ours | {"hidden": (128,)}
    assert settings["three-stages"] == ours | {"prune_before": (0, 1, 3)}
    assert settings["released"]["prune_before"] == bench.task.released_stages
    assert settings["released-faster"] == settings["released"] | {"lr": 5e-4}
    for changes in settings.values():
        replace(bench.base, **changes)  # raises where settings don't go together


def test_what_ours_has_on_a_task_its_variants_have_too_and_others_have_not(bench):
    merging = replace(bench, task=replace(bench.task, ours={"on_prune": "merge"}))
    for name, recipe in RECIPES.items():
        others = name in ("paper", "released", "released-faster", "drop")
        wanted = {"on_prune": "drop" if others else "merge"}
        assert recipe.settings(merging) == recipe.settings(bench) | wanted


def test_a_task_has_its_stages_inside_of_blocks_or_between_them(bench, monkeypatch):
    """Every method then prunes there, or where it comes nearest to that."""
    inside, config = bench, CompareConfig(**SETTINGS)
    monkeypatch.setitem(TASKS, "digits", replace(bench.task, prune_before=(1, 3), prune_at="block"))
    bench = open_benchmark(config)
    assert inside.backbone.edges[:-1] == (1, 5)
    assert bench.backbone.edges[:-1] == (2, 6)
    assert settings_of(config, inside)["prune_at"] == "mlp"
    assert "prune_at" not in settings_of(config, bench)  # as in records of before
    for name, recipe in RECIPES.items():
        trained = replace(inside.base, **recipe.settings(inside))
        between = name.startswith("released") or name == "between-blocks"
        assert trained.prune_at == ("block" if between else "mlp")
    keep = learned.share_to_keep(inside, inside.gmacs_at(0.5))
    assert keep > learned.share_to_keep(bench, bench.gmacs_at(0.5))
    target = inside.gmacs_at(0.5)
    for name in ("attention", "ats", "evit", "tome"):
        method = METHODS[name].open(inside, 0)
        try:
            knobs = method.tune(target)
        except UnreachableError as error:
            knobs = error.nearest
        found = evaluate(method.make(knobs), inside.validation, inside.size)
        assert found.gmacs == pytest.approx(target, rel=0.03)
        assert 1 > found.kept[0] >= found.kept[1]


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.embeds])
def test_a_training_of_dynamic_vit_computes_about_as_much_as_ours(name):
    task = TASKS[name]
    ours, theirs = MappoConfig(**task.training), DynamicViTConfig(**task.dynamic_vit)
    mean = sum(task.points) / len(task.points)  # what a pruned pass costs, of the dense one
    passes = ours.iterations * ours.num_envs * (1 / ours.rollouts_per_image + mean)
    # the teacher, the masked model, and its backward pass
    assert theirs.iterations * theirs.batch_size * 4 > 0.8 * passes


def test_released_has_the_numbers_of_the_code(bench):
    """Those of github.com/LuErShuai/rl4evit at 5847406."""
    settings = RECIPES["released"].settings(bench)
    numbers = {
        "lr": 5e-6, "epochs": 4, "entropy": 0.01, "gamma": 0.99, "hidden": (64, 256, 64),
        "critic_hidden": (64, 256, 64), "lr_schedule": "constant", "reward": "released-code",
    }  # fmt: skip
    assert settings == settings | numbers
    assert bench.base.num_envs / settings["minibatches"] == 16  # episodes a step
    assert bench.base.clip == 0.2


def test_fine_tuned_rivals_see_as_many_images_as_ours(bench, monkeypatch):
    seen = []
    monkeypatch.setattr(learned, "train_dynamic_vit", seen.append)
    method = METHODS["dynamic-vit-fine-tuned"].open(replace(bench, iterations=None), 0)
    with pytest.raises(SavedModelError, match="no finished run"):  # nothing was trained
        method.tune(bench.gmacs_at(0.5))
    ours = FinetuneConfig(run=Path(), **bench.task.fine_tuning)
    images = seen[0].iterations * seen[0].batch_size
    assert 0 <= images - ours.epochs * ours.epoch_size < seen[0].batch_size


def test_a_recipe_is_as_long_as_it_says_unless_told_otherwise(bench):
    assert "iterations" not in RECIPES["released"].settings(bench)
    free = replace(bench, iterations=None, base=replace(bench.base, iterations=400))
    assert RECIPES["released"].settings(free)["iterations"] == 200
    assert RECIPES["mappo"].settings(free)["iterations"] == 400
    assert RECIPES["longer"].settings(free)["iterations"] == 800
    assert RECIPES["longer"].settings(bench)["iterations"] == 2 * bench.base.iterations


def test_the_command_prints_the_most_accurate_first(monkeypatch, capsys):
    rows = [
        {
            "method": name,
            "point": 0.4,
            "accuracy": accuracy,
            "dense_accuracy": 0.95,
            "speedup": None,
        }
        for name, accuracy in (("norm", 0.8), ("tome", 0.9))
    ]
    monkeypatch.setattr(comparison, "compare", lambda config: rows)
    main([])
    dense, *lines = capsys.readouterr().out.splitlines()
    assert dense == "dense: 95.00"
    assert lines[2:] == [
        f"| {METHODS[name].title} | {percent}.00 |"
        for name, percent in (("tome", 90), ("norm", 80))
    ]


@pytest.mark.parametrize("on_prune", ["drop", "merge"])
def test_a_title_says_who_merges(on_prune):
    rows = pd.DataFrame({"on_prune": ["drop", on_prune]})
    for name, is_told in (("mappo", True), ("merge", False), ("attention-merge", False)):
        more = ", merging what it prunes" if is_told and on_prune == "merge" else ""
        assert comparison.title_of(name, rows) == METHODS[name].title + more
    assert comparison.title_of("mappo", rows[:0]) == METHODS["mappo"].title


# --- what is refused ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--methods mapo", "unknown methods mapo: there are norm"),
        ("--seeds 0", "seeds=0"),
        ("--points 1.5", r"points=(1.5,) must be"),
        ("--task cifar10", "where are its images? Give --data"),
        ("--task cifar10 --data folder:x", "needs a trained backbone: give --checkpoint"),
        ("--task cifar10 --data folder:x --checkpoint y", "no checkpoint y"),
        ("--checkpoint y", "no checkpoint y"),
    ],
)
def test_bad_input_is_refused_at_once(line, message, refusal):
    assert message in refusal(main, line.split())


def test_a_folder_of_another_task_is_refused(tmp_path):
    (tmp_path / "records.jsonl").write_text("")
    compare_again = CompareConfig(out=tmp_path, methods=("attention",), points=(0.4,), **SETTINGS)
    rows = compare(compare_again)
    assert rows[1]["task"] == "digits"
    with pytest.raises(SystemExit, match=r"other settings \(task digits for cifar10\)"):
        main(["--task", "cifar10", "--out", str(tmp_path)])


def test_validation_images_can_judge():
    bench = open_benchmark(CompareConfig(split="validation", **SETTINGS))
    assert bench.test.sources.equal(bench.validation.sources)


def test_records_of_other_settings_are_refused(tmp_path):
    config = CompareConfig(out=tmp_path, methods=("attention",), points=(0.4,), **SETTINGS)
    compare(config)
    for change, named in (
        ({"eval_size": 13}, "eval_size 12 for 13"),
        ({"test_size": 15}, "test_size 16 for 15"),
        ({"iterations": 2}, "iterations 1 for 2"),
        ({"split": "validation"}, "split test for validation"),
        ({"checkpoint": ASSETS / "digits_vit.safetensors"}, "weights None for"),
    ):
        with pytest.raises(ValueError, match=rf"other settings \({named}"):
            compare(replace(config, **change))


@pytest.mark.parametrize(
    "change", [{"commit": "0" * 7}, {"hardware": "an abacus"}, {"commit": None}]
)
def test_records_of_another_commit_or_machine_are_refused(tmp_path, change):
    config = CompareConfig(out=tmp_path, methods=("attention",), points=(0.4,), **SETTINGS)
    rows = compare(config)
    assert compare(config) == rows
    Records(tmp_path / "records.jsonl").put(rows[1] | change)
    (name, other) = next(iter(change.items()))
    with pytest.raises(ValueError, match=re.escape(f"({name} {other} for {rows[1][name]})")):
        compare(config)


@pytest.mark.parametrize(("text", "why"), [('{"seed"', "delimiter"), ("[]", "no JSON object")])
def test_a_run_with_damaged_settings_is_named(tmp_path, text, why):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config.json is damaged: .*{why}"):
        learned.is_trained(tmp_path, {})


@pytest.mark.parametrize("change", [{"prune_at": "block"}, {"on_prune": "merge"}])
def test_a_fine_tuned_model_of_other_stages_is_refused(bench, tmp_path, change):
    where = {"prune_before": (0, 2), "prune_at": "mlp"}
    for folder, more in (("same", {}), ("other", change)):
        staged = StagedViT(bench.model, **where | more)
        PrunedViT(staged, TopK((9, 3), "norm")).save_pretrained(tmp_path / folder / "model")
    found = learned.fine_tuned_model(bench, tmp_path / "same").backbone
    assert found.edges == bench.backbone.edges
    with pytest.raises(ValueError, match="other holds a model that prunes elsewhere"):
        learned.fine_tuned_model(bench, tmp_path / "other")


def test_runs_may_lie_elsewhere(tmp_path):
    config = CompareConfig(out=tmp_path, runs=tmp_path / "trained", **SETTINGS)
    assert open_benchmark(config).runs == tmp_path / "trained"
