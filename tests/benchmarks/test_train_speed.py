import json
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from prunevit.benchmarks import train_speed
from prunevit.benchmarks.iterations import Cell, WatchedTrainer, measure_cell
from prunevit.benchmarks.train_speed import TrainSpeedConfig, cells, check, main
from prunevit.trainers.common.config import MappoConfig

TINY = {"num_envs": 8, "rollouts_per_image": 4, "prune_before": (1, 3), "hidden": (8,)}
PEERS = "prunevit.benchmarks.peers.iterations_benchmarl"
SMALL = ["--after", "0", "3", "--rounds", "1", "--num-envs", "8", "--threads", "1"]


@pytest.fixture
def watched(vit, some_images):
    return WatchedTrainer(MappoConfig(**TINY, keep_bias=0.5), vit, some_images)


def test_the_parts_are_the_whole(watched):
    for _ in range(2):  # the first begins with what is done once
        parts = watched.iterate()
    assert min(vars(parts).values()) > 0
    assert parts.total == sum(vars(parts).values())
    assert watched.trainer.iteration == 2


def test_the_bare_forward_runs_the_iterations_own_tokens(watched, monkeypatch):
    rows = {"iteration": [], "bare": []}
    backbone = watched.game.backbone
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
    watched.iterate()
    spy("bare")
    assert watched.bare_forward() > 0
    assert len(rows["bare"]) == 4  # the dense pass, then ours
    assert rows["bare"] == rows["iteration"]
    torch.testing.assert_close(logits["bare"], logits["iteration"])


def test_decisions_and_kept_are_counted(watched):
    watched.iterate()
    first, last = watched.played.keeps
    assert watched.played.decisions == first.numel() + int(first.sum())
    shares = [float(first.float().mean()), float((first & last).float().mean())]
    assert watched.played.kept == pytest.approx(shares)


def test_the_command_measures_and_writes(vit, some_images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_speed, "load_backbone", lambda settings: vit)
    monkeypatch.setattr(train_speed, "open_images", lambda *_, **__: some_images)
    monkeypatch.setitem(train_speed.USUAL, "batch", 8)
    monkeypatch.setattr(train_speed, "in_a_process", lambda cell: vars(cell) | measure_cell(cell))
    out = tmp_path / "deep" / "speed.json"
    grid = ["--grid", "--tokens", "16", "--batches", "8", "--stages", "2", "--grid-rounds", "1"]
    main([*SMALL, "--peers", "straw", "like-benchmarl", *grid, "--out", str(out)])
    records = json.loads(out.read_text())
    rows = {(row["after"], row["variant"]): row for row in records["variants"]}
    assert list(rows) == [
        (after, variant)
        for after in (0, 3)
        for variant in ("ours", "forward", "straw", "like-benchmarl")
    ]
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(8 / row["seconds"])
        assert 16 * 8 <= row["decisions_per_second"] * row["seconds"] <= 2 * 16 * 8
        assert ("update" in row) == (row["variant"] in ("ours", "like-benchmarl"))
    ours = rows[0, "ours"]
    assert ours["over_ours"] == 1
    assert ours["over_forward"] * rows[0, "forward"]["over_ours"] == pytest.approx(1)
    assert [(cell["tokens"], cell["batch"], cell["stages"]) for cell in records["grid"]] == [
        (16, 8, 2), (64, 8, 2)
    ]  # fmt: skip
    assert all(cell["memory"] > 50 * 2**20 for cell in records["grid"])
    shown = capsys.readouterr().out
    assert "after 3 iterations, 8 episodes each" in shown
    assert shown.count("straw") == 2


def test_a_cell_keeps_what_it_should(monkeypatch):
    kept = []
    iterate = WatchedTrainer.iterate

    def watch(watched):
        parts = iterate(watched)
        kept.append(watched.played.kept[-1])
        return parts

    monkeypatch.setattr(WatchedTrainer, "iterate", watch)
    for stages in (1, 3):
        measure_cell(Cell(64, 8, stages, 0.5, 1, "cpu", 1))
    assert kept == pytest.approx([0.5] * 4, abs=0.08)


def test_the_grid_has_each_cell():
    config = TrainSpeedConfig(tokens=(64, 256), batches=(32, 64), stages=(1, 7))
    sizes = [(cell.tokens, cell.batch, cell.stages) for cell in cells(config)]
    assert sizes == [
        (64, 32, 2), (64, 64, 2), (256, 32, 2), (256, 64, 2), (64, 256, 1), (64, 256, 7)
    ]  # fmt: skip


def test_a_library_that_is_missing_is_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, PEERS, None)
    config = train_speed.without_missing(TrainSpeedConfig())
    assert config.peers == ("straw", "like-benchmarl")
    assert "benchmarl is left out" in capsys.readouterr().err


def test_a_cell_that_is_killed_is_named_and_the_rest_measured(monkeypatch, capsys):
    def die(cell):
        if cell.tokens == 64:
            raise BrokenProcessPool
        return vars(cell) | {"seconds": 2, "forward_seconds": 1, "memory": 2**30}

    monkeypatch.setattr(train_speed, "in_a_process", die)
    monkeypatch.setattr(train_speed, "measure", lambda config: [])
    main(["--grid", "--tokens", "64", "256", "--batches", "32", "--stages", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["64", "256", "64"]
    assert "was killed" in lines[-3]
    assert "2.00x" in lines[-2]


@pytest.mark.integration("benchmarl")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_benchmarl_takes_turns_on_the_same_game(vit, some_images):
    from prunevit.benchmarks.peers.iterations_benchmarl import iterate

    config = MappoConfig(**TINY | {"num_envs": 12}, device="cpu")
    turns = []
    iterate(config, vit, some_images, 0.9, 3, turns.append)
    assert len(turns) == 3
    for turn in turns:
        assert turn.seconds > 0
        assert turn.kept == pytest.approx(0.9, abs=0.08)
        assert turn.decisions == pytest.approx(12 * 16 * (1 + turn.kept))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "rounds=0: at least 1"),
        (["--num-envs", "12"], "12 episodes an iteration: a multiple of 8"),
        (["--batches", "32", "4"], "4 episodes an iteration"),
        (["--tokens", "60"], "square numbers"),
        (["--stages", "8"], "stages=(8,)"),
        (["--after", "499"], "after=(499,)"),
        (["--after", "5", "1"], "after=(5, 1): ascending"),
        (["--after", "0", "10", "--rounds", "9"], "after=(0, 10): ascending, and 11 apart"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert str(ended.value.code).startswith("error: ")
    assert message in str(ended.value.code)


def test_the_defaults_make_sense():
    check(TrainSpeedConfig())


@pytest.mark.stress
def test_a_cell_of_a_fresh_process():
    cell = train_speed.in_a_process(Cell(16, 8, 2, 0.5, 1, "cpu", 1))
    assert 50 * 2**20 < cell["memory"] < 8 * 2**30
    assert cell["seconds"] > 0
