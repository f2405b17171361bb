"""What the records of timed models have in common, and how they are shown as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from prunevit.benchmarks.records import Record
from prunevit.trainers.common.checkpoint import write_json
from prunevit.trainers.common.timing import Timing

FIRST_COLUMNS = {
    "variant": ("variant", 1, ""),
    "images/s": ("images_per_second", 1, ".2f"),
    "spread": ("spread", 1, ".1%"),
    "GMACs": ("gmacs", 1, ".4f"),
}
LATENCIES = {"p50, ms": ("p50", 1e-3, ".1f"), "p95, ms": ("p95", 1e-3, ".1f")}


def pace(timing: Timing, images: int) -> Record:
    """Images a second, the spread and, where each call was timed, latencies in seconds.

    Args:
        timing: of passes over these images.
        images: how many there are.
    """
    record: Record = {"images_per_second": images / timing.seconds, "spread": timing.spread}
    if timing.calls:
        record |= {"p50": timing.latency(50), "p95": timing.latency(95)}
    return record


def show_and_keep(
    measured: Iterable[list[Record]], table: Callable[[list[Record]], str], out: Path | None
) -> None:
    """Prints a table of each list of records as soon as it is there, and writes all so far to the
    JSON file ``out``.
    """
    records: list[Record] = []
    for some in measured:
        print(table(some), flush=True)
        records += some
        if out is not None:
            write_json(out, records)
