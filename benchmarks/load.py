"""Load generators: closed loops of callers and open-loop arrivals. Engines and schedulers are not known here.

Open loop: arrivals come when they were meant to, however slow the answers are, and latency counts from the
intended arrival. Measuring from the actual start would leave out the time a stalled system made arrivals wait
(coordinated omission).
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.loops import LoopWatch
from benchmarks.stats import rate_between

__all__ = [
    "Closed",
    "Flag",
    "Open",
    "bursty_arrivals",
    "closed_loop",
    "open_loop",
    "poisson_arrivals",
]

Times = np.ndarray[Any, np.dtype[np.float64]]


class Flag:
    """Whether a trial still runs: callers look at it between requests."""

    __slots__ = ("running",)

    def __init__(self) -> None:
        self.running = True


# ----------------------------------------------------------------------------------------------- closed loop


class Closed(msgspec.Struct):
    """One closed-loop trial: answers per second, each caller's latencies in seconds, the loop's longest block."""

    rate: float
    latencies: list[float]
    longest_block: float


Caller = Callable[[int, list[float], Flag], Coroutine[Any, Any, None]]
"""`caller(index, stamps, flag)`: asks again and again while the flag is up, and stamps each answer with
`time.perf_counter()`."""


async def closed_loop(
    caller: Caller,
    callers: int,
    *,
    warmup: float,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Closed:
    """Run so many callers, each with one request at a time and no thinking between them.

    One stamp per answer serves both the rate and the latencies: an answer is the start of the caller's next
    request. Only what ends within the window of `seconds` after `warmup` counts. `clock` is what callers stamp with.
    """
    flag = Flag()
    stamps: list[list[float]] = [[] for _ in range(callers)]
    async with asyncio.TaskGroup() as group:
        for index in range(callers):
            group.create_task(caller(index, stamps[index], flag))
        with LoopWatch(clock) as watch:
            await asyncio.sleep(warmup)
            watch.reset()
            start = clock()
            await asyncio.sleep(seconds)
            stop = clock()
            longest = watch.longest
        flag.running = False
    latencies: list[float] = []
    for own in stamps:
        latencies += [after - before for before, after in itertools.pairwise(own) if start <= after < stop]
    rate = sum(rate_between(own, start, stop) for own in stamps)
    return Closed(rate, latencies, longest)


# ------------------------------------------------------------------------------------------------- open loop


class Open(msgspec.Struct):
    """One open-loop trial: by arrival, the outcome and the seconds from the intended arrival to it.

    `lag` is by arrival too: how late the generator itself was in starting it.
    """

    outcomes: list[str]
    latencies: list[float]
    lag: list[float]

    def of(self, outcome: str) -> list[float]:
        """The latencies of those with that outcome."""
        pairs = zip(self.outcomes, self.latencies, strict=True)
        return [latency for each, latency in pairs if each == outcome]


def poisson_arrivals(rate: float, seconds: float, rng: np.random.Generator) -> Times:
    """Arrival times in [0, seconds), ascending, at `rate` per second on average."""
    count = rng.poisson(rate * seconds)
    times: Times = np.sort(rng.uniform(0.0, seconds, count))
    return times


def bursty_arrivals(
    rate: float, seconds: float, rng: np.random.Generator, *, period: float = 0.2, duty: float = 0.5
) -> Times:
    """The same average rate, all of it in the first `duty` of each `period` of seconds."""
    dense = poisson_arrivals(rate, seconds, rng)
    whole = np.floor(dense / period) * period
    times: Times = whole + (dense - whole) * duty
    return times


async def open_loop(
    request: Callable[[int, float], Awaitable[str]],
    arrivals: Sequence[float] | Times,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Open:
    """Start `request(index, intended)` at each arrival (seconds from now on) and wait for all outcomes.

    `intended` is in seconds of `clock`. All that are due are started in one pass of the loop, about a
    thousand passes a second: the generator keeps up at any rate that the loop itself can carry, and leaves the
    loop to those it loads in between.
    """
    intended = [*map(float, arrivals)]
    count = len(intended)
    result = Open([""] * count, [math.nan] * count, [math.nan] * count)
    started = clock()
    index = 0
    async with asyncio.TaskGroup() as group:
        while index < count:
            now = clock() - started
            while index < count and intended[index] <= now:
                result.lag[index] = now - intended[index]
                group.create_task(_one(request, index, started + intended[index], result, clock))
                index += 1
            if index < count:
                await asyncio.sleep(max(intended[index] - now, _TICK))
    return result


_TICK: Final = 0.001  # seconds: no loop's timer is finer


async def _one(
    request: Callable[[int, float], Awaitable[str]],
    index: int,
    intended: float,
    result: Open,
    clock: Callable[[], float],
) -> None:
    outcome = await request(index, intended)
    result.latencies[index] = clock() - intended
    result.outcomes[index] = outcome
