"""What a CronScheduler writes of runs: that they come to be, start, go on, end; each as an `Intent` of its ledger.

Here it is decided what is written and what follows from its having been written. What is not here: the order of things
and the store (`runtime.cron_ledger`), what is written of jobs (`runtime.cron_changes`), which occurrences become runs
(`core.firing`), running them (`runtime.cron_execution`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import msgspec

from kapsl_scheduler.core.firing import Plan, Timetable, place, plan, startable
from kapsl_scheduler.core.jobs import CronJob, OnInterrupt
from kapsl_scheduler.core.runs import Backfill, Change, JobState, Run, RunState, booked
from kapsl_scheduler.errors import InvalidJob, NotFound
from kapsl_scheduler.ports import Committed
from kapsl_scheduler.runtime.cron_execution import Execution
from kapsl_scheduler.runtime.cron_ledger import Entry, Intent

__all__ = [
    "MAX_BACKFILL",
    "Attempt",
    "Checkpoint",
    "Cut",
    "End",
    "Fill",
    "Fire",
    "IntentHost",
    "Rescue",
    "Start",
    "Trigger",
    "behind",
    "found",
]

MAX_BACKFILL: Final = 10_000
"""Runs that one backfill may ask for."""

replace = msgspec.structs.replace


class IntentHost(Protocol):
    """What intents need of their scheduler."""

    owner: str
    closing: bool
    cutting: bool
    starting: set[tuple[str, int, str]]

    def wall(self) -> int: ...
    def launch(self, entry: Entry, run: Run) -> None: ...
    def noted(self, run: Run) -> None: ...
    def post(self, intent: Intent) -> None: ...
    def schedule(self, entry: Entry, nominal: int | None, due: int | None) -> None: ...
    def reschedule(self, entry: Entry) -> None: ...
    def executions(self, job: str) -> list[Execution]: ...
    def look_again(self, job: str) -> None: ...
    def told(self, kind: str, job: str, run: Run | None = None) -> None: ...
    def room_for_waiting(self, entry: Entry) -> None: ...
    def room_in(self, job: str) -> None: ...
    def cancel_elsewhere(self, entry: Entry, besides: Sequence[Run]) -> None: ...


def found(entry: Entry | None, job: str) -> Entry:
    """The job. Raises `NotFound`."""
    if entry is None:
        raise NotFound(f"no job {job!r}")
    return entry


def behind(state: JobState, met: int) -> JobState:
    """The books with nothing left to decide up to a moment."""
    return replace(state, cursor=met) if met > state.cursor else state


def _version(entry: Entry | None) -> int:
    return 0 if entry is None else entry.version


class _Creating(Intent):
    """Something that adds runs, and starts those that are to run."""

    __slots__ = ("_host", "_others", "_plan")

    def __init__(self, host: IntentHost, job: str) -> None:
        super().__init__(job)
        self._host = host
        self._plan: Plan | None = None
        self._others: Sequence[tuple[Execution, Run]] = ()

    def take(self, entry: Entry, decided: Plan) -> Change | None:
        self._plan = decided
        state = decided.state
        updated: tuple[Run, ...] = ()
        if decided.cancel_others:
            self._others = others = []
            now = self._host.wall()
            for execution in self._host.executions(self.job):
                if execution.run.detached or execution.anchor != state.anchor or execution.run.limit:
                    continue  # of an earlier job of this id, or of a backfill, which goes its own way
                after = execution.cut(RunState.CANCELLED, "overlap", now)
                state = booked(state, execution.run, after)
                updated += (after,)
                others.append((execution, after))
        if state is entry.state:
            return None
        return Change(job=self.job, expected=entry.version, state=state, created=decided.runs, updated=updated)

    def follow(self, entry: Entry, numbers: Sequence[int]) -> list[Run]:
        assert self._plan is not None
        if self._plan.cancel_others:
            for execution, after in self._others:
                execution.discard("overlap")
                self._host.noted(after)
            if entry.state.running + entry.state.waiting > 1:
                self._host.cancel_elsewhere(entry, self._plan.runs)
        runs: list[Run] = []
        for planned, number in zip(self._plan.runs, numbers, strict=True):
            run = replace(planned, number=number)
            runs.append(run)
            if run.state is RunState.RUNNING:
                self._host.launch(entry, run)
            else:
                self._host.noted(run)
        return runs

    def gives_way(self) -> bool:
        """What was to be cancelled in its favour is another process's by now: that one says how it ends."""
        others, self._others = self._others, []
        for execution, _ in others:
            execution.discard("taken over")
        return bool(others)


class Fire(_Creating):
    """What the schedule asks for by now."""

    __slots__ = ("_met",)

    lasting = True

    def __init__(self, host: IntentHost, job: str) -> None:
        super().__init__(host, job)
        self._met = 0

    def decide(self, entry: Entry | None) -> Change | None:
        if entry is None or entry.unbound is not None or self._host.cutting:
            self._plan = None
            return None
        assert entry.job is not None
        assert entry.timetable is not None
        state = behind(entry.state, self._met)
        return self.take(entry, plan(entry.job, entry.timetable, state, self._host.wall(), self._host.owner))

    def done(self, entry: Entry | None, written: Committed) -> None:
        if entry is None or self._plan is None:
            return
        self._host.schedule(entry, self._plan.next, self._plan.due)
        self.follow(entry, written.numbers)

    def fail(self, error: Exception) -> None:
        """It could not be decided: that must not be the end of the job."""
        self._host.look_again(self.job)

    def meets(self, run: Run) -> bool:
        """The run was made in an earlier life of the job: it is not made again, and the schedule goes on behind it."""
        self._met = run.nominal
        return True


class Trigger(_Creating):
    """One run now. With a `version`, whoever asks has looked at the job as of then, and has not found that it was asked
    for before: a job that is another by now is to be looked at again, and the answer is None."""

    __slots__ = ("_origin", "_version")

    def __init__(self, host: IntentHost, job: str, origin: str, version: int | None) -> None:
        super().__init__(host, job)
        self._origin = origin
        self._version = version

    def decide(self, entry: Entry | None) -> Change | None:
        self._plan = None
        entry = found(entry, self.job)
        job, _ = _ready(entry)
        if self._version is not None and self._version != entry.version:
            return None
        return self.take(entry, place(job, entry.state, self._origin, self._host.wall(), self._host.owner))

    def done(self, entry: Entry | None, written: Committed) -> Run | None:
        if self._plan is None:
            return None
        assert entry is not None
        return self.follow(entry, written.numbers)[0]

    def exists(self, run: Run) -> Run:
        return run


class Fill(Intent):
    """The runs of a backfill: one for each occurrence of a range, a few at a time. Says how many; None as `Trigger`."""

    __slots__ = ("_host", "_limit", "_origin", "_range", "_version")

    def __init__(
        self, host: IntentHost, job: str, start: int, end: int, limit: int, origin: str, version: int | None
    ) -> None:
        super().__init__(job)
        self._host = host
        self._range = (start, end)
        self._limit = limit
        self._origin = origin
        self._version = version

    def decide(self, entry: Entry | None) -> Change | None:
        entry = found(entry, self.job)
        _, timetable = _ready(entry)
        if self._version is not None and self._version != entry.version:
            return None
        state = entry.state
        start, end = self._range
        number = timetable.count(start - 1, end - 1)
        if not 0 < number <= MAX_BACKFILL:
            raise InvalidJob(
                [f"backfill: expected a range with 1 to {MAX_BACKFILL} occurrences, got {number}"], self.job
            )
        runs: list[Run] = []
        nominal = timetable.next(start - 1)
        while nominal is not None and nominal < end:
            run = Run(
                job=self.job,
                nominal=nominal,
                origin=self._origin,
                state=RunState.PENDING,
                first=nominal,
                due=self._host.wall(),
                limit=self._limit,
            )
            runs.append(run)
            nominal = timetable.next(nominal)
        backfills = {**state.backfills, self._origin: Backfill(self._limit, waiting=number)}
        state = replace(state, due=state.due + number, backfills=backfills)
        return Change(job=self.job, expected=entry.version, state=state, created=tuple(runs))

    def done(self, entry: Entry | None, written: Committed) -> int | None:
        assert entry is not None
        self._host.room_for_waiting(entry)
        return len(written.numbers) or None

    def exists(self, run: Run) -> int:
        return 0


class Start(Intent):
    """A run that waited starts. It stands in the host's `starting` until this is written, or given up."""

    __slots__ = ("_after", "_before", "_host")

    lasting = True

    def __init__(self, host: IntentHost, run: Run) -> None:
        super().__init__(run.job)
        self._host = host
        self._before = run
        self._after = run

    @property
    def turns(self) -> tuple[Run, Run] | None:
        return self._before, self._after

    def decide(self, entry: Entry | None) -> Change | None:
        before = self._after = self._before
        if entry is None or entry.unbound is not None or self._host.closing:
            return None
        origin = before.origin if before.limit else None
        if not any(place == origin for place, _ in startable(entry.state)):
            return None  # another was faster: its turn comes again
        self._after = replace(
            before,
            state=RunState.RUNNING,
            reason="",
            owner=self._host.owner,
            started=self._host.wall(),
            attempt=before.attempt + (before.started is not None),
        )
        state = booked(entry.state, before, self._after)
        return Change(job=self.job, expected=entry.version, state=state, updated=(self._after,), taken_from="")

    def done(self, entry: Entry | None, written: Committed) -> None:
        self._host.starting.discard(self._before.key)
        if entry is not None and self._after.state is RunState.RUNNING:
            self._host.launch(entry, self._after)
            self._host.room_for_waiting(entry)

    def refused(self) -> None:
        self._host.starting.discard(self._before.key)
        self._host.room_in(self.job)

    def fail(self, error: Exception) -> None:
        self._host.starting.discard(self._before.key)


class Rescue(Intent):
    """A run whose process died: interrupted, or resumed here as its next attempt. `version` is that of its job before
    the run was looked up: if it is another by now, the run may have gone on, and is left to the next look."""

    __slots__ = ("_after", "_before", "_host", "_version")

    def __init__(self, host: IntentHost, run: Run, version: int) -> None:
        super().__init__(run.job)
        self._host = host
        self._before = run
        self._after = run
        self._version = version

    def decide(self, entry: Entry | None) -> Change | None:
        before = self._after = self._before
        if _version(entry) != self._version:
            return None
        taken_from = None
        job = None if entry is None or before.detached else entry.job
        if job is None or job.run.on_interrupt is OnInterrupt.RECORD:
            self._after = replace(before, state=RunState.INTERRUPTED, reason="crash", ended=self._host.wall())
        else:
            taken_from = before.owner
            if entry is not None and entry.unbound is None:
                self._after = replace(before, owner=self._host.owner, attempt=before.attempt + 1)
            else:
                self._after = replace(before, state=RunState.PENDING, reason="crash", owner="")
        return Change(
            job=self.job,
            expected=_version(entry),
            # Also where the books stay as they are: it is another version, and who would take it too comes too late.
            state=None if entry is None or before.detached else booked(entry.state, before, self._after),
            updated=(self._after,),
            taken_from=taken_from,
        )

    def done(self, entry: Entry | None, written: Committed) -> None:
        if self._after is self._before:
            return
        if self._after.state is RunState.RUNNING and entry is not None:
            self._host.launch(entry, self._after)
        else:
            self._host.noted(self._after)
            if entry is not None:
                self._host.room_for_waiting(entry)


class Cut(Intent):
    """A run that waits, or that another process runs, is cancelled in favour of a new one. `anchor` is that of the job
    of both: if it is gone by now, or has made way for a later one of the same id, the run is not in its way."""

    __slots__ = ("_after", "_anchor", "_before", "_cuts", "_host")

    lasting = True

    def __init__(self, host: IntentHost, run: Run, reason: str, anchor: int) -> None:
        super().__init__(run.job)
        self._host = host
        self._before = run
        self._after = replace(run, state=RunState.CANCELLED, reason=reason, ended=host.wall())
        self._anchor = anchor
        self._cuts = False

    def decide(self, entry: Entry | None) -> Change | None:
        self._cuts = entry is not None and entry.state.anchor == self._anchor
        if entry is None or not self._cuts:
            return None
        state = booked(entry.state, self._before, self._after)
        return Change(job=self.job, expected=entry.version, state=state, updated=(self._after,))

    def done(self, entry: Entry | None, written: Committed) -> None:
        if self._cuts:
            self._host.noted(self._after)


class Attempt(Intent):
    """A run is tried again. Says whether it is still ours. It makes another version of the job: who would take over the
    run as it was comes too late."""

    __slots__ = ("_after", "_execution")

    lasting = True

    def __init__(self, execution: Execution, after: Run) -> None:
        super().__init__(after.job)
        self._execution = execution
        self._after = after

    def decide(self, entry: Entry | None) -> Change | None:
        state = None if entry is None else entry.state
        return Change(job=self.job, expected=_version(entry), state=state, updated=(self._after,))

    def done(self, entry: Entry | None, written: Committed) -> bool:
        execution = self._execution
        execution.run = replace(self._after, detached=execution.run.detached)
        return True

    def refused(self) -> bool:
        return False


class Checkpoint(Attempt):
    """How far a run is, and what its source and sink remember. Says whether it is still ours."""

    __slots__ = ("_memory",)

    def __init__(self, execution: Execution, after: Run, memory: Mapping[str, str | None]) -> None:
        super().__init__(execution, after)
        self._memory = memory

    def decide(self, entry: Entry | None) -> Change | None:
        # Whatever has become of the job. What is not its own it does not touch: a later job's memory is that job's.
        memory = self._memory if entry is not None and self._execution.is_of(entry.state) else {}
        return Change(job=self.job, expected=None, updated=(self._after,), memory=memory)


class End(Intent):
    """A run has ended, one way or another, or goes back to wait. `anchor` is that of its job when it was dispatched:
    what has another is a later job of the same id, in whose books it is not."""

    __slots__ = ("_after", "_anchor", "_before", "_host", "_pauses")

    lasting = True

    def __init__(self, host: IntentHost, before: Run, after: Run, anchor: int) -> None:
        super().__init__(before.job)
        self._host = host
        self._before = before
        self._after = after
        self._anchor = anchor
        self._pauses = False

    @property
    def turns(self) -> tuple[Run, Run] | None:
        return self._before, self._after

    def decide(self, entry: Entry | None) -> Change | None:
        state = None
        self._pauses = False
        if entry is not None and entry.state.anchor == self._anchor and not self._before.detached:
            state = booked(entry.state, self._before, self._after)
            limit = None if entry.job is None else entry.job.run.pause_after
            if limit is not None and state.failures >= limit and not state.paused:
                self._pauses = True
                state = replace(state, paused=f"{state.failures} failures in a row")
        elif self._after.state is RunState.PENDING:  # for a job that is gone, nobody would go on with it
            self._after = replace(
                self._after, state=RunState.CANCELLED, owner=self._before.owner, ended=self._host.wall()
            )
        return Change(
            job=self.job,
            expected=_version(entry),
            state=state,
            updated=(self._after,),
            taken_from=None if self._after.owner == self._before.owner else self._before.owner,
        )

    def done(self, entry: Entry | None, written: Committed) -> None:
        self._host.noted(self._after)
        if entry is not None:
            if self._pauses:
                self._host.reschedule(entry)
                self._host.told("paused", self.job)
            self._host.room_for_waiting(entry)


def _ready(entry: Entry) -> tuple[CronJob, Timetable]:
    """The job and its occurrences, if it can run here. Raises `InvalidJob`, which says why not."""
    if entry.unbound is not None:
        raise InvalidJob([f"it cannot run here: {entry.unbound}"], entry.id)
    assert entry.job is not None
    assert entry.timetable is not None
    return entry.job, entry.timetable
