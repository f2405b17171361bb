"""The actor of the token game: its settings, and the weights that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from prunevit.agents import saving
from prunevit.agents.policies.actor_critic import CommunicatingActor, TokenActor
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.policies.serialization import describe_policy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.agents.run_reader import default_alpha
from prunevit.envs.fields import field_slices
from prunevit.envs.rewards import LARGEST_NUMBER
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.backbones import StagedViTSettings
from prunevit.trainers.common.settings import Range, Weight, Widths

MOST_HEADS = 64  # of an attention among agents
# what makes an actor another one, by the names of ``describe_policy``
FORM = ("observation", "hidden", "attention_prior", "redundancy_prior", "actor_attention")


@dataclass
class ActorSettings(StagedViTSettings):
    """What agents observe, and the actor that they share."""

    LATER: ClassVar[Mapping[str, object]] = {
        **StagedViTSettings.LATER,
        "redundancy_prior": 0.0,
    }

    observation: tuple[str, ...] = ("token", "cls", "stage", "cls_attention")
    """What an agent sees: token cls stage position cls_attention redundancy alive_fraction
    alpha."""
    alpha_range: tuple[float, float] | None = None
    """Lowest and highest alpha, in place of one: each image gets its own, which the agents observe
    as alpha. The policy then serves every alpha in between: policy.alpha = 0.1."""
    attention_prior: Weight = 0.5
    """Weight of log(class attention) that the actor starts from, then learns; 0 uses none."""
    redundancy_prior: Weight = 0.0
    """Weight of 1 - redundancy that the actor starts from, then learns; 0 uses none. With 20, where
    pruned patches merge, it starts as a merging method: those go that are like another."""
    keep_bias: Annotated[float, Range(-LARGEST_NUMBER, LARGEST_NUMBER)] = 3.0
    """Logit of keep that the actor starts from; positive prunes little at first."""
    hidden: Widths = (32,)
    """Widths of the actor's hidden layers."""
    actor_attention: Annotated[int, Range(0, MOST_HEADS)] = 0
    """Heads of an attention among the living agents of an image, behind the actor's first hidden
    layer; 0 for none. The agents then communicate before they decide, which counts as the policy's
    compute: 2 heads are 0.6% of the digits' dense model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.alpha_range is not None) != ("alpha" in self.observation):
            raise ValueError(
                "a policy for a range of alphas needs both --alpha-range and alpha in "
                f"--observation: got alpha_range={self.alpha_range} and "
                f"observation={self.observation}"
            )
        if self.actor_attention and not self.hidden:
            raise ValueError("attention among agents needs an actor with a hidden layer")


def make_actor(config: ActorSettings, backbone: StagedViT) -> TokenActor:
    """A fresh actor for the game on ``backbone``.

    Raises:
        ValueError: its prior reads what agents don't observe.
    """
    slices = field_slices(backbone, config.observation)
    attention = None
    if config.attention_prior:
        if "cls_attention" not in slices:
            raise ValueError(
                "the attention prior reads cls_attention: add it to --observation, "
                "or give --attention-prior 0"
            )
        attention = slices["cls_attention"].start
    if config.redundancy_prior and "redundancy" not in slices:
        raise ValueError(
            "the redundancy prior reads redundancy: add it to --observation, "
            "or give --redundancy-prior 0"
        )
    heads = config.actor_attention
    make = partial(CommunicatingActor, heads=heads) if heads else TokenActor
    return make(
        max(columns.stop for columns in slices.values()),
        config.hidden,
        attention,
        prior_weight=config.attention_prior,
        keep_bias=config.keep_bias,
        alpha=slices["alpha"].start if "alpha" in slices else None,
        redundancy=slices["redundancy"].start if config.redundancy_prior else None,
        redundancy_weight=config.redundancy_prior,
    )


def greedy_policy(config: ActorSettings, backbone: StagedViT, actor: nn.Module) -> LearnedPolicy:
    """The policy that acts by ``actor``, under the middle of its range of alphas."""
    alpha = default_alpha(config.to_json())
    return LearnedPolicy(actor, config.observation, backbone.num_prefix, alpha)


def start_from(folder: Path, config: ActorSettings, backbone: StagedViT, actor: TokenActor) -> None:
    """Gives ``actor`` the weights of a finished run's policy, or of a saved ``PrunedViT``'s.

    Args:
        folder: the run's, or the model's.
        config: the settings of the training that begins.
        backbone: its backbone.
        actor: its actor.

    Raises:
        ValueError: there is no such model in the folder, or its policy is of another kind or form,
            or was trained for other stages or another backbone.
    """
    if not folder.is_dir():
        raise ValueError(f"--init {folder}: there is no such folder")
    with torch.random.fork_rng(devices=[]):  # networks made later begin as they would without this
        if (folder / saving.WEIGHTS).is_file():
            model = PrunedViT.from_pretrained(folder)
        else:
            model = PrunedViT.from_run(folder, config.backbone if ":" in config.backbone else None)
    policy = model.policy
    if not isinstance(policy, LearnedPolicy):
        raise ValueError(
            f"--init {folder}: a {type(policy).__name__} has no actor to start from: give a run of "
            "trainers.mappo or trainers.straight_through"
        )
    theirs = _form(policy, model.backbone)
    ours = _form(greedy_policy(config, backbone, actor), backbone)
    differ = [f"{name} {theirs[name]} instead of {ours[name]}" for name in ours
              if theirs[name] != ours[name]]  # fmt: skip
    if differ:
        raise ValueError(f"--init {folder}: it was trained with {', '.join(differ)}")
    weights, own = map(_seen_weights, (model.backbone, backbone))
    if weights.keys() != own.keys() or any(
        weights[name].shape != value.shape
        or not torch.equal(weights[name].to(value), value)  # in the dtype of this training
        for name, value in own.items()
    ):
        raise ValueError(f"--init {folder}: it was trained on a backbone with other weights")
    actor.load_state_dict(policy.actor.state_dict())


def _form(policy: LearnedPolicy, backbone: StagedViT) -> Mapping[str, Any]:
    described = describe_policy(policy)
    stages = {"prune_before": list(backbone.prune_before), "prune_at": backbone.prune_at}
    return {name: described[name] for name in FORM} | stages


def _seen_weights(backbone: StagedViT) -> dict[str, Tensor]:
    """Weights that an agent's observation depends on: not the classifier's, which a reward for
    embeddings leaves away.
    """
    weights = backbone.model.state_dict()
    return {name: value for name, value in weights.items() if not name.startswith("head")}
