"""``TokenPruneEnv``: token pruning as a PettingZoo ``ParallelEnv``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium.spaces import Space
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from pettingzoo import ParallelEnv
from torch import Tensor, nn

from prunevit.envs.batched.infos import episode_infos
from prunevit.envs.batched.inputs import KEEP, PRUNE, image_indices, to_actions
from prunevit.envs.batched.protocol import Observations
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import DIGITS, open_images
from prunevit.envs.data.digits import Split
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data_config import model_data_config
from prunevit.envs.devices import pick_device
from prunevit.envs.fields import DEFAULT_FIELDS
from prunevit.envs.game import GameError, Outcome, TokenGame
from prunevit.envs.rendering import EpisodePictures
from prunevit.envs.rewards import Reward, make_reward
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.staged_vit import Execution, OnPrune, PruneAt, StagedViT

PrunedAgents = Literal["leave", "stay"]
RENDER_MODES = ("rgb_array", "human")


def _in_eval_mode(model: nn.Module, device: torch.device) -> nn.Module:
    """Returns ``model`` if it is in evaluation mode on ``device``, else a copy that is."""
    there = torch.empty(0, device=device).device  # "cuda" is "cuda:0", or another current one
    tensors = (*model.parameters(), *model.buffers())
    elsewhere = any(tensor.device != there for tensor in tensors)
    if elsewhere or any(module.training for module in model.modules()):
        return copy.deepcopy(model).to(device).eval()
    return model


class TokenPruneEnv(ParallelEnv):
    """Token pruning as a PettingZoo ``ParallelEnv``.

    Each patch token of an image is an agent, which at each stage keeps (1) or prunes (0) itself.
    ``TokenPruneEnv()`` plays with a small trained ViT on scanned digits in clutter. Both come with
    the package.

    Args:
        backbone: a name for ``create_backbone``, or a timm model. The model isn't changed: if it is
            in training mode or on another device, a copy is played with.
        dataset: a name for ``open_images``, or an ``ImageSet``.
        split: which part of a named dataset.
        prune_before: the stages: 0-based blocks before which tokens can be pruned. None stands for
            all blocks but the first.
        reward: a name in ``rewards.REWARDS``, or a ``Reward``.
        observation: what an agent observes, names in ``fields.FIELDS``.
        num_envs: None plays one image an episode and returns numpy values. A number plays that many
            images at once: all values are tensors on the game's device with that leading dimension,
            and the spaces are batched. The tensors are views of the game's own.
        pruned_agents: what becomes of an agent that prunes itself. "stay": it remains, observes
            zeros, can only prune, and receives rewards until all agents terminate together.
            "leave": it terminates with the reward of that step. Only rewards that give pruned
            agents nothing later allow that (``Reward.pays_pruned`` is False, as in "markov-game").
            With ``num_envs`` agents stay.
        device: "auto" takes CUDA, MPS or the CPU, the first that there is.
        execution: "packed" removes tokens. "masked" hides them from the others instead: it is the
            slow reference.
        on_prune: "drop": what a pruned patch holds is gone. "merge": it is averaged into the most
            similar patch that stays, so that little is lost where patches are alike.
        render_mode: "rgb_array" or "human".
        prune_at: "block" decides before a block of ``prune_before`` begins, "mlp" inside of it,
            between its attention and its MLP.

    Infos have the same keys from ``reset`` on: ``index`` and ``label`` of the image,
    ``action_mask`` int8 [2], and the outcome of the last episode that ended: ``logits`` [classes],
    ``correct`` and ``gmacs`` (policy not included). The outcome is zero until an episode has ended,
    and after a reset with a seed. A reset without a seed keeps it, because libraries that reset by
    themselves (SuperSuit) write the infos of the reset over those of the last step.

    Raises:
        ValueError: an argument has an unknown name or a wrong value, or agents who leave would not
            receive the reward. The message says what would be right.
        UnsupportedBackboneError: the backbone can't run on part of its tokens.
        DatasetError: the dataset is unknown or damaged.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - PettingZoo's own declaration
        "name": "token_prune_v0",
        "render_modes": list(RENDER_MODES),
        "render_fps": 2,
        "is_parallelizable": True,
    }

    def __init__(
        self,
        backbone: str | nn.Module = DIGITS_VIT,
        dataset: str | ImageSet = DIGITS,
        split: Split = "train",
        prune_before: Sequence[int] | None = None,
        reward: str | Reward = "team",
        observation: Sequence[str] = DEFAULT_FIELDS,
        num_envs: int | None = None,
        pruned_agents: PrunedAgents = "stay",
        device: str | torch.device = "auto",
        execution: Execution = "packed",
        render_mode: str | None = None,
        prune_at: PruneAt = "block",
        on_prune: OnPrune = "drop",
    ) -> None:
        if pruned_agents not in get_args(PrunedAgents):
            raise ValueError(f"pruned_agents={pruned_agents!r}: choose from leave, stay")
        paid = make_reward(reward) if isinstance(reward, str) else reward
        # a reward that doesn't say was not written with agents that leave in mind
        if pruned_agents == "leave" and getattr(paid, "pays_pruned", True):
            raise ValueError(
                f"pruned_agents='leave' with {type(paid).__name__}, which pays agents after they "
                "were pruned: whoever left would not receive it, and pruning everything at once "
                "would pay best. Take pruned_agents='stay', or a reward whose pays_pruned is "
                "False, as 'markov-game'"
            )
        if pruned_agents == "leave" and num_envs is not None:
            raise ValueError(
                f"pruned_agents='leave' with num_envs={num_envs}: the images of a batch lose "
                "different agents, so all stay: take pruned_agents='stay'"
            )
        self._pictures = EpisodePictures(render_mode, RENDER_MODES)
        played_on = pick_device(device)
        if isinstance(backbone, str):
            model = create_backbone(backbone).to(played_on).eval()
        else:
            model = _in_eval_mode(backbone, played_on)
        if isinstance(dataset, str):
            dataset = open_images(dataset, split, model_data_config(model))
        staged = StagedViT(model, prune_before, execution, prune_at=prune_at, on_prune=on_prune)
        game = TokenGame(staged, paid)
        episodes = 1 if num_envs is None else num_envs
        self.batched = BatchedTokenPrune(game, dataset, episodes, observation)
        self.num_envs = num_envs
        self.pruned_agents = pruned_agents
        self.render_mode = render_mode
        self.possible_agents = [f"token_{i}" for i in range(game.num_agents)]
        self.agents: list[str] = []
        self.state_space = self._spaced(self.batched.state_space)
        self._place = {agent: i for i, agent in enumerate(self.possible_agents)}
        self._observation_space = self._spaced(self.batched.observation_space)
        self._action_spaces = {
            agent: self._spaced(copy.deepcopy(self.batched.action_space))
            for agent in self.possible_agents
        }
        self._observed: Observations | None = None
        self._alive = torch.empty(0, dtype=torch.bool)
        self._outcome: Outcome | None = None

    def observation_space(self, agent: str) -> Space[Any]:
        return self._observation_space

    def action_space(self, agent: str) -> Space[Any]:
        return self._action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Begins an episode on images that ``seed`` draws, or on ``options["indices"]``.

        Raises:
            ValueError: the number of indices is wrong, the dataset doesn't have one of them, the
                seed is not a whole number of 0 or more, or ``options`` is not a mapping.
        """
        self._observed = self.batched.reset(seed, indices=image_indices(options))
        self.agents = list(self.possible_agents)
        self._alive = self._observed.alive
        self._pictures.begin(self._alive)
        if seed is not None:
            self._outcome = None  # a seed gives the same values whatever came before
        if self.render_mode == "human":
            self.render()
        return self._by_agent(self._observed.observation, self.agents), self._infos(self.agents)

    def step(
        self, actions: Mapping[str, Any]
    ) -> tuple[
        dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]
    ]:
        """Takes one action for each of ``self.agents``: 0 prunes, 1 keeps. Actions of agents that
        are gone are ignored, since some libraries send placeholders for them.

        Returns:
            Observations, rewards, terminations, truncations and infos of the agents that took part,
            or five empty dictionaries after the episode's end.

        Raises:
            GameError: ``reset`` wasn't called.
            ValueError: an agent is unknown or missing, or an action is not 0 or 1. The episode then
                stays where it was.
        """
        if self._observed is None:
            raise GameError("no episode to step in: call reset first")
        self._check_agents(actions)
        if not self.agents:
            return {}, {}, {}, {}, {}
        acting, gone = self.agents, ~self._alive
        transition = self.batched.step(self._joint_action(actions))
        self._observed = transition.observations
        over = bool(transition.terminated[0])
        self._alive = survivors = self.batched.survivors
        self._pictures.add(survivors)

        leaving = self.pruned_agents == "leave"
        if leaving:
            self._check_settled(transition.reward * gone)
        if leaving and not over and not survivors.any():
            # nobody is left to act, but the image is still on its way to a prediction
            over = True
            self._play_out()
        ended = torch.full_like(survivors, over) | (~survivors if leaving else False)
        observations = self._by_agent(self._observed.observation, acting)
        rewards = self._by_agent(transition.reward, acting)
        terminations = self._by_agent(ended, acting)
        truncations = self._by_agent(torch.zeros_like(ended), acting)
        if over:
            self._outcome = self.batched.outcome
            self.agents = []
        elif leaving:
            alive = survivors[0].tolist()
            self.agents = [agent for agent in acting if alive[self._place[agent]]]
        infos = self._infos(acting)
        if self.render_mode == "human":
            self.render()
        return observations, rewards, terminations, truncations, infos

    def state(self) -> NDArray[np.float32] | Tensor:
        """Returns the global state, float32 [D_state], or a tensor [num_envs, D_state]. It is zero
        after the episode's end.
        """
        if self._observed is None:
            raise GameError("no state before reset")
        state = self._observed.state
        return state if self.num_envs is not None else state[0].cpu().numpy()

    def render(self) -> NDArray[np.uint8] | None:
        """Draws the image before the first and after each stage so far, with pruned patches faded.

        Returns:
            uint8 [H, W, 3]: all pictures of an episode have one size, and the images of a batch
            are below each other. None in mode "human", which shows them in a window, and without a
            mode.
        """
        pictures = self._pictures.draw(self.batched.game, self.batched.pixels)
        if pictures is None:
            return None
        picture = np.concatenate(pictures)
        if self.render_mode == "rgb_array":
            return picture
        import matplotlib.pyplot as plt

        figure = plt.figure("token_prune", clear=True)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(picture)
        axes.set_axis_off()
        plt.pause(1 / self.metadata["render_fps"])
        return None

    def close(self) -> None:
        self.batched.close()
        if self.render_mode == "human":
            import matplotlib.pyplot as plt

            plt.close("token_prune")

    def _check_agents(self, actions: Mapping[str, Any]) -> None:
        if not isinstance(actions, Mapping):
            raise ValueError(f"actions must be a mapping from agents to actions: got {actions!r}")
        missing = [agent for agent in self.agents if agent not in actions]
        surplus = [agent for agent in actions if agent not in self._place]
        if missing or surplus:
            raise ValueError(
                f"actions must be for each of the {len(self.agents)} agents that live: "
                f"missing {_some(missing)}, unknown {_some(surplus)}"
            )

    def _joint_action(self, actions: Mapping[str, Any]) -> Tensor:
        if self.num_envs is None:
            joint = torch.zeros(1, self.batched.num_agents, dtype=torch.int64)
            for agent in self.agents:
                action = actions[agent]
                # an array of one number, as policies return, is a number too
                number = np.asarray(action)
                if number.size != 1 or number.item() not in (PRUNE, KEEP):
                    raise ValueError(f"action {action!r} of {agent}: choose 0 (prune) or 1 (keep)")
                joint[0, self._place[agent]] = int(number.item())
            return joint
        columns = []
        for agent in self.agents:
            try:
                column = to_actions(actions[agent], self.batched.device)
                if column.shape != (self.num_envs,):
                    raise ValueError(f"got {list(column.shape)}")
            except ValueError as error:
                raise ValueError(
                    f"action of {agent} must be integers [{self.num_envs}]: {error}"
                ) from error
            columns.append(column)
        joint = torch.stack(columns, dim=1)
        if ((joint != PRUNE) & (joint != KEEP)).any():
            raise ValueError("actions must be 0 (prune) or 1 (keep)")
        return joint

    def _check_settled(self, reward: Tensor) -> None:
        """Refuses a ``reward`` of agents that had left before this step, [B, N]."""
        if reward.any():
            raise GameError(
                f"{type(self.batched.game.reward).__name__} says pays_pruned=False, but pays "
                "agents that have left: take pruned_agents='stay'"
            )

    def _play_out(self) -> None:
        """Runs the rest of an episode whose agents have all left."""
        nobody = torch.zeros(1, self.batched.num_agents, dtype=torch.int64)
        over = False
        while not over:
            transition = self.batched.step(nobody)
            self._observed = transition.observations
            self._check_settled(transition.reward)
            over = bool(transition.terminated[0])

    def _spaced(self, space: Space[Any]) -> Space[Any]:
        """Turns a space of one image's values into that of all images."""
        return space if self.num_envs is None else batch_space(space, self.num_envs)

    def _by_agent(self, values: Tensor, agents: Sequence[str]) -> dict[str, Any]:
        """Columns of [B, N, ...] by agent: tensor views, or numpy values of the one image."""
        if self.num_envs is not None:
            return dict(zip(self.possible_agents, values.unbind(1), strict=True))
        # the zeros after the end are one number in memory; numpy's are the caller's to write on
        rows = values[0].cpu().contiguous()
        listed = rows.tolist() if rows.dim() == 1 else rows.numpy()
        return {agent: listed[self._place[agent]] for agent in agents}

    def _infos(self, agents: Sequence[str]) -> dict[str, dict[str, Any]]:
        assert self._observed is not None
        shared: dict[str, Any] = dict(episode_infos(self.batched, self._outcome))
        if self.num_envs is None:
            for name, (value,) in shared.items():
                shared[name] = value.item() if value.dim() == 0 else value.cpu().numpy()
        masks = self._by_agent(self._observed.action_mask.to(torch.int8), agents)
        return {agent: {**shared, "action_mask": mask} for agent, mask in masks.items()}


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(map(str, names[:most])) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
