import pytest
import torch

from prunevit.trainers.common.value_norm import ValueNorm


def statistics(norm):
    return [float(part) for part in norm.statistics()]


def test_before_the_first_update_nothing_is_changed():
    norm = ValueNorm()
    values = torch.tensor([-3.0, 0.0, 5.0])
    assert statistics(norm) == [0, 1]
    assert torch.equal(norm.normalise(values), values)
    assert torch.equal(norm.denormalise(values), values)


def test_one_update_is_debiased():
    norm = ValueNorm(decay=0.99)
    norm.update(torch.tensor([3.0, 5.0]))
    assert statistics(norm) == pytest.approx([4, 1], rel=1e-4)


def test_two_updates_by_hand():
    norm = ValueNorm(decay=0.5)
    norm.update(torch.tensor([0.0, 2.0]))  # mean 1, mean square 2
    norm.update(torch.tensor([4.0]))  # mean 4, mean square 16; weighs twice as much
    mean, square = (1 + 2 * 4) / 3, (2 + 2 * 16) / 3
    assert statistics(norm) == pytest.approx([mean, (square - mean**2) ** 0.5])


def test_by_default_updates_weigh_nearly_the_same_and_the_variance_is_at_least_a_hundredth():
    norm = ValueNorm()
    norm.update(torch.tensor([0.0]))
    assert statistics(norm) == pytest.approx([0, 0.1])
    norm.update(torch.tensor([1.0]))
    assert statistics(norm) == pytest.approx([0.5, 0.5], rel=1e-4)


def test_statistics_stay_exact_through_a_long_training():
    """As the running averages of MAPPO's authors do, in float32."""
    norm, returns = ValueNorm(), torch.tensor([-530.0, -470.0])
    for _ in range(20_000):
        norm.update(returns)
    assert statistics(norm) == pytest.approx([-500, 30], rel=0.02)


def test_a_batch_weighs_the_same_whatever_its_size():
    one, many = ValueNorm(), ValueNorm()
    for norm, size in ((one, 1), (many, 50)):
        norm.update(torch.full((size,), 1.0))
        norm.update(torch.full((2 * size,), 3.0))
    assert statistics(one) == pytest.approx(statistics(many))


def test_what_is_normalised_has_zero_mean_and_unit_spread():
    norm, returns = ValueNorm(), torch.randn(1000) * 7 + 40
    norm.update(returns)
    normed = norm.normalise(returns)
    assert float(normed.mean()) == pytest.approx(0, abs=1e-3)
    assert float(normed.std()) == pytest.approx(1, abs=1e-2)


def test_there_and_back():
    norm, values = ValueNorm(), torch.linspace(-9, 9, 7)
    norm.update(torch.tensor([100.0, 130.0]))
    torch.testing.assert_close(norm.denormalise(norm.normalise(values)), values)


def test_returns_that_are_all_the_same_do_not_divide_by_zero():
    norm = ValueNorm(floor=0.04)
    norm.update(torch.full((10,), 3.0))
    assert statistics(norm) == pytest.approx([3, 0.2])


def test_no_returns_change_nothing():
    norm = ValueNorm()
    norm.update(torch.tensor([1.0, 2.0]))
    before = statistics(norm)
    norm.update(torch.empty(0))
    assert statistics(norm) == before


def test_the_state_dict_carries_the_statistics():
    norm, again = ValueNorm(), ValueNorm()
    norm.update(torch.tensor([1.0, 2.0]))
    again.load_state_dict(norm.state_dict())
    for other in (norm, again):
        other.update(torch.tensor([5.0, 9.0]))
    assert statistics(again) == statistics(norm)


def test_updates_leave_no_graph_behind():
    norm = ValueNorm()
    norm.update(torch.ones(3, requires_grad=True) * 2)
    assert not any(buffer.requires_grad for buffer in norm.buffers())
