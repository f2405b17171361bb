"""The rewards of the token game. The docstring of each class has its formula."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from prunevit.choices import check_choice

Accuracy = Literal["correct", "confidence", "agreement", "kl", "embedding"]
Reads = Literal["labels", "logits", "embeddings"]
READ_BY: dict[Accuracy, Reads] = {
    "correct": "labels",
    "confidence": "labels",
    "agreement": "logits",
    "kl": "logits",
    "embedding": "embeddings",
}
# of alpha, beta and pot: rewards and their squares stay finite in float32
LARGEST_NUMBER = 1e12


@dataclass(frozen=True)
class StageFacts:
    """What happened at a stage.

    Attributes:
        stage: 0-based.
        alive: agents alive before the decision, bool [B, N].
        kept: agents alive after it, bool [B, N].
        cost: compute of the blocks up to the next stage, as a share of the dense model's,
            float32 [B].
        token_cost: ``cost`` divided by the number of tokens, float32 [B].
        alpha: weight of compute in each episode, float32 [B].
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
        kept: agents alive after each stage, bool [T, B, N].
        logits: logits of the pruned model [B, classes]; embeddings [B, D] of a model without a
            classifier.
        dense_logits: those of the unpruned model, if ``Reward.needs_dense``, else None.
        labels: int64 [B]; ``NO_LABEL`` for images without labels.
    """

    kept: Tensor
    logits: Tensor
    dense_logits: Tensor | None
    labels: Tensor


class Reward(Protocol):
    """A reward for the agents of the token game.

    Attributes:
        alpha: weight of compute, unless an episode has its own.
        needs_dense: whether ``terminal`` reads the logits of the unpruned model, which cost a
            forward pass.
        reads: by what ``terminal`` pays: labels (and logits), logits alone, or the embeddings of a
            model without a classifier. A reward that doesn't say reads labels.
        pays_pruned: whether agents get rewards after the decision that pruned them. Such a reward
            needs agents that stay until the end, since one that left would never receive what its
            decision cost or earned.
    """

    @property
    def alpha(self) -> float: ...

    @property
    def needs_dense(self) -> bool: ...

    @property
    def reads(self) -> Reads: ...

    @property
    def pays_pruned(self) -> bool: ...

    def stage(self, facts: StageFacts) -> Tensor:
        """The reward given right after a decision, float32 [B, N]."""

    def terminal(self, facts: EndFacts) -> Tensor:
        """The reward at the end of the episode, added to the last stage's, float32 [B, N]."""


def reads_of(reward: Reward) -> Reads:
    """What ``reward`` reads; one that doesn't say was written for labels."""
    return getattr(reward, "reads", "labels")


def accuracy_of(kind: Accuracy, facts: EndFacts) -> Tensor:
    """Measures how accurate the pruned model is, float32 [B].

    - correct: 1 if the prediction is the label, else 0.
    - confidence: probability of the label.
    - agreement: 1 if the prediction is that of the unpruned model, else 0.
    - kl: -KL(dense || pruned), at most 0.
    - embedding: cosine similarity of the embeddings of the pruned and the unpruned model, which
      have no classifier.

    It is NaN where logits are: such an answer is neither right nor wrong.
    """
    unknown = facts.logits.isnan().any(1)
    if kind == "correct":
        right = (facts.logits.argmax(1) == facts.labels).float()
        return right.masked_fill(unknown, torch.nan)
    if kind == "confidence":
        return facts.logits.float().softmax(1).gather(1, facts.labels[:, None]).squeeze(1)
    if facts.dense_logits is None:
        raise ValueError(f"accuracy {kind!r} needs the dense model's logits")
    if kind == "embedding":
        return F.cosine_similarity(facts.logits.float(), facts.dense_logits.float())
    if kind == "agreement":
        same = (facts.logits.argmax(1) == facts.dense_logits.argmax(1)).float()
        return same.masked_fill(unknown | facts.dense_logits.isnan().any(1), torch.nan)
    pruned, dense = facts.logits.float().log_softmax(1), facts.dense_logits.float().log_softmax(1)
    return -F.kl_div(pruned, dense, reduction="none", log_target=True).sum(1)


def _check(accuracy: str, **numbers: float) -> None:
    check_choice("accuracy", accuracy, get_args(Accuracy))
    for name, value in numbers.items():
        if not 0 <= value <= LARGEST_NUMBER:
            raise ValueError(f"{name}={value} must be a number from 0 to {LARGEST_NUMBER:g}")


@dataclass(frozen=True)
class _AccuracyForCompute:
    """A reward whose parts add up to beta * accuracy - alpha * compute."""

    alpha: float
    beta: float = 1.0
    accuracy: Accuracy = "correct"

    def __post_init__(self) -> None:
        _check(self.accuracy, alpha=self.alpha, beta=self.beta)

    @property
    def needs_dense(self) -> bool:
        return self.reads != "labels"

    @property
    def reads(self) -> Reads:
        return READ_BY[self.accuracy]


@dataclass(frozen=True)
class TeamReward(_AccuracyForCompute):
    """The same reward for all agents, alive or pruned: beta * accuracy - alpha * compute.

    Compute is a share of the dense model's, and is subtracted stage by stage as it is spent.
    Accuracy is added at the end. The blocks before the first stage are free, since no agent decides
    on them.

    The default accuracy, kl, keeps the pruned model close to the dense one and needs no labels. On
    held-out images it lost less accuracy than confidence in the label, which is too high on images
    that the model was trained on.
    """

    alpha: float = 0.06
    accuracy: Accuracy = "kl"
    pays_pruned: ClassVar[bool] = True

    def stage(self, facts: StageFacts) -> Tensor:
        return (-facts.alpha * facts.cost)[:, None].expand(facts.kept.shape)

    def terminal(self, facts: EndFacts) -> Tensor:
        pay = self.beta * accuracy_of(self.accuracy, facts)
        return pay[:, None].expand(facts.kept.shape[1:])


@dataclass(frozen=True)
class MarkovGameReward(_AccuracyForCompute):
    """Survivors share a reward for a correct prediction: the idea of RL4EViT (arXiv 2503.23459).

    A kept token loses alpha * its share of the dense compute for the blocks up to the next stage.
    At the end, the n survivors of an image get beta * accuracy / n each. The equations of the paper
    were not available: this is our reading of its text and its released code.

    The rewards of all agents of an image add up to beta * accuracy - alpha * compute, so alpha says
    how much accuracy the dense model's compute is worth. With alpha = 1, keeping a single token (30
    to 40% correct on the digits, almost no compute) pays more than the dense model (88% correct at
    the full price), and a good choice of tokens pays more than either. With alpha = 0.5, the dense
    model pays more than the single token.
    """

    alpha: float = 1.0
    pays_pruned: ClassVar[bool] = False

    def stage(self, facts: StageFacts) -> Tensor:
        return -(facts.alpha * facts.token_cost)[:, None] * facts.kept

    def terminal(self, facts: EndFacts) -> Tensor:
        survivors = facts.kept[-1].float()
        share = survivors / survivors.sum(1, keepdim=True).clamp(min=1)
        return self.beta * accuracy_of(self.accuracy, facts)[:, None] * share


@dataclass(frozen=True)
class ReleasedCodeReward:
    """The reward that the released code of RL4EViT computes.

    At stage j, let d = (survivors / N) - keep**(j + 1). If d > 0, each kept token gets -exp(d).
    Otherwise each token pruned at this stage gets -exp(-d). If the prediction is correct, a token
    also gets pot / n_j for every stage j that it survived, with n_j survivors. That is known, and
    given, at the end.
    """

    pot: float = 24.0
    keep: float = 0.7
    alpha: ClassVar[float] = 0.0  # it has no weight of compute

    def __post_init__(self) -> None:
        _check("correct", pot=self.pot)
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be a ratio in (0, 1]")

    needs_dense = False
    reads: ClassVar[Reads] = "labels"
    pays_pruned: ClassVar[bool] = True

    def stage(self, facts: StageFacts) -> Tensor:
        excess = facts.kept.float().mean(1, keepdim=True) - self.keep ** (facts.stage + 1)
        blamed = torch.where(excess > 0, facts.kept, facts.alive & ~facts.kept)
        return -excess.abs().exp() * blamed

    def terminal(self, facts: EndFacts) -> Tensor:
        kept = facts.kept.float()
        shares = kept / kept.sum(2, keepdim=True).clamp(min=1)  # [T, B, N]
        return self.pot * accuracy_of("correct", facts)[:, None] * shares.sum(0)


REWARDS: dict[str, type] = {
    "team": TeamReward,
    "markov-game": MarkovGameReward,
    "released-code": ReleasedCodeReward,
}


def make_reward(name: str, **options: Any) -> Reward:
    """Makes a reward by name, with ``options`` as its arguments.

    Raises:
        ValueError: the name or an option is unknown.
    """
    check_choice("reward", name, REWARDS)
    known = {field.name for field in fields(REWARDS[name])}
    surplus = sorted(set(options) - known)
    if surplus:
        raise ValueError(
            f"reward {name!r} has no {', '.join(surplus)}: it takes {', '.join(sorted(known))}"
        )
    return REWARDS[name](**options)
