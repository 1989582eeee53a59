"""What a job may be, and every way in which it may not."""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler import (
    Coalesce,
    CronExpression,
    CronJob,
    CronOverflowPolicy,
    Exclusion,
    FiringPolicy,
    Interval,
    InvalidExpression,
    InvalidJob,
    Named,
    OnInterrupt,
    Overlap,
    Priority,
    RunPolicy,
)
from kapsl_scheduler.core.jobs import micros, moment

NOON = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
NAIVE = dt.datetime(2026, 3, 1, 12)  # noqa: DTZ001  # that is the point


def faults(job: CronJob, **allowed: bool) -> list[str]:
    with pytest.raises(InvalidJob) as caught:
        job.check(**allowed)
    assert caught.value.job == str(job.id)[:200]
    return list(caught.value.faults)


def firing(**policy: Any) -> CronJob:
    return CronJob("a", 60, 1.0, firing=FiringPolicy(**policy))


def running(**policy: Any) -> CronJob:
    return CronJob("a", 60, 1.0, run=RunPolicy(**policy))


# ----------------------------------------------------------------------------------------- plain values


@pytest.mark.parametrize(
    ("given", "schedule"),
    [
        ("0 * * * * *", CronExpression("0 * * * * *")),
        (60, Interval(60)),
        (0.5, Interval(0.5)),
        (dt.timedelta(minutes=1), Interval(60)),
        (Interval(60), Interval(60)),
        (CronExpression("@daily", "Europe/Berlin"), CronExpression("@daily", "Europe/Berlin")),
    ],
)
def test_plain_schedules_become_schedules(given: Any, schedule: Any) -> None:
    assert CronJob("a", given, 1.0).check().schedule == schedule


def test_cron_text_is_in_the_jobs_zone() -> None:
    assert CronJob("a", "@daily", 1.0, tz="Europe/Berlin").check().schedule == CronExpression("@daily", "Europe/Berlin")


@pytest.mark.parametrize("schedule", [Interval(60), 60])
def test_plain_words_become_members_whatever_else_is_ready(schedule: Any) -> None:
    job = CronJob(
        "a",
        schedule,
        1.0,
        priority="throughput",  # type: ignore[arg-type]
        overflow_policy="block",  # type: ignore[arg-type]
        firing=FiringPolicy(coalesce="earliest", overlap="BUFFER_ONE"),  # type: ignore[arg-type]
        run=RunPolicy(on_interrupt="resume"),  # type: ignore[arg-type]
    ).check()
    assert job.priority is Priority.THROUGHPUT
    assert job.overflow_policy is CronOverflowPolicy.BLOCK
    assert job.firing == FiringPolicy(coalesce=Coalesce.EARLIEST, overlap=Overlap.BUFFER_ONE)
    assert job.firing.overlap is Overlap.BUFFER_ONE
    assert job.run.on_interrupt is OnInterrupt.RESUME


def test_only_one_policy_is_replaced() -> None:
    policy = FiringPolicy(coalesce=Coalesce.EARLIEST)
    job = CronJob("a", Interval(60), 1.0, overflow_policy="block", firing=policy, run=RunPolicy(attempts=2)).check()  # type: ignore[arg-type]
    assert job.overflow_policy is CronOverflowPolicy.BLOCK
    assert job.firing is policy


def test_a_checked_job_stays_as_it_is() -> None:
    job = CronJob("a", "@daily", 1.0, run=RunPolicy(attempts=3), firing=FiringPolicy(spread=5)).check()
    again = job.check()
    assert msgspec.structs.astuple(again) == msgspec.structs.astuple(job)


# ------------------------------------------------------------------------------------------ the schedule


@pytest.mark.parametrize("schedule", ["0 9 * * 1-5", 0, True, None, dt.timedelta(0)])
def test_a_schedule_that_alone_is_wrong_says_so_itself(schedule: Any) -> None:
    with pytest.raises(InvalidExpression):
        CronJob("a", schedule, 1.0).check()


def test_an_unknown_zone_is_one_of_the_schedule() -> None:
    with pytest.raises(InvalidExpression) as caught:
        CronJob("a", "@daily", 1.0, tz="Europe/Berln").check()
    assert caught.value.field == "tz"


def test_everything_that_is_wrong_is_named() -> None:
    job = CronJob(
        " ",
        "0 9 * * 1-5",
        None,
        priority="urgent",  # type: ignore[arg-type]
        overflow_policy=3,  # type: ignore[arg-type]
        on_result=4,  # type: ignore[arg-type]
        condition="named",  # type: ignore[arg-type]
        sink=5,
        firing=FiringPolicy(coalesce="none", overlap="both", max_runs=0),  # type: ignore[arg-type]
        run=RunPolicy(timeout=0, on_interrupt="again"),  # type: ignore[arg-type]
    )
    found = [fault.split(":")[0] for fault in faults(job)]
    assert found == [
        *("schedule", "id", "priority", "overflow_policy", "request", "on_result", "condition", "sink"),
        *("coalesce", "overlap", "max_runs", "timeout", "on_interrupt"),
    ]


# ------------------------------------------------------------------------------------- fault by fault


@pytest.mark.parametrize("id", ["", "   ", "a\nb", "x" * 201, 7, None, "\ud800"])
def test_ids(id: Any) -> None:
    (fault,) = faults(CronJob(id, 60, 1.0))
    assert fault.startswith("id: expected 1 to 200 printable characters, got ")
    assert CronJob("x" * 200, 60, 1.0).check()


def test_latency_critical_jobs_need_leave() -> None:
    job = CronJob("a", 60, 1.0, priority=Priority.LATENCY_CRITICAL)
    assert faults(job) == [
        "priority: latency-critical jobs would delay live requests; "
        "CronScheduler(..., allow_latency_critical=True) allows them"
    ]
    assert job.check(allow_latency_critical=True).priority is Priority.LATENCY_CRITICAL


@pytest.mark.parametrize(
    ("job", "fault"),
    [
        (
            CronJob("a", 60, 1.0, priority="x"),
            "priority: expected one of latency_critical, throughput, background, got 'x'",
        ),  # type: ignore[arg-type]
        (CronJob("a", 60, 1.0, overflow_policy="x"), "overflow_policy: expected one of skip_if_busy, block, got 'x'"),  # type: ignore[arg-type]
        (CronJob("a", 60, None), "request: expected a request, a callable or a source, got None"),
        (CronJob("a", 60, 1.0, on_result=1), "on_result: expected a callable or the name of one, got 1"),  # type: ignore[arg-type]
        (CronJob("a", 60, 1.0, condition="x"), "condition: expected a callable or the name of one, got 'x'"),  # type: ignore[arg-type]
        (CronJob("a", 60, 1.0, sink=1), "sink: expected a sink, a callable or the name of one, got 1"),
        (firing(coalesce="x"), "coalesce: expected one of latest, earliest, all, skip, got 'x'"),
        (firing(overlap=1), "overlap: expected one of skip, buffer_one, buffer_all, cancel_other, allow, got 1"),
        (firing(misfire_grace=-1), "misfire_grace: expected at least 0 seconds and at most 100 years, got -1"),
        (
            firing(misfire_grace=float("nan")),
            "misfire_grace: expected at least 0 seconds and at most 100 years, got nan",
        ),
        (firing(misfire_grace=True), "misfire_grace: expected at least 0 seconds and at most 100 years, got True"),
        (
            firing(misfire_grace=10**12),
            "misfire_grace: expected at least 0 seconds and at most 100 years, got 1000000000000",
        ),
        (firing(spread="5"), "spread: expected at least 0 seconds and at most 100 years, got '5'"),
        (firing(max_runs=0), "max_runs: expected an integer of 1 or more, got 0"),
        (firing(max_runs=1.0), "max_runs: expected an integer of 1 or more, got 1.0"),
        (firing(max_running=2), "max_running: means something only with overlap=allow"),
        (firing(overlap=Overlap.ALLOW), "max_running: expected with overlap=allow"),
        (firing(max_buffered=2), "max_buffered: means something only with overlap=buffer_all"),
        (
            firing(coalesce=Coalesce.ALL),
            "coalesce: all would start overdue occurrences together, and overlap=skip lets but one of them run; "
            "choose overlap=buffer_all or allow",
        ),
        (
            firing(coalesce=Coalesce.SKIP, misfire_grace=5),
            "misfire_grace: means nothing with coalesce=skip, whose grace is one second",
        ),
        (firing(start=NAIVE), "start: expected a datetime with a time zone, got 2026-03-01T12:00:00"),
        (firing(end="2026"), "end: expected a datetime with a time zone, got '2026'"),
        (
            firing(start=NOON, end=NOON),
            "end: expected after start (2026-03-01T12:00:00+00:00), got 2026-03-01T12:00:00+00:00",
        ),
        (
            firing(exclude=(Exclusion(NOON, NOON),)),
            "exclude[0].end: expected after its start, got 2026-03-01T12:00:00+00:00",
        ),
        (
            firing(exclude=(Exclusion(NOON, NOON + dt.timedelta(1)), Exclusion(NAIVE, NOON))),
            "exclude[1].start: expected a datetime with a time zone, got 2026-03-01T12:00:00",
        ),
        (running(timeout=0), "timeout: expected more than 0 seconds and at most 100 years, got 0"),
        (running(timeout=float("inf")), "timeout: expected more than 0 seconds and at most 100 years, got inf"),
        (running(backoff=-0.1), "backoff: expected at least 0 seconds and at most 100 years, got -0.1"),
        (running(max_backoff=None), "max_backoff: expected at least 0 seconds and at most 100 years, got None"),
        (running(attempts=0), "attempts: expected an integer of 1 or more, got 0"),
        (running(attempts=None), "attempts: expected an integer of 1 or more, got None"),
        (running(pause_after=0), "pause_after: expected an integer of 1 or more, got 0"),
        (running(max_in_flight=True), "max_in_flight: expected an integer of 1 or more, got True"),
        (running(block_timeout=1), "block_timeout: means something only with overflow_policy=block"),
        (running(on_interrupt="x"), "on_interrupt: expected one of record, resume, got 'x'"),
    ],
)
def test_each_fault_says_what_was_expected_and_what_came(job: CronJob, fault: str) -> None:
    assert faults(job) == [fault]


@pytest.mark.parametrize("overlap", [Overlap.SKIP, Overlap.BUFFER_ONE, Overlap.CANCEL_OTHER])
def test_all_contradicts_an_overlap_that_lets_but_one_run(overlap: Overlap) -> None:
    assert len(faults(firing(coalesce=Coalesce.ALL, overlap=overlap))) == 1


@pytest.mark.parametrize(
    "job",
    [
        firing(coalesce=Coalesce.ALL, overlap=Overlap.BUFFER_ALL, max_buffered=5),
        firing(coalesce=Coalesce.ALL, overlap=Overlap.ALLOW, max_running=5),
        firing(start=NOON, end=NOON + dt.timedelta(1), exclude=(Exclusion(NOON, NOON + dt.timedelta(hours=1)),)),
        firing(misfire_grace=0, spread=3600),
        running(timeout=1, attempts=5, backoff=0, max_backoff=1, pause_after=3, max_in_flight=1),
        CronJob("a", 60, 1.0, overflow_policy=CronOverflowPolicy.BLOCK, run=RunPolicy(block_timeout=0)),
        CronJob("a", 60, Named("make"), on_result=Named("done"), condition=bool, sink=Named("sink")),
    ],
)
def test_what_goes_together(job: CronJob) -> None:
    assert job.check().firing == job.firing


# ---------------------------------------------------------------------------------------------- moments


@given(st.datetimes(timezones=st.timezones()))
def test_microseconds_are_exact(when: dt.datetime) -> None:
    us = micros(when)
    try:
        back = moment(us)
    except OverflowError:  # year 1 or 9999, in a zone that is ahead or behind
        return
    assert back == when.astimezone(dt.UTC)
    assert micros(back) == us


def test_a_naive_datetime_has_no_moment() -> None:
    with pytest.raises(ValueError, match="expected a datetime with a time zone, got 2026-03-01T12:00:00"):
        micros(NAIVE)
