"""The thread: what shares a transaction, its end, and what it does piece by piece."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kapsl_scheduler.core.runs import Change, RunState
from kapsl_scheduler.errors import StoreError
from kapsl_scheduler.ports import Committed, RunQuery, Stale
from kapsl_scheduler.stores import SqliteStore, sqlite, sqlite_thread
from tests.contract.naive_store import NaiveStore
from tests.stores.build import HURRY, Opened, creation, files, new_job, nominals, run, store_threads
from tests.stores.connections import Connections

# ----------------------------------------------------------------------------- what shares a transaction


async def behind_the_gate(connections: Connections, *calls: Awaitable[Any]) -> list[Any]:
    """The outcomes of calls that have all come while the first of them was kept from beginning."""
    connections.gate.clear()
    connections.waiting.clear()
    connections.commits = 0
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.to_thread(connections.waiting.wait, 30)
    connections.gate.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_commits_that_come_together_share_a_transaction(path: Path, connections: Connections) -> None:
    async with Opened(path) as store:
        version = await new_job(store)
        calls = [store.commit([creation(run(n))]) for n in range(62)]
        races = [store.commit([Change(job="a", expected=version, definition=b"%d" % n)]) for n in range(2)]
        first = store.commit([creation(run(100))])
        results = await behind_the_gate(connections, first, *calls, *races, store.beat("me"))
        assert connections.commits == 2  # the first had begun alone
        numbers = [result.numbers[0] for (result,) in results[:63]]
        assert numbers == sorted(numbers)
        assert [type(result) for (result,) in results[63:65]] == [Committed, Stale]
        assert await store.beats() == {"me": 1}


async def test_a_transaction_is_shared_by_so_many(
    path: Path, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_thread, "MAX_SHARED", 3)
    async with Opened(path) as store:
        sizes = [1, 1, 2, 1, 9, 1]  # alone, and then 1 + 2, 1, 9, 1
        calls = [store.commit([creation(run(n * 10 + k)) for k in range(size)]) for n, size in enumerate(sizes)]
        await behind_the_gate(connections, *calls)
        assert connections.commits == 5
        assert len(await nominals(store)) == sum(sizes)


async def test_a_commit_that_fails_harms_no_other(path: Path, connections: Connections) -> None:
    async with Opened(path) as store:
        changes = [creation(run(0)), creation(run(1)), creation(run(2), run(2**70)), creation(run(3))]
        results = await behind_the_gate(connections, *(store.commit([change]) for change in changes))
        assert [type(result) for result in results] == [list, list, OverflowError, list]
        assert await nominals(store) == [0, 1, 3]


async def test_readers_wait_for_one_transaction_at_most(
    path: Path, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_thread, "MAX_SHARED", 1)
    async with Opened(path) as store:
        writes = [store.commit([creation(run(n))]) for n in range(4)]
        *_, seen = await behind_the_gate(connections, *writes, nominals(store))
        assert seen == [0, 1]  # the first had begun, the second came with the reader


# --------------------------------------------------------------------------------------------- the thread


async def test_the_thread_ends_with_the_store(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    (thread,) = store_threads()
    assert thread.name == "kapsl-store jobs.db"
    assert thread.daemon
    await asyncio.gather(store.close(), store.close())
    assert not thread.is_alive()


async def test_closing_waits_for_what_came_before_and_refuses_what_comes_after(
    path: Path, connections: Connections
) -> None:
    store = SqliteStore(path)
    await store.open()

    async def late() -> None:
        await asyncio.sleep(0)
        await store.commit([creation(run(9))])

    calls = [store.commit([creation(run(n))]) for n in range(2)]
    first, second, _, refused = await behind_the_gate(connections, *calls, store.close(), late())
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert isinstance(refused, StoreError)
    assert "is closed" in str(refused)
    async with Opened(path) as store:
        assert await nominals(store) == [0, 1]


async def test_closing_can_be_cancelled_and_asked_for_again(path: Path, connections: Connections) -> None:
    store = SqliteStore(path)
    await store.open()
    connections.gate.clear()
    commit = asyncio.ensure_future(store.commit([creation(run(1))]))
    await asyncio.to_thread(connections.waiting.wait, 30)
    closing = asyncio.ensure_future(store.close())
    await asyncio.sleep(0)
    closing.cancel()
    connections.gate.set()
    await asyncio.wait([commit, closing])
    assert closing.cancelled()
    for thread in store_threads():
        thread.join()
    await store.close()
    assert not store_threads()


async def test_a_cancelled_commit_may_be_carried_out_and_harms_nobody(path: Path, connections: Connections) -> None:
    async with Opened(path) as store:
        connections.gate.clear()
        commits = [asyncio.ensure_future(store.commit([creation(run(n))])) for n in range(2)]
        await asyncio.to_thread(connections.waiting.wait, 30)
        for commit in commits:
            commit.cancel()
        connections.gate.set()
        await asyncio.wait(commits)
        await store.commit([creation(run(2))])
        assert await nominals(store) == [0, 1, 2]


def test_a_loop_that_is_gone_leaves_the_store_to_others(path: Path, connections: Connections) -> None:
    store = SqliteStore(path)

    async def leave() -> None:
        connections.gate.clear()
        asyncio.ensure_future(store.commit([creation(run(1))]))  # noqa: RUF006
        await asyncio.to_thread(connections.waiting.wait, 30)

    with asyncio.Runner() as runner:
        runner.run(store.open())
        runner.run(leave())
    connections.gate.set()
    with asyncio.Runner() as runner:
        assert runner.run(nominals(store)) == [1]
        runner.run(store.close())


# ------------------------------------------------------------------------------------------ housekeeping


async def test_pruning_goes_piece_by_piece(
    path: Path, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "PRUNE_RUNS", 3)
    monkeypatch.setattr(sqlite, "PRUNE_JOBS", 2)
    model = NaiveStore()
    async with Opened(path) as store:
        for nominal in range(60):
            state = RunState.RUNNING if nominal % 7 == 0 else RunState.SUCCEEDED
            change = creation(run(nominal, f"job {nominal % 5}", state=state), job=f"job {nominal % 5}")
            (result,) = await store.commit([change])
            model.check(change, result)
        for keep, before in ((6, 10), (6, 10), (3, 12), (0, 0)):
            connections.commits = 0
            deleted = model.prune(keep, before)
            assert await store.prune(keep=keep, before=before) == deleted
            assert connections.commits >= deleted / 3
            assert await store.runs(RunQuery(oldest_first=True)) == model.runs


async def test_compacting_gives_room_back(path: Path) -> None:
    async with Opened(path) as store:
        await store.commit([creation(*(run(n, state=RunState.FAILED, error="x" * 500) for n in range(300)))])
        await store.prune(keep=3, before=0)
        await store.compact()
        sizes = files(path.parent)
        assert sizes["jobs.db"] < 100_000
        assert sizes["jobs.db-wal"] == 0
        assert await nominals(store) == [297, 298, 299]


async def test_compacting_while_others_read_says_why_the_file_stays_large(path: Path) -> None:
    async with Opened(path, busy_timeout=HURRY) as store:
        await store.commit([creation(run(1))])
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN")
            other.execute("SELECT * FROM runs").fetchall()
            with pytest.raises(StoreError, match="cannot shrink while others read from it"):
                await store.compact()
        await store.compact()
