"""RLlib: what its episodes, and so its learners, hold of tokens that are pruned."""

import numpy as np
import pytest

from prunevit.envs.game import GameError
from prunevit.envs.rewards import MarkovGameReward, ReleasedCodeReward, TeamReward

PATCHES, STAGES, BATCH = 16, (0, 1, 3), 4
INDICES = [7, 2, 11, 0]
pytestmark = pytest.mark.integration("rllib")


@pytest.fixture
def game(vit, some_images):
    return {"backbone": vit, "dataset": some_images, "prune_before": STAGES, "device": "cpu"}


@pytest.fixture
def one(game):
    from prunevit.envs.adapters.rllib import TokenPruneMulti

    return TokenPruneMulti(game)


@pytest.fixture
def make_many():
    from prunevit.envs.adapters.rllib import TokenPruneMultiVector

    return TokenPruneMultiVector


def record(env, decisions):
    """RLlib's episodes, filled as its runner fills them, and what was paid [T, B, N]."""
    from ray.rllib.env.multi_agent_episode import MultiAgentEpisode

    seen, infos = env.reset(options={"indices": INDICES})
    episodes = [
        MultiAgentEpisode(
            observation_space=env.single_observation_spaces,
            action_space=env.single_action_spaces,
            agent_to_module_mapping_fn=lambda agent, episode: "token",
        )
        for _ in INDICES
    ]
    for episode, first, info in zip(episodes, seen, infos, strict=True):
        episode.add_env_reset(observations=first, infos=info)
    paid = []
    for keep in decisions:
        # RLlib asks those that it saw
        actions = [
            {agent: int(row[int(agent.split("_")[1])]) for agent in episode.get_agents_to_act()}
            for episode, row in zip(episodes, keep, strict=True)
        ]
        stepped = env.step(actions)
        paid.append([list(rewards.values()) for rewards in stepped[1]])
        for i, episode in enumerate(episodes):
            observations, rewards, terminated, truncated, infos = (part[i] for part in stepped)
            episode.add_env_step(
                observations, actions[i], rewards, infos,
                terminateds=terminated, truncateds=truncated,
            )  # fmt: skip
    return episodes, np.array(paid, np.float32)


@pytest.mark.parametrize(
    "reward",
    [TeamReward(), MarkovGameReward(), ReleasedCodeReward()],
    ids=lambda r: type(r).__name__,
)
def test_episodes_hold_the_decisions_of_the_living_and_all_that_they_brought(
    make_many, game, keeps, reward
):
    decisions = keeps(BATCH, len(STAGES), PATCHES).numpy()
    episodes, paid = record(make_many(BATCH, game | {"reward": reward}), decisions)
    pruned_early = 0
    for image, episode in enumerate(episodes):
        assert episode.is_terminated
        assert len(episode.agent_episodes) == PATCHES
        for agent, own in episode.agent_episodes.items():
            token = int(agent.split("_")[1])
            chosen = decisions[:, image, token]
            # up to and with the decision by which it was pruned
            decided = min(len(STAGES), 1 + int(np.argmin([*chosen, False])))
            pruned_early += decided < len(STAGES)
            assert own.get_actions() == chosen[:decided].astype(int).tolist()
            assert own.is_terminated
            expected = paid[:, image, token]
            expected = [*expected[: decided - 1], expected[decided - 1 :].sum()]
            np.testing.assert_allclose(own.get_rewards(), expected, rtol=1e-4, atol=1e-5)
            # the last observation is only there since RLlib wants one
            assert all(seen.any() for seen in own.get_observations()[:-1])
    assert pruned_early > PATCHES
    if isinstance(reward, TeamReward):
        assert paid[-1].all()


def test_a_batch_holds_what_single_images_do(make_many, one, game, keeps):
    decisions = keeps(BATCH, len(STAGES), PATCHES).numpy().astype(int)
    many = make_many(BATCH, game)
    batched = [many.reset(options={"indices": INDICES})[0]]
    batched += [
        many.step([dict(zip(one.agents, row, strict=True)) for row in keep]) for keep in decisions
    ]
    for image, index in enumerate(INDICES):
        seen, _ = one.reset(options={"indices": [index]})
        assert seen.keys() == batched[0][image].keys() == set(one.agents)
        living = set(one.agents)
        for stage, (keep, there) in enumerate(zip(decisions, batched[1:], strict=True)):
            acted = living
            living = {a for a, kept in zip(one.agents, keep[image], strict=True) if kept} & acted
            here = one.step(dict(zip(one.agents, keep[image], strict=True)))
            seen, rewards, terminated, truncated, infos = (part[image] for part in there)
            # the last is of those that were asked: RLlib wants each episode to end with one
            shown = acted if stage + 1 == len(STAGES) else living
            assert here[0].keys() == seen.keys() == shown
            for agent, value in here[0].items():
                np.testing.assert_allclose(value, seen[agent], atol=1e-5)
            assert here[1] == pytest.approx(rewards, rel=1e-4, abs=1e-5)
            assert here[2:4] == (terminated, truncated)
        assert infos["__common__"]["gmacs"] == pytest.approx(here[4]["__common__"]["gmacs"])
        assert terminated == {"__all__": True}


def test_the_step_after_the_last_one_begins_anew(make_many, game):
    env = make_many(2, game)
    assert env.metadata["autoreset_mode"] == "next_step"
    env.reset(seed=0)
    nothing = [{}, {}]
    for stage in range(len(STAGES)):
        # whoever says nothing is pruned
        seen, _, terminated, *_ = env.step(nothing)
        assert seen == nothing
        assert terminated == [{"__all__": stage + 1 == len(STAGES)}] * 2
    seen, rewards, terminated, truncated, _ = env.step(nothing)
    assert rewards == nothing
    assert terminated == truncated == [{"__all__": False}] * 2
    assert all(len(tokens) == PATCHES for tokens in seen)
    # but not if somebody reset it before
    for _ in STAGES:
        env.step(nothing)
    env.reset()
    assert all(len(paid) == PATCHES for paid in env.step(nothing)[1])


def test_rllib_accepts_it(one):
    from ray.rllib.utils.pre_checks.env import check_multiagent_environments

    check_multiagent_environments(one)
    tokens = set(one.possible_agents)
    assert len(tokens) == PATCHES
    assert one.observation_spaces.keys() == one.action_spaces.keys() == tokens


def test_what_makes_no_sense_is_refused(one):
    with pytest.warns(UserWarning, match="there is only 'indices'"):
        one.reset(options={"image": 3})
    one.reset(seed=0)
    with pytest.raises(ValueError, match=r"0 \(prune\) or 1 \(keep\)"):
        one.step({"token_0": 2})
    with pytest.raises(TypeError, match="unknown arguments num_tokens"):
        type(one)({"num_tokens": 3})
    one.close()
    with pytest.raises(GameError, match="closed"):
        one.reset()
