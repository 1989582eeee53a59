"""The one thread that uses a file: work for it, in from any event loop and back with its outcome.

Writes that have come together while the last ones were being written share a transaction, and so one fsync. What is not
here: how a transaction goes (`stores.sqlite_file`), what is written (`stores.sqlite`).
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from kapsl_scheduler.errors import StoreError
from kapsl_scheduler.stores.sqlite_file import SqliteFile

__all__ = ["MAX_SHARED", "SqliteThread"]

T = TypeVar("T")

MAX_SHARED: Final = 1000
"""Changes that share a transaction, unless one call brings more: so long does a reader wait at most."""


class _Work:
    """A call and who waits for it. `size` counts the changes that it writes, 0 if it takes no part in transactions."""

    __slots__ = ("call", "error", "future", "loop", "result", "size")

    def __init__(self, call: Callable[[sqlite3.Connection], Any], size: int) -> None:
        self.call = call
        self.size = size
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.result: Any = None
        self.error: Exception | None = None


class SqliteThread:
    """Begins when it is made and ends with `close`. Its methods may be awaited on any loop; a cancelled call may be
    carried out nevertheless. They raise what the call raises, and `StoreError`.

    It is a daemon: a program that ends without closing its store is not kept from ending. What was acknowledged is on
    the disk by then, and what is under way is there whole or not at all.
    """

    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        self._incoming: SimpleQueue[_Work | None] = SimpleQueue()  # None: nothing comes after it
        self._lock = threading.Lock()
        self._closing = False
        self._ended = False
        self._closers: list[_Work] = []
        self._thread = threading.Thread(target=self._serve, name=f"kapsl-store {file.path.name}", daemon=True)
        self._thread.start()

    async def read(self, call: Callable[[sqlite3.Connection], T]) -> T:
        """What the call returns, outside a transaction."""
        result: T = await self._done(_Work(call, 0))
        return result

    async def write(self, call: Callable[[sqlite3.Connection], T], size: int = 1) -> T:
        """What the call returns, when what it wrote is on the disk."""
        result: T = await self._done(_Work(call, size))
        return result

    async def _done(self, work: _Work) -> Any:
        with self._lock:
            if self._closing:
                raise StoreError(f"{self._file.path}: the store is closed")
            self._incoming.put(work)
        return await work.future

    async def close(self) -> None:
        """Return when all that came before is done, and file and thread are let go of."""
        waiter = _Work(lambda _: None, 0)
        with self._lock:
            if not self._closing:
                self._closing = True
                self._incoming.put(None)
            ended = self._ended
            if not ended:
                self._closers.append(waiter)
        if not ended:
            await waiter.future
        self._thread.join()  # it has nothing left to do

    # -------------------------------------------------------------------------------------- in the thread

    def _serve(self) -> None:
        writes: deque[_Work] = deque()
        reads: list[_Work] = []
        more = True
        while more or writes:
            for _ in range(max(self._incoming.qsize(), 0 if writes else 1)):
                work = self._incoming.get()
                if work is None:
                    more = False
                else:
                    (writes if work.size else reads).append(work)
            if writes:
                self._write(_first(writes))
            for work in reads:
                self._read(work)
            reads.clear()
        self._file.close()
        with self._lock:
            self._ended = True
        _hand_over(self._closers)

    def _write(self, works: Sequence[_Work]) -> None:
        """Do them in one transaction. Where that fails, in one each: what one of them brought is to harm it alone."""
        try:
            self._file.begin()
        except Exception as error:
            _refuse(works, error)
            return
        try:
            results = self._file.finish([work.call for work in works])
        except Exception as error:
            if len(works) == 1:
                _refuse(works, error)
                return
            for work in works:
                self._write([work])
            return
        for work, result in zip(works, results, strict=True):
            work.result = result
        _hand_over(works)

    def _read(self, work: _Work) -> None:
        try:
            work.result = self._file.read(work.call)
        except Exception as error:
            work.error = error
        _hand_over([work])


def _first(writes: deque[_Work]) -> list[_Work]:
    """Take off as many as share a transaction: one at least."""
    works = [writes.popleft()]
    size = works[0].size
    while writes and (size := size + writes[0].size) <= MAX_SHARED:
        works.append(writes.popleft())
    return works


def _refuse(works: Sequence[_Work], error: Exception) -> None:
    """Each gets an error of its own: one that several tasks raise would collect all their tracebacks."""
    for work in works:
        work.error = StoreError(*error.args) if len(works) > 1 else error
        work.error.__cause__ = error.__cause__
    _hand_over(works)


def _hand_over(works: Iterable[_Work]) -> None:
    """Back to those who wait, with one wake-up of each loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Work]] = {}
    for work in works:
        by_loop.setdefault(work.loop, []).append(work)
    for loop, group in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, group)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass


def _settle(works: Sequence[_Work]) -> None:
    for work in works:
        if work.future.done():  # cancelled
            continue
        if work.error is None:
            work.future.set_result(work.result)
        else:
            work.future.set_exception(work.error)
