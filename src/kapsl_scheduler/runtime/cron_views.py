"""What a CronScheduler shows of its jobs and runs: times as datetimes in UTC, durations in seconds.

Values only. The records behind them are `core.runs`.
"""

from __future__ import annotations

import datetime as dt

import msgspec

from kapsl_scheduler.core.jobs import CronJob, CronOverflowPolicy, moment
from kapsl_scheduler.core.runs import JobState, Run, RunState
from kapsl_scheduler.types import Priority

__all__ = ["CronEvent", "CronJobInfo", "CronRun", "job_info", "run_view"]


class CronRun(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run. `nominal` is its time on the schedule, `due` when it was to start, `started` when it did: None too for
    one that is running by the books, and waits for one of the places of `max_concurrent_runs`.

    One record stands for `count` occurrences from `first` on where none of them ran. `reason` is a word for why it
    ended as it did, `error` the text of what went wrong. `requests`, `rows`, `input_bytes` and `output_bytes` are what
    it has done (so far, if it still runs), `progress` how much of it lies behind while it runs, from 0 to 1, where that
    is known. `number` identifies it in listings.
    """

    number: int
    job: str
    nominal: dt.datetime
    origin: str
    state: RunState
    due: dt.datetime
    first: dt.datetime
    count: int = 1
    attempt: int = 1
    started: dt.datetime | None = None
    ended: dt.datetime | None = None
    duration: float | None = None
    reason: str = ""
    error: str = ""
    callback_error: str = ""
    requests: int = 0
    failed_requests: int = 0
    rows: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    progress: float | None = None


class CronJobInfo(msgspec.Struct, frozen=True):
    """What is known of a job.

    `fired_count` counts firings when they are dispatched, `missed_count` the due ones that did not run: those in
    `missed` and in `skipped`. `due` is everything that was ever due; it is the sum of the outcomes and `pending`.
    `enabled` is False while the job is paused (`paused` says why). `waiting_for` says why it cannot fire in this
    process, None if it can.
    """

    id: str
    schedule: str
    description: str
    tz: str
    priority: Priority
    force_cpu: bool
    overflow_policy: CronOverflowPolicy
    enabled: bool
    fired_count: int
    missed_count: int
    model: str | None
    package: str | None
    next_firing: dt.datetime | None
    last_firing: dt.datetime | None
    last_outcome: RunState | None
    last_reason: str
    last_duration: float | None
    running: int
    paused: str
    waiting_for: str | None
    failures_in_a_row: int
    due: int
    succeeded: int
    failed: int
    skipped: int
    missed: int
    cancelled: int
    interrupted: int
    pending: int


class CronEvent(msgspec.Struct, frozen=True):
    """Something that happened: a job was `registered`, `updated`, `paused`, `resumed` or `unregistered`, a run
    `started` or `ended`. `lost` counts the events that were dropped before this one because nobody read them."""

    kind: str
    job: str
    at: dt.datetime
    run: CronRun | None = None
    lost: int = 0


def run_view(run: Run, progress: float | None = None) -> CronRun:
    """A run as it is shown."""
    timed = run.started is not None and run.ended is not None
    return CronRun(
        number=run.number,
        job=run.job,
        nominal=moment(run.nominal),
        origin=run.origin,
        state=run.state,
        due=moment(run.due),
        first=moment(run.first),
        count=run.count,
        attempt=run.attempt,
        started=_moment(run.started),
        ended=_moment(run.ended),
        duration=seconds(run.started, run.ended) if timed else None,
        reason=run.reason,
        error=run.error,
        callback_error=run.callback_error,
        requests=run.requests,
        failed_requests=run.failed_requests,
        rows=run.rows,
        input_bytes=run.input_bytes,
        output_bytes=run.output_bytes,
        progress=progress,
    )


def job_info(
    id: str, job: CronJob | None, state: JobState, *, next_firing: int | None, unbound: str | None
) -> CronJobInfo:
    """A job as it is shown; `job` is None where its definition cannot be read here."""
    schedule = None if job is None else job.schedule
    last = state.last
    return CronJobInfo(
        id=id,
        schedule=getattr(schedule, "text", "") or (schedule.explain() if schedule is not None else ""),  # type: ignore[union-attr]
        description=schedule.explain() if schedule is not None else "",  # type: ignore[union-attr]
        tz=getattr(schedule, "tz_name", "UTC"),
        priority=Priority.BACKGROUND if job is None else job.priority,
        force_cpu=job is not None and job.force_cpu,
        overflow_policy=CronOverflowPolicy.SKIP_IF_BUSY if job is None else job.overflow_policy,
        enabled=not state.paused,
        fired_count=state.fired,
        missed_count=state.missed + state.skipped,
        model=None if job is None else job.model,
        package=None if job is None else job.package,
        next_firing=_moment(next_firing),
        last_firing=None if last is None else moment(last.nominal),
        last_outcome=None if last is None else last.outcome,
        last_reason="" if last is None else last.reason,
        last_duration=None if last is None or last.started is None else seconds(last.started, last.ended),
        running=state.running + sum(backfill.running for backfill in state.backfills.values()),
        paused=state.paused,
        waiting_for=unbound,
        failures_in_a_row=state.failures,
        due=state.due,
        succeeded=state.succeeded,
        failed=state.failed,
        skipped=state.skipped,
        missed=state.missed,
        cancelled=state.cancelled,
        interrupted=state.interrupted,
        pending=state.pending,
    )


def seconds(start: int | None, end: int | None) -> float:
    """Between two moments; a clock that stepped back counts as none."""
    return 0.0 if start is None or end is None else max(0, end - start) / 1e6


def _moment(us: int | None) -> dt.datetime | None:
    return None if us is None else moment(us)
