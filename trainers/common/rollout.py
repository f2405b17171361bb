"""What passes from acting to learning: sampled actions, rollouts and batches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prunevit.envs.batched.protocol import Observations
from prunevit.trainers.common.distributed import Ranks

MASKED_LOGIT = -1e9


def masked_log_probs(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of the actions, nearly -inf for those not allowed.

    Args:
        logits: [R, A].
        mask: actions allowed, bool [R, A].

    Returns:
        [R, A].
    """
    return logits.masked_fill(~mask, MASKED_LOGIT).log_softmax(-1)


def sample(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """One action a row, drawn from its distribution (Gumbel-max): [R, A] -> int64 [R]."""
    uniform = torch.rand(log_probs.shape, generator=generator, device=log_probs.device)
    return (log_probs - (-uniform.clamp(min=1e-10).log()).log()).argmax(-1)


@dataclass
class Rollout:
    """T steps of B environments: one entry a step in each list, one row a living agent."""

    observations: list[Observations] = field(default_factory=list)
    action: list[Tensor] = field(default_factory=list)  # int64 [R]
    log_prob: list[Tensor] = field(default_factory=list)  # of the action taken, [R]
    value: list[Tensor] = field(default_factory=list)  # [B, N]
    next_value: list[Tensor] = field(default_factory=list)  # [B, N]
    next_alive: list[Tensor] = field(default_factory=list)  # bool [B, N]
    reward: list[Tensor] = field(default_factory=list)  # [B, N]
    ended: list[Tensor] = field(default_factory=list)  # bool [B]
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)  # of ended episodes


@dataclass(frozen=True)
class Batch:
    """What a loss is computed on, one row for each decision of a living agent.

    Attributes:
        observation: the distinct observations, [U, D_obs].
        seen: which of them each row saw, int64 [R].
        critic_input: [R, D]; empty without a critic.
        mask: bool [R, A].
        action: int64 [R].
        log_prob: of the action when it was taken, [R].
        value: the critic's estimate when it was taken, normalised as it was then, [R].
        returns: targets of the critic, [R].
        advantage: normalised, [R].
        count: divides sums over the rows to give means: R, or the mean R of many ranks.
    """

    observation: Tensor
    seen: Tensor
    critic_input: Tensor
    mask: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    returns: Tensor
    advantage: Tensor
    count: float

    def rows(self, index: Tensor, ranks: Ranks) -> Batch:
        """The rows at ``index``, int64 [R']."""
        apart = ("observation", "seen", "count")
        chosen = {name: part[index] for name, part in vars(self).items() if name not in apart}
        observation = self.observation[self.seen[index]]
        seen = torch.arange(len(observation), device=observation.device)
        count = ranks.mean_count(len(index))
        return Batch(observation=observation, seen=seen, count=count, **chosen)

    def micro_batches(self, count: int) -> list[Batch]:
        """Splits the rows into ``count`` batches (fewer where there are fewer rows) whose losses
        and gradients add up to those of the whole.
        """
        count = min(count, len(self.seen))
        if count < 2:
            return [self]
        names = [name for name in vars(self) if name not in ("observation", "count")]
        batches = []
        for piece in zip(*(getattr(self, name).tensor_split(count) for name in names), strict=True):
            rows = dict(zip(names, piece, strict=True))
            # rows are in the order of what they see
            first, last = (int(edge) for edge in rows["seen"].aminmax())
            rows["seen"] = rows["seen"] - first
            batches.append(replace(self, observation=self.observation[first : last + 1], **rows))
        return batches
