"""Times calls that do the same work in different ways, in turns."""

from __future__ import annotations

import copy
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from prunevit.envs.devices import now
from prunevit.progress import progress_bar

ROUNDS = 15


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed pass over all calls and, where asked for, of each call."""

    passes: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median pass."""
        return statistics.median(self.passes)

    @property
    def spread(self) -> float:
        """Distance between the quartiles of the passes, relative to the median."""
        low, high = np.percentile(self.passes, [25, 75])
        return float(high - low) / self.seconds

    def latency(self, percent: float) -> float:
        """Seconds within which ``percent`` of the calls were done."""
        return float(np.percentile(self.calls, percent))


def speedup(baseline: Timing, timing: Timing) -> float:
    """How many times faster than ``baseline``: the median of each round's own ratio, which a change
    of the machine's pace between rounds does not affect.
    """
    pairs = zip(baseline.passes, timing.passes, strict=True)
    return statistics.median(slow / fast for slow, fast in pairs)


@torch.inference_mode()
def interleaved(
    variants: Mapping[str, Sequence[Callable[[], object]]],
    rounds: int,
    warmup: int,
    device: torch.device,
    each_call: bool = False,
    title: str | None = None,
) -> dict[str, Timing]:
    """Times all variants in turns. In every round each one makes a pass over its calls; rounds
    start with different variants.

    Args:
        variants: the calls of one pass, by name.
        rounds: timed rounds.
        warmup: rounds before them that are not timed.
        device: where the calls compute.
        each_call: also time each call by itself, waiting for the device after each.
        title: of a progress bar; none is shown without it.
    """
    names = list(variants)
    timings = {name: Timing() for name in names}
    count = warmup + rounds
    turns = progress_bar(count, "rounds", title=title, silent=title is None, items=range(count))
    for turn in turns:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            edges = [now(device)]
            for call in variants[name]:
                call()
                if each_call:
                    edges.append(now(device))
            if turn >= warmup:
                timings[name].passes.append(now(device) - edges[0])
                timings[name].calls.extend(np.diff(edges).tolist())
    return timings


def time_models(
    models: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor, batch_size: int, rounds: int
) -> dict[str, Timing]:
    """Times passes of each model over ``images``, after one that is not counted.

    Args:
        models: images [B, C, H, W] -> logits.
        images: on the models' device.
        batch_size: of a call.
        rounds: timed passes.
    """
    batches = images.split(batch_size)
    calls = {name: [partial(model, batch) for batch in batches] for name, model in models.items()}
    return interleaved(calls, rounds, 1, images.device)


class TimingProcess(ProcessPoolExecutor):
    """``time_models`` in a process that does nothing else, between ``with TimingProcess() as
    process`` and its end.

    A process that has trained runs many small operations slower, because its heap is fragmented.
    Models on a GPU are timed in this process.
    """

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        super().__init__(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,))

    def time_models(
        self, models: Mapping[str, nn.Module], images: Tensor, batch_size: int, rounds: int
    ) -> dict[str, Timing]:
        """As the function of that name.

        Raises:
            RuntimeError: the process died.
        """
        if images.device.type != "cpu":
            return time_models(models, images, batch_size, rounds)
        try:
            return self.submit(_time_copies, dict(models), images, batch_size, rounds).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "the process that timed the models died; a script has to make this call below "
                "if __name__ == '__main__':, since that process imports it"
            ) from error


def _time_copies(models: dict[str, nn.Module], images: Tensor, *how: int) -> dict[str, Timing]:
    """Times copies in ordinary memory of what lies in the memory that both processes share."""
    own_models, own_images = copy.deepcopy((models, images))
    return time_models(own_models, own_images, *how)


def images_per_second(
    models: Mapping[str, nn.Module], images: Tensor, batch_size: int, rounds: int = ROUNDS
) -> dict[str, float]:
    """Median speed of each model by name, timed in a process of its own; arguments as of
    ``time_models``.
    """
    with TimingProcess() as process:
        timings = process.time_models(models, images, batch_size, rounds)
    return {name: len(images) / timing.seconds for name, timing in timings.items()}
