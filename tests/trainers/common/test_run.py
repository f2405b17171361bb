"""Run folders of other versions: those of 0.1.0 go on, those of newer ones are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prunevit import __version__
from prunevit.envs.data import cluttered_digits
from prunevit.trainers import mappo
from prunevit.trainers.common.checkpoint import CheckpointError
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.integrations import LibraryConfig
from prunevit.trainers.common.recipe import Recipe
from prunevit.trainers.common.run import RunFolder, device_of, iteration_seed, open_run

TRAIN_SIZE = 20_000  # training digits by default, which other tests make smaller
OLD_RUN = Path(__file__).parents[2] / "fixtures/before-0.2/run"


@pytest.fixture
def old_run(tmp_path):
    """A run that 0.1.0 (then tokenprune) began, stopped at iteration 2 of 4."""
    return shutil.copytree(OLD_RUN, tmp_path / "old", ignore=shutil.ignore_patterns("resumed_*"))


def test_a_run_of_before_goes_on_as_the_version_that_began_it_would_have(old_run, monkeypatch):
    monkeypatch.setitem(cluttered_digits.DEFAULT_SIZES, "train", TRAIN_SIZE)
    run, config = open_run(MappoConfig(resume=old_run))
    assert config.observation == ("stage", "cls_attention", "alpha")  # it said budget
    _, trainer = mappo.learn(run, config)
    assert trainer.iteration == 4
    # what 0.1.0 wrote at the end; its budget_weight is alpha_weight now
    expected = load_file(OLD_RUN / "resumed_policy.safetensors")
    expected = {key.replace("budget_weight", "alpha_weight"): t for key, t in expected.items()}
    torch.testing.assert_close(load_file(old_run / "policy.safetensors"), expected)
    assert len((old_run / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("changes", "alpha"),
    [({}, None), ({"alpha_range": None}, 0.08), ({"alpha_range": None, "alpha": 0.5}, 0.5),
     ({"alpha_range": None, "version": "0.2.0"}, None)],
)  # fmt: skip
def test_a_run_of_before_keeps_the_alpha_that_was_the_default(old_run, changes, alpha):
    run = RunFolder(old_run)
    written = json.loads(run.config.read_text()) | {"observation": ["stage", "alpha"]} | changes
    if written["alpha_range"] is None:
        written["observation"] = ["stage"]
    run.config.write_text(json.dumps(written))
    assert run.read_settings(MappoConfig).alpha == alpha


def test_settings_say_which_version_wrote_them(tmp_path):
    run = RunFolder(tmp_path / "new")
    run.create(MappoConfig(seed=5))
    assert json.loads(run.config.read_text())["version"] == __version__
    assert run.read_settings(MappoConfig) == MappoConfig(seed=5)
    run.create(MappoConfig(seed=6))  # a run keeps the settings that it was begun with
    assert run.read_settings(MappoConfig).seed == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "99.1.0"}, "written by prunevit 99.1.0, here is prunevit "),
        (
            {"version": "0.2.0", "sparkle": 1},
            "by prunevit 0.2.0: unknown settings: sparkle",
        ),
        ({"sparkle": 1}, "written by tokenprune, before 0.2: unknown settings: sparkle"),
    ],
)
def test_settings_of_another_version_are_refused_with_its_name(old_run, changes, message):
    run = RunFolder(old_run)
    run.config.write_text(json.dumps(json.loads(run.config.read_text()) | changes))
    with pytest.raises(CheckpointError) as refused:
        run.read_settings(MappoConfig)
    assert message in str(refused.value)


def test_a_resumed_run_trains_on_its_own_device(old_run):
    assert device_of(MappoConfig(resume=old_run, device="cuda")) == "cpu"
    assert device_of(MappoConfig(resume=old_run / "none", device="cuda")) == "cuda"


def test_to_repeat_a_runs_own_settings_is_no_change(old_run):
    _, config = open_run(MappoConfig(resume=old_run, iterations=4))
    assert config.iterations == 4


def test_each_iteration_and_each_seed_draw_their_own_numbers():
    seeds = {iteration_seed(seed, iteration) for seed in range(3) for iteration in range(100)}
    assert len(seeds) == 300


@pytest.mark.parametrize(("kind", "missing"), [(Recipe, "folder"), (LibraryConfig, "learner")])
def test_settings_that_leave_out_what_a_run_needs_cannot_be_made(kind, missing):
    with pytest.raises(TypeError, match=f"abstract .*{missing}"):
        kind()
