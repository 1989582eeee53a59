"""What has become of a job's firings: the record of one run, and a job's books.

Values only, and the one function that keeps the books. Which runs there are is decided in `core.firing`; who keeps the
records is a store's business. All times are integer microseconds since 1970 UTC.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from kapsl_scheduler.core.jobs import micros

__all__ = [
    "SCHEDULE",
    "Backfill",
    "Change",
    "Firing",
    "JobRecord",
    "JobState",
    "LastRun",
    "Removal",
    "Run",
    "RunState",
    "booked",
    "compact",
    "repeated",
    "run_of",
]

SCHEDULE: Final = "schedule"
"""The origin of runs that the schedule asked for; other origins are ids of a trigger or a backfill."""


class RunState(enum.Enum):
    """Where a run stands. `PENDING` waits for an earlier run; the first two are open, the others how a run ended."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"
    MISSED = "missed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    def __init__(self, word: str) -> None:
        self.open = word in ("pending", "running")  # not by looking members up in a set: that hashes them, slowly
        self.field = "waiting" if word == "pending" else word  # of the books


class Run(msgspec.Struct, gc=False, frozen=True, kw_only=True, omit_defaults=True):
    """One due run: (job, nominal, origin) names it for ever.

    `count` occurrences from `first` to `nominal` share one record where none of them ran (missed after a stall); else
    it is 1 and both are the same. `due` is when it was to start (the nominal time, plus the job's part of `spread`).
    `reason` is a word for why it ended so (overlap, busy, condition, late, coalesced, timeout, ...), `error` the text.
    `attempt` counts from 1. `owner` is the process that runs it, `limit` the most runs of its backfill at a time.
    `detached` runs outlive their job and are in nobody's books: once a store has one as that, it stays so.
    `number` is the store's, rising as runs are created.

    `requests`, `failed_requests`, `rows`, `input_bytes` and `output_bytes` are what it has done so far.
    `callback_error` is what `on_result` raised.
    """

    job: str
    nominal: int
    origin: str = SCHEDULE
    state: RunState
    first: int
    due: int
    count: int = 1
    reason: str = ""
    error: str = ""
    attempt: int = 1
    started: int | None = None
    ended: int | None = None
    owner: str = ""
    limit: int = 0
    detached: bool = False
    requests: int = 0
    failed_requests: int = 0
    rows: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    callback_error: str = ""
    number: int = 0

    @property
    def key(self) -> tuple[str, int, str]:
        return self.job, self.nominal, self.origin


class LastRun(msgspec.Struct, gc=False, frozen=True):
    """How a job's last run ended, as far as listings show it."""

    nominal: int
    outcome: RunState
    ended: int
    started: int | None = None
    reason: str = ""


class Backfill(msgspec.Struct, gc=False, frozen=True):
    """The open runs of one backfill, of which `limit` may run at a time."""

    limit: int
    running: int = 0
    waiting: int = 0


class JobState(msgspec.Struct, gc=False, frozen=True, omit_defaults=True):
    """A job's books and its place on its schedule.

    Every occurrence up to `cursor` has been decided. `anchor` is the phase of intervals. `paused` is why it is paused,
    empty if it is not. `due` counts the runs that were ever due, of whatever origin; each is in one of the outcomes or
    open. `running` and `waiting` are the open ones outside backfills. `fired` counts dispatched runs, `scheduled` those
    that the schedule made. `failures` counts the failed ones in a row.
    """

    anchor: int
    cursor: int
    paused: str = ""
    due: int = 0
    succeeded: int = 0
    failed: int = 0
    skipped: int = 0
    missed: int = 0
    cancelled: int = 0
    interrupted: int = 0
    running: int = 0
    waiting: int = 0
    backfills: dict[str, Backfill] = {}
    fired: int = 0
    scheduled: int = 0
    failures: int = 0
    last: LastRun | None = None

    @property
    def pending(self) -> int:
        """Due runs that have not ended."""
        return self.running + self.waiting + sum(b.running + b.waiting for b in self.backfills.values())

    @property
    def balanced(self) -> bool:
        """Whether every run that was due is accounted for once."""
        ended = self.succeeded + self.failed + self.skipped + self.missed + self.cancelled + self.interrupted
        return self.due == ended + self.pending


class Firing(msgspec.Struct, gc=False, frozen=True):
    """What a job's callables, sources and sinks are told of a run. `nominal` is the time on the schedule.

    `ended`, which only sinks hear, are the keys of those runs in the job's memory that have ended.
    """

    job: str
    nominal: dt.datetime
    origin: str
    attempt: int
    ended: frozenset[str] = frozenset()

    @property
    def key(self) -> str:
        """Names the run among those of its job, in what a sink remembers."""
        return f"{compact(self.nominal)}:{self.origin}"


def compact(nominal: dt.datetime) -> str:
    """The time in UTC as it may stand in a file's name: 20261125T030000Z, with a fraction if it has one."""
    utc = nominal.astimezone(dt.UTC)
    fraction = f".{utc.microsecond:06}" if utc.microsecond else ""
    return f"{utc:%Y%m%dT%H%M%S}{fraction}Z"


def run_of(key: str) -> tuple[int, str] | None:
    """The nominal time and the origin of the run whose `Firing.key` this is; None if it is none."""
    time, _, origin = key.partition(":")
    try:
        return micros(dt.datetime.fromisoformat(time)), origin
    except ValueError:
        return None


class JobRecord(msgspec.Struct, gc=False, frozen=True):
    """A job as a store keeps it: its definition as text (`core.definition`), its books, and the version of both, which
    rises with every change and is never used twice."""

    id: str
    definition: bytes
    state: JobState
    version: int


class Removal(msgspec.Struct, gc=False, frozen=True):
    """What becomes of the open runs of a job that is taken away, whichever they are by then: those that wait are
    cancelled at `ended` for a `reason`; those that run are too with `cancel`, else they are detached. What an earlier
    job of the id has left behind goes on as it does."""

    ended: int
    reason: str = "unregistered"
    cancel: bool = False


class Change(msgspec.Struct, gc=False, frozen=True, kw_only=True):
    """What is to be written about one job, all or nothing.

    `expected` is the version of the job that the decision was made on: 0 where it was not there, None to leave the job
    as it is whatever it has become. `state` and `definition` replace the job's (both together create it), `remove`
    takes it away with its memory, whatever else is said of it, and says what becomes of its runs. `created` are new
    runs; `updated` replace open runs of the same key whose owner is `taken_from` (`""` for runs that nobody has begun),
    or their own where that is None, and keep their number; and who does not know that they are `detached` does not
    change that. `memory` sets what the job's source and sink remember, None to forget it; where there is no job there
    is nobody to remember it, and it is dropped.

    What stands in its way is looked for in this order: the version, `created`, `updated`. A run that is named twice in
    one change stands in its own way.

    Raises `ValueError` for a new job without state or definition, and for either of them without `expected`.
    """

    job: str
    expected: int | None
    state: JobState | None = None
    definition: bytes | None = None
    remove: Removal | None = None
    created: tuple[Run, ...] = ()
    updated: tuple[Run, ...] = ()
    taken_from: str | None = None
    memory: Mapping[str, str | None] = {}

    def __post_init__(self) -> None:
        if self.expected == 0 and (self.state is None) != (self.definition is None) and self.remove is None:
            raise ValueError(f"job {self.job!r}: a new job takes a state and a definition, one of them is missing")
        if self.expected is None and not (self.remove is None and self.state is None and self.definition is None):
            raise ValueError(f"job {self.job!r}: whoever changes a job says which version of it: `expected` is missing")


def repeated(runs: Sequence[Run]) -> Run | None:
    """The first of these runs whose key is that of one before it."""
    seen: set[tuple[str, int, str]] = set()
    for run in runs:
        if run.key in seen:
            return run
        seen.add(run.key)
    return None


def booked(state: JobState, before: Run | None, after: Run, cursor: int | None = None) -> JobState:
    """The books after a run came to be (`before` is None) or went from one state to another, with another `cursor` if
    one is given."""
    now = after.state
    if now is RunState.RUNNING and before is None and after.origin == SCHEDULE:  # as nearly always
        return msgspec.structs.replace(
            state,
            cursor=state.cursor if cursor is None else cursor,
            due=state.due + 1,
            running=state.running + 1,
            fired=state.fired + 1,
            scheduled=state.scheduled + 1,
        )
    changes: dict[str, Any] = {} if cursor is None else {"cursor": cursor}
    if before is None:
        changes["due"] = state.due + after.count
        if now.open and after.origin == SCHEDULE:
            changes["scheduled"] = state.scheduled + 1
    elif before.state is now:
        return msgspec.structs.replace(state, **changes) if changes else state
    elif before.limit:
        _fill(state, changes, before, -1)
    else:
        field = before.state.field
        changes[field] = getattr(state, field) - before.count
    if after.limit and now.open:
        _fill(state, changes, after, 1)
    else:
        field = now.field
        changes[field] = getattr(state, field) + after.count
    if now is RunState.RUNNING:
        if before is None or before.started is None:  # not one that resumes
            changes["fired"] = state.fired + 1
    elif now is not RunState.PENDING:
        if now is RunState.SUCCEEDED:
            if state.failures:
                changes["failures"] = 0
        elif now is RunState.FAILED:
            changes["failures"] = state.failures + 1
        changes["last"] = LastRun(after.nominal, now, after.ended or after.due, after.started, after.reason)
    return msgspec.structs.replace(state, **changes)


def _fill(state: JobState, changes: dict[str, Any], run: Run, by: int) -> None:
    """Count an open run in or out of its backfill."""
    field = run.state.field
    backfills = dict(changes.get("backfills", state.backfills))
    backfill = backfills.get(run.origin) or Backfill(run.limit)
    backfill = msgspec.structs.replace(backfill, **{field: getattr(backfill, field) + by})
    if backfill.running or backfill.waiting:
        backfills[run.origin] = backfill
    else:
        del backfills[run.origin]
    changes["backfills"] = backfills
