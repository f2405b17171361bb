"""What ``trainers.mappo`` can train on: a game, the actor that fits it, and its evaluation."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from prunevit.agents.calibrate import IMAGES, CalibrationError, calibrate
from prunevit.agents.policies.actor_critic import Actor
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.agents.run_reader import RUN_CALIBRATION
from prunevit.envs.batched.make_pettingzoo import make_pettingzoo
from prunevit.envs.batched.pettingzoo import BatchedPettingZoo
from prunevit.envs.batched.protocol import BatchedEnv
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import find_bad_images, open_images
from prunevit.envs.data_config import model_data_config
from prunevit.envs.devices import pick_device
from prunevit.envs.game import TokenGame
from prunevit.envs.measures import Measure
from prunevit.envs.rewards import make_reward
from prunevit.envs.vit.torch_compile import check_compiler
from prunevit.trainers.common.actors import greedy_policy, make_actor, start_from
from prunevit.trainers.common.backbones import load_backbone
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.config import PETTINGZOO_PREFIX, MappoConfig
from prunevit.trainers.common.distributed import ALONE, Ranks
from prunevit.trainers.common.evaluation import evaluate
from prunevit.trainers.common.report import draw_curve, report_pruning
from prunevit.trainers.common.rollout import masked_log_probs, sample

LONGEST_EPISODE = 2_000  # steps in an evaluation, as some games never end
EVALUATION_SEED = 987_654_321


def list_bad_images(dataset: str) -> Collection[str]:
    """Returns a folder's damaged files and lists them on the standard error output; raises what
    ``find_bad_images`` raises.
    """
    bad = find_bad_images(dataset)
    print(f"{len(bad)} damaged images are skipped", *bad.values(), sep="\n", file=sys.stderr)
    return bad.keys()


class TokenPruneExperiment:
    """Token pruning on a backbone and a dataset.

    Attributes:
        env: the game that the trainer steps.
    """

    def __init__(self, config: MappoConfig, ranks: Ranks = ALONE) -> None:
        self.config = config
        self.ranks = ranks
        model = load_backbone(config, 0 if config.accuracy == "embedding" else None)
        self.model = model.to(getattr(torch, config.backbone_dtype))
        self.data_config = model_data_config(self.model)
        self.backbone = config.stage(self.model)
        options = {
            name: getattr(config, name)
            for name in ("alpha", "beta", "accuracy")
            if getattr(config, name) is not None
        }
        # evaluations and the report use no compiler, like anyone who loads the policy later
        played = self.backbone
        if config.compile:
            check_compiler(played.device)
            played = config.stage(self.model, torch_compile=True)
        game = TokenGame(played, make_reward(config.reward, **options), config.rollouts_per_image)
        self.workers = ranks.workers(config.workers, self.backbone.device)
        self.skipped = list_bad_images(config.dataset) if config.skip_bad_images else ()
        self.env = BatchedTokenPrune(
            game,
            open_images(
                config.dataset,
                "train",
                self.data_config,
                augment=config.augment,
                skip=self.skipped,
            ),
            ranks.share_of("num_envs", config.num_envs),
            config.observation,
            config.alpha_range,
            (ranks.rank, ranks.count),
            config.cache_gb * 1e9,
            self.workers,
        )
        self.validation = open_images(
            config.dataset, "validation", self.data_config, skip=self.skipped
        )

    def make_actor(self, init: Path | None = None) -> nn.Module:
        """An actor for the game, with the weights in the folder ``init`` or with fresh ones; raises
        what ``start_from`` raises.
        """
        actor = make_actor(self.config, self.backbone)
        if init is not None:
            start_from(init, self.config, self.backbone, actor)
        return actor

    def pruned(self, actor: nn.Module) -> PrunedViT:
        """The backbone pruned by ``actor``'s greedy decisions."""
        return PrunedViT(self.backbone, greedy_policy(self.config, self.backbone, actor))

    def prefetch(self, seeds: Iterable[int]) -> None:
        """Lets the game load images ahead of time, for resets with these seeds."""
        self.env.prefetch(seeds)

    def evaluate(self, actor: nn.Module) -> dict[str, float]:
        """Evaluates the greedy policy on validation, as ``Monitor.evaluate``."""
        size = self.config.eval_size
        result = evaluate(self.pruned(actor), self.validation, size, self.ranks, self.workers)
        return {
            f"validation_{result.measure}": result.score,
            "validation_gmacs": result.gmacs,
            "validation_keep_ratio": sum(result.kept) / len(result.kept),
        }

    def progress(self, record: dict[str, float]) -> str:
        """What the progress bar shows of an iteration's record."""
        shown = {name: record[name] for name in get_args(Measure) if name in record}
        shown |= {"kept": record["keep_ratio"], "reward": record["reward"]}
        return " ".join(f"{name} {value:.3f}" for name, value in shown.items())

    def activity(self) -> str:
        """What the last iteration trained on, for the message of an error in it."""
        images = self.env.indices[:: self.env.rollouts_per_start].tolist()
        return f"playing training images {' '.join(map(str, images))}"

    def report(self, actor: nn.Module, folder: Path) -> dict[str, Any]:
        """Calibrates and evaluates the trained actor, and draws the run's pictures."""
        config = self.config
        test = open_images(config.dataset, "test", self.data_config, skip=self.skipped)
        learned = self.pruned(actor)
        try:
            calibration = calibrate(learned, self.validation, min(IMAGES, config.eval_size))
            write_json(folder / RUN_CALIBRATION, calibration.to_json())
        except CalibrationError as error:
            print(f"The policy is not calibrated: {error}", file=sys.stderr)
        return report_pruning(learned, config, self.validation, test, folder)


class PettingZooExperiment:
    """Any PettingZoo ``ParallelEnv`` with homogeneous agents and discrete actions. Its methods are
    those of ``TokenPruneExperiment``.
    """

    def __init__(self, config: MappoConfig, ranks: Ranks = ALONE) -> None:
        self.config = config
        num_envs = ranks.share_of("num_envs", config.num_envs)
        device = str(pick_device(config.device))
        try:
            self._make = make_pettingzoo(
                config.env.removeprefix(PETTINGZOO_PREFIX), **config.env_kwargs
            )
            self.env: BatchedEnv = BatchedPettingZoo(
                self._make,
                num_envs,
                device,
                with_state=config.critic == "central",
                first=ranks.rank * num_envs,
            )
        # a missing module, arguments that the environment doesn't take, or no ParallelEnv
        except (ImportError, TypeError, AssertionError) as error:
            raise ValueError(f"{config.env} can't be made: {error}") from error

    def make_actor(self, init: Path | None = None) -> nn.Module:
        del init
        config = self.config
        size, actions = self.env.observation_space.shape[0], int(self.env.action_space.n)
        return Actor(size, actions, config.hidden, config.hidden_layers)

    def prefetch(self, seeds: Iterable[int]) -> None:
        del seeds

    @torch.no_grad()
    def evaluate(self, actor: nn.Module) -> dict[str, float]:
        device = str(self.env.device)
        with closing(
            BatchedPettingZoo(self._make, self.config.num_envs, device, with_state=False)
        ) as env:
            return {
                "validation_episode_return": self._mean_return(env, actor, greedy=True),
                "validation_sampled_return": self._mean_return(env, actor, greedy=False),
            }

    def _mean_return(self, env: BatchedEnv, actor: nn.Module, greedy: bool) -> float:
        """Mean return over equally many episodes of each environment, since otherwise short ones
        would count more. After ``LONGEST_EPISODE`` steps an episode is cut in two.
        """
        observed = env.reset(EVALUATION_SEED)
        generator = torch.Generator(env.device).manual_seed(EVALUATION_SEED)
        wanted = -(-self.config.eval_size // env.num_envs)
        returns: list[list[float]] = [[] for _ in range(env.num_envs)]
        return_so_far = torch.zeros(env.num_envs, device=env.device)
        steps = torch.zeros(env.num_envs, dtype=torch.int64, device=env.device)
        while any(len(mine) < wanted for mine in returns):
            mask = observed.action_mask[observed.alive]
            log_probs = masked_log_probs(actor(observed.living()), mask)
            actions = torch.zeros(observed.alive.shape, dtype=torch.int64, device=env.device)
            chosen = log_probs.argmax(-1) if greedy else sample(log_probs, generator)
            actions[observed.alive] = chosen
            transition = env.step(actions)
            return_so_far += transition.reward.mean(1)
            steps += 1
            ended = transition.terminated | transition.truncated | (steps == LONGEST_EPISODE)
            for env_index in ended.nonzero().flatten().tolist():
                if len(returns[env_index]) < wanted:
                    returns[env_index].append(float(return_so_far[env_index]))
            return_so_far[ended], steps[ended] = 0, 0
            observed = transition.observations
        return sum(map(sum, returns)) / (wanted * env.num_envs)

    def progress(self, record: dict[str, float]) -> str:
        return f"return {record.get('episode_return', float('nan')):.2f}"

    def activity(self) -> str:
        return f"playing {self.env.num_envs} episodes of {self.config.env}"

    def report(self, actor: nn.Module, folder: Path) -> dict[str, Any]:
        draw_curve(folder)
        return {"policies": {"learned": self.evaluate(actor)}}


Experiment = TokenPruneExperiment | PettingZooExperiment


def make_experiment(config: MappoConfig, ranks: Ranks = ALONE) -> Experiment:
    """Makes the experiment that ``config`` describes, or a rank's share of it."""
    if config.is_token_prune:
        return TokenPruneExperiment(config, ranks)
    return PettingZooExperiment(config, ranks)
