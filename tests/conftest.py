"""What several test files share: small ViTs in which every parameter matters, and a few images."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import settings
from PIL import Image
from timm.layers import Attention

from prunevit.envs.data import cluttered_digits
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.extras import is_installed
from prunevit.trainers.common import report
from prunevit.trainers.common.checkpoint import write_atomically
from prunevit.trainers.common.timing import time_models

# The same examples every time, however fast the machine is; to look for others, give
# --hypothesis-profile=search.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=20)
settings.register_profile("search", deadline=None, max_examples=1_000)
settings.load_profile("fixed")


# an extra of setup.cfg is there if these can be imported
EXTRAS = {
    "benchmarl": ["benchmarl"],
    "distributed": ["lightning_fabric"],
    "games": ["mpe2", "pygame"],
    "marl-peers": ["mpe2", "benchmarl", "supersuit"],
    "mpe2": ["mpe2"],
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
    "rllib": ["ray"],
    "serve": ["fastapi", "uvicorn", "onnxruntime"],
    "sb3": ["sb3_contrib"],
    "torchrl": ["torchrl"],
    "transformers": ["transformers"],
    "viewer": ["gradio"],
}


def pytest_collection_finish():
    """What has been imported stays, so the garbage collector need not look through it each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def pytest_runtest_setup(item):
    """Skips what is marked ``integration(extra)`` where that extra is not installed."""
    for mark in item.iter_markers("integration"):
        for extra in mark.args:
            if not all(is_installed(module) for module in EXTRAS[extra]):
                pytest.skip(f"needs pip install -e '.[{extra}]'")


def pytest_addoption(parser):
    parser.addoption(
        "--command-lines",
        type=int,
        default=200,
        help="how many random command lines of trainers.mappo are tried (default: 200)",
    )
    parser.addoption("--kills", type=int, default=3, help="how many trainings are killed")
    parser.addoption("--soak", metavar="FILE", help="soak for long; write what was held to FILE")


VIT = "vit_tiny_patch16_224"
SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}
IMAGE_SHAPE = (3, 32, 32)


def build_vit(name=VIT, seed=0, attention=None, **kwargs):
    """A timm ViT of 16 patches, 4 blocks and 5 classes; random, and far from its initialisation:
    there, norms and scales are ones, biases zeros, and whoever forgets them gets away with it.

    ``attention`` are arguments of timm's Attention, or of another class named as "cls", that its
    models don't pass on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, **(SMALL | kwargs)).eval()
        for block in model.blocks if attention else ():
            arguments = {"cls": Attention, "num_heads": block.attn.num_heads} | attention
            block.attn = arguments.pop("cls")(model.embed_dim, **arguments).eval()
        for parameter in model.parameters():
            if parameter.dim() <= 1 or parameter.shape[0] == 1:
                torch.nn.init.normal_(parameter, std=0.3)
            else:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


class SomeImages:
    """An ``ImageSet`` of noise."""

    num_classes = 5
    class_names = ("a", "b", "c", "d", "e")

    def __init__(self, count=12, shape=IMAGE_SHAPE, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, *shape, generator=generator)
        self.labels = torch.randint(self.num_classes, (count,), generator=generator)

    def __len__(self):
        return len(self.images)

    def load(self, indices):
        index = torch.as_tensor(indices)
        return self.images[index], self.labels[index]


@pytest.fixture(scope="session")
def make_vit():
    """``build_vit``: what it returns may be changed."""
    return build_vit


@pytest.fixture(scope="session")
def make_images():
    """``SomeImages``."""
    return SomeImages


@pytest.fixture(scope="session")
def vit():
    """A ViT with a class token; not to be changed."""
    return build_vit()


@pytest.fixture(scope="session")
def some_images():
    return SomeImages()


@pytest.fixture
def staged(vit):
    """Packed, stages before blocks 1, 2 and 3."""
    return StagedViT(vit)


@pytest.fixture
def keeps():
    """``keeps(B, T, N, ...)``: random joint actions, bool [T, B, N]. In the first stage and again
    in the second some image is emptied and the next kept whole.
    """

    def draw(batch, stages, agents, seed=0, ratio=0.7):
        generator = torch.Generator().manual_seed(seed)
        keep = torch.rand(stages, batch, agents, generator=generator) < ratio
        for stage in range(min(stages, 2, batch - 1)):
            keep[stage, stage] = False
            keep[: stage + 1, stage + 1] = True
        return keep

    return draw


@pytest.fixture(scope="session")
def walk():
    """``--env`` of a PettingZoo game that needs no other library (games/walk.py), which from now
    on can be imported, here and in processes that are begun here.
    """
    folder = str(Path(__file__).with_name("games"))
    others = os.environ.get("PYTHONPATH")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", folder + (os.pathsep + others if others else ""))
        yield "pettingzoo:walk"


@pytest.fixture(scope="session")
def make_photographs(tmp_path_factory):
    """``make_photographs(train=20, test=5, shape=(64, 64), suffix=".png")``: the ``--dataset`` of
    a new folder of noise of two kinds, dark and bright; so many images a kind and split.
    """

    def make(train=20, test=5, shape=(64, 64), suffix=".png"):
        root = tmp_path_factory.mktemp("photographs")
        noise = np.random.RandomState(0)
        for split, count in (("train", train), ("test", test)):
            for name, level in (("dark", 60), ("bright", 190)):
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = noise.randint(level - 50, level + 50, shape, dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}{suffix}")
        return f"folder:{root}"

    return make


@pytest.fixture(autouse=True, scope="session")
def few_digits():
    """So many are drawn where nobody says how many: the first of the usual 27,000."""
    with pytest.MonkeyPatch.context() as patch:
        for split, size in {"train": 1_000, "validation": 300, "test": 500}.items():
            patch.setitem(cluttered_digits.DEFAULT_SIZES, split, size)
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are the fastest on one; and commands that set a number set it for one test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def timed_here():
    """Reports time their models on few images and without a process of their own: its start alone
    takes seconds.
    """

    def images_per_second(models, images, batch_size):
        timings = time_models(models, images[:4], batch_size, rounds=1)
        return {name: 4 / timing.seconds for name, timing in timings.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "images_per_second", images_per_second)
        yield


@pytest.fixture(autouse=True, scope="session")
def blank_figures():
    """Reports write figures without drawing them, which would take longer than the runs: those of
    ``test_report.py`` and of processes of their own are drawn.
    """

    def save(figure, path, dpi=80):
        write_atomically(path, lambda temporary: Image.new("L", (1, 1)).save(temporary, "png"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "save_figure", save)
        yield
