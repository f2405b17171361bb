"""Agents that attend to each other: to the living ones of their image, and to no one else."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prunevit.agents import LearnedPolicy, TokenActor
from prunevit.agents.policies.actor_critic import AgentAttention, CommunicatingActor
from prunevit.agents.policies.serialization import learned_policy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.fields import DEFAULT_FIELDS
from prunevit.envs.observations import View
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT

SIZE, ATTENTION, HIDDEN = 6, 4, (8, 5)


def talkative(*arguments, seed=0, **options):
    """An actor in which every weight matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        actor = CommunicatingActor(*arguments, **{"heads": 2} | options)
        for parameter in actor.parameters():
            # prior and bias are stored by a tenth
            torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() else 0.05)
    return actor


@pytest.fixture
def actor():
    return talkative(SIZE, HIDDEN, ATTENTION)


def observe(count, seed=1):
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed))


def test_at_first_it_is_an_actor_that_hears_nobody():
    actors = []
    for kind in (TokenActor, CommunicatingActor):
        torch.manual_seed(0)
        actors.append(kind(SIZE, HIDDEN, ATTENTION, 0.5, 3.0))
    observation = observe(7)
    assert torch.equal(actors[1](observation), actors[0](observation))


@torch.no_grad()
def test_agents_hear_each_other_in_no_order(actor):
    observation = observe(7)
    logits = actor(observation)
    order = torch.tensor([3, 6, 0, 5, 1, 2, 4])
    torch.testing.assert_close(actor(observation[order]), logits[order])
    without = actor(observation[1:])
    assert ((without - logits[1:]).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("lengths", [(3, 1, 5, 2), (4, 4, 4), (6,)])
def test_images_together_are_each_alone(actor, lengths):
    """In decisions and in what is learned from them; images without agents have no part."""
    observation = observe(sum(lengths))
    numbers = torch.tensor([9, 2, 5, 30])[: len(lengths)]
    together = actor(observation, numbers.repeat_interleave(torch.tensor(lengths)))
    alone = torch.cat([actor(part) for part in observation.split(lengths)])
    torch.testing.assert_close(together, alone)
    weights = [p for p in actor.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(together.square().sum(), weights),
        torch.autograd.grad(alone.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("image", [None, torch.zeros(0, dtype=torch.int64)])
def test_nobody_says_nothing(actor, image):
    assert actor(observe(0), image).shape == (0, 2)


def test_what_can_not_attend_is_refused():
    with pytest.raises(ValueError, match="0 heads: it needs at least one"):
        AgentAttention(8, 0)
    with pytest.raises(ValueError, match="needs an actor with a hidden layer"):
        CommunicatingActor(SIZE, (), None)


# --- in a pruned ViT ---


def talkative_policy(backbone, fields=DEFAULT_FIELDS):
    policy = learned_policy(backbone, fields, [8], "cls_attention" in fields, heads=2)
    size = policy.actor.net[1].in_features
    attention = policy.actor.attention
    return LearnedPolicy(talkative(size, (8,), attention, seed=3), fields, backbone.num_prefix)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2}])
@torch.no_grad()
def test_decisions_are_the_same_packed_and_masked_together_and_alone(make_vit, make_images, kwargs):
    vit, images = make_vit(**kwargs), make_images(8).images
    backbones = [StagedViT(vit, (1, 3), mode) for mode in ("packed", "masked")]
    policy = talkative_policy(backbones[0])
    # half of the first 128 decisions are to keep, and none of them is on the edge
    view = View(backbones[0], backbones[0].begin(images), 0, torch.zeros(8))
    prune, keep = policy.logits(view).unbind(1)
    middle = (keep - prune).sort().values[63:65].mean()
    policy.actor.keep_bias -= middle / TokenActor.PRIOR_SPEED
    packed, masked = (PrunedViT(backbone, policy) for backbone in backbones)
    alive = packed.trace(images).alive
    assert len(alive.sum(2).unique()) > 3
    assert torch.equal(masked.trace(images).alive, alive)
    alone = torch.cat([packed.trace(image[None]).alive for image in images])
    assert torch.equal(alone, alive)
    # an agent that is gone is not heard any more: the second stage decides on survivors alone
    backbone = packed.backbone
    after = backbone.advance(backbone.begin(images), alive[:, 0], 0)
    view = View(backbone, after, 1, torch.zeros(len(images)))
    logits = packed.policy.logits(view)
    own = packed.policy.actor(view.living(DEFAULT_FIELDS)[view.image == 3])
    torch.testing.assert_close(logits[view.image == 3], own, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_all_that_is_said_is_counted(vit, some_images):
    policy = talkative_policy(StagedViT(vit, (1, 3)), ("token", "cls"))
    observation = torch.randn(16, policy.actor.net[1].in_features)
    with FlopCounterMode(display=False) as counter:
        policy.actor(observation)
    counted = 16 * policy.macs_per_decision + 16**2 * policy.macs_per_pair
    assert counter.get_total_flops() // 2 == counted
    quiet = learned_policy(StagedViT(vit, (1, 3)), ("token", "cls"), [8], False)
    assert quiet.macs_per_pair == 0


def test_two_heads_take_less_than_a_hundredth_of_the_digits():
    backbone = StagedViT(create_backbone("digits_vit"), (1, 3))
    with_it, without = (
        learned_policy(backbone, DEFAULT_FIELDS, [32], True, heads=heads) for heads in (2, 0)
    )
    of_one = with_it.macs_per_decision - without.macs_per_decision
    of_an_image = backbone.num_patches * of_one + backbone.num_patches**2 * with_it.macs_per_pair
    assert 2 * of_an_image < 0.01 * backbone.dense_macs  # even if both stages keep all
