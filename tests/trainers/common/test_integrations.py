"""What the runners of other libraries share: their actors as ours, their runs as pruned ViTs, and
how their commands refuse wrong settings.
"""

import json
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import nn

from prunevit.agents.policies.actor_critic import Actor
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.trainers.common import backbones, integrations
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


def test_a_run_can_start_from_weights_that_timm_downloads(tmp_path, monkeypatch):
    asked, create = [], backbones.create_backbone

    def create_offline(*arguments, pretrained, **options):
        asked.append(pretrained)
        return create(*arguments, **options)

    monkeypatch.setattr(integrations, "RUNS", tmp_path)
    monkeypatch.setattr(backbones, "create_backbone", create_offline)
    LibraryRun(Config(run_name="one", device="cpu", pretrained=True)).create()
    assert asked == [True]
    assert json.loads((tmp_path / "one" / "config.json").read_text())["pretrained"] is True


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


MARKS = {
    "sb3": (),
    "rllib": (pytest.mark.integration("rllib"),),
    "benchmarl": (
        pytest.mark.integration("benchmarl"),
        pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
    ),
}


def for_libraries(*rows):
    """Parametrises a test by rows that begin with the library."""
    return [pytest.param(*row, marks=MARKS[row[0]]) for row in rows]


def run(library, *arguments):
    """Runs a library's command until it refuses; returns what it exits with."""
    with pytest.raises(SystemExit) as ended:
        import_module(f"prunevit.trainers.{library}").main(arguments)
    return ended.value.code


@pytest.mark.parametrize(
    ("library", "flag", "value", "message"),
    for_libraries(
        *((library, "--images", "0", "images=0 must be at least 1") for library in MARKS),
        ("rllib", "--num-env-runners", "-1", "num_env_runners=-1 must be at least 0"),
        ("benchmarl", "--minutes", "-1", "minutes=-1.0 must be greater than 0"),
    ),
)
def test_a_command_refuses_values_out_of_range(capsys, library, flag, value, message):
    assert run(library, flag, value) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("library", "arguments", "message"),
    for_libraries(
        *((library, ["--reward", "fame"], "fame") for library in MARKS),
        *((library, ["--prune-before", "99"], "99") for library in MARKS),
        ("rllib", ["--images", "7", "--num-env-runners", "2"], "images=7 must be a multiple"),
    ),
)
def test_a_command_ends_in_one_line(tmp_path, monkeypatch, library, arguments, message):
    monkeypatch.setattr(integrations, "RUNS", tmp_path)
    said = run(library, *arguments)
    assert said.startswith("error: ")
    assert message in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", for_libraries(*((library,) for library in MARKS)))
def test_a_command_does_not_overwrite_a_runs_folder(tmp_path, monkeypatch, library):
    monkeypatch.setattr(integrations, "RUNS", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert "give another --run-name" in run(library, "--run-name", "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
