import gzip
import io
import random
import socket
import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from prunevit.envs.data import cluttered_digits, datasets, digits, image_dataset, timm_sources
from prunevit.envs.data.datasets import find_bad_images, open_images, read_class_names
from prunevit.envs.data.image_sources import DatasetError, FolderSource

SIZE = 16
CONFIG = {
    "input_size": (3, SIZE, SIZE),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
DIGITS_CONFIG = {"input_size": (1, 64, 64)}


def paint(number, label):
    """An image that tells which one it is: its number is the red, its label the green of it all."""
    return Image.new("RGB", (20, 18), (number, label * 20, 0))


def write_split(root, split, classes, images):
    for label, name in enumerate(classes):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(images):
            paint(label * images + i, label).save(folder / f"{i}.png")


def make_folder(root, classes=("ant", "bee"), **images):
    for split, count in images.items():
        write_split(root, split, classes, count)
    return f"folder:{root}"


def numbers(images):
    """Which images ``paint`` painted, in their order."""
    loaded, labels = images.load(range(len(images)))
    red, green, _ = ((loaded.mean((2, 3)).T + 1) * 255 / 2).round()
    assert torch.equal(green, labels * 20.0)
    return red.int().tolist()


# --- digits ---


def test_digits_are_normalised_and_labelled():
    images = open_images("digits", "validation", DIGITS_CONFIG, size=20, seed=4)
    pixels, labels = digits.draw_digits("validation", 20, seed=4)
    loaded, loaded_labels = images.load(torch.tensor([3, 19]))
    assert torch.equal(loaded, digits.normalise(pixels[[3, 19]]))
    assert torch.equal(loaded_labels, labels[[3, 19]])
    assert len(images) == 20
    assert images.num_classes == len(images.class_names) == 10
    assert read_class_names("digits") == images.class_names


def test_digits_are_drawn_when_first_loaded(monkeypatch):
    drawn = []
    draw = digits.draw_digits
    monkeypatch.setattr(digits, "draw_digits", lambda *args: drawn.append(args) or draw(*args))
    images = open_images("digits", "test", DIGITS_CONFIG)
    assert len(images) == cluttered_digits.DEFAULT_SIZES["test"]
    assert not drawn
    images = open_images("digits", "test", DIGITS_CONFIG, size=5)
    images.load([0])
    images.load([4])
    assert drawn == [("test", 5, 0)]


def test_augmented_digits_differ_each_time_and_repeat_with_the_seed():
    def loads(seed):
        images = open_images("digits", "train", DIGITS_CONFIG, size=8, seed=seed, augment=True)
        return [images.load(range(8))[0] for _ in range(2)]

    first, second = loads(1)
    plain = open_images("digits", "train", DIGITS_CONFIG, size=8, seed=1).load(range(8))[0]
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip([first, second], loads(1), strict=True))
    # a digit that is turned a little is still much like itself
    closeness = torch.nn.functional.cosine_similarity(first.flatten(1), plain.flatten(1))
    assert closeness.min() > 0.4
    assert not torch.equal(first, plain)


def test_the_augmentation_of_digits_has_the_seed_too(monkeypatch):
    drawn = digits.draw_digits("train", 8)
    monkeypatch.setattr(digits, "draw_digits", lambda *_: drawn)
    one, other = (
        open_images("digits", "train", DIGITS_CONFIG, size=8, seed=seed, augment=True).load([0])[0]
        for seed in (1, 2)
    )
    assert not torch.equal(one, other)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 32, 32), (3, 224, 224)])
def test_digits_are_refused_for_a_backbone_of_other_images(shape):
    with pytest.raises(DatasetError, match=f"1x64x64.*{'x'.join(map(str, shape))}"):
        open_images("digits", "train", {"input_size": shape})


def test_digits_take_no_arguments_of_augmentation():
    with pytest.raises(DatasetError, match="augmentation of their own"):
        open_images("digits", "train", DIGITS_CONFIG, augment={"hflip": 1.0})


# --- folders: splits ---


def test_three_folders_are_three_splits(tmp_path):
    dataset = make_folder(tmp_path, train=4, validation=3, test=2)
    opened = {split: open_images(dataset, split, CONFIG) for split in digits.SHARES}
    assert {split: len(images) for split, images in opened.items()} == {
        "train": 8,
        "validation": 6,
        "test": 4,
    }
    assert numbers(opened["validation"]) == list(range(6))
    assert opened["train"].class_names == ("ant", "bee") == read_class_names(dataset)
    assert opened["train"].num_classes == 2


@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation"])
def test_one_held_out_folder_is_the_test_split(tmp_path, held_out):
    dataset = make_folder(tmp_path, train=50, **{held_out: 2})
    assert len(open_images(dataset, "test", CONFIG)) == 4
    train = numbers(open_images(dataset, "train", CONFIG))
    validation = numbers(open_images(dataset, "validation", CONFIG))
    assert len(validation) == 100 * datasets.VALIDATION_SHARE
    assert sorted(train + validation) == list(range(100))
    # of both classes, which lie in files one after the other
    assert 2 < sum(number < 50 for number in validation) < 8
    other_seed = open_images(dataset, "validation", CONFIG, seed=7)
    assert numbers(other_seed) == validation


def test_without_a_held_out_folder_there_is_no_test_split(tmp_path):
    dataset = make_folder(tmp_path, train=5)
    assert len(open_images(dataset, "train", CONFIG)) == 9
    looked_for = r"named one of validation, val, valid, test, testing"
    with pytest.raises(DatasetError, match=f"nothing but training images.*{looked_for}"):
        open_images(dataset, "test", CONFIG)


def test_one_image_can_not_be_split(tmp_path):
    dataset = make_folder(tmp_path, classes=("ant",), train=1, test=1)
    with pytest.raises(DatasetError, match="too few"):
        open_images(dataset, "train", CONFIG)


def test_two_folders_for_one_split_are_refused(tmp_path):
    dataset = make_folder(tmp_path, train=2, val=2, validation=2)
    with pytest.raises(DatasetError, match=r"validation and .*val both exist"):
        open_images(dataset, "train", CONFIG)


def test_classes_are_in_natural_order_in_every_split(tmp_path):
    dataset = make_folder(tmp_path, classes=("1", "2", "10"), train=4, test=1)
    for split in digits.SHARES:
        images = open_images(dataset, split, CONFIG)
        assert images.class_names == ("1", "2", "10")
        numbers(images)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["bmp", "jpeg", "pgm", "ppm", "tif", "tiff", "webp", "WEBP"])
def test_images_of_every_usual_type_are_read(tmp_path, kind):
    dataset = make_folder(tmp_path, train=1, test=1)
    paint(9, 0).convert("L").save(tmp_path / "test" / "ant" / f"more.{kind}")
    assert len(open_images(dataset, "test", CONFIG)) == 3


def test_images_that_are_left_out_are_counted(tmp_path):
    dataset = make_folder(tmp_path, train=1, test=1)
    for name in ("a.gif", "b.gif", "c.ico"):
        paint(9, 0).save(tmp_path / "test" / "bee" / name)
    (tmp_path / "test" / "bee" / "notes.txt").touch()
    with pytest.warns(
        UserWarning, match=r"test: files of other types are left out \(2 .gif, 1 .ico"
    ):
        assert len(open_images(dataset, "test", CONFIG)) == 2


def test_hidden_files_and_folders_are_left_out_at_every_depth(tmp_path):
    dataset = make_folder(tmp_path, train=1, test=1)
    inside = tmp_path / "test" / "ant" / "more"
    for folder in (inside, inside / ".thumbnails", tmp_path / "test" / "ant" / ".cache" / "deep"):
        folder.mkdir(parents=True)
        paint(9, 0).save(folder / "x.png")
    paint(9, 0).save(inside / "._x.png")
    assert len(open_images(dataset, "test", CONFIG)) == 3


def test_links_that_lead_back_end(tmp_path):
    dataset = make_folder(tmp_path, train=1, test=1)
    ants = tmp_path / "test" / "ant"
    other = tmp_path / "elsewhere"
    other.mkdir()
    paint(9, 0).save(other / "x.png")
    (ants / "back").symlink_to(ants)
    (ants / "linked").symlink_to(other)
    (other / "up").symlink_to(tmp_path / "test" / "ant")
    assert len(open_images(dataset, "test", CONFIG)) == 3


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (("ant", "bee"), ("ant",), "only in test: none; only in train: bee"),
        (("ant",), ("ant", "cow"), "only in test: cow; only in train: none"),
    ],
)
def test_splits_of_different_classes_are_refused(tmp_path, train, test, message):
    write_split(tmp_path, "train", train, 3)
    write_split(tmp_path, "test", test, 3)
    with pytest.raises(DatasetError, match=message):
        open_images(f"folder:{tmp_path}", "test", CONFIG)


# --- folders: images ---


def test_jpegs_of_any_size_and_mode_come_as_the_backbone_takes_them(tmp_path):
    make_folder(tmp_path, train=4, test=1)
    ant = tmp_path / "test" / "ant"
    (ant / "0.png").unlink()
    (ant / "deeper").mkdir()
    (ant / ".hidden.png").write_text("no image")
    (ant / "notes.txt").write_text("no image")
    (tmp_path / "test" / ".cache").mkdir()
    Image.new("L", (40, 30), 255).save(ant / "a.JPG", "JPEG")
    Image.new("RGBA", (9, 60), (255, 255, 255, 0)).save(ant / "b.png")
    Image.new("RGB", (16, 16), (255, 255, 255)).save(ant / "deeper" / "c.jpeg")
    images = open_images(f"folder:{tmp_path}", "test", CONFIG)
    loaded, labels = images.load([0, 1, 2])
    assert labels.tolist() == [0, 0, 0]
    assert labels.dtype == torch.int64
    assert loaded.shape == (3, 3, SIZE, SIZE)
    assert loaded.dtype == torch.float32
    assert torch.allclose(loaded, torch.ones(()), atol=0.02)


def test_a_grey_backbone_gets_grey_images(tmp_path):
    dataset = make_folder(tmp_path, train=4, test=1)
    config = CONFIG | {"input_size": (1, SIZE, SIZE), "mean": (0.0,), "std": (1.0,)}
    loaded, _ = open_images(dataset, "test", config).load([1])
    assert loaded.shape == (1, 1, SIZE, SIZE)
    grey = paint(1, 1).convert("L").getpixel((0, 0)) / 255
    assert torch.allclose(loaded, torch.tensor(grey))


def test_a_backbone_of_four_channels_is_refused(tmp_path):
    dataset = make_folder(tmp_path, train=4, test=1)
    with pytest.raises(DatasetError, match=r"4 channels.*1 \(grey\) or 3"):
        open_images(dataset, "test", CONFIG | {"input_size": (4, SIZE, SIZE)})


def test_a_size_takes_a_random_part(tmp_path):
    dataset = make_folder(tmp_path, train=20, val=20, test=1)
    part = numbers(open_images(dataset, "train", CONFIG, size=12, seed=1))
    assert part == numbers(open_images(dataset, "train", CONFIG, size=12, seed=1))
    assert part != numbers(open_images(dataset, "train", CONFIG, size=12, seed=2))
    assert len(set(part)) == 12
    assert len(open_images(dataset, "train", CONFIG, size=100)) == 40


@pytest.mark.parametrize("size", [0, -3])
@pytest.mark.parametrize("dataset", ["digits", "folder:"])
def test_a_set_of_no_images_is_refused(tmp_path, dataset, size):
    if dataset == "folder:":
        dataset = make_folder(tmp_path, train=4, test=1)
    with pytest.raises(DatasetError, match=f"{size} images"):
        open_images(dataset, "train", DIGITS_CONFIG, size=size)


def test_the_number_of_threads_changes_nothing(tmp_path, monkeypatch):
    dataset = make_folder(tmp_path, train=20, test=1)

    def load(threads, augment):
        monkeypatch.setattr(image_dataset, "DECODING_THREADS", threads)
        images = open_images(dataset, "train", CONFIG, augment=augment)
        return images.load(range(30))[0]

    for augment in (False, {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5}):
        assert torch.equal(load(1, augment), load(6, augment))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("death", [MemoryError("no memory left"), SystemExit(3)])
def test_a_worker_that_dies_is_an_error_and_no_hang(tmp_path, monkeypatch, death, augment):
    images = open_images(make_folder(tmp_path, train=40, test=1), "train", CONFIG, augment=augment)
    read = FolderSource.read

    def die(source, index, mode):
        if index == 5:
            raise death
        return read(source, index, mode)

    with monkeypatch.context() as context:
        context.setattr(FolderSource, "read", die)
        with pytest.raises(type(death)) as raised:
            images.load(range(30))
        assert raised.value is death
    # and the next batch is read as if nothing had been
    assert images.load(range(30))[0].isfinite().all()


def test_augmentation_comes_from_its_seed_and_leaves_global_generators_alone(tmp_path):
    make_folder(tmp_path, train=2, test=1)
    noise = np.random.RandomState(0).randint(0, 255, (40, 40, 3), dtype=np.uint8)
    for file in tmp_path.glob("train/*/*.png"):
        Image.fromarray(noise).save(file)
    arguments = {"auto_augment": "rand-m9-mstd0.5", "color_jitter": 0.4}

    def loads(seed, augment):
        images = open_images(f"folder:{tmp_path}", "train", CONFIG, seed=seed, augment=augment)
        return torch.cat([images.load([0, 1, 2])[0] for _ in range(2)])

    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    augmented = loads(1, arguments)
    assert states() == before
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(augmented, loads(1, arguments))
    assert not torch.equal(augmented, loads(2, arguments))
    # all the images are the same one, so each must have been turned into another
    assert len(augmented.flatten(1).unique(dim=0)) == 6
    assert len(loads(1, False).flatten(1).unique(dim=0)) == 1
    assert len(loads(1, True).flatten(1).unique(dim=0)) == 6


def test_arguments_reach_the_training_transform(tmp_path):
    make_folder(tmp_path, train=2, test=1)
    half = np.zeros((SIZE, SIZE, 3), np.uint8)
    half[:, : SIZE // 2] = 255
    for file in tmp_path.glob("train/*/*.png"):
        Image.fromarray(half).save(file)
    always_flipped = {"hflip": 1.0, "scale": (1, 1), "ratio": (1, 1), "color_jitter": 0}
    images = open_images(f"folder:{tmp_path}", "train", CONFIG, augment=always_flipped)
    loaded, _ = images.load([0, 1])
    assert loaded[..., 0].max() == -1
    assert loaded[..., -1].min() == 1


def test_an_unknown_argument_of_the_transform_is_refused(tmp_path):
    dataset = make_folder(tmp_path, train=4, test=1)
    with pytest.raises(DatasetError, match="colour_jitter"):
        open_images(dataset, "train", CONFIG, augment={"colour_jitter": 1})


# --- folders: damage ---


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"no folder .*nowhere"):
        open_images(f"folder:{tmp_path}/nowhere", "train", CONFIG)
    with pytest.raises(DatasetError, match=r"no folder .*train"):
        open_images(make_folder(tmp_path, test=2), "test", CONFIG)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_folder_is_named(tmp_path, split):
    make_folder(tmp_path, **{"train": 3, "test": 3})
    for file in (tmp_path / split).glob("bee/*"):
        file.unlink()
    with pytest.raises(DatasetError, match=f"{split}/bee holds no images.*png"):
        open_images(f"folder:{tmp_path}", split, CONFIG)
    for name in ("ant", "bee"):
        for file in (tmp_path / split / name).glob("*"):
            file.unlink()
        (tmp_path / split / name).rmdir()
    with pytest.raises(DatasetError, match=f"{split} is empty"):
        open_images(f"folder:{tmp_path}", split, CONFIG)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_image_is_named(tmp_path, damage, augment):
    dataset = make_folder(tmp_path, train=4, val=1, test=2)
    noise = np.random.RandomState(0).randint(0, 255, (50, 50, 3), dtype=np.uint8)
    bytes_ = io.BytesIO()
    Image.fromarray(noise).save(bytes_, "JPEG")
    content = {"truncated": bytes_.getvalue()[:-900], "empty": b"", "text": b"no image"}[damage]
    (tmp_path / "test" / "bee" / "9.jpg").write_bytes(content)
    images = open_images(dataset, "test", CONFIG, augment=augment)
    images.load([0, 1])
    with pytest.raises(DatasetError, match=r"test/bee/9\.jpg"):
        images.load([0, 4])


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def bomb():
    """A PNG of a few bytes that says it had 40,000 x 40,000 pixels."""
    content = bytearray(png(np.zeros((1, 1), np.uint8)))
    content[16:24] = struct.pack(">2I", 40_000, 40_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


BAD = {
    "bomb.png": bomb(),
    "corrupt.png": png(np.zeros((50, 50), np.uint8))[:45] + bytes(9) + b"IEND",
    "text.jpeg": b"no image",
    "truncated.jpg": None,
    "zero.jpg": b"",
}


@pytest.fixture
def with_bad_images(tmp_path):
    """A folder of 8 training images and 2 test images, with one of each ``BAD`` beside them."""
    dataset = make_folder(tmp_path, train=4, val=1, test=1)
    noise = np.random.RandomState(0).randint(0, 255, (50, 50, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    for name, content in BAD.items():
        where = tmp_path / ("test" if name == "zero.jpg" else "train") / "bee" / name
        where.write_bytes(buffer.getvalue()[:-900] if content is None else content)
    return dataset


@pytest.mark.parametrize("name", BAD)
def test_whatever_is_bad_is_named(name, with_bad_images):
    split = "test" if name == "zero.jpg" else "train"
    images = open_images(with_bad_images, split, CONFIG)
    source = images._source.files
    index = next(i for i, file in enumerate(source) if file.endswith(name))
    with pytest.raises(DatasetError, match=rf"{split}/bee/{name} can't be read as an image"):
        images.load([index])


def test_bad_images_are_found_and_left_out(with_bad_images):
    bad = find_bad_images(with_bad_images)
    assert {file.rpartition("/")[2] for file in bad} == set(BAD)
    assert all(damage.startswith(file) for file, damage in bad.items())
    sizes = {}
    for split in ("train", "validation", "test"):
        images = open_images(with_bad_images, split, CONFIG, skip=bad)
        images.load(range(len(images)))
        sizes[split] = len(images)
    assert sizes == {"train": 8, "validation": 2, "test": 2}


def test_what_is_no_folder_can_not_be_looked_through():
    with pytest.raises(DatasetError, match="folder:PATH and photos:PATH only, not in digits"):
        find_bad_images("digits")


def test_a_class_of_bad_images_only_is_named(tmp_path):
    dataset = make_folder(tmp_path, train=3, test=3)
    for file in (tmp_path / "test" / "bee").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"every image of .*test/bee is skipped"):
        open_images(dataset, "test", CONFIG, skip=find_bad_images(dataset))


@pytest.mark.parametrize("kind", ["L", "LA", "1", "P", "CMYK", "I;16"])
def test_images_of_any_depth_and_colour_come_as_they_look(kind, tmp_path):
    dataset = make_folder(tmp_path, train=4, test=1)
    grey = Image.fromarray(np.full((SIZE, SIZE), 100, np.uint8))
    if kind == "I;16":
        grey = Image.fromarray(np.full((SIZE, SIZE), 100 * 257, np.uint16))
    elif kind == "CMYK":
        grey = Image.new("CMYK", (SIZE, SIZE), (155, 155, 155, 0))
    elif kind == "1":
        grey = Image.new("1", (SIZE, SIZE), 1)
    else:
        grey = grey.convert(kind)
    form = "JPEG" if kind == "CMYK" else "PNG"
    (tmp_path / "test" / "ant" / "0.png").unlink()
    grey.save(tmp_path / "test" / "ant" / f"0.{form.lower()}", form)
    loaded, _ = open_images(dataset, "test", CONFIG).load([0])
    expected = (255 if kind == "1" else 100) / 255
    assert torch.allclose(loaded, torch.tensor(2 * expected - 1), atol=2 / 255)


# --- names ---


def test_an_unknown_dataset_is_told_what_exists():
    for name in ("mnist", "nope/x", ""):
        with pytest.raises(DatasetError, match=r"unknown dataset.*digits, folder:PATH.*torch/"):
            open_images(name, "train", CONFIG)
    with pytest.raises(DatasetError, match=r"unknown dataset torch/nope.*torch/cifar10"):
        open_images("torch/nope:x", "train", CONFIG)
    with pytest.raises(DatasetError, match="torch/cifar10:FOLDER"):
        open_images("torch/cifar10", "train", CONFIG)


def test_an_unknown_split_is_refused():
    for dataset in ("digits", "torch/mnist:x"):
        with pytest.raises(DatasetError, match=r"'dev'.*train, validation, test"):
            open_images(dataset, "dev", CONFIG)


def test_a_dataset_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"can't open the dataset torch/cifar10.*not found"):
        open_images(f"torch/cifar10:{tmp_path}", "train", CONFIG)


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DatasetError, match="tensorflow_datasets"):
        open_images("tfds/mnist", "train", CONFIG)


def write_mnist(root, train, test, labels):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        pixels = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28)
        files = {
            f"{part}-images-idx3-ubyte": struct.pack(">4i", 0x803, count, 28, 28) + bytes(pixels),
            f"{part}-labels-idx1-ubyte": struct.pack(">2i", 0x801, count)
            + bytes(labels[i % len(labels)] for i in range(count)),
        }
        for name, content in files.items():
            (raw / name).write_bytes(content)
            (raw / f"{name}.gz").write_bytes(gzip.compress(content))


def test_torchvision_by_name(tmp_path):
    write_mnist(tmp_path, train=20, test=5, labels=[7, 0])
    dataset = f"torch/MNIST:{tmp_path}"
    test = open_images(dataset, "test", CONFIG)
    loaded, labels = test.load([0, 1, 4])
    assert len(test) == 5
    assert test.num_classes == 10
    assert read_class_names(dataset)[3] == "3 - three"
    assert labels.tolist() == [7, 0, 7]
    assert ((loaded.mean((1, 2, 3)) + 1) * 255 / 2).round().tolist() == [0, 1, 4]
    grey = [
        ((open_images(dataset, split, CONFIG).load([0, 1])[0].mean((1, 2, 3)) + 1) * 255 / 2)
        for split in ("train", "validation")
    ]
    assert not set(grey[0].round().tolist()) & set(grey[1].round().tolist())
    assert len(open_images(dataset, "train", CONFIG)) == 18


def test_a_label_outside_the_classes_is_named(tmp_path):
    write_mnist(tmp_path, train=20, test=5, labels=[3, 10])
    images = open_images(f"torch/mnist:{tmp_path}", "test", CONFIG)
    images.load([0, 2])
    with pytest.raises(DatasetError, match=r"image 3 of torch/mnist.*label 10.*0\.\.9"):
        images.load([0, 3])


def test_torchvision_image_folder_is_a_folder(tmp_path):
    dataset = make_folder(tmp_path, train=5, test=2)
    again = dataset.replace("folder:", "torch/image_folder:")
    assert numbers(open_images(again, "test", CONFIG)) == list(range(4))


class FakeReader:
    """As timm's readers are: an open file and a label for each index."""

    class_to_idx = {"bee": 1, "ant": 0}  # noqa: RUF012

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        file = io.BytesIO()
        paint(index, index % 2).save(file, "PNG")
        return (io.BytesIO(b"damaged") if index == 7 else file), index % 2


class FakeDataset:
    """As ``timm.data.ImageDataset`` is: it puts another image in the place of a damaged one."""

    def __init__(self, count):
        self.reader = FakeReader(count)

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, index):
        raise AssertionError("damaged images would go unnoticed")


class FakeStream(IterableDataset):
    """As ``timm.data.IterableImageDataset`` is."""

    def __init__(self, announced, count, reader=None):
        self.announced, self.count, self.reader = announced, count, reader

    def __len__(self):
        return self.announced

    def __iter__(self):
        return ((paint(i, i % 2), i % 2) for i in range(self.count))


def fake_library(monkeypatch, splits, make):
    def create_dataset(name, root, split, **keys):
        assert split in splits
        return make(name, root, split, **keys)

    monkeypatch.setattr(timm_sources, "_describe", lambda *_: (splits, {"input_key": "img"}))
    monkeypatch.setattr(timm_sources, "create_dataset", create_dataset)


def test_indexed_datasets_of_timm(monkeypatch):
    asked = []

    def make(name, root, split, input_key):
        asked.append((name, root, split, input_key))
        return FakeDataset({"train": 20, "val": 6, "test": 8}[split])

    fake_library(monkeypatch, ["train", "val", "test"], make)
    dataset = "HFDS/Someone/Bugs:/cache"
    assert numbers(open_images(dataset, "validation", CONFIG)) == list(range(6))
    assert set(asked) == {
        ("hfds/Someone/Bugs", "/cache", "train", "img"),
        ("hfds/Someone/Bugs", "/cache", "val", "img"),
    }
    test = open_images(dataset, "test", CONFIG)
    assert test.class_names == ("ant", "bee")
    with pytest.raises(DatasetError, match=r"image 7 of hfds/Someone/Bugs \(test\)"):
        test.load(range(8))


@pytest.mark.parametrize("library", ["hfds", "hfids"])
def test_hugging_face_tells_its_splits_and_columns(monkeypatch, library):
    picture, label = type("Image", (), {}), type("ClassLabel", (), {})
    columns = {
        "id": object(),
        "img": picture(),
        "thumb": picture(),
        "kind": label(),
        "sub": label(),
    }
    described = SimpleNamespace(features=columns, splits={"train": None, "test": None})
    fake = SimpleNamespace(
        Image=picture,
        ClassLabel=label,
        load_dataset=lambda name, cache_dir: {"train": described, "test": described},
        load_dataset_builder=lambda name, cache_dir: SimpleNamespace(info=described),
    )
    asked = []

    def create_dataset(name, root, split, **keys):
        asked.append(keys)
        return FakeDataset(20)

    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(timm_sources, "create_dataset", create_dataset)
    assert len(open_images(f"{library}/bugs", "validation", CONFIG)) == 2
    assert asked == [{"input_key": "img", "target_key": "kind"}]


def test_streams_keep_what_is_asked_for(monkeypatch):
    fake_library(monkeypatch, ["train", "test"], lambda *_, **__: FakeStream(20, 20))
    train = open_images("hfids/bugs", "train", CONFIG, size=6, seed=1)
    validation = open_images("hfids/bugs", "validation", CONFIG)
    assert train.class_names == ("0", "1")
    assert len(set(numbers(train))) == 6
    assert len(numbers(validation)) == 2
    assert not set(numbers(train)) & set(numbers(validation))


def test_a_stream_that_ends_early_is_refused(monkeypatch):
    fake_library(
        monkeypatch, ["train", "test"], lambda *_, **__: FakeStream(20, 12, FakeReader(20))
    )
    with pytest.raises(DatasetError, match="announces 20 images"):
        open_images("wds/bugs:somewhere", "test", CONFIG)


def test_a_dataset_without_training_images_is_refused(monkeypatch):
    fake_library(monkeypatch, ["test"], lambda *_, **__: FakeDataset(5))
    with pytest.raises(DatasetError, match="no split named train"):
        open_images("hfds/bugs", "test", CONFIG)


def test_local_datasets_need_no_network(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    write_mnist(tmp_path, train=20, test=5, labels=[7, 0])
    open_images(f"torch/mnist:{tmp_path}", "train", CONFIG)
    with pytest.raises(DatasetError):
        open_images(f"torch/mnist:{tmp_path}/elsewhere", "train", CONFIG)
