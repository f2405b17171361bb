"""Each library's way to play the game, in one form: the same tests drive them all."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from prunevit.envs.adapters.epymarl import TokenPruneAgents
from prunevit.envs.adapters.gymnasium import TokenPruneGym, TokenPruneVector
from prunevit.envs.adapters.sb3 import TokenVecEnv
from prunevit.envs.token_prune import TokenPruneEnv

TOLD = "index", "label", "correct", "gmacs", "logits"


class Stepped(NamedTuple):
    """What a library receives for one joint action.

    Attributes:
        paid: what each agent was paid, [B, N].
        seen: observations as the library holds them.
        asked: who acts next as the library is told, bool [B, N].
        terminated, truncated: one flag or more for each image.
        told: of ``TOLD``, what infos say: a value for each image.
    """

    paid: Any
    seen: Any
    asked: Any
    terminated: Any
    truncated: Any
    told: dict[str, Any]


class Gym:
    """Drives ``TokenPruneGym``: one image an environment."""

    batch = 1

    def make(self, batch, game):
        return TokenPruneGym(**game)

    def begin(self, env, seed=None, indices=None):
        return env.reset(seed=seed, options={} if indices is None else {"indices": indices})[0]

    def step(self, env, keep):
        """``Stepped`` for a joint action bool [B, N]."""
        seen, reward, terminated, truncated, info = env.step(keep[0].numpy().astype(np.int8))
        paid = info["agent_rewards"][None]
        assert reward == pytest.approx(paid.mean())
        told = {name: np.asarray(info[name])[None] for name in TOLD}
        return Stepped(paid, seen, info["action_mask"][None] == 2, terminated, truncated, told)

    def go_on(self, env, last):
        """What is seen first of the episodes after those that ended with the step ``last``."""
        return self.begin(env)


class GymVector(Gym):
    batch = 4

    def make(self, batch, game):
        return TokenPruneVector(batch, **game)

    def step(self, env, keep):
        seen, reward, terminated, truncated, infos = env.step(keep.numpy().astype(np.int8))
        paid = infos["agent_rewards"]
        np.testing.assert_allclose(reward, paid.mean(1), rtol=1e-5)
        ended = infos.get("final_info", infos)
        told = {name: ended[name] for name in TOLD}
        return Stepped(paid, seen, infos["action_mask"] == 2, terminated, truncated, told)

    def go_on(self, env, last):
        return last.seen


class StableBaselines(GymVector):
    def make(self, batch, game):
        return TokenVecEnv(batch, **game)

    def begin(self, env, seed=None, indices=None):
        if seed is not None:
            env.seed(seed)
        if indices is not None:
            env.set_options({"indices": indices})
        return env.reset()

    def step(self, env, keep):
        seen, reward, done, infos = env.step(keep.flatten().numpy().astype(np.int64))
        asked = env.action_masks()[:, 1].reshape(keep.shape)
        images = infos[:: keep.shape[1]]
        told = {name: [image[name] for image in images] for name in TOLD if name in images[0]}
        # how SB3's own environments mark an episode that was cut off
        truncated = [info.get("TimeLimit.truncated", False) for info in infos]
        return Stepped(reward.reshape(keep.shape), seen, asked, done, truncated, told)


class Epymarl(Gym):
    def make(self, batch, game):
        return TokenPruneAgents(**game)

    def begin(self, env, seed=None, indices=None):
        return np.stack(super().begin(env, seed, indices))

    def step(self, env, keep):
        seen, rewards, terminated, truncated, infos = env.step(keep[0].long().tolist())
        seen, paid = np.stack(seen), np.array([rewards], np.float32)
        told = {name: [value] for name, value in infos.items()}
        # nothing else says who lives
        return Stepped(paid, seen, seen.any(-1)[None], terminated, truncated, told)


class Rllib(Gym):
    batch = 4

    def make(self, batch, game):
        from prunevit.envs.adapters.rllib import TokenPruneMultiVector

        return TokenPruneMultiVector(batch, game)

    def begin(self, env, seed=None, indices=None):
        seen, _ = env.reset(seed=seed, options={} if indices is None else {"indices": indices})
        return self.stacked(env, seen)

    def step(self, env, keep):
        agents = env.envs[0].agents
        actions = [dict(zip(agents, row.tolist(), strict=True)) for row in keep.long()]
        return self.stepped(env, agents, *env.step(actions))

    def go_on(self, env, last):
        return self.stacked(env, env.step([{}] * self.batch)[0])

    def stepped(self, env, agents, seen, rewards, terminated, truncated, infos):
        paid = np.array([[image[agent] for agent in agents] for image in rewards], np.float32)
        asked = np.array([[agent in image for agent in agents] for image in seen])
        flags = ([image["__all__"] for image in ended] for ended in (terminated, truncated))
        images = [info.get("__common__", {}) for info in infos]
        told = {name: [image[name] for image in images] for name in images[0]}
        return Stepped(paid, self.stacked(env, seen), asked, *flags, told)

    def stacked(self, env, seen):
        """[B, N, D_obs]; zeros for those that are not asked any more."""
        agents = env.envs[0].agents
        nothing = np.zeros(env.single_observation_spaces[agents[0]].shape, np.float32)
        return np.stack([[image.get(agent, nothing) for agent in agents] for image in seen])


class RllibSingle(Rllib):
    batch = 1

    def make(self, batch, game):
        from prunevit.envs.adapters.rllib import TokenPruneMulti

        return TokenPruneMulti(game)

    def begin(self, env, seed=None, indices=None):
        seen, _ = env.reset(seed=seed, options={} if indices is None else {"indices": indices})
        return self.stacked(env, [seen])

    def step(self, env, keep):
        stepped = env.step(dict(zip(env.agents, keep[0].long().tolist(), strict=True)))
        return self.stepped(env, env.agents, *([part] for part in stepped))

    def go_on(self, env, last):
        return self.begin(env)

    def stacked(self, env, seen):
        nothing = np.zeros(env.observation_spaces[env.agents[0]].shape, np.float32)
        return np.stack([[image.get(agent, nothing) for agent in env.agents] for image in seen])


class PettingZoo(Gym):
    """The environment that is no adapter, by the same rules."""

    batch = 4

    def make(self, batch, game):
        return TokenPruneEnv(num_envs=batch, **game)

    def begin(self, env, seed=None, indices=None):
        seen, _ = env.reset(seed, None if indices is None else {"indices": indices})
        return torch.stack(list(seen.values()), dim=1)

    def step(self, env, keep):
        actions = dict(zip(env.agents, keep.long().unbind(1), strict=True))
        *by_agent, infos = env.step(actions)
        seen, paid, *flags = (torch.stack(list(values.values()), dim=1) for values in by_agent)
        asked = torch.stack([info["action_mask"][:, 1] == 1 for info in infos.values()], dim=1)
        told = {name: infos["token_0"][name] for name in TOLD}
        return Stepped(paid, seen, asked, *flags, told)


class TorchRL(Gym):
    batch = 4

    def make(self, batch, game):
        from prunevit.envs.adapters.torchrl import TokenPruneTorchRL

        return TokenPruneTorchRL(batch, **game)

    def begin(self, env, seed=None, indices=None):
        if seed is not None:
            env.set_seed(seed)
        return env.reset(indices=indices)["token", "observation"]

    def step(self, env, keep):
        actions = env.full_action_spec.zero().set(("token", "action"), keep.long())
        after = env.step(actions)["next"]
        told = {name: value.squeeze(-1) for name, value in after["info"].items()}
        return Stepped(
            after["token", "reward"].squeeze(-1),
            after["token", "observation"],
            after["token", "action_mask"][..., 1],
            after["terminated"],
            after["done"] & ~after["terminated"],
            told,
        )


DRIVERS = {
    "pettingzoo": PettingZoo,
    "gymnasium": Gym,
    "gymnasium vector": GymVector,
    "sb3": StableBaselines,
    "epymarl": Epymarl,
    "rllib": RllibSingle,
    "rllib vector": Rllib,
    "torchrl": TorchRL,
}
EXTRAS = {"rllib": "rllib", "rllib vector": "rllib", "torchrl": "torchrl"}
ADAPTERS = [
    pytest.param(name, marks=pytest.mark.integration(EXTRAS[name]) if name in EXTRAS else ())
    for name in DRIVERS
    if name != "pettingzoo"
]


@pytest.fixture(params=["pettingzoo", *ADAPTERS])
def driver(request):
    """Drives PettingZoo's environment or an adapter."""
    return DRIVERS[request.param]()


@pytest.fixture(params=ADAPTERS)
def adapter(request):
    """Drives an adapter."""
    return DRIVERS[request.param]()
