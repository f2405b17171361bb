"""Trains a pruning policy with BenchMARL: ``python -m trainers.benchmarl --algorithm mappo``.

One policy serves all tokens. BenchMARL's own algorithms train it, with their logs and checkpoints
in the run's folder. At the end it is evaluated in a ViT that really drops the pruned tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from prunevit.envs.adapters.benchmarl import TokenPruneTask
from prunevit.envs.devices import pick_device
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.extras import needs
from prunevit.trainers.common.evaluation import Evaluation
from prunevit.trainers.common.integrations import GAMMA, LibraryConfig, LibraryRun, run_command
from prunevit.trainers.common.settings import Positive

with needs("benchmarl"):
    from benchmarl.algorithms import algorithm_config_registry
    from benchmarl.algorithms.common import AlgorithmConfig
    from benchmarl.experiment import Callback, Experiment, ExperimentConfig
    from benchmarl.models.mlp import Mlp, MlpConfig
    from tensordict import TensorDictBase

EPOCHS = MINIBATCHES = 4  # per iteration of an on-policy algorithm
REPLAYED_ITERATIONS = 8  # frames are large: each holds the observations of all tokens of an image
REPLAY_STEPS = 8  # gradient steps per iteration of an off-policy algorithm
EXPLORING = 0.5  # share of the training over which exploration is annealed

Algorithm = Literal["mappo", "ippo", "qmix", "vdn", "iql", "masac", "isac"]


@dataclass
class BenchmarlConfig(LibraryConfig):
    """How BenchMARL trains on the token-pruning game."""

    library = "benchmarl"

    algorithm: Algorithm = "mappo"
    """The algorithm."""
    minutes: Positive | None = None
    """Time limit of the training in minutes. By default there is none."""

    @property
    def learner(self) -> str:
        return self.algorithm


class OutOfTime(KeyboardInterrupt):
    """Ends the training early. BenchMARL reports any other exception as a failure."""


class Clock(Callback):
    """Ends an experiment at its time limit.

    Args:
        seconds: the limit, counted from now.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._end = time.monotonic() + seconds

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        if time.monotonic() >= self._end:
            raise OutOfTime


class SavedExperiment(Experiment):
    """An experiment that also saves a checkpoint, which BenchMARL can resume, when interrupted."""

    def _collection_loop(self) -> None:
        try:
            super()._collection_loop()
        except KeyboardInterrupt as stopped:
            # save before the experiment is closed, which dismantles its collector
            self._save_experiment()
            stopped.add_note(f"{self._checkpointed_files[-1]} is saved")
            raise


def algorithm_config(name: str) -> AlgorithmConfig:
    """BenchMARL's default settings of an algorithm, adapted to the game."""
    config = algorithm_config_registry[name].get_from_yaml()
    if name in ("mappo", "ippo"):
        # lambda 1 doesn't bootstrap: the values of pruned tokens can't tell images apart
        return dataclasses.replace(config, lmbda=1.0, entropy_coef=3e-4)
    return config


def experiment_config(config: BenchmarlConfig, stages: int, folder: Path) -> ExperimentConfig:
    """BenchMARL's default settings of an experiment, adapted to the game: iterations of whole
    episodes, and a replay buffer for a few iterations.
    """
    frames = config.images * stages
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
        on_policy_n_envs_per_worker=config.images,
        on_policy_n_minibatch_iters=EPOCHS,
        on_policy_minibatch_size=max(frames // MINIBATCHES, 1),
        off_policy_collected_frames_per_batch=frames,
        off_policy_n_envs_per_worker=config.images,
        off_policy_n_optimizer_steps=REPLAY_STEPS,
        off_policy_train_batch_size=frames,
        off_policy_memory_size=REPLAYED_ITERATIONS * frames,
        # the policy is evaluated once, on the test images
        evaluation=False,
        render=False,
        loggers=["csv"],
        create_json=False,
        save_folder=str(folder),
        checkpoint_at_end=True,
        exclude_buffer_from_checkpoint=True,
    )


def make_experiment(config: BenchmarlConfig, task: TokenPruneTask, folder: Path) -> Experiment:
    """Makes BenchMARL's experiment, ready to run.

    Args:
        config: the settings.
        task: the game.
        folder: an existing folder, where BenchMARL writes.
    """
    stages = StagedViT(task.config["backbone"], task.config["prune_before"]).num_stages
    return SavedExperiment(
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
    """Trains to the last iteration or to the time limit."""
    with contextlib.suppress(OutOfTime):
        experiment.run()


def actor_of(experiment: Experiment) -> nn.Module:
    """Extracts the policy's actor: the game's observations [R, D_obs] -> scores [R, 2] of prune and
    keep, of which the higher wins.
    """
    shared = next(part for part in experiment.policy.modules() if isinstance(part, Mlp))
    # the task's transform does this before the network
    norm = nn.LayerNorm(shared.input_features, elementwise_affine=False)
    return nn.Sequential(norm, shared.mlp.get_stateful_net())


def train(config: BenchmarlConfig) -> dict[str, Evaluation]:
    """Trains, writes the run's folder, and evaluates the policy on the test images.

    Raises:
        ValueError: a name is unknown or a value is wrong.
        TrainingError: the run's folder exists.
        OSError: the run's folder isn't writable.
    """
    begun = LibraryRun(config)
    begun.create()
    game = {name: value for name, value in begun.game.items() if name != "device"}
    experiment = make_experiment(config, TokenPruneTask(config=game), begun.folder.resolve())
    run(experiment)
    return begun.conclude(actor_of(experiment), iterations=experiment.n_iters_performed)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m trainers.benchmarl``."""
    run_command(BenchmarlConfig, train, arguments, __doc__)


if __name__ == "__main__":
    main()
