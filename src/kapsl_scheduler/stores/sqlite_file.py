"""One SQLite file: opening it, whose it is, its migrations, its transactions, and what went wrong in words.

Everything here runs in the one thread that uses the file (`stores.sqlite_thread`). What is not here: what is asked of
the tables (`stores.sqlite`).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Final, TypeVar

from kapsl_scheduler.errors import StoreError

__all__ = ["APPLICATION_ID", "SqliteFile", "load_migrations"]

T = TypeVar("T")

APPLICATION_ID: Final = 0x6B61_7073
"""What the header of the file says of whose it is: `kaps`."""

_WAL_PAUSE: Final = 0.01  # seconds between attempts to switch a file to its log
_STATEMENTS: Final = 128  # prepared ones that are kept

_DAMAGED: Final = (
    "it is left as it is; make a copy of it, see what `sqlite3 FILE .recover` can save, or go on with another file"
)
_HINTS: Final = {
    sqlite3.SQLITE_FULL: "there is no room for it, the disk is full: make room, nothing else is needed",
    sqlite3.SQLITE_READONLY: (
        "it cannot be written: check who may write the file, its -wal, its -shm and their folder, and that it was not "
        "moved or replaced meanwhile"
    ),
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check that its folder may be written and the file be read",
    sqlite3.SQLITE_IOERR: "the disk failed to read or write it",
    sqlite3.SQLITE_CORRUPT: f"it is damaged: {_DAMAGED}",
    sqlite3.SQLITE_NOTADB: f"it is no SQLite database, or its beginning is damaged: {_DAMAGED}",
}
_LOCKED: Final = frozenset((sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED))
_PASSING: Final = _LOCKED | {sqlite3.SQLITE_FULL, sqlite3.SQLITE_CONSTRAINT}
"""After these the connection is as good as before."""


def load_migrations() -> list[str]:
    """The steps from an empty file to the schema that this version knows; the first leads to schema 1."""
    folder = resources.files("kapsl_scheduler.stores") / "migrations"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".sql")), key=lambda entry: entry.name)
    return [entry.read_text(encoding="utf-8") for entry in files]


class SqliteFile:
    """The connection to one file: opened when it is needed, and anew after an error that may have spoiled it.

    What SQLite raises comes out as `StoreError`, with the transaction rolled back. A file that is not ours, damaged or
    of a later version is never written to.
    """

    def __init__(self, path: Path, busy_timeout: float) -> None:
        self.path = path
        self._busy_timeout = busy_timeout
        self._connection: sqlite3.Connection | None = None
        self._place: tuple[int, int] | None = None  # which file of the system it is, once it was opened

    def read(self, call: Callable[[sqlite3.Connection], T]) -> T:
        """What the call returns, outside a transaction. It fetches all that it asks for: what is still being read
        keeps the log from shrinking."""
        try:
            return call(self._connected())
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def begin(self) -> None:
        """Begin a transaction that nobody else can write beside."""
        try:
            connection = self._connected()
            self._check_place()
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def finish(self, calls: Sequence[Callable[[sqlite3.Connection], T]]) -> list[T]:
        """What the calls return, when all that they wrote is on the disk: if one raises, nothing of any is."""
        connection = self._connected()
        try:
            results = [call(connection) for call in calls]
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(error) from error
        except BaseException:
            self._roll_back()
            raise
        return results

    def close(self) -> None:
        """Let go of the file. The last one to do so folds the log into it and deletes the log."""
        self._drop()
        self._place = None

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # ------------------------------------------------------------------------------------------ errors

    def _failed(self, error: sqlite3.Error) -> StoreError:
        """Bring the connection back to where it can be used. Returns what the caller is to be told."""
        self._roll_back()
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of it says which kind of it
        if code not in _PASSING:
            self._drop()
        if code in _LOCKED:
            hint = (
                f"it is locked: another process holds it and did not let go within {self._busy_timeout:g} s; find it "
                "(`fuser FILE`), or allow for more with busy_timeout"
            )
        else:
            hint = _HINTS.get(code, "")
        said = f"{error} ({error.sqlite_errorname})" if code else str(error)
        return StoreError(f"{self.path}: {hint}; SQLite says: {said}" if hint else f"{self.path}: {said}")

    def _roll_back(self) -> None:
        if self._connection is None or not self._connection.in_transaction:
            return
        try:
            self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._drop()  # which rolls back

    # ----------------------------------------------------------------------------------------- opening

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._open()
            self._place = self._found()
        return self._connection

    def _found(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _check_place(self) -> None:
        """Raise `StoreError` where the path leads to another file than before: SQLite would go on writing into the one
        that nobody finds any more, and opened anew, would mix the log of the one with the pages of the other."""
        if self._place is not None and self._found() != self._place:
            raise StoreError(
                f"{self.path}: it was moved, replaced or deleted while it was open: put it back; to go on with another "
                "file, end all that use it and remove its -wal and -shm first"
            )

    def _open(self) -> sqlite3.Connection:
        # No folder is made: a path with a slip in it would give a new, empty store, and nobody would miss the old one.
        if not self.path.parent.is_dir():
            raise StoreError(f"{self.path}: there is no folder {self.path.parent}: make it, or choose another path")
        if self.path.is_dir():
            raise StoreError(f"{self.path}: it is a folder: name a file in it")
        self._check_place()
        connection = sqlite3.connect(
            self.path, timeout=self._busy_timeout, isolation_level=None, cached_statements=_STATEMENTS
        )
        try:
            migrations = load_migrations()
            connection.execute("BEGIN")  # one look, though another process may be making the file
            self._check_schema(connection, len(migrations))  # before anything is written
            connection.execute("COMMIT")
            self._use_log(connection)
            # A run that was dispatched must be found again after a power failure, or it would be dispatched twice: each
            # commit waits until the disk has it. On a Mac only a full fsync does so.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA fullfsync = ON")
            self._migrate(connection, migrations)
            connection.execute("PRAGMA foreign_keys = ON")  # after the migrations, which may have to rebuild tables
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_schema(self, connection: sqlite3.Connection, known: int) -> int:
        """The schema that the file has, 0 for an empty file. Raises `StoreError` for one that is not ours or later."""
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (schema,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != APPLICATION_ID and (application or schema or tables):
            raise StoreError(
                f"{self.path}: it is the database of another application (application_id {application:#x}, {tables} "
                "tables and indexes) and is left as it is: choose another path"
            )
        if schema > known:
            raise StoreError(
                f"{self.path}: it has schema {schema}, written by a later version of kapsl-scheduler; this one knows "
                f"schemas up to {known}: go on with that version, or choose another path"
            )
        return int(schema)

    def _use_log(self, connection: sqlite3.Connection) -> None:
        """Switch the file to a write-ahead log, once for ever: readers and the writer do not wait for one another, and
        a commit is one write and one fsync. SQLite does not wait for locks here by itself."""
        give_up = time.monotonic() + self._busy_timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in _LOCKED or time.monotonic() >= give_up:
                    raise
                time.sleep(_WAL_PAUSE)
            else:
                return

    def _migrate(self, connection: sqlite3.Connection, migrations: Sequence[str]) -> None:
        """Take the file to the latest schema, a transaction for each step. Another process may be at it as well."""
        while True:
            connection.execute("BEGIN IMMEDIATE")
            schema = self._check_schema(connection, len(migrations))
            if schema == len(migrations):
                break
            for statement in _statements(migrations[schema]):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {schema + 1}")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute("COMMIT")
        connection.execute(
            "DELETE FROM owners WHERE FALSE"
        )  # raises if it may not be written: now, not at the first run
        connection.execute("COMMIT")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, each of which begins on a line of its own. (`executescript` would commit first.)"""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
