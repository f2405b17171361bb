"""What every library receives is what the game paid; the same tests for all adapters."""

import copy
import gc
import itertools
import weakref
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from prunevit.envs.adapters.epymarl import TokenPruneAgents
from prunevit.envs.adapters.gymnasium import TokenPruneGym, TokenPruneVector
from prunevit.envs.adapters.sb3 import TokenVecEnv
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.game import TokenGame
from prunevit.envs.rewards import MarkovGameReward, ReleasedCodeReward, TeamReward
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.staged_vit import StagedViT

PATCHES, STAGES = 16, (0, 1, 3)
INDICES = [7, 2, 11, 4]
BATCH = len(INDICES)
REWARDS = [TeamReward(accuracy="kl"), MarkovGameReward(), ReleasedCodeReward()]


TOLD = "index", "label", "correct", "gmacs", "logits"


class Stepped(NamedTuple):
    """What a library receives for one joint action.

    Attributes:
        paid: what each agent was paid, [B, N].
        seen: observations as the library holds them.
        asked: who acts next as the library is told, bool [B, N].
        terminated, truncated: one flag or more for each image.
        told: of ``TOLD``, what infos say: a value for each image.
    """

    paid: Any
    seen: Any
    asked: Any
    terminated: Any
    truncated: Any
    told: dict[str, Any]


class Gym:
    """Drives ``TokenPruneGym``: one image an environment."""

    batch = 1

    def make(self, batch, game):
        return TokenPruneGym(**game)

    def begin(self, env, seed=None, indices=None):
        return env.reset(seed=seed, options={} if indices is None else {"indices": indices})[0]

    def step(self, env, keep):
        """``Stepped`` for a joint action bool [B, N]."""
        seen, reward, terminated, truncated, info = env.step(keep[0].numpy().astype(np.int8))
        paid = info["agent_rewards"][None]
        assert reward == pytest.approx(paid.mean())
        told = {name: np.asarray(info[name])[None] for name in TOLD}
        return Stepped(paid, seen, info["action_mask"][None] == 2, terminated, truncated, told)

    def go_on(self, env, last):
        """What is seen first of the episodes after those that ended with the step ``last``."""
        return self.begin(env)


class GymVector(Gym):
    batch = BATCH

    def make(self, batch, game):
        return TokenPruneVector(batch, **game)

    def step(self, env, keep):
        seen, reward, terminated, truncated, infos = env.step(keep.numpy().astype(np.int8))
        paid = infos["agent_rewards"]
        np.testing.assert_allclose(reward, paid.mean(1), rtol=1e-5)
        ended = infos.get("final_info", infos)
        told = {name: ended[name] for name in TOLD}
        return Stepped(paid, seen, infos["action_mask"] == 2, terminated, truncated, told)

    def go_on(self, env, last):
        return last.seen


class StableBaselines(GymVector):
    def make(self, batch, game):
        return TokenVecEnv(batch, **game)

    def begin(self, env, seed=None, indices=None):
        if seed is not None:
            env.seed(seed)
        if indices is not None:
            env.set_options({"indices": indices})
        return env.reset()

    def step(self, env, keep):
        seen, reward, done, infos = env.step(keep.flatten().numpy().astype(np.int64))
        asked = env.action_masks()[:, 1].reshape(keep.shape)
        images = infos[::PATCHES]
        told = {name: [image[name] for image in images] for name in TOLD if name in images[0]}
        # how SB3's own environments mark an episode that was cut off
        truncated = [info.get("TimeLimit.truncated", False) for info in infos]
        return Stepped(reward.reshape(keep.shape), seen, asked, done, truncated, told)


class Epymarl(Gym):
    def make(self, batch, game):
        return TokenPruneAgents(**game)

    def begin(self, env, seed=None, indices=None):
        return np.stack(super().begin(env, seed, indices))

    def step(self, env, keep):
        seen, rewards, terminated, truncated, infos = env.step(keep[0].long().tolist())
        seen, paid = np.stack(seen), np.array([rewards], np.float32)
        told = {name: [value] for name, value in infos.items()}
        # nothing else says who lives
        return Stepped(paid, seen, seen.any(-1)[None], terminated, truncated, told)


class Rllib(Gym):
    batch = BATCH

    def make(self, batch, game):
        from prunevit.envs.adapters.rllib import TokenPruneMultiVector

        return TokenPruneMultiVector(batch, game)

    def begin(self, env, seed=None, indices=None):
        seen, _ = env.reset(seed=seed, options={} if indices is None else {"indices": indices})
        return self.stacked(env, seen)

    def step(self, env, keep):
        agents = env.envs[0].agents
        actions = [dict(zip(agents, row.tolist(), strict=True)) for row in keep.long()]
        return self.stepped(env, agents, *env.step(actions))

    def go_on(self, env, last):
        return self.stacked(env, env.step([{}] * self.batch)[0])

    def stepped(self, env, agents, seen, rewards, terminated, truncated, infos):
        paid = np.array([[image[agent] for agent in agents] for image in rewards], np.float32)
        asked = np.array([[agent in image for agent in agents] for image in seen])
        flags = ([image["__all__"] for image in ended] for ended in (terminated, truncated))
        images = [info.get("__common__", {}) for info in infos]
        told = {name: [image[name] for image in images] for name in images[0]}
        return Stepped(paid, self.stacked(env, seen), asked, *flags, told)

    def stacked(self, env, seen):
        """[B, N, D_obs]; zeros for those that are not asked any more."""
        agents = env.envs[0].agents
        nothing = np.zeros(env.single_observation_spaces[agents[0]].shape, np.float32)
        return np.stack([[image.get(agent, nothing) for agent in agents] for image in seen])


class RllibSingle(Rllib):
    batch = 1

    def make(self, batch, game):
        from prunevit.envs.adapters.rllib import TokenPruneMulti

        return TokenPruneMulti(game)

    def begin(self, env, seed=None, indices=None):
        seen, _ = env.reset(seed=seed, options={} if indices is None else {"indices": indices})
        return self.stacked(env, [seen])

    def step(self, env, keep):
        stepped = env.step(dict(zip(env.agents, keep[0].long().tolist(), strict=True)))
        return self.stepped(env, env.agents, *([part] for part in stepped))

    def go_on(self, env, last):
        return self.begin(env)

    def stacked(self, env, seen):
        nothing = np.zeros(env.observation_spaces[env.agents[0]].shape, np.float32)
        return np.stack([[image.get(agent, nothing) for agent in env.agents] for image in seen])


class PettingZoo(Gym):
    """The environment that is no adapter, by the same rules."""

    batch = BATCH

    def make(self, batch, game):
        return TokenPruneEnv(num_envs=batch, **game)

    def begin(self, env, seed=None, indices=None):
        seen, _ = env.reset(seed, None if indices is None else {"indices": indices})
        return torch.stack(list(seen.values()), dim=1)

    def step(self, env, keep):
        actions = dict(zip(env.agents, keep.long().unbind(1), strict=True))
        *by_agent, infos = env.step(actions)
        seen, paid, *flags = (torch.stack(list(values.values()), dim=1) for values in by_agent)
        asked = torch.stack([info["action_mask"][:, 1] == 1 for info in infos.values()], dim=1)
        told = {name: infos["token_0"][name] for name in TOLD}
        return Stepped(paid, seen, asked, *flags, told)


class TorchRL(Gym):
    batch = BATCH

    def make(self, batch, game):
        from prunevit.envs.adapters.torchrl import TokenPruneTorchRL

        return TokenPruneTorchRL(batch, **game)

    def begin(self, env, seed=None, indices=None):
        if seed is not None:
            env.set_seed(seed)
        return env.reset(indices=indices)["token", "observation"]

    def step(self, env, keep):
        actions = env.full_action_spec.zero().set(("token", "action"), keep.long())
        after = env.step(actions)["next"]
        told = {name: value.squeeze(-1) for name, value in after["info"].items()}
        return Stepped(
            after["token", "reward"].squeeze(-1),
            after["token", "observation"],
            after["token", "action_mask"][..., 1],
            after["terminated"],
            after["done"] & ~after["terminated"],
            told,
        )


DRIVERS = {
    "pettingzoo": PettingZoo,
    "gymnasium": Gym,
    "gymnasium vector": GymVector,
    "sb3": StableBaselines,
    "epymarl": Epymarl,
    "rllib": RllibSingle,
    "rllib vector": Rllib,
    "torchrl": TorchRL,
}
EXTRAS = {"rllib": "rllib", "rllib vector": "rllib", "torchrl": "torchrl"}
PARAMS = [
    pytest.param(name, marks=pytest.mark.integration(EXTRAS[name]) if name in EXTRAS else ())
    for name in DRIVERS
]


@pytest.fixture(params=PARAMS)
def driver(request):
    return DRIVERS[request.param]()


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


@pytest.mark.parametrize("driver", PARAMS[1:], indirect=True)
def test_closing_frees_the_backbone(driver, make_vit, game, decisions):
    model = make_vit()
    env = driver.make(driver.batch, game | {"backbone": model})
    driver.begin(env, seed=0)
    driver.step(env, decisions[0, : driver.batch])
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
