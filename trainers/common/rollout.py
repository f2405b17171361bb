"""What passes from acting to learning: sampled actions, rollouts and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from prunevit.envs.batched.protocol import Observations
from prunevit.trainers.common.distributed import Ranks

MASKED_LOGIT = -1e9
# With so many bytes of observations a thread, the actor's activations stay in a CPU's caches.
# Measured with the default actor: an update on 112,000 decisions takes 0.6 times as long in such
# micro-batches with one thread, 0.8 with two; on 30,000, which two threads take as one, no less.
CACHED_BYTES = 1 << 23
# what a batch holds for each decision
OF_ROWS = ("seen", "mask", "action", "log_prob", "value", "returns", "advantage")


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
        state: the distinct global states [S, D_state]; None where no critic sees them.
        state_of: which of them each distinct observation was made in, int64 [U]; None where
            neither a critic nor an actor whose agents communicate needs it.
        mask: bool [R, A].
        action: int64 [R].
        log_prob: of the action when it was taken, [R].
        value: the critic's estimate when it was taken, normalised as it was then, [R].
        returns: targets of the critic, [R].
        advantage: normalised, [R].
        count: divides sums over the rows to give means: R, or the mean R of many ranks.
        keeps_states_whole: whether ``micro_batches`` leaves all rows of a state together, since
            their agents communicate.
    """

    observation: Tensor
    seen: Tensor
    mask: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    returns: Tensor
    advantage: Tensor
    count: float
    state: Tensor | None = None
    state_of: Tensor | None = None
    keeps_states_whole: bool = False

    def rows(self, index: Tensor, ranks: Ranks) -> Batch:
        """The rows at ``index``, int64 [R']."""
        seen = self.seen[index]
        rows = {name: getattr(self, name)[index] for name in OF_ROWS}
        return replace(
            self,
            observation=self.observation[seen],
            state_of=None if self.state_of is None else self.state_of[seen],
            count=ranks.mean_count(len(index)),
            **rows | {"seen": torch.arange(len(seen), device=seen.device)},
        )

    def micro_batches(self, count: int | None) -> list[Batch]:
        """Splits the rows into ``count`` batches (fewer where there are fewer rows) whose losses
        and gradients add up to those of the whole. With None they fit a CPU's caches, and on
        another device there is one.
        """
        if count is None:
            on_host = self.action.device.type == "cpu"
            size = len(self.action) * self.observation[:1].nbytes
            count = size // (CACHED_BYTES * torch.get_num_threads()) if on_host else 1
        count = min(count, len(self.seen))
        if count < 2:
            return [self]
        batches = []
        cuts = self._between_states(count) if self.keeps_states_whole else count
        pieces = (getattr(self, name).tensor_split(cuts) for name in OF_ROWS)
        for piece in zip(*pieces, strict=True):
            rows = dict(zip(OF_ROWS, piece, strict=True))
            # rows are in the order of what they see, and that in the order of states
            used, rows["seen"] = _span(rows["seen"])
            rows["observation"] = self.observation[used]
            if self.state_of is not None:
                used, rows["state_of"] = _span(self.state_of[used])
                if self.state is not None:
                    rows["state"] = self.state[used]
            batches.append(replace(self, **rows))
        return batches

    def _between_states(self, count: int) -> list[int]:
        """Where to cut the rows into ``count`` parts or fewer, about as large as each other, each
        with all rows of its states.
        """
        assert self.state_of is not None
        state = self.state_of[self.seen].cpu().numpy()
        allowed = np.flatnonzero(np.diff(state)) + 1
        ideal = np.arange(1, count) * len(state) / count
        # beyond the last place where they can be cut they aren't
        place = np.unique(np.searchsorted(allowed, ideal))
        return allowed[place[place < len(allowed)]].tolist()


def join(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several tensors of rows, each with an index into them, as one tensor and one index."""
    offsets = accumulate((len(rows) for rows, _ in parts), initial=0)
    index = [index + first for (_, index), first in zip(parts, offsets, strict=False)]
    return torch.cat([rows for rows, _ in parts]), torch.cat(index)


def _span(index: Tensor) -> tuple[slice, Tensor]:
    """The shortest slice that holds all that ``index`` points to, and the index into it."""
    first, last = (int(edge) for edge in index.aminmax())
    return slice(first, last + 1), index - first
