"""Which occurrences become runs: against a model that counts them one by one, and each rule by an example."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler import Coalesce, CronExpression, CronJob, Exclusion, FiringPolicy, Interval, Overlap, RunState
from kapsl_scheduler.core.firing import Timetable, missed_since, place, plan, startable
from kapsl_scheduler.core.jobs import micros, moment
from kapsl_scheduler.core.runs import Backfill, JobState, Run, booked
from tests.core.naive_firing import Decided, NaiveJob

SECOND = 1_000_000
DAY = 86_400 * SECOND
START = micros(dt.datetime(2026, 3, 2, 8, 59, 30, tzinfo=dt.UTC))  # a Monday

replace = msgspec.structs.replace


def a_job(schedule: Any = 60, name: str = "job", **policy: Any) -> CronJob:
    return CronJob(name, schedule, 1.0, firing=FiringPolicy(**policy)).check()


def at(seconds: float) -> dt.datetime:
    return moment(START + round(seconds * SECOND))


@dataclass
class Life:
    """A job that is planned and whose runs end, with the books kept as the runtime keeps them."""

    job: CronJob
    now: int = START
    state: JobState = field(init=False)
    runs: dict[tuple[str, int, str], Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.timetable = Timetable.of(self.job, self.now)
        self.state = JobState(anchor=self.now, cursor=self.now)

    def plan(self, seconds: float = 0.0) -> list[tuple[float, str, str]]:
        """What is decided after so many seconds more: (seconds from the start, state, reason), ranges by their last."""
        self.now += round(seconds * SECOND)
        decided = plan(self.job, self.timetable, self.state, self.now, "me")
        self.next, self.due, self.cancels = decided.next, decided.due, decided.cancel_others
        self.state = decided.state
        for run in decided.runs:
            assert run.key not in self.runs, "decided twice"
            self.runs[run.key] = run
        assert self.state.balanced
        return [((run.nominal - START) / SECOND, run.state.value, run.reason) for run in decided.runs]

    def open(self, state: RunState) -> list[Run]:
        return [run for run in self.runs.values() if run.state is state]

    def turn(self, run: Run, state: RunState) -> None:
        """One of the runs goes on."""
        after = replace(run, state=state, started=run.started or self.now, ended=None if state.open else self.now)
        self.state = booked(self.state, run, after)
        self.runs[run.key] = after
        assert self.state.balanced


# -------------------------------------------------------------------------------------- against the model

schedules = st.one_of(
    st.integers(1, 600).map(Interval),
    st.integers(50, 5_000).map(lambda ms: Interval(ms / 1000)),
    st.sampled_from(
        [
            "*/7 * * * * *",
            "0 */5 * * * *",
            "30 10 */3 * * *",
            "0 0 9 * * MON-FRI",
            "0,1,59 0 0 1 * *",
            "0 0 0 1 1 * 2026",
        ]
    ).map(CronExpression),
)
moments = st.integers(-600, 7_200).map(at)


@st.composite
def policies(draw: st.DrawFn) -> FiringPolicy:
    coalesce = draw(st.sampled_from(Coalesce))
    overlap = draw(st.sampled_from(Overlap if coalesce is not Coalesce.ALL else [Overlap.BUFFER_ALL, Overlap.ALLOW]))
    gaps = draw(st.lists(st.tuples(moments, st.integers(1, 1_000)), max_size=3))
    start = draw(st.none() | moments)
    return FiringPolicy(
        misfire_grace=None if coalesce is Coalesce.SKIP else draw(st.none() | st.sampled_from([0.0, 0.5, 30.0, 900.0])),
        coalesce=coalesce,
        overlap=overlap,
        max_running=draw(st.integers(1, 3)) if overlap is Overlap.ALLOW else None,
        max_buffered=draw(st.none() | st.integers(1, 3)) if overlap is Overlap.BUFFER_ALL else None,
        spread=draw(st.sampled_from([0.0, 0.0, 0.3, 45.0, 4_000.0])),
        start=start,
        end=draw(st.none() | st.integers(1, 9_000).map(lambda s: (start or at(0)) + dt.timedelta(seconds=s))),
        max_runs=draw(st.none() | st.integers(1, 6)),
        exclude=tuple(Exclusion(begin, begin + dt.timedelta(seconds=s)) for begin, s in gaps),
    )


@dataclass(frozen=True)
class Step:
    """So much time goes by (in periods of the schedule or in seconds), so many runs end, and then it is planned."""

    seconds: float
    ends: int
    starts: int
    paused: bool


steps = st.lists(
    st.builds(
        Step,
        st.sampled_from([0.0, 0.001, 0.2, 1.0, 5.0, 59.0, 301.0, 301.0]) | st.floats(-400, 700),
        st.integers(0, 2),
        st.integers(0, 2),
        st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=12,
)


@given(schedules, policies(), st.text(max_size=3), steps)
def test_plan_decides_what_the_model_decides(
    schedule: Any, policy: FiringPolicy, name: str, script: list[Step]
) -> None:
    job = replace(CronJob("j" + name.encode("utf-8", "replace").decode(), schedule, 1.0), firing=policy)
    life = Life(job)
    naive = NaiveJob(job, life.timetable.schedule, life.timetable.delay, START)
    cursor = START
    for step in script:
        for run in life.open(RunState.RUNNING)[: step.ends]:
            life.turn(run, RunState.SUCCEEDED)
        for run in life.open(RunState.PENDING)[: step.starts]:
            life.turn(run, RunState.RUNNING)
        life.state = replace(life.state, paused="yes" if step.paused else "")
        naive.running, naive.waiting, naive.paused = life.state.running, life.state.waiting, step.paused

        decided = life.plan(step.seconds)
        expected = naive.decide(life.now)

        runs = list(life.runs.values())[len(life.runs) - len(decided) :]
        assert [Decided(r.first, r.nominal, r.count, r.state, r.reason) for r in runs] == expected
        assert all(r.due == naive.due(r.nominal) <= life.now for r in runs)
        assert all(r.owner == "me" and r.started == life.now for r in runs if r.state is RunState.RUNNING)
        assert life.cancels == naive.cancelled
        assert life.next == naive.next()
        assert life.due == (None if life.next is None else naive.due(life.next))
        assert life.due is None or life.due > life.now
        assert life.state.cursor == naive.cursor >= cursor
        assert life.state.scheduled == naive.scheduled
        cursor = life.state.cursor
    counts = {state: sum(r.count for r in life.runs.values() if r.state is state) for state in RunState}
    assert life.state.due == sum(counts.values())
    assert {state: getattr(life.state, state.field) for state in RunState} == counts
    assert life.state.fired == life.state.running + life.state.succeeded


@given(schedules, policies(), st.floats(0, 700), st.floats(0, 700))
def test_what_is_missed_for_another_reason_is_everything_due(
    schedule: Any, policy: FiringPolicy, first: float, then: float
) -> None:
    job = replace(CronJob("j", schedule, 1.0), firing=policy)
    life = Life(job)
    life.plan(first)
    naive = NaiveJob(job, life.timetable.schedule, life.timetable.delay, life.state.cursor)
    naive.scheduled = life.state.scheduled
    now = life.now + round(then * SECOND)
    due = [] if naive.room() == 0 else [n for n in _until(naive, now) if naive.due(n) <= now]
    state, runs = missed_since(job, life.timetable, life.state, now, "paused")
    assert [(r.first, r.nominal, r.count, r.state, r.reason) for r in runs] == (
        [(due[0], due[-1], len(due), RunState.MISSED, "paused")] if due else []
    )
    assert state.balanced
    assert state.missed == life.state.missed + len(due)
    assert state.cursor == (due[-1] if due else life.state.cursor)


def _until(naive: NaiveJob, now: int) -> list[int]:
    found = []
    for nominal in naive.occurrences(naive.cursor):
        if nominal > now:
            break
        found.append(nominal)
    return found


@given(schedules, policies(), st.integers(-3_000, 9_000), st.integers(0, 3_000))
def test_a_timetable_counts_and_steps_as_if_one_by_one(
    schedule: Any, policy: FiringPolicy, after: int, length: int
) -> None:
    job = replace(CronJob("j", schedule, 1.0), firing=policy)
    timetable = Timetable.of(job, START)
    naive = NaiveJob(job, timetable.schedule, timetable.delay, START + after * SECOND)
    until = naive.cursor + length * SECOND
    found = _until(naive, until)
    assert timetable.count(naive.cursor, until) == len(found)
    assert timetable.next(naive.cursor) == next(naive.occurrences(naive.cursor), None)
    if found:
        assert timetable.previous(until + 1) == found[-1]
        by_due = [n for n in found if naive.due(n) <= until]
        assert timetable.last_due(until) == by_due[-1] if by_due else True
    assert timetable.next(naive.cursor) == timetable.next(naive.cursor)  # asked again


# ------------------------------------------------------------------------------------------- rule by rule


def test_an_interval_fires_after_one_full_period_and_never_drifts() -> None:
    life = Life(a_job(60))
    assert life.plan(59.999) == []
    assert life.plan(0.001) == [(60, "running", "")]
    life.turn(life.open(RunState.RUNNING)[0], RunState.SUCCEEDED)
    assert life.plan(61.5) == [(120, "running", "")]  # found late
    assert life.due == START + 180 * SECOND


@pytest.mark.parametrize(
    ("coalesce", "decided"),
    [
        (Coalesce.LATEST, [(3540, "missed", "coalesced"), (3600, "running", "")]),
        (Coalesce.EARLIEST, [(60, "running", ""), (3600, "missed", "coalesced")]),
        (Coalesce.SKIP, [(3540, "missed", "late"), (3600, "running", "")]),  # the last is found in time
    ],
)
def test_a_stall_of_an_hour_makes_one_run(coalesce: Coalesce, decided: list[Any]) -> None:
    life = Life(a_job(60, coalesce=coalesce))
    assert life.plan(3600.5) == decided
    assert life.state.missed == 59
    assert life.state.due == 60


def test_skip_runs_nothing_that_is_found_after_more_than_a_second() -> None:
    life = Life(a_job(60, coalesce=Coalesce.SKIP))
    assert life.plan(3601.5) == [(3600, "missed", "late")]
    assert life.plan(59) == [(3660, "running", "")]


def test_all_runs_the_newest_hundred_within_grace() -> None:
    life = Life(a_job(60, coalesce=Coalesce.ALL, overlap=Overlap.ALLOW, max_running=1000))
    decided = life.plan(150 * 60)
    assert decided[0] == (50 * 60, "missed", "coalesced")
    assert [state for _, state, _ in decided[1:]] == ["running"] * 100
    life = Life(a_job(60, coalesce=Coalesce.ALL, overlap=Overlap.ALLOW, max_running=1000, misfire_grace=300))
    assert life.plan(600)[0] == (240, "missed", "late")
    assert life.state.running == 6


def test_grace_bounds_how_late_an_occurrence_may_be_found() -> None:
    life = Life(a_job(60, misfire_grace=10))
    assert life.plan(70.000001) == [(60, "missed", "late")]
    assert life.plan(59.999999) == [(120, "running", "")]


def test_earliest_is_the_earliest_within_grace() -> None:
    life = Life(a_job(60, coalesce=Coalesce.EARLIEST, misfire_grace=130))
    assert life.plan(600) == [(420, "missed", "late"), (480, "running", ""), (600, "missed", "coalesced")]


def test_a_clock_that_steps_back_repeats_nothing() -> None:
    life = Life(a_job(60))
    life.plan(60)
    assert life.plan(-3600) == []
    assert life.due == START + 120 * SECOND
    assert life.plan(3660) == [(120, "skipped", "overlap")]


def test_overlap_buffers_one_or_so_many() -> None:
    one = Life(a_job(60, overlap=Overlap.BUFFER_ONE))
    assert [one.plan(60)[0][1] for _ in range(4)] == ["running", "pending", "skipped", "skipped"]
    many = Life(a_job(60, overlap=Overlap.BUFFER_ALL, max_buffered=2))
    assert [many.plan(60)[0][1] for _ in range(4)] == ["running", "pending", "pending", "skipped"]
    unsaid = Life(a_job(60, overlap=Overlap.BUFFER_ALL))
    assert [unsaid.plan(60)[0][1] for _ in range(102)] == ["running", *["pending"] * 100, "skipped"]


def test_overlap_allows_so_many_or_cancels() -> None:
    allow = Life(a_job(60, overlap=Overlap.ALLOW, max_running=2))
    assert [allow.plan(60)[0][1] for _ in range(3)] == ["running", "running", "skipped"]
    cancel = Life(a_job(60, overlap=Overlap.CANCEL_OTHER))
    cancel.plan(60)
    assert not cancel.cancels
    assert cancel.plan(60) == [(120, "running", "")]
    assert cancel.cancels


def test_what_waits_goes_before_what_comes() -> None:
    life = Life(a_job(60, overlap=Overlap.BUFFER_ONE))
    life.plan(60)
    life.plan(60)
    life.turn(life.open(RunState.RUNNING)[0], RunState.SUCCEEDED)
    assert life.plan(60) == [(180, "skipped", "overlap")]


def test_the_last_run_ends_the_schedule() -> None:
    life = Life(a_job(60, max_runs=2))
    life.plan(60)
    life.turn(life.open(RunState.RUNNING)[0], RunState.FAILED)
    assert life.plan(60) == [(120, "running", "")]
    assert (life.next, life.due) == (None, None)
    assert life.plan(600) == []
    assert missed_since(life.job, life.timetable, life.state, life.now, "paused") == (life.state, ())


def test_a_skipped_occurrence_is_none_of_the_runs_of_the_cap() -> None:
    """And so it must not be the last that is looked at."""
    life = Life(a_job(60, max_runs=2))
    life.plan(60)
    assert life.plan(60) == [(120, "skipped", "overlap")]
    assert life.due == START + 180 * SECOND
    life.turn(life.open(RunState.RUNNING)[0], RunState.SUCCEEDED)
    assert life.plan(60) == [(180, "running", "")]
    assert life.due is None


def test_the_cap_ends_a_stall_with_its_last_run() -> None:
    life = Life(a_job(60, max_runs=2, coalesce=Coalesce.ALL, overlap=Overlap.ALLOW, max_running=9))
    assert life.plan(600) == [(60, "running", ""), (120, "running", "")]
    assert life.state.due == 2  # what would come after the last run is no occurrence
    assert life.state.cursor == START + 120 * SECOND


def test_start_end_and_exclusions() -> None:
    gaps = (Exclusion(at(180), at(240)), Exclusion(at(200), at(361)))
    life = Life(a_job(60, start=at(120), end=at(481), exclude=gaps))
    found = []
    for _ in range(20):
        found += life.plan(30)
        for run in life.open(RunState.RUNNING):
            life.turn(run, RunState.SUCCEEDED)
    assert [seconds for seconds, _, _ in found] == [120, 420, 480]
    assert life.due is None


def test_a_paused_job_has_nothing_due() -> None:
    life = Life(a_job(60))
    life.state = replace(life.state, paused="yes")
    assert life.plan(600) == []
    assert (life.next, life.due) == (None, None)


def test_jitter_is_each_jobs_own_and_stays_before_the_next_occurrence() -> None:
    delays = {name: Timetable.of(a_job(60, name, spread=30), START).delay for name in "abcdefgh"}
    assert delays == {name: Timetable.of(a_job(60, name, spread=30), 0).delay for name in "abcdefgh"}
    assert delays["a"] == 5_383_343  # in every process, for ever
    assert len(set(delays.values())) == 8
    assert all(0 <= delay < 30 * SECOND for delay in delays.values())
    timetable = Timetable.of(a_job(1, "a", spread=3600), START)
    assert timetable.delay > SECOND
    assert timetable.due(START + SECOND) == START + 2 * SECOND - 1
    life = Life(a_job(60, "a", spread=30))
    assert life.plan(60) == []
    assert life.due == START + 60 * SECOND + delays["a"]
    assert life.plan(30) == [(60, "running", "")]  # the nominal time is the identity


def test_a_job_may_be_asked_for_outside_its_schedule() -> None:
    life = Life(a_job(60, max_runs=5))
    decided = place(life.job, life.state, "trigger-1", START + 5, "me")
    (run,) = decided.runs
    assert (run.nominal, run.due, run.origin, run.state) == (START + 5, START + 5, "trigger-1", RunState.RUNNING)
    assert (decided.state.due, decided.state.fired, decided.state.scheduled) == (1, 1, 0)
    again = place(life.job, decided.state, "trigger-2", START + 6, "me")
    assert (again.runs[0].state, again.runs[0].reason) == (RunState.SKIPPED, "overlap")
    assert not again.cancel_others
    other = place(a_job(60, overlap=Overlap.CANCEL_OTHER), decided.state, "trigger-2", START + 6)
    assert other.cancel_others


def test_which_waiting_runs_may_start() -> None:
    state = JobState(anchor=0, cursor=0, waiting=2)
    assert startable(state) == [(None, 1)]
    assert startable(replace(state, running=1)) == []
    backfills = {"a": Backfill(2, running=1, waiting=5), "b": Backfill(2, running=2, waiting=5), "c": Backfill(9, 0, 3)}
    assert startable(replace(state, running=1, backfills=backfills)) == [("a", 1), ("c", 3)]


def test_an_interval_keeps_an_anchor_of_its_own() -> None:
    job = a_job(Interval(60, moment(START + 7 * SECOND)))
    assert Timetable.of(job, START).next(START) == START + 7 * SECOND
    assert Timetable.of(a_job(60), START).next(START) == START + 60 * SECOND


def test_a_schedule_that_ends() -> None:
    life = Life(a_job("0 0 9 2 3 * 2026"))
    assert life.plan(30) == [(30, "running", "")]
    assert life.due is None
    assert life.plan(DAY) == []
    empty = Life(a_job("0 0 9 2 3 * 2025"))
    assert empty.plan(DAY) == []
    assert missed_since(empty.job, empty.timetable, empty.state, empty.now, "paused") == (empty.state, ())
