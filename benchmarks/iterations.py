"""An iteration of ``trainers.mappo`` on the token game, watched from outside: where its seconds go,
and the forward passes that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.benchmarks.measuring import Timing, now, resident_peak
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import ImageSet
from prunevit.envs.game import Stage, TokenGame
from prunevit.envs.rewards import make_reward
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.mappo import Trainer

PATCH_SIZE = 8  # of digits_vit, in pixels
STEADY = 1e-12  # a learning rate with which a policy keeps as many at the end as at the start


@dataclass
class Parts:
    """Seconds of an iteration.

    Attributes:
        load: choosing, reading and augmenting the images.
        backbone: the game: blocks, the reward's dense pass, rewards.
        policy: what the agents observe, the actor, drawing actions.
        update: advantages, losses, gradients, the optimizer.
    """

    load: float
    backbone: float
    policy: float
    update: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass
class Played:
    """What an episode was played on, and how.

    Attributes:
        images: once each, on the game's device, [n, C, H, W].
        labels: int64 [n].
        keeps: joint actions, bool [B, N], one a stage.
        edges: when the game was entered and left, seconds.
    """

    images: Tensor
    labels: Tensor
    keeps: list[Tensor] = field(default_factory=list)
    edges: list[float] = field(default_factory=list)

    @property
    def decisions(self) -> int:
        """How often a living agent was asked."""
        alive = torch.ones_like(self.keeps[0])
        asked = 0
        for keep in self.keeps:
            asked += int(alive.sum())
            alive = alive & keep
        return asked

    @property
    def kept(self) -> list[float]:
        """Share of the agents that lives on after each stage."""
        alive, shares = torch.ones_like(self.keeps[0]), []
        for keep in self.keeps:
            alive = alive & keep
            shares.append(float(alive.float().mean()))
        return shares


class WatchedGame(TokenGame):
    """Remembers what is played, and when it began and ended to work on it."""

    played: Played

    def reset(self, images: Tensor, labels: Tensor, alpha: Tensor | None = None) -> Stage:
        device = self.backbone.device
        begun = now(device)
        stage = super().reset(images, labels, alpha)
        self.played = Played(images.to(device), labels.to(device), edges=[begun, now(device)])
        return stage

    def step(self, keep: Tensor) -> Stage:
        device = self.backbone.device
        begun = now(device)
        stage = super().step(keep)
        self.played.keeps.append(keep)
        self.played.edges += [begun, now(device)]
        return stage


class WatchedTrainer:
    """A trainer on the token game whose iterations are timed.

    Args:
        config: its settings; of its reward the name alone counts.
        model: the backbone, on its device.
        images: what is played.
    """

    def __init__(self, config: MappoConfig, model: nn.Module, images: ImageSet) -> None:
        torch.manual_seed(config.seed)
        self.game = WatchedGame(
            StagedViT(model, config.prune_before),
            make_reward(config.reward),
            config.rollouts_per_image,
        )
        self.env = BatchedTokenPrune(self.game, images, config.num_envs, config.observation)
        actor = TokenActor(
            self.env.observation_space.shape[0],
            config.hidden,
            self.env.field_slices["cls_attention"].start,
            config.attention_prior,
            config.keep_bias,
        )
        self.trainer = Trainer(self.env, actor, config)

    @property
    def played(self) -> Played:
        """The last iteration's episodes."""
        return self.game.played

    def iterate(self) -> Parts:
        """Plays and learns once."""
        begun = now(self.env.device)
        self.trainer.iterate()
        ended = now(self.env.device)
        edges = self.played.edges
        inside = sum(edges[1::2]) - sum(edges[::2])
        return Parts(
            load=edges[0] - begun,
            backbone=inside,
            policy=edges[-1] - edges[0] - inside,
            update=ended - edges[-1],
        )

    @torch.no_grad()
    def bare_forward(self) -> float:
        """Seconds of the forward passes that the last iteration needs, the dense one that the
        reward compares with included: the same tokens, but no observation, reward, policy or
        learning.
        """
        played, backbone = self.played, self.game.backbone
        begun = now(backbone.device)
        tokens = backbone.begin(played.images, with_attention=False)
        if self.game.reward.needs_dense:
            self.game.dense_logits(tokens)
        if self.env.rollouts_per_start > 1:
            tokens = tokens.repeat(self.env.rollouts_per_start)
        for stage, keep in enumerate(played.keeps):
            tokens = backbone.advance(tokens, keep, stage, with_attention=False)
        backbone.finish(tokens)
        return now(backbone.device) - begun


class Noise:
    """Images of random pixels as an ``ImageSet``: as fast as memory.

    Args:
        shape: of an image, (C, H, W).
        size: number of images.
    """

    num_classes = 1
    class_names: tuple[str, ...] = ("noise",)

    def __init__(self, shape: tuple[int, ...], size: int = 256) -> None:
        self._pixels = torch.randn(size, *shape, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._pixels)

    def load(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self._pixels[chosen], torch.zeros_like(chosen)


@dataclass(frozen=True)
class Cell:
    """The size of an iteration; small enough to send to another process.

    Attributes:
        tokens: patches of an image, a square number: larger images, patches as they are.
        batch: episodes.
        stages: points at which tokens can be pruned, from block 1 on.
        survivors: share of the tokens that lives to the end; equally many go at each stage.
        rounds: timed iterations, after one that is not.
        device: "cpu" or "cuda".
        threads: of the CPU.
    """

    tokens: int
    batch: int
    stages: int
    survivors: float
    rounds: int
    device: str
    threads: int


def measure_cell(cell: Cell) -> dict[str, float]:
    """Medians of an iteration of ``cell``'s size and of its bare forward passes, seconds, and the
    most bytes that this process, which should be a fresh one, has held for the iterations; on CUDA
    the device's.
    """
    torch.set_num_threads(cell.threads)
    device = torch.device(cell.device)
    side = PATCH_SIZE * round(cell.tokens**0.5)
    model = create_backbone(DIGITS_VIT, untrained=True, img_size=side).to(device)
    keep = cell.survivors ** (1 / cell.stages)
    config = MappoConfig(
        num_envs=cell.batch,
        prune_before=tuple(range(1, 1 + cell.stages)),
        attention_prior=0.0,
        keep_bias=float(torch.logit(torch.tensor(keep))),
        lr=STEADY,
        device=cell.device,
    )
    images = Noise((1, side, side), cell.batch // config.rollouts_per_image)
    watched = WatchedTrainer(config, model, images)
    iterations, forwards = Timing(), Timing()
    watched.iterate()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()
    watched.bare_forward()
    for _ in range(cell.rounds):
        iterations.passes.append(watched.iterate().total)
        forwards.passes.append(watched.bare_forward())
    return {"seconds": iterations.seconds, "forward_seconds": forwards.seconds, "memory": peak}
