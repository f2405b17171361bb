"""The game's speed is measured, its adapters' too."""

import json

import pytest
import torch

from prunevit.benchmarks.speed.env_speed import adapters, alive_before, main
from prunevit.envs.game import TokenGame
from prunevit.extras import is_installed


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.stress
def test_every_adapter_is_measured_beside_the_bare_game(tmp_path, capsys):
    file = tmp_path / "speed.json"
    main(
        [
            "--backbone", "test_vit", "--images", "1", "2", "--rounds", "1", "--threads", "1",
            "--device", "cpu", "--out", str(file),
        ]
    )  # fmt: skip
    figures = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == figures
    assert (figures["backbone"], figures["threads"]) == ("test_vit", 1)
    names = {"TokenGame", "BatchedTokenPrune", "gymnasium vector, tensors", "sb3"}
    alone = {"pettingzoo", "epymarl"}
    if is_installed("ray"):
        names.add("rllib")
    if is_installed("torchrl"):
        names.add("torchrl")
        alone.add("torchrl, PettingZooWrapper")
    assert figures["adapters"]["1"].keys() == names | alone
    assert figures["adapters"]["2"].keys() == names
    for rows in figures["adapters"].values():
        assert rows["TokenGame"]["over_bare_game"] == 1
        assert all(row["decisions_per_second"] > 0 for row in rows.values())


def test_only_living_agents_decide():
    keeps = torch.tensor([[[1, 0, 1]], [[1, 1, 0]], [[0, 0, 0]]])
    assert alive_before(keeps).tolist() == [[[1, 1, 1]], [[1, 0, 1]], [[1, 0, 0]]]


@pytest.mark.parametrize("batch", [1, 3])
def test_every_adapter_plays_the_same_episodes(monkeypatch, vit, some_images, batch):
    keeps = torch.randint(2, (2, batch, 16), generator=torch.Generator().manual_seed(0))
    played = []
    step = TokenGame.step

    def noted(game, keep):
        played.append(keep.clone())
        return step(game, keep)

    monkeypatch.setattr(TokenGame, "step", noted)
    players = adapters(vit, some_images, keeps, {"prune_before": (1, 3)})
    for name, play in players.items():
        play()
        first, second = played
        assert torch.equal(first, keeps[0] == 1), name
        # the pruned may say what they like
        assert torch.equal(first & second, keeps.all(0)), name
        played.clear()
