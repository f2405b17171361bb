"""A straw: an iteration of MAPPO on the token game that is driven image by image and stage by stage
in Python, as RL4EViT's released code drives its own.

Written for this comparison, taken from nowhere. The arithmetic is that of ``trainers.mappo`` in its
default settings: given the same actions it takes the same steps, but for rounding. What comes
before the first stage, and the dense pass, run once for each image here too, and pruned tokens are
removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunevit.envs.game import TokenGame
from prunevit.envs.observations import View
from prunevit.envs.rewards import EndFacts, StageFacts
from prunevit.envs.vit.tokens import Tokens
from prunevit.trainers.mappo import Learner

# the logits of an image's living tokens, [R, 2], and the stage -> their actions, int64 [R]
Choose = Callable[[Tensor, int], Tensor]


@dataclass
class Memory:
    """What was seen, done and got for it in one episode at one stage, of R living tokens."""

    observation: Tensor  # [R, D_obs]
    action: Tensor  # int64 [R]
    log_prob: Tensor  # [R]
    alive: Tensor  # bool [N]
    returns: Tensor  # of all tokens, the gone too, [N]


class Straw:
    """Plays and learns with the networks and the optimizer of ``learner``.

    Args:
        learner: without a critic, one minibatch an epoch.
        game: what is played; ``rollouts_per_image`` episodes of each image, one after the other.
        fields: what the tokens observe.

    Raises:
        ValueError: the learner has a critic, or more minibatches.
    """

    def __init__(self, learner: Learner, game: TokenGame, fields: tuple[str, ...]) -> None:
        if learner.critic is not None or learner.config.minibatches != 1:
            raise ValueError("the straw learns without a critic, from one minibatch an epoch")
        self.learner = learner
        self.game = game
        self.fields = fields

    def iterate(self, images: Tensor, labels: Tensor, choose: Choose) -> int:
        """Plays all images, then learns.

        Args:
            images: [n, C, H, W].
            labels: int64 [n].
            choose: who acts.

        Returns:
            how often a living token was asked.
        """
        memories, advantages = [], []
        for image, label in zip(images, labels, strict=True):
            rollouts = self._play_image(image[None], label[None], choose)
            memories += [memory for rollout in rollouts for memory in rollout]
            advantages += self._compare(rollouts)
        self._learn(memories, advantages)
        return sum(len(memory.action) for memory in memories)

    @torch.no_grad()
    def _play_image(self, image: Tensor, label: Tensor, choose: Choose) -> list[list[Memory]]:
        tokens = self.game.backbone.begin(image)
        dense = self.game.dense_logits(tokens) if self.game.reward.needs_dense else None
        return [
            self._play(tokens, label, dense, choose) for _ in range(self.game.rollouts_per_image)
        ]

    def _play(
        self, tokens: Tokens, label: Tensor, dense: Tensor | None, choose: Choose
    ) -> list[Memory]:
        backbone, reward = self.game.backbone, self.game.reward
        price = torch.full((1,), reward.alpha, device=backbone.device)
        memories: list[Memory] = []
        paid: list[Tensor] = []
        kept: list[Tensor] = []
        for stage in range(backbone.num_stages):
            view = View(backbone, tokens, stage, price)
            observation = view.living(self.fields)
            log_probs = self.learner.actor(observation).log_softmax(-1)
            action = choose(log_probs, stage)
            tokens = backbone.advance(tokens, view.scatter(action == 1), stage)
            alive = tokens.alive[:, backbone.num_prefix :]
            count = alive.sum(1)
            cost = backbone.segment_macs(count, stage) / backbone.dense_macs
            token_cost = cost / (count + backbone.num_prefix).clamp(min=1)
            paid.append(reward.stage(StageFacts(stage, view.alive, alive, cost, token_cost, price)))
            kept.append(alive)
            memories.append(
                Memory(
                    observation=observation,
                    action=action,
                    log_prob=log_probs.gather(1, action[:, None]).squeeze(1),
                    alive=view.alive[0],
                    returns=torch.empty(0),
                )
            )
        logits = backbone.finish(tokens)
        following = reward.terminal(EndFacts(torch.stack(kept), logits, dense, label))[0]
        for memory, pay in zip(reversed(memories), reversed(paid), strict=True):
            memory.returns = following = pay[0] + following
            following = self.learner.config.gamma * following
        return memories

    def _compare(self, rollouts: list[list[Memory]]) -> list[Tensor]:
        """Advantages of an image's rollouts over the mean of the others, [R] each."""
        advantages = []
        for rollout in rollouts:
            for stage, memory in enumerate(rollout):
                others = [other[stage].returns for other in rollouts if other is not rollout]
                baseline = sum(others, torch.zeros_like(memory.returns)) / max(len(others), 1)
                advantages.append((memory.returns - baseline)[memory.alive])
        return advantages

    def _learn(self, memories: list[Memory], advantages: list[Tensor]) -> None:
        learner, config = self.learner, self.learner.config
        everything = torch.cat(advantages)
        mean, spread = everything.mean(), everything.std() + 1e-5
        for _ in range(config.epochs):
            learner.optimizer.zero_grad(set_to_none=True)
            for memory, advantage in zip(memories, advantages, strict=True):
                log_probs = learner.actor(memory.observation).log_softmax(-1)
                log_prob = log_probs.gather(1, memory.action[:, None]).squeeze(1)
                ratio = (log_prob - memory.log_prob).exp()
                clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
                normalised = (advantage - mean) / spread
                gain = torch.minimum(ratio * normalised, clipped * normalised).sum()
                entropy = -(log_probs.exp() * log_probs).sum()
                ((-gain - config.entropy * entropy) / len(everything)).backward()
            nn.utils.clip_grad_norm_(
                [p for group in learner.optimizer.param_groups for p in group["params"]],
                config.max_grad_norm,
            )
            learner.optimizer.step()
