"""Labels are outputs of the backbone, or the folder is refused."""

import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from prunevit.agents import KeepAll, PrunedViT, prune
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import open_images, read_class_names
from prunevit.envs.data.image_sources import DatasetError
from prunevit.envs.data_config import model_data_config
from prunevit.envs.game import TokenGame
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers.common.evaluation import evaluate

VIT = "vit_tiny_patch16_224"
IMAGENETTE = {"n01440764": 0, "n02102040": 217, "n03888257": 701}


def build(classes, **kwargs):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return timm.create_model(VIT, num_classes=classes, **arguments | kwargs).eval()


def play(model, images):
    BatchedTokenPrune(TokenGame(StagedViT(model, (1, 2))), images, 2)


def judged(model, images):
    evaluate(PrunedViT(StagedViT(model, (1, 2)), KeepAll()), images)


@pytest.fixture
def make_folder(tmp_path):
    """``make_folder(names)``: the ``dataset`` of a folder with two images a class, whose grey is
    20 for each class before theirs in the order of ``names``.
    """

    def make(names, classes=None):
        for split in ("train", "test"):
            for place, name in enumerate(names):
                folder = tmp_path / split / name
                folder.mkdir(parents=True)
                for i in range(2):
                    pixels = np.full((32, 32, 3), 20 * place, np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        if classes is not None:
            (tmp_path / "classes.txt").write_text("\n".join(classes) + "\n")
        return f"folder:{tmp_path}"

    return make


def labels_by_class(dataset, model):
    """The label of each class in the order of its grey, through timm's own transform."""
    images = open_images(dataset, "test", model_data_config(model))
    assert images.num_classes == len(images.class_names)
    pixels, labels = images.load(range(len(images)))
    order = pixels.mean((1, 2, 3)).argsort(stable=True)
    return images, labels[order][::2].tolist()


@pytest.mark.filterwarnings("error")
def test_word_net_ids_are_the_outputs_of_an_imagenet_model(make_folder):
    images, labels = labels_by_class(make_folder(IMAGENETTE), build(1000))
    assert labels == list(IMAGENETTE.values())
    assert images.class_names[217] == "n02102040"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "names",
    [
        ["tench", "English_springer", "parachute"],
        ["tench, Tinca tinca", "English springer, English springer spaniel", "parachute, chute"],
    ],
)
def test_so_are_words(make_folder, names):
    _, labels = labels_by_class(make_folder(names), build(1000))
    assert labels == list(IMAGENETTE.values())


@pytest.mark.parametrize(
    "names",
    [
        ["0", "1", "2"],
        ["n01440764", "n02102040", "truck"],
        ["tench", "crane", "parachute"],  # a bird and a machine
    ],
)
def test_other_classes_are_refused(make_folder, names):
    dataset = make_folder(names)
    with pytest.raises(
        DatasetError,
        match=r"has 3 classes \(.*\), the backbone distinguishes 1000 \(n01440764, .*classes.txt",
    ):
        TokenPruneEnv(build(1000), dataset, prune_before=(1,), device="cpu")


@pytest.mark.parametrize("classes", [3, 13])
def test_other_numbers_of_classes_are_refused(make_folder, classes):
    dataset = make_folder([str(i) for i in range(12)])
    with pytest.raises(
        DatasetError, match=f"has 12 classes .*the backbone distinguishes {classes}:"
    ):
        TokenPruneEnv(build(classes), dataset, prune_before=(1,), device="cpu")


def test_the_head_counts_that_is_there(make_folder):
    """timm's ``num_classes`` stays as it was where a head is replaced."""
    model = build(1000)
    model.head = nn.Linear(32, 3)
    assert labels_by_class(make_folder(["a", "b", "c"]), model)[1] == [0, 1, 2]


def test_a_list_of_classes_gives_the_order(make_folder):
    """Torchvision's order; and not every class of a list needs a folder."""
    names = [str(i) for i in range(12)]
    dataset = make_folder(names, classes=sorted(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, labels = labels_by_class(dataset, build(12))
    assert labels == [sorted(names).index(name) for name in names]
    assert read_class_names(dataset) == images.class_names == tuple(sorted(names))


def test_a_list_may_have_more_classes_than_there_are_folders(make_folder):
    dataset = make_folder(["b", "d"], classes=["a", "b", "c", "d"])
    assert labels_by_class(dataset, build(4))[1] == [1, 3]


@pytest.mark.parametrize(
    ("classes", "message"),
    [(["b"], "doesn't list: d"), (["b", "d", "b"], "lists b more than once")],
)
def test_wrong_lists_are_refused(make_folder, classes, message):
    dataset = make_folder(["b", "d"], classes=classes)
    with pytest.raises(DatasetError, match=message):
        read_class_names(dataset)


def test_where_the_order_is_not_known_a_warning_shows_both(make_folder):
    dataset = make_folder([str(i) for i in range(12)])
    with pytest.warns(UserWarning, match=r"0, 1, 2, 3, \.\.\., as timm's do; torchvision's order "
                      r"is 0, 1, 10, 11, \.\.\."):  # fmt: skip
        _, labels = labels_by_class(dataset, build(12))
    assert labels == list(range(12))


@pytest.mark.filterwarnings("error")
def test_where_both_orders_are_one_nobody_is_warned(make_folder):
    labels_by_class(make_folder(["a", "b"]), build(2))


def test_as_many_classes_of_other_names_are_shown_with_the_models(make_folder):
    model = build(3)
    model.pretrained_cfg["label_names"] = ["cat", "dog", "cow"]
    with pytest.warns(
        UserWarning, match=r"has the classes a, b, c, the backbone \(cat, dog, cow\)"
    ):
        assert labels_by_class(make_folder(["a", "b", "c"]), model)[1] == [0, 1, 2]


@pytest.mark.filterwarnings("error")
def test_a_backbone_of_ours_remembers_its_classes(make_folder, tmp_path):
    """Whatever order they were in."""
    model = build(12)
    file, names = tmp_path / "backbone.safetensors", sorted(str(i) for i in range(12))
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    write_weights(file, model.state_dict(), VIT, 12, kwargs, names)
    again = create_backbone(VIT, checkpoint=file)
    dataset = make_folder([str(i) for i in range(12)])
    assert labels_by_class(dataset, again)[1] == [names.index(str(i)) for i in range(12)]
    other = create_backbone(VIT, checkpoint=file, untrained=False)
    assert other.pretrained_cfg["label_names"] == names
    # and when it is pruned, and saved
    pruned = prune(again, KeepAll())
    pruned.save_pretrained(tmp_path / "pruned")
    for model in (pruned, PrunedViT.from_pretrained(tmp_path / "pruned")):
        assert labels_by_class(dataset, model)[1] == [names.index(str(i)) for i in range(12)]


def test_the_classes_of_a_pruned_model_are_counted(make_folder):
    with pytest.raises(DatasetError, match=r"has 2 classes .* the backbone distinguishes 3"):
        labels_by_class(make_folder(["a", "b"]), prune(build(3), KeepAll()))


def test_a_model_of_ones_own_plays_the_digits():
    """Its ``pretrained_cfg`` tells of three channels of 224 pixels."""
    model = timm.create_model(VIT, depth=3, num_classes=10, img_size=64, in_chans=1).eval()
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    config = model_data_config(model)
    assert config["input_size"] == (1, 64, 64)
    assert config["mean"] == config["std"] == (0.5,)
    game = {"split": "validation", "prune_before": (1, 2), "device": "cpu"}
    env = TokenPruneEnv(model, **game, render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (64, 3 * 64 + 2 * 2, 3)


def test_grey_photographs_for_a_model_of_ones_own(make_folder):
    model = build(2, in_chans=1)
    images = open_images(make_folder(["a", "b"]), "test", model_data_config(model))
    loaded, _ = images.load([0])
    assert loaded.shape == (1, 1, 32, 32)
    torch.testing.assert_close(loaded, torch.full_like(loaded, -1.0))


# --- images that were opened without the model ---


def named(model, *names):
    model.pretrained_cfg = dict(model.pretrained_cfg) | {"label_names": names}
    return model


@pytest.mark.parametrize("judge", [play, judged], ids=["game", "evaluation"])
def test_images_in_another_order_than_the_models_are_refused(make_folder, judge):
    """As timm's and torchvision's orders of numbered folders."""
    dataset = make_folder(["2", "10"])
    model = build(2)
    config = model_data_config(model)
    del config["classes"]
    images = open_images(dataset, "test", config)
    assert images.class_names == ("2", "10")
    judge(model, images)  # nobody knows
    judge(named(model, "2", "10"), images)
    for names in (("10", "2"), ("2", "3", "10")):
        with pytest.raises(
            DatasetError, match=r"2 classes \(2, 10\), the backbone .* in its order"
        ):
            judge(named(build(len(names)), *names), images)
    # opened with the model, they follow it
    other = named(build(2), "10", "2")
    judge(other, open_images(dataset, "test", model_data_config(other)))
    with pytest.warns(UserWarning, match=r"classes 2, 10, the backbone \(cat, dog\).*other names"):
        judge(named(model, "cat", "dog"), images)
