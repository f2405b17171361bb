"""``prunevit embed``: photographs in, embeddings out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prunevit.agents import LearnedPolicy, PrunedViT, TokenActor, TopK, calibrate, prune
from prunevit.agents import embed as command
from prunevit.agents.embed import EmbedConfig, embed, main
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data_config import model_data_config
from prunevit.envs.fields import field_size

SHAPE = {"depth": 4, "embed_dim": 32, "num_heads": 2, "patch_size": 8}  # not to be seen on a model


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Thirteen photographs in two folders, one of them damaged."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.RandomState(0)
    for i in range(13):
        file = folder / ("walks" if i % 2 else ".") / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(noise.randint(0, 255, (40, 50, 3), dtype=np.uint8)).save(file)
    (folder / "04.png").write_bytes(b"no photograph")
    return folder


@pytest.fixture(scope="module")
def saved(make_vit, tmp_path_factory):
    """A pruned classifier, as it was saved."""
    folder = tmp_path_factory.mktemp("saved")
    prune(make_vit(), TopK((9, 4)), (1, 3), model_kwargs=SHAPE).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(command, "PART_SIZE", 5)


def config_of(photos, saved, tmp_path, **changes):
    own = {"out": tmp_path / "e.npy", "batch_size": 3, "device": "cpu"}
    return EmbedConfig(**{"photos": photos, "policy": saved} | own | changes)


def expected_of(photos, saved):
    """Embeddings one by one, by name, of those that can be read."""
    model = PrunedViT.from_pretrained(saved)
    model.reset_classifier(0)
    found = {}
    for file in sorted(map(str, photos.rglob("*.png"))):
        if not file.endswith("04.png"):
            config = model_data_config(model.backbone.model)
            # a data set of more than one image, of which each is loaded by itself
            images = open_images(f"photos:{photos}", "train", config)._source
            pixels = command.ImageDataset(images, np.array([images.files.index(file)]), config)
            with torch.no_grad():
                found[file] = model(pixels.load([0])[0])[0].numpy()
    return found


def test_every_photograph_that_can_be_read_is_embedded(photos, saved, tmp_path, capsys):
    main([str(photos), "--policy", str(saved), "--out", str(tmp_path / "e.npy"), "--device", "cpu"])
    printed = capsys.readouterr().out
    embeddings, facts = np.load(tmp_path / "e.npy"), json.loads((tmp_path / "e.json").read_text())
    expected = expected_of(photos, saved)
    assert embeddings.shape == (12, 32)
    assert embeddings.dtype == np.float32
    assert facts["files"] == list(expected)
    np.testing.assert_allclose(embeddings, np.stack(list(expected.values())), atol=1e-5)
    assert "12 photographs embedded" in printed
    assert re.search(r"1 files can't be read:\n.*04\.png can't be read as an image", printed)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.json", "e.npy"]


def test_what_was_stopped_goes_on(photos, saved, tmp_path, monkeypatch):
    config = config_of(photos, saved, tmp_path)
    whole = embed(config_of(photos, saved, tmp_path, out=tmp_path / "whole.npy"))
    parts, embed_part = [], command.embed_part

    def stopped(model, photographs, part, *arguments):
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(part.start)
        return embed_part(model, photographs, part, *arguments)

    with monkeypatch.context() as context:
        context.setattr(command, "embed_part", stopped)
        with pytest.raises(KeyboardInterrupt):
            embed(config)
    assert not config.out.exists()
    parts.clear()
    monkeypatch.setattr(command, "embed_part", stopped)
    assert embed(config) == whole
    assert parts == [10]
    assert config.out.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_compute_is_set_and_reported(make_vit, photos, tmp_path):
    vit = make_vit(num_classes=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        probe = prune(vit, TopK((1, 1)), (1, 3)).backbone
        actor = TokenActor(field_size(probe, "token") + field_size(probe, "stage"), (8,), None)
        for parameter in actor.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    model = prune(vit, LearnedPolicy(actor, ("token", "stage")), (1, 3), model_kwargs=SHAPE)
    images = open_images(f"photos:{photos}", "train", model_data_config(vit), skip=())
    files = [str(images._source.files[at]) for at in images._indices]
    readable = [number for number, file in enumerate(files) if not file.endswith("04.png")]
    known = calibrate(model, images.load(readable)[0])
    model.save_pretrained(tmp_path / "saved")
    share = (known.lowest + known.highest) / 2
    facts = embed(config_of(photos, tmp_path / "saved", tmp_path, compute=share))
    assert facts["compute"] == pytest.approx(share, abs=0.08)
    with pytest.raises(ValueError, match=f"takes {known.lowest:.3f} to {known.highest:.3f} of"):
        embed(config_of(photos, tmp_path / "saved", tmp_path, compute=0.01))


def test_the_dense_model_is_compared_with(photos, saved, tmp_path, capsys):
    found = embed(config_of(photos, saved, tmp_path, compare_dense=7))["compared"]
    assert found["photographs"] == 6  # one of the seven is damaged
    assert 0 < found["cosine"] < 1
    assert found["pruned_per_second"] > 0
    assert found["dense_per_second"] > 0
    every_token = tmp_path / "dense"
    model = PrunedViT.from_pretrained(saved)
    dense = prune(model.backbone.model, TopK((16, 16)), (1, 3), model_kwargs=SHAPE)
    dense.save_pretrained(every_token)
    same = embed(config_of(photos, every_token, tmp_path, compare_dense=7))["compared"]
    assert same["cosine"] == pytest.approx(1, abs=1e-5)


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"photos": "nowhere"}, "no folder"),
        ({"policy": "nowhere"}, "holds no finished run"),
        ({"compute": "0.5"}, "TopK was not calibrated"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_what_can_not_be_done_is_said_in_a_line(photos, saved, tmp_path, change, message):
    own = {"out": str(tmp_path / "e.npy"), "photos": str(photos), "policy": str(saved)}
    given = own | {"device": "cpu"} | change
    folder = given.pop("photos")
    flags = [part for name, value in given.items() for part in (f"--{name}", value)]
    with pytest.raises(SystemExit) as ended:
        main([folder, *flags])
    assert str(ended.value.code).startswith("error: ")
    assert message in ended.value.code
    assert "\n" not in ended.value.code


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": Path("e.txt")}, r"out=e\.txt: a NumPy file ends with \.npy"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"threads": -1}, "threads=-1 must be at least 1"),
    ],
)
def test_values_that_make_no_sense_are_refused(photos, saved, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        config_of(photos, saved, tmp_path, **change)


def test_folders_without_a_photograph_that_can_be_read_are_named(saved, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        embed(config_of(folder, saved, tmp_path))
    (folder / "a.png").write_bytes(b"no photograph")
    with pytest.raises(ValueError, match=r"none of 1 photographs can be read: .*a\.png"):
        embed(config_of(folder, saved, tmp_path))


def test_what_was_begun_otherwise_is_not_gone_on_with(photos, saved, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(command, "embed_part", stop)
        with pytest.raises(KeyboardInterrupt):
            embed(config_of(photos, saved, tmp_path))
    with pytest.raises(ValueError, match=r"begun with other settings \(photographs\)"):
        embed(config_of(photos / "walks", saved, tmp_path))
