"""What agents are paid. Each formula stands in its class's docstring."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Accuracy = Literal["correct", "confidence", "agreement", "kl"]
# of prices and worths: what is made of them stays finite in float32, its square too
LARGEST_NUMBER = 1e12


@dataclass(frozen=True)
class StageFacts:
    """What happened at a stage.

    Attributes:
        stage: 0-based.
        alive: bool [B, N], before the decision.
        kept: bool [B, N], the survivors.
        cost: what the blocks up to the next stage cost, as a share of the dense model's compute,
            float32 [B].
        token_cost: one token's part of it, float32 [B].
        alpha: the episode's price of compute, float32 [B].
    """

    stage: int
    alive: Tensor
    kept: Tensor
    cost: Tensor
    token_cost: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class EndFacts:
    """How an episode ended.

    Attributes:
        kept: bool [T, B, N], the survivors of every stage.
        logits: [B, classes].
        dense_logits: the unpruned model's, where ``Reward.needs_dense``.
        labels: int64 [B].
    """

    kept: Tensor
    logits: Tensor
    dense_logits: Tensor | None
    labels: Tensor


class Reward(Protocol):
    """How a game pays its agents.

    Attributes:
        alpha: price of the dense model's compute, unless an episode has its own.
        needs_dense: whether ``terminal`` reads the dense model's logits, which cost a forward pass.
        pays_pruned: whether an agent is paid after the decision that pruned it. Such a reward needs
            agents that stay to the end: one that left would never receive what its decision cost
            or earned.
    """

    @property
    def alpha(self) -> float: ...

    @property
    def needs_dense(self) -> bool: ...

    @property
    def pays_pruned(self) -> bool: ...

    def stage(self, facts: StageFacts) -> Tensor:
        """Paid at once for a decision, float32 [B, N]."""
        ...

    def terminal(self, facts: EndFacts) -> Tensor:
        """Paid at the end, on top of the last stage's, float32 [B, N]."""
        ...


def accuracy_of(kind: Accuracy, facts: EndFacts) -> Tensor:
    """How right the pruned model is, float32 [B].

    - correct: 1 where the prediction is the label, else 0.
    - confidence: probability given to the label.
    - agreement: 1 where the prediction is the dense model's, else 0.
    - kl: -KL(dense || pruned), at most 0.
    """
    if kind == "correct":
        return (facts.logits.argmax(1) == facts.labels).float()
    if kind == "confidence":
        return facts.logits.float().softmax(1).gather(1, facts.labels[:, None]).squeeze(1)
    if facts.dense_logits is None:
        raise ValueError(f"accuracy {kind!r} needs the dense model's logits")
    if kind == "agreement":
        return (facts.logits.argmax(1) == facts.dense_logits.argmax(1)).float()
    pruned, dense = facts.logits.float().log_softmax(1), facts.dense_logits.float().log_softmax(1)
    return -F.kl_div(pruned, dense, reduction="none", log_target=True).sum(1)


def _check(accuracy: str, **numbers: float) -> None:
    if accuracy not in get_args(Accuracy):
        raise ValueError(
            f"unknown accuracy {accuracy!r}: choose from {', '.join(get_args(Accuracy))}"
        )
    for name, value in numbers.items():
        if not 0 <= value <= LARGEST_NUMBER:
            raise ValueError(f"{name}={value} must be a number from 0 to {LARGEST_NUMBER:g}")


@dataclass(frozen=True)
class TeamReward:
    """One scalar for all agents, living or pruned: beta * accuracy - alpha * share of the dense
    compute.

    The compute is paid stage by stage as it is spent, the accuracy at the end. What runs before the
    first stage is nobody's choice and costs nothing. To stay near the dense model's answer (kl)
    asks for no label, and held-out images lost less by it than by confidence in the true class, of
    which a model is too sure on images that it was trained on.
    """

    alpha: float = 0.08
    beta: float = 1.0
    accuracy: Accuracy = "kl"
    pays_pruned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.accuracy, alpha=self.alpha, beta=self.beta)

    @property
    def needs_dense(self) -> bool:
        return self.accuracy in ("agreement", "kl")

    def stage(self, facts: StageFacts) -> Tensor:
        return (-facts.alpha * facts.cost)[:, None].expand(facts.kept.shape)

    def terminal(self, facts: EndFacts) -> Tensor:
        pay = self.beta * accuracy_of(self.accuracy, facts)
        return pay[:, None].expand(facts.kept.shape[1:])


@dataclass(frozen=True)
class MarkovGameReward:
    """The idea of RL4EViT (arXiv 2503.23459): survivors compete for a pot that a right answer
    fills.

    A kept token pays alpha * its share of the dense compute for the blocks up to the next stage; at
    the end the n survivors of an image get beta * accuracy / n each. The paper's own equations were
    not at hand: this is its idea as far as its text and its released code show it.
    """

    alpha: float = 1.0
    beta: float = 1.0
    accuracy: Accuracy = "correct"
    pays_pruned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self.accuracy, alpha=self.alpha, beta=self.beta)

    @property
    def needs_dense(self) -> bool:
        return self.accuracy in ("agreement", "kl")

    def stage(self, facts: StageFacts) -> Tensor:
        return -(facts.alpha * facts.token_cost)[:, None] * facts.kept

    def terminal(self, facts: EndFacts) -> Tensor:
        survivors = facts.kept[-1]
        share = survivors / survivors.sum(1, keepdim=True).clamp(min=1)
        return self.beta * accuracy_of(self.accuracy, facts)[:, None] * share


@dataclass(frozen=True)
class ReleasedCodeReward:
    """What the released RL4EViT code computes.

    At stage j, with d = (survivors / N) - keep**(j + 1): -exp(d) to each kept token where d > 0,
    else -exp(-d) to each
    token pruned there. For every stage j that a token survived, it also gets pot / n_j where the
    final answer is right (n_j survivors): known at the end only, so paid there.
    """

    pot: float = 24.0
    keep: float = 0.7
    alpha: float = 0.0

    def __post_init__(self) -> None:
        _check("correct", pot=self.pot, alpha=self.alpha)
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be a ratio in (0, 1]")

    needs_dense = False
    pays_pruned: ClassVar[bool] = True

    def stage(self, facts: StageFacts) -> Tensor:
        excess = facts.kept.float().mean(1, keepdim=True) - self.keep ** (facts.stage + 1)
        blamed = torch.where(excess > 0, facts.kept, facts.alive & ~facts.kept)
        return -excess.abs().exp() * blamed

    def terminal(self, facts: EndFacts) -> Tensor:
        shares = facts.kept / facts.kept.sum(2, keepdim=True).clamp(min=1)  # [T, B, N]
        return self.pot * accuracy_of("correct", facts)[:, None] * shares.sum(0)


REWARDS: dict[str, type] = {
    "team": TeamReward,
    "markov-game": MarkovGameReward,
    "released-code": ReleasedCodeReward,
}


def make_reward(name: str, **options: Any) -> Reward:
    """A reward by name; ``options`` that the reward doesn't have are refused.

    Raises:
        ValueError: the name or an option is unknown.
    """
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}: choose from {', '.join(REWARDS)}")
    known = {field.name for field in fields(REWARDS[name])}
    surplus = sorted(set(options) - known)
    if surplus:
        raise ValueError(
            f"reward {name!r} has no {', '.join(surplus)}: it takes {', '.join(sorted(known))}"
        )
    return REWARDS[name](**options)
