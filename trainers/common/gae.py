"""Advantages: GAE over agents that come and go, and the comparison of rollouts that share a
start.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    alive: Tensor,
    next_alive: Tensor,
    ended: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) for agents that may leave
    before the end.

    What an agent is still paid after it left belongs to its last decision: it is summed up,
    discounted, without bootstrapping from a value that nobody learned.

    Args:
        reward: float32 [T, B, N].
        value: V of what each agent saw before it acted, [T, B, N]; read where ``alive``.
        next_value: V of what followed: of the last observation where the episode was truncated,
            zero where it terminated, [T, B, N]; read where ``next_alive``.
        alive: bool [T, B, N].
        next_alive: bool [T, B, N], alive in what followed.
        ended: bool [T, B], the episode ended in this step; what comes after belongs to another.
        gamma: discount.
        lam: lambda; 1 makes returns of it.

    Returns:
        float32 [T, B, N]; for an agent that is not alive, the reward it still gets.
    """
    zero = torch.zeros_like(value)
    delta = (
        reward + gamma * torch.where(next_alive, next_value, zero) - torch.where(alive, value, zero)
    )
    carry = torch.where(next_alive, lam, 1.0) * ~ended[..., None]
    advantage = torch.empty_like(reward)
    following = torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        following = delta[t] + gamma * carry[t] * following
        advantage[t] = following
    return advantage


def leave_one_out(advantage: Tensor, compared: Tensor, group: int) -> Tensor:
    """Subtracts the mean of the other rollouts of the same start, agent by agent and step by step
    (RLOO).

    How good the start was drops out; what the agents did in this rollout stays. Where no other
    rollout can be compared, nothing is subtracted.

    Args:
        advantage: [T, B, N]; each ``group`` consecutive environments share their start.
        compared: which of them the mean is taken over, bool [T, B, N].
        group: at least 2.

    Returns:
        [T, B, N].
    """
    shape = advantage.shape
    grouped = advantage.unflatten(1, (-1, group))  # [T, B / group, group, N]
    counted = compared.unflatten(1, (-1, group))
    summed = torch.where(counted, grouped, 0.0)
    others = counted.sum(2, keepdim=True) - counted.int()
    mean = (summed.sum(2, keepdim=True) - summed) / others.clamp(min=1)
    return (grouped - mean).reshape(shape)
