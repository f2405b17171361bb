"""Iterations are timed in parts, beside the forward passes that they need."""

import json

import pytest
import torch

from prunevit.benchmarks.speed import train_speed
from prunevit.benchmarks.speed.train_speed import (
    TimedTrainer,
    TrainSpeedConfig,
    main,
    table,
    to_record,
)
from prunevit.trainers.common.config import MappoConfig

TINY = {"num_envs": 8, "rollouts_per_image": 4, "prune_before": (1, 3), "hidden": (8,)}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def timed(vit, some_images):
    return TimedTrainer(MappoConfig(**TINY, keep_bias=0.5), vit, some_images)


def test_the_bare_forward_runs_the_iterations_own_tokens(timed, monkeypatch):
    rows = {"iteration": [], "bare": []}
    backbone = timed.game.backbone
    advance, finish = backbone.advance, backbone.finish
    logits = {}

    def spy(name):
        def run(*args, **kwargs):
            tokens = advance(*args, **kwargs)
            rows[name].append(len(tokens.x))
            return tokens

        def end(tokens):
            logits[name] = finish(tokens)
            return logits[name]

        monkeypatch.setattr(backbone, "advance", run)
        monkeypatch.setattr(backbone, "finish", end)

    spy("iteration")
    timed.iterate()
    spy("bare")
    assert timed.forward()["seconds"] > 0
    assert len(rows["bare"]) == 4  # the dense pass, then ours
    assert rows["bare"] == rows["iteration"]
    torch.testing.assert_close(logits["bare"], logits["iteration"])


def test_decisions_and_kept_tokens_are_counted(timed):
    figures = timed.iterate()
    first, _ = timed.game.keeps
    assert figures["decisions"] == first.numel() + int(first.sum())
    assert figures["kept"] == pytest.approx(float(first.float().mean()))


def test_a_record_has_medians_and_the_ratios_of_rounds():
    def rounds(*seconds):
        return [{"seconds": s, "decisions": 100.0, "kept": 0.5} for s in seconds]

    # the last round is twice as slow for all
    both = zip(rounds(2, 4, 8), rounds(1, 2, 4), strict=True)
    turns = [{"ours": ours, "forward": forward} for ours, forward in both]
    record = to_record("ours", turns, episodes=8)
    assert record["seconds"] == 4
    assert record["over_forward"] == 2
    assert record["images_per_second"] == 2
    assert record["decisions_per_second"] == 25


def test_the_command_measures_and_writes(vit, some_images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_speed, "load_backbone", lambda settings: vit)
    monkeypatch.setattr(train_speed, "open_images", lambda *_, **__: some_images)
    out = tmp_path / "deep" / "speed.json"
    main(
        ["--after", "3", "--rounds", "1", "--num-envs", "8", "--threads", "1", "--out", str(out)]
    )  # fmt: skip
    rows = json.loads(out.read_text())
    assert [(row["after"], row["variant"]) for row in rows] == [(3, "ours"), (3, "forward")]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(8 / row["seconds"])
        assert 16 * 8 <= row["decisions_per_second"] * row["seconds"] <= 2 * 16 * 8
        assert row["peak_memory"] > 50 * 2**20
    ours, forward = rows
    assert forward["over_forward"] == 1
    assert ours["over_forward"] == pytest.approx(ours["seconds"] / forward["seconds"])
    assert capsys.readouterr().out.strip() == table(rows)


def test_noise_keeps_half_of_its_tokens():
    config = TrainSpeedConfig(tokens=64, num_envs=8, prune_before=(1, 2, 3))
    timed = train_speed.set_up(config)
    timed.iterate()
    alive = torch.stack(timed.game.keeps).all(0)
    assert timed.env.num_agents == 64
    assert float(alive.float().mean()) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "rounds=0"),
        (["--num-envs", "12"], "num_envs"),
        (["--tokens", "60"], "tokens=60: a square number"),
        (["--after", "401"], "after=401 must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(refusal, arguments, message):
    assert message in refusal(main, arguments)
