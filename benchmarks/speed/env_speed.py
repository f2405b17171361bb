"""Times the environment: ``python -m benchmarks.speed.env_speed``.

Prints, as JSON, for each adapter of ``envs.adapters``: the decisions of living agents a second, and
the time relative to the bare tensor game. Figures are medians of rounds in which all adapters take
turns, with random actions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from prunevit.benchmarks.noise_images import NoiseImages
from prunevit.cli import prog
from prunevit.envs.adapters.common import GameArguments
from prunevit.envs.adapters.epymarl import TokenPruneAgents
from prunevit.envs.adapters.gymnasium import TokenPruneVector
from prunevit.envs.adapters.sb3 import TokenVecEnv
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import DIGITS, open_images
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data_config import model_data_config
from prunevit.envs.devices import pick_device
from prunevit.envs.game import TokenGame
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.extras import is_installed
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.run import COMMAND_ERRORS
from prunevit.trainers.common.settings import Count, Settings, Threads
from prunevit.trainers.common.signals import ends_in_one_line
from prunevit.trainers.common.timing import interleaved

BARE = "TokenGame"
KEEP = 0.7  # probability that a random action keeps its patch

Play = Callable[[], object]


@dataclass
class EnvSpeedConfig(Settings):
    """What is measured."""

    backbone: str = DIGITS_VIT
    """digits_vit on digits, or any timm model name, with random weights on noise."""
    prune_before: tuple[int, ...] = (1, 3)
    """The stages."""
    images: tuple[Count, ...] = (1, 64, 256)
    """Numbers of images that are played at once. Some adapters take one only."""
    rounds: Count = 15
    """Timed episodes of each adapter."""
    threads: Threads | None = None
    """CPU threads; torch's own choice if not given."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    out: Path | None = None
    """Also write the figures to this JSON file."""


def alive_before(keeps: Tensor) -> Tensor:
    """Which agents decide at each stage, under joint actions ``keeps``: both int64 [T, B, N]."""
    return torch.cat([torch.ones_like(keeps[:1]), keeps[:-1]]).cumprod(0)


def adapters(
    model: nn.Module, images: ImageSet, keeps: Tensor, game: GameArguments
) -> dict[str, Play]:
    """Functions that play an episode of B images, by adapter. RLlib and TorchRL are left out where
    they aren't installed, and those that take one image where B is not 1.

    Args:
        model: the backbone.
        images: the images that are played.
        keeps: joint actions int64 [T, B, N].
        game: further arguments of every environment.
    """
    arguments: GameArguments = {**game, "backbone": model, "dataset": images}
    batch = keeps.shape[1]
    bare = TokenGame(StagedViT(model, game.get("prune_before")))
    batched = BatchedTokenPrune(bare, images, batch)

    def play_bare() -> None:
        bare.reset(*images.load(range(batch)))
        for keep in keeps:
            bare.step(keep == 1)

    def play_batched() -> None:
        observed = batched.reset(0)
        for keep in keeps:
            observed.living()
            observed = batched.step(keep).observations

    players = {
        BARE: play_bare,
        "BatchedTokenPrune": play_batched,
        "gymnasium vector, tensors": _steps(
            TokenPruneVector(batch, tensors=True, **arguments), keeps
        ),
        "sb3": _steps(TokenVecEnv(batch, **arguments), keeps.flatten(1).cpu().numpy()),
    }
    if batch == 1:
        single = TokenPruneEnv(**arguments)
        named = [
            dict(zip(single.possible_agents, row, strict=True)) for row in keeps[:, 0].tolist()
        ]
        players["pettingzoo"] = _episode(single, named)
        players["epymarl"] = _episode(TokenPruneAgents(**arguments), keeps[:, 0].tolist())
    if is_installed("ray"):
        players["rllib"] = _rllib(keeps, arguments)
    if is_installed("torchrl"):
        from torchrl.envs.libs.pettingzoo import PettingZooWrapper

        from prunevit.envs.adapters.torchrl import TokenPruneTorchRL

        players["torchrl"] = _torchrl(TokenPruneTorchRL(batch, **arguments), keeps)
        if batch == 1:
            with warnings.catch_warnings():
                # it names the only version of PettingZoo that it was tested with
                warnings.simplefilter("ignore", UserWarning)
                wrapped = PettingZooWrapper(TokenPruneEnv(**arguments))
            players["torchrl, PettingZooWrapper"] = _torchrl(wrapped, keeps[:, 0])
    return players


def _steps(env: Any, actions: Any) -> Play:
    """Of an environment whose last step starts the next episode."""
    env.reset()
    return lambda: [env.step(action) for action in actions]


def _episode(env: Any, actions: Sequence[Any]) -> Play:
    return lambda: [env.reset(), *(env.step(action) for action in actions)]


def _rllib(keeps: Tensor, game: GameArguments) -> Play:
    """RLlib's vector takes a dictionary of living agents for each image."""
    from prunevit.envs.adapters.rllib import TokenPruneMultiVector

    env = TokenPruneMultiVector(keeps.shape[1], game)
    names = env.envs[0].agents
    actions = [
        [
            {name: action for name, action, living in zip(names, *of_image, strict=True) if living}
            for of_image in zip(keep.tolist(), alive.tolist(), strict=True)
        ]
        for keep, alive in zip(keeps, alive_before(keeps), strict=True)
    ]
    return _episode(env, actions)


def _torchrl(env: Any, keeps: Tensor) -> Play:
    def play() -> None:
        seen = env.reset()
        for keep in keeps:
            seen = env.step(seen.set(("token", "action"), keep))["next"]

    return play


def measure(config: EnvSpeedConfig) -> dict[str, Any]:
    """All figures."""
    device = pick_device(config.device)
    on_digits = config.backbone == DIGITS_VIT
    model = create_backbone(config.backbone, untrained=not on_digits).to(device)
    data_config = model_data_config(model)
    images: ImageSet = (
        open_images(DIGITS, "train", data_config)
        if on_digits
        else NoiseImages(data_config["input_size"], num_classes=data_config["classes"].count)
    )
    staged = StagedViT(model, config.prune_before)
    generator = torch.Generator().manual_seed(0)
    figures = {}
    for count in config.images:
        shape = staged.num_stages, count, staged.num_patches
        keeps = (torch.rand(shape, generator=generator) < KEEP).long().to(device)
        players = adapters(
            model, images, keeps, {"prune_before": config.prune_before, "device": device}
        )
        figures[count] = timed(
            players, int(alive_before(keeps).sum()), config.rounds, device, f"{count} images"
        )
    return {
        "backbone": config.backbone,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "adapters": figures,
    }


def timed(
    players: Mapping[str, Play], decisions: int, rounds: int, device: torch.device, title: str
) -> dict[str, dict[str, float]]:
    """Figures of each adapter."""
    calls = {name: [play] for name, play in players.items()}
    timings = interleaved(calls, rounds, 1, device, title=title)
    return {
        name: {
            "decisions_per_second": decisions / timing.seconds,
            "over_bare_game": timing.seconds / timings[BARE].seconds,
        }
        for name, timing in timings.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with ends_in_one_line(*COMMAND_ERRORS):
        config = tyro.cli(EnvSpeedConfig, description=__doc__, args=arguments, prog=prog())
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        figures = measure(config)
        if config.out is not None:
            write_json(config.out, figures)
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
