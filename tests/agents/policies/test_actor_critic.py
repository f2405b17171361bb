"""The networks: where they start, and what their prior and bias mean."""

import math

import pytest
import torch

from prunevit.agents import LearnedPolicy, Policy, TokenActor
from prunevit.agents.policies.actor_critic import POLICY_GAIN, PRIOR_FLOOR, Actor, Critic, mlp
from prunevit.agents.policies.dither import dither_levels
from prunevit.envs.fields import field_slices
from prunevit.envs.observations import View
from prunevit.envs.vit.staged_vit import StagedViT

SIZE, ATTENTION, REDUNDANCY = 6, 4, 2


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def observe(*attention):
    observation = torch.randn(len(attention), SIZE, generator=torch.Generator().manual_seed(1))
    observation[:, ATTENTION] = torch.tensor(attention)
    return observation


def silence(actor):
    """Leaves the prior and the bias alone."""
    torch.nn.init.zeros_(actor.net[-1].weight)
    return actor


def advantage(logits):
    """How much likelier keep is than prune."""
    return logits[:, 1] - logits[:, 0]


# --- networks ---


BETWEEN = {"gelu": ["GELU"], "relu-norm": ["ReLU", "LayerNorm"]}


@pytest.mark.parametrize("hidden_layers", BETWEEN)
def test_layers_are_orthogonal(hidden_layers):
    net = mlp(6, (8, 5), 3, output_gain=0.5, hidden_layers=hidden_layers)
    kinds = [type(layer).__name__ for layer in net]
    assert kinds == [*2 * ["Linear", *BETWEEN[hidden_layers]], "Linear"]
    linears = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
    for layer, gain in zip(linears, (math.sqrt(2), math.sqrt(2), 0.5), strict=True):
        weight = layer.weight.detach()
        assert not layer.bias.any()
        small = min(weight.shape)
        product = weight @ weight.T if len(weight) == small else weight.T @ weight
        torch.testing.assert_close(product, gain**2 * torch.eye(small), rtol=0, atol=1e-5)


def test_the_first_policy_is_nearly_uniform():
    logits = Actor(SIZE, 3, (8, 8))(observe(*range(50)))
    assert logits.shape == (50, 3)
    assert (logits.softmax(1) - 1 / 3).abs().max() < 5 * POLICY_GAIN


def test_a_critic_gives_a_number_to_each():
    assert Critic(SIZE, (8,))(observe(1, 2, 3)).shape == (3,)
    assert Critic(SIZE, (8,))(observe()[:0]).shape == (0,)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("hidden", [(8,), (8, 4), ()])
def test_a_critic_of_states_is_that_of_both_together(hidden, norm):
    observation, state = torch.randn(7, SIZE), torch.randn(3, 5)
    state_of = torch.tensor([2, 0, 0, 1, 2, 2, 1])
    critic = Critic(SIZE + 5, hidden, norm)
    together = torch.cat([observation, state[state_of]], 1)
    found = critic(observation, state, state_of)
    expected = critic(together)
    torch.testing.assert_close(found, expected)
    weights = list(critic.parameters())
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert critic(observation[:0], state, state_of[:0]).shape == (0,)


def test_a_critics_norm_hides_how_far_away_things_are():
    """Without it: where all is twice as far, and moved, a reward may be another."""
    seen = observe(1, 2, 3)
    normed = Critic(SIZE, (8,), input_norm=True)
    torch.testing.assert_close(normed(2 * seen + 1), normed(seen), rtol=0, atol=1e-3)
    critic, actor = Critic(SIZE, (8,)), Actor(SIZE, 2, (8,))
    torch.testing.assert_close(actor(2 * seen + 1), actor(seen), rtol=0, atol=1e-4)
    assert ((critic(2 * seen + 1) - critic(seen)).abs() > 1e-2).all()


# --- the prior ---


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_the_prior_is_the_logarithm_of_attention(weight):
    """Of attention times N: who gets the average share is kept as likely as not."""
    actor = silence(TokenActor(SIZE, (8,), ATTENTION, prior_weight=weight))
    shares = (0.1, 1.0, 1.0, 3.0, 16.0)
    logits = actor(observe(*shares))
    expected = torch.tensor([weight * math.log(share) for share in shares])
    torch.testing.assert_close(advantage(logits), expected)
    assert not logits[:, 0].any()  # it moves keep alone


def test_the_prior_falls_no_further_than_its_floor():
    actor = silence(TokenActor(SIZE, (8,), ATTENTION))
    lowest = advantage(actor(observe(0.0, 1e-9, PRIOR_FLOOR)))
    torch.testing.assert_close(lowest, torch.full((3,), math.log(PRIOR_FLOOR)))


def test_the_prior_from_redundancy_is_for_patches_that_are_like_no_other():
    actor = silence(TokenActor(SIZE, (8,), None, redundancy=REDUNDANCY, redundancy_weight=20.0))
    observation = observe(1.0, 1.0, 1.0)
    observation[:, REDUNDANCY] = torch.tensor([1.0, 0.85, -1.0])
    logits = actor(observation)
    torch.testing.assert_close(advantage(logits), torch.tensor([0.0, 3.0, 40.0]))
    assert not logits[:, 0].any()
    advantage(logits).sum().backward()
    assert actor.redundancy_weight.grad.item() == pytest.approx(2.15 * TokenActor.PRIOR_SPEED)


@pytest.mark.parametrize("bias", [0.0, 2.5, -1.0])
@pytest.mark.parametrize("attention", [None, ATTENTION])
def test_the_bias_is_added_to_keep(attention, bias):
    actor = silence(TokenActor(SIZE, (8,), attention, keep_bias=bias))
    logits = actor(observe(1.0, 1.0))
    torch.testing.assert_close(logits, torch.tensor([[0.0, bias]] * 2))


def test_without_attention_there_is_no_prior():
    actor = silence(TokenActor(SIZE, (8,), None))
    assert not actor(observe(0.0, 1.0, 9.0)).any()
    assert not actor.prior_weight.requires_grad


def test_the_network_adds_to_prior_and_bias():
    actor = TokenActor(SIZE, (8,), ATTENTION, prior_weight=0.5, keep_bias=1.0)
    torch.nn.init.normal_(actor.net[-1].weight)
    observation = observe(0.5, 2.0)
    expected = actor.net(observation)
    expected[:, 1] += 0.5 * observation[:, ATTENTION].log() + 1.0
    torch.testing.assert_close(actor(observation), expected)


def test_prior_and_bias_learn_and_faster_than_weights():
    actor = TokenActor(SIZE, (8,), ATTENTION, prior_weight=1.0, keep_bias=0.5)
    observation = observe(2.0, 3.0)
    before = advantage(actor(observation)).detach()
    optimizer = torch.optim.SGD([actor.prior_weight, actor.keep_bias], lr=1.0)
    advantage(actor(observation)).sum().backward()
    speed = TokenActor.PRIOR_SPEED
    assert actor.keep_bias.grad.item() == pytest.approx(2 * speed)
    assert actor.prior_weight.grad.item() == pytest.approx(speed * math.log(6.0))
    optimizer.step()
    assert (advantage(actor(observation)) < before).all()


# --- the policy ---


@pytest.fixture
def views(vit, some_images, keeps):
    backbone = StagedViT(vit, (1, 3))
    tokens = backbone.begin(some_images.load(range(4))[0])
    after = backbone.advance(tokens, keeps(4, 2, 16)[0], 0)
    return [View(backbone, t, stage, torch.zeros(4)) for stage, t in enumerate((tokens, after))]


@pytest.mark.parametrize("fields", [("cls_attention",), ("position", "cls_attention", "stage")])
@torch.no_grad()
def test_a_policy_keeps_where_keep_is_likelier(views, fields):
    """A prior alone keeps whoever gets more than the average share."""
    size = {1: 1, 3: 10 + 1 + 2}[len(fields)]
    place = {1: 0, 3: 10}[len(fields)]
    policy = LearnedPolicy(silence(TokenActor(size, (8,), place)), fields)
    assert isinstance(policy, Policy)
    assert policy.needs_attention
    for view in views:
        keep = policy(view)
        assert keep.dtype == torch.bool
        assert torch.equal(keep, view.scatter(view.cls_attention > 1))
        assert 0 < keep.sum() < view.alive.sum()


def full_policy(backbone, fields, hidden=(8, 6)):
    """A policy in which every weight matters."""
    slices = field_slices(backbone, fields)
    size = max(part.stop for part in slices.values())
    attention = slices["cls_attention"].start if "cls_attention" in slices else None
    alpha = slices["alpha"].start if "alpha" in fields else None
    actor = TokenActor(size, hidden, attention, 0.7, alpha=alpha)
    for parameter in actor.parameters():
        torch.nn.init.normal_(parameter)
    return LearnedPolicy(actor, fields, alpha=None if alpha is None else 0.1, threshold=0.4)


@torch.no_grad()
@pytest.mark.parametrize("which", [(0, 1, 2, 3), (2,)])
@pytest.mark.parametrize("hidden", [(8, 6), (8,), ()])
@pytest.mark.parametrize(
    "fields",
    [
        ("token", "cls", "stage", "cls_attention"),
        ("cls_attention", "alpha", "token"),
        ("stage", "cls", "alpha"),
        ("stage",),
    ],
)
def test_packed_rows_are_judged_as_if_fields_were_joined(
    vit, some_images, keeps, fields, hidden, which, monkeypatch
):
    """Nothing is gathered for them: neither where all images have one length nor elsewhere."""
    backbone = StagedViT(vit, (1, 3))
    policy = full_policy(backbone, fields, hidden)
    tokens = backbone.begin(some_images.load(which)[0])
    after = backbone.advance(tokens, keeps(4, 2, 16)[0, list(which)], 0)
    for stage, now in enumerate((tokens, after)):
        view = View(backbone, now, stage, torch.zeros(len(which)))
        prune, keep = policy.actor(policy.under_own_alpha(view).living(fields)).unbind(1)
        rows = policy.under_own_alpha(view).rows(fields)
        margin = policy.actor.margins(rows)
        assert margin.shape == (len(now.x),)
        living = margin[now.row.view(len(which), -1)[:, 1:]][view.alive]
        torch.testing.assert_close(living, keep - prune, rtol=1e-4, atol=1e-4)
        expected = policy.keep(view, view.scatter(keep - prune))
        assert "token" not in fields or (keep - prune).std() > 0.1
        with monkeypatch.context() as patch:
            patch.setattr(View, "living", None)
            assert torch.equal(policy(view), expected)


@torch.no_grad()
def test_dither_keeps_alike_patches_in_the_share_of_their_probability(vit, some_images):
    """Spread over the image, other ones at the next stage; packed and masked alike."""
    backbone = StagedViT(vit, (1, 3))
    images = some_images.load(range(4))[0]
    actor = TokenActor(2, (4,), None)
    for parameter in actor.parameters():
        torch.nn.init.zeros_(parameter)
    policy = LearnedPolicy(actor, ("stage",), dither=True)
    for share in (0.25, 0.5, 0.75):
        actor.keep_bias.fill_(torch.tensor(share).logit() / actor.PRIOR_SPEED)
        decided = {}
        for execution in ("packed", "masked"):
            tokens = backbone.begin(images, execution=execution)
            first = policy(View(backbone, tokens, 0, torch.zeros(4)))
            after = backbone.advance(tokens, first, 0)
            second = policy(View(backbone, after, 1, torch.zeros(4)))
            decided[execution] = torch.stack([first, second])
        assert torch.equal(decided["packed"], decided["masked"])
        first, second = decided["packed"]
        assert (first.sum(1) == share * 16).all()
        # each half of the image has its part
        assert (first.unflatten(1, (2, 8)).sum(2) >= share * 8 - 1).all()
        assert not (second & ~first).any()
        assert 0 < second.sum() < first.sum()
    policy.dither = False
    kept = policy(View(backbone, backbone.begin(images), 0, torch.zeros(4)))
    assert kept.all()  # all together


def test_every_patch_has_a_level_of_its_own():
    for height, width in ((4, 4), (8, 8), (14, 14), (5, 9)):
        for stage in range(8):
            levels = dither_levels(height, width, stage, torch.device("cpu"))
            count = height * width
            expected = (torch.arange(count) + 0.5) / count
            torch.testing.assert_close(levels.sort().values, expected)
            assert levels.logit().isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [("token", "position", "cls_attention"), ("token", "cls", "alive_fraction", "alpha")]
)
def test_what_rows_do_not_show_is_gathered(views, fields):
    for view in views:
        policy = full_policy(view.backbone, fields)
        assert policy.under_own_alpha(view).rows(fields) is None
        prune, keep = policy.logits(policy.under_own_alpha(view)).unbind(1)
        assert torch.equal(policy(view), policy.keep(view, view.scatter(keep - prune)))


@torch.no_grad()
def test_rows_that_are_masked_or_shared_are_gathered(vit, some_images):
    """Decisions are the same."""
    backbone = StagedViT(vit, (1, 3))
    policy = full_policy(backbone, ("token", "cls", "stage", "cls_attention"))
    images = some_images.load(range(4))[0]
    packed = backbone.begin(images)
    keep = policy(View(backbone, packed, 0, torch.zeros(4)))
    for tokens, times in ((backbone.begin(images, execution="masked"), 1), (packed.repeat(3), 3)):
        view = View(backbone, tokens, 0, torch.zeros(4 * times))
        assert view.rows(policy.fields) is None
        assert torch.equal(policy(view), keep.repeat_interleave(times, 0))


@torch.no_grad()
def test_a_price_moves_the_logit_of_keep(views):
    fields = ("alpha", "cls_attention")
    actor = silence(TokenActor(2, (8,), None, alpha=0))
    actor.alpha_weight.fill_(-1 / TokenActor.PRIOR_SPEED)
    for view in views:
        for alpha in (0.05, 0.5):
            policy = LearnedPolicy(actor, fields, alpha=alpha)
            prune, keep = policy.logits(policy.under_own_alpha(view)).unbind(1)
            torch.testing.assert_close(keep - prune, torch.full_like(keep, -math.log(alpha)))
            margin = policy.actor.margins(policy.under_own_alpha(view).rows(fields))
            torch.testing.assert_close(margin, torch.full_like(margin, -math.log(alpha)))
    policy.alpha = 0.9  # log(0.9) < 0: kept
    assert torch.equal(policy(view), view.alive)
    policy.alpha = 1.1
    assert not policy(view).any()


@torch.no_grad()
def test_a_threshold_is_a_probability_of_keep(views):
    policy = LearnedPolicy(TokenActor(2, (8,), None, keep_bias=1.0), ("stage",))
    silence(policy.actor)
    chance = 1 / (1 + math.exp(-1))
    for view in views:
        policy.threshold = chance - 0.01
        assert torch.equal(policy(view), view.alive)
        policy.threshold = chance + 0.01
        assert not policy(view).any()
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"threshold={wrong}: a probability"):
            policy.threshold = wrong


@pytest.mark.parametrize("alpha", [None, 0.0, -1.0, math.inf, math.nan])
def test_a_policy_for_many_alphas_needs_one(alpha):
    actor = TokenActor(1, (8,), None, alpha=0)
    with pytest.raises(ValueError, match=f"alpha={alpha}: .*positive alpha"):
        LearnedPolicy(actor, ("alpha",), alpha=alpha)
    policy = LearnedPolicy(actor, ("alpha",), alpha=0.1)
    with pytest.raises(ValueError, match="positive alpha"):
        policy.alpha = alpha
    assert policy.alpha == 0.1


def test_a_policy_for_one_price_takes_no_other():
    policy = LearnedPolicy(TokenActor(2, (8,), None), ("stage",))
    with pytest.raises(ValueError, match=r"alpha=0.1: .*one alpha.*observes stage"):
        policy.alpha = 0.1


@torch.no_grad()
def test_a_policy_only_needs_what_it_observes(views):
    policy = LearnedPolicy(TokenActor(2, (8,), None, keep_bias=3.0), ("stage",))
    assert not policy.needs_attention
    assert policy.macs_per_decision == 2 * 8 + 8 * 2
    for view in views:
        assert torch.equal(policy(view), view.alive)  # the pruned are not kept
