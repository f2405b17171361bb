"""TokenPruneEnv: PettingZoo's interface, in every mode the same game."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from pettingzoo.test import parallel_api_test

from prunevit.envs.data.image_sources import DatasetError
from prunevit.envs.devices import pick_device
from prunevit.envs.fields import DEFAULT_FIELDS, FIELDS
from prunevit.envs.game import GameError, TokenGame
from prunevit.envs.rewards import MarkovGameReward, ReleasedCodeReward, TeamReward
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError
from prunevit.envs.vit.weights import BackboneError

PATCHES, STAGES = 16, (0, 1, 3)
AGENTS = [f"token_{i}" for i in range(PATCHES)]
INDICES = [7, 2, 11, 0]
REWARDS = [TeamReward(accuracy="kl"), MarkovGameReward(), ReleasedCodeReward()]
MODES = {
    # the one reward that owes nothing to those who left
    "leave": {"pruned_agents": "leave", "reward": "markov-game"},
    "stay": {},
    "batched": {"num_envs": len(INDICES)},
}
BOTH = ["leave", "stay"]
# keys, and whether they are whole numbers, floating point or flags
INFOS = {
    "index": "i",
    "label": "i",
    "action_mask": "i",
    "logits": "f",
    "correct": "b",
    "gmacs": "f",
}


@pytest.fixture
def make_env(vit, some_images):
    def make(**kwargs):
        given = {"backbone": vit, "dataset": some_images, "prune_before": STAGES, "device": "cpu"}
        return TokenPruneEnv(**(given | kwargs))

    return make


@pytest.fixture(params=MODES)
def any_env(make_env, request):
    return make_env(**MODES[request.param])


@pytest.fixture
def decisions(keeps):
    """Joint actions [T, B, N]: the first image is emptied at once, the next at the second stage."""
    return keeps(len(INDICES), len(STAGES), PATCHES)


def actions(env, decision):
    """``decision`` [N], or [B, N] for a batch, as what the living agents say."""
    place = {agent: i for i, agent in enumerate(env.possible_agents)}
    if env.num_envs is None:
        return {agent: int(decision[place[agent]]) for agent in env.agents}
    return {agent: decision[:, place[agent]].long() for agent in env.agents}


def play(env, indices, decisions):
    """Every return value of an episode; the first, of ``reset``, filled up to five."""
    observations, infos = env.reset(options={"indices": indices})
    passed = [(observations, {}, {}, {}, infos)]
    for decision in decisions:
        if env.agents:
            passed.append(env.step(actions(env, decision)))
    assert not env.agents
    return passed


def play_random(env, seed):
    """Whole episode on images that ``seed`` draws, random actions that it draws too."""
    generator = torch.Generator().manual_seed(seed)
    passed, states = [env.reset(seed=seed)], [env.state()]
    while env.agents:
        decision = torch.rand(env.num_envs or 1, PATCHES, generator=generator) < 0.7
        passed.append(env.step(actions(env, decision if env.num_envs else decision[0])))
        states.append(env.state())
    return passed, states


def assert_equal(one, other, tolerance=0.0):
    """Two trees of dictionaries, sequences, arrays and numbers: every value."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key], tolerance)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair, tolerance)
    else:
        ours, others = np.asarray(one), np.asarray(other)
        assert ours.dtype == others.dtype
        np.testing.assert_allclose(ours, others, rtol=tolerance, atol=tolerance)


# --- PettingZoo's own test, and ours ---


@pytest.mark.filterwarnings("ignore:reset ignores the options")
@pytest.mark.parametrize("mode", ["leave", "stay"])
@pytest.mark.parametrize("observation", [DEFAULT_FIELDS, FIELDS])
def test_pettingzoo_accepts_it(make_env, mode, observation):
    parallel_api_test(make_env(**MODES[mode], observation=observation), num_cycles=20)


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_gives_the_same_episode_value_for_value(make_env, mode):
    one, other = make_env(**MODES[mode]), make_env(**MODES[mode])
    other.reset(seed=99)  # what came before plays no part
    for seed in (0, 1):
        assert_equal(play_random(one, seed), play_random(other, seed))
    # nor do the global generators, and what is drawn without a seed follows from the last one
    torch.manual_seed(5)
    np.random.seed(5)
    assert_equal(one.reset(), other.reset())


@pytest.mark.parametrize("mode", MODES)
def test_seeds_differ_and_so_do_environments_without_one(make_env, mode):
    def drawn(env, **kwargs):
        return str([env.reset(**kwargs)[1]["token_0"]["index"] for _ in range(12)])

    env = make_env(**MODES[mode])
    env.reset(seed=0)
    assert drawn(env) != drawn(make_env(**MODES[mode]))
    assert drawn(env, seed=0) != drawn(env, seed=1)


def test_one_seeds_episodes_are_of_many_images(make_env):
    env = make_env()
    env.reset(seed=0)
    assert len({env.reset()[1]["token_0"]["index"] for _ in range(50)}) > 6


# --- spaces ---


def test_spaces(any_env):
    width = any_env.batched.game.backbone.width
    batch = () if any_env.num_envs is None else (any_env.num_envs,)
    assert any_env.possible_agents == AGENTS
    assert any_env.max_num_agents == PATCHES
    for agent in AGENTS:
        space = any_env.observation_space(agent)
        assert isinstance(space, Box)
        assert space is any_env.observation_space(agent)
        # token, cls, stage, cls_attention
        assert space.shape == (*batch, 2 * width + len(STAGES) + 1)
        assert any_env.action_space(agent) == (MultiDiscrete([2] * 4) if batch else Discrete(2))
        assert any_env.action_space(agent) is any_env.action_space(agent)
    assert any_env.state_space.shape == (*batch, 2 * width + len(STAGES) + 1)


@pytest.mark.parametrize("mode", ["leave", "stay"])
def test_values_lie_in_their_spaces(make_env, decisions, mode):
    env = make_env(**MODES[mode])
    for observations, rewards, terminations, truncations, infos in play(env, [3], decisions[:, 3]):
        assert env.state_space.contains(env.state())
        for agent, observation in observations.items():
            assert env.observation_space(agent).contains(observation)
            assert infos[agent]["action_mask"].dtype == np.int8
        assert all(type(reward) is float for reward in rewards.values())
        assert all(type(flag) is bool for flag in terminations.values())
        assert not any(truncations.values())
        assert all(type(flag) is bool for flag in truncations.values())


# --- the same game in every mode ---


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("prune_at", ["block", "mlp"])
def test_every_mode_plays_the_same_game(make_env, decisions, reward, execution, prune_at):
    """Rewards, observations and infos for as long as an agent is there, against the game itself."""
    kwargs = {"execution": execution, "reward": reward, "prune_at": prune_at}
    modes = ["stay"] if reward.pays_pruned else BOTH
    batched = make_env(**MODES["batched"] | kwargs)
    all_images = play(batched, INDICES, decisions)
    model = batched.batched.game.backbone.model
    game = TokenGame(StagedViT(model, STAGES, prune_at=prune_at), reward)
    stages = [game.reset(*batched.batched.images.load(INDICES))]
    stages += [game.step(decision) for decision in decisions]
    for stage, (observations, rewards, *_) in zip(stages, all_images, strict=True):
        if stage.view is not None:
            seen = stage.view.scatter(stage.view.living(DEFAULT_FIELDS))
            torch.testing.assert_close(
                torch.stack(list(observations.values()), 1), seen, rtol=1e-4, atol=1e-5
            )
        if rewards:
            paid = torch.stack(list(rewards.values()), 1)
            torch.testing.assert_close(paid, stage.reward, rtol=1e-4, atol=1e-5)

    for i, index in enumerate(INDICES):
        for mode in modes:
            env = make_env(**MODES[mode] | kwargs)
            passed = play(env, [index], decisions[:, i])
            assert len(passed) == len(all_images) or mode == "leave"
            for ours, reference in zip(passed, all_images, strict=False):
                over = not env.agents and ours is passed[-1]
                for agent in ours[0]:
                    assert_same_values(ours, reference, agent, i, over)
            end, expected = passed[-1][4], all_images[-1][4]
            for agent in end:
                for key in ("index", "label", "correct", "gmacs", "logits"):
                    np.testing.assert_allclose(
                        end[agent][key], expected[agent][key][i], rtol=1e-5, atol=1e-5
                    )


@pytest.mark.parametrize("mode", BOTH)
def test_it_plays_with_merging(make_env, decisions, mode):
    """As the staged ViT does; where patches are dropped, other logits come out."""
    ends = {}
    for on_prune in ("drop", "merge"):
        env = make_env(**MODES[mode], on_prune=on_prune)
        infos = play(env, INDICES[-1:], decisions[:, -1])[-1][4]
        ends[on_prune] = next(iter(infos.values()))
    env = make_env(**MODES["batched"])
    staged = StagedViT(env.batched.game.backbone.model, STAGES, on_prune="merge")
    tokens = staged.begin(env.batched.images.load(INDICES[-1:])[0])
    for stage in range(len(STAGES)):
        tokens = staged.advance(tokens, decisions[stage, -1:], stage)
    logits = staged.finish(tokens)[0].detach().numpy()
    np.testing.assert_allclose(ends["merge"]["logits"], logits, atol=1e-5)
    assert np.abs(ends["drop"]["logits"] - logits).max() > 1e-2
    assert ends["merge"]["gmacs"] == pytest.approx(float(staged.total_macs(tokens)) / 1e9)
    assert ends["merge"]["gmacs"] > ends["drop"]["gmacs"]


def assert_same_values(ours, reference, agent, image, over):
    """What one agent is told in a single environment, and in a batch at place ``image``."""
    observation, reward, terminated, _, _ = (part.get(agent) for part in ours)
    expected = [part.get(agent) for part in reference]
    if not over:
        np.testing.assert_allclose(observation, expected[0][image], rtol=1e-4, atol=1e-5)
        mask = ours[4][agent]["action_mask"]
        assert mask.tolist() == reference[4][agent]["action_mask"][image].tolist()
    if reward is not None:
        assert reward == pytest.approx(expected[1][image].item(), abs=1e-5)
        assert terminated or not expected[2][image]


@pytest.mark.parametrize("mode", ["stay", "batched"])
def test_terminal_rewards_arrive(make_env, decisions, mode):
    """A team that is paid for the answer alone: nothing before the end, then all of it."""
    env = make_env(**MODES[mode], reward=TeamReward(0.0, beta=3.0, accuracy="confidence"))
    one = INDICES[3:], decisions[:, 3]
    passed = play(env, *(one if env.num_envs is None else (INDICES, decisions)))
    for _, rewards, *_ in passed[1:-1]:
        assert not any(np.asarray(reward).any() for reward in rewards.values())
    _, rewards, terminations, _, infos = passed[-1]
    assert len(rewards) == len(terminations) > 0
    for agent, reward in rewards.items():
        info = {key: torch.as_tensor(value) for key, value in infos[agent].items()}
        confidence = info["logits"].softmax(-1).gather(-1, info["label"][..., None])[..., 0]
        np.testing.assert_allclose(reward, 3 * confidence, rtol=1e-5)
        assert np.asarray(terminations[agent]).all()


# --- agents that leave, agents that stay ---


def kept_by(decisions):
    """Who lives after each stage, [T, N]."""
    return decisions.cumprod(0).bool()


def test_pruned_agents_leave(make_env, decisions):
    env = make_env(**MODES["leave"])
    alive = kept_by(decisions[:, 3])
    passed = play(env, INDICES[3:], decisions[:, 3])
    acting = AGENTS
    for stage, part in enumerate(passed[1:]):
        observations, _, terminations, truncations, infos = part
        # those that took part, and nobody else; the pruned are told for the last time
        for told in part:
            assert list(told) == acting
        for agent in acting:
            lives = bool(alive[stage][AGENTS.index(agent)])
            last = stage + 1 == len(STAGES)
            assert terminations[agent] == (last or not lives)
            assert not truncations[agent]
            assert observations[agent].any() == (lives and not last)
            assert infos[agent]["action_mask"].tolist() == [1, int(lives and not last)]
        acting = [agent for agent, lives in zip(AGENTS, alive[stage], strict=True) if lives]
    assert env.agents == []


def test_pruned_agents_stay(make_env, decisions):
    env = make_env()
    assert env.pruned_agents == "stay"
    alive = kept_by(decisions[:, 3])
    passed = play(env, INDICES[3:], decisions[:, 3])
    assert len(passed) == len(STAGES) + 1
    for stage, (observations, rewards, terminations, _, infos) in enumerate(passed[1:]):
        last = stage + 1 == len(STAGES)
        assert list(observations) == list(rewards) == AGENTS
        assert set(terminations.values()) == {last}
        for agent, lives in zip(AGENTS, alive[stage].tolist(), strict=True):
            assert observations[agent].any() == (lives and not last)
            assert infos[agent]["action_mask"].tolist() == [1, int(lives and not last)]


@pytest.mark.parametrize("emptied", [None, 0, 1, 2])
def test_who_leaves_is_paid_what_those_that_stay_are(make_env, decisions, emptied):
    """Also where everybody leaves, at whatever stage: nothing is owed to anybody."""
    keep = decisions[:, 3].clone()
    assert not keep[0].all()
    if emptied is not None:
        keep[emptied:] = False
    leave = play(make_env(**MODES["leave"]), [3], keep)
    stay = play(make_env(reward="markov-game"), [3], keep)
    assert len(leave) == 1 + (3 if emptied is None else emptied + 1)
    paid, due = (
        [sum(rewards.get(agent, 0.0) for _, rewards, *_ in passed[1:]) for agent in AGENTS]
        for passed in (leave, stay)
    )
    assert any(due) or emptied == 0
    assert paid == pytest.approx(due, abs=1e-6)


class PaysLater(MarkovGameReward):
    """A user's reward, with or without a word on what it owes to those who left."""

    def terminal(self, facts):
        return torch.ones(facts.kept.shape[1:])


class Silent:
    alpha, needs_dense = 0.1, False


@pytest.mark.parametrize("reward", ["team", "released-code", TeamReward(beta=0.5), Silent()])
def test_agents_may_not_leave_before_they_are_paid(make_env, reward):
    with pytest.raises(ValueError, match=r"pruned_agents='leave' with .* Take pruned_agents='st"):
        make_env(reward=reward, pruned_agents="leave")


@pytest.mark.parametrize("last", [(), ("token_0",)])
def test_a_reward_that_breaks_its_word_is_refused(make_env, last):
    """Where agents are there to the end, and where all have left before it."""
    env = make_env(pruned_agents="leave", reward=PaysLater())
    env.reset(seed=0)

    def play_on():
        while env.agents:
            env.step({agent: int(agent in last) for agent in env.agents})

    with pytest.raises(GameError, match="PaysLater says pays_pruned=False, but pays"):
        play_on()


@pytest.mark.parametrize("emptied", [0, 1])
def test_an_episode_ends_with_its_last_agent(make_env, decisions, emptied):
    keep = decisions[:, 3].clone()
    keep[emptied] = False
    env = make_env(**MODES["leave"])
    passed = play(env, [3], keep)
    assert len(passed) == emptied + 2
    observations, _, terminations, truncations, infos = passed[-1]
    assert terminations
    assert all(terminations.values())
    assert not any(truncations.values())
    reference = play(make_env(), [3], keep)[-1][4]["token_0"]
    for agent, info in infos.items():
        assert not observations[agent].any()
        assert info["gmacs"] == reference["gmacs"] > 0
        np.testing.assert_array_equal(info["logits"], reference["logits"])


def test_a_model_without_prefix_keeps_an_agent(make_env, make_vit):
    """The first of the living can't leave, whatever it says."""
    env = make_env(**MODES["leave"], backbone=make_vit(class_token=False, global_pool="avg"))
    env.reset(seed=0)
    _, _, terminations, _, _ = env.step(dict.fromkeys(AGENTS, 0))
    assert env.agents == ["token_0"]
    assert [agent for agent, ended in terminations.items() if not ended] == ["token_0"]


def test_last_observations_share_no_memory(make_env):
    env = make_env()
    env.reset(seed=0)
    for _ in STAGES:
        observations, *_ = env.step(dict.fromkeys(AGENTS, 1))
    observations["token_0"] += 1
    assert not observations["token_1"].any()


# --- infos and state ---


@pytest.mark.parametrize("mode", MODES)
def test_infos_have_one_form_from_reset_on(make_env, some_images, decisions, mode):
    env = make_env(**MODES[mode])
    batch = () if env.num_envs is None else (env.num_envs,)
    indices = INDICES[: env.num_envs or 1]
    passed = play(env, indices, decisions if batch else decisions[:, 0])
    for _, rewards, *_, infos in passed:
        over = infos is passed[-1][4]
        for agent in rewards or AGENTS:
            info = infos[agent]
            assert info.keys() == INFOS.keys()
            shapes = {key: tuple(np.shape(value)) for key, value in info.items()}
            each = dict.fromkeys(("index", "label", "correct", "gmacs"), batch)
            assert shapes == each | {
                "action_mask": (*batch, 2),
                "logits": (*batch, 5),
            }
            kinds = {key: np.asarray(value).dtype.kind for key, value in info.items()}
            assert kinds == INFOS
            assert np.array_equal(info["index"], indices if batch else indices[0])
            labels = some_images.labels[indices]
            assert np.array_equal(info["label"], labels if batch else labels[0])
            for key in ("logits", "gmacs"):
                assert np.any(np.asarray(info[key])) == over
        if over:
            answers = np.asarray(infos["token_0"]["logits"]).argmax(-1)
            assert np.array_equal(answers == np.asarray(info["label"]), info["correct"])


@pytest.mark.parametrize("mode", MODES)
def test_infos_tell_how_the_last_episode_ended(make_env, decisions, mode):
    """Libraries that reset by themselves lay its infos over the last step's. A seed begins anew."""
    env = make_env(**MODES[mode])
    batched = env.num_envs is not None
    outcome = "logits", "correct", "gmacs"
    asked = (INDICES, decisions) if batched else (INDICES[3:], decisions[:, 3])
    for key in outcome:
        assert not np.any(np.asarray(env.reset()[1]["token_0"][key]))
    last = play(env, *asked)[-1][4]["token_0"]
    later = env.reset()[1]["token_0"]
    for key in outcome:
        np.testing.assert_array_equal(later[key], last[key])
    *_, amid = env.step(dict.fromkeys(AGENTS, torch.ones(4, dtype=int) if batched else 1))
    for key in outcome:
        np.testing.assert_array_equal(amid["token_0"][key], last[key])
        assert not np.any(np.asarray(env.reset(seed=1)[1]["token_0"][key]))


@pytest.mark.parametrize("mode", MODES)
def test_state_is_the_games(make_env, vit, some_images, decisions, mode):
    env = make_env(**MODES[mode])
    with pytest.raises(GameError, match="before reset"):
        env.state()
    batched = env.num_envs is not None
    indices = INDICES if batched else INDICES[3:]
    keep = decisions if batched else decisions[:, 3:]
    game = TokenGame(StagedViT(vit, STAGES))
    stage = game.reset(*some_images.load(indices))
    env.reset(options={"indices": indices})
    for decision in keep:
        expected = stage.view.state()
        state = torch.as_tensor(env.state())
        torch.testing.assert_close(state, expected if batched else expected[0])
        stage = game.step(decision)
        env.step(actions(env, decision if batched else decision[0]))
    assert not env.state().any()
    assert env.state().shape == env.state_space.shape


# --- batches ---


def assert_views(values, shape):
    """One tensor [B, N, ...] of all agents, of which each sees its column."""
    first = values["token_0"]
    whole = first._base
    assert whole is not None
    assert whole.numel() <= len(values) * first.numel()
    for i, (agent, value) in enumerate(values.items()):
        assert agent == AGENTS[i]
        assert value.shape == shape
        assert value._base is whole
        offset = value.storage_offset() - first.storage_offset()
        assert offset in (0, i * first[0].numel())  # 0 where all agents get the same


def test_batched_values_are_views_of_tensors_of_all_agents(make_env, decisions):
    env = make_env(**MODES["batched"])
    batch = len(INDICES)
    for observations, rewards, terminations, truncations, infos in play(env, INDICES, decisions):
        assert_views(observations, env.observation_space("token_0").shape)
        masks = {agent: info["action_mask"] for agent, info in infos.items()}
        assert_views(masks, (batch, 2))
        for values in (rewards, terminations, truncations):
            if values:
                assert_views(values, (batch,))
        for key in INFOS.keys() - {"action_mask"}:
            assert len({id(info[key]) for info in infos.values()}) == 1


def test_a_batch_draws_different_images(make_env, some_images):
    env = make_env(num_envs=len(some_images))
    _, infos = env.reset(seed=0)
    assert sorted(infos["token_0"]["index"].tolist()) == list(range(len(some_images)))


def test_agents_of_a_batch_always_stay(make_env):
    assert make_env(num_envs=2).pruned_agents == "stay"
    with pytest.raises(ValueError, match=r"'leave' with num_envs=2.*take pruned_agents='stay'"):
        make_env(num_envs=2, pruned_agents="leave", reward="markov-game")


def test_spaces_of_a_batch_are_those_of_its_values(make_env):
    env = make_env(**MODES["batched"])
    observations, _ = env.reset(seed=0)
    for agent in AGENTS:
        assert env.observation_space(agent).contains(observations[agent].numpy())
        assert env.action_space(agent).shape == (4,)
        # agents that draw alike would all be pruned together
        assert env.action_space(agent) is not env.action_space(AGENTS[0]) or agent == AGENTS[0]
    assert env.state_space.contains(env.state().numpy())
    env.step({agent: env.action_space(agent).sample() for agent in AGENTS})


# --- actions ---


@pytest.mark.parametrize("action", [1, True, np.int64(1), np.array([1]), np.float32(1.0)])
def test_numbers_of_any_kind_are_actions(make_env, action):
    env = make_env()
    env.reset(seed=0)
    env.step(dict.fromkeys(AGENTS, action))
    assert env.agents == AGENTS


@pytest.mark.parametrize("mode", MODES)
def test_actions_must_be_those_of_the_living(make_env, mode):
    env = make_env(**MODES[mode])
    one = torch.ones(env.num_envs, dtype=torch.int64) if env.num_envs else 1
    complete = dict.fromkeys(AGENTS, one)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"missing token_1, token_2, token_3 and 12 more, unk"):
        env.step({"token_0": one})
    with pytest.raises(ValueError, match=r"missing none, unknown critic"):
        env.step(complete | {"critic": one})
    env.step(complete)  # nothing was lost


@pytest.mark.parametrize("placeholder", [1, 0, None, np.nan, -1])
def test_what_is_said_for_those_that_are_gone_is_ignored(make_env, placeholder):
    env, reference = (make_env(**MODES["leave"]) for _ in range(2))
    for each in (env, reference):
        each.reset(seed=0)
        each.step(dict.fromkeys(AGENTS, 1) | {"token_3": 0})
    for _ in STAGES[1:]:
        assert "token_3" not in env.agents
        told = env.step(dict.fromkeys(AGENTS, 1) | {"token_3": placeholder})
        assert_equal(told, reference.step(dict.fromkeys(reference.agents, 1)))


@pytest.mark.parametrize("action", [2, -1, 0.5, np.nan, np.array([1, 0]), None, "1", []])
def test_actions_that_are_neither_keep_nor_prune_are_refused(make_env, action):
    env = make_env()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"of token_4: choose 0 \(prune\) or 1 \(keep\)"):
        env.step(dict.fromkeys(AGENTS, 1) | {"token_4": action})


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (torch.ones(3, dtype=torch.int64), r"token_4 must be integers \[4\]: got \[3\]"),
        (torch.tensor(1), r"token_4 must be integers \[4\]: got \[\]"),
        (1, r"token_4 must be integers \[4\]"),
        (torch.full((4,), 0.5), r"token_4 must be integers \[4\]: .*got torch.float32 \[4\]"),
        (torch.tensor([0, 1, 2, 1]), r"actions must be 0 \(prune\) or 1 \(keep\)"),
    ],
)
def test_actions_of_a_batch_are_checked(make_env, action, message):
    env = make_env(**MODES["batched"])
    env.reset(seed=0)
    fine = torch.ones(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        env.step(dict.fromkeys(AGENTS, fine) | {"token_4": action})
    env.step(dict.fromkeys(AGENTS, fine.numpy()))
    env.step(dict.fromkeys(AGENTS, fine.float()))  # exactly 0.0 or 1.0


def test_steps_out_of_turn(any_env, decisions):
    with pytest.raises(GameError, match="reset"):
        any_env.step({})
    with pytest.raises(GameError, match="reset"):
        any_env.state()
    batched = any_env.num_envs is not None
    play(any_env, INDICES if batched else [0], decisions if batched else decisions[:, 0])
    # PettingZoo's own games answer so, and SuperSuit's black_death_v3 asks for it
    for actions_after_the_end in ({}, {"token_0": 1}):
        assert any_env.step(actions_after_the_end) == ({}, {}, {}, {}, {})


# --- reset ---


def test_indices_name_the_images(make_env, some_images):
    env = make_env()
    for index in (0, 11, np.int64(5)):
        _, infos = env.reset(options={"indices": [index]})
        assert infos["token_3"]["index"] == index
        assert infos["token_3"]["label"] == some_images.labels[index]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([12], r"\[12\]: the dataset has 0..11"),
        ([-1], r"\[-1\]: the dataset has 0..11"),
        ([0, 1], r"1 image indices are needed: got \[2\]"),
        (3, r"1 image indices are needed: got \[\]"),
        ([1.5], "whole numbers"),
        (["three"], "whole numbers"),
    ],
)
def test_wrong_indices_are_refused(make_env, indices, message):
    with pytest.raises(ValueError, match=message):
        make_env().reset(options={"indices": indices})


def test_options_that_mean_nothing_are_named(make_env):
    with pytest.warns(UserWarning, match=r"ignores the options \['image'\].*'indices'"):
        make_env().reset(options={"image": 3})


def test_resetting_amid_an_episode_begins_anew(any_env, decisions):
    batched = any_env.num_envs is not None
    asked = (INDICES, decisions) if batched else (INDICES[3:], decisions[:, 3])
    expected = play(any_env, *asked)
    any_env.reset(seed=0)
    any_env.step(actions(any_env, ~decisions[0] if batched else ~decisions[0, 3]))
    assert_equal(play(any_env, *asked), expected)


# --- pictures ---


def test_pruned_patches_are_whited_out(make_env, some_images):
    env = make_env(**MODES["leave"], render_mode="rgb_array")
    env.reset(options={"indices": [4]})
    strips = [env.render()]
    env.step({agent: int(agent in ("token_5", "token_6")) for agent in AGENTS})
    strips.append(env.render())
    env.step({"token_5": 1, "token_6": 0})
    env.step({"token_5": 1})
    strips.append(env.render())
    # frames of one size, as videos need them
    assert {strip.shape for strip in strips} == {(32, 134, 3)}
    assert (strips[0][:, 32:] == 255).all()
    assert (strips[1][:, 66:] == 255).all()
    assert all(strip.dtype == np.uint8 for strip in strips)
    # timm normalises this model's images with mean and deviation one half
    pixels = (some_images.images[4].permute(1, 2, 0).numpy() * 0.5 + 0.5).clip(0, 1) * 255
    pictures = [strips[2][:, start : start + 32] for start in (0, 34, 68, 102)]
    np.testing.assert_allclose(pictures[0], pixels, atol=1)
    for picture, living in zip(pictures[1:], ([5, 6], [5], [5]), strict=True):
        for patch in range(PATCHES):
            row, column = (8 * place for place in divmod(patch, 4))
            here = (slice(row, row + 8), slice(column, column + 8))
            if patch in living:
                np.testing.assert_allclose(picture[here], pixels[here], atol=1)
            else:
                assert (picture[here] >= np.floor(pixels[here])).all()
                assert picture[here].min() > 200


def test_images_of_a_batch_stand_below_each_other(make_env, decisions):
    env = make_env(**MODES["batched"], render_mode="rgb_array")
    play(env, INDICES, decisions)
    picture = env.render()
    assert picture.shape == (4 * 32, 4 * 32 + 3 * 2, 3)
    for i, index in enumerate(INDICES):
        single = make_env(render_mode="rgb_array")
        play(single, [index], decisions[:, i])
        np.testing.assert_array_equal(picture[32 * i : 32 * (i + 1)], single.render())


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_people_are_shown_every_stage(make_env, monkeypatch):
    plt.switch_backend("Agg")
    monkeypatch.setitem(TokenPruneEnv.metadata, "render_fps", 1000)
    env = make_env(render_mode="human")
    reference = make_env(render_mode="rgb_array")
    for each in (env, reference):
        each.reset(options={"indices": [4]})
    for stage in range(len(STAGES) + 1):
        if stage:
            for each in (env, reference):
                each.step({agent: int(agent != "token_0") for agent in each.agents})
        (axes,) = plt.figure("token_prune").axes
        (shown,) = axes.get_images()
        np.testing.assert_array_equal(shown.get_array(), reference.render())
    assert env.render() is None
    env.close()
    assert not plt.fignum_exists("token_prune")


def test_rendering_out_of_turn(make_env):
    env = make_env()
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode='rgb_array' or 'human'"):
        assert env.render() is None
    with pytest.raises(GameError, match="before reset"):
        make_env(render_mode="rgb_array").render()


# --- making one ---


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (
            {"backbone": "vit_huge_patch3_99"},
            BackboneError,
            "unknown backbone 'vit_huge_patch3_99'",
        ),
        ({"backbone": torch.nn.Linear(1, 1)}, UnsupportedBackboneError, "Linear can't be run"),
        ({"dataset": "letters"}, DatasetError, "unknown dataset 'letters': choose digits"),
        ({"dataset": "digits", "split": "exam"}, DatasetError, "unknown split 'exam'"),
        ({"prune_before": (9,)}, ValueError, r"out of range: the backbone's blocks are 0\.\.3"),
        ({"reward": "salary"}, ValueError, "unknown reward 'salary': choose from team"),
        ({"observation": ("token", "smell")}, ValueError, "name one or more of token, cls"),
        ({"observation": "token"}, ValueError, "name one or more of token, cls"),
        ({"num_envs": 0}, ValueError, "num_envs=0"),
        ({"num_envs": -2}, ValueError, "num_envs=-2"),
        ({"num_envs": 13}, ValueError, "num_envs=13.*the dataset has 12"),
        ({"pruned_agents": "die"}, ValueError, "pruned_agents='die': choose from leave, stay"),
        ({"device": "abacus"}, ValueError, "device 'abacus' can't be used here"),
        ({"device": "hpu"}, ValueError, "device 'hpu' can't be used here"),
        ({"device": "meta"}, ValueError, "device 'meta' can't be used here"),
        ({"execution": "jagged"}, ValueError, "unknown execution 'jagged'"),
        ({"on_prune": "fuse"}, ValueError, "unknown on_prune 'fuse': choose from drop, merge"),
        ({"render_mode": "ansi"}, ValueError, "render_mode='ansi': choose rgb_array or human"),
    ],
)
def test_wrong_arguments_are_refused(make_env, argument, error, message):
    with pytest.raises(error, match=message):
        make_env(**argument)


def test_a_backbone_of_too_few_classes_is_refused(make_env, make_vit):
    with pytest.raises(ValueError, match=r"has 5 classes \(.*\), the backbone distinguishes 3"):
        make_env(backbone=make_vit(num_classes=3))


def test_the_users_model_is_left_alone(make_env, make_vit):
    model = make_vit().train()
    env = make_env(backbone=model)
    env.reset(seed=0)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in env.batched.game.backbone.model.modules())
    assert make_env(backbone=model.eval()).batched.game.backbone.model is model


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device() == pick_device("auto")
    assert pick_device(torch.device("cpu")).type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' can't be used here"):
            pick_device("cuda")


def test_closing_frees_the_episode(make_env):
    env = make_env()
    env.reset(seed=0)
    env.close()
    with pytest.raises(GameError, match="reset"):
        env.step(dict.fromkeys(AGENTS, 1))
    env.reset(seed=0)
    env.step(dict.fromkeys(AGENTS, 1))


def test_it_plays_on_a_fresh_install_without_arguments():
    """Digits and their trained ViT come with the package."""
    env = TokenPruneEnv()
    assert env.max_num_agents == 64
    observations, infos = env.reset(seed=0)
    assert set(observations) == set(env.possible_agents)
    right = []
    for seed in range(5):
        env.reset(seed=seed)
        while env.agents:
            _, rewards, _, _, infos = env.step(dict.fromkeys(env.agents, 1))
        assert all(reward > -1 for reward in rewards.values())
        right.append(infos["token_0"]["correct"])
        assert infos["token_0"]["gmacs"] > 0.05
    assert sum(right) >= 4  # it was trained
    env.reset(seed=0)
    while env.agents:
        generator = np.random.default_rng(0)
        env.step({agent: int(generator.integers(2)) for agent in env.agents})
