"""BenchMARL: what a task hands to an experiment, which ``tests/trainers`` then train."""

import pytest
import torch
from torch.nn import functional as F

pytestmark = pytest.mark.integration("benchmarl")
PATCHES, STAGES, BATCH = 16, (0, 1, 3), 4


@pytest.fixture
def config(vit, some_images):
    return {"backbone": vit, "dataset": some_images, "prune_before": STAGES}


@pytest.fixture
def task(config):
    from prunevit.envs.adapters.benchmarl import TokenPruneTask

    return TokenPruneTask(config=config)


@pytest.fixture
def env(task):
    return task.get_env_fun(BATCH, False, 3, "cpu")()


def test_an_experiments_environments_are_the_native_one_on_one_backbone(task, config, env, vit):
    from prunevit.envs.adapters.torchrl import TokenPruneTorchRL

    native = TokenPruneTorchRL(BATCH, device="cpu", **config)
    native.set_seed(3)
    other = task.get_env_fun(2, False, 4, "cpu")()
    assert env.batch_size == (BATCH,)
    assert other.batch_size == (2,)
    for made in (env, other):
        assert made._held.env.game.backbone.model is vit
        assert made.device == torch.device("cpu")
    shown, expected = env.reset(), native.reset()
    assert (shown == expected).all()
    assert (shown["info", "index"][:2] != other.reset()["info", "index"]).any()
    # whichever device an experiment names
    with pytest.raises(ValueError, match="device 'meta' can't be used here"):
        task.get_env_fun(2, False, 4, "meta")()


def test_each_spec_is_of_what_it_is_called_and_of_nothing_else(task, env):
    names = {
        ("token", "observation"): task.observation_spec(env),
        ("token", "action_mask"): task.action_mask_spec(env),
        ("token", "action"): task.action_spec(env),
        "state": task.state_spec(env),
    }
    shown = env.rand_action(env.reset())
    for name, spec in names.items():
        assert list(spec.keys(include_nested=True, leaves_only=True)) == [name]
        assert spec[name].shape == shown[name].shape[1:]
    assert task.info_spec(env) is None
    assert task.group_map(env) == {"token": [f"token_{i}" for i in range(PATCHES)]}
    assert task.max_steps(env) == len(STAGES)
    assert task.supports_discrete_actions()
    assert not task.supports_continuous_actions()
    assert not task.has_render(env)


def test_logs_are_of_the_steps_that_end_an_episode(task, env):
    def keep_all(tensordict):  # TorchRL goes by this name
        return tensordict.set(("token", "action"), torch.ones(BATCH, PATCHES, dtype=torch.int64))

    played = env.rollout(2 * len(STAGES), keep_all, break_when_any_done=False)
    last = played["next", "info"][:, len(STAGES) - 1 :: len(STAGES)]
    correct, gmacs = last["correct"].float(), last["gmacs"]
    assert 0 < correct.mean() < 1
    assert task.log_info(played) == {
        "collection/accuracy": pytest.approx(correct.mean().item()),
        "collection/gmacs": pytest.approx(gmacs.mean().item()),
    }


def test_what_networks_see_is_normalised_from_the_first_step_on(task, env, config):
    from torchrl.envs import TransformedEnv

    plain = task.get_env_fun(BATCH, False, 3, "cpu")()
    (transform,) = task.get_env_transforms(env)
    env = TransformedEnv(env, transform)
    seen, raw = env.reset(), plain.reset()
    half = (torch.arange(PATCHES) % 2).expand(BATCH, -1)
    for _ in range(2):
        for name in ("state", ("token", "observation")):
            expected = F.layer_norm(raw[name], raw[name].shape[-1:])
            torch.testing.assert_close(seen[name], expected)
        action = env.full_action_spec.zero().set(("token", "action"), half)
        seen, raw = env.step(action.clone())["next"], plain.step(action.clone())["next"]
    # the networks' input says of the pruned nothing, as the game's does
    assert not seen["token", "observation"][:, ::2].any()
