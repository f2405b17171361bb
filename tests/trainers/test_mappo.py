import copy
import dataclasses
import math

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from prunevit.agents.policies.actor_critic import Actor
from prunevit.envs.batched.protocol import BatchedEnv, Observations, Transition
from prunevit.trainers import mappo
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.rollout import OF_ROWS
from prunevit.trainers.common.value_norm import ValueNorm
from prunevit.trainers.mappo import (
    Batch,
    Learner,
    Trainer,
    collect_rollout,
    compute_advantages,
    learning_rate,
    normalise,
    policy_loss,
    sample,
    update,
    value_loss,
)

CRITICS = ("central", "local", "none")
SETTINGS = MappoConfig(
    rollouts_per_image=4, num_envs=8, iterations=12, hidden=(16,), critic="local",
    critic_hidden=(16,), epochs=4, minibatches=2, lr=0.02, lr_schedule="linear", gamma=1.0,
    gae_lambda=0.95, clip=0.2, entropy=0.001, value_weight=1.0, huber_delta=10.0,
    max_grad_norm=10.0,
)  # fmt: skip


def settings(**changes):
    return dataclasses.replace(SETTINGS, **changes)


# --- small environments ---


def see(*values, alive=None, mask=None):
    """What one environment shows: agent i observes [values[i], i]; the state is the sum."""
    first = torch.tensor([values], dtype=torch.float32)
    index = torch.arange(len(values), dtype=torch.float32)[None]
    living = torch.ones(first.shape, dtype=torch.bool) if alive is None else torch.tensor([alive])
    allowed = torch.ones(*first.shape, 2, dtype=torch.bool) if mask is None else mask
    return Observations(
        torch.stack([first, index], -1), first.sum(1, keepdim=True), living.bool(), allowed
    )


class Scripted:
    """One environment that goes through given transitions, whatever the actions."""

    num_envs = rollouts_per_start = 1
    observation_space, state_space, action_space = Box(-9, 9, (2,)), Box(-9, 9, (1,)), Discrete(2)
    episode_length = None
    device = torch.device("cpu")

    def __init__(self, start, *transitions):
        self.start, self.transitions, self.played = start, list(transitions), []
        self.num_agents = start.alive.shape[1]

    def reset(self, seed=None):
        return self.start

    def step(self, actions):
        self.played.append(actions)
        return self.transitions[len(self.played) - 1]

    def close(self):
        pass


def then(observed, *reward, ended=None, final=None):
    return Transition(
        observed,
        torch.tensor([reward], dtype=torch.float32),
        terminated=torch.tensor([ended == "terminated"]),
        truncated=torch.tensor([ended == "truncated"]),
        final=final,
    )


class ValueIsSeen(nn.Module):
    """A critic that makes the first number of an observation an agent's value."""

    def forward(self, observation, state, state_of):
        return observation[:, 0]


def make_learner(env, critic="local", **changes):
    torch.manual_seed(0)
    actor = Actor(env.observation_space.shape[0], int(env.action_space.n), (8,))
    return Learner(actor, env, settings(critic=critic, **changes))


def judged(env, **changes):
    """Decisions, advantages not normalised, of an episode in which values are seen."""
    learner = make_learner(env, **changes)
    learner.critic = ValueIsSeen()
    generator = torch.Generator().manual_seed(0)
    rollout, _ = collect_rollout(env, learner, env.reset(0), len(env.transitions), generator)
    return compute_advantages(rollout, learner, env)


@pytest.fixture
def raw_advantages(monkeypatch):
    monkeypatch.setattr(mappo, "normalise", lambda advantage, ranks: advantage)


# --- ends of episodes, by hand ---

HALVES = {"gamma": 0.5, "gae_lambda": 0.5}


def test_an_unfinished_episode_bootstraps_from_what_is_seen_next(raw_advantages):
    found = judged(Scripted(see(2), then(see(4), 1), then(see(6), 3)), **HALVES)
    second = 3 + 6 / 2 - 4
    assert found.advantage.tolist() == [1 + 4 / 2 - 2 + second / 4, second]
    assert found.value.tolist() == [2, 4]
    assert found.returns.tolist() == [found.advantage[0] + 2, found.advantage[1] + 4]


def test_a_termination_does_not_bootstrap(raw_advantages):
    # the 100 that is seen next begins another episode
    env = Scripted(see(2), then(see(4), 1), then(see(100), 3, ended="terminated"))
    assert judged(env, **HALVES).advantage.tolist() == [1 + 4 / 2 - 2 + (3 - 4) / 4, 3 - 4]


def test_a_truncation_bootstraps_from_the_final_observation(raw_advantages):
    env = Scripted(
        see(2),
        then(see(4), 1),
        then(see(100), 3, ended="truncated", final=see(20)),
        then(see(50), 7),
    )
    second = 3 + 20 / 2 - 4
    assert judged(env, **HALVES).advantage.tolist() == [
        1 + 4 / 2 - 2 + second / 4,
        second,
        7 + 50 / 2 - 100,
    ]


def test_who_is_gone_when_an_episode_is_truncated_does_not_bootstrap(raw_advantages):
    final = see(20, 30, alive=[0, 1])
    env = Scripted(see(2, 4), then(see(100, 100), 1, 3, ended="truncated", final=final))
    assert judged(env, **HALVES).advantage.tolist() == [1 - 2, 3 + 30 / 2 - 4]


def test_an_agent_that_dies_is_judged_by_what_it_is_still_paid(raw_advantages):
    dead = see(0, 6, alive=[0, 1])
    env = Scripted(see(2, 4), then(dead, 1, 3), then(see(9, 9), 8, 5, ended="terminated"))
    found = judged(env, **HALVES)
    assert found.advantage.tolist() == [1 + 8 / 2 - 2, 3 + 6 / 2 - 4 + (5 - 6) / 4, 5 - 6]
    assert found.returns.tolist() == [1 + 8 / 2, found.advantage[1] + 4, 5]


def test_without_a_critic_the_return_itself_is_compared(raw_advantages):
    env = Scripted(see(2), then(see(4), 1), then(see(6), 3, ended="terminated"))
    learner = make_learner(env, "none", **HALVES)
    rollout, _ = collect_rollout(env, learner, env.reset(0), 2, torch.Generator().manual_seed(0))
    assert compute_advantages(rollout, learner, env).advantage.tolist() == [1 + 3 / 2, 3]


# --- rollouts of one start, in which agents die ---


class Rollouts(Scripted):
    """Three environments of the same start that go through given transitions."""

    num_envs = rollouts_per_start = 3


def together(*observations):
    return Observations(
        *(torch.cat(parts) for parts in zip(*map(vars_of, observations), strict=True))
    )


def vars_of(observed):
    return observed.observation, observed.state, observed.alive, observed.action_mask


def with_deaths(alive):
    """Two steps; after the first of them a single agent is alive where ``alive`` says so."""
    start = together(see(2), see(2), see(2))
    values = [4, 5, 7]
    later = together(*(see(v, alive=[a]) for v, a in zip(values, alive, strict=True)))
    no, yes = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    first = Transition(later, torch.tensor([[1.0], [2.0], [3.0]]), no, no)
    return Rollouts(start, first, Transition(start, torch.tensor([[8.0], [6.0], [9.0]]), yes, no))


def test_by_default_a_wrong_critic_favours_neither_who_stays_nor_who_leaves(raw_advantages):
    env = Scripted(
        see(2, 2),
        then(see(50, 50, alive=[True, False]), 0, 0),
        then(see(0, 0), 10, 10, ended="terminated"),
    )
    defaults = MappoConfig()
    found = judged(env, gamma=defaults.gamma, gae_lambda=defaults.gae_lambda)
    assert found.advantage.tolist() == [10 - 2, 10 - 2, 10 - 50]


def test_rollouts_are_compared_where_the_agent_lives(raw_advantages):
    found = judged(with_deaths([1, 1, 0]), gamma=1.0, gae_lambda=1.0).advantage
    # the third is paid 9 without an action of its own, and nobody has valued it
    second = torch.tensor([8.0 - 4, 6 - 5])
    first = torch.tensor([1.0 + 8, 2 + 6, 3 + 9]) - 2
    expected = [(3 * x - first.sum()) / 2 for x in first]
    assert found[:3].tolist() == pytest.approx([float(x) for x in expected])
    assert found[3:].tolist() == [float(second[0] - second[1]), float(second[1] - second[0])]


def test_who_lives_in_one_rollout_alone_is_judged_by_the_critic_alone(raw_advantages):
    found = judged(with_deaths([0, 1, 0]), gamma=1.0, gae_lambda=1.0).advantage
    assert found[3:].tolist() == [6 - 5]


def test_without_a_critic_returns_of_the_dead_are_compared_too(raw_advantages):
    env = with_deaths([0, 1, 0])
    learner = make_learner(env, "none", gamma=1.0)
    rollout, _ = collect_rollout(env, learner, env.reset(0), 2, torch.Generator().manual_seed(0))
    assert compute_advantages(rollout, learner, env).advantage[3:].tolist() == [6 - (8 + 9) / 2]


# --- the dead ---


def with_dead(garbage, action=0):
    """Three agents; the second dies, and later the first."""

    def dirty(observed):
        observed.observation[~observed.alive] = garbage
        observed.action_mask[~observed.alive] = torch.tensor([action == 0, True])
        return observed

    return Scripted(
        see(1, 2, 3),
        then(dirty(see(4, 0, 5, alive=[1, 0, 1])), 1, 2, 3),
        then(dirty(see(0, 0, 6, alive=[0, 0, 1])), 4, 5, 6),
        then(see(7, 8, 9), 7, 8, 9, ended="terminated"),
    )


@pytest.mark.parametrize("critic", CRITICS)
def test_what_the_dead_see_changes_nothing(critic):
    outcomes = []
    for garbage in (0.0, 1e6):
        env = with_dead(garbage, action=int(garbage > 0))
        learner = make_learner(env, critic)
        generator = torch.Generator().manual_seed(1)
        rollout, _ = collect_rollout(env, learner, env.reset(0), 3, generator)
        decisions = compute_advantages(rollout, learner, env)
        losses = update(learner, decisions, generator)
        outcomes.append((decisions, losses, learner.state_dict(), env.played))
    (before, losses, weights, played), (after, *others) = outcomes
    for name, part in vars(before).items():
        if part is None:
            assert critic != "central"
            continue
        assert torch.equal(*map(torch.as_tensor, (part, getattr(after, name)))), name
    assert losses == others[0]
    assert all(torch.equal(weights[key], others[1][key]) for key in weights)
    assert all(map(torch.equal, played, others[2]))


def test_the_dead_are_out_of_losses_and_of_advantage_statistics():
    env = with_dead(0.0)
    decisions = judged(env)
    assert decisions.observation[decisions.seen, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert {len(getattr(decisions, name)) for name in OF_ROWS} == {6}
    assert float(decisions.advantage.mean()) == pytest.approx(0, abs=1e-6)
    assert float(decisions.advantage.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("critic", CRITICS)
def test_where_nobody_lives_losses_are_zero_and_nothing_is_learned(critic):
    nobody = see(0, 0, alive=[0, 0])
    env = Scripted(nobody, then(nobody, 1, 2), then(nobody, 3, 4, ended="terminated"))
    learner = make_learner(env, critic)
    before = {key: value.clone() for key, value in learner.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    rollout, _ = collect_rollout(env, learner, env.reset(0), 2, generator)
    losses = update(learner, compute_advantages(rollout, learner, env), generator)
    assert losses["policy_loss"] == losses["entropy"] == losses["grad_norm"] == 0
    assert all(map(math.isfinite, losses.values()))
    assert all(torch.equal(before[key], value) for key, value in learner.state_dict().items())


def test_a_single_decision_is_learned_from():
    env = Scripted(see(3), then(see(4), 1, ended="terminated"))
    generator = torch.Generator().manual_seed(0)
    learner = make_learner(env)
    rollout, _ = collect_rollout(env, learner, env.reset(0), 1, generator)
    assert all(
        map(
            math.isfinite,
            update(learner, compute_advantages(rollout, learner, env), generator).values(),
        )
    )


# --- action masks ---


def test_actions_that_are_not_allowed_are_never_sampled():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(5000, 6, generator=generator) < 0.4
    mask[:, 0] |= ~mask.any(1)
    logits = torch.randn(5000, 6, generator=generator) * 5 + ~mask * 30
    learner = make_learner(Scripted(see(0)))
    learner.actor = nn.Identity()
    log_probs = learner.log_probs(logits, torch.arange(5000), mask)
    chosen = sample(log_probs, generator)
    assert mask.gather(1, chosen[:, None]).all()
    assert (log_probs.exp()[~mask] == 0).all()
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(5000))


def test_samples_follow_the_distribution():
    share = torch.tensor([0.6, 0.3, 0.1, 0.0])
    log_probs = share.clamp(min=1e-30).log().expand(40_000, -1)
    chosen = sample(log_probs, torch.Generator().manual_seed(0))
    torch.testing.assert_close(chosen.bincount(minlength=4) / 40_000, share, atol=0.01, rtol=0)


def test_play_and_learning_see_the_same_masks():
    mask = torch.tensor([[[True, False], [False, True], [True, True]]])
    env = Scripted(see(1, 2, 3, mask=mask), then(see(4, 5, 6, mask=mask.flip(1)), 1, 2, 3))
    learner = make_learner(env)
    rollout, _ = collect_rollout(env, learner, env.reset(0), 1, torch.Generator().manual_seed(0))
    assert env.played[0][0, :2].tolist() == [0, 1]
    decisions = compute_advantages(rollout, learner, env)
    assert torch.equal(decisions.mask, mask[0])
    again = learner.log_probs(decisions.observation, decisions.seen, decisions.mask)
    assert torch.equal(again.gather(1, decisions.action[:, None])[:, 0], decisions.log_prob)
    assert decisions.log_prob[:2].tolist() == [0, 0]


class Shared(Observations):
    """Says what all see in the same state but once, and states that are alike but once."""

    def distinct(self):
        # sorted by the state first
        rows = torch.cat([self.state[self.alive.nonzero()[:, 0]], self.living()], dim=1)
        rows, seen = torch.unique(rows, dim=0, return_inverse=True)
        return rows[:, self.state.shape[1] :], seen

    def distinct_states(self):
        rows = torch.cat([self.state[self.alive.nonzero()[:, 0]], self.living()], dim=1)
        state = torch.unique(rows, dim=0)[:, : self.state.shape[1]]
        return torch.unique(state, dim=0, return_inverse=True)


@pytest.mark.parametrize("critic", ["central", "local"])
@pytest.mark.parametrize("minibatches", [1, 3])
def test_what_is_seen_by_many_is_learned_from_as_if_each_had_its_own(critic, minibatches):
    outcomes = []
    for kind in (Observations, Shared):
        trainer = make_trainer(4, critic=critic, minibatches=minibatches)
        observe = trainer.env.observe
        trainer.env.observe = lambda observe=observe, kind=kind: kind(**vars(observe()))
        outcomes.append(weights_after(trainer, 3))
    (records, weights), (other_records, others) = outcomes
    for record, other in zip(records, other_records, strict=True):
        assert record == pytest.approx(other, abs=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(value, others[key], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("critic", ["central", "none"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_parts_add_up_to_the_same_step(critic, minibatches, monkeypatch):
    """Where several see the same too; and no part has more to compute than its share."""
    most = []

    def loss_of(learner, batch, compute=mappo.loss_terms):
        most.append(max(len(batch.observation), len(batch.action)))
        return compute(learner, batch)

    monkeypatch.setattr(mappo, "loss_terms", loss_of)
    outcomes = []
    for accumulate in (1, 3, 1_000_000):
        trainer = make_trainer(4, critic=critic, minibatches=minibatches, accumulate=accumulate)
        observe = trainer.env.observe
        trainer.env.observe = lambda observe=observe: Shared(**vars(observe()))
        most.clear()
        outcomes.append((*weights_after(trainer, 2), max(most)))
    (records, weights, whole), *others = outcomes
    for (other_records, other_weights, largest), parts in zip(others, (3, whole), strict=True):
        assert largest <= -(-whole // parts)
        for record, other in zip(records, other_records, strict=True):
            assert record == pytest.approx(other, abs=1e-5)
        for key, value in weights.items():
            torch.testing.assert_close(value, other_weights[key], atol=1e-5, rtol=1e-4)


def test_parts_are_of_a_caches_size_by_default(monkeypatch):
    parts = []

    def loss_of(learner, batch, compute=mappo.loss_terms):
        parts.append(len(batch.action))
        return compute(learner, batch)

    monkeypatch.setattr(mappo, "loss_terms", loss_of)
    make_trainer(4).iterate()
    (whole,) = set(parts)
    # three numbers are observed
    half = whole * 3 * 4 // 2 // torch.get_num_threads()
    monkeypatch.setattr("prunevit.trainers.common.rollout.CACHED_BYTES", half)
    parts.clear()
    make_trainer(4).iterate()
    assert max(parts) == -(-whole // 2)
    assert sum(parts) % whole == 0


def test_minibatches_cover_every_decision_once():
    rows = decisions_of(observation=[[0.0], [1.0], [2.0]], seen=[2, 0, 1, 1, 0, 2, 2])
    rows = dataclasses.replace(rows, action=torch.arange(7))
    for parts, sizes in ((1, [7]), (3, [3, 3, 1]), (9, [1] * 7)):
        batches = list(mappo.minibatches(rows, parts, torch.Generator().manual_seed(0)))
        assert [len(batch.action) for batch in batches] == sizes
        action = torch.cat([batch.action for batch in batches])
        assert action.sort().values.tolist() == list(range(7))
        for batch in batches:
            shown = batch.observation[batch.seen, 0]
            assert torch.equal(shown, rows.observation[rows.seen[batch.action], 0])


# --- losses, by hand ---


def decisions_of(**parts):
    zero = torch.zeros(len(next(iter(reversed(parts.values())))))
    given = {name: torch.tensor(part) for name, part in parts.items()}
    fields = dict.fromkeys(("observation", *OF_ROWS), zero)
    return Batch(**fields | given | {"count": len(zero)})  # type: ignore[arg-type]


RATIOS = torch.tensor([1.5, 1.5, 0.5, 0.5])


def test_the_policy_loss_is_clipped_where_it_would_gain_more():
    log_prob = RATIOS.log().requires_grad_()
    batch = decisions_of(advantage=[1.0, -1.0, 1.0, -1.0])
    loss = policy_loss(log_prob, batch, clip=0.2)
    # of ratio * advantage and clipped ratio * advantage the lower one
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    loss.backward()
    assert log_prob.grad.tolist() == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0])


def test_the_ratio_is_to_the_policy_that_played():
    batch = decisions_of(advantage=[2.0], log_prob=[-1.0])
    loss = policy_loss(torch.tensor([-1.1]), batch, clip=0.2)
    assert loss.item() == pytest.approx(-2 * math.exp(-0.1))


def test_the_value_loss_is_the_larger_of_plain_and_clipped():
    value = torch.tensor([1.0, 0.1, -1.0], requires_grad=True)
    batch = decisions_of(value=[0.0, 0.0, 0.0], returns=[1.0, 1.0, 1.0])
    loss = value_loss(value, batch, ValueNorm(), clip=0.2, delta=10.0)
    # moved 1 towards the target: counts as 0.2; moved little: as it is; away from it: as it is
    assert loss.item() == pytest.approx((0.8**2 + 0.9**2 + 2**2) / 2 / 3)
    loss.backward()
    assert value.grad.tolist() == pytest.approx([0, -0.9 / 3, -2 / 3])


def test_the_value_loss_is_linear_beyond_delta():
    batch = decisions_of(value=[0.0, 0.0], returns=[3.0, 0.5])
    loss = value_loss(torch.zeros(2), batch, ValueNorm(), clip=0.2, delta=1.0)
    assert float(loss) == pytest.approx((1 * (3 - 0.5) + 0.5**2 / 2) / 2)


def test_the_critic_learns_returns_in_normalised_units():
    norm = ValueNorm()
    norm.update(torch.tensor([10.0, 30.0]))  # mean 20, standard deviation 10
    batch = decisions_of(value=[20.0], returns=[25.0])
    loss = value_loss(torch.tensor([0.1]), batch, norm, clip=math.inf, delta=10.0)
    assert float(loss) == pytest.approx((0.5 - 0.1) ** 2 / 2, rel=1e-4)


def test_normalised_advantages():
    assert normalise(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-1, 0, 1], abs=1e-4)
    assert normalise(torch.full((4,), 7.0)).tolist() == [0] * 4
    assert normalise(torch.tensor([7.0])).tolist() == [7]
    assert normalise(torch.empty(0)).tolist() == []


def test_values_are_in_units_of_returns_and_zero_for_the_dead():
    learner = make_learner(Scripted(see(1, 2)))
    learner.critic = ValueIsSeen()
    learner.value_norm.update(torch.tensor([10.0, 30.0]))
    values = learner.values(see(0.5, 7, alive=[1, 0]))
    torch.testing.assert_close(values, torch.tensor([[25.0, 0.0]]))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("critic", "inputs"), [("central", [5, 0, 8]), ("local", [5, 0])])
def test_what_the_critic_sees(critic, inputs, norm):
    learner = make_learner(Scripted(see(1, 2)), critic, critic_norm=norm)
    found = learner.values(see(5, 3, alive=[1, 0]))
    expected = learner.critic(torch.tensor([inputs], dtype=torch.float32)).detach()
    torch.testing.assert_close(found, torch.tensor([[expected.item(), 0.0]]))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_value_norm_takes_the_returns_of_each_step(minibatches, monkeypatch):
    taken = []
    trainer = make_trainer(4, minibatches=minibatches, epochs=3)
    norm = trainer.learner.value_norm
    monkeypatch.setattr(norm, "update", lambda returns, ranks: taken.append(returns))
    trainer.iterate()
    env = trainer.env
    assert len(taken) == 3 * minibatches
    rows = env.num_envs * env.num_agents * env.steps
    assert sum(map(len, taken)) == 3 * rows
    assert norm.decay == trainer.config.value_norm_decay == 0.99999


# --- the schedule ---


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0]), ("cosine", [1, 0.853553, 0.5, 0])],
)
def test_the_learning_rate_ends_where_it_should(schedule, shares):
    config = settings(lr=2.0, lr_schedule=schedule, iterations=40)
    rates = [learning_rate(config, iteration) for iteration in (0, 10, 20, 40)]
    assert rates == pytest.approx([2 * share for share in shares], abs=1e-6)


def test_the_optimizer_follows_the_schedule():
    trainer = make_trainer(iterations=4)
    logged = [trainer.iterate()["lr"] for _ in range(4)]
    assert logged == pytest.approx([0.02, 0.015, 0.01, 0.005])
    assert trainer.learner.optimizer.param_groups[0]["lr"] == logged[-1]


# --- it learns ---


class Guess:
    """In each of two steps each of two agents is shown which of three actions pays 1.

    At the end all in an environment are paid ``paid`` and ``luck`` times what their start is worth,
    too.
    """

    num_envs, num_agents, num_actions, steps = 16, 2, 3, 2
    observation_space, state_space, action_space = Box(0, 1, (3,)), Box(-9, 9, (1,)), Discrete(3)
    episode_length = steps
    device = torch.device("cpu")

    def __init__(self, rollouts_per_start, luck, paid):
        self.rollouts_per_start, self.luck, self.paid = rollouts_per_start, luck, paid

    def reset(self, seed=None):
        self.generator = torch.Generator().manual_seed(seed)
        starts = self.num_envs // self.rollouts_per_start
        times = self.rollouts_per_start
        self.worth = torch.randn(starts, generator=self.generator).repeat_interleave(times)
        self.right = torch.randint(
            3, (self.steps, starts, self.num_agents), generator=self.generator
        ).repeat_interleave(times, dim=1)
        self.step_index = 0
        return self.observe()

    def observe(self):
        right = self.right[min(self.step_index, self.steps - 1)]
        shown = nn.functional.one_hot(right, 3).float()
        alive = torch.ones(right.shape, dtype=torch.bool)
        return Observations(
            shown, self.worth[:, None], alive, torch.ones_like(shown, dtype=torch.bool)
        )

    def step(self, actions):
        reward = (actions == self.right[self.step_index]).float()
        self.step_index += 1
        over = torch.full((self.num_envs,), self.step_index == self.steps)
        reward = reward + over[:, None] * (self.paid + self.luck * self.worth[:, None])
        return Transition(self.observe(), reward, over, torch.zeros_like(over))

    def close(self):
        pass


OPTIMUM = 2.0


def make_trainer(rollouts_per_start=1, luck=0.0, paid=0.0, seed=0, **changes):
    env = Guess(rollouts_per_start, luck, paid)
    assert isinstance(env, BatchedEnv)
    torch.manual_seed(seed)
    actor = Actor(3, 3, (16,))
    return Trainer(env, actor, settings(seed=seed, **changes))


@pytest.mark.parametrize(
    ("critic", "rollouts"), [("central", 1), ("local", 1), ("none", 4), ("central", 4)]
)
def test_it_learns_a_game_of_fixed_length(critic, rollouts):
    trainer = make_trainer(rollouts, critic=critic)
    records = [trainer.iterate() for _ in range(SETTINGS.iterations)]
    assert records[0]["reward"] < 0.5 * OPTIMUM
    assert sum(record["reward"] for record in records[-3:]) / 3 > 0.95 * OPTIMUM
    assert trainer.iteration == SETTINGS.iterations


def test_it_learns_to_value():
    """A central critic sees what a start is worth."""
    trainer = make_trainer(luck=10.0, critic="central", epochs=10)
    for _ in range(SETTINGS.iterations):
        trainer.iterate()
    observed = trainer.env.reset(99)
    expected = OPTIMUM + 10 * trainer.env.worth
    found = trainer.learner.values(observed)
    distance = (found - expected[:, None]).abs().mean()
    assert distance < 0.5 * (expected - expected.mean()).abs().mean()


def test_the_critic_learns_from_the_first_iteration_on():
    trainer = make_trainer(paid=100.0, critic="central")
    before = [parameter.clone() for parameter in trainer.learner.critic.parameters()]
    trainer.iterate()
    assert not all(map(torch.equal, before, trainer.learner.critic.parameters()))


def test_rollouts_of_one_start_cancel_what_it_is_worth(raw_advantages):
    spreads = {}
    for rollouts in (1, 4):
        trainer = make_trainer(rollouts, luck=10.0, critic="none")
        env, learner = trainer.env, trainer.learner
        generator = torch.Generator().manual_seed(0)
        rollout, _ = collect_rollout(env, learner, env.reset(0), env.steps, generator)
        spreads[rollouts] = float(compute_advantages(rollout, learner, env).advantage.var())
    assert spreads[1] > 20
    assert spreads[4] < 2


def test_rollouts_are_all_it_needs_where_starts_differ():
    trainer = make_trainer(4, luck=10.0, critic="none")
    for _ in range(SETTINGS.iterations):
        trainer.iterate()
    observed = trainer.env.reset(99)
    chosen = trainer.learner.actor(observed.living()).argmax(-1)
    assert torch.equal(chosen, trainer.env.right[0].flatten())


@pytest.mark.parametrize("critic", CRITICS)
def test_what_an_iteration_logs(critic):
    record = make_trainer(4, critic=critic).iterate()
    expected = {"policy_loss", "entropy", "grad_norm", "kl", "reward", "lr"}
    assert expected | ({"value_loss"} if critic != "none" else set()) <= set(record)
    assert all(map(math.isfinite, record.values()))
    assert 0 < record["entropy"] <= math.log(3) + 1e-6


# --- seeds and state ---


def weights_after(trainer, iterations):
    records = [trainer.iterate() for _ in range(iterations)]
    return records, trainer.learner.state_dict()


def same(a, b):
    return a[0] == b[0] and all(torch.equal(a[1][key], b[1][key]) for key in a[1])


@pytest.mark.parametrize("critic", CRITICS)
def test_a_seed_is_a_run(critic):
    first, again, other = (
        weights_after(make_trainer(4, critic=critic, seed=seed), 3) for seed in (1, 1, 2)
    )
    assert same(first, again)
    assert not same(first, other)


def test_the_seed_draws_more_than_the_first_weights():
    def run(seed):
        trainer = make_trainer(seed=0)
        trainer.config = trainer.learner.config = settings(seed=seed)
        return weights_after(trainer, 1)

    assert same(run(1), run(1))
    assert not same(run(1), run(2))


def test_every_iteration_draws_anew():
    trainer = make_trainer(lr=1e-12)
    rewards = {trainer.iterate()["reward"] for _ in range(4)}
    assert len(rewards) > 1


def test_the_global_generator_does_not_matter():
    a, b = make_trainer(), make_trainer()
    torch.manual_seed(5)
    first = weights_after(a, 2)
    torch.manual_seed(6)
    assert same(first, weights_after(b, 2))


@pytest.mark.parametrize("critic", CRITICS)
def test_a_trainer_goes_on_from_its_state(critic):
    trainer, again = make_trainer(4, critic=critic), make_trainer(4, critic=critic)
    weights_after(trainer, 2)
    again.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert again.iteration == 2
    assert same(weights_after(trainer, 2), weights_after(again, 2))
