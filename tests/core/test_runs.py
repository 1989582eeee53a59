"""The books of a job: whatever becomes of its runs, each is counted once."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler import RunState
from kapsl_scheduler.core.runs import SCHEDULE, Backfill, JobState, LastRun, Run, booked

EMPTY = JobState(anchor=0, cursor=0)
ENDS = [state for state in RunState if not state.open]

replace = msgspec.structs.replace


def a_run(state: RunState, nominal: int = 1, **fields: Any) -> Run:
    return Run(job="j", nominal=nominal, first=nominal, due=nominal, state=state, **fields)


def test_which_runs_are_open() -> None:
    assert {state for state in RunState if state.open} == {RunState.PENDING, RunState.RUNNING}
    assert a_run(RunState.RUNNING, 7, origin="x").key == ("j", 7, "x")


@pytest.mark.parametrize("state", ENDS)
def test_an_end_is_counted_and_remembered(state: RunState) -> None:
    run = a_run(RunState.RUNNING, started=5)
    books = booked(EMPTY, None, run)
    assert (books.due, books.running, books.fired, books.scheduled, books.last) == (1, 1, 1, 1, None)
    books = booked(books, run, replace(run, state=state, ended=9, reason="why"))
    assert (books.due, books.running, getattr(books, state.value)) == (1, 0, 1)
    assert books.last == LastRun(1, state, 9, 5, "why")
    assert books.balanced


def test_a_range_of_missed_occurrences_counts_as_many_times() -> None:
    books = booked(EMPTY, None, a_run(RunState.MISSED, 60, count=60, ended=61), cursor=60)
    assert (books.due, books.missed, books.cursor, books.fired, books.scheduled) == (60, 60, 60, 0, 0)
    assert books.balanced


def test_failures_in_a_row() -> None:
    books = EMPTY
    for state, failures in [
        ("failed", 1),
        ("failed", 2),
        ("skipped", 2),
        ("cancelled", 2),
        ("failed", 3),
        ("succeeded", 0),
    ]:
        books = booked(books, None, a_run(RunState(state), ended=2))
        assert books.failures == failures


def test_only_what_the_schedule_asked_for_and_runs_counts_towards_the_cap() -> None:
    for run, scheduled in [
        (a_run(RunState.RUNNING), 1),
        (a_run(RunState.PENDING), 1),
        (a_run(RunState.SKIPPED), 0),
        (a_run(RunState.RUNNING, origin="trigger"), 0),
        (a_run(RunState.PENDING, origin="trigger"), 0),
    ]:
        assert booked(EMPTY, None, run).scheduled == scheduled


def test_a_run_that_resumes_is_fired_once() -> None:
    run = a_run(RunState.RUNNING, started=1)
    books = booked(EMPTY, None, run)
    waiting = replace(run, state=RunState.PENDING)
    books = booked(books, run, waiting)
    assert (books.running, books.waiting, books.last) == (0, 1, None)
    books = booked(books, waiting, replace(run, attempt=2))
    assert (books.running, books.waiting, books.fired, books.last) == (1, 0, 1, None)


def test_a_run_that_goes_on_as_it_was_changes_nothing() -> None:
    run = a_run(RunState.RUNNING)
    assert booked(EMPTY, run, replace(run, attempt=2)) is EMPTY
    assert booked(EMPTY, run, replace(run, attempt=2), cursor=5) == replace(EMPTY, cursor=5)


def test_a_backfill_has_books_of_its_own_until_it_is_over() -> None:
    first, second = (a_run(RunState.PENDING, n, origin="b", limit=1) for n in (1, 2))
    books = booked(booked(EMPTY, None, first), None, second)
    assert books.backfills == {"b": Backfill(1, waiting=2)}
    assert (books.waiting, books.pending, books.scheduled) == (0, 2, 0)
    books = booked(books, first, replace(first, state=RunState.RUNNING))
    assert books.backfills == {"b": Backfill(1, running=1, waiting=1)}
    books = booked(books, replace(first, state=RunState.RUNNING), replace(first, state=RunState.FAILED))
    books = booked(books, second, replace(second, state=RunState.CANCELLED))
    assert books.backfills == {}
    assert (books.due, books.failed, books.cancelled, books.fired) == (2, 1, 1, 1)
    assert books.balanced


def test_books_that_do_not_add_up_are_seen() -> None:
    assert EMPTY.balanced
    assert not replace(EMPTY, due=1).balanced
    assert replace(EMPTY, due=3, running=1, backfills={"b": Backfill(2, 1, 1)}).balanced


births = st.builds(
    a_run,
    st.sampled_from(RunState),
    st.just(1),
    origin=st.sampled_from([SCHEDULE, "trigger", "fill"]),
)


@given(st.lists(st.tuples(births, st.lists(st.sampled_from(RunState), max_size=4)), max_size=20))
def test_the_books_balance_whatever_becomes_of_runs(lives: list[tuple[Run, list[RunState]]]) -> None:
    books = EMPTY
    standing: list[Run] = []
    for number, (run, turns) in enumerate(lives):
        count = 3 if run.state is RunState.MISSED else 1
        run = replace(run, nominal=number, count=count, limit=2 if run.origin == "fill" else 0)
        books = booked(books, None, run)
        assert books.balanced
        for state in turns:
            if run.state.open:
                books, run = booked(books, run, replace(run, state=state)), replace(run, state=state)
                assert books.balanced
        standing.append(run)
    assert books.due == sum(run.count for run in standing)
    for state in ENDS:
        assert getattr(books, state.value) == sum(run.count for run in standing if run.state is state)
    assert books.pending == sum(run.state.open for run in standing)
    assert books.running == sum(run.state is RunState.RUNNING and not run.limit for run in standing)
    filling = [run for run in standing if run.limit and run.state.open]
    assert sum(b.running + b.waiting for b in books.backfills.values()) == len(filling)
