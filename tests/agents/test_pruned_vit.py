"""PrunedViT is the game, played by its policy."""

import pytest
import torch

from prunevit.agents import KeepAll, LearnedPolicy, PrunedViT, TokenActor, TopK
from prunevit.agents.policies.actor_critic import CommunicatingActor
from prunevit.envs.fields import DEFAULT_FIELDS, field_slices
from prunevit.envs.game import TokenGame
from prunevit.envs.vit.staged_vit import StagedViT

BATCH, PATCHES, STAGES = 5, 16, (1, 2)
HIDDEN = (8,)


def learned_policy(backbone, fields=DEFAULT_FIELDS, kind=TokenActor):
    """Its random decisions are not all the same."""
    slices = field_slices(backbone, fields)
    size = max(part.stop for part in slices.values())
    attention = slices["cls_attention"].start if "cls_attention" in fields else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        redundancy = slices["redundancy"].start if "redundancy" in fields else None
        actor = kind(size, HIDDEN, attention, 0.3, redundancy=redundancy, redundancy_weight=5.0)
        torch.nn.init.normal_(actor.net[-1].weight)
        if kind is CommunicatingActor:
            torch.nn.init.normal_(actor.among_agents.output.weight)
    return LearnedPolicy(actor, fields)


POLICIES = {
    "keep all": lambda backbone: KeepAll(),
    "attention": lambda backbone: TopK((9, 4), "attention"),
    "norm": lambda backbone: TopK((9, 4), "norm"),
    "nothing": lambda backbone: TopK((0, 0), "norm"),
    "learned": learned_policy,
    "learned with redundancy": lambda backbone: learned_policy(backbone, ("redundancy", "token")),
    "learned among agents": lambda backbone: learned_policy(backbone, kind=CommunicatingActor),
    "learned without attention": lambda backbone: learned_policy(backbone, ("token", "stage")),
}


@pytest.fixture
def images(some_images):
    return some_images.load(range(BATCH))[0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}])
@torch.no_grad()
def test_a_pass_is_an_episode(make_vit, images, policy, execution, kwargs):
    backbone = StagedViT(make_vit(**kwargs), STAGES, execution)
    policy = POLICIES[policy](backbone)
    model = PrunedViT(backbone, policy)
    trace = model.trace(images)
    game = TokenGame(backbone)
    stage = game.reset(images, torch.zeros(BATCH, dtype=torch.int64))
    alive = []
    while stage.view is not None:
        stage = game.step(policy(stage.view))
        alive.append(stage.alive)
    outcome = stage.outcome
    torch.testing.assert_close(trace.logits, outcome.logits, rtol=0, atol=1e-6)
    assert torch.equal(trace.logits, model(images))
    assert torch.equal(trace.alive, torch.stack(alive, 1))
    # the policy comes on top; the game observes attention even for those that don't need it
    spent = [backbone.uniform_macs(kept, policy.needs_attention) for kept in outcome.kept.tolist()]
    decided = outcome.decisions * policy.macs_per_decision
    # all with all, then the survivors with each other
    of_pair = backbone.width * getattr(policy, "compares_patches", False)
    of_pair += getattr(policy, "macs_per_pair", 0)
    decided += (PATCHES**2 + outcome.kept[:, :-1].square().sum(1)) * of_pair
    assert torch.equal(trace.macs, torch.tensor(spent) + decided)
    if policy.needs_attention:
        torch.testing.assert_close((trace.macs - decided) / 1e9, outcome.gmacs, rtol=1e-6, atol=0)


@torch.no_grad()
def test_keep_all_is_the_dense_model(vit, images):
    backbone = StagedViT(vit, STAGES)
    trace = PrunedViT(backbone, KeepAll()).trace(images)
    torch.testing.assert_close(trace.logits, vit(images), rtol=0, atol=1e-5)
    assert trace.macs.tolist() == [backbone.dense_macs] * BATCH


@torch.no_grad()
def test_learned_decisions_cost_the_actors_layers(vit):
    backbone = StagedViT(vit, STAGES)
    policy = learned_policy(backbone)
    size = 2 * backbone.width + len(STAGES) + 1
    assert policy.macs_per_decision == size * 8 + 8 * 2


@torch.no_grad()
def test_images_are_classified_independently_of_each_other(vit, images):
    backbone = StagedViT(vit, STAGES)
    model = PrunedViT(backbone, learned_policy(backbone)).eval()
    together = model(images)
    torch.testing.assert_close(model(images.flip(0)), together.flip(0), rtol=0, atol=1e-5)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert model(images[:0]).shape == (0, 5)


def test_it_is_one_module(vit, images):
    """Backbone and policy are saved together, and gradients reach both where tokens are masked."""
    backbone = StagedViT(vit, STAGES, "masked")
    model = PrunedViT(backbone, learned_policy(backbone))
    names = set(model.state_dict())
    assert {"backbone.model.head.weight", "policy.actor.prior_weight"} <= names
    loss = model(images).square().sum()
    (gradient,) = torch.autograd.grad(loss, [vit.blocks[0].attn.qkv.weight])
    assert gradient.norm() > 0
