"""Plain counters and histograms, and what `statistics()` and `health()` report. One writing thread per counter.

What is not here: how they are exposed (Prometheus and the like belong to the server).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple, Self

import msgspec
import numpy as np

from kapsl_scheduler.types import Priority

__all__ = [
    "BOUNDS",
    "Books",
    "ClassBooks",
    "ClassStatistics",
    "Durations",
    "EngineHealth",
    "Histogram",
    "Latencies",
    "SchedulerHealth",
    "SchedulerStatistics",
    "by_bound",
    "counts_of",
    "percentile_of",
]

_SMALLEST: Final = 1e-5  # seconds
_PER_OCTAVE: Final = 4
_BULK: Final = 256
BOUNDS: Final = tuple(_SMALLEST * 2 ** (step / _PER_OCTAVE) for step in range(24 * _PER_OCTAVE))
"""Upper bounds of the latency buckets in seconds: 10 us to about 140 s, 19 % apart."""


class Latencies(NamedTuple):
    """Answers by how long they took: `counts[i]` up to `BOUNDS[i]`, the last above all; `total` in seconds."""

    counts: list[int]
    total: float


class _Kept(NamedTuple):
    counts: np.ndarray[Any, np.dtype[np.int64]]
    total: float
    fresh: list[tuple[list[float], float]]


class Histogram:
    """Counts by latency bucket. `counts[i]` is for values up to `BOUNDS[i]`, the last for all above; `total` is the sum
    of the values.

    Moments are kept as they come and sorted into their buckets in bulk, when somebody asks or many are there: one at a
    time costs several times as much. One thread writes; any may ask, since that changes nothing.
    """

    __slots__ = ("_fresh_count", "_kept")

    def __init__(self) -> None:
        # Counts and total so far, and what came since: replaced as one, so that nobody sees what belongs not together.
        self._kept = _Kept(np.zeros(len(BOUNDS) + 1, np.int64), 0.0, [])
        self._fresh_count = 0

    def extend(self, begins: list[float], end: float) -> None:
        """Add the seconds from each of the moments to one end."""
        if begins:
            self._kept.fresh.append((begins, end))
            self._fresh_count += len(begins)
            if self._fresh_count >= _BULK:
                self._kept = self._sorted()
                self._fresh_count = 0

    @property
    def counts(self) -> list[int]:
        return [int(count) for count in self._sorted().counts]

    @property
    def total(self) -> float:
        return self._sorted().total

    def _sorted(self) -> _Kept:
        kept = self._kept
        fresh = kept.fresh[:]
        begins = np.array([begin for begins, _ in fresh for begin in begins])
        ends = np.repeat([end for _, end in fresh], [len(begins) for begins, _ in fresh])
        values = ends - begins
        counts = kept.counts + np.bincount(np.searchsorted(BOUNDS, values), minlength=len(kept.counts))
        return _Kept(counts, kept.total + float(values.sum()), [])

    @property
    def count(self) -> int:
        return sum(self.counts)

    def latencies(self) -> Latencies:
        """Counts and total as of one moment."""
        kept = self._sorted()
        return Latencies(kept.counts.tolist(), kept.total)

    def percentile(self, percent: float) -> float | None:
        """Seconds below which `percent` of the values lie, to within a bucket; None without values."""
        return percentile_of(self.counts, percent)


_BOUNDS_US: Final = tuple(int(bound * 1e6) for bound in BOUNDS)  # rounding down changes nothing for whole numbers


class Durations:
    """The same counts and total for durations in whole microseconds that come one at a time, and where there are many
    of these: each is sorted into its bucket as it comes, so that there is nothing else to keep. Written and read by one
    thread."""

    __slots__ = ("_microseconds", "counts")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        # Whole numbers give one sum in whatever order they are added: one that falls by a rounding error when some of
        # them move elsewhere would be taken for a counter that has begun anew.
        self._microseconds = 0

    @classmethod
    def sum_of(cls, several: Iterable[Durations]) -> Self:
        """All of them in one."""
        several = list(several)
        total = cls()
        total.counts = list(map(sum, zip(total.counts, *(each.counts for each in several), strict=True)))
        total._microseconds = sum(each._microseconds for each in several)
        return total

    def copy(self) -> Durations:
        copy = Durations()
        copy.counts, copy._microseconds = self.counts[:], self._microseconds
        return copy

    def add(self, microseconds: int) -> None:
        """Add one. Less than nothing, as when a clock was set back, counts as nothing."""
        self.counts[bisect_left(_BOUNDS_US, microseconds)] += 1
        if microseconds > 0:
            self._microseconds += microseconds

    @property
    def total(self) -> float:
        return self._microseconds / 1e6

    @property
    def count(self) -> int:
        return sum(self.counts)

    def percentile(self, percent: float) -> float | None:
        """Seconds below which `percent` of the values lie, to within a bucket; None without values."""
        return percentile_of(self.counts, percent)


def by_bound(counts: Sequence[int]) -> dict[float, int]:
    """Counts of buckets by their upper bounds, only of those that have any; what is above all is in the last one's."""
    *within, last, above = counts
    return {bound: count for bound, count in zip(BOUNDS, (*within, last + above), strict=True) if count}


def counts_of(by_bound: Mapping[Any, int]) -> list[int]:
    """The same as they were before, in the order of the buckets. The bounds may be texts, which is all that JSON has
    for keys."""
    counts = [0] * (len(BOUNDS) + 1)
    for bound, count in by_bound.items():
        counts[bisect_left(BOUNDS, float(bound))] += count
    return counts


def percentile_of(counts: Sequence[int], percent: float) -> float | None:
    """Seconds below which `percent` of what the buckets count lies, to within a bucket; None where they are empty."""
    behind = list(accumulate(counts))
    rank = behind[-1] * percent / 100
    if not rank:
        return None
    index = bisect_left(behind, rank)
    if index == len(BOUNDS):
        return BOUNDS[-1]
    low = BOUNDS[index - 1] if index else 0.0
    return low + (BOUNDS[index] - low) * (1 - (behind[index] - rank) / counts[index])


class ClassBooks:
    """The answers of one class: their seconds from arrival to answer, and those of them spent in the queue."""

    __slots__ = ("latency", "queue_time")

    def __init__(self) -> None:
        self.queue_time = 0.0
        self.latency = Histogram()

    def add(self, started: float, ended: float, arrivals: list[float]) -> None:
        """Requests that arrived then, were started together and are answered now."""
        self.queue_time += started * len(arrivals) - sum(arrivals)
        self.latency.extend(arrivals, ended)


class Books:
    """What became of the requests, counted by the loop's thread alone.

    `open` counts the requests whose caller waits for an answer, independently of the others: it must equal
    waiting + queued + running.
    """

    def __init__(self) -> None:
        self.offered = 0
        self.invalid = 0
        self.refused = 0
        self.withdrawn = 0
        self.succeeded = 0
        self.failed = 0
        self.expired = 0
        self.cancelled = 0
        self.evicted = 0
        self.discarded = 0
        self.retried = 0
        self.open = 0
        self.calls = 0
        self.rows = 0
        self.busy_time = 0.0
        self.batch_sizes: dict[int, int] = {}
        self.classes = tuple(ClassBooks() for _ in Priority)


class ClassStatistics(msgspec.Struct, frozen=True):
    """One class: requests queued now, answered so far, and their seconds from arrival to answer. `latency_counts` are
    those answers by the upper bounds of their buckets (some of `BOUNDS`): of two moments the difference tells what
    requests took in between."""

    queued: int
    succeeded: int
    latency_p50: float | None
    latency_p99: float | None
    latency_total: float
    queue_time_total: float
    latency_counts: Mapping[float, int]


class SchedulerStatistics(msgspec.Struct, frozen=True):
    """The books, in requests, and what the engines were given.

    offered = invalid + refused + withdrawn + waiting + admitted;
    admitted = succeeded + failed + expired + cancelled + evicted + queued + running.
    `running` counts callers who still wait for a call; `calls_in_flight` the calls. `discarded` are answers that
    came after their caller had gone. `background_bound` is what background work may add to a live request, in
    seconds; `longest_loop_call` the longest engine call made on the event loop's thread, in seconds.
    """

    offered: int
    invalid: int
    refused: int
    withdrawn: int
    waiting: int
    admitted: int
    succeeded: int
    failed: int
    expired: int
    cancelled: int
    evicted: int
    queued: int
    running: int
    discarded: int
    retried: int
    calls: int
    rows: int
    calls_in_flight: int
    streams_in_flight: int
    slots: int
    max_batch_size: int
    busy_time: float
    batch_sizes: Mapping[int, int]
    classes: Mapping[str, ClassStatistics]
    background_bound: float
    longest_loop_call: float


class EngineHealth(msgspec.Struct, frozen=True):
    """`status`: loading, ready, stuck (a call runs far beyond its time and keeps its slot), lost or unloaded."""

    name: str
    status: str


class SchedulerHealth(msgspec.Struct, frozen=True):
    """Whether the engines work, never how busy they are.

    `healthy`: every engine works. `ready`: at least one can take work, and the scheduler is open. `status`:
    starting, loading, ready, degraded (some engines do not work), unavailable (none does), closing or closed.
    """

    healthy: bool
    ready: bool
    status: str
    engines: tuple[EngineHealth, ...]
