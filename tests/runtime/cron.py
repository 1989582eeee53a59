"""What the tests of cron jobs share: a target that does as it is told, a store that fails or yields, and a scheduler of
jobs in virtual time whose books are checked when it is left."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kapsl_scheduler import CronJob, CronRun, CronScheduler, InferenceResponse, RunState, StoreError
from kapsl_scheduler.runtime.cron_views import CronEvent, CronJobInfo
from kapsl_scheduler.stores.memory import MemoryStore
from kapsl_scheduler.testing import WallClock
from kapsl_scheduler.testing.wall_clock import START

__all__ = [
    "Call",
    "FaultyStore",
    "Target",
    "a_job",
    "add_up",
    "at",
    "counts",
    "cron_over",
    "history",
    "next_event",
    "run_ended",
]

X = np.ones((1, 2), np.float32)


def at(seconds: float) -> dt.datetime:
    """So many seconds after the tests' clocks begin."""
    return START + dt.timedelta(seconds=seconds)


def a_job(id: str = "job", schedule: Any = 60, request: Any = X, **fields: Any) -> CronJob:
    return CronJob(id, schedule, request, **fields)


@dataclass
class Call:
    """What the target was asked, and when."""

    request: Any
    at: float
    options: dict[str, Any]


@dataclass
class Target:
    """Takes `seconds` for an answer, or what `does(number)` says instead: seconds, an error to raise, or None to hang
    until it is cancelled. Calls count from 1."""

    seconds: float = 0.0
    does: Callable[[int], float | Exception | None] | None = None
    calls: list[Call] = field(default_factory=list)
    in_flight: int = 0
    most: int = 0
    cancelled: int = 0

    async def infer(self, request: Any, **options: Any) -> InferenceResponse:
        loop = asyncio.get_running_loop()
        self.calls.append(Call(request, loop.time(), options))
        what = self.seconds if self.does is None else self.does(len(self.calls))
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            if isinstance(what, Exception):
                raise what
            if what is None:
                await asyncio.Event().wait()
            elif what:
                await asyncio.sleep(what)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        return InferenceResponse.of({"y": np.asarray(request)}, 0.0, 0.0, 1)

    @property
    def times(self) -> list[float]:
        return [round(call.at, 6) for call in self.calls]


@asynccontextmanager
async def cron_over(
    target: Any = None, *, clock: WallClock | None = None, **parameters: Any
) -> AsyncIterator[CronScheduler]:
    """A cron scheduler whose clock follows the loop. When it is left, all counts must add up."""
    cron = CronScheduler(target if target is not None else Target(), clock=clock or WallClock(), **parameters)
    async with cron:
        yield cron
    for info in await cron.list_jobs():
        add_up(info)


def add_up(info: CronJobInfo) -> None:
    """Every run that was due is accounted for once."""
    ended = info.succeeded + info.failed + info.skipped + info.missed + info.cancelled + info.interrupted
    assert info.due == ended + info.pending, info
    assert min(ended, info.pending, info.running, info.fired_count) >= 0, info


async def counts(cron: CronScheduler, id: str = "job") -> dict[str, int]:
    """What has become of a job's runs, without what there is none of."""
    info = await cron.job_info(id)
    assert info is not None
    add_up(info)
    words = [state.value for state in RunState if not state.open] + ["pending"]
    return {word: number for word in words if (number := getattr(info, word))}


async def history(cron: CronScheduler, id: str = "job") -> list[tuple[float, str, str]]:
    """A job's runs, the oldest first: (seconds after the start, state, reason)."""
    found = await cron.runs(id, limit=10_000)
    return [((run.nominal - START).total_seconds(), run.state.value, run.reason) for run in reversed(found)]


async def next_event(events: AsyncIterator[CronEvent], kind: str) -> CronEvent:
    """The next of this kind; others are passed over."""
    async for event in events:
        if event.kind == kind:
            return event
    raise AssertionError("no more events")


async def run_ended(cron: CronScheduler, id: str = "job") -> CronRun:
    """Trigger the job, and wait for what becomes of it."""
    events = cron.events()
    run = await cron.trigger(id)
    while run.state.open:
        found = (await next_event(events, "ended")).run
        assert found is not None
        if found.number == run.number:
            run = found
    await events.aclose()  # type: ignore[attr-defined]
    return run


class FaultyStore:
    """A handle on a store in memory, as a process has one on a file. `fails(name, number)` says of the nth call of a
    method whether it fails `"before"` it does anything or `"after"` it was done. One that is not `instant` gives way to
    others before and after each call, so many times as `yields` has it."""

    def __init__(
        self,
        memory: MemoryStore | None = None,
        *,
        instant: bool = False,
        fails: Callable[[str, int], str | None] | None = None,
        yields: Iterator[int] | None = None,
    ) -> None:
        self.held = memory or MemoryStore()
        self.instant = instant
        self.fails = fails
        self.counts: Counter[str] = Counter()
        self.failed = 0
        self._yields = yields
        self._opened = False

    async def open(self) -> None:
        await self.held.open()
        self._opened = True

    async def close(self) -> None:
        self._opened = False

    def __getattr__(self, name: str) -> Any:
        async def call(*words: Any, **options: Any) -> Any:
            return await self._call(name, *words, **options)

        return call

    async def _call(self, name: str, *words: Any, **options: Any) -> Any:
        self.counts[name] += 1
        how = None if self.fails is None else self.fails(name, self.counts[name])
        await self._give_way()
        if not self._opened:
            raise StoreError("the store is closed")
        if how == "before":
            self.failed += 1
            raise StoreError("a planned failure")
        result = await getattr(self.held, name)(*words, **options)
        await self._give_way()
        if how == "after":
            self.failed += 1
            raise StoreError("a planned failure, after it was written")
        return result

    async def _give_way(self) -> None:
        if not self.instant:
            for _ in range(1 if self._yields is None else next(self._yields)):
                await asyncio.sleep(0)
