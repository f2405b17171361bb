"""Trains a pruning policy with RLlib: ``python -m trainers.rllib --num-env-runners 2``.

One policy serves all tokens. RLlib's PPO (on its current API stack) trains it, with environments in
processes of their own. At the end it is evaluated in a ViT that really drops the pruned tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prunevit.agents.policies.actor_critic import Actor, Critic
from prunevit.envs.adapters.rllib import TokenEnvRunner, TokenPruneMulti
from prunevit.extras import needs
from prunevit.progress import progress_bar
from prunevit.trainers.common.evaluation import Evaluation
from prunevit.trainers.common.integrations import GAMMA, LibraryConfig, LibraryRun, run_command
from prunevit.trainers.common.settings import Count, Workers

with needs("rllib"):
    import ray
    from ray.rllib.algorithms.ppo import PPO, PPOConfig
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, ValueFunctionAPI
    from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.rllib.core.rl_module.torch import TorchRLModule

POLICY = "token"


@dataclass
class RllibConfig(LibraryConfig):
    """How RLlib's PPO trains on the token-pruning game."""

    library = "rllib"

    num_env_runners: Workers = 0
    """Processes that play the game, on CPUs. 0 plays it in the learner's process."""
    images: Count = 64
    """Images per iteration, one episode each. The processes share them evenly."""
    iterations: Count = 60

    @property
    def learner(self) -> str:
        return "ppo"


class TokenModule(TorchRLModule, ValueFunctionAPI, InferenceOnlyAPI):
    """The networks of ``trainers.mappo`` as an ``RLModule``."""

    def setup(self) -> None:
        (size,) = self.observation_space.shape
        hidden = self.model_config["hidden"]
        self.actor = Actor(size, self.action_space.n, hidden)
        self.critic = Critic(size, hidden)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.actor(batch[Columns.OBS])}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        return self.critic(batch[Columns.OBS])

    def get_non_inference_attributes(self) -> list[str]:
        return ["critic"]


def policy_of(agent: str, episode: Any, **kwargs: Any) -> str:
    """Maps every agent to the one policy, as RLlib asks for it."""
    return POLICY


def make_algorithm(config: RllibConfig, game: dict[str, Any], tokens: int, stages: int) -> PPO:
    """Makes RLlib's PPO, set up for the game: whole episodes, in batches on the tensor game.

    Args:
        config: the settings.
        game: arguments of the environment.
        tokens: number of patch tokens.
        stages: number of stages, the steps of an episode.

    Raises:
        ValueError: the processes can't share the images evenly.
    """
    runners = max(config.num_env_runners, 1)
    if config.images % runners:
        raise ValueError(
            f"images={config.images} must be a multiple of num_env_runners={config.num_env_runners}"
        )
    decisions = config.images * tokens
    module = RLModuleSpec(module_class=TokenModule, model_config={"hidden": tuple(config.hidden)})
    settings = (
        PPOConfig()
        .environment(TokenPruneMulti, env_config=game, disable_env_checking=True)
        .env_runners(
            env_runner_cls=TokenEnvRunner,
            num_env_runners=config.num_env_runners,
            num_envs_per_env_runner=config.images // runners,
            # a pruned token's reward is only complete when the episode ends
            batch_mode="complete_episodes",
            # RLlib drops a sample that takes longer than a minute, as it can on a busy machine
            sample_timeout_s=None,
        )
        .multi_agent(policies={POLICY}, policy_mapping_fn=policy_of, count_steps_by="agent_steps")
        .rl_module(rl_module_spec=MultiRLModuleSpec(rl_module_specs={POLICY: module}))
        .learners(num_learners=0)
        .training(
            # RLlib samples until it has so many steps; pruned tokens count: one round of images
            train_batch_size_per_learner=decisions * stages,
            minibatch_size=max(decisions // 4, 1),
            num_epochs=4,
            lr=config.lr,
            gamma=GAMMA,
            lambda_=1.0,
            clip_param=0.2,
            entropy_coeff=0.003,
            use_kl_loss=False,
            grad_clip=0.5,
        )
        .debugging(seed=config.seed, log_level="ERROR")
    )
    return settings.build_algo()


def train(config: RllibConfig) -> dict[str, Evaluation]:
    """Trains, writes the run's folder, and evaluates the policy on the test images.

    Raises:
        ValueError: a name is unknown or a value is wrong.
        TrainingError: the run's folder exists.
        OSError: the run's folder isn't writable.
    """
    run = LibraryRun(config)
    game = run.game
    if config.num_env_runners:
        game["device"] = "cpu"  # Ray gives these processes no GPU
    started_here = not ray.is_initialized()
    algorithm = make_algorithm(config, game, run.staged.num_patches, run.staged.num_stages)
    try:
        run.create()
        start = time.monotonic()
        with (
            run.keeping(lambda path: algorithm.save_to_path(path.resolve()), "checkpoint"),
            (run.folder / "metrics.jsonl").open("w", encoding="utf-8") as log,
            progress_bar(
                config.iterations,
                "iterations",
                title=run.folder.name,
                items=range(1, config.iterations + 1),
            ) as iterations,
        ):
            for iteration in iterations:
                played = algorithm.train()["env_runners"]
                row = {
                    "iteration": iteration,
                    # mean over images of the sum over tokens
                    "episode_return": played["episode_return_mean"],
                    "episodes": played["num_episodes_lifetime"],
                    "seconds": time.monotonic() - start,
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                iterations.set_postfix_str(f"return {row['episode_return']:.2f}")
        actor = algorithm.get_module(POLICY).actor.cpu()
    finally:
        algorithm.stop()
        if started_here:
            ray.shutdown()
    return run.conclude(actor)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m trainers.rllib``."""
    run_command(RllibConfig, train, arguments, __doc__)


if __name__ == "__main__":
    main()
