"""TorchRL: specs that hold, and the stock wrapper for PettingZoo as it has to be set up."""

import pytest
import torch

from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.game import GameError, TokenGame
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.staged_vit import StagedViT

pytestmark = pytest.mark.integration("torchrl")
PATCHES, STAGES, BATCH = 16, (0, 1, 3), 4
INDICES = [7, 2, 11, 0]


@pytest.fixture
def game(vit, some_images):
    return {"backbone": vit, "dataset": some_images, "prune_before": STAGES, "device": "cpu"}


@pytest.fixture
def env(game):
    from prunevit.envs.adapters.torchrl import TokenPruneTorchRL

    return TokenPruneTorchRL(BATCH, **game)


def act(env, keep):
    return env.step(env.full_action_spec.zero().set(("token", "action"), keep.long()))["next"]


def test_specs_hold(env):
    from torchrl.envs import check_env_specs

    check_env_specs(env, break_when_any_done="both")
    assert env.group_map == {"token": [f"token_{i}" for i in range(PATCHES)]}


def test_masks_say_who_is_pruned(env, keeps):
    seen = env.reset()
    alive = torch.ones(BATCH, PATCHES, dtype=torch.bool)
    for keep in keeps(BATCH, len(STAGES), PATCHES):
        torch.testing.assert_close(seen["token", "mask"], alive)
        torch.testing.assert_close(seen["token", "action_mask"][..., 1], alive)
        assert seen["token", "action_mask"][..., 0].all()
        torch.testing.assert_close(seen["token", "observation"].any(-1), alive)
        assert not seen["done"].any()
        alive = alive & keep
        seen = act(env, keep)
    assert seen["done"].all()
    # losses may write on one of them
    seen["done"].zero_()
    assert seen["terminated"].all()


def test_states_and_images_are_the_games_at_every_step(env, vit, some_images, keeps):
    bare = BatchedTokenPrune(TokenGame(StagedViT(vit, STAGES)), some_images, BATCH)
    observed, seen = bare.reset(indices=INDICES), env.reset(indices=INDICES)
    for keep in keeps(BATCH, len(STAGES), PATCHES):
        assert observed.state.any(1).all()
        torch.testing.assert_close(seen["state"], observed.state)
        assert not seen["info", "gmacs"].any()
        assert seen["info", "index"].flatten().tolist() == INDICES
        torch.testing.assert_close(seen["info", "label"].flatten(), bare.labels)
        observed, seen = bare.step(keep.long()).observations, act(env, keep)


def test_rollouts_go_on_into_the_next_episodes(env):
    played = env.rollout(2 * len(STAGES), break_when_any_done=False)
    ends = [False, False, True] * 2
    assert played["next", "done"].squeeze(-1).tolist() == [ends] * BATCH
    first, second = played["info", "index"].squeeze(-1)[0, [0, -1]].tolist()
    assert (
        first != second or (played["info", "index"][:, 0] != played["info", "index"][:, -1]).any()
    )


def test_what_makes_no_sense_is_refused(env):
    seen = env.reset()
    some = seen.empty().set("_reset", torch.tensor([[True], [False], [True], [True]]))
    with pytest.raises(ValueError, match="takes them all, not some"):
        env.reset(some)
    with pytest.raises(TypeError, match="indices="):
        env.reset(images=3)
    assert env.to("cpu") is env
    assert env.to("meta") is env
    assert env.device.type == env.action_spec.device.type == env._held.env.device.type == "meta"
    env.close()
    assert env.is_closed
    with pytest.raises(GameError, match="closed"):
        env.reset()


@pytest.mark.filterwarnings("ignore:PettingZoo in TorchRL")
def test_the_stock_wrapper_delivers_what_the_game_pays(game, vit, some_images, keeps):
    """It needs agents that stay: it looks for an action mask of each, also of those that left."""
    from torchrl.envs import check_env_specs
    from torchrl.envs.libs.pettingzoo import PettingZooWrapper

    env = PettingZooWrapper(TokenPruneEnv(**game), return_state=True)
    check_env_specs(env)
    bare = TokenGame(StagedViT(vit, STAGES))
    bare.reset(*some_images.load(INDICES[:1]))
    env.reset(options={"indices": INDICES[:1]})
    alive = torch.ones(PATCHES, dtype=torch.bool)
    for keep in keeps(2, len(STAGES), PATCHES)[:, 1:]:
        stage, seen = bare.step(keep), act(env, keep[0])
        alive = alive & keep[0]
        paid = seen["token", "reward"].squeeze(-1)
        torch.testing.assert_close(paid, stage.reward[0], rtol=1e-4, atol=1e-5)
        if not seen["done"]:
            torch.testing.assert_close(seen["token", "action_mask"][:, 1], alive)
    assert seen["done"]
    assert 0 < alive.sum() < PATCHES
    assert paid.all()
