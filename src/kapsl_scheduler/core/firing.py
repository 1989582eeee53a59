"""What is due: which occurrences of a job become runs at a moment, which are missed or skipped, and when to look again.

Pure: `plan(job, state, now)` says what to record, with the new books. Misfire grace and coalesce are APScheduler's
words, overlap and its policies Temporal's. What is not here: the schedule's own arithmetic (`core.cron`), storing and
dispatching what was decided (`runtime.cron_scheduler`). All times are integer microseconds since 1970 UTC.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

import msgspec

from kapsl_scheduler.core.cron import CronExpression, Interval
from kapsl_scheduler.core.jobs import MAX_ALL, Coalesce, CronJob, Exclusion, FiringPolicy, Overlap, micros
from kapsl_scheduler.core.runs import SCHEDULE, JobState, Run, RunState, booked

__all__ = ["Plan", "Timetable", "missed_since", "place", "plan", "startable"]

SECOND: Final = 1_000_000
MAX_BUFFERED: Final = 100
"""Firings that `Overlap.BUFFER_ALL` keeps unless the job says otherwise."""


class Timetable:
    """The occurrences of a job: its schedule within start and end, without the exclusions, and the job's delay."""

    __slots__ = ("_asked", "_exclude", "_found", "_high", "_low", "delay", "schedule")

    def __init__(self, job: str, schedule: CronExpression | Interval, policy: FiringPolicy) -> None:
        self.schedule = schedule
        self._low = None if policy.start is None else micros(policy.start)
        self._high = None if policy.end is None else micros(policy.end)
        self._exclude = _merged(policy.exclude) if policy.exclude else ()
        self.delay = _delay(job, policy.spread) if policy.spread else 0
        self._asked: int | None = None  # what `next` was asked last, and what it found: planning asks it again
        self._found: int | None = None

    @classmethod
    def of(cls, job: CronJob, anchor: int) -> Timetable:
        """A checked job's; an interval without an anchor of its own gets this one."""
        schedule = job.schedule
        if isinstance(schedule, Interval):
            schedule = schedule.anchored(anchor)
        assert isinstance(schedule, CronExpression | Interval)
        return cls(job.id, schedule, job.firing)

    def next(self, after: int) -> int | None:
        """The first occurrence strictly after a moment."""
        if after == self._asked:
            return self._found
        nominal = self.schedule.next_us(after if self._low is None else max(after, self._low - 1))
        for start, end in self._exclude:
            if nominal is not None and start <= nominal < end:
                nominal = self.schedule.next_us(end - 1)
        if nominal is not None and self._high is not None and nominal >= self._high:
            nominal = None
        self._asked, self._found = after, nominal
        return nominal

    def previous(self, before: int) -> int | None:
        """The last occurrence strictly before a moment."""
        if self._high is not None:
            before = min(before, self._high)
        nominal = self.schedule.previous_us(before)
        for start, end in reversed(self._exclude):
            if nominal is not None and start <= nominal < end:
                nominal = self.schedule.previous_us(start)
        return None if nominal is None or (self._low is not None and nominal < self._low) else nominal

    def count(self, after: int, until: int) -> int:
        """How many occurrences there are after a moment, up to and including another."""
        if self._low is not None:
            after = max(after, self._low - 1)
        if self._high is not None:
            until = min(until, self._high - 1)
        if until <= after:
            return 0
        number = self.schedule.count_us(after, until)
        for start, end in self._exclude:
            low, high = max(after, start - 1), min(until, end - 1)
            if low < high:
                number -= self.schedule.count_us(low, high)
        return number

    def due(self, nominal: int) -> int:
        """When an occurrence is to start: its time plus the job's delay, but before the next occurrence."""
        if not self.delay:
            return nominal
        following = self.next(nominal)
        return nominal + (self.delay if following is None else min(self.delay, following - nominal - 1))

    def last_due(self, now: int) -> int | None:
        """The last occurrence whose start was due by `now`."""
        nominal = self.previous(now + 1)
        if nominal is not None and self.delay and self.due(nominal) > now:
            nominal = self.previous(nominal)
        return nominal


def _delay(job: str, spread: float) -> int:
    """A job's own part of the spread: the same in every process and after every restart."""
    digest = hashlib.blake2b(job.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % max(1, round(spread * SECOND))


def _merged(exclusions: tuple[Exclusion, ...]) -> tuple[tuple[int, int], ...]:
    """In order, and apart: so one pass over them is enough."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted((micros(exclusion.start), micros(exclusion.end)) for exclusion in exclusions):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return tuple(merged)


class Plan(msgspec.Struct, gc=False, frozen=True):
    """What is to be recorded: the new books, and new runs, those that are `RUNNING` to be dispatched.

    `cancel_others`: what of the job runs or waits now is to be cancelled first (and booked by whoever does it). `next`
    is the next occurrence and `due` when to look again, None where there is nothing more to come.
    """

    state: JobState
    runs: tuple[Run, ...] = ()
    cancel_others: bool = False
    next: int | None = None
    due: int | None = None


def plan(job: CronJob, timetable: Timetable, state: JobState, now: int, owner: str = "") -> Plan:
    """Decide every occurrence that is due by `now` and has not been decided.

    After a stall at most one run is added to those on time, unless the job coalesces to all of them. A clock that
    stepped back repeats nothing: what was decided stays decided. Runs carry `owner`.
    """
    policy = job.firing
    room = None if policy.max_runs is None else policy.max_runs - state.scheduled
    if state.paused or (room is not None and room <= 0):
        return Plan(state)
    following = timetable.next(state.cursor)
    if following is None:
        return Plan(state)
    if (due := timetable.due(following)) > now:
        return Plan(state, next=following, due=due)
    last, following = following, timetable.next(following)
    following_due = None if following is None else timetable.due(following)
    several = following_due is not None and following_due <= now
    if several:
        last = timetable.last_due(now) or last
        following = timetable.next(last)
        following_due = None if following is None else timetable.due(following)
    chosen = _chosen(timetable, policy, state.cursor, last, several, now)
    cancels = policy.overlap is Overlap.CANCEL_OTHER and state.running + state.waiting > 0 and len(chosen) > 0
    if chosen and not several:  # as nearly always
        met = _meet(policy, state.running, state.waiting)
        run = _run(job.id, last, SCHEDULE, met, due, now, owner)
        if room == 1 and met.open:
            following = following_due = None  # what would come after the last run is no occurrence
        return Plan(booked(state, None, run, cursor=last), (run,), cancels, following, following_due)
    runs: list[Run] = []
    done = state.cursor
    for nominal in chosen:
        for run in _missed(job.id, timetable, policy, done, nominal - 1, now):
            runs.append(run)
            state = booked(state, None, run)
        met = _meet(policy, state.running, state.waiting)
        run = _run(job.id, nominal, SCHEDULE, met, timetable.due(nominal), now, owner)
        runs.append(run)
        state = booked(state, None, run)
        done = nominal
        if state.scheduled == policy.max_runs:
            last, following, following_due = nominal, None, None  # as above
            break
    for run in _missed(job.id, timetable, policy, done, last, now):
        runs.append(run)
        state = booked(state, None, run)
    state = msgspec.structs.replace(state, cursor=last)
    return Plan(state, tuple(runs), cancels, following, following_due)


def missed_since(
    job: CronJob, timetable: Timetable, state: JobState, now: int, reason: str
) -> tuple[JobState, tuple[Run, ...]]:
    """Record every occurrence that is due by `now` and undecided as missed for one reason. Returns the new books."""
    last = timetable.last_due(now)
    spent = job.firing.max_runs is not None and state.scheduled >= job.firing.max_runs
    if last is None or last <= state.cursor or spent:
        return state, ()
    run = _range(job.id, timetable, state.cursor, last, now, reason)
    return booked(state, None, run, cursor=last), (run,)


def _chosen(timetable: Timetable, policy: FiringPolicy, cursor: int, last: int, several: bool, now: int) -> list[int]:
    """The occurrences after `cursor` up to `last` that may run, in order."""
    if not several and policy.misfire_grace is None and policy.coalesce is not Coalesce.SKIP:
        return [last]
    earliest = now - (SECOND if policy.coalesce is Coalesce.SKIP else _grace(policy, now))
    if timetable.due(last) < earliest:
        return []
    if not several or policy.coalesce in (Coalesce.LATEST, Coalesce.SKIP):
        return [last]
    if policy.coalesce is Coalesce.ALL:
        chosen: list[int] = []
        nominal: int | None = last
        while nominal is not None and nominal > cursor and len(chosen) < MAX_ALL and timetable.due(nominal) >= earliest:
            chosen.append(nominal)
            nominal = timetable.previous(nominal)
        return chosen[::-1]
    late = timetable.last_due(earliest - 1)
    first = timetable.next(cursor if late is None else max(cursor, late))
    return [] if first is None else [first]


def _grace(policy: FiringPolicy, now: int) -> int:
    return now if policy.misfire_grace is None else round(policy.misfire_grace * SECOND)


def _missed(job: str, timetable: Timetable, policy: FiringPolicy, after: int, until: int, now: int) -> Iterator[Run]:
    """The records of those that do not run: too late, or in favour of another."""
    late = None if policy.misfire_grace is None else timetable.last_due(now - _grace(policy, now) - 1)
    if late is not None and late > after:
        yield _range(job, timetable, after, late, now, "late")  # what is chosen comes after all of these
        after = late
    if timetable.count(after, until):
        alone = policy.coalesce is Coalesce.SKIP
        yield _range(job, timetable, after, until, now, "late" if alone else "coalesced")


def _range(job: str, timetable: Timetable, after: int, until: int, now: int, reason: str) -> Run:
    """One record of all occurrences after a moment up to another, of which there is at least one."""
    first, last = timetable.next(after), timetable.previous(until + 1)
    assert first is not None
    assert last is not None
    return Run(
        job=job,
        nominal=last,
        state=RunState.MISSED,
        first=first,
        due=timetable.due(last),
        count=timetable.count(after, until),
        reason=reason,
        ended=now,
    )


def _meet(policy: FiringPolicy, running: int, waiting: int) -> RunState:
    """What becomes of a new run by the overlap policy, with so many of its job running and waiting."""
    if not running and not waiting:  # as nearly always
        return RunState.RUNNING
    overlap = policy.overlap
    if overlap is Overlap.CANCEL_OTHER:
        return RunState.RUNNING
    if overlap is Overlap.ALLOW and not waiting and running < (policy.max_running or 1):
        return RunState.RUNNING
    if overlap is Overlap.BUFFER_ONE:
        return RunState.SKIPPED if waiting else RunState.PENDING
    if overlap is Overlap.BUFFER_ALL:
        return RunState.PENDING if waiting < (policy.max_buffered or MAX_BUFFERED) else RunState.SKIPPED
    return RunState.SKIPPED


def _run(job: str, nominal: int, origin: str, state: RunState, due: int, now: int, owner: str) -> Run:
    """The record of a run that has just come to be."""
    if state is RunState.RUNNING:
        return Run(
            job=job, nominal=nominal, origin=origin, state=state, first=nominal, due=due, started=now, owner=owner
        )
    if state is RunState.PENDING:
        return Run(job=job, nominal=nominal, origin=origin, state=state, first=nominal, due=due)
    return Run(
        job=job, nominal=nominal, origin=origin, state=state, first=nominal, due=due, reason="overlap", ended=now
    )


def place(job: CronJob, state: JobState, origin: str, now: int, owner: str = "") -> Plan:
    """A run that somebody asked for now, outside the schedule, under the job's overlap policy."""
    run = _run(job.id, now, origin, _meet(job.firing, state.running, state.waiting), now, now, owner)
    cancels = job.firing.overlap is Overlap.CANCEL_OTHER and state.running + state.waiting > 0
    return Plan(booked(state, None, run), (run,), cancels)


def startable(state: JobState) -> list[tuple[str | None, int]]:
    """How many waiting runs may start: of each backfill by its origin, and under None of those outside backfills,
    which wait until nothing of their job runs."""
    found: list[tuple[str | None, int]] = [(None, 1)] if state.waiting and not state.running else []
    for origin, backfill in state.backfills.items():
        if (room := min(backfill.waiting, backfill.limit - backfill.running)) > 0:
            found.append((origin, room))
    return found
