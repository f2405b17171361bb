"""``BatchedTokenPrune``: the token game on a data set, as the ``BatchedEnv`` that trainers use."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from torch.profiler import record_function

from prunevit.envs.batched.inputs import KEEP, PRUNE, checked_seed, whole_numbers
from prunevit.envs.batched.lazy_observations import LazyObservations, action_mask
from prunevit.envs.batched.protocol import Observations, Transition
from prunevit.envs.data.classes import check_labels
from prunevit.envs.data.image_set import ImageSet, Prefetchable, ReadRequest, Reseedable
from prunevit.envs.data.prefetch import Prefetcher
from prunevit.envs.data_config import model_classes
from prunevit.envs.fields import DEFAULT_FIELDS, field_slices, state_size
from prunevit.envs.game import InitialState, Outcome, Stage, TokenGame
from prunevit.envs.measures import measure, measure_for
from prunevit.envs.rewards import LARGEST_NUMBER, ReleasedCodeReward, reads_of
from prunevit.envs.vit.prefix_cache import PrefixCache
from prunevit.envs.vit.tokens import Tokens

SHARD_STRIDE = 2_654_435_769  # between the seeds of what each shard draws for itself


# A permutation of so many numbers takes 0.3 ms (of ImageNet's 1.3 million 10 to 60), and with it
# seeds go on drawing the images that they drew in 0.1.0.
PERMUTED_SIZE = 1 << 16


def draw_distinct(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draws ``count`` different numbers below ``size``, every order of them alike likely: int64
    [count]. Beyond ``PERMUTED_SIZE`` it takes time and memory for ``count`` numbers, however large
    ``size`` is.
    """
    if size <= max(PERMUTED_SIZE, 2 * count):
        return torch.randperm(size, generator=generator)[:count]
    drawn: dict[int, None] = {}  # in the order of drawing
    while len(drawn) < count:
        more = torch.randint(size, (count,), generator=generator)
        drawn.update(dict.fromkeys(more.tolist()))
    return torch.tensor(list(drawn)[:count], dtype=torch.int64)


class BatchedTokenPrune:
    """The token game on the images of a data set: a ``BatchedEnv`` whose episodes all end together.

    Args:
        game: the game; ``game.rollouts_per_image`` consecutive episodes play the same image.
        images: the data set.
        num_envs: B, a multiple of ``game.rollouts_per_image``.
        observation: what agents observe, names in ``fields.FIELDS``.
        alpha_range: lowest and highest alpha. Each image gets its own, drawn log-uniformly. None
            uses the reward's alpha for all images.
        shard: (i, n) makes this the i-th of n environments, counted from 0, that share all draws of
            images and alphas. With the same seed they play together what one environment n times as
            large would play.
        cache: bytes of memory for a ``PrefixCache``. The images must be the same on every load.
        workers: processes that read images ahead after a call of ``prefetch``. They are not used
            with a cache, since only the cache knows what is missing.

    Attributes:
        field_slices: columns of each field in an observation.
        indices: image of each episode, int64 [B].
        labels: label of each episode, int64 [B].
        pixels: the images of the episodes, each once, [B / rollouts_per_image, C, H, W] on the CPU;
            empty with a cache.
        survivors: agents alive after the last step, bool [B, N].
        outcome: how the episodes ended, if the last step ended them; else None.

    Raises:
        ValueError: ``num_envs`` doesn't fit the rollouts or the data set, the data set has more
            classes than the backbone, the reward reads labels that the images don't have, or
            ``alpha_range`` or ``shard`` is invalid.
    """

    def __init__(
        self,
        game: TokenGame,
        images: ImageSet,
        num_envs: int,
        observation: Sequence[str] = DEFAULT_FIELDS,
        alpha_range: tuple[float, float] | None = None,
        shard: tuple[int, int] = (0, 1),
        cache: float = 0,
        workers: int = 0,
    ) -> None:
        rollouts = game.rollouts_per_image
        if num_envs < 1 or num_envs % rollouts:
            raise ValueError(
                f"num_envs={num_envs} must be a positive multiple of rollouts_per_image={rollouts}"
            )
        shard_index, num_shards = shard
        if not 0 <= shard_index < num_shards:
            raise ValueError(f"shard={shard}: (i, n) with i in 0..n - 1")
        needed = num_shards * num_envs // rollouts
        if needed > len(images):
            raise ValueError(
                f"num_envs={num_shards * num_envs} with rollouts_per_image={rollouts} needs "
                f"{needed} different images, the dataset has {len(images)}"
            )
        check_labels(model_classes(game.backbone.model), images)
        if not images.num_classes and reads_of(game.reward) == "labels":
            raise ValueError(
                f"{type(game.reward).__name__} pays by labels, which the images don't have: take "
                "accuracy='kl' or 'agreement' (or 'embedding' for a backbone without a "
                "classifier), or images with classes"
            )
        if alpha_range is not None and not 0 < alpha_range[0] <= alpha_range[1] <= LARGEST_NUMBER:
            raise ValueError(
                f"alpha_range={alpha_range}: two positive numbers of at most {LARGEST_NUMBER:g}, "
                "the lower one first"
            )
        if alpha_range is not None and isinstance(game.reward, ReleasedCodeReward):
            raise ValueError(
                f"alpha_range={alpha_range} with a ReleasedCodeReward, which has no alpha: choose "
                "another reward, or no range"
            )
        self.game = game
        self.images = images
        self.alpha_range = alpha_range
        self.shard = shard
        self._cache_bytes = cache
        self._cache = self._make_cache()
        self._workers = workers
        self._prefetcher: Prefetcher | None = None
        self.num_envs = num_envs
        self.num_agents = game.num_agents
        self.fields = tuple(observation)
        self.field_slices = field_slices(game.backbone, self.fields)
        width = max(columns.stop for columns in self.field_slices.values())
        self.observation_space: Box = Box(-float("inf"), float("inf"), (width,))
        self.state_space: Box = Box(-float("inf"), float("inf"), (state_size(game.backbone),))
        self.action_space: Discrete = Discrete(2)
        self.episode_length: int | None = game.num_stages
        self.rollouts_per_start = rollouts
        self.indices: Tensor = torch.empty(0, dtype=torch.int64)
        self.labels: Tensor = torch.empty(0, dtype=torch.int64)
        self.pixels: Tensor = torch.empty(0)
        self.survivors: Tensor = torch.empty(0, dtype=torch.bool)
        self.outcome: Outcome | None = None
        self._generator = torch.Generator()
        self._generator.seed()

    @property
    def device(self) -> torch.device:
        return self.game.backbone.device  # which may be moved between episodes

    def to(self, device: torch.device | str) -> BatchedTokenPrune:
        """Moves the game to a device, and ends the episodes in progress; returns itself.

        The backbone is copied there, since it belongs to whoever gave it.
        """
        self.game.abandon()
        self.game.backbone = copy.deepcopy(self.game.backbone).to(device)
        self._cache = self._make_cache()
        return self

    def _make_cache(self) -> PrefixCache | None:
        if not self._cache_bytes:
            return None
        backbone = self.game.backbone
        return PrefixCache(backbone, self._run_prefix, len(self.images), self._cache_bytes)

    def reset(
        self, seed: int | None = None, indices: Sequence[int] | Tensor | None = None
    ) -> Observations:
        """Begins episodes on images drawn without replacement, or on the given ones.

        Args:
            seed: seeds the draw of images; None continues the environment's own generator.
            indices: images to play instead, num_envs / rollouts_per_image of them.

        Raises:
            ValueError: a wrong number of indices, or one out of range; a seed that is not a whole
                number of 0 or more.
        """
        count = self.num_envs // self.rollouts_per_start
        if seed is not None:
            seed = checked_seed(seed)
            self._generator.manual_seed(seed)
            if isinstance(self.images, Reseedable):
                self.images.reseed(self._seed_of_loads(seed))
        if indices is None:
            chosen = self._draw_images(self._generator)
        else:
            chosen = whole_numbers(indices)
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
            if len(labels) != count:
                raise ValueError(
                    f"the data set returned {len(labels)} images where {count} were asked"
                )
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

    def prefetch(self, seeds: Iterable[int]) -> None:
        """Announces the seeds of the next calls of ``reset``, so that ``workers`` can read ahead.

        Episodes are the same as without it. Calls of ``reset`` with other seeds, or with given
        images, may come in between.
        """
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._workers and self._cache is None and isinstance(self.images, Prefetchable):
            requests = self._requests(self.images, seeds)
            self._prefetcher = Prefetcher(self.images, requests, self._workers, self.device)

    def _requests(self, images: Prefetchable, seeds: Iterable[int]) -> Iterator[ReadRequest]:
        """What ``reset`` will read for each of ``seeds``."""
        for seed in map(checked_seed, seeds):
            chosen = self._draw_images(torch.Generator().manual_seed(seed))
            yield images.request(chosen, self._seed_of_loads(seed))

    def _load(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        images = self.images
        if self._prefetcher is None or not isinstance(images, Prefetchable):
            return images.load(chosen)
        request = images.request(chosen)
        if request == self._prefetcher.next_request:
            return next(self._prefetcher)
        return images.read(request)

    def _seed_of_loads(self, seed: int) -> int:
        """Seed of what each shard draws for itself."""
        return seed + self.shard[0] * SHARD_STRIDE

    def _draw_images(self, generator: torch.Generator) -> Tensor:
        count = self.num_envs // self.rollouts_per_start
        return self._mine(draw_distinct(count * self.shard[1], len(self.images), generator), count)

    def step(self, actions: Tensor) -> Transition:
        """Takes actions int64 [B, N]: 1 keeps, 0 prunes. Actions of pruned agents are ignored.

        Other values on a GPU are refused after the step, when their check has come to the host
        along with the number of survivors. The episodes are over then.

        Raises:
            GameError: no episode is under way.
            ValueError: actions of another shape, type or value.
        """
        if actions.shape != (self.num_envs, self.num_agents) or actions.dtype != torch.int64:
            raise ValueError(
                f"actions must be int64 [{self.num_envs}, {self.num_agents}]: "
                f"got {actions.dtype} {list(actions.shape)}"
            )
        # a step waits for a GPU once, after which this copy is there too; masked ones never wait
        later = actions.device.type != "cpu" and self.game.backbone.execution == "packed"
        invalid = ((actions != KEEP) & (actions != PRUNE)).any().to("cpu", non_blocking=later)
        if not later and invalid:
            raise ValueError("actions must be 0 (prune) or 1 (keep)")
        stage = self.game.step(actions.to(self.device) == KEEP)
        if invalid:
            self.game.abandon()
            raise ValueError("actions must be 0 (prune) or 1 (keep): call reset to begin again")
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
        drawn = torch.rand(count * self.shard[1], generator=self._generator)
        return (low + (high - low) * self._mine(drawn, count)).exp()

    def _mine(self, drawn: Tensor, count: int) -> Tensor:
        """Selects this shard's ``count`` of the numbers that all shards drew."""
        return drawn[self.shard[0] * count :][:count]

    def close(self) -> None:
        """Frees the episode's tensors and ends the worker processes.

        The backbone is left alone, since it belongs to whoever made it.
        """
        self.game.abandon()
        if self._prefetcher is not None:
            self._prefetcher.close()

    def _observed(self, stage: Stage) -> Observations:
        assert stage.view is not None
        return LazyObservations(stage.view, self.fields)

    def _ended(self, stage: Stage) -> Observations:
        """The observations after the end: zeros that take no memory."""
        alive = torch.zeros_like(stage.alive)
        zero = torch.zeros(1, dtype=torch.float32, device=self.device)
        return Observations(
            observation=zero.expand(*alive.shape, *self.observation_space.shape),
            state=zero.expand(self.num_envs, *self.state_space.shape),
            alive=alive,
            action_mask=action_mask(alive),
        )

    def _metrics(self, outcome: Outcome) -> dict[str, Tensor]:
        kind = measure_for(self.game.backbone.num_classes, self.images)
        measured = {}
        # a reward that pays without the dense model leaves nothing to compare with
        if kind == "accuracy" or outcome.dense_logits is not None:
            answers = (outcome.logits, self.labels, outcome.dense_logits)
            measured[kind] = measure(kind, *answers)
        metrics = measured | {
            "gmacs": outcome.gmacs,
            "keep_ratio": outcome.kept.float().mean(1) / self.num_agents,
        }
        if self._cache is not None:
            metrics["cache_hits"] = torch.full_like(outcome.gmacs, self._cache.hits)
        return metrics
