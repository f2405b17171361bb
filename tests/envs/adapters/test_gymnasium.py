"""Gymnasium: one image a central controller, or a native batch of them."""

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import (
    FlattenObservation,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
)
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env

import prunevit.envs  # noqa: F401 - registers
from prunevit.envs.adapters.gymnasium import TokenPruneVector
from prunevit.envs.game import GameError
from prunevit.envs.rendering import GAP

NAME = "prunevit/TokenPrune-v0"
STAGES, PATCHES, BATCH = (0, 1, 3), 16, 4


@pytest.fixture
def game(vit, some_images):
    return {"backbone": vit, "dataset": some_images, "prune_before": STAGES, "device": "cpu"}


def keep_all(*shape):
    return np.ones((*shape, PATCHES), np.int8)


@pytest.mark.filterwarnings("error", "ignore:.*A Box observation space .*infinity")
def test_gymnasium_accepts_it(game):
    env = gymnasium.make(NAME, render_mode="rgb_array", **game)
    check_env(env.unwrapped)
    env.close()


def test_the_module_in_a_name_is_enough(game):
    """For programs that only take a name from a configuration."""
    env = gymnasium.make(f"prunevit.envs:{NAME}", **game)
    assert env.reset(seed=0)[0].shape[0] == PATCHES


@pytest.mark.parametrize("mode", ["sync", "vector_entry_point"])
def test_batches_of_either_kind_hold_the_same_values(game, mode):
    one = gymnasium.make(NAME, **game)
    many = gymnasium.make_vec(NAME, num_envs=1, vectorization_mode=mode, **game)
    seen, infos = many.reset(seed=3)
    first, info = one.reset(seed=3)
    assert many.observation_space.contains(seen)
    np.testing.assert_array_equal(seen[0], first)
    for name, value in info.items():
        np.testing.assert_allclose(infos[name][0], value)
        assert infos[f"_{name}"].all()
    action = one.action_space.sample(mask=info["action_mask"])
    seen, reward, *_, infos = many.step(action[None])
    first, single, *_, info = one.step(action)
    np.testing.assert_allclose(seen[0], first, atol=1e-6)
    assert reward[0] == pytest.approx(single)
    assert set(info) <= set(infos)


def test_the_batch_declares_and_keeps_its_autoreset_mode(game):
    envs = gymnasium.make_vec(NAME, num_envs=BATCH, **game)
    assert type(envs) is TokenPruneVector
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    envs.reset(options={"indices": [3, 2, 1, 0]})
    for stage in range(len(STAGES)):
        seen, _, terminated, truncated, infos = envs.step(keep_all(BATCH))
        assert not truncated.any()
        over = stage + 1 == len(STAGES)
        assert (terminated == over).all()
        assert ("final_info" in infos) == over
    # what is seen already is the next episode's
    assert seen.any(axis=(1, 2)).all()
    assert not infos["final_obs"].any()
    # each number is one of its own, though the game's zeros are one
    infos["final_obs"][0, 0, 0] = 1
    assert infos["final_obs"].sum() == 1
    infos["_index"][0] = False
    assert infos["_label"].all()
    final = infos["final_info"]
    assert final["index"].tolist() == [3, 2, 1, 0]
    assert final["logits"].any()
    assert (final["gmacs"] > 0).all()
    assert not infos["gmacs"].any()
    np.testing.assert_array_equal(infos["agent_rewards"], final["agent_rewards"])
    seen, _, terminated, _, _ = envs.step(keep_all(BATCH))
    assert not terminated.any()


def test_the_next_step_begins_anew_where_that_is_asked_for(game):
    envs = gymnasium.make_vec(NAME, num_envs=BATCH, autoreset_mode="NextStep", **game)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    envs.reset(seed=0)
    for episode in range(2):
        for stage in range(len(STAGES)):
            seen, reward, terminated, _, infos = envs.step(keep_all(BATCH))
            assert reward.any()
            assert (terminated == (stage + 1 == len(STAGES))).all()
        assert not seen.any()
        assert (infos["gmacs"] > 0).all()
        before = infos["index"]
        # whatever it is told
        seen, reward, terminated, truncated, infos = envs.step(np.zeros((BATCH, PATCHES), np.int8))
        assert seen.any(axis=(1, 2)).all()
        for nothing in (reward, terminated, truncated, infos["gmacs"]):
            assert not nothing.any()
        assert (infos["index"] != before).any()
        assert (infos["action_mask"] == 2).all(), episode
    # who resets amid that gets the episode that was asked for, once
    for _ in STAGES:
        envs.step(keep_all(BATCH))
    seen, _ = envs.reset(options={"indices": [3, 2, 1, 0]})
    assert envs.step(keep_all(BATCH))[1].any()


def test_nothing_begins_anew_where_that_is_disabled(game):
    envs = TokenPruneVector(BATCH, autoreset_mode=AutoresetMode.DISABLED, **game)
    envs.reset(seed=0)
    for _ in STAGES:
        _, _, terminated, _, infos = envs.step(keep_all(BATCH))
    assert terminated.all()
    assert (infos["gmacs"] > 0).all()
    with pytest.raises(GameError, match="call reset first"):
        envs.step(keep_all(BATCH))
    with pytest.raises(ValueError, match=r"reset_mask=.*begin and end together"):
        envs.reset(options={"reset_mask": np.array([True, False, True, True])})
    seen, _ = envs.reset(options={"reset_mask": terminated})
    assert seen.any(axis=(1, 2)).all()
    with pytest.raises(ValueError, match="autoreset_mode='Never': choose from NextStep, SameStep"):
        TokenPruneVector(BATCH, autoreset_mode="Never", **game)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_gymnasiums_wrappers_take_it(game, mode):
    """Under SAME_STEP they say that they can't."""
    envs = TokenPruneVector(BATCH, autoreset_mode=mode, **game)
    envs = FlattenObservation(envs)
    if mode is AutoresetMode.NEXT_STEP:  # the one mode for which it sums its statistics up
        envs = NormalizeReward(NormalizeObservation(envs))
    seen, _ = envs.reset(seed=0)
    assert seen.ndim == 2
    for _ in STAGES:
        seen, *_ = envs.step(envs.action_space.sample())
    assert np.isfinite(seen).all()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_gymnasiums_statistics_are_the_games(game, mode):
    envs = RecordEpisodeStatistics(TokenPruneVector(BATCH, autoreset_mode=mode, **game))
    envs.reset(seed=0)
    envs.action_space.seed(0)
    paid = np.zeros(BATCH)
    for _ in STAGES:
        *_, infos = envs.step(envs.action_space.sample())
        paid += infos["agent_rewards"].mean(1)
    np.testing.assert_allclose(infos["episode"]["r"], paid, rtol=1e-5)
    assert (infos["episode"]["l"] == len(STAGES)).all()


def test_the_mask_samples_only_for_the_living(game):
    env = gymnasium.make(NAME, **game).unwrapped
    _, info = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in STAGES[:-1]:
        alive = info["action_mask"] == 2
        action = env.action_space.sample(mask=info["action_mask"])
        assert not action[~alive].any()
        observation, _, _, _, info = env.step(action)
        np.testing.assert_array_equal(info["action_mask"] == 2, alive & (action == 1))
        np.testing.assert_array_equal(observation.any(1), info["action_mask"] == 2)


def test_tensors_are_not_turned_into_arrays(game):
    envs = TokenPruneVector(BATCH, tensors=True, **game)
    seen, infos = envs.reset(seed=0)
    seen, reward, terminated, truncated, infos = envs.step(torch.ones(BATCH, PATCHES).bool())
    for value in (seen, reward, terminated, truncated, infos["logits"]):
        assert isinstance(value, torch.Tensor)
        assert value.device.type == "cpu"
    assert seen.dtype == reward.dtype == torch.float32
    arrays = TokenPruneVector(BATCH, **game)
    arrays.reset(seed=0)
    np.testing.assert_array_equal(arrays.step(keep_all(BATCH))[0], seen)


def test_pictures_are_of_one_size(game):
    env = gymnasium.make(NAME, render_mode="rgb_array", **game)
    env.reset(seed=0)
    pictures = [env.render()]
    for _ in STAGES:
        env.step(np.zeros(PATCHES, np.int8))
        pictures.append(env.render())
    assert {(picture.shape, picture.dtype) for picture in pictures} == {
        (pictures[0].shape, np.dtype(np.uint8))
    }
    for earlier, later in itertools.pairwise(pictures):
        assert (earlier != later).any()


def test_pictures_are_of_the_image_and_of_whom_it_lost(game, keeps):
    indices, keep = [7, 2, 11, 0], keeps(BATCH, 1, PATCHES)[0].numpy()
    envs = TokenPruneVector(BATCH, render_mode="rgb_array", **game)
    envs.reset(options={"indices": indices})
    envs.step(keep)
    env = gymnasium.make(NAME, render_mode="rgb_array", **game).unwrapped
    for index, kept, picture in zip(indices, keep, envs.render(), strict=True):
        env.reset(options={"indices": [index]})
        env.step(kept)
        np.testing.assert_array_equal(env.render(), picture)
        height = len(picture)
        before, after = picture[:, :height], picture[:, height + GAP :][:, :height]
        sides = (4, height // 4) * 2  # rows of patches, their height, and the same across
        changed = (before != after).any(-1).reshape(sides).any((1, 3)).flatten()
        np.testing.assert_array_equal(changed, ~kept)


def test_what_makes_no_sense_is_refused(game):
    env = gymnasium.make(NAME, **game).unwrapped
    with pytest.raises(GameError, match="call reset first"):
        env.step(keep_all())
    # everywhere alike: PettingZoo's own tests pass some, so they can't be an error
    with pytest.warns(UserWarning, match=r"ignores the options \['image'\].*'indices'"):
        env.reset(options={"image": 3})
    with pytest.raises(ValueError, match="options must be a mapping"):
        env.reset(options=[3])
    with pytest.raises(ValueError, match=r"int64 \[1, 16\]"):
        env.step(np.ones(3, np.int8))
    with pytest.raises(ValueError, match=r"0 \(prune\) or 1 \(keep\): got torch.float64"):
        env.step(np.full(PATCHES, 0.5))
    env.step(np.ones(PATCHES))  # exactly 0.0 or 1.0 is an action
    for unseen in (env, TokenPruneVector(2, **game)):
        with pytest.warns(UserWarning, match="rgb_array"):
            assert unseen.render() is None
    with pytest.raises(GameError, match="before reset"):
        TokenPruneVector(2, render_mode="rgb_array", **game).render()
    with pytest.raises(TypeError, match="unknown arguments num_tokens: a game takes backbone"):
        gymnasium.make(NAME, num_tokens=3, **game)
    with pytest.raises(ValueError, match="choose rgb_array"):
        TokenPruneVector(2, render_mode="ansi", **game)
    env.close()
    with pytest.raises(GameError, match="closed"):
        env.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_stable_baselines_learns_on_it(game, algorithm, tmp_path):
    """It samples MultiBinary actions as floats; SB3's own monitor and evaluation in between."""
    env = make_vec_env(NAME, n_envs=2, env_kwargs=game)
    other = make_vec_env(NAME, n_envs=1, env_kwargs=game)
    evaluation = EvalCallback(other, n_eval_episodes=2, eval_freq=3, log_path=str(tmp_path))
    batch = {"batch_size": 12} if algorithm is PPO else {}
    model = algorithm("MlpPolicy", env, n_steps=6, device="cpu", seed=0, **batch)
    model.learn(24, callback=evaluation)
    assert model.num_timesteps == 24
    assert np.load(tmp_path / "evaluations.npz")["ep_lengths"].tolist()[0] == [3, 3]
    assert all(episode["l"] == len(STAGES) for episode in model.ep_info_buffer)


def test_the_masks_for_maskable_ppo_are_the_games(game):
    env = gymnasium.make(NAME, **game)
    env.reset(seed=0)
    keep = np.arange(PATCHES) % 3 == 0
    env.step(keep.astype(np.int8))
    masks = env.get_wrapper_attr("action_masks")().reshape(PATCHES, 2)
    assert masks[:, 0].all()
    np.testing.assert_array_equal(masks[:, 1], keep)


@pytest.mark.integration("sb3")
@pytest.mark.filterwarnings("ignore")
def test_masked_and_trust_region_algorithms_learn_on_it(game):
    from sb3_contrib import TRPO, MaskablePPO

    for algorithm in (MaskablePPO, TRPO):
        env = gymnasium.make(NAME, **game)
        model = algorithm("MlpPolicy", env, n_steps=6, batch_size=6, device="cpu", seed=0)
        model.learn(12)
        assert model.num_timesteps == 12
