"""Images without classes: ``photos:PATH``."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from prunevit.agents import KeepAll, PrunedViT, TopK
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import find_bad_images, open_images, read_class_names
from prunevit.envs.data.image_set import NO_LABEL
from prunevit.envs.data.image_sources import DatasetError
from prunevit.envs.data_config import model_data_config
from prunevit.envs.game import TokenGame
from prunevit.envs.rewards import MarkovGameReward, ReleasedCodeReward, TeamReward
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers import backbone as backbone_trainer
from prunevit.trainers import dynamic_vit, straight_through
from prunevit.trainers.common.evaluation import evaluate

CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
SPLITS = ("train", "validation", "test")


@pytest.fixture
def photos(tmp_path):
    """Forty photographs at several depths; the red of each is its number, times six."""
    for i in range(40):
        file = tmp_path / ("." if i % 3 else f"walks/{i % 2}") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 18), (6 * i, 0, 0)).save(file)
    return tmp_path


def shown(images):
    """Numbers of the photographs of a set, in its order."""
    loaded, labels = images.load(range(len(images)))
    assert labels.dtype == torch.int64
    assert (labels == NO_LABEL).all()
    return ((loaded[:, 0].mean((1, 2)) + 1) * 255 / 12).round().int().tolist()


def splits_of(folder, skip=()):
    return {
        split: shown(open_images(f"photos:{folder}", split, CONFIG, skip=skip)) for split in SPLITS
    }


def test_every_photograph_is_in_one_split_and_stays_there(photos):
    first = splits_of(photos)
    assert {split: len(found) for split, found in first.items()} == {
        "train": 32,
        "validation": 4,
        "test": 4,
    }
    assert sorted(i for found in first.values() for i in found) == list(range(40))
    assert splits_of(photos) == first


def test_they_have_no_classes(photos):
    images = open_images(f"photos:{photos}", "train", CONFIG)
    assert images.num_classes == 0
    assert images.class_names == ()
    with pytest.raises(
        DatasetError, match=f"photos:{re.escape(str(photos))} has no classes.*folder:"
    ):
        read_class_names(f"photos:{photos}")


def test_damaged_files_are_named_and_those_skipped_move_no_other(photos):
    before = splits_of(photos)
    damaged = photos / "5.png"
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(DatasetError, match=r"5\.png can't be read"):
        splits_of(photos)
    bad = find_bad_images(f"photos:{photos}")
    assert list(bad) == [str(damaged)]
    after = splits_of(photos, skip=bad)
    assert after == {split: [i for i in found if i != 5] for split, found in before.items()}


def test_folders_that_hold_none_are_named(tmp_path):
    with pytest.raises(DatasetError, match=r"no folder .*nowhere"):
        open_images(f"photos:{tmp_path / 'nowhere'}", "train", CONFIG)
    with pytest.raises(DatasetError, match="no folder is named"):
        open_images("photos:", "train", CONFIG)
    (tmp_path / "notes.txt").write_text("no photograph")
    with pytest.raises(DatasetError, match=f"folder {tmp_path} holds no images .*png"):
        open_images(f"photos:{tmp_path}", "train", CONFIG)
    with pytest.raises(DatasetError, match=r"no folder .*txt"):
        open_images(f"photos:{tmp_path / 'notes.txt'}", "train", CONFIG)
    Image.new("RGB", (20, 20)).save(tmp_path / "one.png")
    with pytest.raises(DatasetError, match="of 1 photographs none are left for train"):
        open_images(f"photos:{tmp_path}", "train", CONFIG)


# --- who needs labels, and who doesn't ---


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.RandomState(0)
    for i in range(20):
        pixels = random.randint(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return f"photos:{folder}"


@pytest.fixture
def images(vit, noise):
    return open_images(noise, "train", model_data_config(vit))


@pytest.mark.parametrize(
    "reward",
    [TeamReward(accuracy="correct"), MarkovGameReward(accuracy="confidence"), ReleasedCodeReward()],
)
def test_a_reward_that_reads_labels_is_refused(vit, images, reward):
    with pytest.raises(ValueError, match=f"{type(reward).__name__} pays by labels"):
        BatchedTokenPrune(TokenGame(StagedViT(vit), reward), images, 4)


def test_a_reward_that_does_not_say_what_it_reads_is_refused(vit, images):
    class Own:
        alpha, needs_dense, pays_pruned = 0.0, False, True

    with pytest.raises(ValueError, match="Own pays by labels"):
        BatchedTokenPrune(TokenGame(StagedViT(vit), Own()), images, 4)


@pytest.mark.parametrize("accuracy", ["kl", "agreement"])
def test_a_reward_that_reads_none_plays(vit, images, accuracy):
    env = BatchedTokenPrune(TokenGame(StagedViT(vit), TeamReward(accuracy=accuracy)), images, 4)
    env.reset(seed=0)
    assert env.labels.tolist() == [NO_LABEL] * 4
    for _ in range(env.episode_length):
        transition = env.step(torch.ones(4, env.num_agents, dtype=torch.int64))
    # nothing was pruned: all answers are those of the dense model
    assert "accuracy" not in transition.metrics
    assert transition.metrics["agreement"].tolist() == [1.0] * 4
    assert not env.outcome.correct.any()


def test_evaluations_report_agreement_and_no_accuracy(make_vit, make_images):
    vit, images = make_vit().requires_grad_(False), make_images(40)
    vit.head.bias -= vit(images.images).mean(0)  # so that answers vary from image to image
    images.num_classes, images.class_names = 0, ()
    images.labels.fill_(NO_LABEL)
    model = PrunedViT(StagedViT(vit), TopK([3, 2, 1]))
    same = model(images.images).argmax(1) == vit(images.images).argmax(1)
    assert 0 < same.float().mean() < 1
    result = evaluate(model, images)
    assert result.to_json()["agreement"] == pytest.approx(float(same.float().mean()))
    assert "accuracy" not in result.to_json()
    with pytest.raises(ValueError, match="agreement was measured, and no accuracy"):
        result.accuracy  # noqa: B018
    assert evaluate(PrunedViT(StagedViT(vit), KeepAll()), images).score == 1


@pytest.mark.parametrize("command", [backbone_trainer, dynamic_vit, straight_through])
def test_trainers_that_learn_from_labels_refuse_them(command, noise, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = '{"depth": 4, "embed_dim": 12}'
    with pytest.raises(SystemExit, match="has no classes, and labels are needed"):
        command.main(
            ["--dataset", noise, "--backbone", "vit_tiny_patch16_224", "--model-kwargs", small]
        )
