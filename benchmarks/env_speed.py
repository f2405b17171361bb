"""How fast the game is: ``python -m benchmarks.env_speed``.

Prints images/s and agent decisions/s of the tensor path, its time over that of a bare packed
forward pass of the same tokens, and its speed over that of the per-agent dict API; and for each
adapter its decisions/s and its time over that of the bare game.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from timm.data import resolve_model_data_config
from torch import Tensor

from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.benchmarks.adapter_speed import adapters, decisions_of, rows
from prunevit.benchmarks.iterations import Noise
from prunevit.envs.batched.protocol import Observations
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import ImageSet, open_images
from prunevit.envs.game import TokenGame
from prunevit.envs.token_prune import TokenPruneEnv, pick_device
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.mappo import Learner, play


@dataclass
class EnvSpeedConfig:
    """What is measured."""

    backbone: str = "digits_vit"
    """digits_vit on digits, or any timm model name: with random weights, on noise."""
    prune_before: tuple[int, ...] = (1, 3)
    """The stages."""
    images: int = 32
    """Different images a rollout; each is played config.rollouts_per_image times."""
    keep: float = 0.7
    """Chance of a living agent to stay at a stage, where actions are random."""
    rounds: int = 15
    """Timed repetitions of each variant, all of them interleaved; medians are printed."""
    dict_episodes: int = 3
    """Episodes of the dict API, one image each, a round."""
    adapter_images: tuple[int, ...] = (1, 64, 256)
    """Images at once with which the adapters are measured; none if empty."""
    threads: int | None = None
    """CPU threads; torch's own choice if not given."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    out: Path | None = None
    """Also write the figures to this JSON file."""


def random_keeps(game: TokenGame, images: int, keep: float, seed: int) -> list[Tensor]:
    """The same joint actions for every variant, int64 [B, N] for each stage."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, game.num_agents)
    return [
        (torch.rand(shape, generator=generator) < keep).long().to(game.backbone.device)
        for _ in range(game.num_stages)
    ]


@torch.no_grad()
def bare_forward(env: BatchedTokenPrune, pixels: Tensor, actions: list[Tensor]) -> None:
    """The forward passes that a rollout needs, the dense one that the reward compares with
    included: no observation, no reward, no policy.
    """
    backbone = env.game.backbone
    tokens = backbone.begin(pixels, with_attention=False)
    if env.game.reward.needs_dense:
        env.game.dense_logits(tokens)
    if env.rollouts_per_start > 1:
        tokens = tokens.repeat(env.rollouts_per_start)
    for stage, action in enumerate(actions):
        tokens = backbone.advance(tokens, action == 1, stage, with_attention=False)
    backbone.finish(tokens)


def step_game(env: BatchedTokenPrune, indices: Tensor, actions: list[Tensor]) -> None:
    """The game with its observations, states and rewards, but nobody who decides."""
    observed: Observations = env.reset(indices=indices)
    for action in actions:
        observed.living()
        observed = env.step(action).observations


def play_dicts(env: TokenPruneEnv, actions: list[Tensor], episodes: int) -> int:
    """Episodes of one image through PettingZoo's API; returns how often an agent decided."""
    decisions = 0
    for episode in range(episodes):
        env.reset(options={"indices": [episode]})
        for action in actions:
            if not env.agents:
                break
            decisions += len(env.agents)
            chosen = action[episode].tolist()
            env.step({agent: chosen[env.possible_agents.index(agent)] for agent in env.agents})
    return decisions


def measure(config: EnvSpeedConfig) -> dict[str, Any]:
    """All figures, from medians of interleaved repetitions."""
    settings = MappoConfig()
    device = pick_device(config.device)
    on_digits = config.backbone == settings.backbone
    model = create_backbone(config.backbone, untrained=not on_digits).to(device)
    staged = StagedViT(model, config.prune_before)
    images: ImageSet = Noise(staged.image_shape)
    if on_digits:
        images = open_images(settings.dataset, "train", resolve_model_data_config(model))
    game = TokenGame(staged, rollouts_per_image=settings.rollouts_per_image)
    episodes = config.images * settings.rollouts_per_image
    env = BatchedTokenPrune(game, images, episodes, settings.observation)
    single = TokenPruneEnv(model, images, prune_before=config.prune_before, device=device)
    attention = env.field_slices["cls_attention"].start
    torch.manual_seed(0)
    actor = TokenActor(env.observation_space.shape[0], settings.hidden, attention)
    learner = Learner(actor, env, settings)
    indices = torch.arange(config.images)
    pixels = images.load(indices)[0].to(device)
    keeps = random_keeps(game, episodes, config.keep, seed=0)

    observed = env.reset(indices=indices)
    rollout, _ = play(env, learner, observed, game.num_stages, _generator(device))
    # what the policy itself chose, so that the bare passes run the same tokens
    played = []
    for seen, action in zip(rollout.observations, rollout.action, strict=True):
        joint = torch.zeros(seen.alive.shape, dtype=torch.int64, device=device)
        joint[seen.alive] = action
        played.append(joint)
    decisions = sum(len(action) for action in rollout.action)
    random_decisions = decisions_of(torch.stack(keeps))
    dict_decisions = play_dicts(single, keeps, config.dict_episodes)

    def whole_rollout() -> None:
        play(env, learner, env.reset(indices=indices), game.num_stages, _generator(device))

    variants: dict[str, Callable[[], object]] = {
        "forward, random": lambda: bare_forward(env, pixels, keeps),
        "game, random": lambda: step_game(env, indices, keeps),
        "forward, policy": lambda: bare_forward(env, pixels, played),
        "rollout, policy": whole_rollout,
        "dicts, random": lambda: play_dicts(single, keeps, config.dict_episodes),
    }
    seconds = _interleaved(variants, config.rounds, device)
    dict_speed = dict_decisions / seconds["dicts, random"]
    by_adapter = {}
    for count in config.adapter_images:
        joint = torch.stack(random_keeps(game, count, config.keep, seed=0))
        players = adapters(
            model,
            images,
            joint,
            {
                "prune_before": config.prune_before,
                "observation": settings.observation,
                "device": device,
            },
        )
        by_adapter[count] = rows(_interleaved(players, config.rounds, device), decisions_of(joint))
    return {
        "backbone": config.backbone,
        "episodes": episodes,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "rollout": {
            "images_per_second": episodes / seconds["rollout, policy"],
            "decisions_per_second": decisions / seconds["rollout, policy"],
            "over_bare_forward": seconds["rollout, policy"] / seconds["forward, policy"],
        },
        "game": {
            "images_per_second": episodes / seconds["game, random"],
            "decisions_per_second": random_decisions / seconds["game, random"],
            "over_bare_forward": seconds["game, random"] / seconds["forward, random"],
            "over_dict_api": random_decisions / seconds["game, random"] / dict_speed,
        },
        "dict_api": {
            "images_per_second": config.dict_episodes / seconds["dicts, random"],
            "decisions_per_second": dict_speed,
        },
        "adapters": by_adapter,
    }


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _interleaved(
    variants: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each variant, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(EnvSpeedConfig, description=__doc__, args=arguments)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    figures = measure(config)
    if config.out is not None:
        write_json(config.out, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
