"""What the runners of other libraries share: their actors as ours, their runs as pruned ViTs."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from prunevit.agents.policies.actor_critic import Actor
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.trainers.common import integrations
from prunevit.trainers.common.integrations import LibraryConfig, LibraryRun, token_actor
from prunevit.trainers.common.run import TrainingError


@dataclass
class Config(LibraryConfig):
    library = "some"

    @property
    def learner(self):
        return "ppo"


@torch.no_grad()
@pytest.mark.parametrize("hidden", [(), (8,), (8, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_an_actor_scores_as_before(hidden, affine):
    actor = Actor(12, 2, hidden)
    if not affine:
        actor.net[0] = nn.LayerNorm(12, elementwise_affine=False, eps=0.1)
    for parameter in actor.parameters():
        parameter.normal_()
    wrapped = nn.Sequential(nn.Sequential(actor.net[0], nn.Identity()), actor.net[1:])
    seen = 3 * torch.randn(50, 12)
    own = token_actor(wrapped)
    torch.testing.assert_close(own(seen), actor(seen))
    assert own.hidden == hidden


@pytest.mark.parametrize(
    "actor",
    [
        nn.Sequential(nn.Linear(4, 2)),
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 2)),
    ],
)
def test_other_networks_are_refused(actor):
    with pytest.raises(TypeError, match="LayerNorm"):
        token_actor(actor)


def test_a_run_becomes_a_pruned_vit(tmp_path, monkeypatch):
    monkeypatch.setattr(integrations, "RUNS", tmp_path)
    monkeypatch.setattr(
        "prunevit.envs.data.cluttered_digits.DEFAULT_SIZES", dict.fromkeys(("train", "test"), 64)
    )
    run = LibraryRun(Config(run_name="one", device="cpu", hidden=(8,)))
    run.create()
    torch.manual_seed(0)
    actor = Actor(run.staged.width * 2 + run.staged.num_stages + 1, 2, (8,))
    nn.init.normal_(actor.net[-1].weight)
    results = run.conclude(actor, rounds=3)
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["rounds"] == 3
    assert report["policies"]["ppo"]["accuracy"] == results["ppo"].accuracy

    pruned = PrunedViT.from_run(tmp_path / "one")
    images = torch.randn(4, 1, 64, 64)
    with torch.no_grad():
        _, keep = pruned(images, return_keep=True)
        torch.testing.assert_close(
            pruned.policy.actor.net[-1].weight, actor.net[-1].weight, rtol=0, atol=0
        )
    assert 0 < keep.float().mean() < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 0}, "images=0 must be at least 1"),
        ({"lr": -1.0}, "lr=-1.0 must be greater than 0"),
        ({"observation": ("token", "alpha")}, "observation=alpha"),
        ({"run_name": "."}, "give another --run-name"),
    ],
)
def test_wrong_settings_are_refused(settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr(integrations, "RUNS", tmp_path)
    (tmp_path / "mine.txt").touch()
    with pytest.raises((ValueError, TrainingError), match=message):
        LibraryRun(Config(**settings))
