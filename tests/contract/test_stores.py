"""One contract for every store. `STORES` says how each is made in a folder of its own; a new one is a line there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from kapsl_scheduler.core.runs import SCHEDULE, Backfill, Change, JobRecord, JobState, LastRun, Removal, Run, RunState
from kapsl_scheduler.errors import StoreError
from kapsl_scheduler.ports import Committed, Exists, JobStore, RunQuery, Stale
from kapsl_scheduler.stores import MemoryStore, SqliteStore
from tests.contract.store_machine import StoreMachine

STORES: dict[str, Callable[[Path], JobStore]] = {
    "memory": lambda folder: MemoryStore(),
    "sqlite": lambda folder: SqliteStore(folder / "jobs.db"),
}

STATE = JobState(anchor=5, cursor=7)
GONE = Removal(9)
LATER = JobState(anchor=5, cursor=8, due=1, succeeded=1)


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[JobStore]:
    store = STORES[request.param](tmp_path)
    await store.open()
    yield store
    await store.close()


def run(nominal: int, state: RunState = RunState.RUNNING, *, job: str = "a", **fields: Any) -> Run:
    return Run(job=job, nominal=nominal, state=state, **{"first": nominal, "due": nominal, "owner": "me", **fields})


def ended(nominal: int, state: RunState = RunState.SUCCEEDED, **fields: Any) -> Run:
    return run(nominal, state, **{"ended": nominal, **fields})


async def commit(store: JobStore, job: str = "a", expected: int | None = None, **fields: Any) -> Any:
    (result,) = await store.commit([Change(job=job, expected=expected, **fields)])
    return result


async def create(store: JobStore, job: str = "a", **fields: Any) -> JobRecord:
    result = await commit(store, job, 0, state=STATE, definition=b'{"is": 1}', **fields)
    assert isinstance(result, Committed)
    return JobRecord(job, b'{"is": 1}', STATE, result.version)


async def add(store: JobStore, *runs: Run) -> list[int]:
    """The runs, each of its own job. Returns their numbers."""
    results = await store.commit([Change(job=run.job, expected=None, created=(run,)) for run in runs])
    assert all(isinstance(result, Committed) for result in results)
    return [result.numbers[0] for result in results]


async def nominals(store: JobStore, **query: Any) -> list[int]:
    return [run.nominal for run in await store.runs(RunQuery(**query))]


async def everything(store: JobStore) -> Any:
    jobs = await store.jobs()
    memory = [await store.memory(job) for job in "abc"]
    return jobs, await store.versions(), memory, await store.runs(RunQuery(limit=1000)), await store.beats()


# --------------------------------------------------------------------------------------------------- jobs


async def test_a_new_store_is_empty(store: JobStore) -> None:
    assert await everything(store) == ([], {}, [{}, {}, {}], [], {})
    assert await store.run("a", 1, SCHEDULE) is None
    assert await store.numbered(1) is None
    assert await store.commit([]) == []
    assert await store.prune(keep=0, before=2**60) == 0
    await store.compact()


async def test_jobs_are_listed_by_id_all_or_some(store: JobStore) -> None:
    b, a, umlaut = [await create(store, job) for job in ("b", "a", "ä")]
    assert await store.jobs() == [a, b, umlaut]
    assert await store.jobs(["ä", "nobody", "a", "a"]) == [a, umlaut]
    assert await store.jobs([]) == []
    assert await store.versions() == {record.id: record.version for record in (a, b, umlaut)}


async def test_state_and_definition_change_together_or_alone(store: JobStore) -> None:
    first = await create(store)
    second = await commit(store, expected=first.version, state=LATER)
    assert await store.jobs() == [JobRecord("a", first.definition, LATER, second.version)]
    third = await commit(store, expected=second.version, definition=b"other")
    assert await store.jobs() == [JobRecord("a", b"other", LATER, third.version)]
    fourth = await commit(store, expected=third.version, definition=b"third", state=STATE)
    assert await store.jobs() == [JobRecord("a", b"third", STATE, fourth.version)]
    assert first.version < second.version < third.version < fourth.version


async def test_a_look_at_a_version_changes_nothing(store: JobStore) -> None:
    record = await create(store)
    assert await commit(store, expected=record.version, memory={"x": "1"}) == Committed(0)
    assert await commit(store, "b", expected=0) == Committed(0)
    assert await store.jobs() == [record]
    assert await store.memory("a") == {"x": "1"}


async def test_a_change_of_another_version_is_stale_and_nothing_of_it_is_written(store: JobStore) -> None:
    old = await create(store)
    new = await commit(store, expected=old.version, state=LATER)
    before = await everything(store)
    record = JobRecord("a", old.definition, LATER, new.version)
    rest: dict[str, Any] = {"state": STATE, "definition": b"", "created": (run(1),), "memory": {"x": "1"}}
    assert await commit(store, expected=0, **rest) == Stale(record)
    assert await commit(store, expected=old.version, **rest) == Stale(record)
    assert await commit(store, expected=old.version, remove=GONE) == Stale(record)
    assert await commit(store, "b", expected=old.version, **rest) == Stale(None)
    assert await everything(store) == before


async def test_of_two_that_decide_on_the_same_version_one_wins(store: JobStore) -> None:
    record = await create(store)
    changes = [Change(job="a", expected=record.version, state=JobState(anchor=0, cursor=n)) for n in range(8)]
    results = await asyncio.gather(*(store.commit([change]) for change in changes))
    (winner,) = [n for n, (result,) in enumerate(results) if isinstance(result, Committed)]
    (now,) = await store.jobs()
    assert now.state.cursor == winner
    assert all(result == Stale(now) for n, (result,) in enumerate(results) if n != winner)


async def test_a_removed_job_takes_its_memory_with_it_and_leaves_its_runs(store: JobStore) -> None:
    record = await create(store, memory={"x": "1"})
    await add(store, run(1))
    assert await commit(store, expected=record.version, remove=GONE, state=LATER, memory={"y": "2"}) == Committed(0)
    assert (await store.jobs(), await store.versions(), await store.memory("a")) == ([], {}, {})
    assert await nominals(store, job="a") == [1]
    again = await create(store)
    assert again.version > record.version
    assert await store.memory("a") == {}


@pytest.mark.parametrize("cancel", [True, False])
async def test_a_removed_job_leaves_none_of_its_runs_to_wait(store: JobStore, cancel: bool) -> None:
    """Those of other processes among them, and those that have come to be since anybody looked."""
    record = await create(store)
    await add(
        store,
        run(1),
        run(2, RunState.PENDING, owner=""),
        run(3, detached=True, owner="they"),  # of an earlier job
        run(4, owner="they", rows=2, attempt=2, limit=3, origin="fill"),
        ended(5),
        run(6, RunState.PENDING, job="b"),
    )
    result = await commit(
        store, expected=record.version, remove=Removal(9, "gone", cancel), created=(run(7, RunState.PENDING, owner=""),)
    )
    expected = [2, 7] if not cancel else [1, 2, 4, 7]
    assert [run.nominal for run in result.ended] == expected
    found = {run.nominal: run for run in await store.runs(RunQuery())}
    assert [found[nominal] for nominal in expected] == list(result.ended)
    assert {(run.state, run.reason, run.ended) for run in result.ended} == {(RunState.CANCELLED, "gone", 9)}
    assert [nominal for nominal, run in found.items() if run.detached] == ([3] if cancel else [4, 3, 1])
    assert (found[4].rows, found[4].attempt, found[4].owner) == (2, 2, "they")
    assert [nominal for nominal, run in found.items() if run.state.open] == ([6, 3] if cancel else [6, 4, 3, 1])
    await create(store)
    assert await commit(store, expected=0, remove=GONE) == Stale((await store.jobs())[0])
    assert await store.prune(keep=0, before=0) == len(expected) + 1


async def test_removing_what_is_not_there_is_done_at_once(store: JobStore) -> None:
    assert await commit(store, expected=0, remove=GONE) == Committed(0)
    assert await commit(store, expected=3, remove=GONE) == Stale(None)


async def test_memory_is_set_and_forgotten_key_by_key(store: JobStore) -> None:
    await create(store, memory={"x": "1", "y": "2", "never": None})
    await create(store, "b", memory={"x": "of b"})
    await commit(store, memory={"x": None, "y": "3", "name\udcff": "\udc80\0", "": ""})
    assert await store.memory("a") == {"y": "3", "name\udcff": "\udc80\0", "": ""}
    assert await store.memory("b") == {"x": "of b"}
    await commit(store, memory={"y": None, "name\udcff": None, "": None})
    assert await store.memory("a") == {}


async def test_memory_of_nobody_is_dropped(store: JobStore) -> None:
    assert await commit(store, memory={"x": "1"}) == Committed(0)
    await create(store)
    assert await store.memory("a") == {}


async def test_what_is_read_is_the_readers_own(store: JobStore) -> None:
    await create(store, memory={"x": "1"})
    await store.beat("me")
    (await store.memory("a")).clear()
    (await store.versions()).clear()
    (await store.beats()).clear()
    assert await store.memory("a") == {"x": "1"}
    assert len(await store.versions()) == 1
    assert await store.beats() == {"me": 1}


# --------------------------------------------------------------------------------------------------- runs

FULL = Run(
    job="job ✓",
    nominal=-(2**62),
    origin="trigger-1",
    state=RunState.CANCELLED,
    first=2**62,
    due=3,
    count=4,
    reason="timeout",
    error="it → broke\n\0",
    attempt=5,
    started=6,
    ended=7,
    owner="host:1",
    limit=8,
    detached=True,
    requests=9,
    failed_requests=10,
    rows=11,
    input_bytes=12,
    output_bytes=13,
    callback_error="ä",
)


async def test_every_field_of_a_run_is_kept(store: JobStore) -> None:
    (number,) = await add(store, FULL)
    stored = await store.numbered(number)
    assert stored is not None
    assert {**as_dict(stored), "number": 0} == as_dict(FULL)
    assert await store.run(*FULL.key) == stored
    assert await store.runs(RunQuery()) == [stored]
    sparse = Run(job="b", nominal=0, state=RunState.PENDING, first=0, due=0)
    await add(store, sparse)
    found = await store.run("b", 0, SCHEDULE)
    assert found is not None
    assert {**as_dict(found), "number": 0} == as_dict(sparse)
    assert found.detached is False


def as_dict(run: Run) -> dict[str, Any]:
    return {field: getattr(run, field) for field in Run.__struct_fields__}


async def test_every_field_of_a_state_is_kept(store: JobStore) -> None:
    last = LastRun(1, RunState.FAILED, 3, None, "→")
    numbers = {name: index for index, name in enumerate(JobState.__struct_fields__)}
    state = JobState(**{**numbers, "paused": "for ever", "backfills": {"b": Backfill(2, 1, 0)}, "last": last})
    result = await commit(store, expected=0, state=state, definition=bytes(range(256)))
    assert await store.jobs() == [JobRecord("a", bytes(range(256)), state, result.version)]


async def test_text_that_is_not_valid_does_not_lose_the_outcome(store: JobStore) -> None:
    await add(store, run(1))
    result = await commit(store, updated=(ended(1, RunState.FAILED, error="no such file: \udcff", reason="ü"),))
    assert isinstance(result, Committed)
    found = await store.run("a", 1, SCHEDULE)
    assert found is not None
    assert (found.state, found.error[:14], found.reason) == (RunState.FAILED, "no such file: ", "ü")


async def test_a_run_is_created_once_for_ever(store: JobStore) -> None:
    record = await create(store)
    await add(store, run(1, owner="first"))
    first = await store.run("a", 1, SCHEDULE)
    assert first is not None
    before = await everything(store)
    rest: dict[str, Any] = {"expected": record.version, "state": LATER, "memory": {"x": "1"}}
    assert await commit(store, created=(run(2), run(1)), **rest) == Exists(first)
    assert await everything(store) == before
    await commit(store, updated=(ended(1, owner="first"),))
    assert isinstance(await commit(store, created=(run(1),)), Exists)
    await add(store, run(1, origin="trigger"), run(1, job="b"))  # others


async def test_numbers_rise_and_are_never_given_again(store: JobStore) -> None:
    first, second = await add(store, run(1, number=99), ended(2))
    assert first < second
    assert await store.prune(keep=0, before=0) == 1
    result = await commit(store, created=(run(2), run(3)))
    assert second < result.numbers[0] < result.numbers[1]
    assert await store.numbered(second) is None


async def test_an_open_run_of_the_same_owner_is_replaced_and_keeps_its_number(store: JobStore) -> None:
    (number,) = await add(store, run(1))
    assert await commit(store, updated=(run(1, rows=3, number=77),)) == Committed(0)
    assert await store.numbered(number) == run(1, rows=3, number=number)
    assert await commit(store, updated=(ended(1, rows=5, number=number),)) == Committed(0)
    assert await store.numbered(number) == ended(1, rows=5, number=number)
    assert await nominals(store, states=(RunState.RUNNING, RunState.PENDING)) == []


@pytest.mark.parametrize("stored", [None, ended(1), run(1, owner="other"), run(1, RunState.PENDING, owner="")])
async def test_what_is_not_there_not_open_or_anothers_is_not_replaced(store: JobStore, stored: Run | None) -> None:
    record = await create(store)
    await add(store, *([] if stored is None else [stored]), run(5))
    before = await everything(store)
    changes = {"created": (run(9),), "memory": {"x": "1"}, "updated": (ended(5), ended(1))}
    assert await commit(store, expected=record.version, state=LATER, **changes) == Stale(record)
    assert await commit(store, **changes) == Stale(record)
    assert await everything(store) == before


async def test_a_run_is_taken_from_its_owner_once(store: JobStore) -> None:
    await add(store, run(1, owner="dead"), run(2, RunState.PENDING, owner=""), run(3))
    begun = run(2, owner="me", started=4)
    assert await commit(store, updated=(run(1, attempt=2),), taken_from="dead") == Committed(0)
    assert await commit(store, updated=(begun, run(3, rows=1)), taken_from="") == Stale(None)
    assert await commit(store, updated=(begun,), taken_from="") == Committed(0)
    assert await commit(store, updated=(run(2, owner="me", started=5),), taken_from="") == Stale(None)  # it has begun
    assert await commit(store, updated=(run(1, owner="they"),), taken_from="dead") == Stale(None)
    assert await commit(store, updated=(run(2, owner="they"),), taken_from="") == Stale(None)
    assert [r.owner for r in await store.runs(RunQuery())] == ["me", "me", "me"]


async def test_a_run_that_is_detached_stays_so_whoever_writes_it(store: JobStore) -> None:
    number, _ = await add(store, run(1), run(2))
    await commit(store, updated=(run(1, detached=True),))
    await commit(store, updated=(run(1, rows=3),))  # of one who has not heard of it
    assert await store.numbered(number) == run(1, rows=3, detached=True, number=number)
    await commit(store, updated=(ended(1), ended(2)))
    assert [found.detached for found in await store.runs(RunQuery(oldest_first=True))] == [True, False]


async def test_what_stands_in_the_way_is_told_in_order(store: JobStore) -> None:
    record = await create(store)
    await add(store, run(1))
    everything_wrong: dict[str, Any] = {"created": (run(1),), "updated": (ended(4),)}
    assert await commit(store, expected=record.version + 1, **everything_wrong) == Stale(record)
    assert isinstance(await commit(store, expected=record.version, **everything_wrong), Exists)


async def test_a_run_that_is_named_twice_stands_in_its_own_way(store: JobStore) -> None:
    await add(store, run(1))
    before = await everything(store)
    assert await commit(store, created=(run(2), run(3), run(2, owner="x"))) == Exists(run(2, owner="x"))
    assert await commit(store, updated=(run(1, rows=1), ended(1))) == Stale(None)
    assert await commit(store, created=(run(2),), updated=(ended(2),)) == Stale(None)
    assert await everything(store) == before


async def test_later_changes_of_a_batch_see_earlier_ones_and_each_stands_alone(store: JobStore) -> None:
    new: dict[str, Any] = {"expected": 0, "state": STATE, "definition": b"{}"}
    results = await store.commit(
        [
            Change(job="a", created=(run(1),), **new),
            Change(job="a", created=(run(2),), **new),
            Change(job="b", created=(run(1, job="b"), run(1, job="b")), **new),
            Change(job="a", expected=None, created=(run(1), run(3))),
            Change(job="a", expected=None, updated=(ended(1),), memory={"x": "1"}),
            Change(job="a", expected=None, updated=(ended(1),)),
            Change(job="c", **new),
        ]
    )
    kinds = [type(result) for result in results]
    assert kinds == [Committed, Stale, Exists, Exists, Committed, Stale, Committed]
    assert [record.id for record in await store.jobs()] == ["a", "c"]
    assert await store.runs(RunQuery()) == [ended(1, number=results[0].numbers[0])]
    assert results[6].version > results[0].version
    assert await store.memory("a") == {"x": "1"}


# ------------------------------------------------------------------------------------------------ queries


async def test_runs_are_asked_for_by_what_they_are(store: JobStore) -> None:
    await add(
        store,
        run(1, job="a", owner="p"),
        ended(2, RunState.FAILED, job="a"),
        run(3, job="b", origin="fill", limit=2),
        run(4, RunState.PENDING, job="b", owner=""),
        ended(5, job="b", owner="p", origin="fill", limit=2),
        ended(6, job="a"),
    )
    pending, running, failed, succeeded = RunState.PENDING, RunState.RUNNING, RunState.FAILED, RunState.SUCCEEDED
    assert await nominals(store) == [6, 5, 4, 3, 2, 1]
    assert await nominals(store, oldest_first=True) == [1, 2, 3, 4, 5, 6]
    assert await nominals(store, job="a") == [6, 2, 1]
    assert await nominals(store, job="nobody") == []
    assert await nominals(store, states=(pending, running)) == [4, 3, 1]
    assert await nominals(store, states=(running, running), oldest_first=True) == [1, 3]
    assert await nominals(store, states=(failed, succeeded)) == [6, 5, 2]
    assert await nominals(store, states=(failed, running), job="a") == [2, 1]
    assert await nominals(store, states=(running,), job="a") == [1]
    assert await nominals(store, states=(pending, running), owner="p") == [1]
    assert await nominals(store, owner="p") == [5, 1]
    assert await nominals(store, owner="") == [4]
    assert await nominals(store, origin="fill") == [5, 3]
    assert await nominals(store, origin=SCHEDULE, job="b") == [4]
    assert await nominals(store, outside_backfills=True) == [6, 4, 2, 1]
    assert await nominals(store, outside_backfills=True, states=(pending, running), job="b") == [4]


@pytest.mark.parametrize("query", [{}, {"job": "a"}, {"states": (RunState.RUNNING, RunState.SUCCEEDED)}])
async def test_pages_lead_through_all_runs_both_ways(store: JobStore, query: dict[str, Any]) -> None:
    numbers = await add(store, *(ended(n) if n % 3 else run(n) for n in range(11)))
    backwards: list[int] = []
    while page := await store.runs(RunQuery(limit=3, before=backwards[-1] if backwards else None, **query)):
        backwards += [run.number for run in page]
    forwards: list[int] = []
    while page := await store.runs(
        RunQuery(limit=4, after=forwards[-1] if forwards else None, oldest_first=True, **query)
    ):
        forwards += [run.number for run in page]
    assert forwards == numbers
    assert backwards == numbers[::-1]
    between = RunQuery(after=numbers[2], before=numbers[6], **query)
    assert [run.number for run in await store.runs(between)] == numbers[5:2:-1]
    assert await store.runs(RunQuery(limit=0, **query)) == []


# ---------------------------------------------------------------------------------------------- pruning


async def test_of_each_job_the_newest_ended_runs_are_kept(store: JobStore) -> None:
    await add(store, run(0), *(ended(n) for n in range(1, 5)), run(5), *(ended(n, job="b") for n in range(2)))
    assert await store.prune(keep=2, before=0) == 2
    assert await nominals(store, job="a") == [5, 4, 3, 0]
    assert await nominals(store, job="b") == [1, 0]
    assert await store.prune(keep=2, before=0) == 0
    assert await store.prune(keep=0, before=0) == 4
    assert await nominals(store) == [5, 0]
    assert await nominals(store, job="b") == []
    await add(store, ended(1))  # what is deleted can come anew


async def test_runs_that_ended_later_than_they_were_created_count_as_the_others(store: JobStore) -> None:
    await add(store, *(run(n) for n in range(4)))
    await commit(store, updated=tuple(ended(n) for n in range(4) if n != 1))
    assert await store.prune(keep=1, before=0) == 2
    assert await nominals(store) == [3, 1]


async def test_runs_that_ended_long_ago_are_deleted(store: JobStore) -> None:
    missed = RunState.MISSED
    await add(store, ended(1, ended=50), ended(2, ended=10), ended(3, missed, ended=None, due=9), run(4), ended(5))
    assert await store.prune(keep=10, before=10) == 2  # the third was due at 9, the fifth ended at 5
    assert await nominals(store) == [4, 2, 1]
    assert await store.prune(keep=10, before=11) == 1
    assert await store.prune(keep=10, before=2**60) == 1
    assert await nominals(store) == [4]


async def test_old_runs_count_among_the_newest_that_are_kept(store: JobStore) -> None:
    await add(store, ended(1, ended=50), ended(2, ended=10))
    assert await store.prune(keep=1, before=20) == 2  # the first for the number, the second for its age


async def test_many_runs_go_and_the_rest_is_still_found(store: JobStore) -> None:
    count = 300
    await store.commit([Change(job="a", expected=None, created=tuple(ended(n) for n in range(count)))])
    await add(store, run(count), ended(0, job="b", ended=count))
    assert await store.prune(keep=100, before=150) == 200
    assert await nominals(store, limit=3) == [0, 300, 299]
    assert await nominals(store, limit=3, oldest_first=True) == [200, 201, 202]
    assert await nominals(store, job="a", limit=2, oldest_first=True) == [200, 201]
    assert await store.prune(keep=1, before=0) == 99
    assert await store.prune(keep=1, before=2**60) == 2
    assert await nominals(store) == [300]
    await store.compact()
    assert await nominals(store) == [300]


# ------------------------------------------------------------------------------------------ owners, life


async def test_beats_are_counted_by_owner_until_it_is_forgotten(store: JobStore) -> None:
    for owner in ("me", "they", "me"):
        await store.beat(owner)
    assert await store.beats() == {"me": 2, "they": 1}
    await store.forget("they")
    await store.forget("nobody")
    assert await store.beats() == {"me": 2}
    await store.beat("they")
    assert await store.beats() == {"me": 2, "they": 1}


async def test_a_store_that_is_opened_again_has_what_it_had(store: JobStore) -> None:
    await create(store, memory={"x": "1"})
    await add(store, run(1), ended(2))
    await store.beat("me")
    before = await everything(store)
    await store.open()
    assert await everything(store) == before
    await store.close()
    await store.close()
    await store.open()
    assert await everything(store) == before
    (number,) = await add(store, run(3))
    assert number > before[3][0].number
    assert (await create(store, "b")).version > before[0][0].version


async def test_a_closed_store_refuses_every_call(store: JobStore) -> None:
    await store.close()
    for call in (
        store.jobs(),
        store.versions(),
        store.commit([]),
        store.commit([Change(job="a", expected=None, created=(run(1),))]),
        store.runs(RunQuery()),
        store.run("a", 1, SCHEDULE),
        store.numbered(1),
        store.memory("a"),
        store.beat("me"),
        store.beats(),
        store.forget("me"),
        store.prune(keep=1, before=0),
        store.compact(),
    ):
        with pytest.raises(StoreError, match="is closed"):
            await call
    await store.open()
    assert await store.runs(RunQuery()) == []


async def test_an_instant_store_never_suspends(store: JobStore) -> None:
    if not store.instant:
        pytest.skip("it waits for its thread or its server")
    for call in (store.jobs(), store.commit([Change(job="a", expected=None, created=(run(1),))]), store.beat("me")):
        with pytest.raises(StopIteration):
            call.send(None)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", STORES)
def test_a_store_does_what_the_model_does(name: str) -> None:
    machine = type("Machine", (StoreMachine,), {"make": staticmethod(STORES[name])})
    # A step costs a store with a file a hundred times as much.
    examples = settings().max_examples if name == "memory" else max(settings().max_examples // 5, 1)
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=30)
    machine.TestCase("runTest").debug()
