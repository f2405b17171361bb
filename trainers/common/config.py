"""What can be set from the command line, with defaults for each kind of game."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from prunevit.envs.rewards import LARGEST_NUMBER
from prunevit.trainers.common.run_folder import JsonObject

TOKEN_PRUNE = "token-prune"
PETTINGZOO_PREFIX = "pettingzoo:"

# what is counted stays in range of what counts it, whatever it is multiplied by
LARGEST_COUNT = 1_000_000_000
LARGEST_SEED = 2**32 - 1
LARGEST_WIDTH = 65_536
# more end the process where the system refuses them, without a word
MOST_THREADS = 1_024
MOST_WORKERS = 256

# that runs of before don't know of: how it was then
LATER_SETTINGS: dict[str, object] = {
    "skip_bad_images": False,
    "backbone_dtype": "float32",
    "cache_gb": 0.0,
    "profile": False,
    "workers": None,
    "accumulate": 1,
    "compile": False,
}

CriticKind = Literal["central", "local", "none"]
Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "bfloat16"]


@dataclass
class MappoConfig:
    """MAPPO on the token-pruning game, or on any PettingZoo ParallelEnv with like agents."""

    env: str = TOKEN_PRUNE
    """token-prune, or pettingzoo:MODULE (as in pettingzoo:mpe2.simple_spread_v3)."""
    env_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of a PettingZoo environment, as {"N": 5}."""
    backbone: str = "digits_vit"
    """token-prune: digits_vit (trained, comes with the package) or any timm model name."""
    model_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of the backbone, as {"img_size": 32, "patch_size": 4}."""
    pretrained: bool = False
    """Download the timm model's weights."""
    checkpoint: Path | None = None
    """A file with the backbone's weights (safetensors, or a state dict of torch.save)."""
    backbone_dtype: Dtype = "float32"
    """What the frozen backbone computes in, in training and in its evaluations; the policy, the
    rewards and all that is learned stay in float32."""
    compile: bool = False
    """Run the frozen backbone's blocks through torch.compile while training: a minute more at the
    start, and little gained on a CPU (docs/scaling.md). Needs a C++ compiler, on a GPU Triton."""
    dataset: str = "digits"
    """token-prune: digits, folder:PATH, or a name that timm.data.create_dataset takes."""
    augment: bool = True
    """Vary training images each time they are played (photographs: timm's training transform)."""
    cache_gb: float = 0.0
    """Memory, in GB a process, that keeps what the blocks before the first stage made of the images
    played, so that it is computed once; the images must not be varied (augment). A resumed run then
    ends like the one that was not stopped up to rounding only, as other images go together through
    those blocks."""
    workers: int | None = None
    """Processes a rank that read and vary photographs before they are played; 0 reads them when
    they are needed, in threads. If not given, 0 on a CPU, and beside a GPU as many as a rank has
    cores, up to 8. Digits need none, and with cache_gb there are none."""
    skip_bad_images: bool = False
    """Decode every image of a folder at the start, and leave out and list those that are damaged;
    otherwise the first one that is read ends the run."""
    prune_before: tuple[int, ...] | None = (1, 3)
    """Blocks, 0-based, before which tokens can be pruned; None: all but the first."""
    observation: tuple[str, ...] = ("token", "cls", "stage", "cls_attention")
    """What an agent sees: token cls stage position cls_attention alive_fraction alpha."""
    reward: str = "team"
    """team, markov-game (the paper's) or released-code (what its code computes)."""
    alpha: float | None = None
    """Price of the dense model's whole compute; the reward's own default if not given."""
    alpha_range: tuple[float, float] | None = None
    """Lowest and highest price in the place of one: each image is played under its own, which the
    agents see as alpha. One policy then serves all prices between: policy.alpha = 0.1."""
    beta: float | None = None
    """Worth of accuracy; the reward's own default if not given."""
    accuracy: str | None = None
    """What counts as accuracy: correct, confidence, agreement or kl; the reward's own default if
    not given.
    """
    rollouts_per_image: int = 8
    """Episodes that play the same image and are compared with each other; 1 compares nothing."""
    attention_prior: float = 0.5
    """Weight of log(class attention) that the actor starts from, then learns; 0 uses none."""
    keep_bias: float = 3.0
    """Logit of keep that the actor starts from; positive prunes little at first."""
    num_envs: int = 256
    """Episodes that are played at once, by all ranks together."""
    rollout_steps: int = 128
    """Steps an iteration where episodes vary in length; a game of fixed length is played to its end
    instead.
    """
    iterations: int = 500
    """Rounds of playing and learning."""
    hidden: tuple[int, ...] = (32,)
    """Widths of the actor's hidden layers."""
    critic: CriticKind = "none"
    """central sees observation and state, local the observation alone (IPPO), none leaves it to the
    rollouts.
    """
    critic_hidden: tuple[int, ...] = (64,)
    """Widths of the critic's hidden layers."""
    epochs: int = 4
    """Passes over an iteration's decisions."""
    minibatches: int = 1
    """Parts of a pass; each is a step of the optimizer."""
    accumulate: int | None = None
    """Parts of a minibatch whose gradients are added up before the step, for less memory; the step
    is the same up to rounding. If not given, parts of a CPU's cache size there, elsewhere one."""
    lr: float = 3e-3
    """Adam's learning rate at the start."""
    lr_schedule: Schedule = "cosine"
    """How the learning rate falls to zero over the iterations."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 0.95
    """GAE's lambda; without a critic it is 1."""
    clip: float = 0.2
    """PPO's clipping range, of policy and value."""
    entropy: float = 0.003
    """Weight of the policy's entropy."""
    value_weight: float = 1.0
    """Weight of the value loss."""
    huber_delta: float = 10.0
    """Where the value loss turns from squared to linear, in normalised units."""
    max_grad_norm: float = 10.0
    """Gradients are clipped to this norm."""
    eval_every: int = 100
    """Iterations between two greedy evaluations on validation."""
    eval_size: int = 1_000
    """Validation images (episodes, for PettingZoo) of each such evaluation."""
    checkpoint_every: int = 50
    """Iterations between two checkpoints."""
    seed: int = 0
    """Seeds weights, images, actions and the order of learning."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: int | None = None
    """CPU threads; torch's own choice if not given."""
    profile: bool = False
    """Trace the third and fourth iteration (trace.json, by torch.profiler) and print where an
    iteration goes; for that there must be four."""
    run_name: str | None = None
    """The run is written to runs/RUN_NAME; a name made of game, seed and time if not given."""
    resume: Path | None = None
    """A run folder to go on with, under the configuration it was started with."""

    def __post_init__(self) -> None:
        if not self.is_token_prune and not self.env.startswith(PETTINGZOO_PREFIX):
            raise ValueError(
                f"unknown env {self.env!r}: choose {TOKEN_PRUNE} or {PETTINGZOO_PREFIX}MODULE, "
                f"as in {PETTINGZOO_PREFIX}mpe2.simple_spread_v3"
            )
        self._check_counts(
            "num_envs", "rollout_steps", "iterations", "rollouts_per_image", "epochs",
            "minibatches", "eval_every", "eval_size", "checkpoint_every",
        )  # fmt: skip
        self._check_positive("lr", "clip", "huber_delta", "max_grad_norm")
        self._check_share("gamma", "gae_lambda")
        for name in ("entropy", "value_weight", "attention_prior"):
            if not 0 <= getattr(self, name) <= LARGEST_NUMBER:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a number from 0 to {LARGEST_NUMBER:g}"
                )
        if not abs(self.keep_bias) <= LARGEST_NUMBER:
            raise ValueError(f"keep_bias={self.keep_bias} must be a number a logit can be")
        for name in ("hidden", "critic_hidden"):
            if any(not 1 <= width <= LARGEST_WIDTH for width in getattr(self, name)):
                raise ValueError(
                    f"{name}={getattr(self, name)}: widths must be from 1 to {LARGEST_WIDTH}"
                )
        if (self.alpha_range is not None) != ("alpha" in self.observation):
            raise ValueError(
                "a policy for many prices needs both --alpha-range and alpha in --observation: "
                f"got alpha_range={self.alpha_range} and observation={self.observation}"
            )
        if self.alpha_range is not None and self.alpha is not None:
            raise ValueError("give --alpha or --alpha-range, not both")
        if self.profile and self.iterations < 4:
            raise ValueError(f"iterations={self.iterations}: a profile needs 4")
        if not 0 <= self.cache_gb <= LARGEST_NUMBER:
            raise ValueError(
                f"cache_gb={self.cache_gb} must be a number from 0 to {LARGEST_NUMBER:g}"
            )
        if self.cache_gb and (self.augment or not self.is_token_prune):
            raise ValueError(
                "a cache needs images that are the same each time: give --no-augment with "
                "--cache-gb, in the token game"
            )
        if self.backbone_dtype not in get_args(Dtype):
            raise ValueError(
                f"backbone_dtype={self.backbone_dtype!r}: choose from {', '.join(get_args(Dtype))}"
            )
        if self.accumulate is not None:
            self._check_counts("accumulate")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads={self.threads} must be from 1 to {MOST_THREADS}")
        if self.workers is not None and not 0 <= self.workers <= MOST_WORKERS:
            raise ValueError(f"workers={self.workers} must be from 0 to {MOST_WORKERS}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed={self.seed} must be from 0 to {LARGEST_SEED}")
        if self.critic == "none" and self.is_token_prune and self.rollouts_per_image < 2:
            raise ValueError(
                "without a critic an image's rollouts are the only baseline: "
                "give --rollouts-per-image 2 or more, or --critic central"
            )
        if self.critic == "none" and not self.is_token_prune:
            raise ValueError(
                f"{self.env} starts every episode elsewhere: it needs a critic, central or local"
            )

    @property
    def is_token_prune(self) -> bool:
        return self.env == TOKEN_PRUNE

    def _check_counts(self, *names: str) -> None:
        for name in names:
            if not 1 <= getattr(self, name) <= LARGEST_COUNT:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be positive, and at most {LARGEST_COUNT}"
                )

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) <= LARGEST_NUMBER:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be positive, and at most {LARGEST_NUMBER:g}"
                )

    def _check_share(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in 0..1")

    def to_json(self) -> dict[str, object]:
        """All settings as JSON values."""
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @staticmethod
    def from_json(values: dict[str, object]) -> MappoConfig:
        """Settings as ``to_json`` wrote them.

        Raises:
            ValueError: a setting that this version doesn't have, or lacks.
        """
        values = LATER_SETTINGS | values
        known = {f.name: f for f in dataclasses.fields(MappoConfig)}
        strange = sorted(set(values) ^ set(known))
        if strange:
            raise ValueError(f"the settings {', '.join(strange)} belong to another version")
        read: dict[str, Any] = {}
        for key, value in values.items():
            if isinstance(value, list):
                read[key] = tuple(value)
            elif value is not None and "Path" in str(known[key].type):
                read[key] = Path(str(value))
            else:
                read[key] = value
        types = get_type_hints(MappoConfig)
        for key, value in read.items():
            if not _fits(value, types[key]):
                raise ValueError(f"{key}={value!r} is not of its type")
        return MappoConfig(**read)


def _fits(value: Any, wanted: Any) -> bool:
    """Whether ``value`` is of the type that an annotation wants."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        types = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(types) == len(value) and all(map(_fits, value, types))
    if wanted in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if wanted is float else origin or wanted)


def defaults_for(env: str) -> MappoConfig:
    """The defaults of a kind of game: what MAPPO's authors recommend, for all but the token
    game.
    """
    if not env.startswith(PETTINGZOO_PREFIX):
        return MappoConfig()
    return MappoConfig(
        env=env,
        rollouts_per_image=1,
        num_envs=16,
        iterations=150,
        hidden=(64, 64),
        critic="central",
        critic_hidden=(64, 64),
        epochs=5,
        minibatches=8,
        lr=1e-3,
        lr_schedule="linear",
        gamma=0.99,
        entropy=0.01,
        eval_size=64,
    )
