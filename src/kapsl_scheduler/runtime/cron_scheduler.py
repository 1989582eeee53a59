"""CronScheduler: scheduled inference. The public calls, and the life of it all.

One task looks after the timer of all jobs, one writes what is decided, and each run has its own. What is not here:
which occurrences become runs (`core.firing`), what is written of runs (`runtime.cron_intents`) and of jobs
(`runtime.cron_changes`) and in which order (`runtime.cron_ledger`), how runs go
(`runtime.cron_runs`), other processes on the store (`runtime.cron_watch`).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import reprlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Self

from kapsl_scheduler.core.definition import Adapters
from kapsl_scheduler.core.jobs import MAX_ID, CronJob, micros, moment
from kapsl_scheduler.core.runs import SCHEDULE, Run, RunState
from kapsl_scheduler.errors import CronError, InvalidJob, NotFound
from kapsl_scheduler.packages.manifest import CronJobDef, Manifest
from kapsl_scheduler.ports import CronTarget, JobStore, RunQuery
from kapsl_scheduler.runtime.cron_alarm import Alarm
from kapsl_scheduler.runtime.cron_catalogue import Catalogue
from kapsl_scheduler.runtime.cron_changes import Pause, Resume
from kapsl_scheduler.runtime.cron_events import Events
from kapsl_scheduler.runtime.cron_intents import MAX_BACKFILL, Fill, Fire, Trigger
from kapsl_scheduler.runtime.cron_ledger import Entry, Intent, Ledger
from kapsl_scheduler.runtime.cron_metrics import CronFigures, CronStatistics
from kapsl_scheduler.runtime.cron_runs import AT_ONCE, Runs
from kapsl_scheduler.runtime.cron_views import CronEvent, CronJobInfo, CronRun, job_info, run_view
from kapsl_scheduler.runtime.cron_watch import Watch
from kapsl_scheduler.stores.memory import MemoryStore

__all__ = ["CronScheduler"]

logger = logging.getLogger(__name__)

DRAIN: Final = 10.0
"""Seconds that `async with` gives runs to end when it is left."""
LAST_WRITES: Final = 5.0
"""Seconds that closing gives a store that fails to take what is left."""
MAX_PREVIEW: Final = 1000
"""Occurrences that a preview may have."""


def _system_wall() -> int:
    return time.time_ns() // 1000


class CronScheduler:
    """Fires inference jobs into a target: a `Scheduler`, or whatever has its `infer` (`ports.CronTarget`); or into
    several models, by something whose `target(model)` gives such a one for a name. It raises an `EngineError` for a
    model that is not there: its jobs wait until `look_again` finds it.

    `store` keeps jobs and history (None: in memory); it is opened and closed with the scheduler. `clock` gives
    microseconds since 1970 UTC. `allow_latency_critical` lets jobs run in the first class, before which live requests
    have no precedence. `adapters` makes the sources and sinks of stored jobs anew, which wait without it:
    `kapsl_scheduler.adapters.builtin_adapters` makes those of this package. At most `max_concurrent_runs` runs go on at
    a time, the others wait their turn. Of each job the last `history_keep` runs are kept, for up to `history_max_age`
    seconds. Where several processes share a store, one that gives no sign of life for `lease` seconds is taken for
    dead.

    Use it with `async with`, inside that of its target: leaving it stops firing, lets runs end for ten seconds and
    cancels the rest. All calls belong to the event loop that entered it, and raise `CronError` before and after.
    """

    def __init__(
        self,
        target: Any,
        *,
        store: JobStore | None = None,
        clock: Callable[[], int] | None = None,
        allow_latency_critical: bool = False,
        adapters: Adapters | None = None,
        max_concurrent_runs: int = 256,
        history_keep: int = 1000,
        history_max_age: float = 30 * 86400.0,
        lease: float = 15.0,
    ) -> None:
        if not hasattr(target, "infer") and not hasattr(target, "target"):
            raise TypeError(f"target: expected something with infer() or target(), got {target!r}")
        for name, number in (("max_concurrent_runs", max_concurrent_runs), ("history_keep", history_keep)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        for name, seconds in (("history_max_age", history_max_age), ("lease", lease)):
            if not seconds > 0:
                raise ValueError(f"{name}: expected more than 0 seconds, got {seconds}")
        self._target = target
        self._wall = clock or _system_wall
        self._allow_critical = allow_latency_critical
        self._events = Events()
        self._alarm = Alarm(self._wall, self._fire)
        self._ledger = Ledger(store if store is not None else MemoryStore(), changed=self._changed, gone=self._gone)
        self._runs = Runs(
            self._ledger,
            self._alarm,
            self._events,
            owner=uuid.uuid4().hex,
            wall=self._wall,
            target=self._target_of,
            most=max_concurrent_runs,
        )
        self._catalogue = Catalogue(
            self._ledger, self._runs, target, adapters, allow_latency_critical=allow_latency_critical
        )
        self._watch = Watch(self._ledger, self._runs, lease=lease, keep=history_keep, max_age=history_max_age)
        self._services: list[asyncio.Task[None]] = []
        self._phase = "not entered"
        self._broken: str | None = None  # why nothing works any more
        self._ending: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<CronScheduler {self._phase}: {len(self._ledger.entries)} jobs, {self._runs.running} running>"

    # ------------------------------------------------------------------------------------- lifecycle

    async def __aenter__(self) -> Self:
        if self._phase != "not entered":
            raise RuntimeError(f"the cron scheduler is {self._phase}: each is entered once")
        self._phase = "opening"
        try:
            await self._ledger.store.open()
            await self._ledger.store.beat(self._runs.owner)
            await self._catalogue.open()
        except BaseException:
            self._phase = "closed"
            await self._ledger.store.close()
            raise
        self._phase = "open"
        services: dict[str, Coroutine[Any, Any, None]] = {
            "writer": self._ledger.serve(),
            "chores": self._runs.serve(),
            "watch": self._watch.serve(),
        }
        self._services = [asyncio.create_task(service, name=f"cron {name}") for name, service in services.items()]
        for task in self._services:
            task.add_done_callback(self._service_ended)
        self._alarm.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(drain=DRAIN if error is None else 0.0)

    async def close(self, drain: float = DRAIN) -> None:
        """Stop firing, let runs end for up to `drain` seconds, cancel the rest (recorded as cancelled; those that
        resume wait for the next process), write everything down and close the store.

        Closing what is closed, or never was entered, does nothing; closing while another closes waits for it.
        Cancelling it cuts the drain short.
        """
        if self._phase in ("not entered", "closed"):
            return
        if self._phase == "opening":
            raise CronError("the cron scheduler is opening")
        if self._ending is not None:
            await asyncio.shield(self._ending)
            return
        self._phase = "closing"
        ending = self._ending = asyncio.create_task(self._end(drain), name="cron end")
        cut: asyncio.CancelledError | None = None
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError as error:
                cut = error
                self._runs.hurry()
        if cut is not None:
            raise cut

    async def _end(self, drain: float) -> None:
        """Nobody who waits for it can stop it."""
        self._alarm.stop()  # nothing more is fired
        try:
            await self._runs.drain(drain)
            await self._stop()
        finally:
            self._phase = "closed"

    async def _stop(self) -> None:
        """Write what is left, end the services, let go of the store."""
        settled = True
        try:
            async with asyncio.timeout(LAST_WRITES):
                await self._ledger.settled()
        except TimeoutError:
            settled = False
            logger.error("the store of the cron jobs does not take how the last runs ended: %s", self._ledger.failing)
        for task in self._services:
            task.cancel()
        await asyncio.gather(*self._services, return_exceptions=True)
        self._ledger.close(CronError("the cron scheduler is closed"))
        self._events.close()
        try:
            store, owner = self._ledger.store, self._runs.owner
            # What it began and never heard of, since the store failed, is for others to find.
            if settled and not await store.runs(RunQuery(states=(RunState.RUNNING,), owner=owner, limit=1)):
                await store.forget(owner)
        except Exception as error:
            logger.warning("the store of the cron jobs was not told of the end: %s", error)
        finally:
            await self._ledger.store.close()

    def _fire(self, due: list[Entry]) -> None:
        """Have it decided what the schedule asks of these jobs. Of many, others get the loop in between."""
        self._ledger.settle(*[Fire(self._runs, entry.id) for entry in due[:AT_ONCE]])
        if len(due) > AT_ONCE:
            asyncio.get_running_loop().call_soon(self._fire, due[AT_ONCE:])

    # ------------------------------------------------------------------------------------ registering

    async def register(self, job: CronJob, *, on_conflict: str = "update") -> None:
        """Start a job: it fires from now on.

        An id that the store knows from before is adopted: the same definition changes nothing, another takes its place
        and keeps counters and phase, or is refused with `on_conflict="error"`. Raises `DuplicateId` for an id that was
        registered here already, `InvalidExpression` or `InvalidJob` (which names everything that is wrong, a schedule
        that never fires among it) and `StoreError`.
        """
        self._check_open()
        await self._catalogue.register(job, refuse=_refuses(on_conflict))

    async def register_all(self, jobs: Iterable[CronJob], *, on_conflict: str = "update") -> None:
        """Start several jobs or none of them, also when it is cancelled. Raises what `register` raises; an `InvalidJob`
        names the faults of all."""
        self._check_open()
        await self._catalogue.register_all(jobs, refuse=_refuses(on_conflict))

    async def update(self, job: CronJob) -> CronJobInfo:
        """Put another definition in the place of a job's, keeping its counters and the phase of its interval. What runs
        goes on under the old one. Raises `NotFound`, and what `register` raises."""
        self._check_open()
        await self._catalogue.update(job)
        return self._info(self._catalogue.entry(job.id))

    async def unregister(self, id: str, *, cancel: bool = False) -> bool:
        """Forget a job; False if there is none of that id. What runs goes on to its end, or with `cancel` is cancelled;
        what waits is cancelled. Its history stays."""
        self._check_open()
        return await self._catalogue.remove(id, cancel=cancel)

    async def register_from_def(
        self, definition: CronJobDef, *, model: str | None = None, package: str | None = None
    ) -> None:
        """Start a job that a package declares. Raises what `register` raises."""
        await self.register(self._catalogue.declared(definition, model, package))

    async def register_from_manifest(self, manifest: Manifest, *, model: str | None = None) -> None:
        """Start the jobs of a package, all or none, under ids of the form `project:id`, or `model:id` where the target
        has several models. A package that is there already is replaced: jobs that both have are updated and keep
        counters and phase, those that the manifest has no more are removed, also those that the store holds from
        before. Raises what `register_all` raises, `InvalidJob` also for the id of a job that is not the package's."""
        self._check_open()
        await self._catalogue.register_package(manifest, model)

    async def unregister_package(self, package: str, *, cancel: bool = False) -> list[str]:
        """Forget exactly the jobs that came with a package. Returns their ids."""
        self._check_open()
        return await self._catalogue.remove_package(package, cancel=cancel)

    def bind(self, name: str, function: Callable[..., Any]) -> None:
        """Let jobs refer to a callable by name (`Named`). Stored jobs that waited for it fire from now on; what was due
        meanwhile follows their misfire rule. Raises `ValueError` for a name that stands for another callable."""
        self._catalogue.bind(name, function)

    def look_again(self) -> None:
        """Models have come or gone: the jobs of those that are not there wait, those of the others fire from now on;
        what was due meanwhile follows their misfire rule."""
        self._catalogue.look_again()

    # ---------------------------------------------------------------------------------- looking after jobs

    async def pause(self, id: str, *, reason: str = "by request") -> CronJobInfo:
        """Nothing is due until `resume`; what runs goes on. Raises `NotFound`."""
        return await self._change(Pause(self._runs, id, reason or "by request"))

    async def resume(self, id: str, *, catch_up: bool = False) -> CronJobInfo:
        """Go on from now (what was due meanwhile is recorded as missed), or with `catch_up` by the job's misfire rule.
        Raises `NotFound`."""
        return await self._change(Resume(self._runs, id, catch_up=catch_up))

    async def _change(self, intent: Intent) -> CronJobInfo:
        self._check_open()
        self._catalogue.entry(intent.job)
        await self._ledger.do(intent)
        return self._info(self._catalogue.entry(intent.job))

    async def trigger(self, id: str, *, origin: str | None = None) -> CronRun:
        """Fire once, now, also while the job is paused; its overlap policy holds. Asked for twice under one `origin` it
        is one run, as long as the history has it. Returns the run as it was recorded. Raises `NotFound`, `InvalidJob`
        for a job that cannot run here and for an origin that cannot be."""
        self._check_open()
        self._catalogue.entry(id)
        name = _origin(id, origin, "trigger")
        while True:
            version = self._catalogue.entry(id).version
            found = await self._asked_before(id, origin)
            if found is None:
                found = await self._ledger.do(Trigger(self._runs, id, name, None if origin is None else version))
            if found is not None:
                return run_view(found)

    async def backfill(
        self, id: str, start: dt.datetime, end: dt.datetime, *, concurrency: int = 1, origin: str | None = None
    ) -> tuple[str, int]:
        """Fire for every occurrence from `start` up to but not including `end`, `concurrency` at a time beside what the
        schedule fires. Returns the origin of the runs, and how many there are (0 where that origin has been asked for
        before, as far as the history goes back). Raises `NotFound`, `InvalidJob` for a range without occurrences, or
        with more than 10,000."""
        self._check_open()
        self._catalogue.entry(id)
        faults = [
            f"backfill.{name}: expected a datetime with a time zone, got {value!r}"
            for name, value in (("start", start), ("end", end))
            if not isinstance(value, dt.datetime) or value.tzinfo is None
        ]
        if type(concurrency) is not int or not 1 <= concurrency <= MAX_BACKFILL:
            faults.append(f"backfill.concurrency: expected an integer from 1 to {MAX_BACKFILL}, got {concurrency!r}")
        if faults:
            raise InvalidJob(faults, id)
        name = _origin(id, origin, "backfill")
        while True:
            version = self._catalogue.entry(id).version
            if await self._asked_before(id, origin) is not None:
                return name, 0
            seen = None if origin is None else version
            number = await self._ledger.do(Fill(self._runs, id, micros(start), micros(end), concurrency, name, seen))
            if number is not None:
                return name, number

    async def _asked_before(self, id: str, origin: str | None) -> Run | None:
        """A run of the job that was asked for under this name."""
        if origin is None:
            return None
        found = await self._ledger.store.runs(RunQuery(job=id, origin=origin, limit=1))
        return found[0] if found else None

    def preview(self, id: str, n: int = 5) -> list[dt.datetime]:
        """When the job is due next, as scheduled, whether or not it is paused: at most `n` times, and no more than its
        `max_runs` leaves. Raises `NotFound`, and `InvalidJob` where `n` is not from 1 to 1,000."""
        entry = self._catalogue.entry(id)
        if type(n) is not int or not 1 <= n <= MAX_PREVIEW:
            raise InvalidJob([f"n: expected an integer from 1 to {MAX_PREVIEW}, got {n!r}"], id)
        if entry.job is not None and (most := entry.job.firing.max_runs) is not None:
            n = min(n, most - entry.state.scheduled)
        timetable = entry.timetable
        found: list[dt.datetime] = []
        last = max(entry.state.cursor, self._wall())
        while timetable is not None and len(found) < n and (nominal := timetable.next(last)) is not None:
            found.append(moment(nominal))
            last = nominal
        return found

    # ---------------------------------------------------------------------------------------- reports

    async def list_jobs(self, *, after: str = "", limit: int | None = None) -> list[CronJobInfo]:
        """The jobs by id: all, or the first `limit` whose ids come after `after`."""
        ids = sorted(id for id in self._ledger.entries if id > after)
        found: list[CronJobInfo] = []
        for number, id in enumerate(ids[:limit]):
            if number % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
            if (entry := self._ledger.entries.get(id)) is not None:
                found.append(self._info(entry))
        return found

    async def job_info(self, id: str) -> CronJobInfo | None:
        """What is known of a job; None if there is none of that id."""
        entry = self._ledger.entries.get(id)
        return None if entry is None else self._info(entry)

    def job(self, id: str) -> CronJob:
        """A job as it fires, to make another of it (`msgspec.structs.replace`) for `update`. Raises `NotFound`, and
        `InvalidJob` where its stored definition cannot be read."""
        entry = self._catalogue.entry(id)
        if entry.job is None:
            raise InvalidJob([str(entry.unbound)], id)
        return entry.job

    def definition(self, id: str) -> bytes:
        """A job's definition as JSON text. Raises `NotFound`."""
        return self._catalogue.entry(id).definition

    def parse(self, definition: bytes) -> CronJob:
        """The job that a definition describes, to be registered. Raises `InvalidJob`."""
        return self._catalogue.bindings.decode(definition)

    async def runs(
        self,
        id: str | None = None,
        *,
        limit: int = 100,
        before: int | None = None,
        states: Sequence[RunState] = (),
        origin: str | None = None,
    ) -> list[CronRun]:
        """The history of a job (None: of all), the newest first: at most `limit` runs with numbers below `before`, in
        these states (none given: in any). What ran just now has its latest figures. A job that is gone still has its
        history. Raises `StoreError`."""
        self._check_open()
        found = await self._ledger.store.runs(
            RunQuery(job=id, states=tuple(states), origin=origin, before=before, limit=limit)
        )
        return [self._runs.view(run) for run in found]

    async def run(self, number: int) -> CronRun:
        """One run by its number. Raises `NotFound`, `StoreError`."""
        self._check_open()
        found = await self._ledger.store.numbered(number)
        if found is None:
            raise NotFound(f"no run {number}")
        return self._runs.view(found)

    def events(self) -> AsyncGenerator[CronEvent, None]:
        """What happens from now on, until the scheduler is closed. A reader that falls 1,000 events behind loses the
        oldest, and is told how many."""
        return self._events.read()

    @property
    def allow_latency_critical(self) -> bool:
        """Whether jobs may run in the first class."""
        return self._allow_critical

    @property
    def figures(self) -> CronFigures:
        """The counters and histograms of this process as they are kept: to be read."""
        return self._runs.figures

    def statistics(self) -> CronStatistics:
        """The figures of this process."""
        failing = self._ledger.failing
        return self._runs.figures.statistics(
            jobs=len(self._ledger.entries),
            running=self._runs.running,
            waiting=self._runs.waiting,
            overdue=self._overdue(),
            store_failing=None if failing is None else str(failing),
        )

    def _overdue(self) -> dict[str, float]:
        """The jobs whose time has come and whose firing has not been decided, and by how many seconds they are late:
        also those whose firing waits for a store that fails."""
        now = self._wall()
        return {
            entry.id: (now - due) / 1e6
            for entry in self._ledger.entries.values()
            if entry.next is not None
            and entry.next <= now
            and entry.timetable is not None
            and (due := entry.timetable.due(entry.next)) <= now
        }

    async def compact(self) -> None:
        """Hold the history to its bounds now, and give back what the store has freed. Raises `StoreError`."""
        self._check_open()
        await self._watch.prune()
        await self._ledger.store.compact()

    # ------------------------------------------------------------------------------------------ inside

    def _check_open(self) -> None:
        if self._broken is not None:
            raise CronError(self._broken)
        if self._phase != "open":
            raise CronError(f"the cron scheduler is {self._phase}")

    def _info(self, entry: Entry) -> CronJobInfo:
        return job_info(entry.id, entry.job, entry.state, next_firing=entry.next, unbound=entry.unbound)

    def _target_of(self, model: str | None) -> CronTarget:
        if model is None:
            return self._target  # type: ignore[no-any-return]
        return self._target.target(model)  # type: ignore[no-any-return]

    def _changed(self, entry: Entry) -> None:
        self._catalogue.read(entry)

    def _gone(self, entry: Entry) -> None:
        self._catalogue.gone(entry)
        self._runs.figures.give_back(entry.id)

    def _service_ended(self, task: asyncio.Task[None]) -> None:
        """One of our own mistakes: nobody is to wait for what does not come."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        logger.critical("%s has stopped: jobs no longer fire as they should", task.get_name(), exc_info=error)
        self._broken = f"the cron scheduler has broken down: {type(error).__name__}: {error}"
        self._ledger.close(CronError(self._broken))


def _refuses(on_conflict: str) -> bool:
    if on_conflict not in ("update", "error"):
        raise ValueError(f"on_conflict: expected 'update' or 'error', got {on_conflict!r}")
    return on_conflict == "error"


def _origin(job: str, origin: str | None, kind: str) -> str:
    if origin is None:
        return f"{kind}-{uuid.uuid4().hex}"
    if origin == SCHEDULE or not origin.strip() or len(origin) > MAX_ID or not origin.isprintable():
        expected = f"expected 1 to {MAX_ID} printable characters other than {SCHEDULE!r}"
        raise InvalidJob([f"origin: {expected}, got {reprlib.repr(origin)}"], job)
    return origin
