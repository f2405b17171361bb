"""Rewards against values worked out by hand."""

import dataclasses
import math
import re

import pytest
import torch

from prunevit.envs.game import TokenGame
from prunevit.envs.rewards import (
    LARGEST_NUMBER,
    REWARDS,
    EndFacts,
    MarkovGameReward,
    ReleasedCodeReward,
    StageFacts,
    TeamReward,
    accuracy_of,
    make_reward,
)
from prunevit.envs.vit.staged_vit import StagedViT

HALF, QUARTER = math.log(2), math.log(4)
# probabilities: image 0 (.5, .25, .25), image 1 (.25, .25, .5)
LOGITS = torch.tensor([[0.0, -HALF, -HALF], [0.0, 0.0, HALF]])
# the dense model's: (.25, .5, .25), (.25, .25, .5)
DENSE = torch.tensor([[0.0, HALF, 0.0], [0.0, 0.0, HALF]])


def end(kept=None, labels=(0, 1), dense=DENSE):
    """Two images; four tokens unless ``kept`` [T, B, N] says otherwise."""
    kept = torch.ones(1, 2, 4) if kept is None else torch.tensor(kept)
    return EndFacts(kept.bool(), LOGITS, dense, torch.tensor(labels))


def stage(alive, kept, index=0, cost=(0.3, 0.1), token_cost=(0.03, 0.05), alpha=(1.0, 2.0)):
    return StageFacts(
        stage=index,
        alive=torch.tensor(alive).bool(),
        kept=torch.tensor(kept).bool(),
        cost=torch.tensor(cost),
        token_cost=torch.tensor(token_cost),
        alpha=torch.tensor(alpha),
    )


def assert_pays(reward, *expected):
    assert reward.dtype == torch.float32
    torch.testing.assert_close(reward, torch.tensor(expected))


# --- accuracy ---


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("correct", (1.0, 0.0)),
        ("confidence", (0.5, 0.25)),
        ("agreement", (0.0, 1.0)),
        # .25 log(.25 / .5) + .5 log(.5 / .25) + .25 log(.25 / .25) = .25 log 2
        ("kl", (-0.25 * HALF, 0.0)),
    ],
)
def test_accuracy(kind, expected):
    assert_pays(accuracy_of(kind, end()), *expected)


@pytest.mark.parametrize("kind", ["agreement", "kl"])
def test_what_is_measured_against_the_dense_model_needs_it(kind):
    with pytest.raises(ValueError, match=f"{kind}.*dense"):
        accuracy_of(kind, end(dense=None))


@pytest.mark.parametrize("kind", ["correct", "confidence", "agreement", "kl"])
def test_logits_that_are_no_numbers_are_neither_right_nor_wrong(kind):
    for index in range(3):
        facts = end(labels=(index, 1))
        logits = facts.logits.clone()
        logits[0, index] = torch.nan
        broken = accuracy_of(kind, dataclasses.replace(facts, logits=logits))
        assert broken.isnan().tolist() == [True, False]
        torch.testing.assert_close(broken[1], accuracy_of(kind, facts)[1])


@pytest.mark.parametrize("reward", [TeamReward, MarkovGameReward])
@pytest.mark.parametrize("kind", ["correct", "confidence", "agreement", "kl"])
def test_rewards_say_whether_they_need_the_dense_model(reward, kind):
    assert reward(accuracy=kind).needs_dense == (kind in ("agreement", "kl"))
    facts = end(dense=DENSE if reward(accuracy=kind).needs_dense else None)
    assert reward(accuracy=kind).terminal(facts).isfinite().all()
    assert not ReleasedCodeReward.needs_dense


@pytest.mark.parametrize("reward", [TeamReward, MarkovGameReward])
@pytest.mark.parametrize("kind", ["agreement", "kl"])
def test_what_is_measured_against_the_dense_model_needs_no_labels(reward, kind):
    reward = reward(accuracy=kind)
    assert torch.equal(reward.terminal(end(labels=(0, 1))), reward.terminal(end(labels=(2, 2))))


# --- the team ---


def test_team_reward():
    reward = TeamReward(alpha=9.0, beta=4.0, accuracy="confidence")
    facts = stage([[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 0, 1, 1], [0, 0, 0, 0]])
    # every agent, living or pruned; the price is the episode's, not the reward's
    assert_pays(reward.stage(facts), [-0.3] * 4, [-0.2] * 4)
    assert_pays(reward.terminal(end()), [2.0] * 4, [1.0] * 4)


def test_team_pays_for_the_compute_of_the_blocks_it_decides_on(vit, some_images, keeps):
    """Over an episode alpha times their share of the dense compute: not the stem, the blocks before
    the first stage, the head, nor the observed attention.
    """

    def block(tokens):
        width = vit.embed_dim
        return tokens * 12 * width**2 + 2 * tokens**2 * width

    backbone = StagedViT(vit, (1, 3))
    game = TokenGame(backbone, TeamReward(alpha=0.5, beta=0.0))
    images, labels = some_images.load(range(4))
    for alpha in (torch.tensor([0.0, 1.0, 2.0, 0.3]), None):
        game.reset(images, labels, alpha)
        stages = [game.step(keep) for keep in keeps(4, 2, game.num_agents)]
        paid = sum(stage.reward for stage in stages)
        assert (paid == paid[:, :1]).all()
        first, second = (1 + stages[-1].outcome.kept).T  # with the class token
        share = (2 * block(first) + block(second)) / backbone.dense_macs
        price = 0.5 if alpha is None else alpha
        torch.testing.assert_close(paid[:, 0], -price * share)


# --- the pot ---


def test_markov_game_reward():
    reward = MarkovGameReward(alpha=9.0, beta=6.0)
    facts = stage([[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 0, 1, 1], [0, 1, 0, 0]])
    # who is kept pays for itself, at the episode's price
    assert_pays(reward.stage(facts), [-0.03, 0.0, -0.03, -0.03], [0.0, -0.1, 0.0, 0.0])
    kept = [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0, 1, 0], [0, 0, 1, 0]]]
    # image 0 is right: 6 for its two survivors; image 1 is wrong
    assert_pays(reward.terminal(end(kept)), [3.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0])
    # and nobody gets the pot where nobody survived
    nobody = [[[0, 0, 0, 0], [0, 1, 0, 0]]]
    reward = MarkovGameReward(beta=8.0, accuracy="confidence")
    assert_pays(reward.terminal(end(nobody)), [0.0] * 4, [0.0, 2.0, 0.0, 0.0])


# --- the released code ---


def test_released_code_reward():
    reward = ReleasedCodeReward(pot=12.0, keep=0.5)
    # at the second stage the target is 1/4; image 0 keeps 3/4, image 1 none, image 2 1/4
    facts = stage(
        [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]],
        [[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]],
        index=1,
    )
    over, under = -math.exp(0.5), -math.exp(0.25)
    assert_pays(
        reward.stage(facts),
        [over, 0.0, over, over],  # too many: the kept are blamed
        [under, under, 0.0, 0.0],  # too few: those pruned here are, not those gone before
        [0.0, -1.0, -1.0, 0.0],  # as many as wanted: exp(0)
    )
    # 12 / 3 to the survivors of the first stage, 12 / 2 to those of the second; image 1 is wrong
    kept = [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0, 1, 0], [0, 0, 1, 0]]]
    assert_pays(reward.terminal(end(kept)), [10.0, 4.0, 10.0, 0.0], [0.0] * 4)
    nobody = [[[1, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]]
    assert_pays(reward.terminal(end(nobody)), [12.0, 0.0, 0.0, 0.0], [0.0] * 4)


def test_released_code_has_the_numbers_of_the_code():
    assert ReleasedCodeReward() == ReleasedCodeReward(pot=24.0, keep=0.7)


def test_nothing_is_blamed_where_everybody_is_to_stay_and_does():
    reward = ReleasedCodeReward(keep=1.0)
    assert not reward.stage(stage([[1, 1], [1, 1]], [[1, 1], [1, 1]])).any()
    pruned = reward.stage(stage([[1, 1], [1, 1]], [[1, 0], [1, 1]]))
    assert_pays(pruned, [0.0, -math.exp(0.5)], [0.0, 0.0])


# --- by name ---


def test_rewards_are_made_by_name():
    assert make_reward("team", alpha=2.0, accuracy="kl") == TeamReward(2.0, 1.0, "kl")
    assert make_reward("markov-game") == MarkovGameReward()
    assert make_reward("released-code", pot=3.0) == ReleasedCodeReward(pot=3.0)


def test_an_unknown_reward_is_refused():
    with pytest.raises(ValueError, match=f"unknown reward 'pot'.*{', '.join(REWARDS)}"):
        make_reward("pot")


@pytest.mark.parametrize("name", REWARDS)
def test_an_unknown_option_is_refused(name):
    known = ", ".join(sorted(vars(REWARDS[name]())))
    with pytest.raises(ValueError, match=f"'{name}' has no gamma, lam: it takes {known}$"):
        make_reward(name, lam=0.5, gamma=1.0)


def test_an_alpha_that_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match="'released-code' has no alpha: it takes keep, pot"):
        make_reward("released-code", alpha=0.1)


def test_the_largest_and_the_smallest_numbers_are_taken():
    for number in (0.0, LARGEST_NUMBER):
        assert TeamReward(alpha=number, beta=number).beta == number
    assert ReleasedCodeReward(keep=1.0).keep == 1.0


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (TeamReward, {"accuracy": "f1"}, "'f1'.*correct, confidence, agreement, kl"),
        (MarkovGameReward, {"accuracy": "f1"}, "'f1'.*correct, confidence, agreement, kl"),
        *(
            (reward, {number: value}, re.escape(f"{number}={value}"))
            for reward, numbers in (
                (TeamReward, ("alpha", "beta")),
                (MarkovGameReward, ("alpha", "beta")),
                (ReleasedCodeReward, ("pot",)),
            )
            for number in numbers
            for value in (-1.0, math.nan, math.inf, 1e300)  # that one is infinite in float32
        ),
        *((ReleasedCodeReward, {"keep": value}, f"keep={value}") for value in (0.0, 1.1, math.nan)),
    ],
)
def test_wrong_numbers_are_refused(reward, options, message):
    with pytest.raises(ValueError, match=message):
        reward(**options)
