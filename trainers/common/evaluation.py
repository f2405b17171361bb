"""How good, how cheap and how fast a pruned ViT is on given images."""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol

import torch
from torch import Tensor, nn

from prunevit.agents.policies.heuristics import Score, TopK
from prunevit.agents.pruned_vit import PrunedViT, Trace
from prunevit.envs.data.datasets import ImageSet
from prunevit.envs.data.prefetch import prefetch
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.distributed import ALONE, Ranks

BATCH_SIZE = 250
ROUNDS = 15  # in which models take turns
HALVINGS = 50  # of the scale of a schedule: far below what a single token makes


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a set of images.

    Attributes:
        accuracy: share of right answers.
        gmacs: mean 1e9 multiply-accumulates an image, the policy's included.
        kept: mean share of the patches that survived each stage.
        left: how many images had 0, 1, ... N patches left at the end.
    """

    accuracy: float
    gmacs: float
    kept: tuple[float, ...]
    left: tuple[int, ...]


class Traced(Protocol):
    """What is evaluated: a ``PrunedViT``, or what tells as much of itself."""

    backbone: StagedViT

    def trace(self, images: Tensor) -> Trace: ...


def evaluate(
    model: Traced,
    images: ImageSet,
    size: int | None = None,
    ranks: Ranks = ALONE,
    workers: int = 0,
) -> Evaluation:
    """Runs ``model`` over ``size`` images (all where None), evenly spread: a folder's are sorted by
    class. ``ranks`` share them, and each gets the result of all; ``workers`` of each read them.
    """
    return evaluate_traces(
        lambda pixels, _: model.trace(pixels), model.backbone, images, size, ranks, workers
    )


@torch.inference_mode()
def evaluate_traces(
    trace_of: Callable[[Tensor, Tensor], Trace],
    backbone: StagedViT,
    images: ImageSet,
    size: int | None = None,
    ranks: Ranks = ALONE,
    workers: int = 0,
) -> Evaluation:
    """``evaluate`` of what may look at the labels.

    Args:
        trace_of: images [B, C, H, W] and labels [B], on the backbone's device -> what was done.
        backbone: that is pruned.
        images: of which ``size`` are taken (all where None).
        ranks: who share them.
        workers: processes of each that read them ahead.
    """
    count = len(images) if size is None else min(size, len(images))
    chosen = [i * len(images) // count for i in range(count)]
    device = backbone.device
    right, macs, kept = 0, 0, torch.zeros(backbone.num_stages)
    left = torch.zeros(backbone.num_patches + 1, dtype=torch.int64)
    starts = range(0, count, BATCH_SIZE)[ranks.rank :: ranks.count]
    batches = (chosen[start : start + BATCH_SIZE] for start in starts)
    for pixels, labels in prefetch(images, batches, workers, device):
        trace = trace_of(pixels.to(device, backbone.dtype), labels.to(device))
        right += int((trace.logits.argmax(1).cpu() == labels).sum())
        macs += int(trace.macs.sum())
        survivors = trace.alive.sum(2).cpu()  # [B, T]
        kept += survivors.sum(0) / backbone.num_patches
        left += survivors[:, -1].bincount(minlength=len(left))
    right, macs = ranks.total(right), ranks.total(macs)
    kept, left = (ranks.total_of(each) for each in (kept, left))
    return Evaluation(
        right / count, macs / count / 1e9, tuple((kept / count).tolist()), tuple(left.tolist())
    )


def schedules_at(
    backbone: StagedViT, gmacs: float, kept: Sequence[float], with_attention: bool = True
) -> list[list[int]]:
    """Ways to spend at least ``gmacs`` an image with the same number of tokens for every image.

    Three kinds, each with as few tokens as reach the cost: the shape of ``kept`` scaled, a constant
    share from stage to stage, and one cut at each stage after which nothing more is pruned.

    Args:
        backbone: the staged ViT.
        gmacs: 1e9 multiply-accumulates.
        kept: share of patches after each stage, of the policy to be matched.
        with_attention: whether whoever follows the schedule observes attention, and pays for it.

    Returns:
        Tokens to keep at each stage, a list for each way.
    """
    patches, stages = backbone.num_patches, backbone.num_stages

    def shape_scaled(scale: float) -> list[float]:
        return [min(1.0, share * scale) for share in kept]

    def geometric(scale: float) -> list[float]:
        return [scale ** (stage + 1) for stage in range(stages)]

    def one_cut(first: int) -> Callable[[float], list[float]]:
        return lambda scale: [1.0 if stage < first else scale for stage in range(stages)]

    def tokens_of(shares: Sequence[float]) -> list[int]:
        return [round(share * patches) for share in shares]

    def reaches(shares: Sequence[float]) -> bool:
        return backbone.uniform_macs(tokens_of(shares), with_attention) / 1e9 >= gmacs

    found: list[list[int]] = []
    for shape, most in [
        (shape_scaled, 1 / max(min(kept), 1 / patches)),
        (geometric, 1.0),
        *((one_cut(first), 1.0) for first in range(stages)),
    ]:
        # nor is it as much where the cost is higher even with nobody kept
        if not reaches(shape(most)) or reaches(shape(0.0)):
            continue
        # the cost never falls as the scale grows: halve what lies around the least that reaches it
        low, high = 0.0, most
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if reaches(shape(middle)) else (middle, high)
        if (tokens := tokens_of(shape(high))) not in found:
            found.append(tokens)
    # a policy whose own cost eats up all that it saves is matched by no pruning at all
    return found or [[patches] * stages]


def best_topk(
    backbone: StagedViT,
    images: ImageSet,
    gmacs: float,
    kept: Sequence[float],
    score: Score,
    size: int | None = None,
) -> list[int]:
    """The schedule of ``schedules_at`` with which a top-k by ``score`` is most accurate on
    ``images``.
    """
    candidates = schedules_at(backbone, gmacs, kept, with_attention=score == "attention")
    return max(
        candidates,
        key=lambda tokens: (
            evaluate(PrunedViT(backbone, TopK(tokens, score)), images, size).accuracy
        ),
    )


def images_per_second(
    models: Mapping[str, Callable[[Tensor], Tensor]],
    images: Tensor,
    batch_size: int = 64,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Median speed of each model, all of them interleaved in every round, by name; arguments as of
    ``round_seconds``.
    """
    seconds = round_seconds(models, images, batch_size, rounds)
    return {name: len(images) / statistics.median(times) for name, times in seconds.items()}


@torch.inference_mode()
def round_seconds(
    models: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor, batch_size: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds that each model takes in each round.

    Args:
        models: images [B, C, H, W] -> logits.
        images: on the models' device, a multiple of ``batch_size``.
        batch_size: of a call.
        rounds: timed passes over ``images``, after one that is not counted.
    """
    batches = images.split(batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            _wait(images.device)
            start = time.perf_counter()
            for batch in batches:
                model(batch)
            _wait(images.device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Stopwatch:
    """``round_seconds`` as a process sees it that does nothing else, for as many sets of models as
    there are between ``with Stopwatch() as watch`` and its end.

    One that has trained before runs many small operations slower: its heap is in pieces. Models on
    a GPU are timed where they are.
    """

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None and self._process is not None:
            self._connection.close()  # which ends the process
            self._process.join()

    def round_seconds(
        self, models: Mapping[str, nn.Module], images: Tensor, batch_size: int, rounds: int
    ) -> dict[str, list[float]]:
        """As the function of that name; raises RuntimeError where the process dies of it."""
        if images.device.type != "cpu":
            return round_seconds(models, images, batch_size, rounds)
        connection = self._connected()
        try:
            # not among the process's arguments: PyTorch can't hand so many tensors to one that
            # begins
            connection.send((dict(models), images, batch_size, rounds))
            return connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("the process that timed the models died") from error

    def _connected(self) -> Connection:
        """To the process, which begins when it is first needed."""
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            arguments = (theirs, torch.get_num_threads())
            self._process = context.Process(target=_time, args=arguments, daemon=True)
            self._process.start()
            # the child's end is open there alone: should it die, there is nothing to wait for
            theirs.close()
        return self._connection


def speeds_of_fresh_process(
    models: Mapping[str, nn.Module], images: Tensor, batch_size: int, rounds: int = ROUNDS
) -> dict[str, float]:
    """``images_per_second`` by a ``Stopwatch``."""
    with Stopwatch() as watch:
        seconds = watch.round_seconds(models, images, batch_size, rounds)
    return {name: len(images) / statistics.median(times) for name, times in seconds.items()}


def _time(connection: Connection, threads: int) -> None:
    """In the process of its own: times what the connection brings, until it is closed."""
    torch.set_num_threads(threads)
    while True:
        try:
            shared = connection.recv()
        except EOFError:
            return
        # out of the memory that both processes share, into memory as any process has it
        own = copy.deepcopy(shared)
        del shared
        connection.send(round_seconds(*own))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
