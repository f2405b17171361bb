from __future__ import annotations

import dataclasses
import functools
import importlib

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Sequence, Space
from pettingzoo import ParallelEnv
from pettingzoo.utils.conversions import parallel_to_aec
from pettingzoo.utils.wrappers import OrderEnforcingWrapper

from prunevit.envs.batched.make_pettingzoo import make_pettingzoo
from prunevit.envs.batched.pettingzoo import BatchedPettingZoo
from prunevit.envs.batched.protocol import BatchedEnv, Observations, Transition

TERMINATED, TRUNCATED, BOTH = (True, False), (False, True), (True, True)


class Scripted(ParallelEnv):
    """Agent i sees [i + 1, t], is paid 10 * (i + 1) + t, and ends at step t as ``ends[t]`` says."""

    agent_names = ("a", "b", "c")
    start = 0

    def __init__(self, ends):
        self.ends = ends
        self.possible_agents = list(self.agent_names)
        self.seeds, self.joints = [], []

    def observation_space(self, agent):
        return Box(-1, 100, (2,), dtype=np.float32)

    def action_space(self, agent):
        return Discrete(4, start=self.start)

    def observation(self, agent):
        return np.array([self.possible_agents.index(agent) + 1, self.t], dtype=np.float32)

    def reward(self, agent):
        return 10 * (self.possible_agents.index(agent) + 1) + self.t

    def infos(self, agents):
        return {agent: {} for agent in agents}

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self.t = 0
        self.agents = self.possible_agents[:]
        return {agent: self.observation(agent) for agent in self.agents}, self.infos(self.agents)

    def step(self, actions):
        assert set(actions) == set(self.agents)
        self.joints.append(actions)
        self.t += 1
        acting, ends = self.agents, self.ends.get(self.t, {})
        self.agents = [agent for agent in acting if agent not in ends]
        return (
            {agent: self.observation(agent) for agent in acting},
            {agent: self.reward(agent) for agent in acting},
            {agent: ends.get(agent, (False, False))[0] for agent in acting},
            {agent: ends.get(agent, (False, False))[1] for agent in acting},
            self.infos(acting),
        )


def all_end(t, how):
    return {t: dict.fromkeys(Scripted.agent_names, how)}


def batched(*scripts, of=Scripted, agent_ids=False, **options):
    """One environment for each script, in that order."""
    made = iter([of(script) for script in scripts])
    return BatchedPettingZoo(
        lambda: next(made), num_envs=len(scripts), agent_ids=agent_ids, **options
    )


def zeros(env):
    return torch.zeros(env.num_envs, env.num_agents, dtype=torch.int64)


def steps(env, count):
    """The last of ``count`` transitions."""
    for _ in range(count):
        transition = env.step(zeros(env))
    return transition


# --- what is shown


def test_reset_shows_every_agent_with_its_id():
    env = batched({}, {}, agent_ids=True)
    seen = env.reset(seed=0)
    assert isinstance(env, BatchedEnv)
    assert (env.num_envs, env.num_agents, env.action_space) == (2, 3, Discrete(4))
    assert (env.episode_length, env.rollouts_per_start) == (None, 1)
    one = [[1, 0, 1, 0, 0], [2, 0, 0, 1, 0], [3, 0, 0, 0, 1]]
    assert seen.observation.tolist() == [one, one]
    assert seen.observation.dtype == seen.state.dtype == torch.float32
    assert seen.state.tolist() == [[1, 0, 2, 0, 3, 0]] * 2
    assert seen.alive.tolist() == [[True] * 3] * 2
    assert seen.action_mask.tolist() == [[[True] * 4] * 3] * 2
    assert env.observation_space == Box(-np.inf, np.inf, (5,), dtype=np.float32)
    assert env.state_space == Box(-np.inf, np.inf, (6,), dtype=np.float32)


def test_agent_ids_can_be_left_out():
    env = batched({}, agent_ids=False)
    assert env.reset(seed=0).observation.tolist() == [[[1, 0], [2, 0], [3, 0]]]
    assert env.observation_space.shape == (2,)


class WithState(Scripted):
    state_space = Box(0, 100, (2, 2), dtype=np.float32)

    def state(self):
        return np.array([[self.t, 7], [len(self.agents), 9]], dtype=np.float32)


def test_without_state_nobody_is_asked_for_one():
    class Secretive(WithState):
        def state(self):
            raise AssertionError

    for of in (Secretive, Scripted):
        env = batched(all_end(1, TRUNCATED), of=of, with_state=False)
        assert env.state_space.shape == (0,)
        assert env.reset(seed=0).state.shape == (1, 0)
        assert env.step(zeros(env)).final.state.shape == (1, 0)


def test_state_is_the_environments_own_where_it_has_one():
    env = batched(all_end(1, TRUNCATED), of=WithState)
    assert env.reset(seed=0).state.tolist() == [[0, 7, 3, 9]]
    assert env.state_space.shape == (4,)
    transition = env.step(zeros(env))
    assert transition.final.state.tolist() == [[1, 7, 0, 9]]
    assert transition.observations.state.tolist() == [[0, 7, 3, 9]]


class Structured(Scripted):
    def observation_space(self, agent):
        pixels = Box(0, 255, (2, 1), dtype=np.uint8)
        return Dict({"kind": Discrete(3), "pixels": pixels, "action_mask": MultiBinary(4)})

    def observation(self, agent):
        kind = self.possible_agents.index(agent)
        mask = np.array([0, 1, kind == 2, 0], dtype=np.int8)
        return {"kind": kind, "pixels": np.array([[9], [self.t]], np.uint8), "action_mask": mask}


def test_dict_observations_are_flattened_without_their_mask():
    env = batched({}, of=Structured)
    seen = env.reset(seed=0)
    assert seen.observation.tolist() == [[[1, 0, 0, 9, 0], [0, 1, 0, 9, 0], [0, 0, 1, 9, 0]]]
    only, both = [False, True, False, False], [False, True, True, False]
    assert seen.action_mask.tolist() == [[only, only, both]]
    assert env.step(zeros(env) + 1).observations.action_mask.tolist() == [[only, only, both]]


class Wrapped(Scripted):
    """PettingZoo's convention: the observation proper beside the mask."""

    def observation_space(self, agent):
        seen = Box(0, 9, (2,), dtype=np.float32)
        return Dict({"observation": seen, "action_mask": MultiBinary(4)})

    def observation(self, agent):
        return {"observation": super().observation(agent), "action_mask": np.array([0, 0, 1, 0])}


def test_observation_beside_its_mask():
    seen = batched({}, of=Wrapped).reset(seed=0)
    assert seen.observation.tolist() == [[[1, 0], [2, 0], [3, 0]]]
    assert seen.action_mask.tolist() == [[[False, False, True, False]] * 3]


class MaskedByInfo(Scripted):
    mask = (0, 1, 1, 0)

    def infos(self, agents):
        return {agent: {"action_mask": np.array(self.mask)} for agent in agents if agent != "b"}


def test_masks_in_infos():
    env = batched({}, of=MaskedByInfo)
    expected = [[False, True, True, False], [True] * 4, [False, True, True, False]]
    assert env.reset(seed=0).action_mask.tolist() == [expected]
    assert env.step(torch.tensor([[1, 3, 2]])).observations.action_mask.tolist() == [expected]


def test_values_are_not_cast_to_the_dtype_of_their_space():
    class Whole(Scripted):
        def observation_space(self, agent):
            return Box(0, 9, (2,), dtype=np.int64)

        def observation(self, agent):
            return [0.5, 2]

    assert batched({}, of=Whole).reset(seed=0).observation.tolist() == [[[0.5, 2]] * 3]


# --- deaths and ends


def test_an_agent_that_ended_is_paid_once_more_and_then_gone():
    env = batched({1: {"b": TERMINATED}})
    env.reset(seed=0)
    first = env.step(zeros(env))
    assert first.reward.tolist() == [[11, 21, 31]]
    for transition, t in ((first, 1), (env.step(torch.tensor([[3, 99, 2]])), 2)):
        assert transition.observations.observation.tolist() == [[[1, t], [0, 0], [3, t]]]
        assert transition.observations.state.tolist() == [[1, t, 0, 0, 3, t]]
        assert transition.observations.alive.tolist() == [[True, False, True]]
        assert transition.observations.action_mask[0, 1].tolist() == [True, False, False, False]
        assert transition.observations.action_mask[0, 0].tolist() == [True] * 4
        assert transition.terminated.tolist() == transition.truncated.tolist() == [False]
        assert transition.final is None
    assert transition.reward.tolist() == [[12, 0, 32]]
    assert env._envs[0].joints == [{"a": 0, "b": 0, "c": 0}, {"a": 3, "c": 2}]


def test_actions_begin_where_the_space_does():
    class Shifted(Scripted):
        start = 5

    env = batched({}, of=Shifted)
    env.reset(seed=0)
    env.step(torch.tensor([[0, 1, 3]]))
    assert env.action_space == Discrete(4)
    assert env._envs[0].joints == [{"a": 5, "b": 6, "c": 8}]


def test_termination_resets_and_leaves_nothing_to_bootstrap():
    env = batched(all_end(2, TERMINATED))
    env.reset(seed=0)
    assert steps(env, 1).terminated.tolist() == [False]
    end = env.step(zeros(env))
    assert (end.terminated.tolist(), end.truncated.tolist(), end.final) == ([True], [False], None)
    assert end.reward.tolist() == [[12, 22, 32]]
    assert end.observations.observation.tolist() == [[[1, 0], [2, 0], [3, 0]]]
    assert end.observations.alive.all()


def test_truncation_hands_out_what_was_seen_last():
    env = batched({1: {"a": TERMINATED}, 2: {"b": TRUNCATED, "c": TRUNCATED}})
    env.reset(seed=0)
    end = steps(env, 2)
    assert (end.terminated.tolist(), end.truncated.tolist()) == ([False], [True])
    assert end.final.alive.tolist() == [[False, True, True]]
    assert end.final.observation.tolist() == [[[0, 0], [2, 2], [3, 2]]]
    assert end.final.state.tolist() == [[0, 0, 2, 2, 3, 2]]
    assert end.observations.observation.tolist() == [[[1, 0], [2, 0], [3, 0]]]
    assert end.observations.alive.tolist() == [[True] * 3]


@pytest.mark.parametrize("how", [TERMINATED, BOTH])
def test_who_terminates_in_the_step_of_the_truncation_bootstraps_nothing(how):
    env = batched({1: {"a": how, "b": TRUNCATED, "c": how}})
    env.reset(seed=0)
    end = env.step(zeros(env))
    assert (end.terminated.tolist(), end.truncated.tolist()) == ([False], [True])
    assert end.final.alive.tolist() == [[False, True, False]]
    assert end.final.observation.tolist() == [[[0, 0], [2, 1], [0, 0]]]
    assert end.reward.tolist() == [[11, 21, 31]]


def test_both_flags_of_all_agents_are_a_termination():
    env = batched(all_end(1, BOTH))
    env.reset(seed=0)
    end = env.step(zeros(env))
    assert (end.terminated.tolist(), end.truncated.tolist(), end.final) == ([True], [False], None)


def test_an_agent_truncated_alone_is_gone_and_the_last_ones_decide():
    env = batched({1: {"a": TRUNCATED}, 2: {"b": TERMINATED, "c": TERMINATED}})
    env.reset(seed=0)
    assert steps(env, 1).observations.alive.tolist() == [[False, True, True]]
    end = env.step(zeros(env))
    assert (end.terminated.tolist(), end.truncated.tolist(), end.final) == ([True], [False], None)


def test_each_environment_resets_by_itself_and_reports_its_episode():
    env = batched(all_end(1, TERMINATED), all_end(2, TRUNCATED), {1: {"a": TERMINATED}})
    env.reset(seed=0)
    first = env.step(zeros(env))
    assert first.terminated.tolist() == [True, False, False]
    assert first.truncated.tolist() == [False] * 3
    assert first.metrics["episode_return"][0] == 21
    assert first.metrics["episode_length"][0] == 1
    assert all(values[1:].isnan().all() for values in first.metrics.values())
    second = env.step(zeros(env))
    assert second.terminated.tolist() == [True, False, False]
    assert second.truncated.tolist() == [False, True, False]
    assert second.observations.observation[:, 1].tolist() == [[2, 0], [2, 0], [2, 2]]
    assert second.metrics["episode_return"][:2].tolist() == [21, 43]
    assert second.metrics["episode_length"][:2].tolist() == [1, 2]
    assert second.metrics["episode_return"][2].isnan()
    assert second.final.alive.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert second.final.observation[1].tolist() == [[1, 2], [2, 2], [3, 2]]
    assert second.final.action_mask.any(-1).all()
    assert steps(env, 2).metrics["episode_return"][:2].tolist() == [21, 43]


def test_the_last_masks_may_allow_nothing():
    class NothingLeft(MaskedByInfo):
        def infos(self, agents):
            return {a: {"action_mask": np.full(4, len(self.agents) > 0)} for a in agents}

    env = batched(all_end(1, TRUNCATED), of=NothingLeft)
    env.reset(seed=0)
    assert env.step(zeros(env)).final.action_mask.all()


def test_agents_may_join_later():
    class Joining(Scripted):
        def reset(self, seed=None, options=None):
            super().reset(seed)
            self.agents = ["a"]
            return {"a": self.observation("a")}, {}

        def step(self, actions):
            observations, *others = super().step(actions)
            self.agents = [*self.agents, "c"]
            observations["c"] = self.observation("c")
            return observations, *others

    env = batched({}, of=Joining)
    assert env.reset(seed=0).alive.tolist() == [[True, False, False]]
    joined = env.step(zeros(env))
    assert joined.observations.alive.tolist() == [[True, False, True]]
    assert joined.observations.observation.tolist() == [[[1, 1], [0, 0], [3, 1]]]
    assert joined.reward.tolist() == [[11, 0, 0]]


GAMMA, LAMBDA = 0.9, 0.8


class RandomEnds(Scripted):
    """Agents die at random times; the survivors terminate and are cut off at random at step 6."""

    def reset(self, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.ends = {t: {} for t in range(1, 7)}
        for agent in self.possible_agents:
            t = int(self.rng.integers(1, 10))
            last = [TERMINATED, TRUNCATED, BOTH][self.rng.integers(3)]
            self.ends[min(t, 6)][agent] = TERMINATED if t < 6 else last
        observations, infos = super().reset(seed)
        self.paths = [*getattr(self, "paths", []), {a: [] for a in self.agents}]
        self.seen = observations
        return observations, infos

    def step(self, actions):
        before = self.seen
        self.seen, rewards, terminations, truncations, infos = super().step(actions)
        for agent in actions:
            following = 0 if terminations[agent] else value(self.seen[agent])
            self.paths[-1][agent].append((value(before[agent]), rewards[agent], following))
        return self.seen, rewards, terminations, truncations, infos


def value(observation):
    return observation[..., 0] * 3.0 - observation[..., 1]


def test_advantages_of_every_single_agent_follow_from_the_transitions():
    """GAE computed as the class documents equals GAE along each agent's own path."""
    count = 60
    env = batched({}, {}, of=RandomEnds)
    seen, history = env.reset(seed=3), []
    for _ in range(count):
        transition = env.step(zeros(env))
        history.append((seen, transition))
        seen = transition.observations

    advantages, running = [], torch.zeros(2, 3)
    for before, after in reversed(history):
        ended = (after.terminated | after.truncated)[:, None]
        following = value(after.observations.observation) * after.observations.alive * ~ended
        if after.final is not None:
            at_end = value(after.final.observation) * after.final.alive
            following = torch.where(after.truncated[:, None], at_end, following)
        delta = after.reward + GAMMA * following - value(before.observation)
        running = delta + GAMMA * LAMBDA * running * (after.observations.alive & ~ended)
        advantages.append(torch.where(before.alive, running, torch.nan))
    advantages.reverse()

    kinds = set()
    for row, single in enumerate(env._envs):
        t = 0
        for paths in single.paths[:-1]:  # the last one is not over
            for i, path in enumerate(paths.values()):
                running, expected = 0.0, []
                for before, reward, following in reversed(path):
                    running = reward + GAMMA * following - before + GAMMA * LAMBDA * running
                    expected.insert(0, running)
                got = [float(advantages[t + k][row, i]) for k in range(len(path))]
                assert got == pytest.approx(expected, rel=1e-5)
            t += max(map(len, paths.values()))
        kinds |= {(bool(after.terminated[row]), bool(after.truncated[row])) for _, after in history}
    assert kinds == {(False, False), TERMINATED, TRUNCATED}
    assert any(
        after.final is not None and 0 < int(after.final.alive[row].sum()) < 3
        for _, after in history
        for row in range(2)
    )


# --- seeds and memory


def values_of(seen: Observations | Transition) -> dict[str, torch.Tensor]:
    flat = {}
    for field in dataclasses.fields(seen):
        part = getattr(seen, field.name)
        if isinstance(part, Observations):
            flat |= {f"{field.name}.{name}": v for name, v in values_of(part).items()}
        elif isinstance(part, torch.Tensor):
            flat[field.name] = part
        elif part is not None:
            flat |= part
    return flat


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


real_games = pytest.mark.parametrize(
    "name", ["walk", pytest.param("mpe2.simple_spread_v3", marks=pytest.mark.integration("mpe2"))]
)


def play(env, seed, count):
    generator = torch.Generator().manual_seed(1)
    run = [values_of(env.reset(seed=seed))]
    for _ in range(count):
        actions = torch.randint(
            env.action_space.n, (env.num_envs, env.num_agents), generator=generator
        )
        run.append(values_of(env.step(actions)))
    return run


@real_games
def test_runs_repeat_value_by_value_over_automatic_resets(name, walk):
    make = make_pettingzoo(name, max_cycles=5)
    env = BatchedPettingZoo(make, 3)
    first, again = play(env, 7, 23), play(env, 7, 23)
    elsewhere, other_seed = play(BatchedPettingZoo(make, 3), 7, 23), play(env, 8, 23)
    assert sum(bool(step["truncated"].all()) for step in first[1:]) == 4
    for one, two, three in zip(first, again, elsewhere, strict=True):
        assert_same(one, two)
        assert_same(one, three)
    starts = [first[t]["observation" if t == 0 else "observations.observation"] for t in (0, 5, 10)]
    starts.append(other_seed[0]["observation"])
    rows = torch.cat(starts).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows) == 12  # every episode begins differently


@real_games
def test_copies_equal_environments_stepped_by_hand(name, walk):
    made, make_one = [], make_pettingzoo(name, max_cycles=4)

    def make():
        env = make_one()
        reset, env.seeds = env.reset, []
        env.reset = lambda seed: (env.seeds.append(seed), reset(seed=seed))[1]
        made.append(env)
        return env

    env = BatchedPettingZoo(make, num_envs=2, agent_ids=False)
    seen, generator = env.reset(seed=0), torch.Generator().manual_seed(0)
    singles = [make_one() for _ in range(2)]
    for t in range(9):
        actions = torch.randint(env.action_space.n, (2, 3), generator=generator)
        transition = None if t == 0 else env.step(actions)
        for row, single in enumerate(singles):
            if t == 0:
                shown, _ = single.reset(seed=made[row].seeds[0])
            else:
                joint = {a: int(actions[row, i]) for i, a in enumerate(single.agents)}
                shown, rewards, _, truncations, _ = single.step(joint)
                assert transition.reward[row].tolist() == pytest.approx(list(rewards.values()))
                assert transition.truncated[row] == all(truncations.values())
                if not single.agents:
                    last = torch.tensor(np.stack(list(shown.values())))
                    assert torch.equal(transition.final.observation[row], last)
                    shown, _ = single.reset(seed=made[row].seeds[t // 4])
            now = (seen if transition is None else transition.observations).observation[row]
            assert torch.equal(now, torch.tensor(np.stack(list(shown.values()))))
    assert transition.truncated.all()


def seeds_of(env):
    return [single.seeds for single in env._envs]


def test_every_episode_has_its_own_seed():
    def run(*resets):
        env = batched(all_end(1, TERMINATED), all_end(2, TERMINATED))
        for seed in resets:
            env.reset(seed=seed)
            steps(env, 2)
        return seeds_of(env)

    once = run(5)
    assert [len(seeds) for seeds in once] == [3, 2]
    assert len({seed for seeds in once for seed in seeds}) == 5
    assert all(isinstance(s, int) and 0 <= s < 2**31 for seeds in once for s in seeds)
    assert run(5) == once
    assert run(6) != once
    assert run(5, 5) == [seeds * 2 for seeds in once]
    continued = run(5, None)
    assert continued == run(5, None)
    assert [len(set(seeds)) for seeds in continued] == [6, 4]
    assert run(None) != run(None)


def test_tensors_handed_out_are_never_overwritten_and_never_read_again():
    env = batched(all_end(2, TRUNCATED), {1: {"a": TERMINATED}}, of=WithState)
    handed, kept = [], []
    for t in range(6):
        part = values_of(env.step(zeros(env)) if t else env.reset(seed=0))
        handed.append(part)
        kept.append({name: tensor.clone() for name, tensor in part.items()})
    for part, before in zip(handed, kept, strict=True):
        assert_same(part, before)

    seen = env.reset(seed=0)
    for tensor in values_of(seen).values():
        tensor.zero_()
    assert env.step(zeros(env)).observations.alive.tolist() == [[True] * 3, [False, True, True]]


# --- refusals


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (Box(0, 1, (3,)), Discrete(4), r"'a' and 'c'.*\(2,\).*\(3,\).*2 and 3 values"),
        (Box(0, 1, (2,)), Discrete(5), r"'a' and 'c'.*Discrete\(4\) and Discrete\(5\)"),
        (Box(0, 1, (2,)), Discrete(4, start=1), r"'a' and 'c'.*Discrete\(4, start=1\)"),
        (Box(0, 1, (2,)), Box(0, 1, (2,)), r"'c' has the action space Box.*only Discrete"),
        (Sequence(Box(0, 1)), Discrete(4), r"'c' has the space Sequence.*fixed size"),
        (Space((2,)), Discrete(4), r"'c' has the space .*fixed size"),
    ],
)
def test_unlike_agents_are_refused(observation, action, message):
    class Unlike(Scripted):
        def observation_space(self, agent):
            return observation if agent == "c" else super().observation_space(agent)

        def action_space(self, agent):
            return action if agent == "c" else super().action_space(agent)

    with pytest.raises(ValueError, match=message):
        batched({}, of=Unlike)


def test_observations_of_one_size_are_alike_whatever_their_shape():
    class Shaped(Scripted):
        def observation_space(self, agent):
            return Box(0, 9, (1, 2) if agent == "c" else (2,))

        def observation(self, agent):
            return super().observation(agent).reshape(self.observation_space(agent).shape)

    assert batched({}, of=Shaped).reset(seed=0).observation[0, 2].tolist() == [3, 0]


def test_what_make_env_makes_is_checked(walk):
    class Fewer(Scripted):
        agent_names = ("a", "b")

    class Nobody(Scripted):
        agent_names = ()

    def factory(*envs):
        return functools.partial(next, iter(envs))

    one = Scripted({})
    with pytest.raises(ValueError, match=r"num_envs must be at least 1, got 0"):
        BatchedPettingZoo(lambda: one, 0)
    with pytest.raises(ValueError, match=r"the same environment twice"):
        BatchedPettingZoo(lambda: one, 2)
    with pytest.raises(ValueError, match=r"(?s)unlike environments.*'a', 'b', 'c'.*number 1"):
        BatchedPettingZoo(factory(one, Fewer({})), 2)
    with pytest.raises(ValueError, match=r"no possible_agents"):
        BatchedPettingZoo(factory(Nobody({})), 1)
    aec = OrderEnforcingWrapper(parallel_to_aec(make_pettingzoo("walk")()))
    with pytest.raises(TypeError, match=r"ParallelEnv, got OrderEnforcingWrapper.*aec_to_parallel"):
        BatchedPettingZoo(lambda: aec, 1)


def test_step_needs_a_reset():
    env = batched({})
    with pytest.raises(RuntimeError, match="step before reset"):
        env.step(zeros(env))
    env.reset(seed=0)
    env.step(zeros(env))
    env.close()
    with pytest.raises(RuntimeError, match="step before reset"):
        env.step(zeros(env))


def test_close_closes_every_environment():
    closed = []

    class Closing(Scripted):
        def close(self):
            closed.append(self)

    env = batched({}, {}, of=Closing)
    env.close()
    assert closed == env._envs


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (torch.zeros(1, 3), r"int64 \[1, 3\].*float32 \[1, 3\]"),
        (torch.zeros(1, 3, dtype=torch.int32), r"int64 \[1, 3\].*int32 \[1, 3\]"),
        (torch.zeros(3, dtype=torch.int64), r"int64 \[1, 3\].*int64 \[3\]"),
        (torch.zeros(1, 2, dtype=torch.int64), r"int64 \[1, 3\].*int64 \[1, 2\]"),
        (torch.tensor([[1, 4, 1]]), r"'b' in environment 0 can't take action 4; of actions 0 to 3"),
        (torch.tensor([[1, -1, 1]]), r"'b' in environment 0 can't take action -1"),
        (torch.tensor([[1, 0, 3]]), r"'c' in environment 0 can't take action 3.*allows \[1, 2\]"),
    ],
)
def test_wrong_actions_change_nothing(actions, message):
    env = batched({}, of=MaskedByInfo)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(actions)
    assert env._envs[0].joints == []
    assert env.step(torch.tensor([[1, 0, 2]])).reward.tolist() == [[11, 21, 31]]


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("what", ["reward", "observation", "state"])
def test_values_must_be_finite(what, bad):
    class Broken(WithState):
        def reward(self, agent):
            broken = what == "reward" and agent == "b"
            return bad if broken else super().reward(agent)

        def observation(self, agent):
            broken = what == "observation" and agent == "b" and self.t == 1
            return np.array([0, bad]) if broken else super().observation(agent)

        def state(self):
            return super().state() * (bad if what == "state" and self.t == 1 else 1)

    whose = "state of environment 1" if what == "state" else f"{what} of agent 'b' in environment 1"
    made = iter([WithState({}), Broken({})])
    env = BatchedPettingZoo(lambda: next(made), num_envs=2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=rf"the {whose} is {bad}"):
        env.step(zeros(env))
    with pytest.raises(RuntimeError, match="step before reset"):
        env.step(zeros(env))


def test_what_was_seen_last_must_be_finite():
    class Broken(Scripted):
        def observation(self, agent):
            return super().observation(agent) / (1 - self.t)

    env = batched(all_end(1, TRUNCATED), of=Broken)
    env.reset(seed=0)
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match=r"agent 'a'.*is inf at 0"):
        env.step(zeros(env))


@pytest.mark.parametrize(
    ("kind", "observed", "message"),
    [
        (Scripted, np.zeros(3), r"does not fit Box.*its shape is \(3,\)"),
        (Scripted, np.zeros(1), r"does not fit Box.*its shape is \(1,\)"),
        (Scripted, "seen", r"does not fit Box.*could not convert"),
        (Scripted, {}, r"does not fit Box.*its shape is \(\)"),
        (Wrapped, {"observation": np.zeros((2, 1))}, r"does not fit Box.*its shape is \(2, 1\)"),
        (Structured, {"kind": 1}, r"does not fit Dict.*KeyError\('pixels'\)"),
        (Structured, {"kind": 3, "pixels": np.zeros(2)}, r"does not fit Dict.*IndexError"),
        (Structured, {"kind": 1, "pixels": np.zeros(3)}, r"does not fit Dict.*its shape is \(6,\)"),
    ],
)
def test_observations_must_fit_their_space(kind, observed, message):
    class Misfit(kind):
        def observation(self, agent):
            return observed

    with pytest.raises(ValueError, match=rf"agent 'a' in environment 0 {message}"):
        batched({}, of=Misfit).reset(seed=0)


def test_states_must_fit_their_space():
    class Endless(WithState):
        state_space = Sequence(Box(0, 1))

    class Misfit(WithState):
        def state(self):
            return np.zeros(4)

    with pytest.raises(ValueError, match=r"the state has the space Sequence.*fixed size"):
        batched({}, of=Endless)
    with pytest.raises(ValueError, match=r"the state of environment 0 does not fit Box.*\(4,\)"):
        batched({}, of=Misfit).reset(seed=0)


@pytest.mark.parametrize("mask", [(0, 0, 0, 0), (1, 1, 1), ((1, 1, 1, 1),)])
def test_masks_must_fit_and_allow_something(mask):
    class Misfit(MaskedByInfo):
        pass

    Misfit.mask = mask
    with pytest.raises(ValueError, match=r"mask of agent 'a' in environment 0.*one of 4 actions"):
        batched({}, of=Misfit).reset(seed=0)


def test_agents_have_one_life():
    class Revives(Scripted):
        def step(self, actions):
            result = super().step(actions)
            if self.t == 3:
                self.agents = [*self.agents, "b"]
            return result

    env = batched({1: {"b": TERMINATED}}, of=Revives)
    env.reset(seed=0)
    steps(env, 2)
    with pytest.raises(RuntimeError, match=r"environment 0 brought back agents \['b'\]"):
        env.step(zeros(env))
    assert env.reset(seed=0).alive.all()


def test_environments_must_keep_their_agents_straight():
    class NeverBack(Scripted):
        def reset(self, seed=None, options=None):
            observations, infos = super().reset(seed)
            self.agents = [] if len(self.seeds) > 1 else self.agents
            return observations, infos

    class Lingers(Scripted):
        def step(self, actions):
            result = super().step(actions)
            self.agents = self.possible_agents[:]
            return result

    class Vanishes(Scripted):
        def step(self, actions):
            result = super().step(actions)
            self.agents = self.agents[:-1]
            return result

    class Stranger(Scripted):
        def step(self, actions):
            result = super().step(actions)
            self.agents = [*self.agents, "d"]
            return result

    for kind, message in [
        (NeverBack, "environment 0 has no agents after reset"),
        (Lingers, "agent 'a' of environment 0 terminated or was truncated but is still"),
        (Vanishes, "agent 'c' of environment 0 was neither terminated nor truncated"),
        (Stranger, r"environment 0 has agents \['d'\] that are not among"),
    ]:
        ends = all_end(1, TERMINATED) if kind is not Vanishes else {}
        env = batched(ends, of=kind)
        env.reset(seed=0)
        with pytest.raises(RuntimeError, match=message):
            env.step(zeros(env))


@pytest.mark.parametrize(
    ("position", "what"),
    [(0, "observation"), (1, "reward"), (2, "termination"), (3, "truncation")],
)
def test_missing_entries_are_named(position, what):
    class Forgets(Scripted):
        def step(self, actions):
            result = super().step(actions)
            del result[position]["b"]
            return result

    env = batched({}, of=Forgets)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=f"environment 0 gave no {what} for agent 'b'"):
        env.step(zeros(env))


# --- environments by name


def test_environments_are_found_by_name(walk, tmp_path, monkeypatch):
    make = make_pettingzoo("walk", N=2, max_cycles=3)
    one, other = make(), make()
    assert one is not other
    assert one.possible_agents == ["agent_0", "agent_1"]
    (tmp_path / "games_of_mine.py").write_text("def chess(size):\n    return ('chess', size)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert make_pettingzoo("games_of_mine:chess", size=8)() == ("chess", 8)
    with pytest.raises(ValueError, match=r"'games_of_mine' has no callable 'parallel_env'"):
        make_pettingzoo("games_of_mine")
    with pytest.raises(ValueError, match=r"'games_of_mine' has no callable 'go'"):
        make_pettingzoo("games_of_mine:go")


@pytest.mark.parametrize(
    ("name", "missing", "advice"),
    [
        ("mpe2.simple_spread_v3", "mpe2", r"pip install -e '\.\[mpe2\]'"),
        ("mpe2.simple_spread_v3", "pygame", r"pip install -e '\.\[mpe2\]'"),
        ("pettingzoo.butterfly.pistonball_v6", "pygame", r"pip install 'pettingzoo\[butterfly\]'"),
        ("nowhere.simple_v1", "nowhere", r"needs module 'nowhere'.*install what provides"),
    ],
)
def test_a_missing_package_says_what_to_install(name, missing, advice, monkeypatch):
    def not_there(module):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", not_there)
    with pytest.raises(ModuleNotFoundError, match=advice):
        make_pettingzoo(name)


def test_an_unknown_environment_says_which_there_are(tmp_path, monkeypatch):
    (tmp_path / "some_games").mkdir()
    for name in ("__init__", "chess_v3"):
        (tmp_path / "some_games" / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"some_games has .*chess_v3"):
        make_pettingzoo("some_games.chess_v99")
    with pytest.raises(ModuleNotFoundError, match=r"needs module .some_games.nothing.*_games has "):
        make_pettingzoo("some_games.nothing.chess_v1")
    for malformed in ("", ":env", "mpe2/simple", "..mpe2"):
        with pytest.raises(ValueError, match="is no module name"):
            make_pettingzoo(malformed)
