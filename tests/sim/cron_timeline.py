"""Jobs in virtual time under everything that can happen to them: a timeline drawn from its seed.

Nothing here trusts the scheduler. What was dispatched is noted where it arrives; what is in the store at the end is
compared with it, row by row. A process that dies writes nothing more, whatever its tasks would still have liked to.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kapsl_scheduler import (
    Backend,
    Coalesce,
    CronError,
    CronJob,
    CronScheduler,
    DuplicateId,
    Exclusion,
    Firing,
    FiringPolicy,
    InferenceResponse,
    InvalidInput,
    Named,
    OnInterrupt,
    Overlap,
    Overloaded,
    RunPolicy,
    StoreError,
)
from kapsl_scheduler.core.jobs import micros
from kapsl_scheduler.core.runs import SCHEDULE, JobRecord, Run, RunState
from kapsl_scheduler.ports import RunQuery
from kapsl_scheduler.stores.memory import MemoryStore
from kapsl_scheduler.testing import WallClock
from tests.runtime.cron import FaultyStore, at

__all__ = ["Timeline"]

LEASE = 3.0
X = np.ones((1, 2), np.float32)
EVERYTHING = RunQuery(limit=1_000_000)


class Handle(FaultyStore):
    """A process's way to the store, until it is killed."""

    killed = False

    async def _call(self, name: str, *words: Any, **options: Any) -> Any:
        if self.killed:
            raise StoreError("killed")
        result = await super()._call(name, *words, **options)
        if self.killed:  # it was carried out, and nobody hears of it
            raise StoreError("killed")
        return result


@dataclass(eq=False)
class Process:
    cron: CronScheduler
    store: Handle


@dataclass
class Life:
    """A job from its registration on. `first` is the number before its first run, `paused_at` the last one before it
    was paused; `most` how many of its runs any of its definitions lets run at a time."""

    first: int
    most: int
    paused_at: int | None = None


@dataclass
class Timeline:
    """One run. `violations` are the rules that were seen broken; empty after a good run."""

    seed: int
    steps: int = 40
    violations: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    async def run(self) -> None:
        self.rng = random.Random(self.seed)
        self.memory = MemoryStore()
        self.clock = WallClock()
        self.dispatched: Counter[tuple[str, Any, str, int]] = Counter()
        self.lives: dict[str, Life] = {}
        self.released = asyncio.Event()
        self.shared = self.rng.random() < 0.5
        self.steps_of_clock = self.rng.random() < 0.5
        self.failing: str | None = None
        self.processes: list[Process] = []
        for _ in range(2 if self.shared else 1):
            await self._enter()
        for _ in range(self.rng.randrange(2, 5)):
            with contextlib.suppress(DuplicateId):
                await self._register()
        for _ in range(self.steps):
            await asyncio.sleep(self.rng.choice((0.0, 0.1, 1.0, 3.0, 7.0)) * self.rng.random())
            await self._act()
            await self._look()
        await self._end()

    # ------------------------------------------------------------------------------------------- processes

    async def _enter(self) -> None:
        yields = iter(lambda: self.rng.randrange(3), None) if self.shared else None
        store = Handle(self.memory, instant=not self.shared, fails=self._fails, yields=yields)
        cron = CronScheduler(
            self, store=store, clock=self.clock, lease=LEASE, history_keep=10**6, history_max_age=1e9,
            max_concurrent_runs=self.rng.choice((1, 2, 256)),
        )  # fmt: skip
        cron.bind("make", self.make)
        cron.bind("several", self.several)
        cron.bind("condition", self.condition)
        cron.bind("hear", self.hear)
        while True:
            try:
                await cron.__aenter__()
            except StoreError:
                self.failing = None
                return await self._enter()
            break
        self.processes.append(Process(cron, store))
        return None

    def _fails(self, name: str, number: int) -> str | None:
        return self.failing if self.failing is not None and self.rng.random() < 0.5 else None

    async def _kill(self, process: Process) -> None:
        """As SIGKILL does it: what is under way stops where it is."""
        process.store.killed = True
        self.processes.remove(process)
        process.cron._alarm.stop()
        process.cron._runs._ready.clear()
        tasks = [*process.cron._services, *process.cron._runs._runners]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --------------------------------------------------------------------------- what the jobs are made of

    async def infer(self, request: Any, **options: Any) -> InferenceResponse:
        rng, luck = self.rng, self.rng.random()
        if self.released.is_set() or luck < 0.4:
            return InferenceResponse.of({"y": X}, 0.0, 0.0, 1)
        if luck < 0.6:
            await asyncio.sleep(rng.uniform(0, 1))
        elif luck < 0.75:
            await asyncio.sleep(rng.uniform(0, 10))
        elif luck < 0.8:
            await self.released.wait()
        elif luck < 0.85:
            raise Overloaded("full")
        elif luck < 0.95:
            raise Backend("driver")
        else:
            raise InvalidInput("shape")
        return InferenceResponse.of({"y": X}, 0.0, 0.0, 1)

    async def make(self, firing: Firing) -> Any:
        self.dispatched[firing.job, firing.nominal, firing.origin, firing.attempt] += 1
        return None if self.rng.random() < 0.1 else X

    async def several(self, firing: Firing) -> Any:
        self.dispatched[firing.job, firing.nominal, firing.origin, firing.attempt] += 1
        return [X] * self.rng.randrange(4)

    async def condition(self, firing: Firing) -> bool:
        if self.rng.random() < 0.1:
            raise OSError("who knows")
        return self.rng.random() < 0.9

    async def hear(self, id: str, result: Any) -> None:
        if self.rng.random() < 0.2:
            raise KeyError("deaf")
        await asyncio.sleep(self.rng.choice((0.0, 0.0, 0.3)))

    def _job(self, id: str) -> CronJob:
        rng = self.rng
        coalesce = rng.choice(list(Coalesce))
        overlap = rng.choice(list(Overlap) if coalesce is not Coalesce.ALL else [Overlap.BUFFER_ALL, Overlap.ALLOW])
        start = rng.uniform(0, 100)
        firing = FiringPolicy(
            misfire_grace=None if coalesce is Coalesce.SKIP else rng.choice((None, None, 2.0)),
            coalesce=coalesce,
            overlap=overlap,
            max_running=rng.randrange(1, 4) if overlap is Overlap.ALLOW else None,
            max_buffered=rng.choice((None, 2)) if overlap is Overlap.BUFFER_ALL else None,
            spread=rng.choice((0.0, 0.0, 3.0)),
            max_runs=rng.choice((None, None, None, 10)),
            exclude=(Exclusion(at(start), at(start + 10)),) if rng.random() < 0.2 else (),
        )
        run = RunPolicy(
            timeout=rng.choice((None, 2.0, 5.0)),
            attempts=rng.choice((1, 1, 3)),
            backoff=0.3,
            pause_after=rng.choice((None, None, 3)),
            on_interrupt=rng.choice(list(OnInterrupt)),
        )
        return CronJob(
            id,
            rng.choice((1, 2, 3.5, 7, "*/5 * * * * *", "*/3 * * * * *")),
            Named(rng.choice(("make", "make", "several"))),
            condition=Named("condition") if rng.random() < 0.2 else None,
            on_result=Named("hear") if rng.random() < 0.3 else None,
            firing=firing,
            run=run,
            enabled=rng.random() < 0.95,
        )

    # ------------------------------------------------------------------------------------------ what happens

    async def _act(self) -> None:
        actions: list[tuple[int, Callable[[], Any]]] = [
            (3, self._register),
            (2, self._unregister),
            (3, self._update),
            (3, self._pause),
            (4, self._resume),
            (4, self._trigger),
            (2, self._backfill),
            (2 * self.steps_of_clock, self._step_clock),
            (2, self._fail),
            (2, self._restart),
            (2, self._crash),
        ]
        weights = [weight for weight, _ in actions]
        (action,) = self.rng.choices([action for _, action in actions], weights)
        self.log.append(f"{asyncio.get_running_loop().time():.3f} {action.__name__}")
        try:
            await action()
        except CronError as error:
            self.log[-1] += f": {error}"

    def _any(self) -> CronScheduler:
        return self.rng.choice(self.processes).cron

    def _id(self) -> str:
        return self.rng.choice("abcdef")

    def _number(self) -> int:
        return self.memory._number

    async def _register(self) -> None:
        id = self._id()
        job = self._job(id)
        first = self._number()
        there = await self._record(id) is not None
        try:
            await self._any().register(job)
        finally:
            if await self._record(id) is not None and not there:
                self.lives[id] = Life(first, _most(job), None if job.enabled else first)
        self._defined(id, job, there)

    async def _update(self) -> None:
        id = self._id()
        job = self._job(id)
        try:
            await self._any().update(job)
        finally:
            self._defined(id, job, True)

    def _defined(self, id: str, job: CronJob, there: bool) -> None:
        if there and id in self.lives:
            life = self.lives[id]
            life.most = max(life.most, _most(job))
            life.paused_at = None  # it may have been either

    async def _unregister(self) -> None:
        await self._any().unregister(self._id(), cancel=self.rng.random() < 0.5)

    async def _pause(self) -> None:
        id = self._id()
        await self._any().pause(id)
        life = self.lives[id]
        life.paused_at = self._number() if life.paused_at is None else life.paused_at

    async def _resume(self) -> None:
        id = self._id()
        await self._check_paused(id)
        if id in self.lives:
            self.lives[id].paused_at = None
        await self._any().resume(id, catch_up=self.rng.random() < 0.5)

    async def _trigger(self) -> None:
        origin = self.rng.choice((None, None, "once", "twice"))
        await self._any().trigger(self._id(), origin=origin)

    async def _backfill(self) -> None:
        rng, start = self.rng, self.rng.uniform(-30, 0)
        origin = rng.choice((None, "fill"))
        end = at(start + rng.uniform(1, 10))
        await self._any().backfill(self._id(), at(start), end, concurrency=rng.randrange(1, 4), origin=origin)

    async def _step_clock(self) -> None:
        self.clock.step(self.rng.choice((-40.0, -3.0, 3.0, 40.0, 3600.0)) * self.rng.random())

    async def _fail(self) -> None:
        self.failing = self.rng.choice(("before", "before", "after" if self.shared else "before"))
        await asyncio.sleep(self.rng.choice((0.0, 0.5, 2.0, 10.0)))
        self.failing = None

    async def _restart(self) -> None:
        process = self.rng.choice(self.processes)
        self.processes.remove(process)
        await process.cron.close(drain=self.rng.choice((0.0, 1.0, 10.0)))
        await self._enter()

    async def _crash(self) -> None:
        await self._kill(self.rng.choice(self.processes))
        await asyncio.sleep(self.rng.choice((0.0, 1.0, 5.0)))
        await self._enter()

    # ------------------------------------------------------------------------------------------ what must hold

    async def _record(self, id: str) -> JobRecord | None:
        found = await self.memory.jobs([id])
        return found[0] if found else None

    async def _look(self) -> None:
        for record in await self.memory.jobs():
            state = record.state
            self._hold(state.balanced, f"{record.id}: the books do not balance: {state}")
            counts = (state.running, state.waiting, state.failed, state.succeeded, state.cancelled, state.interrupted)
            self._hold(min(counts) >= 0, f"{record.id}: counts below none: {state}")
            self._hold(state.running <= self.lives[record.id].most, f"{record.id}: too many at a time: {state}")
            await self._check_paused(record.id)

    async def _check_paused(self, id: str) -> None:
        """Nothing of the schedule has come to be while it was paused."""
        life, record = self.lives.get(id), await self._record(id)
        if life is None or record is None or life.paused_at is None:
            return
        found = await self.memory.runs(RunQuery(job=id, origin=SCHEDULE, after=life.paused_at, limit=1000))
        fired = [run for run in found if run.state is not RunState.MISSED]
        self._hold(not fired, f"{id}: fired while it was paused: {fired[:2]}")

    async def _end(self) -> None:
        """All is well again, and everything comes to its end."""
        self.failing = None
        self.released.set()
        await asyncio.sleep(4 * LEASE + 2)
        for id in "abcdef":
            with contextlib.suppress(CronError):
                await self._any().pause(id)
        await asyncio.sleep(60)
        await self._look()
        for process in self.processes:
            await process.cron.close()
        await self.memory.open()
        rows = await self.memory.runs(EVERYTHING)
        self._hold(not [run for run in rows if run.state.open], f"never ended: {[r for r in rows if r.state.open][:3]}")
        self._check_dispatches(rows)
        for record in await self.memory.jobs():
            self._check_books(record, [run for run in rows if run.number > self.lives[record.id].first])

    def _check_dispatches(self, rows: list[Run]) -> None:
        twice = [key for key, count in self.dispatched.items() if count > 1]
        self._hold(not twice, f"dispatched twice: {twice[:3]}")
        attempts = {(run.job, run.nominal, run.origin): run for run in rows}
        for job, nominal, origin, attempt in self.dispatched:
            run = attempts.get((job, micros(nominal), origin))
            # What another process cancels is recorded as that one found it, perhaps an attempt ago.
            known = run is not None and (run.attempt >= attempt or run.reason == "overlap")
            self._hold(known, f"dispatched without a record: {job} {nominal} {run}")
        for origin in ("once", "twice"):
            asked = Counter(run.job for run in rows if run.origin == origin)
            self._hold(not asked or max(asked.values()) == 1, f"more than one run of {origin}: {asked}")

    def _check_books(self, record: JobRecord, rows: list[Run]) -> None:
        state = record.state
        rows = [run for run in rows if run.job == record.id and not run.detached]
        counted = Counter[str]()
        for run in rows:
            counted[run.state.value] += run.count
        for outcome in RunState:
            if not outcome.open:
                booked = getattr(state, outcome.value)
                self._hold(booked == counted[outcome.value], f"{record.id}: {outcome} {booked}, but {counted}")
        self._hold(state.due == sum(counted.values()), f"{record.id}: due {state.due}, but {counted}")
        self._hold(state.pending == 0, f"{record.id}: pending {state}")
        ranges = sorted((run.first, run.nominal) for run in rows if run.origin == SCHEDULE)
        for (_, last), (first, _) in itertools.pairwise(ranges):
            self._hold(last < first, f"{record.id}: decided twice: {last} {first}")

    def _hold(self, holds: bool, violation: str) -> None:
        if not holds:
            self.violations.append(f"{asyncio.get_running_loop().time():.3f} {violation}")


def _most(job: CronJob) -> int:
    if job.firing.overlap is Overlap.ALLOW:
        return job.firing.max_running or 1
    # What another process runs, or none does since the store failed, is cancelled when it is looked up: later.
    return 1_000 if job.firing.overlap is Overlap.CANCEL_OTHER else 1
