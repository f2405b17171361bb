"""Stable-Baselines3 learns to prune: ``python -m trainers.sb3 --algo ppo``.

One policy for all tokens, trained by SB3's own PPO, A2C or DQN, or by sb3-contrib's MaskablePPO,
and judged at the end by what it does when it prunes for good.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from gymnasium.spaces import Box
from numpy.typing import NDArray
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from tokenprune.agents.actor_critic import LearnedPolicy
from tokenprune.agents.heuristics import KeepAll
from tokenprune.agents.pruned_vit import PrunedViT
from tokenprune.envs.adapters.sb3 import LivingReplay, LivingRollouts, TokenVecEnv
from tokenprune.envs.backbone import StagedViT
from tokenprune.envs.datasets import open_images
from tokenprune.envs.models import create_backbone
from tokenprune.envs.rewards import make_reward
from tokenprune.envs.token_prune import pick_device
from tokenprune.trainers.checkpoint import write_json
from tokenprune.trainers.evaluation import Evaluation, evaluate
from tokenprune.trainers.stopping import ends_in_one_line

RUNS = Path("runs")
GAMMA = 1.0  # an episode has as many steps as there are stages: nothing is far away


@dataclass
class Sb3Config:
    """Stable-Baselines3 on the token-pruning game."""

    algo: Literal["ppo", "a2c", "dqn", "maskable-ppo"] = "ppo"
    """Who learns; maskable-ppo needs pip install 'tokenprune[sb3]'."""
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
    images: int = 128
    """Images that are played at once."""
    iterations: int = 300
    """Rounds in which all images are played to the end."""
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


class Normalised(BaseFeaturesExtractor):
    """A LayerNorm before SB3's networks: the embeddings of a ViT are far from unit size."""

    def __init__(self, observation_space: Box) -> None:
        (size,) = observation_space.shape
        super().__init__(observation_space, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, observations: Tensor) -> Tensor:
        return self.norm(observations)


class TokenDQN(DQN):
    """SB3's DQN, but each token explores for itself: SB3 lets either all environments act at
    random in a step or none, and an image of which half is gone teaches no token anything.
    """

    def predict(
        self,
        observation: NDArray[Any] | dict[str, NDArray[Any]],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        action, state = self.policy.predict(observation, state, episode_start, deterministic)
        if deterministic:
            return action, state
        explores = np.random.rand(*action.shape) < self.exploration_rate
        return np.where(explores, np.random.randint(2, size=action.shape), action), state


def make_algorithm(config: Sb3Config, env: TokenVecEnv, stages: int, folder: Path) -> BaseAlgorithm:
    """SB3's algorithm with what the game asks of it: rollouts of whole episodes, and the buffers
    that know of pruned tokens.

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
        },
        "tensorboard_log": str(folder),
        "seed": config.seed,
        "device": env.device,
    }
    on_policy: dict[str, Any] = {"n_steps": stages, "ent_coef": 0.003}
    # an iteration's decisions in four parts
    minibatch = max(env.num_envs * stages // 4, 1)
    if config.algo == "ppo":
        return PPO(
            "MlpPolicy", rollout_buffer_class=LivingRollouts, batch_size=minibatch, n_epochs=4,
            **on_policy, **shared,
        )  # fmt: skip
    if config.algo == "a2c":
        return A2C("MlpPolicy", rollout_buffer_class=LivingRollouts, **on_policy, **shared)
    if config.algo == "dqn":
        return TokenDQN(
            "MlpPolicy", replay_buffer_class=LivingReplay, replay_buffer_kwargs={"gamma": GAMMA},
            buffer_size=200_000, learning_starts=env.num_envs * stages, train_freq=stages,
            gradient_steps=8, batch_size=2048, target_update_interval=10 * env.num_envs,
            exploration_fraction=0.5, **shared,
        )  # fmt: skip
    from sb3_contrib import MaskablePPO

    from tokenprune.envs.adapters.sb3_contrib import LivingMaskedRollouts

    return MaskablePPO(
        "MlpPolicy", rollout_buffer_class=LivingMaskedRollouts, batch_size=minibatch, n_epochs=4,
        **on_policy, **shared,
    )  # fmt: skip


def actor_of(model: BaseAlgorithm) -> nn.Module:
    """The part of an SB3 model that decides: observations [R, D_obs] -> scores [R, 2] of prune and
    keep, of which the higher wins.
    """
    policy: Any = model.policy
    if isinstance(policy, ActorCriticPolicy) or hasattr(policy, "mlp_extractor"):
        return nn.Sequential(
            policy.features_extractor, policy.mlp_extractor.policy_net, policy.action_net
        )
    return nn.Sequential(policy.q_net.features_extractor, policy.q_net.q_net)


def train(config: Sb3Config) -> dict[str, Evaluation]:
    """Trains, writes the run's folder, and judges the policy on the test images.

    Raises:
        ValueError: an unknown name or a wrong value; the message says which would be right.
        OSError: the run's folder can't be written.
    """
    for setting in ("images", "iterations", "lr"):
        if getattr(config, setting) <= 0:
            raise ValueError(f"{setting}={getattr(config, setting)} must be positive")
    name = config.run_name or f"sb3-{config.algo}-seed{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RUNS / name
    if folder.exists():
        raise ValueError(f"{folder} exists: give another --run-name")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    start = time.monotonic()
    backbone = create_backbone(config.backbone, checkpoint=config.checkpoint).requires_grad_(False)
    data_config = resolve_model_data_config(backbone)
    options = {} if config.alpha is None else {"alpha": config.alpha}
    env = TokenVecEnv(
        config.images,
        backbone=backbone,
        dataset=open_images(config.dataset, "train", data_config, augment=True),
        prune_before=config.prune_before,
        observation=config.observation,
        reward=make_reward(config.reward, **options),
        device=pick_device(config.device),
    )
    write_json(
        folder / "config.json",
        {
            key: str(v) if isinstance(v, Path) else v
            for key, v in dataclasses.asdict(config).items()
        },
    )
    staged = StagedViT(backbone, config.prune_before)
    model = make_algorithm(config, env, staged.num_stages, folder)
    steps = config.iterations * staged.num_stages * env.num_envs
    model.learn(steps, progress_bar=False, tb_log_name="log")
    model.save(folder / "model.zip")
    env.close()

    policy = LearnedPolicy(actor_of(model).eval(), config.observation, staged.num_prefix)
    test = open_images(config.dataset, "test", data_config)
    results = {
        "dense": evaluate(PrunedViT(staged, KeepAll()), test),
        config.algo: evaluate(PrunedViT(staged, policy), test),
    }
    write_json(
        folder / "report.json",
        {
            "policies": {name: dataclasses.asdict(result) for name, result in results.items()},
            "seconds": time.monotonic() - start,
            "seed": config.seed,
        },
    )
    return results


def table(results: dict[str, Evaluation]) -> str:
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


def main(arguments: list[str] | None = None) -> None:
    """``python -m trainers.sb3``."""
    with ends_in_one_line(ValueError, OSError, ImportError):
        config = tyro.cli(Sb3Config, args=arguments, prog="python -m trainers.sb3")
        results = train(config)
        print(table(results))


if __name__ == "__main__":
    main()
