"""Policies without training, on views of a game under way."""

from itertools import combinations

import pytest
import torch

from prunevit.agents import (
    AttentionThreshold,
    KeepAll,
    Policy,
    PrunedViT,
    TopK,
)
from prunevit.agents.policies.dither import dither_levels
from prunevit.envs.observations import View
from prunevit.envs.vit.staged_vit import StagedViT

BATCH, PATCHES, STAGES = 5, 16, (0, 1, 3)
SCORES = {
    "attention": lambda view: view.cls_attention,
    "norm": lambda view: view.token.square().sum(1).sqrt(),
    "brightness": lambda view: view.brightness,
}
each_score = pytest.mark.parametrize("score", ["attention", "norm", "brightness", "random"])


@pytest.fixture(scope="module")
def backbone(vit):
    return StagedViT(vit, STAGES)


@pytest.fixture
def views(backbone, some_images, keeps):
    """Before every stage of a random game; of image 0 nothing is left after the first."""
    images = some_images.load(range(BATCH))[0]
    tokens = backbone.begin(images)
    seen = []
    for stage, keep in enumerate(keeps(BATCH, len(STAGES), PATCHES)):
        seen.append(View(backbone, tokens, stage, torch.zeros(BATCH), images=images))
        tokens = backbone.advance(tokens, keep, stage)
    return seen


def test_keep_all(views):
    policy = KeepAll()
    assert isinstance(policy, Policy)
    assert (policy.needs_attention, policy.macs_per_decision) == (False, 0)
    for view in views:
        assert torch.equal(policy(view), view.alive)


@each_score
@pytest.mark.parametrize(
    "k", [(16, 16, 16), (9, 6, 2), (3, 3, 3), (1, 1, 1), (2, 1, 0), (99, 20, 17)]
)
def test_k_are_kept_or_all_where_fewer_live(views, score, k):
    policy = TopK(k, score)
    assert isinstance(policy, Policy)
    assert policy.macs_per_decision == 0
    assert policy.needs_attention == (score == "attention")
    for view in views:
        keep = policy(view)
        assert keep.shape == (BATCH, PATCHES)
        assert keep.dtype == torch.bool
        assert not (keep & ~view.alive).any()
        assert keep.sum(1).tolist() == [min(k[view.stage], int(n)) for n in view.count]


@pytest.mark.parametrize("score", SCORES)
def test_the_highest_scores_are_kept(views, score):
    for view in views[1:]:
        keep = TopK((4, 4, 4), score)(view)
        scores = view.scatter(SCORES[score](view))
        for i in range(BATCH):
            kept, pruned = scores[i, keep[i]], scores[i, view.alive[i] & ~keep[i]]
            if len(pruned):
                assert kept.min() > pruned.max()


def test_scores_differ(views):
    kept = [TopK((4, 4, 4), score)(views[1]) for score in (*SCORES, "random")]
    assert not any(torch.equal(one, other) for one, other in combinations(kept, 2))


@torch.no_grad()
def test_brightness_is_the_mean_pixel_of_a_patch(backbone):
    """Patches of 8 x 8 pixels, in rows of 4: the brightest are kept, whatever the channel."""
    images = torch.zeros(2, 3, 32, 32)
    images[0, 2, 8:16, 16:24] = 1  # row 1, column 2
    images[1, 0, 24:32, 0:8] = 1  # row 3, column 0
    kept = PrunedViT(backbone, TopK((1, 1, 1), "brightness")).trace(images).alive
    assert kept.nonzero().tolist() == [[i, t, p] for i, p in ((0, 6), (1, 12)) for t in range(3)]


def test_brightness_needs_the_images(backbone, some_images):
    view = View(backbone, backbone.begin(some_images.load(range(2))[0]), 0, torch.zeros(2))
    with pytest.raises(ValueError, match="shows none: run the policy in a PrunedViT"):
        TopK((1, 1, 1), "brightness")(view)


def test_random_choices_follow_from_the_seed(views):
    view = views[0]

    def choose(policy, times):
        return torch.stack([policy(view) for _ in range(times)])

    one, same, other = (choose(TopK((4, 4, 4), "random", seed), 6) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len(one.unique(dim=0)) == 6  # anew at every decision
    many = choose(TopK((4, 4, 4), "random"), 400).float().mean((0, 1))
    assert (many - 4 / PATCHES).abs().max() < 0.05  # no place is preferred


# --- policies whose images differ in length ---


def test_a_threshold_keeps_whoever_is_paid_enough(views):
    policy = AttentionThreshold((1, 0.9, 0))
    assert isinstance(policy, Policy)
    assert (policy.needs_attention, policy.macs_per_decision) == (True, 0)
    assert torch.equal(policy(views[0]), views[0].alive)  # nothing was paid yet
    for view in views[1:]:
        paid = view.scatter(view.cls_attention)
        least = policy.thresholds[view.stage]
        assert torch.equal(policy(view), view.alive & (paid >= least))
    lengths = policy(views[1]).sum(1)
    assert len(lengths.unique()) > 1


# --- bad input ---


def test_what_is_refused(views):
    with pytest.raises(ValueError, match=r"'beauty': choose from attention, norm, bright"):
        TopK((1, 1, 1), "beauty")
    with pytest.raises(ValueError, match=r"tokens=\(4, -1\).*at least 0"):
        TopK((4, -1))
    with pytest.raises(ValueError, match=r"thresholds=\(nan,\).*at least 0"):
        AttentionThreshold((float("nan"),))
    with pytest.raises(ValueError, match="tokens for 2 stages, the backbone has 3"):
        TopK((4, 4))(views[0])


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_a_dithered_threshold_keeps_alike_patches_in_their_share(backbone, some_images, strength):
    """Before the first block all patches have the same attention."""
    view = View(backbone, backbone.begin(some_images.load(range(4))[0]), 0, torch.zeros(4))
    for share in (0.25, 0.5, 0.75):
        # share = sigmoid(log(1 / threshold) / strength)
        threshold = ((1 - share) / share) ** strength
        kept = AttentionThreshold((threshold, 1.0, 1.0), strength)(view)
        assert (kept.sum(1) == share * PATCHES).all()
        assert (kept.unflatten(1, (2, 8)).sum(2) >= share * 8 - 1).all()  # each half has its part
        assert torch.equal(kept, AttentionThreshold((threshold, 1.0, 1.0), strength)(view))
    assert not AttentionThreshold((1.1, 1.0, 1.0))(view).any()  # all together
    assert AttentionThreshold((0.0, 1.0, 1.0), strength)(view).all()


def test_dither_moves_a_threshold_and_keeps_no_dead_patch(views):
    for view in views:
        dense = view.scatter(view.cls_attention)
        kept = AttentionThreshold((1.0, 1.0, 1.0), 1.0)(view)
        assert not (kept & ~view.alive).any()
        levels = dither_levels(*view.backbone.grid_size, view.stage, dense.device)
        expected = (dense >= levels / (1 - levels)) & view.alive
        assert torch.equal(kept, expected)
        barely = AttentionThreshold((1.01, 1.01, 1.01), 1e-4)(view)
        assert torch.equal(barely, AttentionThreshold((1.01, 1.01, 1.01))(view))


def test_a_negative_dither_is_refused():
    with pytest.raises(ValueError, match=r"dither=\(-1,\): each must be at least 0"):
        AttentionThreshold((1.0,), -1)
