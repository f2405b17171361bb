"""Times the environment: ``python -m benchmarks.speed.env_speed``.

Prints, as JSON, images and agent decisions a second of a training rollout, of the tensor game and
of the per-agent dict API, and the rollout's time relative to bare packed forward passes of the same
tokens. For each adapter it prints decisions a second and the time relative to the bare game.
Figures are medians of interleaved repetitions.
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

from prunevit.benchmarks.noise_images import NoiseImages
from prunevit.benchmarks.speed.adapters import BARE, adapters
from prunevit.benchmarks.speed.timed_trainer import TimedTrainer, bare_forward, decisions_of
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data_config import model_data_config
from prunevit.envs.devices import pick_device
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.create import create_backbone
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.settings import Count, Settings, Threads
from prunevit.trainers.common.timing import interleaved
from prunevit.trainers.mappo import collect_rollout

KEEP = 0.7  # probability that a random action keeps its patch
ADAPTER_IMAGES = (1, 64, 256)  # at once


@dataclass
class EnvSpeedConfig(Settings):
    """What is measured."""

    backbone: str = "digits_vit"
    """digits_vit on digits, or any timm model name, with random weights on noise."""
    prune_before: tuple[int, ...] = (1, 3)
    """The stages."""
    images: Count = 32
    """Different images a rollout; each is played as often as in the trainer's default."""
    rounds: Count = 15
    """Timed repetitions of each variant."""
    dict_episodes: Count = 3
    """Episodes of the dict API, one image each, a repetition."""
    threads: Threads | None = None
    """CPU threads; torch's own choice if not given."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    out: Path | None = None
    """Also write the figures to this JSON file."""


def random_actions(stages: int, images: int, agents: int) -> Tensor:
    """The same joint actions for every variant, int64 [T, B, N]."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(stages, images, agents, generator=generator) < KEEP).long()


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
    device = pick_device(config.device)
    settings = MappoConfig(
        prune_before=config.prune_before,
        num_envs=config.images * MappoConfig.rollouts_per_image,
        attention_prior=1.0,
        keep_bias=0.0,
    )
    on_digits = config.backbone == settings.backbone
    model = create_backbone(config.backbone, untrained=not on_digits).to(device)
    data_config = model_data_config(model)
    images: ImageSet
    if on_digits:
        images = open_images(settings.dataset, "train", data_config)
    else:
        classes = data_config["classes"].count
        images = NoiseImages(data_config["input_size"], num_classes=classes)
    ours = TimedTrainer(settings, model, images)
    env, game = ours.env, ours.game
    single = TokenPruneEnv(model, images, prune_before=config.prune_before, device=device)
    indices = torch.arange(config.images)
    actions = random_actions(game.num_stages, env.num_envs, game.num_agents).to(device)

    @torch.no_grad()
    def rollout() -> None:
        generator = torch.Generator(device).manual_seed(0)
        observations = env.reset(indices=indices)
        collect_rollout(env, ours.trainer.learner, observations, game.num_stages, generator)

    def step_game() -> None:
        """An episode with its observations, states and rewards, but without a policy."""
        observed = env.reset(indices=indices)
        for action in actions:
            observed.living()
            observed = env.step(action).observations

    rollout()
    pixels, chosen = game.images, game.keeps
    dict_decisions = play_dicts(single, actions, config.dict_episodes)
    seconds = medians(
        {
            "forward": lambda: bare_forward(env, pixels, chosen),
            "rollout": rollout,
            "game": step_game,
            "dict_api": lambda: play_dicts(single, actions, config.dict_episodes),
        },
        config.rounds,
        device,
    )

    def rates(name: str, images: int, decisions: int) -> dict[str, float]:
        return {
            "images_per_second": images / seconds[name],
            "decisions_per_second": decisions / seconds[name],
        }

    by_game = rates("game", env.num_envs, decisions_of(list(actions == 1)))
    by_dicts = rates("dict_api", config.dict_episodes, dict_decisions)
    over_dicts = by_game["decisions_per_second"] / by_dicts["decisions_per_second"]
    return {
        "backbone": config.backbone,
        "episodes": env.num_envs,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "rollout": rates("rollout", env.num_envs, decisions_of(chosen))
        | {"over_bare_forward": seconds["rollout"] / seconds["forward"]},
        "game": by_game | {"over_dict_api": over_dicts},
        "dict_api": by_dicts,
        "adapters": {
            count: measure_adapters(config, ours, images, count) for count in ADAPTER_IMAGES
        },
    }


def measure_adapters(
    config: EnvSpeedConfig, ours: TimedTrainer, images: ImageSet, count: int
) -> dict[str, dict[str, float]]:
    """Figures of each adapter on ``count`` images at once."""
    game, device = ours.game, ours.env.device
    actions = random_actions(game.num_stages, count, game.num_agents).to(device)
    players = adapters(
        game.backbone.model,
        images,
        actions,
        {"prune_before": config.prune_before, "observation": ours.env.fields, "device": device},
    )
    seconds = medians(players, config.rounds, device)
    decisions = decisions_of(list(actions == 1))
    return {
        name: {"decisions_per_second": decisions / time, "over_bare_game": time / seconds[BARE]}
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
