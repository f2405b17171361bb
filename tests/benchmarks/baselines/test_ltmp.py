"""LTMP against timm, against one image at a time, and its masked training against both."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prunevit.benchmarks.baselines import ltmp
from prunevit.benchmarks.baselines.ltmp import (
    LTMPViT,
    State,
    learn_thresholds,
    linear_macs,
    masked_pass,
    merge_into,
)
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

STAGES = (1, 3)
NOTHING = (1.1,) * 4, (-1.0,) * 4
MERGE, PRUNE = (0.6, 0.3, 1.1, 0.2), (0.02, 0.03, 0.05, 0.06)


@pytest.fixture
def images(some_images):
    return some_images.load(range(6))[0]


def test_merging_sources_count_by_size_and_the_most_important_one_tells():
    patches = State(
        x=torch.tensor([[[1.0], [10.0], [4.0], [20.0]]]),
        size=torch.tensor([[[1.0], [2.0], [3.0], [1.0]]]),
        alive=torch.ones(1, 4),
    )
    importance = torch.tensor([[0.9, 0.2, 0.1, 0.3]])
    into, merging = torch.tensor([[0, 0]]), torch.tensor([[True, True]])
    x, size, most = merge_into(patches, importance, into, merging, 0)
    # sources at even places, then targets: 10 twice, 1 once and 4 three times; 20 alone
    assert x[0, :, 0].tolist() == pytest.approx([1, 4, 33 / 6, 20])
    assert size[0, :, 0].tolist() == [1, 3, 6, 1]
    assert most[0].tolist() == pytest.approx([0.9, 0.1, 0.9, 0.3])
    x, size, most = merge_into(patches, importance, into, torch.tensor([[False, False]]), 0)
    assert x[0, :, 0].tolist() == [1, 4, 10, 20]


@torch.no_grad()
def test_without_thresholds_it_is_timms_model(make_vit, images, kwargs):
    model = make_vit(**kwargs)
    staged = StagedViT(model, STAGES)
    trace = LTMPViT(staged, *NOTHING).trace(images)
    torch.testing.assert_close(trace.logits, model(images), rtol=0, atol=1e-5)
    assert trace.alive.all()


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(sharp_vit, images, kwargs):
    rival = LTMPViT(StagedViT(sharp_vit(**kwargs), STAGES), MERGE, PRUNE)
    together = rival.trace(images)
    counts = together.alive.sum(2)
    assert len(counts[:, 1].unique()) > 1
    assert (counts[:, 1] < counts[:, 0]).all()
    alone = [rival.trace(image[None]) for image in images]
    logits = torch.cat([trace.logits for trace in alone])
    torch.testing.assert_close(together.logits, logits, rtol=0, atol=1e-5)
    assert torch.equal(together.alive, torch.cat([trace.alive for trace in alone]))
    assert torch.equal(together.macs, torch.cat([trace.macs for trace in alone]))


@torch.no_grad()
def test_its_cost_is_what_is_computed(sharp_vit, images, kwargs):
    rival = LTMPViT(StagedViT(sharp_vit(**kwargs), STAGES), MERGE, PRUNE)
    for image in images:
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            trace = rival.trace(image[None])
        assert int(trace.macs[0]) == counter.get_total_flops() // 2


@torch.no_grad()
def test_all_patches_can_go(vit, images):
    trace = LTMPViT(StagedViT(vit, STAGES), (0.5,) * 4, (2.0,) * 4).trace(images)
    assert not trace.alive.any()
    assert trace.logits.isfinite().all()


# --- training ---


@torch.no_grad()
def test_masks_hide_what_is_removed(sharp_vit, images, kwargs, monkeypatch):
    """Places of the gone count in later blocks of the training, so only one block prunes or
    merges here.
    """
    monkeypatch.setattr(ltmp, "EPSILON", 0.0)
    staged = StagedViT(sharp_vit(**kwargs), STAGES)
    for merge, prune in ((1.1, 0.05), (0.3, -1.0), (0.3, 0.05)):
        thresholds = (1.1, merge, 1.1, 1.1), (-1.0, prune, -1.0, -1.0)
        logits, alive = masked_pass(staged, images, *map(torch.tensor, thresholds))
        removed = LTMPViT(staged, *thresholds).trace(images)
        left = removed.alive[:, 1].sum(1)
        assert left.min() > 0
        assert left.max() < 16
        assert (alive[1].sum(1) - staged.num_prefix).tolist() == left.tolist()
        torch.testing.assert_close(logits, removed.logits, rtol=0, atol=1e-5)


def compute_of(staged, images, merge, prune):
    with torch.no_grad():
        _, alive = masked_pass(staged, images, torch.tensor(merge), torch.tensor(prune))
    counts = [torch.full_like(alive[0].sum(1), staged.num_slots), *(a.sum(1) for a in alive)]
    return float(linear_macs(staged, counts).mean()) / staged.dense_macs


@pytest.mark.parametrize("target", [0.5, 0.8])
def test_training_brings_the_compute_to_its_target(sharp_vit, some_images, target):
    staged = StagedViT(sharp_vit(), STAGES)
    batch = some_images.load(range(12))
    merge, prune = learn_thresholds(staged, [batch] * 60, target, 5e-3, 1e-3)
    assert all(0 <= threshold <= 1 for threshold in (*merge, *prune))
    assert compute_of(staged, batch[0], merge, prune) == pytest.approx(target, abs=0.1)


def test_a_steep_loss_moves_thresholds_no_further_than_its_rate(sharp_vit, some_images):
    staged = StagedViT(sharp_vit(), STAGES)
    merge, prune = learn_thresholds(staged, [some_images.load(range(12))], 0.05, 1e-2, 1e-3)
    moved = torch.tensor(merge) - ltmp.FIRST_MERGE_THRESHOLD
    assert 0.9e-2 < moved.norm() < 1.01e-2
    assert 0.9e-3 < torch.tensor(prune).norm() < 1.01e-3


# --- bad input ---


def test_what_it_can_not_do_is_refused(make_vit, vit):
    for kwargs in ({"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}):
        with pytest.raises(UnsupportedBackboneError, match="need a class token"):
            LTMPViT(StagedViT(make_vit(**kwargs), STAGES), *NOTHING)
    with pytest.raises(ValueError, match="3 and 4 thresholds for 4 blocks"):
        LTMPViT(StagedViT(vit, STAGES), MERGE[:3], PRUNE)
