import math

import pytest
import torch

from prunevit.trainers.common.gae import gae, leave_one_out

NAN = math.nan  # stands where nothing may be read


def column(*values):
    """One agent of one environment: [T, 1, 1]."""
    return torch.tensor(values).view(-1, 1, 1)


def advantages(
    reward, value, next_value, alive=(1, 1, 1), next_alive=(1, 1, 1), ended=(0, 0, 0), lam=0.5
):
    """Of one agent, with a discount of 0.5."""
    flags = [column(*part).bool() for part in (alive, next_alive, ended)]
    columns = [column(*part) for part in (reward, value, next_value)]
    return gae(*columns, *flags[:2], flags[2][..., 0], gamma=0.5, lam=lam).flatten().tolist()


PAID, VALUE = (1.0, 2.0, 4.0), (2.0, 4.0, 6.0)


# --- one agent, by hand ---


def test_an_episode_that_goes_on_bootstraps_from_what_comes_next():
    # delta = r + V'/2 - V = 1 + 2 - 2, 2 + 3 - 4, 4 + 5 - 6; a step back weighs 1/4
    assert advantages(PAID, VALUE, (4.0, 6.0, 10.0)) == [1 + (1 + 3 / 4) / 4, 1 + 3 / 4, 3]


def test_an_iteration_may_have_a_single_step():
    flags = {"alive": (1,), "next_alive": (1,), "ended": (0,)}
    assert advantages((1.0,), (2.0,), (4.0,), **flags) == [1 + 4 / 2 - 2]


def test_lambda_0_is_one_step_and_lambda_1_the_whole_return():
    next_value = (4.0, 6.0, 10.0)
    assert advantages(PAID, VALUE, next_value, lam=0.0) == [1, 1, 3]
    last = 4 + 10 / 2
    returns = [1 + (2 + last / 2) / 2, 2 + last / 2, last]
    expected = [paid - value for paid, value in zip(returns, VALUE, strict=True)]
    assert advantages(PAID, VALUE, next_value, lam=1.0) == expected


def test_a_terminated_episode_does_not_bootstrap():
    found = advantages(PAID, VALUE, (4.0, 6.0, NAN), next_alive=(1, 1, 0), ended=(0, 0, 1))
    assert found == [1 + (1 - 2 / 4) / 4, 1 - 2 / 4, 4 - 6]


def test_a_termination_on_the_way_cuts_off_what_comes_after():
    found = advantages(PAID, VALUE, (4.0, NAN, 10.0), next_alive=(1, 0, 1), ended=(0, 1, 0))
    assert found == [1 - 2 / 4, 2 - 4, 3]


def test_a_truncated_episode_bootstraps_from_its_own_last_observation():
    # V'[1] = 20 is of the last observation; the 6 that the next episode begins with is not used
    found = advantages(PAID, VALUE, (4.0, 20.0, 10.0), ended=(0, 1, 0))
    assert found == [1 + 8 / 4, 2 + 10 - 4, 3]


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_what_the_dead_are_paid_belongs_to_their_last_decision(lam):
    found = advantages(
        (1.0, 4.0, 8.0),
        (2.0, NAN, NAN),
        (NAN, NAN, NAN),
        alive=(1, 0, 0),
        next_alive=(0, 0, 0),
        ended=(0, 0, 1),
        lam=lam,
    )
    assert found == [1 + 4 / 2 + 8 / 4 - 2, 4 + 8 / 2, 8]


def test_pay_after_death_passes_through_the_decisions_before_with_lambda():
    found = advantages(
        (1.0, 2.0, 8.0),
        (2.0, 4.0, NAN),
        (4.0, NAN, NAN),
        alive=(1, 1, 0),
        next_alive=(1, 0, 0),
        ended=(0, 0, 1),
    )
    last = 2 + 8 / 2 - 4
    assert found == [1 + 4 / 2 - 2 + last / 4, last, 8]


def test_the_dead_are_not_paid_by_the_next_episode():
    found = advantages(
        (1.0, 0.0, 16.0),
        (2.0, NAN, 6.0),
        (NAN, NAN, 10.0),
        alive=(1, 0, 1),
        next_alive=(0, 0, 1),
        ended=(0, 1, 0),
    )
    assert found == [1 - 2, 0, 16 + 5 - 6]


# --- many agents, by a slow loop ---


def slow_advantage(t, reward, value, next_value, alive, next_alive, ended, gamma, lam):
    """Of the decision at ``t`` of one agent, from the definition: a sum over what follows."""
    total, weight = 0.0, 1.0
    for k in range(t, len(reward)):
        total += weight * (reward[k] - (value[k] if alive[k] else 0.0))
        if next_alive[k]:
            total += weight * gamma * next_value[k]
        if ended[k]:
            break
        weight *= gamma * (lam if next_alive[k] else 1.0)
    return total


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_it_equals_a_loop_over_agents(lam):
    steps, batch, agents, gamma = 12, 6, 4, 0.9
    draw = torch.Generator().manual_seed(0)

    def chance(*shape, of):
        return torch.rand(shape, generator=draw) < of

    ended, truncated = chance(steps, batch, of=0.2), chance(steps, batch, of=0.5)
    alive = torch.ones(steps, batch, agents, dtype=torch.bool)
    next_alive = torch.empty_like(alive)
    for t in range(steps):
        survives = alive[t] & chance(batch, agents, of=0.8)
        next_alive[t] = survives & ~(ended[t] & ~truncated[t])[:, None]
        if t + 1 < steps:
            alive[t + 1] = survives | ended[t][:, None]
    assert {*alive.unique().tolist()} == {*next_alive.unique().tolist()} == {True, False}
    reward, value, next_value = (
        torch.randn(steps, batch, agents, generator=draw) for _ in range(3)
    )
    value[~alive] = next_value[~next_alive] = NAN
    found = gae(reward, value, next_value, alive, next_alive, ended, gamma, lam)
    for b in range(batch):
        for n in range(agents):
            parts = [x[:, b, n].tolist() for x in (reward, value, next_value, alive, next_alive)]
            for t in range(steps):
                expected = slow_advantage(t, *parts, ended[:, b].tolist(), gamma, lam)
                assert float(found[t, b, n]) == pytest.approx(expected, abs=1e-5)


# --- rollouts of one start ---


def test_leave_one_out_by_hand():
    of_three = torch.tensor([1.0, 2.0, 6.0, 10.0, 10.0, 10.0]).view(1, 6, 1)
    everywhere = torch.ones_like(of_three, dtype=torch.bool)
    found = leave_one_out(of_three, everywhere, 3)
    assert found.flatten().tolist() == [-3, -1.5, 4.5, 0, 0, 0]


def test_leave_one_out_compares_what_it_may():
    of_four = torch.tensor([1.0, 2.0, 6.0, 1e6, 3.0, 1e6, 1e6, 1e6]).view(1, 8, 1)
    found = leave_one_out(of_four, of_four < 1e6, 4).flatten().tolist()
    assert found[:3] == [-3, -1.5, 4.5]
    assert found[4] == 3  # no other is there


@pytest.mark.parametrize("group", [2, 4])
def test_leave_one_out_subtracts_the_mean_of_the_others(group):
    steps, batch, agents = 3, 8, 5
    advantage = torch.randn(steps, batch, agents, dtype=torch.float64)
    found = leave_one_out(advantage, torch.ones_like(advantage, dtype=torch.bool), group)
    for b in range(batch):
        first = b // group * group
        others = [other for other in range(first, first + group) if other != b]
        expected = advantage[:, b] - advantage[:, others].mean(1)
        torch.testing.assert_close(found[:, b], expected)
    sums = found.view(steps, -1, group, agents).sum(2)
    torch.testing.assert_close(sums, torch.zeros_like(sums))


def test_leave_one_out_forgets_how_good_the_start_was():
    advantage = torch.randn(2, 6, 3, dtype=torch.float64)
    start = torch.tensor([100.0, 100.0, 100.0, -7.0, -7.0, -7.0])[None, :, None]
    everywhere = torch.ones_like(advantage, dtype=torch.bool)
    torch.testing.assert_close(
        leave_one_out(advantage + start, everywhere, 3), leave_one_out(advantage, everywhere, 3)
    )
