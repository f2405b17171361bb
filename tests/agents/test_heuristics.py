"""Policies without training, on views of a game under way."""

import pytest
import torch

from tokenprune.agents import KeepAll, Policy, TopK
from tokenprune.envs.backbone import StagedViT
from tokenprune.envs.observations import View

BATCH, PATCHES, STAGES = 5, 16, (0, 1, 3)
SCORES = {
    "attention": lambda view: view.cls_attention,
    "norm": lambda view: view.token.square().sum(1).sqrt(),
}
each_score = pytest.mark.parametrize("score", ["attention", "norm", "random"])


@pytest.fixture(scope="module")
def backbone(vit):
    return StagedViT(vit, STAGES)


@pytest.fixture
def views(backbone, some_images, keeps):
    """Before every stage of a random game; of image 0 nothing is left after the first."""
    tokens = backbone.begin(some_images.load(range(BATCH))[0])
    seen = []
    for stage, keep in enumerate(keeps(BATCH, len(STAGES), PATCHES)):
        seen.append(View(backbone, tokens, stage, torch.zeros(BATCH)))
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
    kept = [TopK((4, 4, 4), score)(views[1]) for score in ("attention", "norm", "random")]
    assert not any(torch.equal(kept[i], kept[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


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


def test_what_is_refused(views):
    with pytest.raises(ValueError, match=r"'beauty': choose from attention, norm, random"):
        TopK((1, 1, 1), "beauty")
    with pytest.raises(ValueError, match=r"tokens=\(4, -1\).*at least 0"):
        TopK((4, -1))
    with pytest.raises(ValueError, match="tokens for 2 stages, the backbone has 3"):
        TopK((4, 4))(views[0])
