"""DynamicViT's policy: who its predictors keep, what that costs, and what is refused."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prunevit.agents import DynamicViTPolicy, Policy, PrunedViT
from prunevit.agents.policies.dither import dither_levels
from prunevit.agents.policies.dynamic_vit import KeepPredictor
from prunevit.envs.observations import View
from prunevit.envs.vit.staged_vit import StagedViT

BATCH, PATCHES, STAGES = 5, 16, (1, 3)


def random_policy(backbone, keep=0.5):
    """Far from its initialisation, where all patches are judged nearly alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = DynamicViTPolicy(backbone.width, backbone.num_stages, keep, hidden=8)
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter)
    return policy


@pytest.fixture(scope="module")
def backbone(vit):
    return StagedViT(vit, STAGES)


@pytest.fixture
def images(some_images):
    return some_images.load(range(BATCH))[0]


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, [16, 16]), (0.7, [11, 7]), (0.5, [8, 4]), (0.2, [3, 0])]
)
@torch.no_grad()
def test_as_many_of_every_image_as_the_share_says(backbone, images, keep, kept):
    policy = random_policy(backbone)
    assert isinstance(policy, Policy)
    policy.keep = keep  # one that was made for another share
    trace = PrunedViT(backbone, policy).trace(images)
    assert trace.alive.sum(2).tolist() == [kept] * BATCH
    assert not (trace.alive[:, 1] & ~trace.alive[:, 0]).any()


@torch.no_grad()
def test_the_likeliest_are_kept(backbone, images):
    policy = random_policy(backbone, 0.25)
    view = View(backbone, backbone.begin(images), 0, torch.zeros(BATCH))
    logits = policy.predictors[0](view.token, view.image, BATCH, torch.ones(len(view.image)))
    likely = logits.softmax(1)[:, 1].view(BATCH, PATCHES)
    keep = policy(view)
    for image in range(BATCH):
        assert likely[image, keep[image]].min() > likely[image, ~keep[image]].max()


@torch.no_grad()
def test_dither_keeps_those_who_exceed_their_levels_most(backbone, images):
    policy = random_policy(backbone, 0.5)
    for predictor in policy.predictors:
        predictor.judge[-1].weight.mul_(0.1)  # scores as close as levels are
    tokens = backbone.begin(images)
    first = View(backbone, tokens, 0, torch.zeros(BATCH))
    views = [first, View(backbone, backbone.advance(tokens, policy(first), 0), 1, first.alpha)]
    policy.dither = True
    for stage, view in enumerate(views):
        kept = policy(view)
        assert torch.equal(kept, policy(view))
        everyone = torch.ones(len(view.image))
        logits = policy.predictors[stage](view.token, view.image, BATCH, everyone)
        levels = dither_levels(*backbone.grid_size, stage, kept.device).logit()
        lead = view.scatter(logits[:, 1] - logits[:, 0]) - levels
        for image in range(BATCH):
            lost = view.alive[image] & ~kept[image]
            assert lead[image, kept[image]].min() > lead[image, lost].max()
        assert kept.sum(1).tolist() == [8 // (stage + 1)] * BATCH
        policy.dither = False
        assert not torch.equal(kept, policy(view))
        policy.dither = True


@torch.no_grad()
def test_images_are_judged_independently_of_each_other(backbone, images):
    model = PrunedViT(backbone, random_policy(backbone)).eval()
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert model(images[:0]).shape == (0, 5)


@torch.no_grad()
def test_the_average_is_over_the_living():
    """Carrying pruned patches along, as training does, changes nothing for the living."""
    torch.manual_seed(0)
    predictor = KeepPredictor(12, 8)
    tokens, image = torch.randn(9, 12), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    alive = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 0.0])
    all_of_them = predictor(tokens, image, 3, alive)
    living = alive > 0
    alone = predictor(tokens[living], image[living], 3, torch.ones(int(living.sum())))
    torch.testing.assert_close(all_of_them[living], alone)
    assert all_of_them.isfinite().all()  # of an image that has none left too
    others = predictor(tokens[:4], image[:4], 1, torch.ones(4))
    assert not torch.allclose(others[0], all_of_them[0])  # the average counts


def test_a_decision_costs_the_predictors_layers(backbone):
    policy = random_policy(backbone)
    with FlopCounterMode(display=False) as counter:
        policy.predictors[0](torch.zeros(7, 32), torch.zeros(7, dtype=torch.long), 1, torch.ones(7))
    assert policy.macs_per_decision * 7 == counter.get_total_flops() // 2


def test_half_precision_moves_the_backbone_alone(make_vit, images):
    backbone = StagedViT(make_vit(), STAGES)
    model = PrunedViT(backbone, random_policy(backbone)).bfloat16()
    assert model.policy.predictors[0].read[1].weight.dtype == torch.float32
    with torch.no_grad():
        assert model(images.bfloat16()).isfinite().all()


def test_what_is_refused(make_vit, backbone, images):
    for keep in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"keep={keep} must be above 0"):
            DynamicViTPolicy(32, 2, keep)
    with pytest.raises(ValueError, match="hidden=6 must be a multiple of 4"):
        DynamicViTPolicy(32, 2, hidden=6)
    with pytest.raises(ValueError, match="width 32 with 2 stages, this one is of width 48 with 3"):
        PrunedViT(StagedViT(make_vit(embed_dim=48), (1, 2, 3)), random_policy(backbone))
    with pytest.raises(ValueError, match="logits are not finite"):
        PrunedViT(backbone, random_policy(backbone))(images * torch.nan)
