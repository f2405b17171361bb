"""Multi-Agent PPO (Yu et al. 2022, arXiv 2103.01955) on any ``BatchedEnv``: ``python -m
trainers.mappo``.

From top to bottom: play, advantages, loss, step, train. What is played, comes from ``tasks``; files
are written by ``runs``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from prunevit.agents.policies.actor_critic import Critic
from prunevit.envs.batched.protocol import BatchedEnv, Observations
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.distributed import ALONE, Ranks
from prunevit.trainers.common.gae import gae, leave_one_out
from prunevit.trainers.common.value_norm import ValueNorm

ADAM_EPS = 1e-5
MASKED_LOGIT = -1e9
# What an actor makes of so many bytes of observations a thread stays in a CPU's caches. Measured
# with the default actor: an update of 112,000 decisions takes 0.6 times as long in such parts with
# one thread, 0.8 with two; of 30,000, which two threads take as one part, more would gain nothing.
PART_BYTES = 1 << 23


class NotFiniteError(ArithmeticError):
    """A reward, a loss or a gradient that is not finite; the message is its name."""


class Learner(nn.Module):
    """All that learns, and how: actor, critic, value normalisation, optimizer.

    Args:
        actor: observations [R, D_obs] -> logits [R, A].
        env: the game, for its sizes.
        config: the settings.
        ranks: who learns together.
    """

    def __init__(
        self, actor: nn.Module, env: BatchedEnv, config: MappoConfig, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        self.config = config
        self.ranks = ranks
        self.actor = actor.to(env.device)
        self.critic: Critic | None = None
        if config.critic != "none":
            inputs = env.observation_space.shape[0]
            if config.critic == "central":
                inputs += env.state_space.shape[0]
            self.critic = Critic(inputs, config.critic_hidden).to(env.device)
        self.value_norm = ValueNorm().to(env.device)
        learned = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learned, lr=config.lr, eps=ADAM_EPS)
        # what is called to learn; around the module and not in it
        object.__setattr__(self, "wrapped", ranks.wrap(self))

    wrapped: nn.Module

    def forward(
        self, observation: Tensor, seen: Tensor, mask: Tensor, critic_input: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """All that has gradients: ``log_probs``, and the critic's normalised values [R], if any."""
        values = None if self.critic is None else self.critic(critic_input)
        return self.log_probs(observation, seen, mask), values

    def log_probs(self, observation: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities of the actions, those not allowed at nearly -inf.

        Args:
            observation: what there is to see, each thing once, [U, D_obs].
            seen: which of it each agent sees, int64 [R].
            mask: actions allowed, bool [R, A].

        Returns:
            [R, A].
        """
        logits = self.actor(observation).index_select(0, seen)
        return logits.masked_fill(~mask, MASKED_LOGIT).log_softmax(-1)

    def critic_inputs(self, observed: Observations) -> Tensor:
        """What the critic sees of each living agent, [R, D]."""
        living = observed.living()
        if self.config.critic == "local":
            return living
        return torch.cat([living, observed.state[observed.alive.nonzero()[:, 0]]], dim=1)

    @torch.no_grad()
    def values(self, observed: Observations) -> Tensor:
        """V of every agent [B, N], zero for those that are not alive and where there is no
        critic.
        """
        dense = torch.zeros(observed.alive.shape, device=observed.alive.device)
        if self.critic is not None:
            normed = self.critic(self.critic_inputs(observed))
            dense[observed.alive] = self.value_norm.denormalise(normed)
        return dense


@dataclass
class Rollout:
    """T steps of B environments; lists hold one entry a step, rows are living agents."""

    observations: list[Observations] = field(default_factory=list)
    action: list[Tensor] = field(default_factory=list)  # int64 [R]
    log_prob: list[Tensor] = field(default_factory=list)  # of the action taken, [R]
    value: list[Tensor] = field(default_factory=list)  # [B, N]
    next_value: list[Tensor] = field(default_factory=list)  # [B, N]
    next_alive: list[Tensor] = field(default_factory=list)  # bool [B, N]
    reward: list[Tensor] = field(default_factory=list)  # [B, N]
    ended: list[Tensor] = field(default_factory=list)  # bool [B]
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)  # of ended episodes


@torch.no_grad()
def play(
    env: BatchedEnv,
    learner: Learner,
    observed: Observations,
    steps: int,
    generator: torch.Generator,
) -> tuple[Rollout, Observations]:
    """Plays ``steps`` steps with sampled actions; returns them and what is seen next."""
    rollout = Rollout()
    value = learner.values(observed)
    for _ in range(steps):
        mask = observed.action_mask[observed.alive]
        with record_function("policy and critic"):
            log_probs = learner.log_probs(*observed.distinct(), mask)
            action = sample(log_probs, generator)
        joint = torch.zeros(observed.alive.shape, dtype=torch.int64, device=env.device)
        joint[observed.alive] = action
        transition = env.step(joint)

        with record_function("policy and critic"):
            following = learner.values(transition.observations)
        next_value, next_alive = following, transition.observations.alive
        if transition.final is not None:
            # a truncated episode would have gone on from its own last observation, not from the
            # next one's first
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


def sample(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """One action a row, drawn from its distribution (Gumbel-max): [R, A] -> int64 [R]."""
    uniform = torch.rand(log_probs.shape, generator=generator, device=log_probs.device)
    return (log_probs - (-uniform.clamp(min=1e-10).log()).log()).argmax(-1)


@dataclass(frozen=True)
class Decisions:
    """All decisions of an iteration, one row for each time a living agent was asked.

    Attributes:
        observation: what there was to see, each thing once, [U, D_obs].
        seen: which of it was seen, int64 [R].
        critic_input: [R, D]; empty without a critic.
        mask: bool [R, A].
        action: int64 [R].
        log_prob: of the action when it was taken, [R].
        value: what the critic said when it was taken, normalised as it was then, [R].
        returns: targets of the critic, [R].
        advantage: normalised, [R].
        count: what sums over the rows are divided by to be means: R, or on many ranks the mean of
            theirs.
    """

    observation: Tensor
    seen: Tensor
    critic_input: Tensor
    mask: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    returns: Tensor
    advantage: Tensor
    count: float

    def rows(self, index: Tensor, ranks: Ranks) -> Decisions:
        """A selection of the decisions."""
        apart = ("observation", "seen", "count")
        chosen = {name: part[index] for name, part in vars(self).items() if name not in apart}
        observation = self.observation[self.seen[index]]
        seen = torch.arange(len(observation), device=observation.device)
        count = ranks.mean_count(len(index))
        return Decisions(observation=observation, seen=seen, count=count, **chosen)

    def parts(self, count: int) -> list[Decisions]:
        """``count`` pieces, or fewer where the rows are; what is a mean over all rows is the sum
        over the pieces.
        """
        count = min(count, len(self.seen))
        if count < 2:
            return [self]
        names = [name for name in vars(self) if name not in ("observation", "count")]
        parts = []
        for piece in zip(*(getattr(self, name).tensor_split(count) for name in names), strict=True):
            rows = dict(zip(names, piece, strict=True))
            # neighbours see the same, or what lies side by side
            first, last = (int(edge) for edge in rows["seen"].aminmax())
            rows["seen"] = rows["seen"] - first
            parts.append(replace(self, observation=self.observation[first : last + 1], **rows))
        return parts


def judge(rollout: Rollout, learner: Learner, env: BatchedEnv) -> Decisions:
    """Advantages: GAE, compared among rollouts of one start, normalised over the decisions of
    living agents.
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
        advantage = leave_one_out(advantage, env.rollouts_per_start)
    distinct = [observed.distinct() for observed in rollout.observations]
    before = itertools.accumulate((len(rows) for rows, _ in distinct), initial=0)
    seen = torch.cat([seen + start for (_, seen), start in zip(distinct, before, strict=False)])
    return Decisions(
        observation=torch.cat([rows for rows, _ in distinct]),
        seen=seen,
        critic_input=advantage.new_empty(len(seen), 0)
        if learner.critic is None
        else torch.cat([learner.critic_inputs(observed) for observed in rollout.observations]),
        mask=torch.cat([observed.action_mask[observed.alive] for observed in rollout.observations]),
        action=torch.cat(rollout.action),
        log_prob=torch.cat(rollout.log_prob),
        value=learner.value_norm.normalise(value[alive]),
        returns=returns,
        advantage=normalised(advantage[alive], learner.ranks),
        count=learner.ranks.mean_count(len(seen)),
    )


def normalised(advantage: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Zero mean and unit spread over all ranks; fewer than two are left alone."""
    if ranks.total(advantage.numel()) < 2:
        return advantage
    mean, spread = ranks.mean_and_spread(advantage)
    return (advantage - mean) / (spread + 1e-5)


def policy_loss(log_prob: Tensor, batch: Decisions, clip: float) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), negated."""
    ratio = (log_prob - batch.log_prob).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -mean(torch.minimum(ratio * batch.advantage, clipped * batch.advantage), batch)


def value_loss(
    value: Tensor, batch: Decisions, norm: ValueNorm, clip: float, delta: float
) -> Tensor:
    """Huber loss on normalised returns, the larger of the clipped and the plain one (MAPPO, eq.
    8).
    """
    target, old = norm.normalise(batch.returns), batch.value
    clipped = old + (value - old).clamp(-clip, clip)
    plain, cautious = (
        F.huber_loss(v, target, reduction="none", delta=delta) for v in (value, clipped)
    )
    return mean(torch.maximum(plain, cautious), batch)


def mean(rows: Tensor, batch: Decisions) -> Tensor:
    """Mean over a batch's rows; zero where nobody lived to decide."""
    return rows.sum() / batch.count


def minibatches(
    decisions: Decisions, parts: int, generator: torch.Generator, ranks: Ranks = ALONE
) -> Iterator[Decisions]:
    """A random partition of the decisions; a single part needs no order."""
    if parts == 1:
        yield decisions
        return
    order = torch.randperm(len(decisions.action), generator=generator, device=generator.device)
    chunks = order.chunk(parts)
    for part in range(ranks.most(len(chunks))):
        # who has fewer decisions than others, takes its last steps with none
        yield decisions.rows(chunks[part] if part < len(chunks) else order[:0], ranks)


def loss_terms(learner: Learner, batch: Decisions) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to be minimised, and what there is to know of it by name."""
    config = learner.config
    log_probs, value = learner.wrapped(
        batch.observation, batch.seen, batch.mask, batch.critic_input
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


def backward(learner: Learner, batch: Decisions) -> dict[str, Tensor]:
    """Makes the gradients of a batch, a part after the other; the terms of its loss."""
    terms: dict[str, Tensor] = {}
    count = learner.config.accumulate
    if count is None:
        on_host = batch.action.device.type == "cpu"
        size = len(batch.action) * batch.observation[:1].nbytes
        count = max(1, size // (PART_BYTES * torch.get_num_threads())) if on_host else 1
    parts = batch.parts(count)
    for part in parts:
        with learner.ranks.averages_gradients(learner.wrapped, when=part is parts[-1]):
            loss, of_part = loss_terms(learner, part)
            loss.backward()
        terms = {name: term + terms.get(name, 0) for name, term in of_part.items()}
    return terms


def learn(learner: Learner, decisions: Decisions, generator: torch.Generator) -> dict[str, float]:
    """One iteration's optimizer steps; the losses' means.

    Raises:
        NotFiniteError: a loss or a gradient is not; the learner is of no use any more.
    """
    config, optimizer, ranks = learner.config, learner.optimizer, learner.ranks
    if learner.critic is not None:
        learner.value_norm.update(decisions.returns, ranks)
    history: dict[str, list[Tensor]] = {}  # one entry a step
    for _ in range(config.epochs):
        for batch in minibatches(decisions, config.minibatches, generator, ranks):
            optimizer.zero_grad(set_to_none=True)
            terms = backward(learner, batch)
            terms["grad_norm"] = nn.utils.clip_grad_norm_(
                (p for group in optimizer.param_groups for p in group["params"]),
                config.max_grad_norm,
            )
            optimizer.step()
            for name, term in terms.items():
                history.setdefault(name, []).append(term)
    history = {name: list(ranks.average(torch.stack(each))) for name, each in history.items()}
    sums = {name: float(sum(each, torch.zeros_like(each[0]))) for name, each in history.items()}
    if not all(map(math.isfinite, sums.values())):
        # the first step tells the cause: in the next one everything else is infected
        steps = zip(*history.values(), strict=True)
        first = next(step for step in steps if not torch.stack(step).isfinite().all())
        finite = torch.stack(first).isfinite().tolist()
        raise NotFiniteError(list(history)[finite.index(False)])
    return {name: total / len(history[name]) for name, total in sums.items()}


def learning_rate(config: MappoConfig, iteration: int) -> float:
    """The schedule: from ``config.lr`` to zero after the last iteration."""
    done = iteration / config.iterations
    if config.lr_schedule == "linear":
        return config.lr * (1 - done)
    if config.lr_schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr


def iteration_seed(config: MappoConfig, iteration: int) -> int:
    """A seed of its own for every iteration, so that a resumed run needs no generator's state."""
    return config.seed * 1_000_003 + iteration


class Trainer:
    """Iterations of play and learning; what a resumed run must know stands in ``state_dict``.

    Args:
        env: the game.
        actor: its logits [R, D_obs] -> [R, A].
        config: the settings.
        ranks: who plays and learns together, each in an ``env`` of its own.
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
        """Plays and learns once; returns what there is to log.

        Raises:
            NotFiniteError: a reward, a loss or a gradient is not.
        """
        config, env, learner, ranks = self.config, self.env, self.learner, self.ranks
        seed = iteration_seed(config, self.iteration)
        generator = torch.Generator(env.device).manual_seed(ranks.own_seed(seed))
        for group in learner.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.iteration)
        fixed = env.episode_length
        # Where episodes run on over iterations, they are begun anew after each checkpoint, killed
        # or not: a run that was resumed there can't tell an environment where it stood.
        if fixed is not None or self._observed is None or self._begins_anew():
            self._observed = env.reset(seed)
        rollout, following = play(
            env, learner, self._observed, fixed or config.rollout_steps, generator
        )
        self._observed = following
        reward = float(ranks.average(torch.stack(rollout.reward).sum(0).mean()))
        if not math.isfinite(reward):
            raise NotFiniteError("reward")
        with record_function("advantages"):
            decisions = judge(rollout, learner, env)
        with record_function("update"):
            losses = learn(learner, decisions, generator)
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
        """What the environment will be reset with, where each iteration does so."""
        config = self.config
        if self.env.episode_length is not None:
            for iteration in range(self.iteration, config.iterations):
                yield iteration_seed(config, iteration)

    def _begins_anew(self) -> bool:
        return self.iteration % self.config.checkpoint_every == 0

    @property
    def is_resumable(self) -> bool:
        """Whether a run that goes on from here ends as if it had never stopped."""
        is_last = self.iteration == self.config.iterations
        return self.env.episode_length is not None or self._begins_anew() or is_last

    def state_dict(self) -> dict[str, object]:
        """All that the next iteration depends on."""
        return {
            "iteration": self.iteration,
            "learner": self.learner.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where ``state`` was taken."""
        self.learner.load_state_dict(state["learner"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]
        self._observed = None


if __name__ == "__main__":
    # the installed module, so that its classes are the ones that everybody else imports
    from prunevit.trainers.common.runs import main

    main()
