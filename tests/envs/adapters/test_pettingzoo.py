"""PettingZoo's own conversions: agents in turn, and back."""

import numpy as np
import pytest
from pettingzoo.test import api_test
from pettingzoo.utils.conversions import aec_to_parallel, parallel_to_aec

from prunevit.envs import token_prune_v0
from prunevit.envs.token_prune import TokenPruneEnv

PATCHES, STAGES = 16, (0, 1, 3)


MODES = [{"pruned_agents": "leave", "reward": "markov-game"}, {}]


@pytest.fixture(params=MODES, ids=["leave", "stay"])
def game(vit, some_images, request):
    arguments = {"backbone": vit, "dataset": some_images, "prune_before": STAGES, "device": "cpu"}
    return arguments | request.param


@pytest.fixture
def make_env(game):
    return lambda: TokenPruneEnv(**game)


def play(env, decisions):
    """What each agent received at each step of an episode."""
    env.reset(seed=4)
    received = []
    for keep in decisions:
        if not env.agents:
            break
        actions = {agent: int(keep[int(agent.split("_")[1])]) for agent in env.agents}
        received.append(env.step(actions))
    return received


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [token_prune_v0.env, token_prune_v0.raw_env])
def test_pettingzoo_accepts_its_agents_in_turn(game, make):
    api_test(make(**game), num_cycles=40)


def test_the_module_is_pettingzoos(game):
    """Three functions of the same arguments; `env` says what was called out of turn."""
    env = token_prune_v0.env(**game)
    with pytest.raises(AttributeError, match="before reset"):
        env.agent_selection  # noqa: B018 - asking is what fails
    assert token_prune_v0.parallel_env(**game).pruned_agents == game.get("pruned_agents", "stay")
    assert str(env) == "token_prune_v0"
    with pytest.raises(ValueError, match="num_envs is for parallel_env"):
        token_prune_v0.raw_env(num_envs=2)


@pytest.mark.parametrize("row", [1, 2, 3])
def test_there_and_back_it_is_the_same_episode(make_env, keeps, row):
    decisions = keeps(4, len(STAGES), PATCHES)[:, row].numpy()
    plain = play(make_env(), decisions)
    converted = play(aec_to_parallel(parallel_to_aec(make_env())), decisions)
    assert len(plain) == len(converted)
    for ours, theirs in zip(plain, converted, strict=True):
        observations, rewards, terminations, truncations, infos = ours
        for agent in rewards:
            np.testing.assert_array_equal(observations[agent], theirs[0][agent])
            for name, value in infos[agent].items():
                np.testing.assert_array_equal(value, theirs[4][agent][name])
        assert rewards == pytest.approx(theirs[1])
        assert terminations == theirs[2]
        assert truncations == theirs[3]
