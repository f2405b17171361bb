"""A training by another library, from its settings to its report: what the runners share.

The actor that comes of it is written as this project's own: ``PrunedViT.from_run`` reads the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.data import resolve_model_data_config
from torch import nn

from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.agents.policies.heuristics import KeepAll
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.data.datasets import open_images
from prunevit.envs.devices import pick_device
from prunevit.envs.rewards import make_reward
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.evaluation import Evaluation, evaluate
from prunevit.trainers.common.run import RUNS, RunSettings, open_run
from prunevit.trainers.common.settings import Count, JsonObject, Positive, Seed, Threads, Widths

GAMMA = 1.0  # an episode has as many steps as there are stages: nothing is far away


@dataclass
class LibraryConfig(RunSettings):
    """Another library on the token-pruning game."""

    library: ClassVar[str]

    backbone: str = "digits_vit"
    """digits_vit (trained, comes with the package) or any timm model name."""
    model_kwargs: JsonObject = field(default_factory=dict)
    """Given to timm.create_model, as JSON."""
    checkpoint: Path | None = None
    """A file with the backbone's weights."""
    dataset: str = "digits"
    """digits, folder:PATH, or a name that timm.data.create_dataset takes."""
    prune_before: tuple[int, ...] | None = (1, 3)
    """Blocks, 0-based, before which tokens can be pruned; None: all but the first."""
    observation: tuple[str, ...] = ("token", "cls", "stage", "cls_attention")
    """What a token sees: token cls stage position cls_attention alive_fraction."""
    reward: str = "team"
    """team, markov-game (the paper's) or released-code (what its code computes)."""
    alpha: float | None = None
    """The reward's weight of compute; the reward's own default if not given."""
    images: Count = 128
    """Images that are played at once."""
    iterations: Count = 300
    """Rounds in which all images are played to the end."""
    lr: Positive = 1e-3
    """Adam's learning rate."""
    hidden: Widths = (64,)
    """Widths of the hidden layers."""
    seed: Seed = 0
    """Seeds weights, images and actions."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: Threads | None = None
    """CPU threads; torch's own choice if not given."""
    run_name: str | None = None
    """The run is written to runs/RUN_NAME; a name made of library, algorithm, seed and time if not
    given.
    """

    @property
    def learner(self) -> str:
        """The algorithm's name."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
        own = f"{self.library}-{self.learner}-seed{self.seed}-{stamp}"
        return RUNS / (self.run_name or own)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values, and what else ``PrunedViT.from_run`` asks for."""
        own = {"env": "token-prune", "pretrained": False, "attention_prior": 0.0}
        return super().to_json() | own


class LibraryRun:
    """A run on its way.

    Args:
        config: the settings.

    Attributes:
        config: the settings.
        folder: where everything is written.
        staged: the backbone.
        game: arguments of the environment, or of the adapter in its place.

    Raises:
        ValueError: an unknown name or a wrong value; the message says which would be right.
        TrainingError: the folder exists.
    """

    def __init__(self, config: LibraryConfig) -> None:
        if "alpha" in config.observation:
            raise ValueError("observation=alpha: here alpha is the same for all images")
        self._run, self.config = open_run(config)
        self.folder = self._run.path
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        backbone = create_backbone(
            config.backbone, checkpoint=config.checkpoint, **config.model_kwargs
        ).requires_grad_(False)
        self._data_config = resolve_model_data_config(backbone)
        self.staged = StagedViT(backbone, config.prune_before)
        options = {} if config.alpha is None else {"alpha": config.alpha}
        self.game: dict[str, Any] = {
            "backbone": backbone,
            "dataset": open_images(config.dataset, "train", self._data_config, augment=True),
            "prune_before": config.prune_before,
            "observation": config.observation,
            "reward": make_reward(config.reward, **options),
            "device": pick_device(config.device),
        }

    def create(self) -> None:
        """Writes the settings.

        Raises:
            OSError: the folder can't be written.
        """
        self._run.create(self.config)

    @contextmanager
    def keeping(self, save: Callable[[Path], object], name: str) -> Iterator[None]:
        """Surrounds the learning: ``save`` is given the path of ``name`` in the folder when it is
        done, and when it is stopped.
        """
        path = self.folder / name
        try:
            yield
        except KeyboardInterrupt as stopped:
            save(path)
            stopped.add_note(f"{path} holds what was learned until then")
            raise
        save(path)

    def conclude(self, actor: nn.Module, **facts: Any) -> dict[str, Evaluation]:
        """Writes what was learned, and how it and the dense model do on the test images.

        Args:
            actor: what ``token_actor`` takes.
            facts: for the report.

        Raises:
            OSError: the folder can't be written.
        """
        own = token_actor(actor)
        self._run.write_networks(policy=own)
        staged = StagedViT(self.staged.model, self.config.prune_before)
        policy = LearnedPolicy(own.to(staged.device), self.config.observation, staged.num_prefix)
        test = open_images(self.config.dataset, "test", self._data_config)
        results = {
            "dense": evaluate(PrunedViT(staged, KeepAll()), test),
            self.config.learner: evaluate(PrunedViT(staged, policy), test),
        }
        write_json(
            self.folder / "report.json",
            {
                "policies": {name: asdict(result) for name, result in results.items()},
                "seconds": self._run.seconds,
                "seed": self.config.seed,
                **facts,
            },
        )
        return results


def token_actor(actor: nn.Module) -> TokenActor:
    """``actor`` as this project's own.

    Args:
        actor: observations [R, D_obs] -> scores [R, 2] of prune and keep, of which the higher wins:
            a LayerNorm, then linear layers with GELU between them.
    """
    parts = [part for part in actor.modules() if not list(part.children())]
    norm, *rest = (part for part in parts if not isinstance(part, nn.Identity))
    layers = [part for part in rest if isinstance(part, nn.Linear)]
    form = [nn.Linear, *[nn.GELU, nn.Linear] * (len(layers) - 1)]
    if not isinstance(norm, nn.LayerNorm) or list(map(type, rest)) != form:
        raise TypeError(f"no LayerNorm and linear layers with GELU between them: {actor}")
    own = TokenActor(layers[0].in_features, [layer.out_features for layer in layers[:-1]], None)
    own = own.requires_grad_(False).eval()
    first = own.net[0]
    assert isinstance(first, nn.LayerNorm)
    if norm.elementwise_affine:
        first.load_state_dict(norm.state_dict())
    first.eps = norm.eps
    mine = [part for part in own.net if isinstance(part, nn.Linear)]
    for target, layer in zip(mine, layers, strict=True):
        target.load_state_dict(layer.state_dict())
    return own


def table(results: Mapping[str, Evaluation]) -> str:
    """Accuracy and cost of each policy as text."""
    dense = results["dense"].gmacs
    lines = [f"{'policy':<14}{'test accuracy':>14}{'GMACs':>9}{'of dense':>9}  patches kept, %"]
    for name, result in results.items():
        kept = " ".join(f"{100 * share:.0f}" for share in result.kept)
        lines.append(
            f"{name:<14}{100 * result.accuracy:>13.2f}%{result.gmacs:>9.4f}"
            f"{100 * result.gmacs / dense:>8.1f}%  {kept}"
        )
    return "\n".join(lines)
