"""``TokenGame``: token pruning as a Markov game of N agents on B images at once, on tensors."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from prunevit.envs.observations import View
from prunevit.envs.rewards import LARGEST_NUMBER, EndFacts, Reward, StageFacts, TeamReward
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.tokens import Tokens


class GameError(RuntimeError):
    """A call out of turn: ``step`` before ``reset`` or after the end."""


@dataclass(frozen=True)
class Outcome:
    """How B episodes ended.

    Attributes:
        logits: [B, classes].
        correct: bool [B].
        gmacs: 1e9 multiply-accumulates spent on each image, the observed attention included, the
            policy's own cost not, float32 [B].
        kept: survivors of each stage, int64 [B, T].
        decisions: how often a living agent was asked, int64 [B].
    """

    logits: Tensor
    correct: Tensor
    gmacs: Tensor
    kept: Tensor
    decisions: Tensor


@dataclass(frozen=True)
class InitialState:
    """Images before the first stage.

    Attributes:
        tokens: theirs.
        dense_logits: what the unpruned model answers [n, classes]; None where no reward asks.
    """

    tokens: Tokens
    dense_logits: Tensor | None


@dataclass(frozen=True)
class Stage:
    """A point of the game, B episodes abreast.

    Attributes:
        index: 0..T-1 where a decision is due; T at the end.
        alive: bool [B, N].
        reward: what the last decision brought, float32 [B, N]; zeros after ``reset``.
        view: what the agents can see; None at the end.
        outcome: how it ended; None before the end.
    """

    index: int
    alive: Tensor
    reward: Tensor
    view: View | None
    outcome: Outcome | None = None


class TokenGame:
    """Each patch token an agent, each stage a joint decision who stays.

    All episodes of a batch have the same T stages and end together. Everything stays on the
    backbone's device; the host waits for it once in ``reset`` (to refuse bad images) and once in
    each ``step`` (the ragged layout's lengths).

    Args:
        backbone: the staged ViT; its weights are not changed.
        reward: who is paid what; ``TeamReward()`` where None.
        rollouts_per_image: so many episodes in a row play the same image. What runs before the
            first stage, runs once.
    """

    def __init__(
        self, backbone: StagedViT, reward: Reward | None = None, rollouts_per_image: int = 1
    ) -> None:
        if rollouts_per_image < 1:
            raise ValueError(f"rollouts_per_image={rollouts_per_image} must be at least 1")
        self.backbone = backbone
        self.reward: Reward = TeamReward() if reward is None else reward
        self.rollouts_per_image = rollouts_per_image
        self._episode: _Episode | None = None

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
            images: floating point [n, C, H, W], normalised for the backbone; B = n *
                rollouts_per_image.
            labels: int64 [n].
            alpha: the price of compute for each image, float [n]; the reward's own where None.
                Agents that observe ``alpha`` see its logarithm.

        Raises:
            ValueError: images of a wrong size, type or channels, or not finite; labels outside the
                classes; prices of a wrong number, negative, or too large.
        """
        initial, labels = self.initial_state(images, labels)
        return self.reset_to(initial, labels, alpha)

    @torch.no_grad()
    def initial_state(self, images: Tensor, labels: Tensor) -> tuple[InitialState, Tensor]:
        """Runs what comes before the first stage; ``labels`` come back on the backbone's device.
        Arguments and errors as of ``reset``.
        """
        images, labels = self._checked(images, labels)
        with record_function("blocks before the first stage"):
            tokens = self.backbone.begin(images)
            dense_logits = self.dense_logits(tokens) if self.reward.needs_dense else None
        return InitialState(tokens, dense_logits), labels

    def reset_to(self, initial: InitialState, labels: Tensor, alpha: Tensor | None = None) -> Stage:
        """``reset`` to what ``initial_state`` returned, now or earlier."""
        prices = self._checked_prices(alpha, labels)
        tokens, dense_logits = initial.tokens, initial.dense_logits
        times = self.rollouts_per_image
        unrepeated = tokens
        if times > 1:
            tokens = tokens.repeat(times)
            labels = labels.repeat_interleave(times)
            dense_logits = (
                None if dense_logits is None else dense_logits.repeat_interleave(times, 0)
            )
        alpha = prices.repeat_interleave(times)
        batch = len(labels)
        self._episode = _Episode(0, tokens, labels, dense_logits, alpha, ())
        alive = torch.ones(batch, self.num_agents, dtype=torch.bool, device=labels.device)
        start = View(self.backbone, unrepeated, 0, prices) if times > 1 else None
        view = View(self.backbone, tokens, 0, alpha, start)
        return Stage(0, alive, torch.zeros(alive.shape, device=labels.device), view)

    @torch.no_grad()
    def step(self, keep: Tensor) -> Stage:
        """Prunes whoever is not kept and plays on to the next stage, or to the end.

        Args:
            keep: bool [B, N], True to stay; ignored for those that are gone.

        Raises:
            GameError: there is no episode, or it is over.
            ValueError: ``keep`` has another shape or type.
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
        cost = backbone.segment_macs(count, stage) / backbone.dense_macs
        tokens_run = (count + backbone.num_prefix).clamp(min=1)
        facts = StageFacts(stage, before, alive, cost, cost / tokens_run, episode.alpha)
        reward = self.reward.stage(facts)
        if stage + 1 < self.num_stages:
            self._episode = _Episode(
                stage + 1, tokens, episode.labels, episode.dense_logits, episode.alpha, kept
            )
            view = View(backbone, tokens, stage + 1, episode.alpha)
            return Stage(stage + 1, alive, reward, view)

        self._episode = None
        logits = backbone.finish(tokens).float()
        history = torch.stack(kept)
        reward = reward + self.reward.terminal(
            EndFacts(history, logits, episode.dense_logits, episode.labels)
        )
        survivors = history.sum(2).T
        outcome = Outcome(
            logits=logits,
            correct=logits.argmax(1) == episode.labels,
            gmacs=backbone.total_macs(tokens).float() / 1e9,
            kept=survivors,
            # all are asked at the first stage, then whoever survived the one before
            decisions=self.num_agents + survivors[:, :-1].sum(1),
        )
        return Stage(stage + 1, alive, reward, None, outcome)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenGame:
        """A game that goes on alone from where this one stands, on the same backbone: its weights
        never change, and a library that copies environments would hold them many times.
        """
        memo[id(self.backbone)] = self.backbone
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def abandon(self) -> None:
        """Forgets the episode under way and frees its tensors."""
        self._episode = None

    def dense_logits(self, tokens: Tokens) -> Tensor:
        """What the unpruned model answers, from where ``tokens`` stand before the first stage: [B,
        classes].
        """
        keep_all = torch.ones(
            len(tokens.alive), self.num_agents, dtype=torch.bool, device=tokens.alive.device
        )
        for stage in range(self.num_stages):
            tokens = self.backbone.advance(tokens, keep_all, stage, with_attention=False)
        return self.backbone.finish(tokens).float()

    def _checked(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        shape = self.backbone.image_shape
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
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise ValueError(f"images {bad} of the batch hold NaN or infinite values")
        outside = (labels < 0) | (labels >= self.backbone.num_classes)
        if outside.any():
            raise ValueError(
                f"labels {labels[outside].unique().tolist()} are outside the backbone's "
                f"{self.backbone.num_classes} classes 0..{self.backbone.num_classes - 1}"
            )
        device = self.backbone.device
        pinned = images.is_pinned()  # and then nobody need wait for the copy
        images = images.to(device, non_blocking=pinned).to(self.backbone.dtype)
        return images, labels.to(device, non_blocking=pinned)

    def _checked_prices(self, alpha: Tensor | None, labels: Tensor) -> Tensor:
        if alpha is None:
            return torch.full(labels.shape, self.reward.alpha, device=labels.device)
        if alpha.shape != labels.shape:
            raise ValueError(
                f"alpha of shape {tuple(alpha.shape)}, one for each of {len(labels)} images"
            )
        if not ((alpha >= 0) & (alpha <= LARGEST_NUMBER)).all():
            raise ValueError(
                f"alpha={alpha.tolist()}: prices are numbers from 0 to {LARGEST_NUMBER:g}"
            )
        return alpha.to(labels.device, torch.float32)


@dataclass(frozen=True)
class _Episode:
    stage: int
    tokens: Tokens
    labels: Tensor
    dense_logits: Tensor | None
    alpha: Tensor
    kept: tuple[Tensor, ...]
