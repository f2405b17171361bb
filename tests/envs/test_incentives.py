"""What a learner receives pays for keeping what matters, never for pruning everything: three ways
to play, through every reward, mode and adapter.
"""

import numpy as np
import pytest
import torch

from prunevit.envs.adapters.sb3 import TokenRolloutBuffer, TokenVecEnv
from prunevit.envs.data.datasets import ClutteredDigits
from prunevit.envs.rewards import MarkovGameReward, ReleasedCodeReward, TeamReward
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.create import create_backbone

IMAGES, PATCHES, STAGES = 10, 64, (1, 3)
KEPT = (44, 31)  # 70% and again, as the released code's reward asks for
REWARDS = {
    "team": TeamReward(),
    "markov-game": MarkovGameReward(),
    "released-code": ReleasedCodeReward(),
    "team, embeddings": TeamReward(accuracy="embedding"),
    "markov-game, embeddings": MarkovGameReward(accuracy="embedding"),
}


class FirstDigits(ClutteredDigits):
    """As many test images as are played, so that each is, in order."""

    def __init__(self):
        super().__init__("test", IMAGES)


@pytest.fixture(scope="module")
def game():
    return {
        "backbone": create_backbone("digits_vit").eval(),
        "dataset": FirstDigits(),
        "prune_before": STAGES,
        "observation": ("cls_attention",),
        "device": "cpu",
    }


def paying(game, reward):
    """Arguments of the game with this reward, on a backbone that gives what it reads."""
    headless = {"backbone": create_backbone("digits_vit", num_classes=0)}
    return game | {"reward": reward} | (headless if reward.reads == "embeddings" else {})


# --- ways to play: what is seen [B, N, 1] and the stage -> who is kept, bool [B, N] ---


def keep_all(seen, stage):
    return torch.ones(seen.shape[:2], dtype=torch.bool)


def prune_all(seen, stage):
    return torch.zeros(seen.shape[:2], dtype=torch.bool)


def keep_one(seen, stage):
    return prune_all(seen, stage).index_fill(1, torch.tensor([30]), True)


def keep_what_matters(seen, stage):
    """The patches that the class token attends to most; the pruned are seen as zeros."""
    most = seen[..., 0].topk(KEPT[stage], dim=1).indices
    return prune_all(seen, stage).scatter(1, most, True)


WAYS = [keep_what_matters, keep_all, prune_all]


def assert_order(received, reward):
    """``received(way)``: the mean over images and agents of all that was paid."""
    good, everything, nothing = map(received, WAYS)
    if isinstance(reward, ReleasedCodeReward):
        # it blames whoever is kept beyond its schedule, so there the dense model is the worst; what
        # it rewards is a schedule
        assert good > max(everything, nothing) + 0.5
    else:
        assert good > everything > nothing
    return good, everything, nothing


# --- through every door ---


def through(driver, game, reward, way):
    batch = IMAGES if driver.batch > 1 else 1
    env = driver.make(batch, paying(game, reward))
    total = 0.0
    for start in range(0, IMAGES, batch):
        seen = driver.begin(env, indices=list(range(start, start + batch)))
        for stage in range(len(STAGES)):
            seen = torch.as_tensor(np.asarray(seen)).reshape(batch, PATCHES, -1)
            paid, seen, *_ = driver.step(env, way(seen, stage))
            total += float(np.asarray(paid).sum())
    env.close()
    return total / (IMAGES * PATCHES)


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
def test_every_adapter_pays_most_for_keeping_what_matters(driver, game, reward):
    assert_order(lambda way: through(driver, game, reward, way), reward)


def one_by_one(env, way):
    """Sum of what each agent received while it was there, images one after another, with the
    library's own loop.
    """
    total = 0.0
    for image in range(IMAGES):
        observations, _ = env.reset(options={"indices": [image]})
        for stage in range(len(STAGES)):
            nothing = np.zeros(1, np.float32)
            seen = [observations.get(agent, nothing) for agent in env.possible_agents]
            keep = way(torch.tensor(np.array(seen))[None], stage)[0]
            place = {agent: i for i, agent in enumerate(env.possible_agents)}
            actions = {agent: int(keep[place[agent]]) for agent in env.agents}
            observations, rewards, *_ = env.step(actions)
            total += sum(rewards.values())
    return total / (IMAGES * PATCHES)


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize("pruned_agents", ["stay", "leave"])
def test_one_image_at_a_time_pays_alike(game, reward, pruned_agents):
    arguments = paying(game, reward) | {"pruned_agents": pruned_agents}
    if pruned_agents == "leave" and reward.pays_pruned:
        with pytest.raises(ValueError, match="whoever left would not receive it"):
            TokenPruneEnv(**arguments)
        return
    env = TokenPruneEnv(**arguments)
    assert_order(lambda way: one_by_one(env, way), reward)


def test_the_default_environment_pays_for_the_dense_model_rather_than_for_nothing(game):
    """Agents that left received -0.0001 on average for pruning everything at once, and -0.065 for
    keeping all.
    """
    env = TokenPruneEnv(**{name: game[name] for name in ("dataset", "device")})
    received = {}
    for action in (0, 1):
        paid = []
        for image in range(4):
            env.reset(options={"indices": [image]})
            while env.agents:
                paid.append(sum(env.step(dict.fromkeys(env.agents, action))[1].values()))
        received[action] = sum(paid) / (4 * PATCHES)
    assert received[1] == pytest.approx(-0.0525, abs=0.005)  # alpha for 7 of 8 blocks
    assert received[0] < received[1] - 0.5


def test_who_prunes_alone_is_paid_as_its_team_is(game):
    """Leaving early, it gained 0.056 to 0.362 over those that stayed."""
    env = TokenPruneEnv(**game)
    env.reset(options={"indices": [0]})
    paid = dict.fromkeys(env.possible_agents, 0.0)
    while env.agents:
        actions = {agent: int(agent != "token_3") for agent in env.agents}
        for agent, reward in env.step(actions)[1].items():
            paid[agent] += reward
    assert set(paid.values()) == {paid["token_0"]}


@pytest.mark.parametrize(("alpha", "dense_is_better"), [(1.0, False), (0.5, True)])
def test_a_lone_survivor_is_worth_what_the_price_of_compute_says(game, alpha, dense_is_better):
    """The markov game's pay adds up to accuracy - alpha * compute: at a price of one, an image of
    one token is worth more than the dense model. The class's docstring says so.
    """
    env = TokenPruneEnv(**game | {"reward": MarkovGameReward(alpha=alpha)})
    assert (one_by_one(env, keep_all) > one_by_one(env, keep_one)) == dense_is_better


# --- what learners make of it ---


def test_the_decisions_that_stable_baselines_learns_from_are_credited_alike(game):
    """Returns of the first decisions in the buffer: all tokens live there."""

    def credited(way):
        env = TokenVecEnv(IMAGES, **game)
        env.set_options({"indices": list(range(IMAGES))})
        buffer = TokenRolloutBuffer(
            len(STAGES), env.observation_space, env.action_space, "cpu", 1.0, 1.0, env.num_envs
        )
        seen, starts = env.reset(), np.ones(env.num_envs, bool)
        nothing = torch.zeros(env.num_envs)
        for stage in range(len(STAGES)):
            keep = way(torch.tensor(seen).reshape(IMAGES, PATCHES, 1), stage).flatten().numpy()
            later, rewards, dones, _ = env.step(keep.astype(np.int64))
            buffer.add(seen, keep[:, None], rewards, starts, nothing, nothing)
            seen, starts = later, dones
        buffer.compute_returns_and_advantage(nothing, dones)
        return float(buffer.returns[0].mean())

    assert_order(credited, TeamReward())


@pytest.mark.integration("marl-peers")
def test_supersuit_hands_on_what_was_paid_and_how_it_ended(game):
    from supersuit import concat_vec_envs_v1, pettingzoo_env_to_vec_env_v1

    def received(way):
        env = pettingzoo_env_to_vec_env_v1(TokenPruneEnv(**game))
        env = concat_vec_envs_v1(env, 1, num_cpus=1, base_class="gymnasium")
        seen, _ = env.reset(seed=0)
        total, images = 0.0, 8
        for _ in range(images):
            for stage in range(len(STAGES)):
                keep = way(torch.tensor(seen)[None], stage)[0].long().numpy()
                seen, rewards, terminated, _, infos = env.step(keep)
                total += rewards.sum()
            assert terminated.all()
            # its own reset's infos lie over those of the last step
            outcome = infos["gmacs"] if isinstance(infos, dict) else [i["gmacs"] for i in infos]
            assert np.min(outcome) > 0.01
        return total / (images * PATCHES)

    assert_order(received, TeamReward())


@pytest.mark.integration("marl-peers")
@pytest.mark.parametrize("mode", [{}, {"pruned_agents": "leave", "reward": "markov-game"}])
def test_supersuits_black_death_reports_the_end(game, mode):
    from supersuit import black_death_v3

    env = black_death_v3(TokenPruneEnv(**game | mode))
    for _ in range(2):
        env.reset(seed=0)
        steps = 0
        while env.agents:
            _, _, terminations, _, _ = env.step(dict.fromkeys(env.agents, 0))
            steps += 1
            assert steps <= len(STAGES) + 1
        assert all(terminations.values())


@pytest.mark.integration("rllib")
def test_rllibs_learners_are_credited_alike(game):
    """Returns of the single agents' episodes, as RLlib's runner fills them."""
    from ray.rllib.env.multi_agent_episode import MultiAgentEpisode

    from prunevit.envs.adapters.rllib import TokenPruneMulti

    env = TokenPruneMulti(game)

    def received(way):
        total = 0.0
        for image in range(8):
            seen, infos = env.reset(options={"indices": [image]})
            episode = MultiAgentEpisode(
                observation_space=env.observation_spaces,
                action_space=env.action_spaces,
                agent_to_module_mapping_fn=lambda agent, episode: "token",
            )
            episode.add_env_reset(observations=seen, infos=infos)
            for stage in range(len(STAGES)):
                nothing = np.zeros(1, np.float32)
                rows = np.array([seen.get(agent, nothing) for agent in env.possible_agents])
                keep = way(torch.tensor(rows)[None], stage)[0].tolist()
                asked = episode.get_agents_to_act()
                actions = {agent: int(keep[int(agent.split("_")[1])]) for agent in asked}
                seen, rewards, terminated, truncated, infos = env.step(actions)
                episode.add_env_step(
                    seen, actions, rewards, infos, terminateds=terminated, truncateds=truncated
                )
            total += sum(each.get_return() for each in episode.agent_episodes.values())
        return total / (8 * PATCHES)

    assert_order(received, TeamReward())
