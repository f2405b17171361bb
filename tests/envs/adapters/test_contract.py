"""What every library receives is what the game paid; the same tests for all adapters."""

import copy
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch

from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.game import TokenGame
from prunevit.envs.rewards import MarkovGameReward, ReleasedCodeReward, TeamReward
from prunevit.envs.vit.staged_vit import StagedViT

PATCHES, STAGES = 16, (0, 1, 3)
INDICES = [7, 2, 11, 4]
BATCH = len(INDICES)
REWARDS = [TeamReward(accuracy="kl"), MarkovGameReward(), ReleasedCodeReward()]
TOLD = "index", "label", "correct", "gmacs", "logits"


@pytest.fixture
def game(vit, some_images):
    return {"backbone": vit, "dataset": some_images, "prune_before": STAGES, "device": "cpu"}


@pytest.fixture
def decisions(keeps):
    """Joint actions [T, B, N]: the first image is emptied at once, the next at the second stage."""
    return keeps(BATCH, len(STAGES), PATCHES)


def play(driver, env, decisions):
    """Sum of rewards [B, N] of the rest of an episode, and the last rewards alone."""
    paid = [np.asarray(driver.step(env, keep).paid) for keep in decisions]
    return sum(paid), paid[-1]


def parts(driver):
    """The batch in slices of the size that the adapter plays at once."""
    return [slice(start, start + driver.batch) for start in range(0, BATCH, driver.batch)]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: type(reward).__name__)
def test_agents_are_paid_what_the_game_pays(driver, game, vit, some_images, decisions, reward):
    bare = TokenGame(StagedViT(vit, STAGES), reward)
    bare.reset(*some_images.load(INDICES))
    paid = [bare.step(keep).reward for keep in decisions]
    if isinstance(reward, TeamReward):
        # also those that were pruned long before
        assert paid[-1][0].all()
    received, last = [], []
    for part in parts(driver):
        env = driver.make(driver.batch, game | {"reward": reward})
        driver.begin(env, indices=INDICES[part])
        total, final = play(driver, env, decisions[:, part])
        received.append(total)
        last.append(final)
    np.testing.assert_allclose(np.concatenate(received), sum(paid), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(last), paid[-1], rtol=1e-4, atol=1e-5)


def test_agents_see_what_the_game_shows_and_hear_how_it_ended(
    driver, game, vit, some_images, decisions
):
    bare = BatchedTokenPrune(TokenGame(StagedViT(vit, STAGES)), some_images, BATCH)
    shown = [bare.reset(indices=INDICES)]
    shown += [bare.step(keep.long()).observations for keep in decisions]
    outcome = bare.outcome
    assert outcome is not None
    facts = (bare.indices, bare.labels, outcome.correct, outcome.gmacs, outcome.logits)
    # or a mix-up of the images would go unnoticed
    assert (outcome.correct != outcome.correct.flip(0)).any()
    for part in parts(driver):
        env = driver.make(driver.batch, game)
        seen = driver.begin(env, indices=INDICES[part])
        for stage, keep in enumerate(decisions[:, part]):
            expected = shown[stage].observation[part]
            received = np.asarray(seen).reshape(expected.shape)
            np.testing.assert_allclose(received, expected, atol=1e-4)
            _, seen, asked, terminated, truncated, told = driver.step(env, keep)
            over = stage + 1 == len(STAGES)
            assert (np.asarray(terminated) == over).all()
            assert not np.asarray(truncated).any()
            if not over:
                np.testing.assert_array_equal(asked, shown[stage + 1].alive[part])
                assert not np.asarray(told.get("gmacs", 0)).any()
        assert {"correct", "gmacs"} <= told.keys()
        for name, fact in zip(TOLD, facts, strict=True):
            if name in told:
                np.testing.assert_allclose(told[name], fact[part], rtol=1e-4, atol=1e-5)


def test_two_runs_with_one_seed_are_equal(driver, game, decisions):
    runs = []
    for seed in (5, 5, 6):
        env = driver.make(driver.batch, game)
        seen = [driver.begin(env, seed=seed)]
        for keep in decisions[:, : driver.batch]:
            last = driver.step(env, keep)
            seen += last.paid, last.seen
        runs.append([*seen, driver.go_on(env, last), driver.begin(env)])
    for one, other in zip(*runs[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    beginnings = [[np.asarray(run[at]) for at in (0, -2, -1)] for run in runs]
    for one, other in zip(beginnings[0], beginnings[2], strict=True):
        assert (one != other).any()
    # and the episodes that follow a seeded one are others each time
    for earlier, later in itertools.combinations(beginnings[0], 2):
        assert (earlier != later).any()


def test_values_are_float32_on_the_games_device(driver, game, decisions):
    env = driver.make(driver.batch, game)
    seen = driver.begin(env, seed=0)
    paid, later, *_ = driver.step(env, decisions[0, : driver.batch])
    for values in (seen, paid, later):
        assert str(values.dtype).endswith("float32")
        assert torch.as_tensor(values).device.type == "cpu"


def test_what_was_handed_out_does_not_change_later(driver, game, decisions):
    env = driver.make(driver.batch, game)
    handed = [driver.begin(env, seed=0)]
    copies = [copy.deepcopy(handed[0])]
    for keep in decisions[:, : driver.batch]:
        handed += driver.step(env, keep)[:2]
        copies += copy.deepcopy(handed[len(copies) :])
    driver.begin(env)
    for value, at_the_time in zip(handed, copies, strict=True):
        np.testing.assert_array_equal(value, at_the_time)


def test_closing_frees_the_backbone(adapter, make_vit, game, decisions):
    model = make_vit()
    env = adapter.make(adapter.batch, game | {"backbone": model})
    adapter.begin(env, seed=0)
    adapter.step(env, decisions[0, : adapter.batch])
    alive = weakref.ref(model)
    del model
    env.close()
    gc.collect()
    assert alive() is None
    env.close()


def test_copies_share_the_backbone_and_nothing_else(driver, make_vit, game, decisions):
    model = make_vit()

    def models():
        return sum(type(thing) is type(model) for thing in gc.get_objects())

    before = models()
    env = driver.make(driver.batch, game | {"backbone": model})
    driver.begin(env, seed=0)
    driver.step(env, decisions[0, : driver.batch])
    twin = copy.deepcopy(env)
    assert models() == before
    rest = decisions[1:, : driver.batch]
    # each goes on from where the one was copied
    received = [play(driver, each, rest)[0] for each in (env, twin)]
    np.testing.assert_array_equal(*received)
    np.testing.assert_array_equal(driver.begin(env), driver.begin(twin))
