"""The runs of this process: dispatched, bounded in number, and what follows from what the ledger wrote about them.

What is not here: what is written (`runtime.cron_intents`), how one run goes (`runtime.cron_execution`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from kapsl_scheduler.core.firing import startable
from kapsl_scheduler.core.jobs import moment
from kapsl_scheduler.core.runs import Run, RunState, run_of
from kapsl_scheduler.errors import StoreError
from kapsl_scheduler.ports import CronTarget, RunQuery
from kapsl_scheduler.runtime.cron_alarm import Alarm
from kapsl_scheduler.runtime.cron_events import Events
from kapsl_scheduler.runtime.cron_execution import Execution
from kapsl_scheduler.runtime.cron_intents import Attempt, Checkpoint, Cut, End, Start
from kapsl_scheduler.runtime.cron_ledger import Entry, Intent, Ledger
from kapsl_scheduler.runtime.cron_metrics import CronFigures
from kapsl_scheduler.runtime.cron_views import CronEvent, CronRun, run_view
from kapsl_scheduler.runtime.offload import Strangers

__all__ = ["Runs"]

logger = logging.getLogger(__name__)

WAITING: Final = "waiting for a place"
"""The reason that a run is shown with which is dispatched, and for which `max_concurrent_runs` has no place yet."""
WORTH_TELLING: Final = 10_000
"""Microseconds after which a run has not begun when it was dispatched, but later."""
LINGERING: Final = 2.0
"""Seconds that a run waits for those that were stopped in its favour: they take less than one, unless they hang."""
IDLE_RUNNERS: Final = 8
"""Tasks that are kept for the next runs."""
AT_ONCE: Final = 64
"""Runs that a runner begins, and changes that are decided, before others get the loop: about a millisecond."""

STUBBORN: Final = 5.0
"""Seconds that cancelled runs may take to end before they are left behind."""
LOOK_AGAIN: Final = 30.0
"""Seconds after which a job is looked at again whose firing could not be decided."""
PRUNE_EVERY: Final = 500
"""Runs that may end between two looks at the history's bounds."""


class Runs:
    """At most `most` runs at a time; the others wait in the order in which they were dispatched."""

    def __init__(
        self,
        ledger: Ledger,
        alarm: Alarm,
        events: Events,
        *,
        owner: str,
        wall: Callable[[], int],
        target: Callable[[str | None], CronTarget],
        most: int,
    ) -> None:
        self.owner = owner
        self.wall = wall
        self.target = target
        self.strangers = Strangers()
        self.figures = CronFigures(ledger.entries.__contains__)
        self.ended_since_pruned = 0
        self.history_grows = asyncio.Event()
        self._ledger = ledger
        self._alarm = alarm
        self._events = events
        self._most = most
        self._of_job: dict[str, list[Execution]] = {}
        self.running = 0
        self._ready: deque[Execution] = deque()
        self._runners: set[asyncio.Task[None]] = set()
        self._waiting_runners: list[asyncio.Future[None]] = []
        self._called = False
        self._empty: asyncio.Future[None] | None = None  # until nothing runs, while the scheduler closes
        self._chores: dict[tuple[str, str], Callable[[], Awaitable[None]]] = {}
        self._chore = asyncio.Event()
        self.closing = False  # no waiting run starts any more
        self.cutting = False  # no run does
        self.starting: set[tuple[str, int, str]] = set()  # runs that waited and whose start is being written
        self._hurried: asyncio.Future[None]

    # ---------------------------------------------------------------------------------------- dispatching

    @property
    def waiting(self) -> int:
        return len(self._ready)

    def executions(self, job: str) -> list[Execution]:
        """The job's runs here whose end is not written, nor being written."""
        return [one for one in self._of_job.get(job, ()) if not (one.recording or one.discarded)]

    def everyone(self) -> Iterable[Execution]:
        return (execution for of_job in self._of_job.values() for execution in of_job)

    def view(self, run: Run) -> CronRun:
        """The run as it is shown: with what it has done by now, if it goes on here."""
        for execution in self._of_job.get(run.job, ()) if run.state.open else ():
            if execution.run.key != run.key:
                continue
            if execution.task is None and self.running >= self._most:
                return run_view(msgspec.structs.replace(run, started=None, reason=WAITING))
            return run_view(execution.on(execution.run), execution.done)
        return run_view(run)

    def launch(self, entry: Entry, run: Run) -> None:
        """Run it, at once if there is a place."""
        assert entry.job is not None
        execution = Execution(self, entry.job, run, entry.state.anchor)
        if self.cutting:
            self._end_short(execution)
            return
        of_job = self._of_job.get(run.job)
        if of_job is None:
            self._of_job[run.job] = [execution]
        else:
            of_job.append(execution)
        self._ready.append(execution)
        self._call_runner()

    def _call_runner(self) -> None:
        """Somebody looks after what is ready: a runner that waits, or a new one where there is a place for it. One that
        has been called and has not come yet will do."""
        if self._called:
            return
        if self._waiting_runners:
            self._called = True
            self._waiting_runners.pop().set_result(None)
        elif len(self._runners) < self._most:
            self._called = True
            self._runners.add(asyncio.get_running_loop().create_task(self._look_after()))

    async def _look_after(self) -> None:
        """A runner: one run after another, as long as there are any. Who begins one calls the next runner first, since
        it may take long; where runs are short, few runners do it all."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._called = False
                at_once = 0
                while self._ready:
                    execution = self._ready.popleft()
                    if self._ready:
                        self._call_runner()
                    if not execution.discarded:
                        await self._see_through(execution, task)
                    self._forget(execution)
                    if task.cancelling():
                        return
                    at_once += 1
                    if at_once == AT_ONCE:  # they have not waited for anything: others want the loop too
                        await asyncio.sleep(0)
                        at_once = 0
                if self.cutting or len(self._waiting_runners) >= IDLE_RUNNERS:
                    return
                waiter: asyncio.Future[None] = loop.create_future()
                self._waiting_runners.append(waiter)
                await waiter
        finally:
            self._runners.discard(task)

    async def _see_through(self, execution: Execution, task: asyncio.Task[None]) -> None:
        """One run, to its end. `Execution.stop` is meant for the run, not for the runner, which forgives it."""
        run, now = execution.run, self.wall()
        if run.started is not None and now - run.started > WORTH_TELLING and run.attempt == 1:
            run = execution.run = msgspec.structs.replace(run, started=now)
        self.figures.started(run, now)
        if self._events.wanted:
            self.told("started", run.job, run)
        execution.task = task
        self.running += 1
        try:
            await execution()
        except Exception as error:
            logger.error("job %r: a run ended in an error of the scheduler", run.job, exc_info=error)
            self.ended(execution, execution.cut(RunState.FAILED, "internal", self.wall()))
        finally:
            self.running -= 1
            execution.task = None
            if execution.stopped:
                task.uncancel()  # once: somebody else may have cancelled the runner itself

    def _forget(self, execution: Execution) -> None:
        of_job = self._of_job[execution.run.job]
        if len(of_job) == 1:
            del self._of_job[execution.run.job]
        else:
            of_job.remove(execution)
        if execution.over is not None:
            execution.over.set_result(None)
        if not self._of_job and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    def _end_short(self, execution: Execution) -> None:
        execution.recording = True
        self.ended(execution, execution.cut_short())

    def hurry(self) -> None:
        """Drain no longer."""
        if not self._hurried.done():
            self._hurried.set_result(None)

    async def drain(self, seconds: float) -> None:
        """Let runs end for a while, also those whose firing is being written; then cut short the rest. What waits in
        the store stays there. A run that does not end when it is cancelled is left behind, with a word in the log."""
        self.closing = True
        loop = asyncio.get_running_loop()
        self._hurried = loop.create_future()
        until = loop.time() + seconds
        settled = loop.create_task(self._ledger.settled())
        while not self._hurried.done() and (left := until - loop.time()) > 0:
            if self._of_job:
                self._empty = loop.create_future()
            awaited = {one for one in (settled, self._empty) if one is not None and not one.done()}
            if not awaited:
                break
            await asyncio.wait({*awaited, self._hurried}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        self.cutting = True
        for execution in self._ready:
            if not execution.discarded:
                self._end_short(execution)
        self._ready.clear()
        for execution in self.everyone():
            execution.stop()
        while self._waiting_runners:
            self._waiting_runners.pop().cancel()
        await asyncio.wait({settled, *self._runners}, timeout=STUBBORN)
        for execution in self.everyone():
            if execution.task is not None:
                logger.error(
                    "job %r: a run does not end though it was cancelled, and is left behind", execution.run.job
                )
                if not execution.discarded and not execution.recording:
                    self._end_short(execution)
                execution.discarded = True

    # -------------------------------------------------------------------------- what executions ask for

    async def attempted(self, execution: Execution, after: Run) -> bool:
        return bool(await self._ledger.do(Attempt(execution, after)))

    def ended(self, execution: Execution, after: Run) -> None:
        if execution.discarded:
            return
        end = End(self, execution.run, after, execution.anchor)
        if self._ready:
            # Of those that were dispatched together, the last should start before the first is written down.
            self._ledger.post(end)
        else:
            self._ledger.settle(end)

    async def alone(self, execution: Execution) -> None:
        """Wait until those of its job that were discarded are over."""
        lingering: list[asyncio.Future[None]] = []
        for one in self._of_job[execution.run.job]:
            if one.discarded and one.task is not None and one is not execution:
                if one.over is None:
                    one.over = asyncio.get_running_loop().create_future()
                lingering.append(one.over)
        if lingering:
            await asyncio.wait(lingering, timeout=LINGERING)

    def has_job(self, execution: Execution) -> bool:
        """Whether the job whose run it is is still there."""
        entry = self._ledger.entries.get(execution.run.job)
        return entry is not None and execution.is_of(entry.state)

    async def memory(self, job: str) -> Mapping[str, str]:
        return await self._ledger.store.memory(job)

    async def ended_runs(self, job: str, keys: Collection[str]) -> frozenset[str]:
        """Those of the job's runs, by `Firing.key`, that have ended. What goes on here is not looked up."""
        ended: set[str] = set()
        here = {one.run.key for one in self._of_job.get(job, ())}
        for key in keys:
            name = run_of(key)
            if name is not None and (job, *name) not in here:
                run = await self._ledger.store.run(job, *name)
                if run is None or not run.state.open:
                    ended.add(key)
        return frozenset(ended)

    async def checkpoint(self, execution: Execution, after: Run, memory: Mapping[str, str | None]) -> bool:
        return bool(await self._ledger.do(Checkpoint(execution, after, memory)))

    # ------------------------------------------------------------------------------ what intents ask for

    def post(self, intent: Intent) -> None:
        self._ledger.post(intent)

    def noted(self, run: Run) -> None:
        """It is written that a run ended (or waits)."""
        if run.state is RunState.PENDING:
            return
        self.ended_since_pruned += 1
        if self.ended_since_pruned >= PRUNE_EVERY:
            self.history_grows.set()
        self.figures.ended(run)
        if self._events.wanted:
            self.told("ended", run.job, run)

    def told(self, kind: str, job: str, run: Run | None = None) -> None:
        if self._events.wanted:
            view = None if run is None else run_view(run)
            self._events.tell(CronEvent(kind, job, moment(self.wall()), view))

    def schedule(self, entry: Entry, nominal: int | None, due: int | None) -> None:
        """When the job is to be looked at again."""
        entry.next = nominal
        self._alarm.set(entry, due)

    def reschedule(self, entry: Entry) -> None:
        """The same, found out from the job as it is."""
        job, timetable, state = entry.job, entry.timetable, entry.state
        nominal = None
        if job is not None and timetable is not None and entry.unbound is None and not state.paused:
            most = job.firing.max_runs
            if most is None or state.scheduled < most:
                nominal = timetable.next(state.cursor)
        self.schedule(entry, nominal, None if nominal is None or timetable is None else timetable.due(nominal))

    def look_again(self, job: str) -> None:
        """The same, in a while: something went wrong."""
        entry = self._ledger.entries.get(job)
        if entry is not None and entry.due is None and not self.closing:
            self._alarm.set(entry, self.wall() + round(LOOK_AGAIN * 1e6))

    def room_for_waiting(self, entry: Entry) -> None:
        """Runs that wait may start now, if there are any."""
        state = entry.state
        if (state.waiting or state.backfills) and entry.unbound is None and not self.closing and startable(state):
            self.see_to(entry.id, "start", lambda: self._start_waiting(entry))

    def room_in(self, job: str) -> None:
        """The same, by the job's id."""
        if (entry := self._ledger.entries.get(job)) is not None:
            self.room_for_waiting(entry)

    def cancel_elsewhere(self, entry: Entry, besides: Sequence[Run]) -> None:
        """A new run takes the place of all others: those that wait, and those of other processes."""
        keys, anchor = {run.key for run in besides}, entry.state.anchor
        self.see_to(entry.id, "cancel", lambda: self._cancel_elsewhere(entry.id, anchor, keys))

    # ------------------------------------------------------------------------------------------- chores

    def see_to(self, job: str, what: str, chore: Callable[[], Awaitable[None]]) -> None:
        """Have it done soon, once however often it is asked for, and again while the store fails."""
        self._chores[job, what] = chore
        self._chore.set()

    async def serve(self) -> None:
        """What has to be looked up in the store before it can be decided, until cancelled."""
        while True:
            await self._chore.wait()
            self._chore.clear()
            chores, self._chores = self._chores, {}
            for key, chore in chores.items():
                try:
                    await chore()
                except Exception as error:
                    expected = isinstance(error, StoreError)
                    logger.warning("job %r: not done yet (%s): %s", *key, error, exc_info=not expected)
                    asyncio.get_running_loop().call_later(1.0, self._put_back, key, chore)

    def _put_back(self, key: tuple[str, str], chore: Callable[[], Awaitable[None]]) -> None:
        self._chores.setdefault(key, chore)
        self._chore.set()

    async def _start_waiting(self, entry: Entry) -> None:
        for origin, number in startable(entry.state):
            starting = set(self.starting)
            waiting = await self._ledger.store.runs(
                RunQuery(
                    job=entry.id,
                    states=(RunState.PENDING,),
                    origin=origin,
                    outside_backfills=origin is None,
                    oldest_first=True,
                    limit=number,
                )
            )
            # What began while it was looked up may be among them, as it was before.
            waiting = [run for run in waiting if run.key not in starting and run.key not in self.starting]
            self.starting.update(run.key for run in waiting)
            self._ledger.settle(*(Start(self, run) for run in waiting))

    async def _cancel_elsewhere(self, job: str, anchor: int, keys: set[tuple[str, int, str]]) -> None:
        found = await self._ledger.store.runs(
            RunQuery(job=job, states=(RunState.PENDING, RunState.RUNNING), outside_backfills=True, limit=1000)
        )
        own = {execution.run.key for execution in self._of_job.get(job, ())}
        others = [run for run in found if run.key not in keys and run.key not in own and not run.detached]
        self._ledger.settle(*(Cut(self, run, "overlap", anchor) for run in others))
