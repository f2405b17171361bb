"""A MAPPO trainer on the token game whose iterations are timed, and the bare forward passes that
the same iteration needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.game import Stage, TokenGame
from prunevit.envs.rewards import make_reward
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.timing import now
from prunevit.trainers.mappo import Trainer

Figures = dict[str, float]
"""Of one iteration: ``seconds``, ``decisions`` (how often a living agent acted) and ``kept`` (share
of the agents alive after the first stage).
"""


@torch.no_grad()
def bare_forward(env: BatchedTokenPrune, images: Tensor, keeps: Sequence[Tensor]) -> None:
    """The forward passes of a rollout, including the dense one that the reward compares with. There
    are no observations, rewards or policy.

    Args:
        env: the game.
        images: [n, C, H, W], on the game's device.
        keeps: joint actions, bool [B, N] a stage.
    """
    backbone = env.game.backbone
    tokens = backbone.begin(images, with_attention=False)
    if env.game.reward.needs_dense:
        env.game.dense_logits(tokens)
    if env.rollouts_per_start > 1:
        tokens = tokens.repeat(env.rollouts_per_start)
    for stage, keep in enumerate(keeps):
        tokens = backbone.advance(tokens, keep, stage, with_attention=False)
    backbone.finish(tokens)


def alive_before(keeps: Sequence[Tensor]) -> list[Tensor]:
    """Which agents decide at each stage: bool [B, N] a stage.

    Args:
        keeps: joint actions, bool [B, N] a stage.
    """
    alive = [torch.ones_like(keeps[0])]
    for keep in keeps[:-1]:
        alive.append(alive[-1] & keep)
    return alive


def decisions_of(keeps: Sequence[Tensor]) -> int:
    """How often a living agent decides; arguments as of ``alive_before``."""
    return sum(int(alive.sum()) for alive in alive_before(keeps))


class NotingGame(TokenGame):
    """Notes the joint actions of the last episodes."""

    def reset(self, images: Tensor, labels: Tensor, alpha: Tensor | None = None) -> Stage:
        self.images = images.to(self.backbone.device)  # [n, C, H, W]
        self.keeps: list[Tensor] = []  # bool [B, N] a stage
        return super().reset(images, labels, alpha)

    def step(self, keep: Tensor) -> Stage:
        self.keeps.append(keep)
        return super().step(keep)


class TimedTrainer:
    """A trainer whose iterations are timed.

    Args:
        config: its settings; the reward has its default arguments.
        model: the backbone, on its device.
        images: what is played.
    """

    def __init__(self, config: MappoConfig, model: nn.Module, images: ImageSet) -> None:
        torch.manual_seed(config.seed)
        staged = StagedViT(model, config.prune_before)
        self.game = NotingGame(staged, make_reward(config.reward), config.rollouts_per_image)
        self.env = BatchedTokenPrune(self.game, images, config.num_envs, config.observation)
        actor = TokenActor(
            self.env.observation_space.shape[0],
            config.hidden,
            self.env.field_slices["cls_attention"].start,
            config.attention_prior,
            config.keep_bias,
        )
        self.trainer = Trainer(self.env, actor, config)

    def iterate(self) -> Figures:
        """Trains for one iteration."""
        start = now(self.env.device)
        self.trainer.iterate()
        return self._figures(start)

    def forward(self) -> Figures:
        """Runs the bare forward passes of the last iteration, on the same tokens."""
        start = now(self.env.device)
        bare_forward(self.env, self.game.images, self.game.keeps)
        return self._figures(start)

    def _figures(self, start: float) -> Figures:
        seconds = now(self.env.device) - start
        keeps = self.game.keeps
        kept = float(keeps[0].float().mean())
        return {"seconds": seconds, "decisions": float(decisions_of(keeps)), "kept": kept}
