"""A MAPPO trainer on the token game whose iterations are timed in parts, and the bare forward
passes that the same iteration needs.
"""

from __future__ import annotations

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
of the agents alive after the first stage). Our trainer's seconds come in parts as well: ``load``
(images), ``backbone`` (the game), ``policy`` (observations, actor, sampling) and ``update``.
"""


@torch.no_grad()
def bare_forward(env: BatchedTokenPrune, images: Tensor, keeps: list[Tensor]) -> None:
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


def alive_after(keeps: list[Tensor]) -> list[Tensor]:
    """Which agents are alive at first and after each stage: T + 1 times bool [B, N].

    Args:
        keeps: joint actions, bool [B, N] a stage.
    """
    alive = [torch.ones_like(keeps[0])]
    for keep in keeps:
        alive.append(alive[-1] & keep)
    return alive


class TimedGame(TokenGame):
    """Notes which images and actions are played, and when the game starts and stops computing."""

    def reset(self, images: Tensor, labels: Tensor, alpha: Tensor | None = None) -> Stage:
        device = self.backbone.device
        start = now(device)
        stage = super().reset(images, labels, alpha)
        self.images = images.to(device)  # [n, C, H, W]
        self.keeps: list[Tensor] = []  # bool [B, N] a stage
        self.edges = [start, now(device)]  # seconds: start, stop, start, ...
        return stage

    def step(self, keep: Tensor) -> Stage:
        start = now(self.backbone.device)
        stage = super().step(keep)
        self.keeps.append(keep)
        self.edges += [start, now(self.backbone.device)]
        return stage


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
        self.game = TimedGame(staged, make_reward(config.reward), config.rollouts_per_image)
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
        stop = now(self.env.device)
        edges = self.game.edges
        inside = sum(edges[1::2]) - sum(edges[::2])
        return {
            "seconds": stop - start,
            "load": edges[0] - start,
            "backbone": inside,
            "policy": edges[-1] - edges[0] - inside,
            "update": stop - edges[-1],
            **self._played(),
        }

    def forward(self) -> Figures:
        """Runs the bare forward passes of the last iteration, on the same tokens."""
        start = now(self.env.device)
        bare_forward(self.env, self.game.images, self.game.keeps)
        return {"seconds": now(self.env.device) - start, **self._played()}

    def _played(self) -> Figures:
        alive = alive_after(self.game.keeps)
        return {
            "decisions": float(sum(int(at_stage.sum()) for at_stage in alive[:-1])),
            "kept": float(alive[1].float().mean()),
        }
