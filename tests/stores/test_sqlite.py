"""What is SQLite's own: the file, its thread, other processes, and everything that goes wrong with disks."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Awaitable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kapsl_scheduler.core.runs import Change, JobState, Run, RunState
from kapsl_scheduler.errors import StoreError
from kapsl_scheduler.ports import Committed, RunQuery, Stale
from kapsl_scheduler.stores import SqliteStore, sqlite, sqlite_file, sqlite_thread
from kapsl_scheduler.stores.sqlite_file import APPLICATION_ID, load_migrations
from tests.contract.naive_store import NaiveStore
from tests.stores.connections import Connections, sqlite_error
from tests.stores.contender import ROWS

STATE = JobState(anchor=0, cursor=0)
CONTENDER = Path(__file__).with_name("contender.py")
HURRY = 0.01  # seconds that a store waits for a lock which will not be let go of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Connections:
    return Connections(monkeypatch)


class Opened:
    """A store for the time of a block; it is closed in any case."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.store = SqliteStore(path, **options)

    async def __aenter__(self) -> SqliteStore:
        await self.store.open()
        return self.store

    async def __aexit__(self, *_: object) -> None:
        await self.store.close()


def run(nominal: int, job: str = "a", **fields: Any) -> Run:
    return Run(job=job, nominal=nominal, **{"state": RunState.RUNNING, "first": nominal, "due": nominal, **fields})


def creation(*runs: Run, job: str = "a") -> Change:
    return Change(job=job, expected=None, created=runs)


async def new_job(store: SqliteStore, job: str = "a", **fields: Any) -> int:
    (result,) = await store.commit([Change(job=job, expected=0, state=STATE, definition=b'{"n": 1}', **fields)])
    assert isinstance(result, Committed)
    return result.version


async def nominals(store: SqliteStore) -> list[int]:
    return [run.nominal for run in await store.runs(RunQuery(oldest_first=True, limit=10_000))]


async def filled(path: Path, runs: int = 300) -> None:
    async with Opened(path) as store:
        await new_job(store)
        await store.commit([creation(*(run(n, state=RunState.SUCCEEDED, error="x" * 200) for n in range(runs)))])


def pragma(path: Path, name: str) -> Any:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]


def contents(path: Path) -> bytes:
    return path.read_bytes()


def overwrite(path: Path, start: int, data: bytes) -> bytes:
    """Returns what the file holds then."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)
    return contents(path)


def files(folder: Path) -> dict[str, int]:
    """The sizes of all files of a folder."""
    return {entry.name: entry.stat().st_size for entry in folder.iterdir()}


def store_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("kapsl-store")]


# ------------------------------------------------------------------------------------------- the file


async def test_another_store_finds_what_was_written(path: Path) -> None:
    async with Opened(path) as store:
        version = await new_job(store, created=(run(1),), memory={"x": "1"})
        await store.beat("me")
    assert not path.with_name("jobs.db-wal").exists()
    async with Opened(path) as store:
        assert [(job.id, job.version, job.state) for job in await store.jobs()] == [("a", version, STATE)]
        assert (await nominals(store), await store.memory("a"), await store.beats()) == ([1], {"x": "1"}, {"me": 1})


async def test_the_file_says_what_it_is_and_can_be_asked(path: Path, connections: Connections) -> None:
    async with Opened(path) as store:
        await new_job(store)
        (connection,) = connections.opened
        settings = [connection.execute(f"PRAGMA {name}").fetchone() for name in ("synchronous", "foreign_keys")]
    assert settings == [(2,), (1,)]
    assert pragma(path, "application_id") == APPLICATION_ID == int.from_bytes(b"kaps", "big")
    assert pragma(path, "user_version") == len(load_migrations())
    assert pragma(path, "journal_mode") == "wal"
    question = "SELECT id, json_extract(state, '$.anchor'), json_extract(definition, '$.n') FROM jobs JOIN definitions"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(question).fetchall() == [("a", 0, 1)]


def test_construction_touches_nothing(path: Path) -> None:
    store = SqliteStore(str(path))
    assert repr(store) == f"SqliteStore('{path}')"
    assert not path.exists()
    assert not store_threads()
    for name in ("", ":memory:"):
        with pytest.raises(ValueError, match=r"MemoryStore\(\) keeps jobs in memory"):
            SqliteStore(name)


@pytest.mark.parametrize(
    ("name", "message"), [("none/jobs.db", "there is no folder .*none: make it"), (".", "it is a folder: name a file")]
)
async def test_a_path_that_cannot_be_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        await SqliteStore(tmp_path / name).open()
    assert files(tmp_path) == {}
    assert not store_threads()


async def test_an_empty_file_is_a_new_store(path: Path) -> None:
    path.open("wb").close()
    async with Opened(path) as store:
        await new_job(store)
    assert pragma(path, "user_version") == len(load_migrations())


async def test_stores_that_make_the_same_file_at_once_make_one(path: Path) -> None:
    stores = [SqliteStore(path) for _ in range(4)]
    await asyncio.gather(*(store.open() for store in stores))
    for number, store in enumerate(stores):
        await new_job(store, f"job {number}")
    assert len(await stores[0].jobs()) == 4
    await asyncio.gather(*(store.close() for store in stores))


async def test_switching_to_the_log_waits_for_others(path: Path, connections: Connections) -> None:
    busy = sqlite_error(sqlite3.SQLITE_BUSY)
    connections.faults["PRAGMA journal_mode"] = [busy, busy]
    async with Opened(path) as store:
        await new_job(store)
    connections.faults["PRAGMA journal_mode"] = [busy] * 100
    with pytest.raises(StoreError, match=r"locked.* within 0\.01 s"):
        await SqliteStore(path, busy_timeout=HURRY).open()


# ------------------------------------------------------------------------------------------ migrations


async def test_a_schema_of_the_future_is_refused_and_left_alone(path: Path) -> None:
    await filled(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 7")
    before = contents(path)
    with pytest.raises(StoreError, match=r"schema 7, .* later version .* up to 1\b"):
        await SqliteStore(path).open()
    assert contents(path) == before


async def test_an_older_schema_is_migrated_and_keeps_what_it_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(path)
    second = "-- A comment; with a semicolon.\nCREATE TABLE more (\n  x\n);\nINSERT INTO more VALUES (';');\n"
    steps = [*load_migrations(), second, "DROP TABLE more;"]
    monkeypatch.setattr(sqlite_file, "load_migrations", lambda: steps[:2])
    async with Opened(path) as store:
        assert len(await nominals(store)) == 300
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT * FROM more").fetchall() == [(";",)]
    monkeypatch.setattr(sqlite_file, "load_migrations", lambda: steps)
    async with Opened(path) as store, Opened(path) as other:
        assert len(await nominals(store)) == len(await nominals(other)) == 300
    assert pragma(path, "user_version") == 3


async def test_a_migration_that_fails_leaves_the_old_schema(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(path)
    broken = "CREATE TABLE more (x);\nDELETE FROM runs;\nINSERT INTO nowhere VALUES (1);\n"
    monkeypatch.setattr(sqlite_file, "load_migrations", lambda: [*load_migrations(), broken])
    with pytest.raises(StoreError, match="no such table: nowhere"):
        await SqliteStore(path).open()
    assert not store_threads()
    monkeypatch.undo()
    assert pragma(path, "user_version") == 1
    async with Opened(path) as store:
        assert len(await nominals(store)) == 300


# ------------------------------------------------------------------------------------ files of others


@pytest.mark.parametrize(
    "script",
    ["CREATE TABLE theirs (x)", "PRAGMA application_id = 77", "PRAGMA user_version = 1"],
    ids=["tables", "id", "version"],
)
async def test_the_database_of_another_application_is_left_alone(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(script)
    before = contents(path)
    with pytest.raises(StoreError, match="the database of another application"):
        await SqliteStore(path).open()
    assert contents(path) == before
    assert list(files(path.parent)) == [path.name]


async def test_a_file_that_is_no_database_is_left_alone(path: Path) -> None:
    path.open("wb").close()
    before = overwrite(path, 0, b"dear diary, " * 1000)
    with pytest.raises(StoreError, match=r"jobs\.db: it is no SQLite database.* left as it is.*SQLITE_NOTADB"):
        await SqliteStore(path).open()
    assert contents(path) == before


async def test_a_damaged_header_is_told_and_left_alone(path: Path) -> None:
    await filled(path)
    data = overwrite(path, 0, bytes(16))
    with pytest.raises(StoreError, match="its beginning is damaged"):
        await SqliteStore(path).open()
    assert contents(path) == data


async def test_a_damaged_page_harms_only_those_who_need_it(path: Path) -> None:
    await filled(path)
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'runs'").fetchone()
    data = overwrite(path, (page - 1) * 4096, b"\xff" * 4096)
    async with Opened(path) as store:
        for _ in range(2):
            with pytest.raises(StoreError, match=r"it is damaged: it is left as it is.*SQLITE_CORRUPT"):
                await store.runs(RunQuery())
            with pytest.raises(StoreError, match="it is damaged"):
                await store.commit([creation(run(1000))])
            assert [job.id for job in await store.jobs()] == ["a"]
    assert contents(path) == data


async def test_what_cannot_be_understood_is_named(path: Path) -> None:
    await filled(path, runs=1)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("UPDATE jobs SET state = '{'; UPDATE runs SET state = 'elsewhere'")
    async with Opened(path) as store:
        with pytest.raises(StoreError, match=r"jobs\.db: what is stored of job 'a' cannot be read"):
            await store.jobs()
        with pytest.raises(StoreError, match=r"jobs\.db: run 1 cannot be read: 'elsewhere'"):
            await store.runs(RunQuery())


# --------------------------------------------------------------------------------------- locks, disks


async def test_a_locked_file_is_told_and_waited_for(path: Path) -> None:
    async with Opened(path, busy_timeout=HURRY) as store:
        version = await new_job(store)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            calls = [store.commit([creation(run(n))]) for n in range(3)]
            errors = await asyncio.gather(*calls, store.prune(keep=0, before=0), return_exceptions=True)
            for error in errors:
                assert isinstance(error, StoreError)
                assert "it is locked: another process holds it and did not let go within 0.01 s" in str(error)
            assert len({id(error) for error in errors}) == 4
            assert await store.versions() == {"a": version}  # reading goes on
            with pytest.raises(StoreError, match="it is locked"):
                await SqliteStore(path, busy_timeout=HURRY).open()
            with pytest.raises(StoreError, match="it is locked"):
                await store.compact()
            other.execute("ROLLBACK")
        await store.commit([creation(run(1))])
        assert await nominals(store) == [1]


async def test_a_full_disk_loses_nothing_and_passes(path: Path, connections: Connections) -> None:
    connections.prepare = lambda connection: connection.execute("PRAGMA max_page_count = 40")
    async with Opened(path) as store:
        await new_job(store)
        written: list[int] = []

        async def write_on() -> None:
            while True:
                pair = [len(written), len(written) + 1]
                await store.commit([creation(*(run(nominal, error="x" * 2000) for nominal in pair))])
                written.extend(pair)

        with pytest.raises(StoreError, match=r"no room for it, the disk is full.*SQLITE_FULL"):
            await write_on()
        assert await nominals(store) == written
        assert len(written) > 4
        assert [job.state for job in await store.jobs()] == [STATE]
        await store.commit([Change(job="a", expected=None, memory={"x": "small"})])
        (connection,) = connections.opened  # it was not opened anew
        connection.execute("PRAGMA max_page_count = 4000")
        await store.commit([creation(run(5000, error="x" * 2000))])


async def test_a_file_that_may_not_be_written_is_told_when_it_is_opened(path: Path, connections: Connections) -> None:
    await filled(path)
    connections.uri = f"file:{path}?mode=ro"
    with pytest.raises(StoreError, match=r"it cannot be written: check who may.*SQLITE_READONLY"):
        await SqliteStore(path).open()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the super-user may write everything")
async def test_a_folder_that_may_not_be_written_is_told(path: Path) -> None:
    path.parent.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="it cannot be opened"):
            await SqliteStore(path).open()
    finally:
        path.parent.chmod(0o700)


@pytest.mark.parametrize("statement", ["COMMIT", "INSERT INTO runs"])
async def test_a_failing_disk_is_told_and_tried_afresh(path: Path, connections: Connections, statement: str) -> None:
    async with Opened(path) as store:
        await new_job(store)
        connections.faults[statement] = [sqlite_error(sqlite3.SQLITE_IOERR | 12 << 8)]
        with pytest.raises(StoreError, match="the disk failed to read or write it; SQLite says: as the test says"):
            await store.commit([creation(run(1))])
        assert await nominals(store) == []
        assert len(connections.opened) == 2
        await store.commit([creation(run(1))])
        assert await nominals(store) == [1]


async def test_a_transaction_that_cannot_be_rolled_back_is_left_with_its_connection(
    path: Path, connections: Connections
) -> None:
    async with Opened(path) as store:
        connections.faults["COMMIT"] = [sqlite_error(sqlite3.SQLITE_FULL)]
        connections.faults["ROLLBACK"] = [sqlite_error(sqlite3.SQLITE_IOERR)]
        with pytest.raises(StoreError, match="the disk is full"):
            await store.commit([creation(run(1))])
        assert await nominals(store) == []
        assert len(connections.opened) == 2


async def test_an_error_without_a_hint_is_told_as_sqlite_tells_it(path: Path, connections: Connections) -> None:
    async with Opened(path) as store:
        connections.faults["SELECT"] = [sqlite3.ProgrammingError("of Python"), sqlite_error(sqlite3.SQLITE_AUTH)]
        with pytest.raises(StoreError, match=r"jobs\.db: of Python$"):
            await store.versions()
        with pytest.raises(StoreError, match=r"jobs\.db: as the test says \(CODE_23\)$"):
            await store.versions()


async def test_opening_fails_whole_where_the_file_vanishes_between(path: Path, connections: Connections) -> None:
    async with Opened(path) as store:
        connections.faults["SELECT"] = [sqlite_error(sqlite3.SQLITE_IOERR)]
        with pytest.raises(StoreError):
            await store.versions()
        connections.faults["PRAGMA application_id"] = [sqlite_error(sqlite3.SQLITE_CANTOPEN)] * 2
        with pytest.raises(StoreError, match="it cannot be opened"):
            await store.commit([creation(run(1))])
        with pytest.raises(StoreError, match="it cannot be opened"):
            await store.jobs()
        assert await nominals(store) == []


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_is_not_in_its_place_is_told_until_it_is_back(
    path: Path, connections: Connections, replaced: bool
) -> None:
    away, other = path.with_name("away.db"), path.with_name("other.db")
    await filled(other, runs=1)
    before = contents(other)
    async with Opened(path) as store:
        await store.commit([creation(run(1))])
        os.rename(path, away)
        if replaced:
            os.rename(other, path)
        with pytest.raises(StoreError, match=r"moved, replaced or deleted while it was open: put it back"):
            await store.commit([creation(run(2))])
        connections.faults["SELECT"] = [sqlite_error(sqlite3.SQLITE_IOERR)]
        with pytest.raises(StoreError, match="the disk failed"):
            await store.runs(RunQuery())
        with pytest.raises(StoreError, match="moved, replaced or deleted"):  # and not opened anew
            await store.runs(RunQuery())
        assert (contents(path) == before) if replaced else ("jobs.db" not in files(path.parent))
        os.replace(away, path)
        await store.commit([creation(run(2))])
        assert await nominals(store) == [1, 2]


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
        for keep, before in ((6, 10), (3, 12), (0, 0)):
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


# ---------------------------------------------------------------------------------- several of one file


async def test_two_stores_of_one_file_see_and_never_overrule_one_another(path: Path) -> None:
    async with Opened(path) as one, Opened(path) as two:
        version = await new_job(one)
        assert await two.versions() == {"a": version}
        for _ in range(20):
            changes = [Change(job="a", expected=version, state=STATE, created=(run(version),)) for _ in range(2)]
            results = await asyncio.gather(one.commit(changes[:1]), two.commit(changes[1:]))
            assert sorted(type(result).__name__ for (result,) in results) == ["Committed", "Stale"]
            (job,) = await one.jobs()
            assert job.version > version
            version = job.version
        assert len(await nominals(two)) == 20
        assert await new_job(two, "b") > version


def contender(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(CONTENDER), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
async def test_two_processes_decide_each_turn_once(path: Path) -> None:
    turns = 100
    async with Opened(path) as store:
        await new_job(store)
    processes = [contender("count", path, turns) for _ in range(2)]
    owners = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    async with Opened(path) as store:
        (job,) = await store.jobs()
        runs = await store.runs(RunQuery(limit=10_000, oldest_first=True))
    assert job.state.cursor == 2 * turns
    assert [run.nominal for run in runs] == list(range(1, 2 * turns + 1))
    assert [sum(run.owner == owner for run in runs) for owner in owners] == [turns, turns]


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 40, 150])
async def test_what_was_acknowledged_survives_a_kill_and_the_rest_is_whole_or_absent(path: Path, after: int) -> None:
    with contender("write", path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == after:
                break
        process.kill()
        acknowledged = [after, *map(int, process.stdout.read().split())][-1]
    async with Opened(path) as store:
        (job,) = await store.jobs()
        turn = job.state.cursor
        assert acknowledged <= turn <= acknowledged + 1
        assert await nominals(store) == list(range(ROWS, (turn + 1) * ROWS))
        assert await store.memory("a") == {"turn": str(turn)}
        state = msgspec.structs.replace(STATE, cursor=-1)
        (result,) = await store.commit([Change(job="a", expected=job.version, state=state)])
        assert isinstance(result, Committed)
