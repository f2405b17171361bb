"""Trains a pruning policy with Stable-Baselines3: ``python -m trainers.sb3 --algo ppo``.

One policy serves all tokens. SB3's own PPO, A2C or DQN trains it, or sb3-contrib's MaskablePPO. At
the end it is evaluated in a ViT that really drops the pruned tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from gymnasium.spaces import Box
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from prunevit.envs.adapters.sb3 import TokenDQN, TokenRolloutBuffer, TokenVecEnv
from prunevit.extras import needs
from prunevit.progress import progress_bar
from prunevit.trainers.common.evaluation import Evaluation
from prunevit.trainers.common.integrations import GAMMA, LibraryConfig, LibraryRun, run_command


@dataclass
class Sb3Config(LibraryConfig):
    """How Stable-Baselines3 trains on the token-pruning game."""

    library = "sb3"

    algo: Literal["ppo", "a2c", "dqn", "maskable-ppo"] = "ppo"
    """The algorithm. maskable-ppo needs pip install -e '.[sb3]'."""

    @property
    def learner(self) -> str:
        return self.algo


class Normalised(BaseFeaturesExtractor):
    """A LayerNorm before SB3's networks, since a ViT's embeddings are far from unit variance."""

    def __init__(self, observation_space: Box) -> None:
        (size,) = observation_space.shape
        super().__init__(observation_space, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, observations: Tensor) -> Tensor:
        return self.norm(observations)


def tensorboard_folder(folder: Path) -> str | None:
    """Where SB3 writes its TensorBoard log; None if TensorBoard is missing, as SB3 would fail."""
    return str(folder) if find_spec("tensorboard") else None


def make_algorithm(config: Sb3Config, env: TokenVecEnv, stages: int, folder: Path) -> BaseAlgorithm:
    """Makes SB3's algorithm, set up for the game: rollouts of whole episodes, and buffers that
    leave out the steps of pruned tokens.

    Args:
        config: the settings.
        env: the game, one environment per token.
        stages: number of stages, the steps of an episode.
        folder: the run's folder.

    Raises:
        ImportError: sb3-contrib is needed and missing.
    """
    shared: dict[str, Any] = {
        "env": env,
        "learning_rate": config.lr,
        "gamma": GAMMA,
        "policy_kwargs": {
            "net_arch": list(config.hidden),
            "features_extractor_class": Normalised,
            "activation_fn": nn.GELU,
        },
        "tensorboard_log": tensorboard_folder(folder),
        "seed": config.seed,
        "device": env.device,
    }
    if config.algo == "dqn":
        return TokenDQN(
            "MlpPolicy", buffer_size=200_000, learning_starts=env.num_envs * stages,
            train_freq=stages, gradient_steps=8, batch_size=2048,
            target_update_interval=10 * env.num_envs, exploration_fraction=0.5, **shared,
        )  # fmt: skip
    shared |= {"n_steps": stages, "ent_coef": 0.003}
    if config.algo == "a2c":
        return A2C("MlpPolicy", rollout_buffer_class=TokenRolloutBuffer, **shared)
    # an iteration has four minibatches
    shared |= {"batch_size": max(env.num_envs * stages // 4, 1), "n_epochs": 4}
    if config.algo == "ppo":
        return PPO("MlpPolicy", rollout_buffer_class=TokenRolloutBuffer, **shared)
    # our adapter comes first: without sb3-contrib, its error names the extra
    from prunevit.envs.adapters.sb3_contrib import MaskableTokenRolloutBuffer

    with needs("sb3"):
        from sb3_contrib import MaskablePPO

    return MaskablePPO("MlpPolicy", rollout_buffer_class=MaskableTokenRolloutBuffer, **shared)


def actor_of(model: BaseAlgorithm) -> nn.Module:
    """Extracts a model's actor: observations [R, D_obs] -> scores [R, 2] of prune and keep, of
    which the higher wins.
    """
    policy: Any = model.policy
    if hasattr(policy, "mlp_extractor"):
        return nn.Sequential(
            policy.features_extractor, policy.mlp_extractor.policy_net, policy.action_net
        )
    return nn.Sequential(policy.q_net.features_extractor, policy.q_net.q_net)


def train(config: Sb3Config) -> dict[str, Evaluation]:
    """Trains, writes the run's folder, and evaluates the policy on the test images.

    Raises:
        ValueError: a name is unknown or a value is wrong.
        TrainingError: the run's folder exists.
        OSError: the run's folder isn't writable.
    """
    run = LibraryRun(config)
    env = TokenVecEnv(config.images, **run.game)
    run.create()
    stages = run.staged.num_stages
    model = make_algorithm(config, env, stages, run.folder)
    steps = config.iterations * stages
    with (
        progress_bar(steps, "steps", title=run.folder.name) as bar,
        run.keeping(model.save, "model.zip"),
    ):

        def count(*_: object) -> bool:
            bar.update()
            return True  # go on

        model.learn(steps * env.num_envs, callback=count, tb_log_name="log")
    env.close()
    return run.conclude(actor_of(model))


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m trainers.sb3``."""
    run_command(Sb3Config, train, arguments, __doc__)


if __name__ == "__main__":
    main()
