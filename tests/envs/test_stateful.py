"""TokenPruneEnv under random calls, legal and not, in any order."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from prunevit.envs.game import GameError
from prunevit.envs.rewards import REWARDS
from prunevit.envs.token_prune import TokenPruneEnv

BATCH, IMAGES, STAGES = 3, 12, (0, 2)
MODES = {
    "leave": {"pruned_agents": "leave"},
    "stay": {},
    "batched": {"num_envs": BATCH},
}
# numbers that are actions, whatever they come in
FORMS = [int, bool, float, np.int64, np.float32, lambda number: np.array([number]), torch.tensor]
BATCH_FORMS = [
    torch.tensor,
    np.array,
    list,
    lambda numbers: torch.tensor(numbers).bool(),
    lambda numbers: np.array(numbers, np.float32),
]
NO_ACTIONS = [2, -1, 0.5, np.nan, None, "1", [], [0, 1], {}, torch.ones(2), 2**70]
NO_BATCH_ACTIONS = [
    1,
    None,
    "keep",
    [],
    [0, 1],
    [[0, 1, 1]],
    [0, 1, 2],
    [0, -1, 1],
    torch.full((BATCH,), 0.5),
    ["keep"] * BATCH,
    [2**70] * BATCH,
]
NO_MAPPINGS = [None, 1, "token_0", [0, 1], np.ones(16)]
NO_INDICES = [[IMAGES], [-1], [], [0.5], ["two"], [None], 3, "0", [[0]], [2**70], {0}, [True]]
NO_SEEDS = ["1", 1.5, -1, 2**70, [0], np.nan]
seeds = st.none() | st.integers(0, 2**63 - 1)


class Driver(RuleBasedStateMachine):
    """Calls an environment and knows who lives in it; what an illegal call might have broken is
    found where the episode is played again without it.
    """

    def __init__(self, make_env):
        super().__init__()
        self.make_env = make_env
        self.alive = None  # bool [B, N]; None before reset
        self.stage = None  # None where no step can be taken
        self.told = []  # what the episode's legal calls returned
        self.steps = []  # actions of its legal calls
        self.acting = []

    @initialize(mode=st.sampled_from(list(MODES)), reward=st.sampled_from(list(REWARDS)))
    def begin(self, mode, reward):
        if mode == "leave":
            reward = "markov-game"  # the others owe something to those who left
        self.kwargs = MODES[mode] | {"reward": reward}
        self.mode = mode
        self.env = self.make_env(**self.kwargs)
        self.names = self.env.possible_agents

    # --- legal calls ---

    @rule(seed=seeds, data=st.data())
    def reset(self, seed, data):
        options = None
        if data.draw(st.booleans()):
            count = self.env.num_envs or 1
            chosen = st.lists(st.integers(0, IMAGES - 1), min_size=count, max_size=count)
            options = {"indices": data.draw(chosen)}
        self.begin_episode(options, seed)
        if options is not None:
            assert self.indices.tolist() == options["indices"]

    def begin_episode(self, options, seed=None):
        observations, infos = self.env.reset(seed=seed, options=options)
        self.indices = np.asarray(infos["token_0"]["index"]).reshape(-1)
        self.alive = np.ones((len(self.indices), len(self.names)), bool)
        self.stage, self.acting = 0, list(self.names)
        self.told, self.steps = [(observations, {}, {}, {}, infos)], []
        self.check(*self.told[0], self.names)

    @precondition(lambda self: self.stage is not None)
    @rule(data=st.data())
    def step(self, data):
        patterns = st.integers(0, 2 ** len(self.names) - 1) | st.sampled_from([0, 2**16 - 1])
        bits = [data.draw(patterns) for _ in self.alive]
        keep = np.array([[bit >> i & 1 for i in range(len(self.names))] for bit in bits])
        form = data.draw(st.sampled_from(BATCH_FORMS if self.env.num_envs else FORMS))
        actions = {}
        gone = data.draw(st.booleans())  # what is said for them is ignored
        for agent in data.draw(st.permutations(self.names if gone else self.acting)):
            column = keep[:, self.names.index(agent)].tolist()
            actions[agent] = form(column if self.env.num_envs else column[0])
        told = self.env.step(actions)
        acted = self.acting
        self.alive &= keep.astype(bool)
        self.stage += 1
        over = self.stage == len(STAGES)
        if self.mode == "leave":
            self.acting = [agent for agent in acted if self.alive[0, self.names.index(agent)]]
            over = over or not self.acting
        if over:
            self.stage, self.acting = None, []
        self.told.append(told)
        self.steps.append(actions)
        self.check(*told, acted)
        if over:
            self.play_again()

    def check(self, observations, rewards, terminations, truncations, infos, acted):
        """PettingZoo's contract, for one call."""
        if self.steps:
            parts = (observations, rewards, terminations, truncations, infos)
        else:
            parts = (observations, infos)
        for part in parts:
            assert list(part) == acted
        batch = self.alive.shape[:1] if self.env.num_envs else ()
        for agent, observation in observations.items():
            space = self.env.observation_space(agent)
            assert observation.shape == space.shape
            assert space.contains(np.asarray(observation))
            lives = self.alive[:, self.names.index(agent)] & (self.stage is not None)
            seen = np.asarray(observation).reshape(len(lives), -1).any(1)
            assert seen.tolist() == lives.tolist()
            mask = np.asarray(infos[agent]["action_mask"]).reshape(-1, 2)
            assert mask.tolist() == [[1, int(alive)] for alive in lives]
        for agent in rewards:
            lives = self.alive[:, self.names.index(agent)]
            leaves = ~lives if self.mode == "leave" else np.zeros_like(lives)
            ended = np.broadcast_to(np.asarray(terminations[agent]), lives.shape)
            assert ended.tolist() == (leaves | (self.stage is None)).tolist()
            assert not np.asarray(truncations[agent]).any()
            assert np.isfinite(np.asarray(rewards[agent])).all()
            assert np.shape(rewards[agent]) == batch

    def play_again(self):
        """The legal calls alone, in an environment of their own, tell the same."""
        env = self.make_env(**self.kwargs)
        observations, infos = env.reset(options={"indices": self.indices})
        told = [(observations, {}, {}, {}, infos)]
        told += [env.step(actions) for actions in self.steps]
        assert not env.agents
        for ours, again in zip(self.told, told, strict=True):
            for mine, other in zip(ours[:4], again[:4], strict=True):
                assert mine.keys() == other.keys()
                for agent, value in mine.items():
                    np.testing.assert_array_equal(np.asarray(value), np.asarray(other[agent]))
        for ours, again in zip(self.told[-1][4].values(), told[-1][4].values(), strict=True):
            for name, value in ours.items():
                np.testing.assert_array_equal(np.asarray(value), np.asarray(again[name]))

    @precondition(lambda self: self.alive is not None)
    @rule()
    def look(self):
        state = self.env.state()
        batch = self.alive.shape[:1] if self.env.num_envs else ()
        assert state.shape[:-1] == batch
        assert self.env.state_space.contains(np.asarray(state))
        picture = self.env.render()
        assert picture.dtype == np.uint8
        assert picture.shape[0] == 32 * len(self.alive)

    @rule()
    def close(self):
        self.env.close()
        if self.stage is not None:
            with pytest.raises(GameError, match="call reset first"):
                self.env.step({agent: self.some_action() for agent in self.acting})
            self.begin_episode({"indices": self.indices})

    def some_action(self):
        return torch.ones(BATCH, dtype=torch.int64) if self.env.num_envs else 1

    # --- illegal ones ---

    @precondition(lambda self: self.alive is None)
    @rule()
    def look_too_early(self):
        for call in (self.env.state, self.env.render):
            with pytest.raises(GameError, match="before reset"):
                call()

    @precondition(lambda self: self.alive is None)
    @rule(actions=st.sampled_from([{}, {"token_0": 1}, None]))
    def step_too_early(self, actions):
        with pytest.raises(GameError, match="call reset first"):
            self.env.step(actions)

    @precondition(lambda self: self.alive is not None and self.stage is None)
    @rule(actions=st.sampled_from([{}, {"token_0": 1}, {"token_3": None}]))
    def step_after_the_end(self, actions):
        assert self.env.step(actions) == ({}, {}, {}, {}, {})

    @precondition(lambda self: self.stage is not None)
    @rule(data=st.data())
    def step_with_wrong_agents(self, data):
        actions = {agent: self.some_action() for agent in self.acting}
        fault = data.draw(st.sampled_from(["missing", "unknown", "none", "no mapping"]))
        if fault == "missing":
            del actions[data.draw(st.sampled_from(self.acting))]
        elif fault == "unknown":
            actions[data.draw(st.sampled_from(["critic", "token_16", "", None, 0]))] = 1
        elif fault == "no mapping":
            actions = data.draw(st.sampled_from(NO_MAPPINGS))
        else:
            actions = {}
        with pytest.raises(ValueError, match="actions must be"):
            self.env.step(actions)

    @precondition(lambda self: self.stage is not None)
    @rule(data=st.data())
    def step_with_a_wrong_action(self, data):
        wrong = data.draw(st.sampled_from(NO_BATCH_ACTIONS if self.env.num_envs else NO_ACTIONS))
        actions = {agent: self.some_action() for agent in self.acting}
        actions[data.draw(st.sampled_from(self.acting))] = wrong
        with pytest.raises(ValueError, match=r"^actions? .*(0 \(prune\)|integers)"):
            self.env.step(actions)

    @rule(indices=st.sampled_from(NO_INDICES))
    def reset_to_wrong_images(self, indices):
        with pytest.raises(ValueError, match="image indices"):
            self.env.reset(options={"indices": indices})

    @rule(seed=st.sampled_from(NO_SEEDS))
    def reset_with_a_wrong_seed(self, seed):
        with pytest.raises(ValueError, match="seed="):
            self.env.reset(seed=seed)

    @rule(options=st.sampled_from(["indices", [0], 3]))
    def reset_with_wrong_options(self, options):
        with pytest.raises(ValueError, match="options"):
            self.env.reset(options=options)

    @invariant()
    def knows_who_acts(self):
        if hasattr(self, "env"):
            assert self.env.agents == self.acting
            assert self.env.num_agents == len(self.acting)


def test_any_calls_in_any_order(vit, some_images):
    def make_env(**kwargs):
        given = {"backbone": vit, "dataset": some_images, "prune_before": STAGES, "device": "cpu"}
        return TokenPruneEnv(**given, **kwargs, render_mode="rgb_array")

    assert len(some_images) == IMAGES
    run_state_machine_as_test(
        lambda: Driver(make_env), settings=settings(max_examples=60, stateful_step_count=25)
    )
