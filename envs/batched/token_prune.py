"""``BatchedTokenPrune``: the token game with its dataset behind it, as the ``BatchedEnv`` that
trainers consume.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import index
from typing import Any

import torch
from gymnasium.spaces import Box, Discrete
from numpy.typing import ArrayLike
from torch import Tensor
from torch.profiler import record_function

from prunevit.envs.batched.protocol import Observations, Transition
from prunevit.envs.data.datasets import ImageSet, Load, Prefetchable, Reseedable
from prunevit.envs.data.prefetch import Prefetcher
from prunevit.envs.game import InitialState, Outcome, Stage, TokenGame
from prunevit.envs.observations import DEFAULT_FIELDS, View, field_slices, state_size
from prunevit.envs.rewards import LARGEST_NUMBER
from prunevit.envs.vit.prefix_cache import PrefixCache
from prunevit.envs.vit.tokens import Tokens

PRUNE, KEEP = 0, 1
MOST_SEED = 2**63 - 1  # a generator takes larger ones for negative
PART_STRIDE = 2_654_435_769  # between the seeds of what parts draw each for itself


class LazyObservations(Observations):
    """``Observations`` over a ``View``: what nobody reads is never computed."""

    def __init__(self, view: View, fields: Sequence[str]) -> None:
        object.__setattr__(self, "view", view)
        object.__setattr__(self, "fields", tuple(fields))
        object.__setattr__(self, "alive", view.alive)

    view: View
    fields: tuple[str, ...]

    @cached_property
    def _living(self) -> Tensor:
        return self.view.living(self.fields)

    def living(self) -> Tensor:
        return self._living

    def distinct(self) -> tuple[Tensor, Tensor]:
        return self._distinct

    @cached_property
    def _distinct(self) -> tuple[Tensor, Tensor]:
        return self.view.distinct(self.fields)

    @cached_property
    def observation(self) -> Tensor:
        return self.view.scatter(self._living)

    @cached_property
    def state(self) -> Tensor:
        return self.view.state()

    @cached_property
    def action_mask(self) -> Tensor:
        return action_mask(self.alive)


def action_mask(alive: Tensor) -> Tensor:
    """Living agents may keep or prune, pruned ones only prune: bool [B, N] -> [B, N, 2]."""
    return torch.stack([torch.ones_like(alive), alive], dim=-1)


def to_actions(values: ArrayLike | Tensor, device: torch.device) -> Tensor:
    """Actions of any kind as the int64 that the game takes.

    Raises:
        ValueError: they are no numbers, or floating point other than exactly 0.0 and 1.0.
    """
    try:
        actions = torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"actions must be 0 (prune) or 1 (keep): got {values!r} ({error})"
        ) from error
    # Stable-Baselines3 samples MultiBinary actions as floats
    whole = not actions.is_floating_point() or bool(((actions == KEEP) | (actions == PRUNE)).all())
    if actions.is_complex() or not whole:
        raise ValueError(
            f"actions must be 0 (prune) or 1 (keep): got {actions.dtype} {list(actions.shape)} "
            "with other values"
        )
    return actions.to(torch.int64)


def image_indices(options: Mapping[str, Any] | None) -> Any:
    """``options["indices"]`` of a reset, or None where images are to be drawn.

    Other options are named in a warning: PettingZoo's own test passes some that mean nothing, so
    they can't be an error.

    Raises:
        ValueError: ``options`` is no mapping.
    """
    if options is None:
        return None
    if not isinstance(options, Mapping):
        raise ValueError(f"options must be a mapping, as {{'indices': [0]}}: got {options!r}")
    unknown = sorted(map(str, set(options) - {"indices"}))
    if unknown:
        warnings.warn(f"reset ignores the options {unknown}: there is only 'indices'", stacklevel=3)
    return options.get("indices")


def _checked_seed(seed: int) -> int:
    try:
        number = index(seed)  # numpy's integers too
    except TypeError:
        number = -1
    if not 0 <= number <= MOST_SEED:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to {MOST_SEED}")
    return number


def _whole_numbers(indices: Sequence[int] | Tensor) -> Tensor:
    try:
        numbers = torch.as_tensor(indices)
        if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
            raise TypeError(f"they are {numbers.dtype}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"image indices must be whole numbers: got {indices!r} ({error})"
        ) from error
    return numbers.to("cpu", torch.int64)


class BatchedTokenPrune:
    """The token game on images of a dataset; a ``BatchedEnv`` whose episodes all end together.

    Args:
        game: whose ``rollouts_per_image`` episodes in a row play one image.
        images: where the images come from.
        num_envs: B, a multiple of ``game.rollouts_per_image``.
        observation: fields that agents see, of ``observations.FIELDS``.
        alpha_range: lowest and highest price of compute: each image gets its own, drawn so that
            its logarithm is uniform. The reward's own for all where None.
        part: (i, n) where n environments with the same seed share every draw of images and prices,
            and this is the i-th of them, counted from 0: together they play what one would that is
            n times as large.
        cache: bytes of memory that keep what the blocks before the first stage made of images,
            which must then be the same each time they are loaded.
        workers: processes that read images ahead once ``announce`` was called; without a cache,
            which alone knows what is missing.

    Attributes:
        field_slices: where each field stands in an observation.
        indices: image of each episode under way, int64 [B]; ``labels`` likewise.
        pixels: the images themselves, once each, [B / rollouts_per_image, C, H, W] on the CPU;
            empty with a cache, which does without them.
        survivors: living agents after the last step, bool [B, N].
        outcome: of the episodes that the last step ended, else None.
    """

    def __init__(
        self,
        game: TokenGame,
        images: ImageSet,
        num_envs: int,
        observation: Sequence[str] = DEFAULT_FIELDS,
        alpha_range: tuple[float, float] | None = None,
        part: tuple[int, int] = (0, 1),
        cache: float = 0,
        workers: int = 0,
    ) -> None:
        rollouts = game.rollouts_per_image
        if num_envs < 1 or num_envs % rollouts:
            raise ValueError(
                f"num_envs={num_envs} must be a positive multiple of rollouts_per_image={rollouts}"
            )
        place, parts = part
        if not 0 <= place < parts:
            raise ValueError(f"part={part}: (i, n) with i in 0..n - 1")
        if parts * num_envs // rollouts > len(images):
            raise ValueError(
                f"num_envs={parts * num_envs} with rollouts_per_image={rollouts} needs "
                f"{parts * num_envs // rollouts} different images, the dataset has {len(images)}"
            )
        if images.num_classes > game.backbone.num_classes:
            raise ValueError(
                f"the dataset has {images.num_classes} classes, "
                f"the backbone tells {game.backbone.num_classes} apart"
            )
        if alpha_range is not None and not 0 < alpha_range[0] <= alpha_range[1] <= LARGEST_NUMBER:
            raise ValueError(
                f"alpha_range={alpha_range}: two positive prices of at most {LARGEST_NUMBER:g}, "
                "the lower one first"
            )
        self.game = game
        self.images = images
        self.alpha_range = alpha_range
        self.part = part
        self._cache = None
        if cache:
            self._cache = PrefixCache(game.backbone, self._run_prefix, len(images), cache)
        self._workers = workers
        self._ahead: Prefetcher | None = None
        self.num_envs = num_envs
        self.num_agents = game.num_agents
        self.fields = tuple(observation)
        self.field_slices = field_slices(game.backbone, self.fields)
        width = max(part.stop for part in self.field_slices.values())
        self.observation_space: Box = Box(-float("inf"), float("inf"), (width,))
        self.state_space: Box = Box(-float("inf"), float("inf"), (state_size(game.backbone),))
        self.action_space: Discrete = Discrete(2)
        self.episode_length: int | None = game.num_stages
        self.rollouts_per_start = rollouts
        self.device = game.backbone.device
        self.indices: Tensor = torch.empty(0, dtype=torch.int64)
        self.labels: Tensor = torch.empty(0, dtype=torch.int64)
        self.pixels: Tensor = torch.empty(0)
        self.survivors: Tensor = torch.empty(0, dtype=torch.bool)
        self.outcome: Outcome | None = None
        self._generator = torch.Generator()
        self._generator.seed()

    def reset(
        self, seed: int | None = None, indices: Sequence[int] | Tensor | None = None
    ) -> Observations:
        """Begins episodes on images drawn without repeats, or on those named.

        Args:
            seed: draws the images; where None the environment's own generator goes on.
            indices: images to play instead, num_envs / rollouts_per_image of them.

        Raises:
            ValueError: a wrong number of indices, or one that the dataset doesn't have; a seed that
                is no whole number from 0 on.
        """
        count = self.num_envs // self.rollouts_per_start
        if seed is not None:
            seed = _checked_seed(seed)
            self._generator.manual_seed(seed)
            if isinstance(self.images, Reseedable):
                self.images.reseed(self._seed_of_loads(seed))
        if indices is None:
            chosen = self._draw_images(self._generator)
        else:
            chosen = _whole_numbers(indices)
            if chosen.shape != (count,):
                raise ValueError(f"{count} image indices are needed: got {list(chosen.shape)}")
            if ((chosen < 0) | (chosen >= len(self.images))).any():
                raise ValueError(
                    f"image indices {chosen.tolist()}: the dataset has 0..{len(self.images) - 1}"
                )
        if self._cache is not None:
            tokens, tensors = self._cache.load(chosen)
            labels = tensors["labels"]
            initial = InitialState(tokens, tensors.get("dense_logits"))
            stage = self.game.reset_to(initial, labels, self._draw_alphas(count))
        else:
            with record_function("load images"):
                self.pixels, labels = self._load(chosen)
            stage = self.game.reset(self.pixels, labels, self._draw_alphas(count))
        times = self.rollouts_per_start
        self.indices = chosen.repeat_interleave(times).to(self.device)
        self.labels = labels.repeat_interleave(times).to(self.device)
        self.outcome = None
        return self._observed(stage)

    def _run_prefix(self, indices: Tensor) -> tuple[Tokens, dict[str, Tensor]]:
        """What the prefix cache keeps of images: their tokens, labels and dense logits."""
        with record_function("load images"):
            pixels, labels = self.images.load(indices)
        initial, labels = self.game.initial_state(pixels, labels)
        tensors = {"labels": labels}
        if initial.dense_logits is not None:
            tensors["dense_logits"] = initial.dense_logits
        return initial.tokens, tensors

    def announce(self, seeds: Iterable[int]) -> None:
        """Says with which seeds ``reset`` is going to be called, in this order, so that ``workers``
        read the images before. Episodes are the same as without; those of other seeds, or on images
        that are named, may come in between.
        """
        if self._ahead is not None:
            self._ahead.close()
        if self._workers and self._cache is None and isinstance(self.images, Prefetchable):
            loads = self._loads(self.images, seeds)
            self._ahead = Prefetcher(self.images, loads, self._workers, self.device)

    def _loads(self, images: Prefetchable, seeds: Iterable[int]) -> Iterator[Load]:
        """What ``reset`` reads for each of ``seeds``."""
        for seed in seeds:
            chosen = self._draw_images(torch.Generator().manual_seed(seed))
            yield images.plan(chosen, self._seed_of_loads(seed))

    def _load(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        images = self.images
        if self._ahead is None or not isinstance(images, Prefetchable):
            return images.load(chosen)
        load = images.plan(chosen)
        return next(self._ahead) if load == self._ahead.due else images.read(load)

    def _seed_of_loads(self, seed: int) -> int:
        """What each part draws for itself."""
        return seed + self.part[0] * PART_STRIDE

    def _draw_images(self, generator: torch.Generator) -> Tensor:
        count = self.num_envs // self.rollouts_per_start
        return self._mine(torch.randperm(len(self.images), generator=generator), count)

    def step(self, actions: Tensor) -> Transition:
        """Takes actions int64 [B, N]: 1 keeps, 0 prunes; those of pruned agents are ignored.

        Raises:
            GameError: no episode is under way.
            ValueError: actions of another shape, type or value.
        """
        if actions.shape != (self.num_envs, self.num_agents) or actions.dtype != torch.int64:
            raise ValueError(
                f"actions must be int64 [{self.num_envs}, {self.num_agents}]: "
                f"got {actions.dtype} {list(actions.shape)}"
            )
        # comparing on the host would make it wait for the device once more
        if actions.device.type == "cpu" and ((actions != KEEP) & (actions != PRUNE)).any():
            raise ValueError("actions must be 0 (prune) or 1 (keep)")
        stage = self.game.step(actions.to(self.device) == KEEP)
        self.outcome, self.survivors = stage.outcome, stage.alive
        over = stage.outcome is not None
        flags = torch.full((self.num_envs,), over, device=self.device)
        return Transition(
            observations=self._ended(stage) if over else self._observed(stage),
            reward=stage.reward,
            terminated=flags,
            truncated=torch.zeros_like(flags),
            metrics={} if stage.outcome is None else self._metrics(stage.outcome),
        )

    def _draw_alphas(self, count: int) -> Tensor | None:
        if self.alpha_range is None:
            return None
        low, high = (math.log(alpha) for alpha in self.alpha_range)
        drawn = torch.rand(count * self.part[1], generator=self._generator)
        return (low + (high - low) * self._mine(drawn, count)).exp()

    def _mine(self, drawn: Tensor, count: int) -> Tensor:
        """Of what all parts share, the ``count`` that are this one's."""
        return drawn[self.part[0] * count :][:count]

    def close(self) -> None:
        """Frees the episode's tensors and ends the processes that read ahead; the backbone belongs
        to whoever made it.
        """
        self.game.abandon()
        if self._ahead is not None:
            self._ahead.close()

    def _observed(self, stage: Stage) -> Observations:
        assert stage.view is not None
        return LazyObservations(stage.view, self.fields)

    def _ended(self, stage: Stage) -> Observations:
        """Nothing is seen after the end: zeros that take no memory."""
        alive = torch.zeros_like(stage.alive)
        zero = torch.zeros(1, device=self.device)
        return Observations(
            observation=zero.expand(*alive.shape, *self.observation_space.shape),
            state=zero.expand(self.num_envs, *self.state_space.shape),
            alive=alive,
            action_mask=action_mask(alive),
        )

    def _metrics(self, outcome: Outcome) -> dict[str, Tensor]:
        metrics = {
            "accuracy": outcome.correct.float(),
            "gmacs": outcome.gmacs,
            "keep_ratio": outcome.kept.float().mean(1) / self.num_agents,
        }
        if self._cache is not None:
            metrics["cache_hits"] = torch.full_like(outcome.gmacs, self._cache.hits)
        return metrics
