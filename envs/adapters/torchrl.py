"""TorchRL: B images at once as one ``EnvBase``, on the game's own tensors.

All tokens are one group, ``token``. A pruned token stays until the end of the episode: it observes
zeros, may only prune, and still gets rewards. Its ``mask`` is False, as in TorchRL's own
``PettingZooWrapper``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from prunevit.envs.adapters.common import GameArguments, GameHandle
from prunevit.envs.batched.inputs import to_actions
from prunevit.envs.batched.protocol import Observations
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.extras import needs

with needs("torchrl"):
    from tensordict import TensorDict, TensorDictBase
    from torchrl.data import Categorical, Composite, Unbounded
    from torchrl.envs import EnvBase

GROUP = "token"


class TokenPruneTorchRL(EnvBase):
    """B images of N tokens as one environment of batch size [B]; all episodes end together.

    Entries of the group ``token``, each [B, N, ...]:

    - ``observation``: float32 [.., D_obs], zeros for pruned tokens.
    - ``action_mask``: bool [.., 2]. ``mask``: whether the token is alive, bool.
    - ``action``: int64, 1 keeps and 0 prunes; ignored for pruned tokens.
    - ``reward``: float32 [.., 1].

    Entries at the root:

    - ``state``: for central critics, float32 [B, D_state].
    - ``done`` and ``terminated``: bool [B, 1].
    - ``info``: ``index`` and ``label`` of the image and, zero until the end, ``correct`` and
      ``gmacs`` (without the policy), each [B, 1].

    ``reset(indices=[...])`` chooses the B images instead of drawing them.

    Args:
        num_envs: B.
        game: arguments of ``TokenPruneEnv``.

    Attributes:
        num_stages: steps of an episode.
        group_map: names of the tokens by group.
    """

    def __init__(self, num_envs: int = 64, **game: Unpack[GameArguments]) -> None:
        held = GameHandle(num_envs, game)
        env = held.env
        super().__init__(device=env.device, batch_size=torch.Size([num_envs]))
        self._held = held
        self._seed: int | None = None
        self.num_stages = env.game.num_stages
        self.group_map = {GROUP: [f"{GROUP}_{i}" for i in range(env.num_agents)]}
        self._make_specs(env)
        self.is_closed = False

    def to(self, device: str | torch.device) -> TokenPruneTorchRL:
        """Moves the game, and ends its episodes; returns itself.

        A backbone that was given stays where it is: the game goes on with a copy.
        """
        wanted = torch.empty(0, device=device).device
        if wanted != self.device:
            self._held.env.to(wanted)
            super().to(wanted)
        return self

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Frees the backbone. A second call does nothing."""
        self._held.close()
        super().close(raise_if_closed=raise_if_closed)

    def _set_seed(self, seed: int | None) -> None:
        self._seed = seed

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        indices: Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        if kwargs:
            raise TypeError(f"reset takes indices=[...] and nothing else: got {sorted(kwargs)}")
        wanted = None if tensordict is None else tensordict.get("_reset", None)
        if wanted is not None and not wanted.all():
            raise ValueError("all episodes begin and end together: reset takes them all, not some")
        observed = self._held.env.reset(self._seed, indices=indices)
        self._seed = None
        return self._tensordict(observed, torch.zeros_like(observed.alive[:, :1]))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        env = self._held.env
        transition = env.step(to_actions(tensordict.get((GROUP, "action")), env.device))
        shown = self._tensordict(transition.observations, transition.terminated[:, None])
        shown.set((GROUP, "reward"), transition.reward[..., None])
        return shown

    def _tensordict(self, observed: Observations, done: Tensor) -> TensorDict:
        env = self._held.env
        batch = self.batch_size
        group = TensorDict(
            {
                "observation": observed.observation,
                "action_mask": observed.action_mask,
                "mask": observed.alive,
            },
            [*batch, env.num_agents],
            device=self.device,
        )
        outcome = env.outcome
        info = TensorDict(
            {
                "index": env.indices[:, None],
                "label": env.labels[:, None],
                "correct": outcome.correct[:, None] if outcome else torch.zeros_like(done),
                "gmacs": outcome.gmacs[:, None] if outcome else done.float(),
            },
            batch,
            device=self.device,
        )
        return TensorDict(
            {
                GROUP: group,
                "state": observed.state,
                "info": info,
                "done": done,
                # a copy, since losses may write to one of them
                "terminated": done.clone(),
            },
            batch,
            device=self.device,
        )

    def _make_specs(self, env: BatchedTokenPrune) -> None:
        batch, device = tuple(self.batch_size), self.device
        agents = (*batch, env.num_agents)

        real = partial(Unbounded, device=device, dtype=torch.float32)
        numbers = partial(Unbounded, device=device, dtype=torch.int64)
        flags = partial(Categorical, 2, device=device, dtype=torch.bool)

        def of_group(**specs: Any) -> Composite:
            return Composite({GROUP: Composite(specs, shape=agents, device=device)}, shape=batch)

        seen = of_group(
            observation=real(shape=(*agents, *env.observation_space.shape)),
            action_mask=flags(shape=(*agents, int(env.action_space.n))),
            mask=flags(shape=agents),
        )
        one = (*batch, 1)
        seen["state"] = real(shape=(*batch, *env.state_space.shape))
        seen["info"] = Composite(
            index=numbers(shape=one),
            label=numbers(shape=one),
            correct=flags(shape=one),
            gmacs=real(shape=one),
            shape=batch,
            device=device,
        )
        self.observation_spec = seen
        self.action_spec = of_group(
            action=Categorical(int(env.action_space.n), shape=agents, device=device)
        )
        self.reward_spec = of_group(reward=real(shape=(*agents, 1)))
        self.done_spec = Composite(
            done=flags(shape=one), terminated=flags(shape=one), shape=batch, device=device
        )
