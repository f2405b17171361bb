"""What every library receives is what the game paid; the same tests for all adapters."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch

from tokenprune.envs.adapters.epymarl import TokenPruneAgents
from tokenprune.envs.adapters.gymnasium import TokenPruneGym, TokenPruneVector
from tokenprune.envs.adapters.sb3 import TokenVecEnv
from tokenprune.envs.backbone import StagedViT
from tokenprune.envs.game import TokenGame
from tokenprune.envs.rewards import MarkovGameReward, ReleasedCodeReward, TeamReward
from tokenprune.envs.token_prune import TokenPruneEnv

PATCHES, STAGES = 16, (0, 1, 3)
INDICES = [7, 2, 11, 0]
BATCH = len(INDICES)
REWARDS = [TeamReward(accuracy="kl"), MarkovGameReward(), ReleasedCodeReward()]


class Gym:
    """Drives ``TokenPruneGym``: one image an environment."""

    batch = 1

    def make(self, batch, game):
        return TokenPruneGym(**game)

    def begin(self, env, seed=None, indices=None):
        return env.reset(seed=seed, options={} if indices is None else {"indices": indices})[0]

    def step(self, env, keep):
        """What one joint action bool [B, N] paid each agent, [B, N], and what is seen then."""
        seen, *_, info = env.step(keep[0].numpy().astype(np.int8))
        return info["agent_rewards"][None], seen


class GymVector(Gym):
    batch = BATCH

    def make(self, batch, game):
        return TokenPruneVector(batch, **game)

    def step(self, env, keep):
        seen, *_, infos = env.step(keep.numpy().astype(np.int8))
        return infos["agent_rewards"], seen


class StableBaselines(Gym):
    batch = BATCH

    def make(self, batch, game):
        return TokenVecEnv(batch, **game)

    def begin(self, env, seed=None, indices=None):
        if seed is not None:
            env.seed(seed)
        if indices is not None:
            env.set_options({"indices": indices})
        return env.reset()

    def step(self, env, keep):
        seen, reward, *_ = env.step(keep.flatten().numpy().astype(np.int64))
        return reward.reshape(keep.shape), seen


class Epymarl(Gym):
    def make(self, batch, game):
        return TokenPruneAgents(**game)

    def begin(self, env, seed=None, indices=None):
        return np.stack(super().begin(env, seed, indices))

    def step(self, env, keep):
        seen, rewards, *_ = env.step(keep[0].long().tolist())
        return np.array([rewards], np.float32), np.stack(seen)


class Rllib(Gym):
    batch = BATCH

    def make(self, batch, game):
        pytest.importorskip("ray")
        from tokenprune.envs.adapters.rllib import TokenPruneMultiVector

        return TokenPruneMultiVector(batch, game)

    def begin(self, env, seed=None, indices=None):
        seen, _ = env.reset(seed=seed, options={} if indices is None else {"indices": indices})
        return self.stacked(env, seen)

    def step(self, env, keep):
        actions = [dict(zip(env.envs[0].agents, row.tolist(), strict=True)) for row in keep.long()]
        seen, rewards, *_ = env.step(actions)
        return np.array([list(paid.values()) for paid in rewards], np.float32), self.stacked(
            env, seen
        )

    def stacked(self, env, seen):
        """[B, N, D_obs]; zeros for those that are not asked any more."""
        agents = env.envs[0].agents
        nothing = np.zeros(env.single_observation_spaces[agents[0]].shape, np.float32)
        return np.stack([[image.get(agent, nothing) for agent in agents] for image in seen])


class RllibSingle(Rllib):
    batch = 1

    def make(self, batch, game):
        pytest.importorskip("ray")
        from tokenprune.envs.adapters.rllib import TokenPruneMulti

        return TokenPruneMulti(game)

    def begin(self, env, seed=None, indices=None):
        seen, _ = env.reset(seed=seed, options={} if indices is None else {"indices": indices})
        return self.stacked(env, [seen])

    def step(self, env, keep):
        seen, rewards, *_ = env.step(dict(zip(env.agents, keep[0].long().tolist(), strict=True)))
        return np.array([list(rewards.values())], np.float32), self.stacked(env, [seen])

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
        seen, rewards, *_ = env.step(actions)
        return torch.stack(list(rewards.values()), 1), torch.stack(list(seen.values()), 1)


class TorchRL(Gym):
    batch = BATCH

    def make(self, batch, game):
        from tokenprune.envs.adapters.torchrl import TokenPruneTorchRL

        return TokenPruneTorchRL(batch, **game)

    def begin(self, env, seed=None, indices=None):
        if seed is not None:
            env.set_seed(seed)
        return env.reset(indices=indices)["token", "observation"]

    def step(self, env, keep):
        actions = env.full_action_spec.zero().set(("token", "action"), keep.long())
        after = env.step(actions)["next", "token"]
        return after["reward"].squeeze(-1), after["observation"]


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


@pytest.fixture(params=DRIVERS)
def driver(request):
    if request.param == "torchrl":
        pytest.importorskip("torchrl")
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
    paid = [np.asarray(driver.step(env, keep)[0]) for keep in decisions]
    return sum(paid), paid[-1]


def chunks(driver, decisions):
    """The batch in parts of the size that the adapter plays at once."""
    for start in range(0, BATCH, driver.batch):
        part = slice(start, start + driver.batch)
        yield INDICES[part], decisions[:, part]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: type(reward).__name__)
def test_agents_are_paid_what_the_game_pays(driver, game, vit, some_images, decisions, reward):
    bare = TokenGame(StagedViT(vit, STAGES), reward)
    bare.reset(*some_images.load(INDICES))
    paid = [bare.step(keep).reward for keep in decisions]
    if isinstance(reward, TeamReward):
        # also those that were pruned long before
        assert paid[-1][0].all()
    received, last = [], []
    for indices, keep in chunks(driver, decisions):
        env = driver.make(driver.batch, game | {"reward": reward})
        driver.begin(env, indices=indices)
        total, final = play(driver, env, keep)
        received.append(total)
        last.append(final)
    np.testing.assert_allclose(np.concatenate(received), sum(paid), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(last), paid[-1], rtol=1e-4, atol=1e-5)


def test_two_runs_with_one_seed_are_equal(driver, game, decisions):
    runs = []
    for seed in (5, 5, 6):
        env = driver.make(driver.batch, game)
        seen = [driver.begin(env, seed=seed)]
        for keep in decisions[:, : driver.batch]:
            seen += driver.step(env, keep)
        runs.append([*seen, driver.begin(env)])
    for one, other in zip(*runs[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    assert (np.asarray(runs[0][0]) != np.asarray(runs[2][0])).any()
    # and the episodes that follow a seeded one are others, but the same again
    assert (np.asarray(runs[0][0]) != np.asarray(runs[0][-1])).any()


def test_values_are_float32_on_the_games_device(driver, game, decisions):
    env = driver.make(driver.batch, game)
    seen = driver.begin(env, seed=0)
    paid, later = driver.step(env, decisions[0, : driver.batch])
    for values in (seen, paid, later):
        assert str(values.dtype).endswith("float32")
        assert str(values.device) == "cpu"


def test_what_was_handed_out_does_not_change_later(driver, game, decisions):
    env = driver.make(driver.batch, game)
    handed = [driver.begin(env, seed=0)]
    copies = [copy.deepcopy(handed[0])]
    for keep in decisions[:, : driver.batch]:
        handed += driver.step(env, keep)
        copies += copy.deepcopy(handed[len(copies) :])
    driver.begin(env)
    for value, at_the_time in zip(handed, copies, strict=True):
        np.testing.assert_array_equal(value, at_the_time)


@pytest.mark.parametrize("driver", sorted(set(DRIVERS) - {"pettingzoo"}), indirect=True)
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

    env = driver.make(driver.batch, game | {"backbone": model})
    driver.begin(env, seed=0)
    driver.step(env, decisions[0, : driver.batch])
    before = models()
    twin = copy.deepcopy(env)
    assert models() == before
    rest = decisions[1:, : driver.batch]
    # each goes on from where the one was copied
    received = [play(driver, each, rest)[0] for each in (env, twin)]
    np.testing.assert_array_equal(*received)
    np.testing.assert_array_equal(driver.begin(env), driver.begin(twin))
