"""TokenGame: the rules, whole episodes in both executions, and what it refuses."""

import copy

import pytest
import torch

from prunevit.agents.policies.heuristics import TopK
from prunevit.envs.fields import FIELDS
from prunevit.envs.game import GameError, TokenGame
from prunevit.envs.rewards import (
    LARGEST_NUMBER,
    MarkovGameReward,
    ReleasedCodeReward,
    TeamReward,
)
from prunevit.envs.vit.staged_vit import StagedViT

BATCH, PATCHES = 6, 16
STAGES = (0, 1, 3)
REWARDS = [
    TeamReward(),
    TeamReward(accuracy="kl"),
    MarkovGameReward(accuracy="agreement"),
    ReleasedCodeReward(),
]
KEEP_ALL = torch.ones(BATCH, PATCHES, dtype=torch.bool)


@pytest.fixture(scope="module")
def batch(some_images):
    return some_images.load(range(BATCH))


@pytest.fixture
def game(vit):
    return TokenGame(StagedViT(vit, STAGES))


def play(game, images, labels, keep, alpha=None):
    """All stages of an episode, from reset to the end."""
    return [game.reset(images, labels, alpha), *(game.step(decision) for decision in keep)]


def assert_same(ours, reference, atol=0.0):
    """Two lists of stages: everything the game tells."""
    for mine, yours in zip(ours, reference, strict=True):
        assert mine.index == yours.index
        assert torch.equal(mine.alive, yours.alive)
        torch.testing.assert_close(mine.reward, yours.reward, rtol=0, atol=atol)
        assert (mine.view is None) == (yours.view is None)
        if mine.view is not None:
            for seen in zip(
                (mine.view.living(FIELDS), mine.view.state()),
                (yours.view.living(FIELDS), yours.view.state()),
                strict=True,
            ):
                torch.testing.assert_close(*seen, rtol=10 * atol, atol=10 * atol)
    mine, yours = ours[-1].outcome, reference[-1].outcome
    torch.testing.assert_close(mine.logits, yours.logits, rtol=0, atol=atol)
    for name in ("correct", "gmacs", "kept", "decisions"):
        assert torch.equal(getattr(mine, name), getattr(yours, name)), name


# --- the rules ---


def test_an_episode(game, batch, keeps):
    images, labels = batch
    keep = keeps(BATCH, len(STAGES), PATCHES)
    stages = play(game, images, labels, keep)
    assert [stage.index for stage in stages] == [0, 1, 2, 3]
    assert stages[0].alive.all()
    assert not stages[0].reward.any()
    for before, after, decision in zip(stages[:-1], stages[1:], keep, strict=True):
        assert before.view is not None
        assert before.view.stage == before.index
        assert before.outcome is None
        assert torch.equal(before.view.alive, before.alive)
        assert torch.equal(after.alive, before.alive & decision)
        assert after.reward.shape == after.alive.shape == (BATCH, PATCHES)
        assert after.reward.dtype == torch.float32
    assert stages[-1].view is None
    assert stages[-1].outcome is not None


def test_the_outcome_says_how_it_ended(vit, batch, keeps):
    images, labels = batch
    backbone = StagedViT(vit, STAGES)
    keep = keeps(BATCH, len(STAGES), PATCHES)
    stages = play(TokenGame(backbone), images, labels, keep)
    outcome = stages[-1].outcome
    with torch.no_grad():
        tokens = backbone.begin(images)
        for stage, decision in enumerate(keep):
            tokens = backbone.advance(tokens, decision, stage)
        logits = backbone.finish(tokens)
    assert torch.equal(outcome.logits, logits)
    assert not outcome.logits.requires_grad
    assert torch.equal(outcome.correct, logits.argmax(1) == labels)
    assert torch.equal(outcome.kept, torch.stack([stage.alive.sum(1) for stage in stages[1:]], 1))
    asked = torch.stack([stage.alive.sum(1) for stage in stages[:-1]], 1)
    assert torch.equal(outcome.decisions, asked.sum(1))
    assert outcome.gmacs.dtype == torch.float32
    expected = [backbone.uniform_macs(kept.tolist()) / 1e9 for kept in outcome.kept]
    assert outcome.gmacs.tolist() == pytest.approx(expected)


def test_right_and_wrong_answers_are_told_apart(game, batch):
    images, _ = batch
    labels = torch.zeros(BATCH, dtype=torch.int64)
    answers = play(game, images, labels, [KEEP_ALL] * 3)[-1].outcome.logits.argmax(1)
    truth = torch.where(torch.arange(BATCH) % 2 == 0, answers, (answers + 1) % 5)
    correct = play(game, images, truth, [KEEP_ALL] * 3)[-1].outcome.correct
    assert correct.tolist() == [True, False] * 3


def test_actions_of_the_pruned_are_ignored(game, batch, keeps):
    images, labels = batch
    keep = keeps(BATCH, len(STAGES), PATCHES)
    obedient = keep.cumprod(0).bool()  # the pruned say prune
    assert (keep & ~obedient).any()
    assert_same(play(game, images, labels, keep), play(game, images, labels, obedient))


class Careless(TeamReward):
    """Writes on the facts."""

    def stage(self, facts):
        paid = super().stage(facts)
        facts.alive[:] = facts.kept[:] = False
        return paid


def test_who_changes_what_the_game_tells_changes_nothing_else(vit, batch, keeps):
    backbone = StagedViT(vit, STAGES)
    keep = keeps(BATCH, len(STAGES), PATCHES)
    expected = play(TokenGame(backbone), *batch, keep)
    game = TokenGame(backbone, Careless())
    stages = [game.reset(*batch)]
    for decision in keep:
        for told in (stages[-1].alive, stages[-1].view.alive):
            told &= decision  # as a policy may decide
        stages.append(game.step(decision))
    assert_same(stages[-1:], expected[-1:])


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}])
def test_packed_and_masked_are_the_same_game(make_vit, batch, keeps, reward, kwargs):
    images, labels = batch
    model = make_vit(**kwargs)
    games = [TokenGame(StagedViT(model, STAGES, kind), reward) for kind in ("packed", "masked")]
    keep = keeps(BATCH, len(STAGES), PATCHES)
    assert_same(*(play(game, images, labels, keep) for game in games), atol=1e-5)


def test_a_batch_is_its_images_one_by_one(game, batch, keeps):
    images, labels = batch
    keep = keeps(BATCH, len(STAGES), PATCHES)
    together = play(game, images, labels, keep)
    for i in range(BATCH):
        alone = play(game, images[i : i + 1], labels[i : i + 1], keep[:, i : i + 1])
        for mine, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(mine.alive[0], all_of_them.alive[i])
            torch.testing.assert_close(mine.reward[0], all_of_them.reward[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(
            alone[-1].outcome.logits[0], together[-1].outcome.logits[i], rtol=0, atol=1e-5
        )


def test_games_do_not_disturb_each_other(vit, batch, keeps):
    """Two games on one backbone, in turns."""
    images, labels = batch
    backbone = StagedViT(vit, STAGES)
    keep = keeps(BATCH, len(STAGES), PATCHES)
    expected = play(TokenGame(backbone), images, labels, keep)
    one, other = TokenGame(backbone), TokenGame(backbone)
    stages = [one.reset(images, labels)]
    other.reset(images.flip(0), labels.flip(0))
    for decision in keep:
        stages.append(one.step(decision))
        other.step(~decision)
    assert_same(stages, expected)


def test_a_game_may_begin_again_at_any_time(game, batch, keeps):
    images, labels = batch
    keep = keeps(BATCH, len(STAGES), PATCHES)
    expected = play(game, images, labels, keep)
    game.reset(images.flip(0), labels.flip(0))
    game.step(keep[0])
    assert_same(play(game, images, labels, keep), expected)


def test_a_copy_goes_on_alone_on_the_same_backbone(game, batch, keeps):
    images, labels = batch
    keep = keeps(BATCH, len(STAGES), PATCHES)
    expected = play(game, images, labels, keep)
    begun = [game.reset(images, labels), game.step(keep[0])]
    twin, again = copy.deepcopy([game, game])
    assert twin is again is not game
    assert twin.backbone is game.backbone
    other = [game.step(~decision) for decision in keep[1:]]
    assert_same([*begun, *(twin.step(decision) for decision in keep[1:])], expected)
    assert not torch.equal(other[-1].alive, expected[-1].alive)


class Raising:
    """Pays one more each time."""

    alpha, needs_dense = 0.1, False

    def __init__(self):
        self.paid = torch.zeros(())

    def stage(self, facts):
        self.paid += 1
        return self.paid.expand(facts.alive.shape).clone()

    def terminal(self, facts):
        return torch.zeros(facts.kept.shape[1:])


def test_a_copys_reward_remembers_for_itself(vit, batch):
    game = TokenGame(StagedViT(vit, STAGES), Raising())
    stage = game.reset(*batch)
    keep = torch.ones_like(stage.alive)
    twin = copy.deepcopy(game)
    for paid in (1, 2, 3):
        assert game.step(keep).reward.unique().tolist() == [paid]
    assert twin.step(keep).reward.unique().tolist() == [1]


def test_nobody_observes_attention_on_the_way_to_the_dense_answer(game, batch, monkeypatch):
    ended = []
    finish = StagedViT.finish
    monkeypatch.setattr(
        StagedViT, "finish", lambda self, tokens: ended.append(tokens) or finish(self, tokens)
    )
    assert game.reward.needs_dense
    game.reset(*batch)
    (tokens,) = ended
    assert tokens.alive.all()
    assert [ran.stop for ran in tokens.segments] == [0, 2, 6, 8]  # sublayers
    assert not any(ran.with_attention for ran in tokens.segments)


def test_stages_and_the_end_are_paid(vit, batch, keeps):
    """Each survivor for its own token's part of what the blocks cost; at the end all for the
    answer.
    """
    images, labels = batch
    backbone = StagedViT(vit, STAGES)
    keep = keeps(BATCH, len(STAGES), PATCHES)
    for beta in (0.0, 3.0):
        reward = MarkovGameReward(alpha=2.0, beta=beta, accuracy="confidence")
        stages = play(TokenGame(backbone, reward), images, labels, keep)
        for index, stage in enumerate(stages[1:]):
            count = stage.alive.sum(1)
            share = backbone.segment_macs(count, index) / backbone.dense_macs
            due = -2 * share / (backbone.num_prefix + count)
            if index + 1 == len(STAGES):
                confidence = stage.outcome.logits.softmax(1)[range(BATCH), labels]
                due = due + beta * confidence / count.clamp(min=1)
            torch.testing.assert_close(stage.reward, due[:, None] * stage.alive)


# --- several rollouts of one image ---


@pytest.mark.parametrize("reward", [TeamReward(), TeamReward(accuracy="kl")])
@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("prices", [None, torch.tensor([0.0, 2.0])])
def test_rollouts_are_the_image_played_so_often(vit, batch, keeps, reward, execution, prices):
    images, labels = batch[0][:2], batch[1][:2]
    backbone = StagedViT(vit, (1, 3), execution)
    keep = keeps(6, 2, PATCHES)
    rollouts = TokenGame(backbone, reward, rollouts_per_image=3)
    shared = play(rollouts, images, labels, keep, prices)
    images, labels = (tensor.repeat_interleave(3, dim=0) for tensor in (images, labels))
    prices = None if prices is None else prices.repeat_interleave(3)
    single = play(TokenGame(backbone, reward), images, labels, keep, prices)
    assert_same(shared, single, atol=1e-6)


def test_rollouts_run_the_beginning_once(vit, batch):
    images, labels = batch
    embedded = []
    game = TokenGame(StagedViT(vit, STAGES), rollouts_per_image=4)
    hook = vit.patch_embed.register_forward_hook(
        lambda module, inputs, output: embedded.append(len(inputs[0]))
    )
    game.reset(images, labels)
    hook.remove()
    assert embedded == [BATCH]


# --- the price of compute ---


def test_each_episode_has_its_price(vit, batch, keeps):
    """What it is paid, and what its agents see as their alpha."""
    images, labels = batch
    game = TokenGame(StagedViT(vit, STAGES), TeamReward(alpha=0.5, beta=0.0))
    keep = keeps(BATCH, len(STAGES), PATCHES)
    prices = torch.linspace(0, 2, BATCH, dtype=torch.float64)
    prices[-1] = LARGEST_NUMBER
    dear = play(game, images, labels, keep, prices)
    own = play(game, images, labels, keep)
    for stage, at_own_price in zip(dear[1:], own[1:], strict=True):
        expected = at_own_price.reward * (prices.float() / 0.5)[:, None]
        torch.testing.assert_close(stage.reward, expected)
        assert (stage.reward[1:] < 0).all()
    for stages, seen in ((dear, prices.float()), (own, torch.full((BATCH,), 0.5))):
        for stage in stages[:-1]:
            assert torch.equal(stage.view.alpha, seen)
            shown = stage.view.field("alpha")[:, 0]
            assert torch.equal(shown, seen[stage.view.image].clamp(min=1e-3).log())


# --- a reward of one's own ---


class Pays:
    alpha, needs_dense, pays_pruned = 0.0, False, True

    def __init__(self, of_stage, at_end):
        self.stage = lambda facts: of_stage
        self.terminal = lambda facts: at_end


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(BATCH), torch.ones(BATCH, 1), torch.ones(PATCHES), torch.tensor(1.0), 1.0, None],
)
def test_rewards_of_another_shape_are_refused(vit, batch, wrong):
    """Some would be broadcast to every agent."""
    backbone = StagedViT(vit, STAGES[-1:])
    right = torch.ones(BATCH, PATCHES)
    for reward in (Pays(wrong, right), Pays(right, wrong)):
        game = TokenGame(backbone, reward)
        game.reset(*batch)
        with pytest.raises(ValueError, match=r"Pays must pay \[6, 16\] \(images, agents\): got"):
            game.step(KEEP_ALL)


def test_rewards_of_any_type_are_numbers(vit, batch):
    one = torch.ones(BATCH, PATCHES)
    for paid in (one.bool(), one.long(), one.double()):
        game = TokenGame(StagedViT(vit, STAGES[-1:]), Pays(paid, paid))
        game.reset(*batch)
        assert torch.equal(game.step(KEEP_ALL).reward, 2 * one)


# --- what is refused ---


def test_steps_out_of_turn(game, batch):
    images, labels = batch
    with pytest.raises(GameError, match="call reset first"):
        game.step(KEEP_ALL)
    play(game, images, labels, [KEEP_ALL] * 3)
    with pytest.raises(GameError, match="after an episode's end"):
        game.step(KEEP_ALL)
    game.reset(images, labels)
    game.abandon()
    with pytest.raises(GameError, match="call reset first"):
        game.step(KEEP_ALL)


@pytest.mark.parametrize(
    ("keep", "got"),
    [
        (KEEP_ALL[:, :-1], r"torch.bool \(6, 15\)"),
        (KEEP_ALL[:-1], r"torch.bool \(5, 16\)"),
        (KEEP_ALL[0], r"torch.bool \(16,\)"),
        (KEEP_ALL.long(), r"torch.int64 \(6, 16\)"),
        (KEEP_ALL.float(), r"torch.float32 \(6, 16\)"),
    ],
)
def test_wrong_decisions_are_refused_and_nothing_is_lost(game, batch, keep, got):
    images, labels = batch
    game.reset(images, labels)
    with pytest.raises(ValueError, match=rf"keep must be bool \(6, 16\).*got {got}"):
        game.step(keep)
    assert game.step(KEEP_ALL).index == 1


NAN, INFINITE = torch.zeros(2, 2, 3, 32, 32)
NAN[1, 2, 3, 4] = torch.nan
INFINITE[0, 0, 0, 0] = -torch.inf


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 32, 40), r"images \[B, 3, 32, 32\]: got torch.float32 \[2, 3, 32, 40\]"),
        (torch.zeros(2, 1, 32, 32), r"images \[B, 3, 32, 32\]: got torch.float32 \[2, 1, 32, 32\]"),
        (torch.zeros(3, 32, 32), r"got torch.float32 \[3, 32, 32\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "floating point.*got torch.uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.complex64), "floating point.*got torch.complex64"),
        (NAN, r"images \[1\] of the batch hold NaN"),
        (INFINITE, r"images \[0\] of the batch hold NaN or infinite"),
    ],
)
def test_wrong_images_are_refused(game, images, message):
    with pytest.raises(ValueError, match=message):
        game.reset(images, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 5]), r"labels \[5\] are outside .* 5 classes 0\.\.4"),
        (torch.tensor([-1, 0]), r"labels \[-1\] are outside"),
        (torch.zeros(3, dtype=torch.int64), r"2 images need int64 labels \[2\]: .*\[3\]"),
        (torch.zeros(2, 1, dtype=torch.int64), r"2 images need int64 labels \[2\]"),
        (torch.zeros(2), r"int64 labels \[2\]: got torch.float32"),
        (torch.zeros(2, dtype=torch.int32), r"int64 labels \[2\]: got torch.int32"),
    ],
)
def test_wrong_labels_are_refused(game, labels, message):
    with pytest.raises(ValueError, match=message):
        game.reset(torch.zeros(2, 3, 32, 32), labels)


def test_a_refused_beginning_leaves_the_episode_under_way(game, batch, keeps):
    images, labels = batch
    keep = keeps(BATCH, len(STAGES), PATCHES)
    expected = play(game, images, labels, keep)
    stages = [game.reset(images, labels)]
    for decision in keep:
        with pytest.raises(ValueError, match="outside"):
            game.reset(images, labels + 5)
        with pytest.raises(ValueError, match="alpha"):
            game.reset(images, labels, torch.ones(BATCH + 1))
        stages.append(game.step(decision))
    assert_same(stages, expected)


@pytest.mark.parametrize("shape", [(1,), (BATCH, 1), ()])
def test_one_price_for_each_image_is_needed(game, batch, shape):
    with pytest.raises(ValueError, match=r"alpha of shape .*6 images"):
        game.reset(*batch, torch.ones(shape))


@pytest.mark.parametrize("price", [torch.nan, torch.inf, -1.0, 1.1e12])
def test_prices_are_neither_negative_nor_too_large(game, batch, price):
    alpha = torch.ones(BATCH, dtype=torch.float64)
    alpha[2] = price
    with pytest.raises(ValueError, match=r"alpha=\[1.0, 1.0, (nan|inf|-1.0|11).*from 0 to 1e\+12"):
        game.reset(*batch, alpha)


@pytest.mark.parametrize("rollouts", [0, -1])
def test_rollouts_are_at_least_one(staged, rollouts):
    with pytest.raises(ValueError, match=f"rollouts_per_image={rollouts}"):
        TokenGame(staged, rollouts_per_image=rollouts)


def test_other_precisions_are_taken(game, batch):
    """They become the backbone's."""
    images, labels = batch
    half = images.to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float64):
        assert_same(
            play(game, half.to(dtype), labels, [KEEP_ALL] * 3),
            play(game, half.float(), labels, [KEEP_ALL] * 3),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reward", REWARDS)
def test_the_default_dtype_plays_no_part(vit, batch, keeps, reward, dtype):
    game = TokenGame(StagedViT(vit, STAGES), reward)
    keep = keeps(BATCH, len(STAGES), PATCHES)
    expected = play(game, *batch, keep)
    policy = TopK((0.7, 0.5, 0.2))
    chosen = policy(expected[1].view)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = play(game, *batch, keep)
        observed = [stage.view.living(FIELDS) for stage in found[:-1]]
        assert {seen.dtype for seen in observed} == {torch.float32}
        assert_same(found, expected)
        assert torch.equal(policy(found[1].view), chosen)
    finally:
        torch.set_default_dtype(before)
