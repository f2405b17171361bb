"""RLlib, current API stack: every token is an agent, and all agents share a policy.

A pruned token gets no more observations and is not asked again. RLlib adds the rewards that it
still gets to its last action. So the learner receives a token's decisions while it was alive and
all of its rewards, and no mask is needed.

``TokenPruneMulti`` is the plain ``MultiAgentEnv``, one image at a time. ``TokenEnvRunner`` plays
all images of an RLlib runner at once on the tensor game::

    PPOConfig().environment(TokenPruneMulti, env_config={"prune_before": (1, 3)}).env_runners(
        env_runner_cls=TokenEnvRunner,
        num_envs_per_env_runner=64,
        batch_mode="complete_episodes",
    )
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Dict as DictSpace
from numpy.typing import NDArray

from prunevit.envs.adapters.common import GameHandle, to_numpy
from prunevit.envs.batched.inputs import image_indices, to_actions
from prunevit.envs.batched.protocol import Observations
from prunevit.extras import needs

with needs("rllib"):
    from ray.rllib.env.multi_agent_env import MultiAgentEnv
    from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
    from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
    from ray.rllib.env.vector.vector_multi_agent_env import VectorMultiAgentEnv
    from ray.rllib.utils.metrics import (
        NUM_AGENT_STEPS_SAMPLED,
        NUM_AGENT_STEPS_SAMPLED_LIFETIME,
        NUM_MODULE_STEPS_SAMPLED,
        NUM_MODULE_STEPS_SAMPLED_LIFETIME,
    )

PerAgent = dict[str, Any]
ALL, COMMON = "__all__", "__common__"


class _Images:
    """B images with their values in RLlib's dictionaries, one for each image.

    Pruned tokens have a reward only.
    """

    def __init__(self, num_envs: int, arguments: Mapping[str, Any]) -> None:
        self.held = GameHandle(num_envs, arguments)
        env = self.held.env
        self.agents = [f"token_{i}" for i in range(env.num_agents)]
        self.observation_spaces = dict.fromkeys(self.agents, env.observation_space)
        self.action_spaces = dict.fromkeys(self.agents, env.action_space)
        self._place = {agent: place for place, agent in enumerate(self.agents)}

    def begin(
        self, seed: int | None, options: Mapping[str, Any] | None
    ) -> tuple[list[PerAgent], list[PerAgent]]:
        observed = self.held.env.reset(seed, indices=image_indices(options))
        self._alive = to_numpy(observed.alive)
        return self._seen(observed, self._alive), [{} for _ in self._alive]

    def step(
        self, actions: Sequence[Mapping[str, Any]]
    ) -> tuple[list[PerAgent], list[PerAgent], list[PerAgent], list[PerAgent], list[PerAgent]]:
        env = self.held.env
        joint = torch.zeros(env.num_envs, env.num_agents, dtype=torch.int64)
        for image, chosen in enumerate(actions):
            places = [self._place[agent] for agent in chosen]
            if places:
                joint[image, places] = to_actions(np.asarray(list(chosen.values())), joint.device)
        acted = self._alive
        transition = env.step(joint.to(env.device))
        over = bool(transition.terminated[0])
        self._alive = to_numpy(transition.observations.alive)
        rewards = [dict(zip(self.agents, row, strict=True)) for row in transition.reward.tolist()]
        return (
            # RLlib wants a last observation of an episode, although nothing learns from it
            self._seen(transition.observations, acted if over else self._alive),
            rewards,
            [{ALL: over} for _ in rewards],
            [{ALL: False} for _ in rewards],
            self._facts(),
        )

    def _seen(self, observed: Observations, who: NDArray[np.bool_]) -> list[PerAgent]:
        values = to_numpy(observed.observation)
        return [
            {self.agents[place]: rows[place] for place in np.flatnonzero(here)}
            for rows, here in zip(values, who, strict=True)
        ]

    def _facts(self) -> list[PerAgent]:
        """Infos ``correct`` and ``gmacs`` at the end, under RLlib's key for all agents."""
        outcome = self.held.env.outcome
        if outcome is None:
            return [{} for _ in self._alive]
        return [
            {COMMON: {"correct": correct, "gmacs": gmacs}}
            for correct, gmacs in zip(outcome.correct.tolist(), outcome.gmacs.tolist(), strict=True)
        ]


class _Spaces(MultiAgentEnv):
    """The agents and spaces that RLlib asks each environment of a vector for."""

    def __init__(self, images: _Images) -> None:
        super().__init__()
        self.possible_agents = self.agents = images.agents
        self.observation_spaces = images.observation_spaces
        self.action_spaces = images.action_spaces


class TokenPruneMulti(_Spaces):
    """One image an episode, with rewards of all tokens and observations of those alive.

    Infos have ``correct`` and ``gmacs`` at the end, under ``__common__``.

    Args:
        config: arguments of ``TokenPruneEnv``; RLlib passes ``env_config``.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self._images = _Images(1, config or {})
        super().__init__(self._images)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[PerAgent, PerAgent]:
        """Begins an episode on an image drawn with ``seed``, or on ``options["indices"]`` [1]."""
        seen, infos = self._images.begin(seed, options)
        return seen[0], infos[0]

    def step(
        self, action_dict: Mapping[str, Any]
    ) -> tuple[PerAgent, PerAgent, PerAgent, PerAgent, PerAgent]:
        seen, rewards, terminated, truncated, infos = self._images.step([action_dict])
        return seen[0], rewards[0], terminated[0], truncated[0], infos[0]

    def close(self) -> None:
        self._images.held.close()


class TokenPruneMultiVector(VectorMultiAgentEnv):
    """Returns lists of what ``TokenPruneMulti`` returns, for B images that are played at once.

    As RLlib expects, the step after the last step of an episode ignores its actions and resets.

    Args:
        num_envs: B.
        config: arguments of ``TokenPruneEnv``.
    """

    metadata: dict[str, Any] = {"autoreset_mode": "next_step"}  # noqa: RUF012 - RLlib's declaration

    def __init__(self, num_envs: int, config: Mapping[str, Any] | None = None) -> None:
        self.num_envs = num_envs
        self._images = _Images(num_envs, config or {})
        self._over = False
        self.envs = [_Spaces(self._images)] * num_envs
        self.single_observation_spaces = self._images.observation_spaces
        self.single_action_spaces = self._images.action_spaces
        self.single_observation_space = DictSpace({**self._images.observation_spaces})
        self.single_action_space = DictSpace({**self._images.action_spaces})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[list[PerAgent], list[PerAgent]]:
        """Begins episodes on images drawn with ``seed``, or on ``options["indices"]`` [B]."""
        self._over = False
        return self._images.begin(seed, options)

    def step(
        self, actions: Sequence[Mapping[str, Any]]
    ) -> tuple[list[PerAgent], list[PerAgent], list[PerAgent], list[PerAgent], list[PerAgent]]:
        if self._over:
            seen, infos = self.reset()
            going_on = [{ALL: False} for _ in seen]
            return seen, [{} for _ in seen], going_on, going_on, infos
        stepped = self._images.step(actions)
        self._over = stepped[2][0][ALL]
        return stepped

    def close_extras(self, **kwargs: Any) -> None:
        self._images.held.close()


class TokenEnvRunner(MultiAgentEnvRunner):
    """RLlib's runner with its ``num_envs_per_env_runner`` images as one batch of tensors.

    RLlib's own runner steps copies of an environment one after the other. ``environment`` must be
    ``TokenPruneMulti``, and ``env_config`` has arguments of ``TokenPruneEnv``.
    """

    env: TokenPruneMultiVector | None = None

    def make_env(self) -> None:
        if self.env is not None:
            self.env.close()
        self.num_envs = self.config.num_envs_per_env_runner
        self.env = TokenPruneMultiVector(self.num_envs, dict(self.config.env_config))
        self._needs_initial_reset = True
        self._seeded = False

    def _try_env_reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Any]:
        """Resets as RLlib does, but uses the seed only the first time.

        With whole episodes RLlib passes its seed to every reset, which would play the same images
        for ever.
        """
        first, self._seeded = not self._seeded, True
        return super()._try_env_reset(seed=seed if first else None, options=options)

    def _increase_sampled_metrics(
        self, num_steps: int, next_obs: PerAgent, episode: MultiAgentEpisode
    ) -> int:
        """Counts steps as RLlib does, but all agents at once, since one by one is slow.

        Pruned tokens count too. So a round always has images x tokens x stages agent steps, and a
        batch of that size is one round, however many tokens were pruned.
        """
        assert self.env is not None
        agents = self.env.envs[0].possible_agents
        module = episode.module_for(agents[0])
        for name, reduce in (
            (NUM_AGENT_STEPS_SAMPLED, "sum"),
            (NUM_AGENT_STEPS_SAMPLED_LIFETIME, "lifetime_sum"),
            (NUM_MODULE_STEPS_SAMPLED, "sum"),
            (NUM_MODULE_STEPS_SAMPLED_LIFETIME, "lifetime_sum"),
        ):
            self.metrics.log_value((name, module), len(agents), reduce=reduce)
        return super()._increase_sampled_metrics(num_steps, {}, episode)
