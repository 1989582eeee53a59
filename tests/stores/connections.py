"""SQLite connections that fail, wait or are counted as a test says: what a real disk does only now and then."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import pytest


def sqlite_error(code: int, text: str = "as the test says") -> sqlite3.Error:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode, error.sqlite_errorname = code, f"CODE_{code}"
    return error


class Connections:
    """All connections that the code under test opens from now on.

    `faults` maps the beginning of a statement to errors that are raised in its place, one after another. While `gate`
    is not set, transactions wait before they begin; `waiting` says that one does. `commits` counts those that were
    made. `prepare` is called with each new connection.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[sqlite3.Connection] = []
        self.faults: dict[str, list[sqlite3.Error]] = {}
        self.prepare: Callable[[sqlite3.Connection], None] = lambda connection: None
        self.uri: str | None = None
        self.commits = 0
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self._connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", self.connect)

    def connect(self, path: Any, **options: Any) -> sqlite3.Connection:
        outer = self

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, values: Any = (), /) -> sqlite3.Cursor:
                outer.before(statement)
                cursor = super().execute(statement, values)
                outer.commits += statement == "COMMIT"
                return cursor

        if self.uri is not None:
            path, options["uri"] = self.uri, True
        # The test may use it as well, while the store is idle.
        connection = self._connect(path, factory=Connection, check_same_thread=False, **options)
        self.opened.append(connection)
        self.prepare(connection)
        return connection

    def before(self, statement: str) -> None:
        for beginning, errors in self.faults.items():
            if errors and statement.startswith(beginning):
                raise errors.pop(0)
        if statement.startswith("BEGIN") and not self.gate.is_set():
            self.waiting.set()
            assert self.gate.wait(30)
