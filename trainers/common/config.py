"""What can be set from the command line, with defaults for each kind of game."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from prunevit.agents.policies.actor_critic import HiddenLayers
from prunevit.trainers.common.actors import ActorSettings
from prunevit.trainers.common.run import RUNS
from prunevit.trainers.common.settings import (
    Count,
    Decay,
    JsonObject,
    Positive,
    Seed,
    Share,
    Weight,
    Widths,
    Workers,
    parse_arguments,
)

TOKEN_PRUNE = "token-prune"
PETTINGZOO_PREFIX = "pettingzoo:"

CriticKind = Literal["central", "local", "none"]
Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "bfloat16"]


@dataclass
class MappoConfig(ActorSettings):
    """MAPPO on the token-pruning game, or on any PettingZoo ParallelEnv with homogeneous agents."""

    LATER: ClassVar[Mapping[str, object]] = {
        **ActorSettings.LATER,
        "actor_attention": 0,
        "critic_norm": False,
        "hidden_layers": "gelu",
        "init": None,
        "value_norm_decay": 0.99,
    }

    env: str = TOKEN_PRUNE
    """token-prune, or pettingzoo:MODULE (as in pettingzoo:mpe2.simple_spread_v3)."""
    env_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of a PettingZoo environment, as {"N": 5}."""
    backbone_dtype: Dtype = "float32"
    """What the frozen backbone computes in, in training and in its evaluations; the policy, the
    rewards and all that is learned stay in float32."""
    compile: bool = False
    """Run the frozen backbone's blocks through torch.compile while training: a minute more at the
    start, and little gained on a CPU (docs/scaling.md). Needs a C++ compiler, on a GPU Triton."""
    augment: bool = True
    """Vary training images each time they are played (photographs: timm's training transform)."""
    cache_gb: Weight = 0.0
    """Memory, in GB a process, that keeps what the blocks before the first stage made of the images
    played, so that it is computed once; the images must not be varied (augment). A resumed run then
    ends like the one that was not stopped up to rounding only, as other images go together through
    those blocks."""
    workers: Workers | None = None
    """Processes a rank that read and vary photographs before they are played; 0 reads them when
    they are needed, in threads. If not given, 0 on a CPU, and beside a GPU as many as a rank has
    cores, up to 8. Digits need none, and with cache_gb there are none."""
    skip_bad_images: bool = False
    """Decode every image of a folder at the start, and leave out and list those that are damaged;
    otherwise the first one that is read ends the run."""
    reward: str = "team"
    """team, markov-game (the paper's) or released-code (what its code computes)."""
    alpha: float | None = None
    """The reward's weight of compute; the reward's own default if not given."""
    beta: float | None = None
    """The reward's weight of accuracy; the reward's own default if not given."""
    accuracy: str | None = None
    """What counts as accuracy: correct, confidence, agreement, kl or embedding; the reward's own
    default if not given. embedding is the cosine similarity to the dense model's embedding, and
    plays with the backbone without its classifier."""
    rollouts_per_image: Count = 8
    """Episodes that play the same image and are compared with each other; 1 compares nothing."""
    init: Path | None = None
    """Start the actor from the weights of a finished run (of trainers.straight_through, or of this
    trainer) or of a saved PrunedViT, with the same observation, widths, stages and backbone. The
    critic starts afresh."""
    num_envs: Count = 256
    """Episodes that are played at once, by all ranks together."""
    rollout_steps: Count = 128
    """Steps an iteration where episodes vary in length; a game of fixed length is played to its end
    instead.
    """
    iterations: Count = 500
    """Rounds of playing and learning."""
    hidden_layers: HiddenLayers = "gelu"
    """What follows each hidden layer of actor and critic: gelu, or relu-norm, which is ReLU and a
    LayerNorm, as MAPPO's authors have it. The token game's are gelu."""
    critic: CriticKind = "central"
    """central sees observation and state (MAPPO), local the observation alone (IPPO); none leaves
    the baseline to the rollouts of the same image, as RLOO and GRPO do.
    """
    critic_hidden: Widths = (64,)
    """Widths of the critic's hidden layers."""
    critic_norm: bool = False
    """Put a LayerNorm on the critic's input, as MAPPO's authors do; the actor always has one."""
    value_norm_decay: Decay = 0.99999
    """Decay of ValueNorm's running mean and variance of returns, a step of the optimizer."""
    epochs: Count = 4
    """Passes over an iteration's decisions."""
    minibatches: Count = 1
    """Parts of a pass; each is a step of the optimizer."""
    accumulate: Count | None = None
    """Parts of a minibatch whose gradients are added up before the step, for less memory; the step
    is the same up to rounding. If not given, parts of a CPU's cache size there, elsewhere one."""
    lr: Positive = 3e-3
    """Adam's learning rate at the start."""
    lr_schedule: Schedule = "cosine"
    """How the learning rate falls to zero over the iterations."""
    gamma: Share = 1.0
    """Discount."""
    gae_lambda: Share = 1.0
    """GAE's lambda; without a critic it is 1. Below 1 an agent that stays is judged in part by what
    the critic expects of it, and one that leaves by what it gets. A critic that has yet to learn
    then drives agents out, the more so the more stages there are."""
    clip: Positive = 0.2
    """PPO's clipping range, of policy and value."""
    entropy: Weight = 0.003
    """Weight of the policy's entropy."""
    value_weight: Weight = 1.0
    """Weight of the value loss."""
    huber_delta: Positive = 10.0
    """Where the value loss turns from squared to linear, in normalised units."""
    max_grad_norm: Positive = 10.0
    """Gradients are clipped to this norm."""
    eval_every: Count = 100
    """Iterations between two greedy evaluations on validation."""
    eval_size: Count = 1_000
    """Validation images (episodes, for PettingZoo) of each such evaluation."""
    checkpoint_every: Count = 50
    """Iterations between two checkpoints."""
    seed: Seed = 0
    """Seeds weights, images, actions and the order of learning."""
    profile: bool = False
    """Trace the third and fourth iteration (trace.json, by torch.profiler) and print where an
    iteration goes; for that there must be four."""
    run_name: str | None = None
    """The run is written to runs/RUN_NAME; a name made of game, seed and time if not given."""
    resume: Path | None = None
    """A run folder to go on with, under the configuration it was started with. A folder
    can't choose a PettingZoo game, or a dataset that a library may fetch: give those again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.is_token_prune and not self.env.startswith(PETTINGZOO_PREFIX):
            raise ValueError(
                f"unknown env {self.env!r}: choose {TOKEN_PRUNE} or {PETTINGZOO_PREFIX}MODULE, "
                f"as in {PETTINGZOO_PREFIX}mpe2.simple_spread_v3"
            )
        if self.alpha_range is not None and self.alpha is not None:
            raise ValueError("give --alpha or --alpha-range, not both")
        if self.profile and self.iterations < 4:
            raise ValueError(f"iterations={self.iterations}: a profile needs 4")
        if self.cache_gb and (self.augment or not self.is_token_prune):
            raise ValueError(
                "a cache needs images that are the same each time: give --no-augment with "
                "--cache-gb, in the token game"
            )
        if self.critic == "none" and self.is_token_prune and self.rollouts_per_image < 2:
            raise ValueError(
                "without a critic an image's rollouts are the only baseline: "
                "give --rollouts-per-image 2 or more, or --critic central"
            )
        if self.hidden_layers != "gelu" and self.is_token_prune:
            raise ValueError(
                f"hidden_layers={self.hidden_layers!r} is for PettingZoo games: the token game's "
                "policies have gelu"
            )
        if self.init is not None and not self.is_token_prune:
            raise ValueError(f"init={self.init}: only policies of the token game are started from")
        if self.actor_attention and not self.is_token_prune:
            raise ValueError(
                f"actor_attention={self.actor_attention}: only agents of the token game attend to "
                "each other"
            )
        if self.actor_attention and self.minibatches > 1:
            raise ValueError(
                f"minibatches={self.minibatches} would tear agents apart that attend to each "
                f"other: give --minibatches 1 with --actor-attention {self.actor_attention}"
            )
        if self.critic == "none" and not self.is_token_prune:
            raise ValueError(
                f"{self.env} starts every episode in another state: it needs a critic, central or "
                "local"
            )

    @property
    def is_token_prune(self) -> bool:
        return self.env == TOKEN_PRUNE

    @property
    def folder(self) -> Path:
        own = f"{self.env.split(':')[-1]}-seed{self.seed}-{datetime.now():%Y%m%d-%H%M%S}"
        return RUNS / (self.run_name or own)

    def reaching_out(self) -> list[str]:
        if self.is_token_prune:
            return super().reaching_out()
        return ["env", "env_kwargs"] if self.env_kwargs else ["env"]

    def defaults(self) -> dict[str, Any]:
        return defaults_for(self.env).to_json() | {"env": MappoConfig.env}


def defaults_for(env: str) -> MappoConfig:
    """The defaults of a kind of game: for all but the token game those of MAPPO's authors (Yu et
    al. 2022, and their code).
    """
    if not env.startswith(PETTINGZOO_PREFIX):
        return MappoConfig()
    return MappoConfig(
        env=env,
        rollouts_per_image=1,
        num_envs=16,
        iterations=150,
        hidden=(64, 64),
        hidden_layers="relu-norm",
        critic="central",
        critic_hidden=(64, 64),
        critic_norm=True,
        epochs=10,
        minibatches=1,
        lr=5e-4,
        lr_schedule="constant",
        gamma=0.99,
        gae_lambda=0.95,
        entropy=0.01,
        eval_size=64,
    )


def parse(arguments: Sequence[str]) -> MappoConfig:
    """The command line of ``trainers.mappo``. Defaults depend on the kind of game, so ``--env`` is
    read first.
    """
    env = MappoConfig.env
    for i, argument in enumerate(arguments):
        if argument == "--env" and i + 1 < len(arguments):
            env = arguments[i + 1]
        elif argument.startswith("--env="):
            env = argument.removeprefix("--env=")
    return parse_arguments(MappoConfig, arguments, default=defaults_for(env))
