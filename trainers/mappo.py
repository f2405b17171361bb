"""Multi-Agent PPO (Yu et al. 2022, arXiv 2103.01955): ``python -m trainers.mappo``.

From top to bottom: the learner, rollouts, advantages, losses, updates, the training. It learns any
``BatchedEnv``; ``experiments`` has those that the command can train on.

Where several rollouts begin in the same state, their advantages are compared beside the critic.
With ``--critic none`` that is the only baseline, as in RLOO (arXiv 2402.14740) and GRPO.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from prunevit.agents.policies.actor_critic import CommunicatingActor, Critic, logits_of
from prunevit.envs.batched.protocol import BatchedEnv, Observations
from prunevit.trainers.common import loop
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.closing import AFTER_RUN, say_where_and_what_next
from prunevit.trainers.common.config import MappoConfig, parse
from prunevit.trainers.common.distributed import ALONE, Ranks, join_ranks
from prunevit.trainers.common.experiments import Experiment, make_experiment
from prunevit.trainers.common.gae import gae, leave_one_out
from prunevit.trainers.common.loop import Monitor, NotFiniteError
from prunevit.trainers.common.report import format_report
from prunevit.trainers.common.rollout import Batch, Rollout, join, masked_log_probs, sample
from prunevit.trainers.common.run import (
    COMMAND_ERRORS,
    RunFolder,
    device_of,
    iteration_seed,
    open_run,
    resume_flags,
)
from prunevit.trainers.common.signals import ends_in_one_line, says_how_to_go_on
from prunevit.trainers.common.value_norm import ValueNorm

ADAM_EPS = 1e-5


class Learner(nn.Module):
    """Actor, critic, value normalisation and optimizer.

    Args:
        actor: observations [R, D_obs] -> logits [R, A].
        env: the game, for its sizes.
        config: the settings.
        ranks: the processes that learn together.
    """

    def __init__(
        self, actor: nn.Module, env: BatchedEnv, config: MappoConfig, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        self.config = config
        self.ranks = ranks
        self.actor = actor.to(env.device)
        self.communicates = isinstance(actor, CommunicatingActor)
        self.critic: Critic | None = None
        if config.critic != "none":
            inputs = env.observation_space.shape[0]
            if config.critic == "central":
                inputs += env.state_space.shape[0]
            self.critic = Critic(
                inputs, config.critic_hidden, config.critic_norm, config.hidden_layers
            ).to(env.device)
        self.value_norm = ValueNorm(config.value_norm_decay).to(env.device)
        learned = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learned, lr=config.lr, eps=ADAM_EPS)
        # called in place of this module to learn; not registered as a part of it
        object.__setattr__(self, "wrapped", ranks.wrap(self))

    wrapped: nn.Module

    def forward(
        self,
        observation: Tensor,
        seen: Tensor,
        mask: Tensor,
        state: Tensor | None,
        state_of: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """``log_probs``, and the critic's normalised values [R] if there is one: all that has
        gradients.
        """
        values = None
        if self.critic is not None:
            values = self.critic(observation, state, state_of).index_select(0, seen)
        return self.log_probs(observation, seen, mask, state_of), values

    def log_probs(
        self, observation: Tensor, seen: Tensor, mask: Tensor, state_of: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of the actions.

        Args:
            observation: the distinct observations, [U, D_obs].
            seen: which of them each agent sees, int64 [R].
            mask: actions allowed, bool [R, A].
            state_of: which state each distinct observation was made in, int64 [U]. Agents that
                communicate do so within their state; None if they don't.

        Returns:
            [R, A].
        """
        logits = logits_of(self.actor, observation, state_of)
        return masked_log_probs(logits.index_select(0, seen), mask)

    @torch.no_grad()
    def values(self, observed: Observations) -> Tensor:
        """V of every agent [B, N]; zero for pruned agents, and for all without a critic."""
        dense = torch.zeros(observed.alive.shape, device=observed.alive.device)
        if self.critic is not None:
            observation, seen = observed.distinct()
            sees_state = self.config.critic == "central"
            states = observed.distinct_states() if sees_state else (None, None)
            normed = self.critic(observation, *states).index_select(0, seen)
            dense[observed.alive] = self.value_norm.denormalise(normed)
        return dense


@torch.no_grad()
def collect_rollout(
    env: BatchedEnv,
    learner: Learner,
    observed: Observations,
    steps: int,
    generator: torch.Generator,
) -> tuple[Rollout, Observations]:
    """Takes ``steps`` steps with sampled actions; returns them and the observation after them."""
    rollout = Rollout()
    value = learner.values(observed)
    for _ in range(steps):
        mask = observed.action_mask[observed.alive]
        with record_function("policy and critic"):
            state_of = observed.distinct_states()[1] if learner.communicates else None
            log_probs = learner.log_probs(*observed.distinct(), mask, state_of)
            action = sample(log_probs, generator)
        joint = torch.zeros(observed.alive.shape, dtype=torch.int64, device=env.device)
        joint[observed.alive] = action
        transition = env.step(joint)

        with record_function("policy and critic"):
            following = learner.values(transition.observations)
        next_value, next_alive = following, transition.observations.alive
        if transition.final is not None:
            # bootstrap from the truncated episode's own last observation, not from the first one
            # of the next episode
            cut = transition.truncated[:, None]
            next_value = torch.where(cut, learner.values(transition.final), next_value)
            next_alive = torch.where(cut, transition.final.alive, next_alive)
        rollout.observations.append(observed)
        rollout.action.append(action)
        rollout.log_prob.append(log_probs.gather(1, action[:, None]).squeeze(1))
        rollout.value.append(value)
        rollout.next_value.append(next_value)
        rollout.next_alive.append(next_alive & ~transition.terminated[:, None])
        rollout.reward.append(transition.reward)
        rollout.ended.append(transition.terminated | transition.truncated)
        for name, metric in transition.metrics.items():
            rollout.metrics.setdefault(name, []).append(metric)
        observed, value = transition.observations, following
    return rollout, observed


def compute_advantages(rollout: Rollout, learner: Learner, env: BatchedEnv) -> Batch:
    """GAE over the living agents' decisions, compared among rollouts of the same start (leave one
    out) where there are several, then normalised.
    """
    config = learner.config
    alive = torch.stack([observed.alive for observed in rollout.observations])
    value = torch.stack(rollout.value)
    advantage = gae(
        torch.stack(rollout.reward),
        value,
        torch.stack(rollout.next_value),
        alive,
        torch.stack(rollout.next_alive),
        torch.stack(rollout.ended),
        config.gamma,
        1.0 if learner.critic is None else config.gae_lambda,
    )
    returns = (advantage + value)[alive]
    if env.rollouts_per_start > 1:
        # without a critic the dead have returns like the living; with one they have no value to
        # subtract from theirs, so they can't be compared with the living
        compared = alive if learner.critic is not None else torch.ones_like(alive)
        advantage = leave_one_out(advantage, compared, env.rollouts_per_start)
    observation, seen = join([observed.distinct() for observed in rollout.observations])
    state, state_of = None, None
    if config.critic == "central" or learner.communicates:
        state, state_of = join([observed.distinct_states() for observed in rollout.observations])
    return Batch(
        observation=observation,
        seen=seen,
        state=state if config.critic == "central" else None,
        state_of=state_of,
        keeps_states_whole=learner.communicates,
        mask=torch.cat([observed.action_mask[observed.alive] for observed in rollout.observations]),
        action=torch.cat(rollout.action),
        log_prob=torch.cat(rollout.log_prob),
        value=learner.value_norm.normalise(value[alive]),
        returns=returns,
        advantage=normalise(advantage[alive], learner.ranks),
        count=learner.ranks.mean_count(len(seen)),
    )


def normalise(advantage: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Zero mean and unit standard deviation over all ranks; fewer than two stay as they are."""
    if ranks.total(advantage.numel()) < 2:
        return advantage
    mean, spread = ranks.mean_and_spread(advantage)
    return (advantage - mean) / (spread + 1e-5)


def policy_loss(log_prob: Tensor, batch: Batch, clip: float) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), negated."""
    ratio = (log_prob - batch.log_prob).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -mean(torch.minimum(ratio * batch.advantage, clipped * batch.advantage), batch)


def value_loss(value: Tensor, batch: Batch, norm: ValueNorm, clip: float, delta: float) -> Tensor:
    """Huber loss on normalised returns, the larger of the clipped and the plain one (MAPPO, eq.
    8).
    """
    target, old = norm.normalise(batch.returns), batch.value
    clipped = old + (value - old).clamp(-clip, clip)
    plain, cautious = (
        F.huber_loss(v, target, reduction="none", delta=delta) for v in (value, clipped)
    )
    return mean(torch.maximum(plain, cautious), batch)


def mean(rows: Tensor, batch: Batch) -> Tensor:
    """Mean over a batch's rows; zero for an empty batch."""
    return rows.sum() / batch.count


def minibatches(
    batch: Batch, count: int, generator: torch.Generator, ranks: Ranks = ALONE
) -> Iterator[Batch]:
    """A random partition of the batch into ``count`` parts."""
    if count == 1:
        yield batch
        return
    order = torch.randperm(len(batch.action), generator=generator, device=generator.device)
    chunks = order.chunk(count)
    for i in range(ranks.most(len(chunks))):
        # ranks with fewer decisions than others take their last steps on empty minibatches
        yield batch.rows(chunks[i] if i < len(chunks) else order[:0], ranks)


def loss_terms(learner: Learner, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to be minimised, and its terms by name for the log."""
    config = learner.config
    log_probs, value = learner.wrapped(
        batch.observation, batch.seen, batch.mask, batch.state, batch.state_of
    )
    log_prob = log_probs.gather(1, batch.action[:, None]).squeeze(1)
    entropy = mean(-(log_probs.exp() * log_probs).sum(-1), batch)
    terms = {"policy_loss": policy_loss(log_prob, batch, config.clip), "entropy": entropy}
    loss = terms["policy_loss"] - config.entropy * entropy
    if value is not None:
        terms["value_loss"] = value_loss(
            value, batch, learner.value_norm, config.clip, config.huber_delta
        )
        loss = loss + config.value_weight * terms["value_loss"]
    terms["kl"] = mean(batch.log_prob - log_prob, batch)
    return loss, {name: term.detach() for name, term in terms.items()}


def backward(learner: Learner, batch: Batch) -> dict[str, Tensor]:
    """Accumulates the gradients of a batch, one micro-batch at a time; returns its loss terms."""
    terms: dict[str, Tensor] = {}
    micro_batches = batch.micro_batches(learner.config.accumulate)
    for micro_batch in micro_batches:
        is_last = micro_batch is micro_batches[-1]
        with learner.ranks.averages_gradients(learner.wrapped, when=is_last):
            loss, own_terms = loss_terms(learner, micro_batch)
            loss.backward()
        terms = {name: term + terms.get(name, 0) for name, term in own_terms.items()}
    return terms


def update(learner: Learner, batch: Batch, generator: torch.Generator) -> dict[str, float]:
    """Takes one iteration's optimizer steps; returns the means of the loss terms.

    Raises:
        NotFiniteError: a loss or a gradient is not finite, and the weights may not be either.
    """
    config, optimizer, ranks = learner.config, learner.optimizer, learner.ranks
    history: list[Tensor] = []  # the terms of each step
    for _ in range(config.epochs):
        for minibatch in minibatches(batch, config.minibatches, generator, ranks):
            if learner.critic is not None:
                learner.value_norm.update(minibatch.returns, ranks)
            optimizer.zero_grad(set_to_none=True)
            terms = backward(learner, minibatch)
            terms["grad_norm"] = nn.utils.clip_grad_norm_(
                (p for group in optimizer.param_groups for p in group["params"]),
                config.max_grad_norm,
            )
            optimizer.step()
            history.append(torch.stack(list(terms.values())))
    steps = ranks.average(torch.stack(history))  # [steps, terms]
    not_finite = (~steps.isfinite()).nonzero().tolist()
    if not_finite:
        # name the first term of the first step: from there it spreads to all others
        raise NotFiniteError(list(terms)[not_finite[0][1]])
    totals = sum(steps, torch.zeros_like(steps[0])).tolist()
    return {name: total / len(steps) for name, total in zip(terms, totals, strict=True)}


def learning_rate(config: MappoConfig, iteration: int) -> float:
    """The learning rate of an iteration by ``config.lr_schedule``."""
    done = iteration / config.iterations
    if config.lr_schedule == "linear":
        return config.lr * (1 - done)
    if config.lr_schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr


class Trainer:
    """Trains an actor, one iteration at a time.

    Args:
        env: the game.
        actor: observations [R, D_obs] -> logits [R, A].
        config: the settings.
        ranks: the processes that learn together, each with an ``env`` of its own.
    """

    def __init__(
        self, env: BatchedEnv, actor: nn.Module, config: MappoConfig, ranks: Ranks = ALONE
    ) -> None:
        self.env = env
        self.config = config
        self.ranks = ranks
        self.learner = Learner(actor, env, config, ranks)
        self.iteration = 0
        self._observed: Observations | None = None

    def iterate(self) -> dict[str, float]:
        """Collects a rollout and learns from it; returns what to log.

        Raises:
            NotFiniteError: a reward, a loss or a gradient is not finite.
        """
        config, env, learner, ranks = self.config, self.env, self.learner, self.ranks
        seed = iteration_seed(config.seed, self.iteration)
        generator = torch.Generator(env.device).manual_seed(ranks.own_seed(seed))
        for group in learner.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.iteration)
        fixed = env.episode_length
        # A resumed run can't put an environment back into the middle of an episode. So episodes
        # that outlast an iteration restart after each checkpoint, whether the run stops or not.
        if fixed is not None or self._observed is None or self._restarts_episodes():
            self._observed = env.reset(seed)
        rollout, following = collect_rollout(
            env, learner, self._observed, fixed or config.rollout_steps, generator
        )
        self._observed = following
        reward = float(ranks.average(torch.stack(rollout.reward).sum(0).mean()))
        if not math.isfinite(reward):
            raise NotFiniteError("reward")
        with record_function("advantages"):
            batch = compute_advantages(rollout, learner, env)
        with record_function("update"):
            losses = update(learner, batch, generator)
        self.iteration += 1
        return losses | {
            "reward": reward,
            "lr": learning_rate(config, self.iteration - 1),
            **{
                name: float(ranks.nanmean(torch.stack(values)))
                for name, values in rollout.metrics.items()
            },
        }

    def seeds_to_come(self) -> Iterator[int]:
        """The seeds of the resets to come, if every iteration resets the environment."""
        if self.env.episode_length is not None:
            for iteration in range(self.iteration, self.config.iterations):
                yield iteration_seed(self.config.seed, iteration)

    def _restarts_episodes(self) -> bool:
        return self.iteration % self.config.checkpoint_every == 0

    @property
    def is_resumable(self) -> bool:
        """Whether a run that goes on from here ends as if it had never stopped."""
        is_last = self.iteration == self.config.iterations
        return self.env.episode_length is not None or self._restarts_episodes() or is_last

    def state_dict(self) -> dict[str, Any]:
        """All that the next iteration depends on."""
        return {
            "iteration": self.iteration,
            "learner": self.learner.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken."""
        self.learner.load_state_dict(state["learner"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]
        self._observed = None


def learn(run: RunFolder, config: MappoConfig) -> tuple[Experiment, Trainer]:
    """Trains to the end, from where the run's checkpoint stands, and writes the networks; raises
    what ``train`` raises.

    Returns:
        the experiment, whose ``env`` is closed, and the trainer.
    """
    ranks = run.ranks
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    experiment = make_experiment(config, ranks)
    init = None if run.is_begun else config.init  # the weights are in the checkpoint
    trainer = Trainer(experiment.env, experiment.make_actor(init), config, ranks)
    run.restore(trainer)
    ranks.wait()  # until all have read the checkpoint
    run.create(config)
    experiment.prefetch(trainer.seeds_to_come())
    evaluate = partial(experiment.evaluate, trainer.learner.actor)
    monitor = Monitor(evaluate, experiment.progress, experiment.activity)
    with closing(experiment.env), ranks.stop_together():
        loop.train(run, trainer, monitor, config, config.profile)
    run.write_networks(policy=trainer.learner.actor, critic=trainer.learner.critic)
    return experiment, trainer


def train(config: MappoConfig, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Trains and reports, in the run's folder.

    Returns:
        the report and the run's ``folder``; nothing on ranks other than the first, which alone
        writes the report.

    Raises:
        TrainingError: the run can't begin, or diverged.
        CheckpointError: the run to be resumed is missing or damaged.
        ValueError: settings that don't go together, an unknown name, a damaged image.
        OSError: the disk is full or not writable; the last checkpoint is left as it was.
        RanksError: another rank has ended.
    """
    run, config = open_run(config, ranks)
    with says_how_to_go_on(run.path, resume_flags(run.path, config)):
        experiment, trainer = learn(run, config)
        if not ranks.is_first:
            return {}
        report = experiment.report(trainer.learner.actor, run.path)
        report |= {"seconds": run.seconds, "seed": config.seed}
        write_json(run.path / "report.json", report)
    return report | {"folder": run.path}


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m trainers.mappo``."""
    with ends_in_one_line(*COMMAND_ERRORS):
        config = parse(sys.argv[1:] if arguments is None else arguments)
        report = train(config, join_ranks(device_of(config)))
        if report:
            print(format_report(report))
            prunes = "dense" in report["policies"]
            say_where_and_what_next(report["folder"], *(AFTER_RUN if prunes else ()))


if __name__ == "__main__":
    main()
