"""The learning rate and the batches of a training on labelled images."""

import pytest
import torch

from prunevit.trainers.common.classification import batches, learning_rate


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(2.0, 0.1, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(2.0, 0.1, 0, 1) == 2.0


def test_batches_are_whole_and_shuffled_by_the_seed():
    seen = list(batches(605, 100, seed=1))
    assert [len(part) for part in seen] == [100] * 6
    order = torch.cat(seen)
    assert len(order.unique()) == 600
    assert not torch.equal(order, order.sort().values)
    again = torch.cat(list(batches(605, 100, seed=1)))
    other = torch.cat(list(batches(605, 100, seed=2)))
    assert torch.equal(order, again)
    assert not torch.equal(order, other)
