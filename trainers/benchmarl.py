"""BenchMARL learns to prune: ``python -m trainers.benchmarl --algorithm mappo``.

One policy for all tokens, trained by BenchMARL's own algorithms with its logs and checkpoints in
the run's folder, and judged at the end by what it does when it prunes for good.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from timm.data import resolve_model_data_config
from torch import nn

from tokenprune.agents.actor_critic import LearnedPolicy
from tokenprune.agents.heuristics import KeepAll
from tokenprune.agents.pruned_vit import PrunedViT
from tokenprune.envs.adapters.benchmarl import TokenPruneTask
from tokenprune.envs.adapters.common import needs
from tokenprune.envs.backbone import StagedViT
from tokenprune.envs.datasets import open_images
from tokenprune.envs.models import create_backbone
from tokenprune.envs.rewards import make_reward
from tokenprune.envs.token_prune import pick_device
from tokenprune.trainers.checkpoint import write_json
from tokenprune.trainers.evaluation import Evaluation, evaluate
from tokenprune.trainers.sb3 import table
from tokenprune.trainers.stopping import ends_in_one_line

with needs("benchmarl"):
    from benchmarl.algorithms import (
        IppoConfig,
        IqlConfig,
        IsacConfig,
        MappoConfig,
        MasacConfig,
        QmixConfig,
        VdnConfig,
    )
    from benchmarl.algorithms.common import AlgorithmConfig
    from benchmarl.experiment import Callback, Experiment, ExperimentConfig
    from benchmarl.models.mlp import Mlp, MlpConfig
    from tensordict import TensorDictBase

RUNS = Path("runs")
GAMMA = 1.0  # an episode has as many steps as there are stages: nothing is far away
EPOCHS = MINIBATCHES = 4  # of on-policy algorithms, an iteration
REPLAYED_ITERATIONS = 8  # a frame holds what all tokens of an image see: memory ends soon
REPLAY_STEPS = 8  # gradient steps of off-policy algorithms, an iteration
EXPLORING = 0.5  # share of the training in which random actions fade out

ALGORITHMS: dict[str, type[AlgorithmConfig]] = {
    "mappo": MappoConfig,
    "ippo": IppoConfig,
    "qmix": QmixConfig,
    "vdn": VdnConfig,
    "iql": IqlConfig,
    "masac": MasacConfig,
    "isac": IsacConfig,
}


@dataclass
class BenchmarlConfig:
    """BenchMARL on the token-pruning game."""

    algorithm: Literal["mappo", "ippo", "qmix", "vdn", "iql", "masac", "isac"] = "mappo"
    """Who learns."""
    backbone: str = "digits_vit"
    """digits_vit (trained, comes with the package) or any timm model name."""
    checkpoint: Path | None = None
    """A file with the backbone's weights."""
    dataset: str = "digits"
    """digits, folder:PATH, or a name that timm.data.create_dataset takes."""
    prune_before: tuple[int, ...] | None = (1, 3)
    """Blocks, 0-based, before which tokens can be pruned; None: all but the first."""
    observation: tuple[str, ...] = ("token", "cls", "stage", "cls_attention")
    """What a token sees: token cls stage position cls_attention alive_fraction budget."""
    reward: str = "team"
    """team, markov-game (the paper's) or released-code (what its code computes)."""
    alpha: float | None = None
    """Price of the dense model's whole compute; the reward's own default if not given."""
    num_envs: int = 128
    """Images that are played at once."""
    iterations: int = 300
    """Rounds in which all images are played to the end."""
    minutes: float | None = None
    """Ends the training after so many minutes, even if iterations are left."""
    lr: float = 1e-3
    """Adam's learning rate."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the hidden layers."""
    seed: int = 0
    """Seeds weights, images and actions."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: int | None = None
    """CPU threads; torch's own choice if not given."""
    run_name: str | None = None
    """The run is written to runs/RUN_NAME; a name made of algorithm, seed and time if not given."""


class OutOfTime(KeyboardInterrupt):
    """The only end before the last iteration that BenchMARL doesn't report as a failure."""


class Clock(Callback):
    """Ends an experiment when its time is up, with a checkpoint as at the end that it knows.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._end = time.monotonic() + seconds

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        if time.monotonic() >= self._end:
            # later is too late: closing the experiment takes its collector apart
            self.experiment._save_experiment()
            raise OutOfTime


def algorithm_config(name: str) -> AlgorithmConfig:
    """BenchMARL's own settings of an algorithm, with what the game asks of it."""
    kind = ALGORITHMS[name]
    if name in ("mappo", "ippo"):
        # returns to the end of the episode: values of pruned tokens tell images from each other
        # no more, so nothing is bootstrapped from them
        return dataclasses.replace(kind.get_from_yaml(), lmbda=1.0, entropy_coef=3e-4)
    return kind.get_from_yaml()


def experiment_config(config: BenchmarlConfig, stages: int, folder: Path) -> ExperimentConfig:
    """BenchMARL's own settings of an experiment, with what the game asks of it: rounds of whole
    episodes, and memory for a few of them.
    """
    frames = config.num_envs * stages
    device = str(pick_device(config.device))
    return dataclasses.replace(
        ExperimentConfig.get_from_yaml(),
        sampling_device=device,
        train_device=device,
        buffer_device=device,
        prefer_continuous_actions=False,
        gamma=GAMMA,
        lr=config.lr,
        max_n_iters=config.iterations,
        max_n_frames=None,
        exploration_anneal_frames=max(int(EXPLORING * config.iterations * frames), 1),
        on_policy_collected_frames_per_batch=frames,
        on_policy_n_envs_per_worker=config.num_envs,
        on_policy_n_minibatch_iters=EPOCHS,
        on_policy_minibatch_size=max(frames // MINIBATCHES, 1),
        off_policy_collected_frames_per_batch=frames,
        off_policy_n_envs_per_worker=config.num_envs,
        off_policy_n_optimizer_steps=REPLAY_STEPS,
        off_policy_train_batch_size=frames,
        off_policy_memory_size=REPLAYED_ITERATIONS * frames,
        # the policy is judged once, by what it does on the test images
        evaluation=False,
        render=False,
        loggers=["csv"],
        create_json=False,
        save_folder=str(folder),
        checkpoint_at_end=True,
        exclude_buffer_from_checkpoint=True,
    )


def make_experiment(config: BenchmarlConfig, task: TokenPruneTask, folder: Path) -> Experiment:
    """BenchMARL's experiment, ready to run.

    Args:
        config: the settings.
        task: what is played.
        folder: where BenchMARL writes, which is there.
    """
    stages = StagedViT(task.config["backbone"], task.config["prune_before"]).num_stages
    return Experiment(
        task=task,
        algorithm_config=algorithm_config(config.algorithm),
        model_config=MlpConfig(
            num_cells=list(config.hidden), layer_class=nn.Linear, activation_class=nn.GELU
        ),
        seed=config.seed,
        config=experiment_config(config, stages, folder),
        callbacks=[] if config.minutes is None else [Clock(60 * config.minutes)],
    )


def run(experiment: Experiment) -> None:
    """Trains to the last iteration, or until the time is up."""
    with contextlib.suppress(OutOfTime):
        experiment.run()


def actor_of(experiment: Experiment) -> nn.Module:
    """The part of an experiment's policy that decides: observations as the game shows them [R,
    D_obs] -> scores [R, 2] of prune and keep, of which the higher wins.
    """
    shared = next(part for part in experiment.policy.modules() if isinstance(part, Mlp))
    # what the task's transform does before the network sees anything
    norm = nn.LayerNorm(shared.input_features, elementwise_affine=False)
    return nn.Sequential(norm, shared.mlp.get_stateful_net())


def train(config: BenchmarlConfig) -> dict[str, Evaluation]:
    """Trains, writes the run's folder, and judges the policy on the test images.

    Raises:
        ValueError: an unknown name or a wrong value; the message says which would be right.
        OSError: the run's folder can't be written.
    """
    for setting in ("num_envs", "iterations", "minutes", "lr"):
        value = getattr(config, setting)
        if value is not None and value <= 0:
            raise ValueError(f"{setting}={value} must be positive")
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    name = config.run_name or f"benchmarl-{config.algorithm}-seed{config.seed}-{stamp}"
    folder = RUNS / name
    if folder.exists():
        raise ValueError(f"{folder} exists: give another --run-name")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    start = time.monotonic()
    backbone = create_backbone(config.backbone, checkpoint=config.checkpoint).requires_grad_(False)
    data_config = resolve_model_data_config(backbone)
    options = {} if config.alpha is None else {"alpha": config.alpha}
    arguments: dict[str, Any] = {
        "backbone": backbone,
        "dataset": open_images(config.dataset, "train", data_config, augment=True),
        "prune_before": config.prune_before,
        "observation": config.observation,
        "reward": make_reward(config.reward, **options),
    }
    staged = StagedViT(backbone, config.prune_before)
    write_json(
        folder / "config.json",
        {
            key: str(v) if isinstance(v, Path) else v
            for key, v in dataclasses.asdict(config).items()
        },
    )
    experiment = make_experiment(config, TokenPruneTask(config=arguments), folder.resolve())
    run(experiment)

    policy = LearnedPolicy(actor_of(experiment).eval(), config.observation, staged.num_prefix)
    test = open_images(config.dataset, "test", data_config)
    results = {
        "dense": evaluate(PrunedViT(staged, KeepAll()), test),
        config.algorithm: evaluate(PrunedViT(staged, policy), test),
    }
    write_json(
        folder / "report.json",
        {
            "policies": {name: dataclasses.asdict(result) for name, result in results.items()},
            "iterations": experiment.n_iters_performed,
            "seconds": time.monotonic() - start,
            "seed": config.seed,
        },
    )
    return results


def main(arguments: list[str] | None = None) -> None:
    """``python -m trainers.benchmarl``."""
    with ends_in_one_line(ValueError, OSError, ImportError):
        config = tyro.cli(BenchmarlConfig, args=arguments, prog="python -m trainers.benchmarl")
        results = train(config)
        print(table(results))


if __name__ == "__main__":
    main()
