"""``TokenGame``: token pruning as a Markov game of N agents, on tensors of B images."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from prunevit.envs.data.image_set import NO_LABEL
from prunevit.envs.observations import View
from prunevit.envs.rewards import (
    LARGEST_NUMBER,
    EndFacts,
    Reward,
    StageFacts,
    TeamReward,
    reads_of,
)
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.tokens import Tokens
from prunevit.envs.vit.untouched import is_random


class GameError(RuntimeError):
    """``step`` was called before ``reset`` or after the end of an episode."""


@dataclass(frozen=True)
class Outcome:
    """How B episodes ended.

    Attributes:
        logits: [B, classes]; embeddings [B, D] of a backbone without a classifier.
        dense_logits: those of the unpruned model; None if the reward needs none.
        correct: whether the prediction is the label, bool [B]; False without one.
        gmacs: 1e9 multiply-accumulates spent on each image, float32 [B]. The class attention is
            included, the cost of the policy is not.
        kept: number of survivors of each stage, int64 [B, T].
        decisions: number of decisions that living agents made, int64 [B].
    """

    logits: Tensor
    dense_logits: Tensor | None
    correct: Tensor
    gmacs: Tensor
    kept: Tensor
    decisions: Tensor


@dataclass(frozen=True)
class InitialState:
    """n images before the first stage.

    Attributes:
        tokens: their tokens.
        dense_logits: logits of the unpruned model [n, classes]; None if the reward needs none.
    """

    tokens: Tokens
    dense_logits: Tensor | None


@dataclass(frozen=True)
class Stage:
    """The state of B episodes at a stage.

    Attributes:
        index: 0..T-1 if a decision is due, T at the end.
        alive: which agents are alive, bool [B, N].
        reward: reward of the last decision, float32 [B, N]; zeros after ``reset``.
        view: what agents can observe; None at the end.
        outcome: how the episodes ended; None before the end.
    """

    index: int
    alive: Tensor
    reward: Tensor
    view: View | None
    outcome: Outcome | None = None


class TokenGame:
    """A game in which each patch token is an agent that stays or is pruned at every stage.

    All episodes of a batch have the same T stages and end together. All tensors stay on the
    backbone's device. The host waits for it once in ``reset`` if the images are there already, to
    check them, and once in each ``step``, for the number of surviving tokens; twice where pruned
    patches merge.

    Args:
        backbone: the staged ViT; its weights are not changed.
        reward: the reward; ``TeamReward()`` if None.
        rollouts_per_image: number of consecutive episodes that play the same image. The blocks
            before the first stage run once for all of them.

    Raises:
        ValueError: ``rollouts_per_image`` is below 1, the backbone pools nothing, or the reward
            reads what the backbone doesn't give.
    """

    def __init__(
        self, backbone: StagedViT, reward: Reward | None = None, rollouts_per_image: int = 1
    ) -> None:
        if rollouts_per_image < 1:
            raise ValueError(f"rollouts_per_image={rollouts_per_image} must be at least 1")
        if not backbone.model.global_pool:
            raise ValueError(
                "the game needs one output for an image: the backbone has no pooling "
                "(global_pool='')"
            )
        self.backbone = backbone
        self.reward: Reward = TeamReward() if reward is None else reward
        self._check_pays_by_outputs()
        self.rollouts_per_image = rollouts_per_image
        self._episode: _Episode | None = None

    def _check_pays_by_outputs(self) -> None:
        reads, name = reads_of(self.reward), type(self.reward).__name__
        if self.backbone.num_classes == 0 and reads != "embeddings":
            raise ValueError(
                f"the backbone has no classifier (num_classes=0) and gives embeddings, but {name} "
                f"pays by {reads}: take accuracy='embedding', or a backbone with a classifier"
            )
        if self.backbone.num_classes and reads == "embeddings":
            raise ValueError(
                f"{name} pays by embeddings, but the backbone has a classifier of "
                f"{self.backbone.num_classes} classes: build it with num_classes=0"
            )

    @property
    def num_stages(self) -> int:
        return self.backbone.num_stages

    @property
    def num_agents(self) -> int:
        return self.backbone.num_patches

    @torch.no_grad()
    def reset(self, images: Tensor, labels: Tensor, alpha: Tensor | None = None) -> Stage:
        """Begins episodes.

        Args:
            images: floating point [n, C, H, W], normalised for the backbone, with
                B = n * rollouts_per_image.
            labels: int64 [n]; ``NO_LABEL`` for images without labels, if the reward reads none.
            alpha: weight of compute in the reward of each image, float [n]; the reward's own if
                None. Agents that observe ``alpha`` see its logarithm.

        Raises:
            ValueError: images have the wrong size, type or channels or are not finite, labels are
                out of range, alphas are negative, too large or of the wrong number, or the
                backbone is in training mode.
        """
        initial, labels = self.initial_state(images, labels)
        return self.reset_to(initial, labels, alpha)

    @torch.no_grad()
    def initial_state(self, images: Tensor, labels: Tensor) -> tuple[InitialState, Tensor]:
        """Runs the blocks before the first stage; arguments and errors are those of ``reset``.

        Returns:
            the images before the first stage, and the labels on the backbone's device.
        """
        with_labels = reads_of(self.reward) == "labels"
        images, labels = checked_batch(self.backbone, images, labels, with_labels)
        with record_function("blocks before the first stage"):
            tokens = self.backbone.begin(images)
            dense_logits = self.dense_logits(tokens) if self.reward.needs_dense else None
        return InitialState(tokens, dense_logits), labels

    def reset_to(self, initial: InitialState, labels: Tensor, alpha: Tensor | None = None) -> Stage:
        """Begins episodes on what ``initial_state`` returned, now or earlier."""
        alphas = self._checked_alphas(alpha, labels)
        tokens, dense_logits = initial.tokens, initial.dense_logits
        times = self.rollouts_per_image
        start = None
        if times > 1:
            start = View(self.backbone, tokens, 0, alphas)
            tokens = tokens.repeat(times)
            if dense_logits is not None:
                dense_logits = dense_logits.repeat_interleave(times, 0)
        labels, alpha = labels.repeat_interleave(times), alphas.repeat_interleave(times)
        self._episode = _Episode(0, tokens, labels, dense_logits, alpha, ())
        alive = torch.ones(len(labels), self.num_agents, dtype=torch.bool, device=labels.device)
        view = View(self.backbone, tokens, 0, alpha, start)
        return Stage(0, alive, torch.zeros_like(alive, dtype=torch.float32), view)

    @torch.no_grad()
    def step(self, keep: Tensor) -> Stage:
        """Prunes the agents that are not kept and runs on to the next stage, or to the end.

        Args:
            keep: which agents stay, bool [B, N]; ignored for agents that are gone.

        Raises:
            GameError: there is no episode, or it is over.
            ValueError: ``keep`` has the wrong shape or type, or the reward the wrong shape.
        """
        episode = self._episode
        if episode is None:
            raise GameError("no episode to step in: call reset first (also after an episode's end)")
        backbone, stage = self.backbone, episode.stage
        before = episode.tokens.alive[:, backbone.num_prefix :]
        if keep.shape != before.shape or keep.dtype != torch.bool:
            raise ValueError(
                f"keep must be bool {tuple(before.shape)} (images, agents): "
                f"got {keep.dtype} {tuple(keep.shape)}"
            )
        with record_function("blocks after it"):
            tokens = backbone.advance(episode.tokens, keep.to(before.device), stage)
        alive = tokens.alive[:, backbone.num_prefix :]
        kept = (*episode.kept, alive)
        count = alive.sum(1)
        cost = backbone.segment_macs(count, stage).float() / backbone.dense_macs
        tokens_run = (count + backbone.num_prefix).clamp(min=1)
        # copies, since whoever gets them may change them: the tokens of the episode must not follow
        facts = StageFacts(
            stage, before.clone(), alive.clone(), cost, cost / tokens_run, episode.alpha
        )
        reward = self._paid(self.reward.stage(facts), alive)
        if stage + 1 < self.num_stages:
            self._episode = replace(episode, stage=stage + 1, tokens=tokens, kept=kept)
            view = View(backbone, tokens, stage + 1, episode.alpha)
            return Stage(stage + 1, alive.clone(), reward, view)

        self._episode = None
        logits = backbone.finish(tokens).float()
        history = torch.stack(kept)
        survivors = history.sum(2).T
        facts_of_end = EndFacts(history, logits, episode.dense_logits, episode.labels)
        reward = reward + self._paid(self.reward.terminal(facts_of_end), alive)
        outcome = Outcome(
            logits=logits,
            dense_logits=episode.dense_logits,
            correct=logits.argmax(1) == episode.labels,
            gmacs=backbone.total_macs(tokens).float() / 1e9,
            kept=survivors,
            # at the first stage all agents decide, then those that survived the stage before
            decisions=self.num_agents + survivors[:, :-1].sum(1),
        )
        return Stage(stage + 1, alive.clone(), reward, None, outcome)

    def _paid(self, reward: Tensor, alive: Tensor) -> Tensor:
        """A reward of one's own as float32 [B, N]; other shapes could be broadcast by chance."""
        if not isinstance(reward, Tensor) or reward.shape != alive.shape:
            got = list(reward.shape) if isinstance(reward, Tensor) else repr(reward)
            raise ValueError(
                f"{type(self.reward).__name__} must pay {list(alive.shape)} (images, agents): "
                f"got {got}"
            )
        return reward.float()

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenGame:
        """Copies the game and its episode, but not the backbone.

        The backbone's weights never change, and libraries that copy environments would hold them
        many times.
        """
        memo[id(self.backbone)] = self.backbone
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def abandon(self) -> None:
        """Ends the current episode without a result and frees its tensors."""
        self._episode = None

    def dense_logits(self, tokens: Tokens) -> Tensor:
        """Logits of the unpruned model [B, classes], from ``tokens`` before the first stage."""
        for stage in range(self.num_stages):
            tokens = self.backbone.advance(tokens, None, stage, with_attention=False)
        return self.backbone.finish(tokens).float()

    def _checked_alphas(self, alpha: Tensor | None, labels: Tensor) -> Tensor:
        if alpha is None:
            return torch.full_like(labels, self.reward.alpha, dtype=torch.float32)
        if alpha.shape != labels.shape:
            raise ValueError(
                f"alpha of shape {tuple(alpha.shape)}, one for each of {len(labels)} images"
            )
        if not ((alpha >= 0) & (alpha <= LARGEST_NUMBER)).all():
            raise ValueError(f"alpha={alpha.tolist()} must be numbers from 0 to {LARGEST_NUMBER:g}")
        return alpha.to(labels.device, torch.float32)


def checked_batch(
    backbone: StagedViT, images: Tensor, labels: Tensor, with_labels: bool = True
) -> tuple[Tensor, Tensor]:
    """Images and labels that ``backbone`` can be judged by, on its device.

    Args:
        backbone: the staged ViT.
        images: floating point [B, C, H, W].
        labels: int64 [B].
        with_labels: whether it is judged by labels. Without, all may be ``NO_LABEL``, and none
            is looked at if the backbone has no classifier.

    Raises:
        ValueError: images have the wrong size, type or channels or are not finite, labels are out
            of range, or the backbone is in training mode.
    """
    if is_random(backbone.model):
        raise ValueError(
            "the backbone is in training mode, in which the same images would not end the same "
            "way twice: call .eval() on it"
        )
    shape = backbone.image_shape
    if images.dim() != 4 or images.shape[1:] != shape or not images.is_floating_point():
        raise ValueError(
            f"the backbone takes floating point images [B, {', '.join(map(str, shape))}]: "
            f"got {images.dtype} {list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{len(images)} images need int64 labels [{len(images)}]: "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    finite = images.isfinite().flatten(1).all(1)
    outside = (labels < 0) | (labels >= backbone.num_classes)
    if not with_labels:
        labelled = (labels != NO_LABEL).any() if backbone.num_classes else torch.tensor(False)
        outside = outside & labelled
    if not (finite.all() & ~outside.any()):  # if they are on a GPU, the host waits once
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise ValueError(f"images {bad} of the batch hold NaN or infinite values")
        raise ValueError(
            f"labels {labels[outside].unique().tolist()} are outside the backbone's "
            f"{backbone.num_classes} classes 0..{backbone.num_classes - 1}"
        )
    device = backbone.device
    pinned = images.is_pinned()  # a copy from pinned memory need not be waited for
    images = images.to(device, non_blocking=pinned).to(backbone.dtype)
    return images, labels.to(device, non_blocking=pinned)


@dataclass(frozen=True)
class _Episode:
    stage: int
    tokens: Tokens
    labels: Tensor
    dense_logits: Tensor | None
    alpha: Tensor
    kept: tuple[Tensor, ...]
