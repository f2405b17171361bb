"""What a frozen part makes of images is computed once, and nothing else changes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers.backbone import BackboneConfig, train
from prunevit.trainers.common import frozen
from prunevit.trainers.common.distributed import Ranks
from prunevit.trainers.common.frozen import CachedFeatures, FrozenPart, freeze
from prunevit.trainers.common.run import TrainingError

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
VITS = {
    "vit_tiny_patch16_224": SMALL,
    "eva02_tiny_patch14_224": SMALL | {"global_pool": "avg"},
}
FREEZE = ["all", "blocks:0", "blocks:2", "blocks:3"]


@pytest.fixture(scope="module")
def photographs(make_photographs):
    return make_photographs(train=40, test=10, shape=(20, 20, 3))


@pytest.fixture(params=VITS)
def config(request, photographs, tmp_path, monkeypatch):
    """A run of a second from weights that somebody trained, without anything random."""
    monkeypatch.chdir(tmp_path)
    name, kwargs = request.param, VITS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_backbone(name, num_classes=2, untrained=True, **kwargs)
    write_weights(tmp_path / "start.safetensors", model.state_dict(), name, 2, kwargs)
    return BackboneConfig(
        backbone=name,
        checkpoint=tmp_path / "start.safetensors",
        dataset=photographs,
        augment=False,
        patch_dropout=0.0,
        epochs=3,
        batch_size=16,
        lr=1e-2,
        device="cpu",
        threads=1,
        run_name="plain",
    )


def records_of(run):
    lines = (Path("runs") / run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture
def counted(monkeypatch):
    """How many images frozen parts were given."""
    seen, features = [], FrozenPart.features

    def counting(self, images, *arguments, **options):
        seen.append(len(images))
        return features(self, images, *arguments, **options)

    monkeypatch.setattr(frozen.FrozenPart, "features", counting)
    return seen


@pytest.mark.parametrize("what", FREEZE)
def test_a_run_with_a_cache_learns_what_one_without_does(config, counted, what):
    plain = replace(config, freeze=what)
    train(plain)
    train(replace(plain, cache_gb=1.0, run_name="cached"))
    assert sum(counted) == 80  # each of the images once, those for validation included
    for ours, theirs in zip(records_of("cached"), records_of("plain"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    ours, theirs = (load_file(f"runs/{run}/backbone.safetensors") for run in ("cached", "plain"))
    start = load_file("start.safetensors")
    assert any(not torch.equal(start[name], theirs[name]) for name in start)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-3, rtol=1e-2)


def test_what_has_no_room_is_computed_each_time(config, counted):
    image = 5 * 16 * 4 + 8  # tokens of 5 slots, 16 numbers each, and a label
    whole = replace(config, freeze="blocks:2", cache_gb=1.0, epochs=2)
    train(whole)
    counted.clear()
    train(replace(whole, cache_gb=40 * image / 1e9, run_name="half"))
    assert sum(counted) > 80
    for ours, theirs in zip(records_of("half"), records_of("plain"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_varied_images_are_computed_each_time_and_those_of_validation_once(config, counted):
    left_out = 0.5 if config.backbone.startswith("vit") else 0.0  # timm's Eva leaves out none
    varied = replace(config, freeze="blocks:2", augment=True, patch_dropout=left_out)
    train(varied)
    train(replace(varied, cache_gb=1.0, run_name="cached"))
    assert sum(counted) == 8
    assert records_of("cached") == [
        pytest.approx(record, abs=1e-5) for record in records_of("plain")
    ]


def test_an_epoch_may_see_a_part_of_the_images(config, counted):
    report = train(replace(config, freeze="all", cache_gb=1.0, epoch_size=32, epochs=4))
    assert report["test_accuracy"] >= 0
    # two batches an epoch, of other images each time
    assert 8 + 32 < sum(counted) <= 80


def test_the_frozen_part_has_no_dropout_and_learns_no_statistics(make_vit):
    model = make_vit(drop_path_rate=0.5, proj_drop_rate=0.5).train()
    freeze(model, "blocks:2")
    FrozenPart(make_vit(), "blocks:2").stay_in_evaluation_mode(model)
    assert not any(part.training for block in model.blocks[:2] for part in block.modules())
    assert not model.patch_embed.training
    assert all(module.training for module in model.blocks[2:].modules())
    assert model.norm.training
    assert model.head.training


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_parts_make_the_whole(make_vit, some_images, precision):
    vit, pixels = make_vit().requires_grad_(False), some_images.images[:3]
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    tolerance = {"atol": 0.1, "rtol": 0.1} if dtype else {}
    for what in FREEZE:
        part = FrozenPart(vit, what)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = part.rest_of(vit)(part.features(pixels, dtype))
            torch.testing.assert_close(logits, vit(pixels), **tolerance)


def test_features_come_in_the_order_that_was_asked_for(some_images):
    kept = CachedFeatures(some_images, lambda x: x.mean((2, 3)), torch.device("cpu"), 1e6)
    for indices in ([3, 1], [1, 5, 3, 3], range(12)):
        features, labels = kept.load(indices)
        images, expected = some_images.load(list(indices))
        torch.testing.assert_close(features, images.mean((2, 3)))
        assert torch.equal(labels, expected)
    assert len(kept) == 12
    assert kept.num_classes == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freeze": "none"}, "cache_gb keeps what the frozen part computes: give --freeze"),
        ({"patch_dropout": 0.5}, "give --patch-dropout 0"),
        ({"mixup": 0.2}, "neither --mixup nor --cutmix"),
        ({"augmentation": {"hflip": 1.0}}, "--augmentation or --no-augment, not both"),
        ({"cache_gb": -1.0}, "cache_gb=-1.0 must be at least 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, change, message):
    fine = {"checkpoint": tmp_path / "w", "freeze": "all", "cache_gb": 1.0}
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**fine | {"augment": False, "patch_dropout": 0.0} | change)


def test_many_processes_do_not_share_a_cache(config):
    class Two(Ranks):
        count = 2

    with pytest.raises(TrainingError, match="is for one process"):
        train(replace(config, freeze="all", cache_gb=1.0), Two())
