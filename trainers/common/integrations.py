"""What the runners of other libraries share, from their settings to their reports.

The trained actor is written as this project's own, so ``PrunedViT.from_run`` reads the run.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.agents.policies.heuristics import KeepAll
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data_config import model_data_config
from prunevit.envs.devices import pick_device
from prunevit.envs.rewards import make_reward
from prunevit.trainers.common.backbones import StagedViTSettings, make_backbone
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.closing import say_where_and_what_next
from prunevit.trainers.common.evaluation import Evaluation, evaluate
from prunevit.trainers.common.report import table
from prunevit.trainers.common.run import COMMAND_ERRORS, RUNS, open_run
from prunevit.trainers.common.settings import (
    Count,
    Positive,
    Seed,
    Widths,
    parse_arguments,
)
from prunevit.trainers.common.signals import ends_in_one_line

GAMMA = 1.0  # no discount: an episode is only as long as there are stages


@dataclass
class LibraryConfig(StagedViTSettings):
    """How another library trains on the token-pruning game."""

    library: ClassVar[str]

    observation: tuple[str, ...] = ("token", "cls", "stage", "cls_attention")
    """Fields that an agent observes: token cls stage position cls_attention redundancy
    alive_fraction."""
    reward: str = "team"
    """team, markov-game (the paper's) or released-code (what its code computes)."""
    alpha: float | None = None
    """The reward's weight of compute. Each reward has its own default."""
    images: Count = 128
    """Images that are played at once, one episode each."""
    iterations: Count = 300
    """Iterations. In each, all images are played to the end."""
    lr: Positive = 1e-3
    """Learning rate of Adam."""
    hidden: Widths = (64,)
    """Widths of the networks' hidden layers."""
    seed: Seed = 0
    """Seeds weights, images and actions."""
    run_name: str | None = None
    """The run is written to runs/RUN_NAME. By default LIBRARY-ALGORITHM-seedSEED-TIME."""

    @property
    @abstractmethod
    def learner(self) -> str:
        """The algorithm's name."""

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
        own = f"{self.library}-{self.learner}-seed{self.seed}-{stamp}"
        return RUNS / (self.run_name or own)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values, and what else ``PrunedViT.from_run`` asks for."""
        own = {"env": "token-prune", "attention_prior": 0.0}
        return super().to_json() | own


class LibraryRun:
    """A run of another library: its folder, its game and its report.

    Args:
        config: the settings.

    Attributes:
        config: the settings.
        folder: the run's folder.
        staged: the backbone.
        game: arguments for the library's environment.

    Raises:
        ValueError: a name is unknown or a value is wrong.
        TrainingError: the folder exists.
    """

    def __init__(self, config: LibraryConfig) -> None:
        if "alpha" in config.observation:
            raise ValueError(
                "observation=alpha is for trainers.mappo --alpha-range: here all images have the "
                "same alpha"
            )
        self._run, self.config = open_run(config)
        self.folder = self._run.path
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        # on the CPU, from where an environment takes it to its device or to other processes
        backbone = make_backbone(config)
        self._data_config = model_data_config(backbone)
        self.staged = config.stage(backbone)
        options = {} if config.alpha is None else {"alpha": config.alpha}
        self.game: dict[str, Any] = {
            "backbone": backbone,
            "dataset": open_images(config.dataset, "train", self._data_config, augment=True),
            "prune_before": config.prune_before,
            "prune_at": config.prune_at,
            "on_prune": config.on_prune,
            "observation": config.observation,
            "reward": make_reward(config.reward, **options),
            "device": pick_device(config.device),
        }

    def create(self) -> None:
        """Writes the settings to the run's folder; raises OSError if it isn't writable."""
        self._run.create(self.config)

    @contextmanager
    def keeping(self, save: Callable[[Path], object], name: str) -> Iterator[None]:
        """A context for the training: saves the library's model at the end, or on an interruption.

        Args:
            save: writes the model to a path.
            name: the model's file name in the run's folder.
        """
        path = self.folder / name
        try:
            yield
        except KeyboardInterrupt as stopped:
            save(path)
            stopped.add_note(f"{path} holds the model at that point")
            raise
        save(path)

    def conclude(self, actor: nn.Module, **facts: Any) -> dict[str, Evaluation]:
        """Writes the policy, and a report that compares it with the dense model on the test images.

        Args:
            actor: the trained actor, as ``token_actor`` takes it.
            facts: more entries for the report.

        Returns:
            The evaluations of "dense" and of the learner.

        Raises:
            OSError: the folder isn't writable.
        """
        own = token_actor(actor)
        self._run.write_networks(policy=own)
        staged = self.config.stage(self.staged.model)
        policy = LearnedPolicy(own.to(staged.device), self.config.observation, staged.num_prefix)
        test = open_images(self.config.dataset, "test", self._data_config)
        results = {
            "dense": evaluate(PrunedViT(staged, KeepAll()), test),
            self.config.learner: evaluate(PrunedViT(staged, policy), test),
        }
        write_json(
            self.folder / "report.json",
            {
                "policies": {name: result.to_json() for name, result in results.items()},
                "seconds": self._run.seconds,
                "seed": self.config.seed,
                **facts,
            },
        )
        say_where_and_what_next(self.folder, "prunevit viewer --model FOLDER")
        return results


def token_actor(actor: nn.Module) -> TokenActor:
    """Converts a library's actor to this project's own.

    Args:
        actor: observations [R, D_obs] -> scores [R, 2] of prune and keep, of which the higher wins;
            a LayerNorm, then linear layers with GELU between them.

    Raises:
        TypeError: the actor has other layers.
    """
    parts = [part for part in actor.modules() if not list(part.children())]
    norm, *rest = (part for part in parts if not isinstance(part, nn.Identity))
    layers = [part for part in rest if isinstance(part, nn.Linear)]
    form = [nn.Linear, *[nn.GELU, nn.Linear] * (len(layers) - 1)]
    if not isinstance(norm, nn.LayerNorm) or list(map(type, rest)) != form:
        raise TypeError(
            f"expected a LayerNorm, then linear layers with GELU between them, got {actor}"
        )
    own = TokenActor(layers[0].in_features, [layer.out_features for layer in layers[:-1]], None)
    own = own.requires_grad_(False).eval()
    for target, part in zip(own.net, (norm, *rest), strict=True):
        target.load_state_dict(part.state_dict(), strict=part is not norm)  # it may have no weights
    first: Any = own.net[0]
    first.eps = norm.eps
    return own


C = TypeVar("C", bound=LibraryConfig)


def run_command(
    kind: type[C],
    train: Callable[[C], Mapping[str, Evaluation]],
    arguments: Sequence[str] | None,
    description: str | None,
) -> None:
    """Runs ``python -m trainers.LIBRARY`` and prints its results.

    Args:
        kind: the command's settings.
        train: trains and evaluates.
        arguments: the command's arguments; the process's own if None.
        description: for the help.
    """
    with ends_in_one_line(*COMMAND_ERRORS, ImportError):
        config = parse_arguments(kind, arguments, description)
        results = train(config)
        print(table({name: result.to_json() for name, result in results.items()}))
