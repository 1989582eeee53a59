"""The file: whose it is, its migrations, and everything that goes wrong with locks and disks."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from kapsl_scheduler.core.runs import Change
from kapsl_scheduler.errors import StoreError
from kapsl_scheduler.ports import RunQuery
from kapsl_scheduler.stores import SqliteStore, sqlite_file
from kapsl_scheduler.stores.sqlite_file import APPLICATION_ID, load_migrations
from tests.stores.build import (
    HURRY,
    STATE,
    Opened,
    contents,
    creation,
    files,
    filled,
    new_job,
    nominals,
    overwrite,
    pragma,
    run,
    store_threads,
)
from tests.stores.connections import Connections, sqlite_error

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
