import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.envs.data import cluttered_digits, datasets
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers.common import evaluation, report
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.evaluation import evaluate
from prunevit.trainers.common.experiments import TokenPruneExperiment
from prunevit.trainers.common.report import draw_curve, draw_pruned, report_pruning, table

TINY = {"patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
SIZES = {"train": 16, "validation": 20, "test": 30}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(cluttered_digits, "DEFAULT_SIZES", SIZES)


SAVE_FIGURE = report.save_figure


@pytest.fixture
def real_figures(monkeypatch):
    monkeypatch.setattr(report, "save_figure", SAVE_FIGURE)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Digits on a small random ViT."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as context:
        context.setattr(cluttered_digits, "DEFAULT_SIZES", SIZES)
        torch.manual_seed(0)
        model = create_backbone(num_classes=10, untrained=True, **TINY)
        write_weights(path, model.state_dict(), "digits_vit", 10, TINY)
        config = MappoConfig(
            checkpoint=path,
            prune_before=(1, 2),
            num_envs=8,
            rollouts_per_image=4,
            eval_size=15,
            device="cpu",
        )
        return TokenPruneExperiment(config)


@pytest.fixture(scope="module")
def actor(task):
    """Prunes about half of the tokens at each stage."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = task.env.observation_space.shape[0]
        actor = TokenActor(size, (8,), task.env.field_slices["cls_attention"].start)
        torch.nn.init.normal_(actor.net[-1].weight)
        with torch.no_grad():
            logits = actor(task.env.reset(0).living())
            actor.net[-1].bias[0] += (logits[:, 1] - logits[:, 0]).median()
    return actor


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "reward": 1.0}\n')
    return tmp_path


def read_png(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"))


# --- the table ---


def test_policies_are_compared_on_the_test_images(task, actor, folder):
    rows = task.report(actor, folder)["policies"]
    assert list(rows) == ["dense", "learned", "random", "attention"]
    test = datasets.open_images("digits", "test", task.data_config)
    learned = evaluate(task.pruned(actor), test)
    assert 0.1 < learned.kept[-1] < learned.kept[0] < 0.9
    shown = rows["learned"]
    assert (shown["accuracy"], shown["gmacs"]) == (learned.accuracy, learned.gmacs)
    assert shown["kept"] == list(learned.kept)
    with torch.no_grad():
        pixels, labels = test.load(range(len(test)))
        right = (task.model(pixels).argmax(1) == labels).float().mean()
    assert rows["dense"]["accuracy"] == pytest.approx(float(right))
    assert rows["dense"]["gmacs"] == task.backbone.dense_macs / 1e9
    assert rows["dense"]["kept"] == [1, 1]
    assert json.loads(json.dumps(rows)) == rows


def test_rivals_may_spend_what_the_learned_policy_spends(task, actor, folder):
    rows = task.report(actor, folder)["policies"]
    spent = evaluate(task.pruned(actor), task.validation, task.config.eval_size).gmacs
    for name in ("random", "attention"):
        assert spent <= rows[name]["gmacs"] < 1.1 * spent


def test_nothing_is_chosen_on_the_test_images(task, actor, folder, monkeypatch):
    seen = []
    rehearse = evaluation.evaluate

    def watch(model, images, size=None):
        seen.append((len(images), size))
        return rehearse(model, images, size)

    monkeypatch.setattr(evaluation, "evaluate", watch)
    monkeypatch.setattr(report, "evaluate", watch)
    task.report(actor, folder)
    assert seen[-4:] == [(SIZES["test"], None)] * 4
    assert len(seen) > 1 + 4
    assert set(seen[:-4]) == {(SIZES["validation"], task.config.eval_size)}


def test_speed_is_that_of_pruning_and_of_timms_own_dense_model(task, actor, folder, monkeypatch):
    timed = {}

    def time(models, images, batch_size):
        timed.update(models, images=images, batch_size=batch_size)
        return dict.fromkeys(models, 1.0)

    monkeypatch.setattr(report, "images_per_second", time)
    task.report(actor, folder)
    assert timed.pop("batch_size") == 64
    assert timed.pop("images").shape == (64, 1, 64, 64)
    assert timed.pop("dense") is task.model
    assert task.backbone.execution == "packed"
    assert {model.backbone for model in timed.values()} == {task.backbone}


def test_the_random_rival_follows_the_runs_seed(task, actor, folder, monkeypatch):
    def gone(seed):
        config = dataclasses.replace(task.config, seed=seed)
        test = datasets.open_images("digits", "test", task.data_config)
        monkeypatch.setattr(report, "draw_pruned", lambda *_: None)
        models = {}
        monkeypatch.setattr(
            report,
            "images_per_second",
            lambda m, *_: models.update(m) or dict.fromkeys(m, 1.0),
        )
        report_pruning(task.pruned(actor), config, task.validation, test, folder)
        return models["random"].policy.seed

    assert [gone(0), gone(5)] == [0, 5]


ROWS = {
    "dense": {"accuracy": 0.9, "gmacs": 2.0, "kept": [1.0, 1.0], "images_per_second": 100.0},
    "learned": {"accuracy": 0.8765, "gmacs": 0.5, "kept": [0.5, 0.126], "images_per_second": 250.0},
}


def test_the_table_compares_with_dense():
    header, dense, learned = table(ROWS).splitlines()
    assert header.split()[:3] == ["policy", "test", "accuracy"]
    assert dense.split() == ["dense", "90.00%", "2.0000", "100.0%", "100", "1.00x", "100", "100"]
    assert learned.split() == ["learned", "87.65%", "0.5000", "25.0%", "250", "2.50x", "50", "13"]


# --- pictures ---


@pytest.mark.usefixtures("real_figures")
def test_pruned_patches_are_white_stage_by_stage(task, actor, tmp_path, monkeypatch):
    strips = []
    draw = report.stage_strip

    def watch(image, alive, grid):
        strips.append((image, alive, draw(image, alive, grid)))
        return strips[-1][2]

    monkeypatch.setattr(report, "stage_strip", watch)
    images = datasets.open_images("digits", "test", task.data_config)
    model = task.pruned(actor)
    draw_pruned(model, images, tmp_path / "pruned.png")
    assert len(strips) == report.PICTURES
    pixels, _ = images.load([0, len(images) - 1])
    trace = model.trace(pixels)
    for (shown, alive, _), i in ((strips[0], 0), (strips[-1], 1)):
        # what is normalised for the backbone is undone
        assert shown.min() >= 0
        assert shown.max() <= 1
        assert alive[0].all()
        assert torch.equal(alive[1:], trace.alive[i])
    # nearly white where patches are gone: a third of the strips, and margins
    picture = read_png(tmp_path / "pruned.png")
    assert 0.3 < (picture > 210).mean() < 0.7
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("real_figures")
def test_fewer_images_than_pictures_are_no_problem(task, actor, tmp_path):
    images = datasets.open_images("digits", "test", task.data_config, size=2)
    draw_pruned(task.pruned(actor), images, tmp_path / "pruned.png")
    read_png(tmp_path / "pruned.png")


@pytest.mark.usefixtures("real_figures")
@pytest.mark.parametrize(
    ("records", "panels"),
    [
        ([{"reward": 1.0, "entropy": 0.5, "accuracy": 0.1, "keep_ratio": 0.5}] * 3, 4),
        ([{"reward": 1.0}, {"reward": 2.0, "episode_return": -9.0}], 2),
        ([{"accuracy": 0.5}, {"accuracy": 0.5, "validation_accuracy": 0.4}], 1),
    ],
)
def test_the_curve_has_a_panel_for_each_number_that_was_logged(tmp_path, records, panels):
    lines = [json.dumps({"iteration": i + 1} | record) for i, record in enumerate(records)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    draw_curve(tmp_path)
    height, width = read_png(tmp_path / "curve.png").shape
    assert round(width / height / 1.2) == panels
