import hashlib

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from prunevit.envs.data import digits

SPLITS = ("train", "validation", "test")
# of the first 100 training images and labels of seed 0; it changes with the recipe of the images,
# and with it the weights that are shipped have to be trained again
FIRST_HUNDRED = "9c1c88b4b01a6d7e26b40be26cdeb661ee3e8970b34a379af4ede25c0f17ea22"


def digest(drawn):
    images, labels = drawn
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


def test_images_are_the_same_on_every_machine():
    assert digest(digits.draw_digits("train", 100)) == FIRST_HUNDRED


def test_images_do_not_depend_on_threads():
    with threadpool_limits(1):
        one = digest(digits.draw_digits("test", 200, seed=3))
    with threadpool_limits(2):
        assert digest(digits.draw_digits("test", 200, seed=3)) == one


def test_sums_of_pixels_are_exact():
    random = np.random.RandomState(0)
    scans = np.full((50, 8, 8), digits.SCAN_MAX * digits.BRIGHTNESS[1], np.float32)
    size = random.randint(digits.SIZES[0], digits.SIZES[1] + 1, size=50)
    top, left = random.randint(-digits.OFFSET_MARGIN, digits.IMAGE_SIZE, size=(2, 50))
    weights = digits._interpolation().astype(np.int64)
    rows, columns = (
        weights[size - digits.SIZES[0], place + digits.OFFSET_MARGIN] for place in (top, left)
    )
    exact = rows @ scans.astype(np.int64) @ columns.transpose(0, 2, 1)
    assert exact.max() > 2**23
    np.testing.assert_array_equal(digits._enlarge(scans, size, top, left), exact)
    background = digits._background(random, 20) * 2.0**16
    np.testing.assert_array_equal(background, np.round(background))


def test_splits_share_no_scan_and_have_every_class():
    parts = [digits.scan_indices(split) for split in SPLITS]
    together = np.concatenate(parts)
    _, labels = digits._scans()
    assert sorted(together) == list(range(len(labels)))
    for part, share in zip(parts, (0.7, 0.12, 0.18), strict=True):
        counts = np.bincount(labels[part], minlength=10)
        assert counts.min() > 0.9 * share * len(labels) / 10


def test_images_come_from_the_scans_of_their_split(monkeypatch):
    drawn = []
    scans, labels = digits._scans()
    numbered = scans * 0 + np.arange(len(scans))[:, None, None].astype(np.float32)
    enlarge = digits._enlarge

    def record(inked, *place):
        drawn.extend(np.unique(inked[inked > 0]))
        return enlarge(inked, *place)

    monkeypatch.setattr(digits, "_scans", lambda: (numbered, labels))
    monkeypatch.setattr(digits, "BRIGHTNESS", (1, 1))
    monkeypatch.setattr(digits, "_enlarge", record)
    digits.draw_digits("validation", 100)
    assert set(drawn) <= set(digits.scan_indices("validation"))


def test_the_seed_decides():
    images, labels = digits.draw_digits("train", 30, seed=5)
    again, same_labels = digits.draw_digits("train", 30, seed=5)
    other, _ = digits.draw_digits("train", 30, seed=6)
    other_split, _ = digits.draw_digits("test", 30, seed=5)
    assert torch.equal(images, again)
    assert torch.equal(labels, same_labels)
    assert not torch.equal(images, other)
    assert not torch.equal(images, other_split)
    assert len(images.flatten(1).unique(dim=0)) == 30


def test_a_longer_draw_begins_with_the_shorter():
    images, labels = digits.draw_digits("train", 130, seed=1)
    longer, longer_labels = digits.draw_digits("train", 250, seed=1)
    assert torch.equal(images, longer[:130])
    assert torch.equal(labels, longer_labels[:130])
    assert not torch.equal(longer[:100], longer[100:200])


def test_every_digit_is_as_frequent():
    images, labels = digits.draw_digits("train", 5_000)
    assert images.shape == (5_000, 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    shares = labels.bincount(minlength=10) / len(labels)
    assert shares.min() > 0.08
    assert shares.max() < 0.12


def test_sizes_and_places_of_the_digit_vary(monkeypatch):
    boxes = []
    enlarge = digits._enlarge

    def record(inked, size, top, left):
        boxes.append(np.stack([size, top, left]))
        return enlarge(inked, size, top, left)

    monkeypatch.setattr(digits, "_enlarge", record)
    digits.draw_digits("train", 500)
    # the digit is enlarged first, then its clutter
    size, top, left = np.concatenate(boxes[:: 1 + digits.FRAGMENTS], axis=1)
    assert len(size) == 500
    assert size.min() < 17
    assert size.max() > 43
    assert size.std() > 7
    for place in (top, left):
        assert place.min() >= 0
        assert (place + size).max() == digits.IMAGE_SIZE
        assert place.std() > 10


def test_no_clutter_lies_on_the_digit(monkeypatch):
    monkeypatch.setattr(digits, "_background", lambda random, n: np.zeros((n, 64, 64), np.float32))
    calls = []
    enlarge = digits._enlarge

    def record(inked, size, top, left):
        calls.append((enlarge(inked, size, top, left), size, top, left))
        return calls[-1][0]

    monkeypatch.setattr(digits, "_enlarge", record)
    images, _ = digits.draw_digits("train", 100)
    light, size, top, left = calls[0]
    alone = (light / (digits.SCAN_MAX * digits.WEIGHT**2)).astype(np.uint8)
    changed = 0
    for i, image in enumerate(images[:, 0].numpy()):
        box = np.s_[top[i] : top[i] + size[i], left[i] : left[i] + size[i]]
        np.testing.assert_array_equal(image[box], alone[i][box])
        changed += (image != alone[i]).any()
    assert changed > 90


def test_normalise_centres_the_pixels():
    images, _ = digits.draw_digits("train", 500)
    normal = digits.normalise(images)
    assert normal.dtype == torch.float32
    assert abs(normal.mean()) < 0.5
    assert 0.5 < normal.std() < 1.5
    np.testing.assert_allclose(normal[0, 0, 0, 0], (images[0, 0, 0, 0] / 255 - 0.4) / 0.25, 1e-6)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"'val'.*train, validation, test"):
        digits.draw_digits("val", 10)
