"""BenchMARL's MAPPO and IPPO on a standard game."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from typing import Any

from torch import nn

from prunevit.benchmarks.marl.protocol import Curve, env_maker
from prunevit.extras import needs
from prunevit.trainers.common.config import MappoConfig as OurConfig
from prunevit.trainers.mappo import ADAM_EPS

with needs("marl-peers"):
    from benchmarl.algorithms import IppoConfig, MappoConfig
    from benchmarl.environments.pettingzoo.common import PettingZooClass
    from benchmarl.experiment import Callback, Experiment, ExperimentConfig
    from benchmarl.models.mlp import Mlp, MlpConfig
    from tensordict import TensorDictBase
    from torchrl.envs import EnvBase, PettingZooWrapper

ALGORITHMS = {"mappo": MappoConfig, "ippo": IppoConfig}


class GameTask(PettingZooClass):
    """BenchMARL's own task for PettingZoo, for games of any package. Each copy has a seed of its
    own: BenchMARL gives all the same one, so that they would play the same episodes.

    Args:
        task: of ``TASKS``.
    """

    def __init__(self, task: str) -> None:
        super().__init__(name=task.upper(), config={"task": task})

    def get_env_fun(
        self, num_envs: int, continuous_actions: bool, seed: int | None, device: Any
    ) -> Callable[[], EnvBase]:
        make_game = env_maker(self.config["task"])
        seeds = itertools.count(1_000_003 * (seed or 0))

        def make() -> EnvBase:
            return PettingZooWrapper(
                make_game(),
                categorical_actions=True,
                return_state=True,
                device=device,
                seed=next(seeds),
            )

        return make

    def supports_continuous_actions(self) -> bool:
        return False

    def supports_discrete_actions(self) -> bool:
        return True

    def has_state(self) -> bool:
        return True

    def max_steps(self, env: EnvBase) -> int:
        return 0  # only for evaluations by BenchMARL, which are off

    def has_render(self, env: EnvBase) -> bool:
        return False


class CurveCallback(Callback):
    """Passes each iteration's policy to ``curve``."""

    def __init__(self, curve: Curve) -> None:
        super().__init__()
        self.curve = curve

    def on_setup(self) -> None:
        self.pass_policy(0)

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        self.pass_policy(self.experiment.n_iters_performed + 1)

    def pass_policy(self, iteration: int) -> None:
        policy = self.experiment.policy
        shared = next(part for part in policy.modules() if isinstance(part, Mlp))
        self.curve.after(iteration, shared.mlp.get_stateful_net())


def experiment_config(config: OurConfig, folder: str) -> ExperimentConfig:
    """Our settings under BenchMARL's names; the rest is its default."""
    frames = config.num_envs * config.rollout_steps
    return dataclasses.replace(
        ExperimentConfig.get_from_yaml(),
        prefer_continuous_actions=False,
        gamma=config.gamma,
        lr=config.lr,
        adam_eps=ADAM_EPS,
        clip_grad_val=config.max_grad_norm,
        max_n_iters=config.iterations,
        max_n_frames=None,
        on_policy_collected_frames_per_batch=frames,
        on_policy_n_envs_per_worker=config.num_envs,
        on_policy_n_minibatch_iters=config.epochs,
        on_policy_minibatch_size=max(frames // config.minibatches, 1),
        evaluation=False,
        render=False,
        loggers=[],
        create_json=False,
        save_folder=folder,
    )


def learn(task: str, algorithm: str, config: OurConfig, curve: Curve) -> None:
    """Trains to the end, passing each iteration's policy to ``curve``."""
    model = MlpConfig(
        num_cells=list(config.hidden), layer_class=nn.Linear, activation_class=nn.Tanh
    )
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(
            task=GameTask(task),
            algorithm_config=dataclasses.replace(
                ALGORITHMS[algorithm].get_from_yaml(),
                clip_epsilon=config.clip,
                entropy_coef=config.entropy,
                critic_coef=config.value_weight,
                lmbda=config.gae_lambda,
            ),
            model_config=model,
            seed=config.seed,
            config=experiment_config(config, folder),
            callbacks=[CurveCallback(curve)],
        )
        experiment.run()
