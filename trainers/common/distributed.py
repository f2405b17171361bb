"""One training on many devices: each rank is a process with its share of every batch.

``torchrun`` or ``fabric run`` starts the processes, and Lightning Fabric connects them. All ranks
hold the same weights and take the same steps. A mean over a batch is a mean over the shares of all
ranks, weighted by their sizes. Only rank 0 writes files and prints.
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

SEED_STRIDE = 2_654_435_769  # between ranks; odd, so that no two ranks get the same seed
SEED_LIMIT = 2**32  # torch's CPU generator uses 32 bits of a seed
MOST_WORKERS = 8  # by default
LONGEST_TEXT = 4096  # bytes, more than a path can have
TIMEOUT = timedelta(minutes=30)  # how long a rank waits for another


class RanksError(RuntimeError):
    """The ranks can't connect, or one of them has ended."""


class Ranks:
    """This process among those that train together. Here it is the only one; see ``ManyRanks``.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        on_machine: number of processes on this machine.
    """

    rank = 0
    count = 1
    on_machine = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share_of(self, name: str, size: int) -> int:
        """Each rank's share of ``size``; raises ValueError if it isn't a whole number."""
        if size % self.count:
            raise ValueError(f"{name}={size} must be a multiple of the {self.count} ranks")
        return size // self.count

    def workers(self, wanted: int | None, device: torch.device) -> int:
        """Number of processes that load this rank's images.

        Args:
            wanted: the setting. If None, 0 on a CPU, whose cores are busy, and with a GPU one for
                each core of the rank, up to ``MOST_WORKERS``.
            device: where the rank computes.
        """
        if wanted is not None:
            return wanted
        if device.type == "cpu":
            return 0
        has_affinity = hasattr(os, "sched_getaffinity")  # the cores that a scheduler gave us
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        return min(MOST_WORKERS, max(1, cores // self.on_machine))

    def own_seed(self, seed: int) -> int:
        """A seed of this rank's own, made from one that all ranks share."""
        return seed

    def total(self, number: int) -> int:
        """Sum over all ranks."""
        return int(self.total_of(torch.tensor(number)))

    def total_of(self, numbers: Tensor) -> Tensor:
        """Elementwise sum over all ranks, of a tensor on the CPU."""
        return numbers

    def most(self, number: int) -> int:
        """Maximum over all ranks."""
        return number

    def agreed(self, text: str) -> str:
        """The ``text`` of rank 0."""
        return text

    def wait(self) -> None:
        """Waits until all ranks call this."""
        self.total(0)

    def mean_count(self, number: int) -> float:
        """Mean count per rank, as if there was at least one row in total.

        DDP averages gradients over the ranks. If each rank divides its sum of losses by this, the
        result is the mean over the rows of all ranks.
        """
        return max(self.total(number), 1) / self.count

    def mean(self, rows: Tensor) -> Tensor:
        """Mean over the rows [R] of all ranks."""
        return self._sum(rows.sum()) / self.total(len(rows))

    def nanmean(self, rows: Tensor) -> Tensor:
        """Mean over the rows [R] of all ranks that are not NaN."""
        known = ~rows.isnan()
        total, count = self._sum(torch.stack([rows.nansum(), known.sum().to(rows.dtype)]))
        return total / count

    def mean_and_spread(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the rows [R] of all ranks, at least two in total."""
        return rows.mean(), rows.std()

    def average(self, tensor: Tensor) -> Tensor:
        """Elementwise mean of ``tensor`` over the ranks."""
        return self._sum(tensor) / self.count

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wraps ``model`` in DDP: ``backward`` averages its gradients over the ranks, and all ranks
        start with the weights of rank 0.
        """
        return model

    def averages_gradients(self, model: nn.Module, when: bool) -> AbstractContextManager[None]:
        """A context in which a wrapped model's ``backward`` averages gradients only if ``when``."""
        return nullcontext()

    def stop_together(self) -> AbstractContextManager[None]:
        """A context in which a signal to one rank stops all, at their next ``stop_if_asked``."""
        return nullcontext()

    def stop_if_asked(self) -> None:
        """Raises ``Stopped`` on all ranks if one of them got a signal."""

    def _sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over all ranks, of a tensor on their devices."""
        return tensor


ALONE = Ranks()


class ManyRanks(Ranks):
    """One rank of several.

    Counts are exchanged through the hosts (gloo), not through the devices. This needs no device
    synchronisation, and a rank that waits long for another waits there.

    Args:
        fabric: a launched Fabric.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.rank = fabric.global_rank
        self.count = fabric.world_size
        self.on_machine = int(os.environ["LOCAL_WORLD_SIZE"])
        self._fabric = fabric
        hosts = distributed.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(hosts, distributed.ProcessGroup)  # this rank is a member
        self._hosts = hosts
        self._signals: list[int] = []

    def own_seed(self, seed: int) -> int:
        return (seed + self.rank * SEED_STRIDE) % SEED_LIMIT

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

    def mean_and_spread(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(rows)
        squares = self._sum((rows - mean).square().sum())
        return mean, (squares / (self.total(len(rows)) - 1)).sqrt()

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
            # all_reduce works in place
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
    # backends raise different subclasses
    except RuntimeError as error:
        raise RanksError(f"another rank has ended: {error}") from error


def join_ranks(device: str) -> Ranks:
    """Connects the ranks that ``torchrun`` or ``fabric run`` started; ``ALONE`` if there is one.

    Args:
        device: "auto", "cpu" or "cuda"; each rank of a machine gets a GPU of its own.

    Raises:
        RanksError: Lightning Fabric is not installed, or the ranks can't connect.
    """
    launched = distributed.is_available() and distributed.is_torchelastic_launched()
    if not launched or int(os.environ["WORLD_SIZE"]) == 1:
        return ALONE
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy
    except ImportError as error:
        raise RanksError(
            f"training on many ranks needs Lightning Fabric: {install_command('distributed')}"
        ) from error
    kind = pick_device(device).type
    on_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    machines = int(os.environ["WORLD_SIZE"]) // on_machine
    try:
        strategy = DDPStrategy(timeout=TIMEOUT)
        if "LT_CLI_USED" in os.environ:  # fabric run has already set the number of ranks
            fabric = Fabric(accelerator=kind, strategy=strategy)
        else:
            fabric = Fabric(
                accelerator=kind, strategy=strategy, devices=on_machine, num_nodes=machines
            )
            fabric.launch()
        return ManyRanks(fabric)
    except (RuntimeError, ValueError) as error:
        raise RanksError(f"the ranks can't connect: {error}") from error
