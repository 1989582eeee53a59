"""Jobs and runs in an SQLite file: the embedded store. Several processes of one machine may share a file.

The statements, and the way between rows and records. What is not here: opening the file and its errors
(`stores.sqlite_file`), the thread that uses it (`stores.sqlite_thread`), the tables (`stores/migrations`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Final

import msgspec

from kapsl_scheduler.core.runs import Change, JobRecord, JobState, Removal, Run, RunState, repeated
from kapsl_scheduler.errors import StoreError
from kapsl_scheduler.ports import Committed, Exists, Result, RunQuery, Stale
from kapsl_scheduler.stores.sqlite_file import SqliteFile
from kapsl_scheduler.stores.sqlite_thread import SqliteThread

__all__ = ["SqliteStore"]

PRUNE_RUNS: Final = 2000
"""Runs that one transaction deletes at most: so long do other processes wait to write."""
PRUNE_JOBS: Final = 500
"""Jobs that one transaction looks through at most."""

# ------------------------------------------------------------------------------------------- statements
# JSON, and what may hold more than UTF-8 does (names of files), goes in and out as bytes, cast to text: so the file can
# be read and asked by people.

_FIELDS: Final = Run.__struct_fields__
_NEW: Final = [f'"{field}"' for field in _FIELDS if field != "number"]  # number is the last field
_RUN: Final = ", ".join([*_NEW, "number"])
_OPEN: Final = "state IN ('pending', 'running')"
_ENDED: Final = "state NOT IN ('pending', 'running')"  # word for word the condition of the index of ends

_JOB: Final = "SELECT id, CAST(definition AS BLOB), CAST(state AS BLOB), version FROM jobs JOIN definitions ON job = id"
_VERSION: Final = "SELECT version FROM jobs WHERE id = ?"
_PUT_JOB: Final = "INSERT INTO jobs (id, version, state) VALUES (?, ?, CAST(? AS TEXT))"
_SET_STATE: Final = "UPDATE jobs SET version = ?, state = CAST(? AS TEXT) WHERE id = ?"
_SET_VERSION: Final = "UPDATE jobs SET version = ? WHERE id = ?"
_PUT_DEFINITION: Final = (
    "INSERT INTO definitions (job, definition) VALUES (?, CAST(? AS TEXT)) "
    "ON CONFLICT (job) DO UPDATE SET definition = excluded.definition"
)
_PUT_MEMORY: Final = (
    "INSERT INTO memory (job, key, value) VALUES (?, CAST(? AS TEXT), CAST(? AS TEXT)) "
    "ON CONFLICT (job, key) DO UPDATE SET value = excluded.value"
)
_FIND_RUN: Final = f"SELECT {_RUN} FROM runs WHERE job = ? AND nominal = ? AND origin = ?"
_FIND_OPEN: Final = f"SELECT number FROM runs WHERE job = ? AND nominal = ? AND origin = ? AND {_OPEN} AND owner = ?"
_PUT_RUN: Final = f"INSERT INTO runs ({', '.join(_NEW)}) VALUES ({', '.join('?' * len(_NEW))})"
_SET_RUN: Final = f"UPDATE runs SET {', '.join(f'{field} = ?' for field in _NEW[3:])} WHERE number = ?".replace(
    '"detached" = ?',
    '"detached" = max("detached", ?)',  # who writes it may not know that its job is gone
)
_OF_JOB: Final = f"+job = ? AND {_OPEN} AND detached = 0"  # the plus: few runs are open, many are of the job
_DETACH: Final = f"UPDATE runs SET detached = 1 WHERE {_OF_JOB} AND state = 'running'"
_LEFT: Final = f"SELECT {_RUN} FROM runs WHERE {_OF_JOB} ORDER BY number"
_CANCEL: Final = f"UPDATE runs SET state = 'cancelled', reason = ?, ended = ? WHERE {_OF_JOB}"
_BEAT: Final = "INSERT INTO owners (owner, beat) VALUES (?, 1) ON CONFLICT (owner) DO UPDATE SET beat = beat + 1"

_OLD: Final = f"SELECT number FROM runs WHERE coalesce(ended, due) < ? AND {_ENDED} LIMIT ?"
_NEXT_JOB: Final = "SELECT min(job) FROM runs WHERE job > ?"
_HAS_MORE: Final = "SELECT 1 FROM runs WHERE job = ? LIMIT 1 OFFSET ?"
_NEWEST_TO_GO: Final = f"SELECT number FROM runs WHERE job = ? AND +{_ENDED} ORDER BY number DESC LIMIT 1 OFFSET ?"
_TO_GO: Final = f"SELECT number FROM runs WHERE job = ? AND number <= ? AND +{_ENDED} LIMIT ?"


class SqliteStore:
    """A store in the file at `path`, which is made if it is not there (its folder is not).

    One thread of its own uses the file; calls may come from any event loop, and those that come together are written
    together. A commit that has returned survives a power failure. `busy_timeout` (seconds) bounds how long a call waits
    for another process that writes; other calls wait behind it.

    Construction touches nothing. Raises `ValueError` for SQLite's names of databases without a file, for which there is
    `MemoryStore`. All else that can go wrong is a `StoreError` of the call that met it, and of no other: it says what
    to do, what was stored before is as it was, and the next call tries afresh. A file that is damaged, of a later
    version or another application's is left as it is.
    """

    instant = False

    def __init__(self, path: str | os.PathLike[str], *, busy_timeout: float = 5.0) -> None:
        if os.fspath(path) in ("", ":memory:"):
            raise ValueError(f"path: expected the path of a file, got {path!r}; MemoryStore() keeps jobs in memory")
        self._file = SqliteFile(Path(path), busy_timeout)
        self._thread: SqliteThread | None = None

    def __repr__(self) -> str:
        return f"SqliteStore({str(self._file.path)!r})"

    async def open(self) -> None:
        """Open the file, making or migrating it. After an error there is no thread and no open file."""
        if self._thread is not None:
            return
        self._thread = SqliteThread(self._file)
        try:
            await self._thread.read(lambda connection: None)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Write what was asked for before, let go of the file and end the thread."""
        thread = self._thread
        if thread is not None:
            await thread.close()
            self._thread = None

    def _opened(self) -> SqliteThread:
        if self._thread is None:
            raise StoreError(f"{self._file.path}: the store is closed")
        return self._thread

    # ------------------------------------------------------------------------------------------- changing

    async def commit(self, changes: Sequence[Change]) -> list[Result]:
        """As `JobStore.commit`: returns when the disk has it."""
        thread = self._opened()
        return await thread.write(partial(self._commit, changes), len(changes)) if changes else []

    def _commit(self, changes: Sequence[Change], connection: Connection) -> list[Result]:
        (last,) = connection.execute("SELECT last FROM versions").fetchone()
        version = last
        results: list[Result] = []
        for change in changes:
            numbers: list[int] = []
            obstacle = self._obstacle(connection, change, numbers)
            if obstacle is not None:
                results.append(obstacle)
                continue
            written = _written(connection, change, version + 1, numbers)  # whole, since nothing stands in its way
            version = max(version, written.version)
            if change.remove is not None:
                written = Committed(0, written.numbers, self._leave(connection, change.job, change.remove))
            results.append(written)
        if version != last:
            connection.execute("UPDATE versions SET last = ?", (version,))
        return results

    def _obstacle(self, connection: Connection, change: Change, numbers: list[int]) -> Stale | Exists | None:
        """What keeps the change from being written. Gathers the numbers of the runs that it updates."""
        execute = connection.execute
        if change.expected is not None:
            row = execute(_VERSION, (change.job,)).fetchone()
            if change.expected != (0 if row is None else row[0]):
                return self._stale(connection, change)
        for run in change.created:
            row = execute(_FIND_RUN, run.key).fetchone()
            if row is not None:
                return Exists(self._run(row))
        if len(change.created) > 1 and (twice := repeated(change.created)) is not None:
            return Exists(twice)
        for run in change.updated:
            owner = run.owner if change.taken_from is None else change.taken_from
            row = execute(_FIND_OPEN, (*run.key, owner)).fetchone()
            if row is None:
                return self._stale(connection, change)
            numbers.append(row[0])
        if len(numbers) > 1 and repeated(change.updated) is not None:
            return self._stale(connection, change)
        return None

    def _leave(self, connection: Connection, job: str, removal: Removal) -> tuple[Run, ...]:
        """The job is gone: see to its open runs. Returns those that have ended so."""
        execute = connection.execute
        if not removal.cancel:
            execute(_DETACH, (job,))
        ended = [self._run(row) for row in execute(_LEFT, (job,)).fetchall()]
        execute(_CANCEL, (removal.reason, removal.ended, job))
        return tuple(
            msgspec.structs.replace(run, state=RunState.CANCELLED, reason=removal.reason, ended=removal.ended)
            for run in ended
        )

    def _stale(self, connection: Connection, change: Change) -> Stale:
        row = connection.execute(f"{_JOB} WHERE id = ?", (change.job,)).fetchone()
        return Stale(None if row is None else self._record(row))

    # -------------------------------------------------------------------------------------------- reading

    async def jobs(self, ids: Sequence[str] | None = None) -> list[JobRecord]:
        """As `JobStore.jobs`. Raises `StoreError` too where a job cannot be read, with its name."""
        if ids is None:
            rows = await self._rows(f"{_JOB} ORDER BY id")
        else:
            wanted = msgspec.json.encode(ids).decode()
            rows = await self._rows(f"{_JOB} WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id", (wanted,))
        return [self._record(row) for row in rows]

    async def versions(self) -> dict[str, int]:
        """As `JobStore.versions`."""
        return dict(await self._rows("SELECT id, version FROM jobs"))

    async def runs(self, query: RunQuery) -> list[Run]:
        """As `JobStore.runs`. A page of all runs, of a job's, of those in some states or of the open ones of a job
        takes as long as the page; the other conditions are looked at run by run."""
        return [self._run(row) for row in await self._rows(*_selection(query))]

    async def run(self, job: str, nominal: int, origin: str) -> Run | None:
        """As `JobStore.run`."""
        rows = await self._rows(_FIND_RUN, (job, nominal, origin))
        return self._run(rows[0]) if rows else None

    async def numbered(self, number: int) -> Run | None:
        """As `JobStore.numbered`."""
        rows = await self._rows(f"SELECT {_RUN} FROM runs WHERE number = ?", (number,))
        return self._run(rows[0]) if rows else None

    async def memory(self, job: str) -> dict[str, str]:
        """As `JobStore.memory`."""
        rows = await self._rows("SELECT CAST(key AS BLOB), CAST(value AS BLOB) FROM memory WHERE job = ?", (job,))
        return {_text(key): _text(value) for key, value in rows}

    async def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        return await self._opened().read(lambda connection: connection.execute(statement, values).fetchall())

    def _record(self, row: tuple[str, bytes, bytes, int]) -> JobRecord:
        id, definition, state, version = row
        try:
            return JobRecord(id, definition, _read_state(state), version)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StoreError(f"{self._file.path}: what is stored of job {id!r} cannot be read: {error}") from error

    def _run(self, row: Sequence[Any]) -> Run:
        fields = dict(zip(_FIELDS, row, strict=True))
        try:
            fields["state"] = RunState(fields["state"])
        except ValueError as error:
            raise StoreError(f"{self._file.path}: run {row[-1]} cannot be read: {error}") from error
        fields["detached"] = bool(fields["detached"])
        return Run(**fields)

    # --------------------------------------------------------------------------------------------- owners

    async def beat(self, owner: str) -> None:
        """As `JobStore.beat`."""
        await self._opened().write(partial(_execute, _BEAT, (owner,)))

    async def beats(self) -> dict[str, int]:
        """As `JobStore.beats`."""
        return dict(await self._rows("SELECT owner, beat FROM owners"))

    async def forget(self, owner: str) -> None:
        """As `JobStore.forget`."""
        await self._opened().write(
            lambda connection: connection.execute("DELETE FROM owners WHERE owner = ?", (owner,))
        )

    # -------------------------------------------------------------------------------------- housekeeping

    async def prune(self, *, keep: int, before: int) -> int:
        """As `JobStore.prune`: in transactions of at most 2,000 runs, between which others are served. After an error
        or a cancellation, those of the transactions before are gone."""
        thread = self._opened()
        deleted = 0
        job: str | None = ""
        while job is not None:  # before the old ones, which count among the newest too
            number, job = await thread.write(partial(_prune_many, job, keep))
            deleted += number
        number = PRUNE_RUNS
        while number == PRUNE_RUNS:
            number = await thread.write(partial(_prune_old, before))
            deleted += number
        return deleted

    async def compact(self) -> None:
        """As `JobStore.compact`: writes the file anew, which takes its size in free room and a second or so for each
        100 MB. All calls wait for it, those of other processes too if they write.

        Raises `StoreError` also where other processes are reading what is to be folded away, and so keep the file from
        shrinking; try again, or leave it to the last of them.
        """
        await self._opened().read(self._compact)

    def _compact(self, connection: Connection) -> None:
        connection.execute("VACUUM")
        (held, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if held:
            raise StoreError(
                f"{self._file.path}: it is compacted, but cannot shrink while others read from it: try again later"
            )


# ------------------------------------------------------------------------------------- within a transaction


def _execute(statement: str, values: Sequence[Any], connection: Connection) -> None:
    connection.execute(statement, values)


def _written(connection: Connection, change: Change, version: int, numbers: Sequence[int]) -> Committed:
    """Write it, under that version if it changes the job. `numbers` are those of the updated runs."""
    execute = connection.execute
    job, state, definition = change.job, change.state, change.definition
    if change.remove is not None:
        execute("DELETE FROM jobs WHERE id = ?", (job,))  # and with it its definition and its memory
    elif change.expected == 0 and state is not None:
        execute(_PUT_JOB, (job, version, _state_text(state)))
    elif state is not None:
        execute(_SET_STATE, (version, _state_text(state), job))
    elif definition is not None:
        execute(_SET_VERSION, (version, job))
    if definition is not None and change.remove is None:
        execute(_PUT_DEFINITION, (job, definition))
    if change.memory and execute(_VERSION, (job,)).fetchone() is not None:
        for key, value in change.memory.items():
            if value is None:
                execute("DELETE FROM memory WHERE job = ? AND key = CAST(? AS TEXT)", (job, _bytes(key)))
            else:
                execute(_PUT_MEMORY, (job, _bytes(key), _bytes(value)))
    for run, number in zip(change.updated, numbers, strict=True):
        execute(_SET_RUN, (*_values(run)[3:], number))
    created = [execute(_PUT_RUN, _values(run)).lastrowid or 0 for run in change.created]
    changed = change.remove is None and (state is not None or definition is not None)
    return Committed(version if changed else 0, tuple(created))


def _prune_old(before: int, connection: Connection) -> int:
    """Delete runs that ended before that moment, up to `PRUNE_RUNS`. Returns how many."""
    return connection.execute(f"DELETE FROM runs WHERE number IN ({_OLD})", (before, PRUNE_RUNS)).rowcount


def _prune_many(after: str, keep: int, connection: Connection) -> tuple[int, str | None]:
    """Delete what is beyond the newest `keep` of each job, as far as one transaction goes. `after` is the last job that
    is done. Returns how many went and the last job that is done now, None if it is the last of all."""
    execute = connection.execute
    deleted = 0
    for _ in range(PRUNE_JOBS):
        (job,) = execute(_NEXT_JOB, (after,)).fetchone()
        if job is None:
            return deleted, None
        if execute(_HAS_MORE, (job, keep)).fetchone() is not None:
            row = execute(_NEWEST_TO_GO, (job, keep)).fetchone()
            if row is not None:
                statement = f"DELETE FROM runs WHERE number IN ({_TO_GO})"
                deleted += execute(statement, (job, row[0], PRUNE_RUNS - deleted)).rowcount
                if deleted >= PRUNE_RUNS:
                    return deleted, after
        after = job
    return deleted, after


def _selection(query: RunQuery) -> tuple[str, list[Any]]:
    """The statement for a query, and its values."""
    states = tuple(dict.fromkeys(query.states))
    # With few open runs and many of the job, or no job: by state, each state in order and merged. Else the index of
    # states is kept out of it (the plus), or it would be read to its end.
    by_state = bool(states) and (query.job is None or all(state.open for state in states))
    conditions: list[str] = []
    values: list[Any] = []
    for condition, value in (
        ("+job = ?" if by_state else "job = ?", query.job),
        ("+origin = ?", query.origin),
        ("owner = ?", query.owner),
        ("number < ?", query.before),
        ("number > ?", query.after),
    ):
        if value is not None:
            conditions.append(condition)
            values.append(value)
    if query.outside_backfills:
        conditions.append('"limit" = 0')
    end = f"ORDER BY number {'ASC' if query.oldest_first else 'DESC'} LIMIT {max(query.limit, 0)}"
    if by_state:
        where = " AND ".join(["state = ?", *conditions])
        part = f"SELECT * FROM (SELECT {_RUN} FROM runs WHERE {where} {end})"
        each = [value for state in states for value in (state.value, *values)]
        return f"{' UNION ALL '.join([part] * len(states))} {end}", each
    if states:
        conditions.append(f"+state IN ({', '.join('?' * len(states))})")
        values += [state.value for state in states]
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    return f"SELECT {_RUN} FROM runs {where} {end}", values


# ------------------------------------------------------------------------------------------------ values

_state_text: Final = msgspec.json.Encoder().encode
_read_state: Final = msgspec.json.Decoder(JobState).decode


def _values(run: Run) -> list[Any]:
    """A run as the columns `_NEW`. What UTF-8 cannot hold of messages is replaced: the outcome must not be lost."""
    values = list(msgspec.structs.astuple(run))[:-1]
    for index, value in enumerate(values):
        if type(value) is str and index > _ORIGIN and not value.isascii():
            values[index] = value.encode("utf-8", "replace").decode()
    values[_STATE] = run.state.value
    return values


_ORIGIN: Final = _FIELDS.index("origin")
_STATE: Final = _FIELDS.index("state")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
