"""Stores, changes and files for the tests of SQLite."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

from kapsl_scheduler.core.runs import Change, JobState, Run, RunState
from kapsl_scheduler.ports import Committed, RunQuery
from kapsl_scheduler.stores import SqliteStore

STATE = JobState(anchor=0, cursor=0)
HURRY = 0.01  # seconds that a store waits for a lock which will not be let go of


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
