"""Times the environment: ``python -m benchmarks.speed.env_speed``.

Prints, as JSON, images and agent decisions a second of the tensor game and of a training rollout,
each with its time relative to bare packed forward passes of the same tokens; the same of the
per-agent dict API; and for each adapter its decisions a second and its time relative to the bare
game. Figures are medians of interleaved repetitions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.benchmarks.noise_images import NoiseImages
from prunevit.benchmarks.speed.adapters import BARE, adapters, decisions_of
from prunevit.benchmarks.speed.timed_trainer import bare_forward
from prunevit.envs.adapters.common import GameArguments
from prunevit.envs.batched.protocol import Observations
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data_config import model_data_config
from prunevit.envs.devices import pick_device
from prunevit.envs.game import TokenGame
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.timing import interleaved
from prunevit.trainers.mappo import Learner, collect_rollout


@dataclass
class EnvSpeedConfig:
    """What is measured."""

    backbone: str = "digits_vit"
    """digits_vit on digits, or any timm model name, with random weights on noise."""
    prune_before: tuple[int, ...] = (1, 3)
    """The stages."""
    images: int = 32
    """Different images a rollout; each is played as often as in the trainer's default."""
    keep: float = 0.7
    """Where actions are random, the probability that a living agent keeps its patch."""
    rounds: int = 15
    """Timed repetitions of each variant."""
    dict_episodes: int = 3
    """Episodes of the dict API, one image each, a repetition."""
    adapter_images: tuple[int, ...] = (1, 64, 256)
    """Images at once with which the adapters are measured; none if empty."""
    threads: int | None = None
    """CPU threads; torch's own choice if not given."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    out: Path | None = None
    """Also write the figures to this JSON file."""


def random_actions(game: TokenGame, images: int, keep: float) -> Tensor:
    """The same joint actions for every variant, int64 [T, B, N]."""
    generator = torch.Generator().manual_seed(0)
    shape = (images, game.num_agents)
    actions = [torch.rand(shape, generator=generator) < keep for _ in range(game.num_stages)]
    return torch.stack(actions).long().to(game.backbone.device)


def step_game(env: BatchedTokenPrune, indices: Tensor, actions: Tensor) -> None:
    """An episode with its observations, states and rewards, but without a policy."""
    observed: Observations = env.reset(indices=indices)
    for action in actions:
        observed.living()
        observed = env.step(action).observations


def play_dicts(env: TokenPruneEnv, actions: Tensor, episodes: int) -> int:
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


def medians(
    variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each variant."""
    calls = {name: [call] for name, call in variants.items()}
    timings = interleaved(calls, rounds, 1, device)
    return {name: timing.seconds for name, timing in timings.items()}


def measure(config: EnvSpeedConfig) -> dict[str, Any]:
    """All figures."""
    settings = MappoConfig()
    device = pick_device(config.device)
    on_digits = config.backbone == settings.backbone
    model = create_backbone(config.backbone, untrained=not on_digits).to(device)
    staged = StagedViT(model, config.prune_before)
    images: ImageSet = NoiseImages(staged.image_shape, num_classes=staged.num_classes)
    if on_digits:
        images = open_images(settings.dataset, "train", model_data_config(model))
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
    actions = random_actions(game, episodes, config.keep)

    @torch.no_grad()
    def rollout() -> Any:
        generator = torch.Generator(device).manual_seed(0)
        observations = env.reset(indices=indices)
        return collect_rollout(env, learner, observations, game.num_stages, generator)[0]

    played = rollout()
    # the policy's own actions, so that the bare passes run the same tokens
    chosen = []
    for seen, action in zip(played.observations, played.action, strict=True):
        joint = torch.zeros(seen.alive.shape, dtype=torch.bool, device=device)
        joint[seen.alive] = action == 1
        chosen.append(joint)
    dict_decisions = play_dicts(single, actions, config.dict_episodes)
    seconds = medians(
        {
            "forward, random": lambda: bare_forward(env, pixels, list(actions == 1)),
            "game, random": lambda: step_game(env, indices, actions),
            "forward, policy": lambda: bare_forward(env, pixels, chosen),
            "rollout, policy": rollout,
            "dicts, random": lambda: play_dicts(single, actions, config.dict_episodes),
        },
        config.rounds,
        device,
    )

    def figures(name: str, images: int, decisions: int, forward: str) -> dict[str, float]:
        return {
            "images_per_second": images / seconds[name],
            "decisions_per_second": decisions / seconds[name],
            **({"over_bare_forward": seconds[name] / seconds[forward]} if forward else {}),
        }

    decisions = sum(len(action) for action in played.action)
    by_dicts = figures("dicts, random", config.dict_episodes, dict_decisions, "")
    by_game = figures("game, random", episodes, decisions_of(actions), "forward, random")
    over_dicts = by_game["decisions_per_second"] / by_dicts["decisions_per_second"]
    return {
        "backbone": config.backbone,
        "episodes": episodes,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "rollout": figures("rollout, policy", episodes, decisions, "forward, policy"),
        "game": by_game | {"over_dict_api": over_dicts},
        "dict_api": by_dicts,
        "adapters": {
            len(some[0]): measure_adapters(config.rounds, staged, images, some)
            for some in (random_actions(game, n, config.keep) for n in config.adapter_images)
        },
    }


def measure_adapters(
    rounds: int, staged: StagedViT, images: ImageSet, actions: Tensor
) -> dict[str, dict[str, float]]:
    """Figures of each adapter on as many images at once as ``actions`` are for."""
    arguments: GameArguments = {
        "prune_before": staged.prune_before,
        "observation": MappoConfig().observation,
        "device": staged.device,
    }
    players = adapters(staged.model, images, actions, arguments)
    seconds = medians(players, rounds, staged.device)
    return {
        name: {
            "decisions_per_second": decisions_of(actions) / time,
            "over_bare_game": time / seconds[BARE],
        }
        for name, time in seconds.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    prog = "python -m benchmarks.speed.env_speed"
    config = tyro.cli(EnvSpeedConfig, description=__doc__, args=arguments, prog=prog)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    figures = measure(config)
    if config.out is not None:
        write_json(config.out, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
