"""PettingZoo's own conversions: agents in turn, and back."""

import numpy as np
import pytest
from pettingzoo.test import api_test
from pettingzoo.utils.conversions import aec_to_parallel, parallel_to_aec

from prunevit.envs.token_prune import TokenPruneEnv

PATCHES, STAGES = 16, (0, 1, 3)


@pytest.fixture(params=["leave", "stay"])
def make_env(vit, some_images, request):
    def make():
        return TokenPruneEnv(
            vit, some_images, prune_before=STAGES, pruned_agents=request.param, device="cpu"
        )

    return make


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
def test_pettingzoo_accepts_its_agents_in_turn(make_env):
    api_test(parallel_to_aec(make_env()), num_cycles=40)


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
