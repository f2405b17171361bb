"""Stable-Baselines3: what its buffers hold of tokens that are pruned."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, VecNormalize

from prunevit.envs.adapters.sb3 import (
    TokenActions,
    TokenDQN,
    TokenReplayBuffer,
    TokenRolloutBuffer,
    TokenVecEnv,
)
from prunevit.envs.game import GameError
from prunevit.envs.token_prune import TokenPruneEnv

PATCHES, STAGES, BATCH = 16, (0, 1, 3), 4
ROWS = BATCH * PATCHES
GAMMA = 0.9


@pytest.fixture
def game(vit, some_images):
    return {"backbone": vit, "dataset": some_images, "prune_before": STAGES, "device": "cpu"}


@pytest.fixture
def env(game):
    return TokenVecEnv(BATCH, **game)


@pytest.fixture
def played(env, keeps):
    """An episode as SB3 sees it: lists of what was seen, done and received at each step."""
    seen, actions, steps = [env.reset()], [], []
    for keep in keeps(BATCH, len(STAGES), PATCHES):
        actions.append(keep.flatten().numpy().astype(np.int64))
        steps.append(env.step(actions[-1]))
        seen.append(steps[-1][0])
    return seen[:-1], actions, [step[1] for step in steps], steps


def returns_of(played):
    """By the definition: all that a token is paid from a step on, discounted, [T, B * N]."""
    rewards = played[2]
    total, later = [], np.zeros(ROWS, np.float32)
    for reward in reversed(rewards):
        later = reward + GAMMA * later
        total.insert(0, later)
    return np.stack(total)


def test_infos_mark_who_was_pruned(env, played):
    seen, _, _, steps = played
    for observation, (_, _, done, infos) in zip(seen, steps, strict=True):
        assert [info["pruned"] for info in infos] == (~observation.any(1)).tolist()
        assert len(infos) == len(done) == ROWS
    assert done.all()
    assert not any(step[2].any() for step in steps[:-1])
    assert all(not info["terminal_observation"].any() for info in infos)
    ended = [info for info in infos if "episode" in info]
    assert ended == infos[::PATCHES]
    returns = sum(played[2]).reshape(BATCH, PATCHES).mean(1)
    for info, paid in zip(ended, returns, strict=True):
        assert info["episode"]["r"] == pytest.approx(float(paid), rel=1e-5)
        assert info["episode"]["l"] == len(STAGES)
        assert 0 <= info["episode"]["t"] < 60
        assert info["gmacs"] > 0


def test_an_episode_that_began_by_itself_starts_from_nothing(env, keeps, played):
    paid = np.zeros(ROWS, np.float32)
    for stage, keep in enumerate(keeps(BATCH, len(STAGES), PATCHES, seed=1)):
        _, reward, _, infos = env.step(keep.flatten().numpy().astype(np.int64))
        paid += reward
        assert stage or not any(info["pruned"] for info in infos)
    for info, expected in zip(infos[::PATCHES], paid.reshape(BATCH, -1).mean(1), strict=True):
        assert info["episode"]["r"] == pytest.approx(float(expected), rel=1e-5)


def test_images_are_named_for_one_reset(env):
    env.set_options({"indices": [3, 1, 2, 0]})
    named, drawn = env.reset(), env.reset()
    assert (named != drawn).any()


def rows_sorted(*columns):
    """[K, columns], sorted by the last column, then the one before it, and so on."""
    rows = np.stack([np.asarray(column, np.float32).ravel() for column in columns], axis=1)
    return rows[np.lexsort(rows.T)]


def filled(played, buffer_class, **kwargs):
    seen, actions, rewards, _ = played
    space, asked = Box(-np.inf, np.inf, seen[0].shape[1:], np.float32), TokenActions()
    buffer = buffer_class(
        len(seen), space, asked, gamma=GAMMA, gae_lambda=1.0, n_envs=ROWS, **kwargs
    )
    value, start = torch.full((ROWS,), 0.25), np.ones(ROWS)
    for observation, action, reward in zip(seen, actions, rewards, strict=True):
        asked.record(observation.any(1))
        buffer.add(observation, action, reward, start, value, torch.zeros(ROWS))
        start = np.zeros(ROWS)
    return buffer


def test_rollouts_hold_the_decisions_of_the_living_and_all_that_they_brought(played):
    buffer = filled(played, TokenRolloutBuffer)
    buffer.compute_returns_and_advantage(torch.full((ROWS,), 1e6), np.ones(ROWS, bool))
    living = np.stack(played[0]).any(-1)
    assert 0 < living[1:].sum() < living[1:].size
    batches = list(buffer.get(50))
    assert max(len(batch.returns) for batch in batches) <= 50
    assert min(len(batch.returns) for batch in batches) >= 25
    assert sum(len(batch.returns) for batch in batches) == living.sum()
    assert all(batch.observations.any(1).all() for batch in batches)
    seen, actions = (np.stack(values)[living] for values in played[:2])
    expected = rows_sorted(returns_of(played)[living], actions, seen[:, 0])
    parts = [(batch.returns, batch.actions, batch.observations[:, 0]) for batch in batches]
    received = rows_sorted(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-5)
    (whole,) = buffer.get()
    (again,) = buffer.get()
    assert (whole.observations != again.observations).any()
    np.testing.assert_allclose(whole.advantages, whole.returns - whole.old_values, atol=1e-5)


def test_rollouts_end_with_episodes(played):
    buffer = filled(played, TokenRolloutBuffer)
    with pytest.raises(ValueError, match="n_steps=3 ends within an episode"):
        buffer.compute_returns_and_advantage(torch.zeros(ROWS), np.zeros(ROWS, bool))


def test_replay_holds_the_decisions_of_the_living_and_all_that_they_brought(played):
    seen, actions, rewards, steps = played
    space = Box(-np.inf, np.inf, seen[0].shape[1:], np.float32)
    buffer = TokenReplayBuffer(1000, space, Discrete(2), n_envs=ROWS, gamma=GAMMA)
    following = [*seen[1:], np.zeros_like(seen[0])]
    for i, action in enumerate(actions):
        assert buffer.size() == 0
        buffer.add(seen[i], following[i], action, rewards[i], steps[i][2], steps[i][3])
    living = np.stack(seen).any(-1)
    goes_on = np.stack(following).any(-1)
    assert buffer.size() == living.sum()
    # whose episode ends with the step has all that will ever be paid, others this step's reward
    expected = np.where(goes_on, np.stack(rewards), returns_of(played))
    wanted = [expected, ~goes_on, actions, np.stack(following)[..., 0], np.stack(seen)[..., 0]]
    wanted = rows_sorted(*(np.stack(values)[living] for values in wanted))

    def stored(part):
        values = (buffer.rewards, buffer.dones, buffer.actions)
        sights = (buffer.next_observations, buffer.observations)
        return rows_sorted(*(v[part] for v in values), *(v[part, 0, 0] for v in sights))

    count = buffer.size()
    np.testing.assert_allclose(stored(slice(count)), wanted, rtol=1e-4, atol=1e-5)
    # and of the next episode likewise
    for i, action in enumerate(actions):
        buffer.add(seen[i], following[i], action, rewards[i], steps[i][2], steps[i][3])
    assert buffer.size() == 2 * count
    np.testing.assert_allclose(stored(slice(count, 2 * count)), wanted, rtol=1e-4, atol=1e-5)


def test_a_full_replay_forgets_the_oldest(played):
    seen, actions, rewards, steps = played
    space = Box(-np.inf, np.inf, seen[0].shape[1:], np.float32)
    buffer = TokenReplayBuffer(ROWS + 10, space, Discrete(2), n_envs=ROWS, gamma=GAMMA)
    for _ in range(3):
        for i, action in enumerate(actions):
            buffer.add(seen[i], seen[i], action, rewards[i], steps[i][2], steps[i][3])
    assert buffer.size() == ROWS + 10
    assert buffer.observations.any(-1).all()
    assert len(buffer.sample(32).rewards) == 32


def test_masks_let_the_pruned_only_prune(env):
    env.reset()
    assert np.stack(env.env_method("action_masks")).all()
    keep = np.zeros(ROWS, np.int64)
    keep[::2] = 1
    env.step(keep)
    np.testing.assert_array_equal(env.action_masks()[:, 1], keep == 1)
    assert env.env_method("action_masks", indices=[1])[0].tolist() == [True, False]


def test_every_row_is_an_environment_of_its_own_kind(env):
    (row, *_) = env.reset()
    assert env.num_envs == ROWS
    assert env.observation_space == Box(-np.inf, np.inf, row.shape, np.float32)
    assert env.action_space == Discrete(2)
    assert env.env_is_wrapped(Monitor, indices=[0]) == [False]
    assert env.get_attr("num_tokens") == [PATCHES] * ROWS
    assert env.get_attr("num_images", indices=[0, 5]) == [BATCH] * 2


def test_sb3s_own_tools_take_it(env):
    model = PPO("MlpPolicy", env, n_steps=len(STAGES), batch_size=64, n_epochs=1, seed=0,
                rollout_buffer_class=TokenRolloutBuffer)  # fmt: skip
    model.learn(2 * len(STAGES) * ROWS)
    logged = [info["r"] for info in model.ep_info_buffer]
    assert len(logged) == 2 * BATCH
    mean, _ = evaluate_policy(model, VecMonitor(env), n_eval_episodes=ROWS)
    assert np.isfinite(mean)


def make_ppo(env, **kwargs):
    arguments = {"n_steps": len(STAGES), "batch_size": 64, "n_epochs": 1, "seed": 0}
    return PPO("MlpPolicy", env, device="cpu", **arguments | kwargs)


@pytest.mark.filterwarnings("error:pruned tokens")
@pytest.mark.parametrize("wrap", [VecNormalize, lambda env: VecFrameStack(env, 2), VecMonitor])
def test_wrappers_dont_bring_the_pruned_back_to_life(game, wrap):
    """Normalised, what a pruned token sees is no longer zero; stacked, it is what it saw before."""
    decided = []
    for made in (lambda env: env, wrap):
        env = TokenVecEnv(BATCH, **game)
        model = make_ppo(made(env), rollout_buffer_class=TokenRolloutBuffer)
        alive = []
        original = env.action_space.record
        env.action_space.record = lambda rows, note=original, alive=alive: (
            alive.append(rows.sum()),
            note(rows),
        )
        model.learn(2 * len(STAGES) * ROWS)
        assert len(model.rollout_buffer.observations) == sum(alive[-len(STAGES) :])
        decided.append(alive)
    assert 0 < decided[1][1] < ROWS


@pytest.mark.filterwarnings("error:pruned tokens")
def test_the_replay_knows_the_pruned_behind_a_wrapper(game):
    env = VecNormalize(TokenVecEnv(BATCH, **game))
    model = TokenDQN(
        "MlpPolicy", env, learning_starts=1000, train_freq=len(STAGES), seed=0, gamma=GAMMA,
        buffer_size=1000,
    )  # fmt: skip
    model.learn(2 * len(STAGES) * ROWS)
    assert isinstance(model.replay_buffer, TokenReplayBuffer)
    stored = model.replay_buffer.size()
    assert 0 < stored < 2 * len(STAGES) * ROWS
    # it stores what was seen before it was normalised
    assert model.replay_buffer.observations[:stored].any(-1).all()


def test_the_discount_of_the_replay_is_the_algorithms(env):
    made = {"learning_starts": 1000, "buffer_size": 1000}
    assert TokenDQN("MlpPolicy", env, gamma=0.5, **made).replay_buffer.gamma == 0.5
    with pytest.raises(ValueError, match=r"'gamma': 0.9}: gamma is the algorithm's, 0.5"):
        TokenDQN("MlpPolicy", env, gamma=0.5, replay_buffer_kwargs={"gamma": 0.9}, **made)


@pytest.mark.skipif(
    "discounts" not in ReplayBufferSamples._fields, reason="SB3 takes discounts from 2.7 on"
)
def test_the_discount_of_the_replay_is_the_only_one(game):
    """Whatever another algorithm than ``TokenDQN`` was given."""
    learned = []
    for gamma, of_buffer in ((0.9, 0.9), (0.1, 0.9), (0.9, 0.1)):
        model = DQN(
            "MlpPolicy", TokenVecEnv(BATCH, **game), gamma=gamma, learning_starts=0, seed=0,
            train_freq=len(STAGES), buffer_size=1000, replay_buffer_class=TokenReplayBuffer,
            replay_buffer_kwargs={"gamma": of_buffer}, policy_kwargs={"net_arch": [8]},
        )  # fmt: skip
        model.learn(4 * len(STAGES) * ROWS)
        learned.append(torch.cat([p.detach().flatten() for p in model.policy.parameters()]))
    assert torch.equal(learned[0], learned[1])
    assert not torch.allclose(learned[0], learned[2])


@pytest.mark.parametrize("loaded", [True, False])
def test_a_model_that_got_another_environment_is_told_where_to_look(game, tmp_path, loaded):
    env, other = (TokenVecEnv(BATCH, **game) for _ in range(2))
    model = make_ppo(env, rollout_buffer_class=TokenRolloutBuffer)
    steps = len(STAGES) * ROWS
    model.learn(steps)
    model.save(tmp_path / "model.zip")
    if loaded:
        model = PPO.load(tmp_path / "model.zip", env=other, device="cpu")
    else:
        model.set_env(other)
    with pytest.raises(ValueError, match=r"set model\.rollout_buffer\.action_space = env"):
        model.learn(steps)
    model.rollout_buffer.action_space = other.action_space
    model.learn(steps)


def test_who_trains_on_the_pruned_is_warned_once(env):
    model = make_ppo(env)
    with pytest.warns(UserWarning, match="rollout_buffer_class=TokenRolloutBuffer") as caught:
        model.learn(3 * len(STAGES) * ROWS)
    assert sum("pruned tokens" in str(warning.message) for warning in caught) == 1


def test_rows_of_another_environment_are_refused(played):
    seen, actions, rewards, steps = played
    space = Box(-np.inf, np.inf, seen[0].shape[1:], np.float32)
    buffer = TokenReplayBuffer(1000, space, Discrete(2), n_envs=ROWS, gamma=GAMMA)
    with pytest.raises(ValueError, match="for TokenVecEnv"):
        buffer.add(seen[0], seen[1], actions[0], rewards[0], steps[0][2], [{}] * ROWS)
    buffer = TokenRolloutBuffer(3, space, Discrete(2), n_envs=ROWS)
    with pytest.raises(ValueError, match="asks the action space of a TokenVecEnv"):
        buffer.add(seen[0], actions[0], rewards[0], np.ones(ROWS), torch.zeros(ROWS), None)


def test_what_makes_no_sense_is_refused(env):
    with pytest.raises(NotImplementedError, match="rows of tensors"):
        env.set_attr("alpha", 1.0)
    with pytest.raises(AttributeError, match="only action_masks"):
        env.env_method("render")
    env.close()
    with pytest.raises(GameError, match="closed"):
        env.reset()


@pytest.mark.integration("sb3")
def test_maskable_ppo_learns_from_the_living_alone(game):
    import sb3_contrib as contrib

    from prunevit.envs.adapters.sb3_contrib import MaskableTokenRolloutBuffer

    env = TokenVecEnv(BATCH, **game)
    model = contrib.MaskablePPO(
        "MlpPolicy",
        env,
        n_steps=len(STAGES),
        batch_size=64,
        n_epochs=1,
        seed=0,
        rollout_buffer_class=MaskableTokenRolloutBuffer,
    )
    model.learn(len(STAGES) * ROWS)
    batches = list(model.rollout_buffer.get(10))
    assert all(batch.observations.any(1).all() for batch in batches)
    assert all(batch.action_masks.all() for batch in batches)


@pytest.mark.integration("marl-peers")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_supersuit_route(game):
    """The plain way for any PettingZoo environment: agents that stay, and a render mode."""
    import supersuit

    parallel = TokenPruneEnv(render_mode="rgb_array", **game)
    single = supersuit.pettingzoo_env_to_vec_env_v1(parallel)
    env = supersuit.concat_vec_envs_v1(single, 1, num_cpus=0, base_class="stable_baselines3")
    # SuperSuit's environments can't be seeded, so neither can SB3's algorithms on them
    model = PPO("MlpPolicy", env, n_steps=2 * len(STAGES), batch_size=32, n_epochs=1)
    model.learn(2 * len(STAGES) * PATCHES)
    env.reset()
    for stage in range(len(STAGES)):
        _, reward, done, _ = env.step(np.zeros(PATCHES, np.int64))
        assert done.all() == (stage + 1 == len(STAGES))
    # what the team earns arrives at tokens that were pruned at once
    assert reward.all()
