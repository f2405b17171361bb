"""One training on many devices: every rank is a process that has its part of each batch.

``torchrun`` or ``fabric run`` starts the processes, Lightning Fabric joins them. All ranks hold the
same weights and take the same steps: what is a mean over a batch, is one over the parts of all
ranks, and each counts for as much as it has. Rank zero alone writes files and prints.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

from prunevit.envs.devices import pick_device
from prunevit.extras import install_command
from prunevit.trainers.common.signals import signals_are_noted, stop

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SEED_STRIDE = 2_654_435_769  # between ranks; odd, so that no two of them draw alike
SEED_LIMIT = 2**32  # of which torch's CPU generator reads no more
MOST_WORKERS = 8  # that nobody asked for
LONGEST_TEXT = 4096  # bytes: more than a path may have
TIMEOUT = timedelta(minutes=30)  # that one rank may be ahead of another


class RanksError(RuntimeError):
    """Ranks that can't be joined, or one that others wait for and that has ended."""


class Ranks:
    """A process that trains alone; ``ManyRanks`` is one of many.

    Attributes:
        rank: which one this is, from 0.
        count: how many there are.
        on_machine: how many of them share this one's machine.
    """

    rank = 0
    count = 1
    on_machine = 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    def share_of(self, name: str, size: int) -> int:
        """What each rank has of ``size``; raises ValueError where that is no whole number."""
        if size % self.count:
            raise ValueError(f"{name}={size} must be a multiple of the {self.count} ranks")
        return size // self.count

    def workers(self, wanted: int | None, device: torch.device) -> int:
        """How many processes read this rank's images: ``wanted``, where that is not None. Otherwise
        none where the cores compute, and beside a GPU as many as it has cores, up to
        ``MOST_WORKERS``.
        """
        if wanted is not None:
            return wanted
        if device.type == "cpu":
            return 0
        has_affinity = hasattr(os, "sched_getaffinity")  # what a scheduler leaves to us
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        return min(MOST_WORKERS, max(1, cores // self.on_machine))

    def own_seed(self, seed: int) -> int:
        """A seed that no other rank draws from."""
        return seed

    def total(self, number: int) -> int:
        """The sum over all ranks."""
        return number

    def total_of(self, numbers: Tensor) -> Tensor:
        """The sums over all ranks, element by element; on the CPU."""
        return numbers

    def most(self, number: int) -> int:
        """The largest of all ranks."""
        return number

    def agreed(self, text: str) -> str:
        """What rank zero says."""
        return text

    def wait(self) -> None:
        """Returns when all ranks are here."""
        self.total(0)

    def mean_count(self, number: int) -> float:
        """The mean over the ranks, as if there was one at least: a sum of losses divided by it,
        averaged over the ranks as DDP averages gradients, is the mean over all ranks' rows.
        """
        return max(self.total(number), 1) / self.count

    def mean(self, rows: Tensor) -> Tensor:
        """Mean over the rows [R] of all ranks."""
        return rows.mean()

    def nanmean(self, rows: Tensor) -> Tensor:
        """Mean over those numbers of all ranks that are numbers."""
        return rows.nanmean()

    def mean_and_spread(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the rows [R] of all ranks, two of them at least."""
        return rows.mean(), rows.std()

    def average(self, tensor: Tensor) -> Tensor:
        """``tensor`` averaged over the ranks, element by element."""
        return tensor

    def wrap(self, model: nn.Module) -> nn.Module:
        """What to call in the place of ``model`` so that ``backward`` averages its gradients over
        the ranks; weights begin as those of rank zero.
        """
        return model

    def averages_gradients(self, model: nn.Module, when: bool) -> AbstractContextManager[None]:
        """Whether calls of a wrapped model, and ``backward``, do so in this context."""
        return nullcontext()

    def stop_together(self) -> AbstractContextManager[None]:
        """A signal to any rank takes effect in all of them, at the next ``stop_if_asked``."""
        return nullcontext()

    def stop_if_asked(self) -> None:
        """Raises ``Stopped`` on all ranks where one of them got a signal."""


ALONE = Ranks()


class ManyRanks(Ranks):
    """One rank of several.

    Whole numbers go through the hosts' memory and not through the devices: nobody waits for a
    device to tell them, and a rank that has to wait long does it there.

    Args:
        fabric: launched.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.rank = fabric.global_rank
        self.count = fabric.world_size
        self.on_machine = int(os.environ["LOCAL_WORLD_SIZE"])
        self._fabric = fabric
        hosts = distributed.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(hosts, distributed.ProcessGroup)  # as this rank is one of them
        self._hosts = hosts
        self._signals: list[int] = []

    def own_seed(self, seed: int) -> int:
        return (seed + self.rank * SEED_STRIDE) % SEED_LIMIT

    def total(self, number: int) -> int:
        return int(self.total_of(torch.tensor(number)))

    def total_of(self, numbers: Tensor) -> Tensor:
        return self._on_hosts(numbers, distributed.ReduceOp.SUM)

    def most(self, number: int) -> int:
        return int(self._on_hosts(torch.tensor(number), distributed.ReduceOp.MAX))

    def agreed(self, text: str) -> str:
        said = torch.zeros(LONGEST_TEXT, dtype=torch.uint8)
        letters = text.encode()[:LONGEST_TEXT]
        said[: len(letters)] = torch.tensor(list(letters), dtype=torch.uint8)
        with _others_are_there():
            distributed.broadcast(said, src=0, group=self._hosts)
        return bytes(said.tolist()).rstrip(b"\0").decode()

    def mean(self, rows: Tensor) -> Tensor:
        return self._sum(rows.sum()) / self.total(len(rows))

    def nanmean(self, rows: Tensor) -> Tensor:
        known = ~rows.isnan()
        total, count = self._sum(torch.stack([rows.nansum(), known.sum().to(rows.dtype)]))
        return total / count

    def mean_and_spread(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(rows)
        squares = self._sum((rows - mean).square().sum())
        return mean, (squares / (self.total(len(rows)) - 1)).sqrt()

    def average(self, tensor: Tensor) -> Tensor:
        return self._sum(tensor) / self.count

    def wrap(self, model: nn.Module) -> nn.Module:
        return self._fabric.setup_module(model, move_to_device=False)

    @contextmanager
    def averages_gradients(self, model: nn.Module, when: bool) -> Iterator[None]:
        with self._fabric.no_backward_sync(model, enabled=not when):
            yield

    @contextmanager
    def stop_together(self) -> Iterator[None]:
        self._signals.clear()
        with signals_are_noted(self._signals):
            yield
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        number = self.most(max(self._signals, default=0))
        if number:
            stop(signal.Signals(number), is_told=self.is_first)

    def _sum(self, tensor: Tensor) -> Tensor:
        with _others_are_there():
            # it is summed up in place
            return self._fabric.all_reduce(tensor.clone(), reduce_op="sum")

    def _on_hosts(self, numbers: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        summed = numbers.clone()
        with _others_are_there():
            distributed.all_reduce(summed, operation, group=self._hosts)
        return summed


@contextmanager
def _others_are_there() -> Iterator[None]:
    try:
        yield
    # of whatever kind the backend's errors are
    except RuntimeError as error:
        raise RanksError(f"another rank has ended: {error}") from error


def join_ranks(device: str) -> Ranks:
    """The ranks that ``torchrun`` or ``fabric run`` started; ``ALONE`` where there is but one.

    Args:
        device: "auto", "cpu" or "cuda", of which each rank of a machine gets its own.

    Raises:
        RanksError: Lightning Fabric is not installed, or the ranks don't find each other.
    """
    launched = distributed.is_available() and distributed.is_torchelastic_launched()
    if not launched or int(os.environ["WORLD_SIZE"]) == 1:
        return ALONE
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy
    except ImportError as error:
        raise RanksError(
            f"many ranks are joined by Lightning Fabric: {install_command('distributed')}"
        ) from error
    kind = pick_device(device).type
    on_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    machines = int(os.environ["WORLD_SIZE"]) // on_machine
    try:
        strategy = DDPStrategy(timeout=TIMEOUT)
        if "LT_CLI_USED" in os.environ:  # fabric run: it has told Fabric how many there are
            fabric = Fabric(accelerator=kind, strategy=strategy)
        else:
            fabric = Fabric(
                accelerator=kind, strategy=strategy, devices=on_machine, num_nodes=machines
            )
            fabric.launch()
        return ManyRanks(fabric)
    except (RuntimeError, ValueError) as error:
        raise RanksError(f"the ranks don't find each other: {error}") from error
