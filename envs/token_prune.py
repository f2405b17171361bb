"""``TokenPruneEnv``: token pruning as a PettingZoo ``ParallelEnv``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium import logger
from gymnasium.spaces import Space
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from pettingzoo import ParallelEnv
from torch import Tensor, nn

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
from prunevit.envs.rendering import denormalise, strip_of_episode
from prunevit.envs.rewards import Reward, make_reward
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.staged_vit import Execution, StagedViT

PrunedAgents = Literal["leave", "stay"]
RENDER_MODES = ("rgb_array", "human")


def _as_played(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` itself where it is in evaluation mode on ``device``, else a copy that is: training
    and a device are its owner's choice.
    """
    there = torch.empty(0, device=device).device  # "cuda" is "cuda:0", or another current one
    tensors = (*model.parameters(), *model.buffers())
    elsewhere = any(tensor.device != there for tensor in tensors)
    if elsewhere or any(module.training for module in model.modules()):
        return copy.deepcopy(model).to(device).eval()
    return model


def _settles_at_once(reward: Reward) -> bool:
    # who wrote a reward without saying it was not thinking of agents that leave
    return not getattr(reward, "pays_pruned", True)


class TokenPruneEnv(ParallelEnv):
    """Token pruning as a PettingZoo ``ParallelEnv``.

    Each patch token of an image is an agent. Before each stage's block it keeps (1) or prunes (0)
    itself. ``TokenPruneEnv()`` plays on scanned digits in clutter with a small trained ViT, which
    come with the package.

    Args:
        backbone: a name for ``create_backbone``, or a timm model. It is not changed: a model in
            training mode or on another device is copied.
        dataset: a name for ``open_images``, or an ``ImageSet``.
        split: which part of a named dataset.
        prune_before: 0-based blocks before which stages stand; before every block but the first
            where None.
        reward: a name in ``rewards.REWARDS``, or a ``Reward``.
        observation: what an agent observes, names in ``fields.FIELDS``.
        num_envs: None plays one image an episode, with numpy values. A number plays so many images
            at once: every value is a tensor with that leading dimension on the game's device, a
            view of the game's own, and so are the spaces.
        pruned_agents: "stay": a pruned agent remains, observes zeros, may only prune, is still
            paid, and all agents terminate together. "leave": it terminates with that step's reward
            and is gone. That is only right for a reward that owes it nothing more
            (``Reward.pays_pruned`` is False, as of "markov-game"); others are refused. With
            ``num_envs`` agents stay.
        device: "auto" takes CUDA, MPS or the CPU, whichever is there first.
        execution: "packed" removes tokens, "masked" is the slow reference.
        render_mode: "rgb_array" or "human".

    Infos hold the same keys from ``reset`` on: ``index`` and ``label`` of the image,
    ``action_mask`` int8 [2], and how the last episode that ended came out: ``logits`` [classes],
    ``correct`` and ``gmacs`` (policy not included). Those three are zero until an episode has
    ended, and after a reset with a seed. They outlast a reset without one because libraries that
    reset by themselves (SuperSuit) lay its infos over the last step's.

    Raises:
        ValueError: an argument of an unknown name or a wrong value, or a reward that agents who
            leave would not receive; the message says which would be right.
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
    ) -> None:
        if pruned_agents not in get_args(PrunedAgents):
            raise ValueError(f"pruned_agents={pruned_agents!r}: choose from leave, stay")
        paid = make_reward(reward) if isinstance(reward, str) else reward
        if pruned_agents == "leave" and not _settles_at_once(paid):
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
        if render_mode is not None and render_mode not in RENDER_MODES:
            raise ValueError(f"render_mode={render_mode!r}: choose from {', '.join(RENDER_MODES)}")
        played_on = pick_device(device)
        if isinstance(backbone, str):
            model = create_backbone(backbone).to(played_on).eval()
        else:
            model = _as_played(backbone, played_on)
        config = model_data_config(model)
        images = open_images(dataset, split, config) if isinstance(dataset, str) else dataset
        game = TokenGame(StagedViT(model, prune_before, execution), paid)
        episodes = 1 if num_envs is None else num_envs
        self.batched = BatchedTokenPrune(game, images, episodes, observation)
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
        self._normalisation = (tuple(config["mean"]), tuple(config["std"]))
        self._observed: Observations | None = None
        self._history: list[Tensor] = []
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
            ValueError: a wrong number of indices, or one that the dataset doesn't have; a seed that
                is no whole number from 0 on; options that are no mapping.
        """
        self._observed = self.batched.reset(seed, indices=image_indices(options))
        self.agents = list(self.possible_agents)
        self._history = [self._observed.alive]
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
        """Takes one action for each of ``self.agents``: 0 prunes, 1 keeps. What libraries say for
        agents that are gone is ignored.

        Returns:
            Observations, rewards, terminations, truncations and infos of the agents that took part;
            five empty dictionaries after the episode's end.

        Raises:
            GameError: before ``reset``.
            ValueError: agents unknown or missing, or an action that is not 0 or 1; whatever was
                wrong, the episode goes on from where it stood.
        """
        if self._observed is None:
            raise GameError("no episode to step in: call reset first")
        self._check_agents(actions)
        if not self.agents:
            return {}, {}, {}, {}, {}
        acting, gone = self.agents, ~self._history[-1]
        transition = self.batched.step(self._joint_action(actions))
        self._observed = transition.observations
        over = bool(transition.terminated[0])
        self._record(over, transition.observations)
        reward = transition.reward

        leaving = self.pruned_agents == "leave"
        survivors = self._history[-1]
        if leaving:
            self._check_settled(reward * gone)
        if leaving and not over and not survivors.any():
            # nobody is left to act, but the image is still on its way to a prediction
            over = True
            self._play_out()
        ended = torch.full_like(survivors, over) | (~survivors if leaving else False)
        observations = self._by_agent(self._observed.observation, acting)
        rewards = self._by_agent(reward, acting)
        terminations = self._by_agent(ended, acting)
        truncations = self._by_agent(torch.zeros_like(ended), acting)
        if over:
            self._outcome = self.batched.outcome
        infos = self._infos(acting)
        if over:
            self.agents = []
        elif leaving:
            alive = survivors[0].tolist()
            self.agents = [agent for agent in acting if alive[self._place[agent]]]
        if self.render_mode == "human":
            self.render()
        return observations, rewards, terminations, truncations, infos

    def state(self) -> NDArray[np.float32] | Tensor:
        """The global state [D_state], or a tensor [num_envs, D_state]; zeros after the end."""
        if self._observed is None:
            raise GameError("no state before reset")
        state = self._observed.state
        return state if self.num_envs is not None else state[0].cpu().numpy()

    def render(self) -> NDArray[np.uint8] | None:
        """The image before the first and after each stage so far, pruned patches whited out.

        Returns:
            uint8 [H, W, 3], all pictures of an episode of one size, images of a batch below each
            other; None in mode "human", which shows it in a window, and without a mode.
        """
        if self.render_mode is None:
            logger.warn(
                "nothing is rendered: give render_mode='rgb_array' or 'human' when the environment "
                "is made"
            )
            return None
        if not self._history:
            raise GameError("nothing to render before reset")
        pixels = denormalise(self.batched.pixels.float().cpu(), *self._normalisation)
        alive = torch.stack(self._history, dim=1).cpu()  # [B, stages so far + 1, N]
        game = self.batched.game
        strips = [
            strip_of_episode(image, tuple(rows), game.backbone.grid_size, game.num_stages + 1)
            for image, rows in zip(pixels, alive, strict=True)
        ]
        picture = np.concatenate(strips)
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
        device = self.batched.device
        shape = () if self.num_envs is None else (self.num_envs,)
        joint = torch.zeros(self.batched.num_envs, self.batched.num_agents, dtype=torch.int64)
        if self.num_envs is None:
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
                column = to_actions(actions[agent], device)
            except ValueError as error:
                raise ValueError(
                    f"action of {agent} must be integers {list(shape)}: {error}"
                ) from error
            if column.shape != shape:
                raise ValueError(
                    f"action of {agent} must be integers {list(shape)}: got {list(column.shape)}"
                )
            columns.append(column)
        joint = torch.stack(columns, dim=1)
        if ((joint != PRUNE) & (joint != KEEP)).any():
            raise ValueError("actions must be 0 (prune) or 1 (keep)")
        return joint

    def _record(self, over: bool, observed: Observations) -> None:
        last = self.batched.survivors if over else observed.alive
        self._history.append(last)

    def _check_settled(self, paid: Tensor) -> None:
        """What agents that had left are paid must be nothing."""
        if paid.any():
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
        """A space of one image's values as that of what is returned."""
        return space if self.num_envs is None else batch_space(space, self.num_envs)

    def _by_agent(self, values: Tensor, agents: Sequence[str]) -> dict[str, Any]:
        """Columns of [B, N, ...] by agent: tensor views, or numpy values of the one image."""
        if self.num_envs is not None:
            return dict(zip(self.possible_agents, values.unbind(1), strict=True))
        # the zeros after the end are one number in memory; numpy's are the caller's to write on
        rows = values[0].cpu().contiguous()
        if rows.dim() == 1:
            listed = rows.tolist()
            return {agent: listed[self._place[agent]] for agent in agents}
        array = rows.numpy()
        return {agent: array[self._place[agent]] for agent in agents}

    def _infos(self, agents: Sequence[str]) -> dict[str, dict[str, Any]]:
        batched, outcome = self.batched, self._outcome
        assert self._observed is not None
        classes = batched.game.backbone.num_classes
        if self.num_envs is not None:
            shared = {
                "index": batched.indices,
                "label": batched.labels,
                "logits": outcome.logits
                if outcome
                else torch.zeros(1, device=batched.device).expand(self.num_envs, classes),
                "correct": outcome.correct if outcome else torch.zeros_like(batched.labels).bool(),
                "gmacs": outcome.gmacs if outcome else torch.zeros_like(batched.labels).float(),
            }
            masks = self._observed.action_mask.to(torch.int8)
            return {
                agent: {**shared, "action_mask": mask}
                for agent, mask in zip(self.possible_agents, masks.unbind(1), strict=True)
            }
        single = {
            "index": int(batched.indices[0]),
            "label": int(batched.labels[0]),
            "logits": outcome.logits[0].float().cpu().numpy()
            if outcome
            else np.zeros(classes, np.float32),
            "correct": bool(outcome.correct[0]) if outcome else False,
            "gmacs": float(outcome.gmacs[0]) if outcome else 0.0,
        }
        all_masks = self._observed.action_mask[0].to(torch.int8).cpu().numpy()
        return {agent: {**single, "action_mask": all_masks[self._place[agent]]} for agent in agents}


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(map(str, names[:most])) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
