"""A cron job as its owner describes it, and what may not be asked for.

Data and its checks only. What is due when lives in `core.firing`, what has become of a job's firings in `core.runs`,
the form in which a job is stored and sent in `core.definition`.
"""

from __future__ import annotations

import datetime as dt
import enum
import math
import reprlib
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from kapsl_scheduler.core.cron import CronExpression, Interval, Schedule, schedule_of
from kapsl_scheduler.errors import InvalidExpression, InvalidJob
from kapsl_scheduler.priority import Priority

__all__ = [
    "Coalesce",
    "CronJob",
    "CronOverflowPolicy",
    "Exclusion",
    "FiringPolicy",
    "Named",
    "OnInterrupt",
    "Overlap",
    "RunPolicy",
    "micros",
    "moment",
]

MAX_ID: Final = 200
"""Characters of a job's id."""
MAX_SECONDS: Final = 36_525 * 86_400.0
"""The longest time that a policy may name: 100 years."""
MAX_ALL: Final = 100
"""The most overdue occurrences that `Coalesce.ALL` runs after a stall."""

_UTC: Final = dt.UTC
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=_UTC)
_MICROSECOND: Final = dt.timedelta(microseconds=1)


def micros(when: dt.datetime) -> int:
    """Microseconds since 1970 UTC of an aware datetime: exact, unlike `timestamp()`. Raises `ValueError` for a naive
    one."""
    if when.tzinfo is None:
        raise ValueError(f"expected a datetime with a time zone, got {when.isoformat()}")
    return (when - _EPOCH) // _MICROSECOND


def moment(us: int) -> dt.datetime:
    """The datetime in UTC of microseconds since 1970."""
    return _EPOCH + dt.timedelta(microseconds=us)


class CronOverflowPolicy(enum.Enum):
    """What a firing does when the scheduler is full: give up (recorded as skipped), or wait for room."""

    SKIP_IF_BUSY = "skip_if_busy"
    BLOCK = "block"


class Coalesce(enum.Enum):
    """What becomes of several overdue occurrences: the latest runs, the earliest, all of them (the newest 100), or
    none (`SKIP`: only an occurrence found within a second of its time runs). The rest is recorded as missed."""

    LATEST = "latest"
    EARLIEST = "earliest"
    ALL = "all"
    SKIP = "skip"


class Overlap(enum.Enum):
    """What becomes of a firing while an earlier one still runs: skipped, kept until that one has ended (one, or up to
    `max_buffered`), run in its place, or run beside it (up to `max_running`)."""

    SKIP = "skip"
    BUFFER_ONE = "buffer_one"
    BUFFER_ALL = "buffer_all"
    CANCEL_OTHER = "cancel_other"
    ALLOW = "allow"


class OnInterrupt(enum.Enum):
    """What becomes of a run that a crash cut short: it is recorded as interrupted, or goes on as its next attempt."""

    RECORD = "record"
    RESUME = "resume"


class Exclusion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Moments from `start` up to but not including `end`, in which a job has no occurrences."""

    start: dt.datetime
    end: dt.datetime


class Named(msgspec.Struct, frozen=True):
    """A callable by the name under which it is (or will be) bound: what a stored job has in place of the callable."""

    name: str


class FiringPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Which occurrences of the schedule become runs.

    `misfire_grace` (seconds, None: no limit) is how late an occurrence may be found and still run; `coalesce` what
    becomes of several. `overlap` rules while an earlier firing runs, with `max_running` for `ALLOW` and `max_buffered`
    for `BUFFER_ALL`. `spread` (seconds) delays each job by its own fixed part of it, so that jobs of one schedule do
    not start together. No occurrence before `start`, at or after `end`, or in one of `exclude`; none after `max_runs`
    firings.
    """

    misfire_grace: float | None = None
    coalesce: Coalesce = Coalesce.LATEST
    overlap: Overlap = Overlap.SKIP
    max_running: int | None = None
    max_buffered: int | None = None
    spread: float = 0.0
    start: dt.datetime | None = None
    end: dt.datetime | None = None
    max_runs: int | None = None
    exclude: tuple[Exclusion, ...] = ()


class RunPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How one run goes.

    `timeout` (seconds) bounds the run with all its attempts. `block_timeout` (seconds, None: 60) bounds the wait for
    room under `CronOverflowPolicy.BLOCK`. `attempts` counts the first one in; before the nth repetition it waits
    `backoff` x 2^(n-1) seconds, at most `max_backoff`; only errors that may pass are tried again. After `pause_after`
    failures in a row the job is paused. `max_in_flight` bounds the requests of one run that are out at a time.
    """

    timeout: float | None = None
    block_timeout: float | None = None
    attempts: int = 1
    backoff: float = 1.0
    max_backoff: float = 300.0
    pause_after: int | None = None
    on_interrupt: OnInterrupt = OnInterrupt.RECORD
    max_in_flight: int = 64


_DEFAULT_FIRING: Final = FiringPolicy()
_DEFAULT_RUN: Final = RunPolicy()


class CronJob(msgspec.Struct, frozen=True, eq=False):
    """A periodic inference.

    `schedule`: cron text, seconds, a timedelta, a `CronExpression` or an `Interval`; `tz` is the zone of cron text.
    `request`: what `infer` takes (its arrays are copied once, when the job is registered); a callable that is given the
    `Firing` and returns one request, a list of them, an iterator of them, or None for nothing to do; or a source. A run
    that is resumed passes over as many of a callable's first requests as were certain before: it is to make the same
    ones again. Plain functions are called in a thread, coroutine functions on the loop. A `Named` stands for a callable
    that is bound under that name.

    `on_result(id, result)` is called after each firing that was not skipped, with the answer (a list of answers where
    there were several requests; None where there was nothing to do or a sink took the answers) or with the error.
    `condition(firing)` is asked first: the firing is skipped unless it says yes. `sink` takes the answers: an adapter,
    or a callable that is given lists of `SinkItem`. `model` names the model where the target has several. A job that is
    not `enabled` is registered paused.

    Nothing is checked before `check` is called, which registering does.
    """

    id: str
    schedule: Schedule | str | float | dt.timedelta
    request: Any
    # What follows is by keyword: positions are no contract.
    priority: Priority = Priority.BACKGROUND
    overflow_policy: CronOverflowPolicy = CronOverflowPolicy.SKIP_IF_BUSY
    on_result: Callable[..., Any] | Named | None = None
    condition: Callable[..., Any] | Named | None = None
    sink: Any = None
    force_cpu: bool = False
    model: str | None = None
    package: str | None = None
    tz: str | dt.tzinfo = "UTC"
    firing: FiringPolicy = _DEFAULT_FIRING
    run: RunPolicy = _DEFAULT_RUN
    enabled: bool = True

    def check(self, *, allow_latency_critical: bool = False) -> CronJob:
        """The job with its plain values made into what they stand for (a `Schedule`, a `Priority`, ...).

        Raises `InvalidExpression` if the schedule alone is wrong, else `InvalidJob` with everything that is.
        """
        faults: list[str] = []
        wrong: InvalidExpression | None = None
        schedule = self.schedule
        if not isinstance(schedule, CronExpression | Interval):
            try:
                schedule = schedule_of(schedule, self.tz)
            except InvalidExpression as error:
                wrong = error
                faults.append(f"schedule: {error}")
        if not isinstance(self.id, str) or not self.id.strip() or len(self.id) > MAX_ID or not self.id.isprintable():
            faults.append(f"id: expected 1 to {MAX_ID} printable characters, got {reprlib.repr(self.id)}")
        priority = _member(Priority, self.priority, "priority", faults)
        if priority is Priority.LATENCY_CRITICAL and not allow_latency_critical:
            faults.append(
                "priority: latency-critical jobs would delay live requests; "
                "CronScheduler(..., allow_latency_critical=True) allows them"
            )
        overflow = _member(CronOverflowPolicy, self.overflow_policy, "overflow_policy", faults)
        if self.request is None:
            faults.append("request: expected a request, a callable or a source, got None")
        _check_callables(self, faults)
        firing = self.firing if self.firing is _DEFAULT_FIRING else _check_firing(self.firing, faults)
        run = self.run if self.run is _DEFAULT_RUN else _check_run(self.run, overflow, faults)
        if wrong is not None and len(faults) == 1:
            raise wrong
        if faults:
            raise InvalidJob(faults, str(self.id)[:MAX_ID])
        return msgspec.structs.replace(
            self, schedule=schedule, priority=priority, overflow_policy=overflow, firing=firing, run=run
        )


# ------------------------------------------------------------------------------------------------ checks

_Member = TypeVar("_Member", bound=enum.Enum)


def _member(kind: type[_Member], value: Any, name: str, faults: list[str]) -> _Member | None:
    """The member that `value` is, or names in any case."""
    if isinstance(value, kind):
        return value
    for member in kind:
        if value == member.value or (isinstance(value, str) and value.lower() == member.name.lower()):
            return member
    faults.append(f"{name}: expected one of {', '.join(m.name.lower() for m in kind)}, got {reprlib.repr(value)}")
    return None


def _number(policy: Any, name: str, faults: list[str], *, above: bool = False) -> None:
    value = getattr(policy, name)
    if value is None and name in _OPTIONAL:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (0 < value <= MAX_SECONDS or (value == 0 and not above)):
        least = "more than" if above else "at least"
        faults.append(f"{name}: expected {least} 0 seconds and at most 100 years, got {reprlib.repr(value)}")


def _count(policy: Any, name: str, faults: list[str]) -> None:
    value = getattr(policy, name)
    if value is None and name in _OPTIONAL:
        return
    if type(value) is not int or value < 1:
        faults.append(f"{name}: expected an integer of 1 or more, got {reprlib.repr(value)}")


_OPTIONAL: Final = (
    "misfire_grace",
    "max_running",
    "max_buffered",
    "max_runs",
    "timeout",
    "block_timeout",
    "pause_after",
)


def _aware(name: str, value: Any, faults: list[str]) -> dt.datetime | None:
    if value is None or (isinstance(value, dt.datetime) and value.tzinfo is not None):
        return value
    came = value.isoformat() if isinstance(value, dt.datetime) else reprlib.repr(value)
    faults.append(f"{name}: expected a datetime with a time zone, got {came}")
    return None


def _check_callables(job: CronJob, faults: list[str]) -> None:
    for name in ("on_result", "condition"):
        value = getattr(job, name)
        if value is not None and not callable(value) and not isinstance(value, Named):
            faults.append(f"{name}: expected a callable or the name of one, got {reprlib.repr(value)}")
    sink = job.sink
    if sink is not None and not callable(sink) and not isinstance(sink, Named) and not hasattr(sink, "open"):
        faults.append(f"sink: expected a sink, a callable or the name of one, got {reprlib.repr(sink)}")


def _check_firing(policy: FiringPolicy, faults: list[str]) -> FiringPolicy:
    coalesce = _member(Coalesce, policy.coalesce, "coalesce", faults)
    overlap = _member(Overlap, policy.overlap, "overlap", faults)
    _number(policy, "misfire_grace", faults)
    _number(policy, "spread", faults)
    for name in ("max_running", "max_buffered", "max_runs"):
        _count(policy, name, faults)
    if policy.max_running is not None and overlap is not Overlap.ALLOW:
        faults.append("max_running: means something only with overlap=allow")
    if overlap is Overlap.ALLOW and policy.max_running is None:
        faults.append("max_running: expected with overlap=allow")
    if policy.misfire_grace is not None and coalesce is Coalesce.SKIP:
        faults.append("misfire_grace: means nothing with coalesce=skip, whose grace is one second")
    if policy.max_buffered is not None and overlap is not Overlap.BUFFER_ALL:
        faults.append("max_buffered: means something only with overlap=buffer_all")
    if coalesce is Coalesce.ALL and overlap in (Overlap.SKIP, Overlap.BUFFER_ONE, Overlap.CANCEL_OTHER):
        faults.append(
            f"coalesce: all would start overdue occurrences together, and overlap={overlap.value} lets but one of them "
            "run; choose overlap=buffer_all or allow"
        )
    start, end = _aware("start", policy.start, faults), _aware("end", policy.end, faults)
    if start is not None and end is not None and start >= end:
        faults.append(f"end: expected after start ({start.isoformat()}), got {end.isoformat()}")
    for number, exclusion in enumerate(policy.exclude):
        name = f"exclude[{number}]"
        first, last = _aware(f"{name}.start", exclusion.start, faults), _aware(f"{name}.end", exclusion.end, faults)
        if first is not None and last is not None and first >= last:
            faults.append(f"{name}.end: expected after its start, got {last.isoformat()}")
    if coalesce is None or overlap is None or (coalesce is policy.coalesce and overlap is policy.overlap):
        return policy
    return msgspec.structs.replace(policy, coalesce=coalesce, overlap=overlap)


def _check_run(policy: RunPolicy, overflow: CronOverflowPolicy | None, faults: list[str]) -> RunPolicy:
    _number(policy, "timeout", faults, above=True)
    _number(policy, "block_timeout", faults)
    _number(policy, "backoff", faults)
    _number(policy, "max_backoff", faults)
    for name in ("attempts", "pause_after", "max_in_flight"):
        _count(policy, name, faults)
    if policy.block_timeout is not None and overflow is CronOverflowPolicy.SKIP_IF_BUSY:
        faults.append("block_timeout: means something only with overflow_policy=block")
    on_interrupt = _member(OnInterrupt, policy.on_interrupt, "on_interrupt", faults)
    if on_interrupt is None or on_interrupt is policy.on_interrupt:
        return policy
    return msgspec.structs.replace(policy, on_interrupt=on_interrupt)
