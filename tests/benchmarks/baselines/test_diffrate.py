"""DiffRate against timm, and its masked training against what runs in the end."""

import pytest
import torch

from prunevit.benchmarks.baselines import diffrate
from prunevit.benchmarks.baselines.diffrate import (
    DiffRateViT,
    expected_counts,
    learn_schedule,
    macs_counter,
    masked_pass,
    merge_last,
    token_counts,
)
from prunevit.benchmarks.baselines.ltmp import linear_macs
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError
from prunevit.trainers.common import masked_vit

NOTHING = ((16, 16),) * 4
SCHEDULE = ((16, 16), (14, 11), (9, 9), (8, 5))


def test_the_last_patches_merge_into_the_most_similar_ones():
    x = torch.tensor([[[4.0, 0.0], [0.0, 2.0], [2.0, 2.0], [0.0, 8.0], [-1.0, -1.0]]])
    size = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])[None, :, None]
    merged, total = merge_last(x, size, 3)
    # (0, 8) is like (0, 2); (-1, -1) is like none, and counts for nothing
    assert merged[0, 1].tolist() == [0, 5]
    assert merged[0, 2].tolist() == [2, 2]
    assert total[0, 1:, 0].tolist() == [6, 3]
    assert total.sum() == 1 + 6 + 3


def test_counts_fall():
    assert token_counts(16, SCHEDULE) == [16, 16, 11, 9, 5]
    assert token_counts(16, ((9, 12), (12, 14))) == [16, 9, 9]


@torch.no_grad()
def test_where_nothing_goes_it_is_timms_model(make_vit, images, kwargs):
    model = make_vit(**kwargs)
    rival = DiffRateViT(model, NOTHING)
    torch.testing.assert_close(rival(images), model(images), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_pass_has_as_many_tokens_as_the_schedule_says(make_vit, images, kwargs):
    model = make_vit(**kwargs)
    seen = []
    hooks = [
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
        for block in model.blocks
    ]
    DiffRateViT(model, SCHEDULE)(images)
    for hook in hooks:
        hook.remove()
    assert seen == [model.num_prefix_tokens + count for count in token_counts(16, SCHEDULE)[1:]]


def test_its_cost_is_what_is_computed(make_vit, kwargs):
    staged = StagedViT(make_vit(**kwargs), (1, 3))
    prefix, width = staged.num_prefix, staged.width
    counts = [prefix + count for count in token_counts(16, SCHEDULE)]
    cost = linear_macs(staged, [torch.tensor(count) for count in counts])
    ranking = sum((prefix + patches) * width for patches in (16, 11, 9))
    merging = (3 * 11 + 3 * 5) * width
    assert macs_counter(staged.model, (3, 32, 32))(SCHEDULE) == cost + ranking + merging
    assert macs_counter(staged.model, (3, 32, 32))(NOTHING) == staged.dense_macs


@torch.no_grad()
def test_masks_hide_what_is_removed(make_vit, images, kwargs, monkeypatch):
    """Where nothing merges: in training a merged token is at least as large as one patch."""
    monkeypatch.setattr(masked_vit, "EPSILON", 0.0)
    staged = StagedViT(make_vit(**kwargs), (1, 3))
    candidates = torch.arange(16, 0, -1.0)
    rates = torch.full((4, 2, 16), -1e9)
    for block, (stay, then) in enumerate(((16, 16), (14, 16), (9, 9), (5, 12))):
        rates[block, 0, 16 - stay] = rates[block, 1, 16 - then] = 0
    logits, history = masked_pass(staged, images, rates, candidates)
    assert [tuple(map(int, kept)) for kept in history] == [(14, 16), (9, 9), (5, 12)]
    assert [int(count) for count in expected_counts(staged, history)] == [
        staged.num_prefix + count for count in (16, 16, 14, 9, 5)
    ]
    removed = DiffRateViT(staged.model, ((16, 16), (14, 16), (9, 9), (5, 12)))(images)
    torch.testing.assert_close(logits, removed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", [0.6, 0.8])
def test_training_brings_the_compute_to_its_target(make_vit, some_images, target, monkeypatch):
    monkeypatch.setattr(diffrate, "FIRST_LR", 0.1)  # in few steps
    staged = StagedViT(make_vit().requires_grad_(False), (1, 3))
    schedule = learn_schedule(staged, [some_images.load(range(12))] * 100, 100, target)
    assert schedule[0] == (16, 16)
    share = macs_counter(staged.model, (3, 32, 32))(schedule) / staged.dense_macs
    assert share == pytest.approx(target, abs=0.06)


def test_the_gradient_is_that_of_the_expectation():
    candidates = torch.tensor([4.0, 3.0, 2.0, 1.0])
    logits = torch.tensor([0.1, 0.5, -0.3, 0.2], requires_grad=True)
    kept = diffrate.expected_kept(logits, candidates)
    assert float(kept.detach()) == 3  # of 2.6
    mask = diffrate.rank_mask(logits, candidates, 3, 4, 4)
    assert mask.tolist() == [1, 1, 1, 0]
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7])
    (found,) = torch.autograd.grad(kept + (mask * weights).sum(), logits)
    share = logits.softmax(0)
    ranks = torch.stack([share.sum(), share[:3].sum(), share[:2].sum(), share[0]])
    (expected,) = torch.autograd.grad(share @ candidates + (ranks * weights).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_what_it_can_not_do_is_refused(make_vit, vit):
    for kwargs in ({"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}):
        with pytest.raises(UnsupportedBackboneError, match="need a class token"):
            DiffRateViT(make_vit(**kwargs), NOTHING)
    for schedule in (NOTHING[:3], ((16, 16), (0, 5), (4, 4), (4, 4))):
        with pytest.raises(ValueError, match="4 blocks need two numbers each, at least 1"):
            DiffRateViT(vit, schedule)
