"""BenchMARL learns to prune: ``python -m trainers.benchmarl --algorithm mappo``.

One policy for all tokens, trained by BenchMARL's own algorithms with its logs and checkpoints in
the run's folder, and judged at the end by what it does when it prunes for good.
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
from prunevit.trainers.common.integrations import GAMMA, LibraryConfig, LibraryRun, table
from prunevit.trainers.common.run import COMMAND_ERRORS
from prunevit.trainers.common.settings import Positive, parse_arguments
from prunevit.trainers.common.signals import ends_in_one_line

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
class BenchmarlConfig(LibraryConfig):
    """BenchMARL on the token-pruning game."""

    library = "benchmarl"

    algorithm: Literal["mappo", "ippo", "qmix", "vdn", "iql", "masac", "isac"] = "mappo"
    """Who learns."""
    minutes: Positive | None = None
    """Ends the training after so many minutes, even if iterations are left."""

    @property
    def learner(self) -> str:
        return self.algorithm


class OutOfTime(KeyboardInterrupt):
    """The only end before the last iteration that BenchMARL doesn't report as a failure."""


class Clock(Callback):
    """Ends an experiment when its time is up.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._end = time.monotonic() + seconds

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        if time.monotonic() >= self._end:
            raise OutOfTime


class SavedExperiment(Experiment):
    """Leaves a checkpoint where it is interrupted, too, which BenchMARL can go on from."""

    def _collection_loop(self) -> None:
        try:
            super()._collection_loop()
        except KeyboardInterrupt as stopped:
            # later is too late: closing the experiment takes its collector apart
            self._save_experiment()
            stopped.add_note(f"{self._checkpointed_files[-1]} is saved")
            raise


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
    begun = LibraryRun(config)
    begun.create()
    game = {name: value for name, value in begun.game.items() if name != "device"}
    experiment = make_experiment(config, TokenPruneTask(config=game), begun.folder.resolve())
    run(experiment)
    return begun.conclude(actor_of(experiment), iterations=experiment.n_iters_performed)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m trainers.benchmarl``."""
    with ends_in_one_line(*COMMAND_ERRORS, ImportError):
        config = parse_arguments(BenchmarlConfig, arguments, "benchmarl")
        results = train(config)
        print(table(results))


if __name__ == "__main__":
    main()
