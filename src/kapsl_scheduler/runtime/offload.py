"""Somebody else's functions, called where they cannot hold up anybody: plain ones each in a daemon thread of its own,
coroutines each in a task of its own.

A pool of threads would be joined at exit, and one function that hangs would take a place of it for ever; a coroutine
that does not end when it is cancelled would keep whoever awaits it. Here either costs nobody but itself. What is not
here: the engines' threads (`runtime.worker`).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final, TypeVar

__all__ = ["Strangers", "in_thread", "taken_in_thread"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK: Final = 64
"""Items that a thread takes from an iterator at a time: a thread costs about as much as a few dozen items."""
PATIENCE: Final = 0.02
"""Seconds after which a chunk is handed over as it is: whoever makes items slowly should not be waited for."""
LAST_STEPS: Final = 0.1
"""Seconds that a cancelled coroutine may take to end."""


def in_thread(function: Callable[..., T], *words: Any) -> asyncio.Future[T]:
    """The future of what `function(*words)` returns or raises, called in a thread.

    Cancelling it leaves the thread to end by itself, and nobody hears of what comes of it.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        elif isinstance(error, StopIteration) or not isinstance(error, Exception):
            # Which a future cannot carry; or what would end the loop, or cancel who waits.
            future.set_exception(RuntimeError(f"{function!r} raised {error!r}"))
        else:
            future.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = function(*words)
        except BaseException as error:
            failure = error
        try:
            loop.call_soon_threadsafe(settle, result, failure)
        except RuntimeError:
            pass  # the loop has ended: nobody waits

    threading.Thread(target=run, name=f"kapsl-call-{getattr(function, '__name__', 'function')}", daemon=True).start()
    return future


class Strangers:
    """Tasks of somebody else's coroutines. One that does not end when it is cancelled is left behind: nobody waits for
    it, and it is held here until it ends."""

    def __init__(self) -> None:
        self._left: set[asyncio.Task[Any]] = set()

    async def call(self, function: Callable[..., Any], *words: Any) -> Any:
        """Call a plain function in a thread, a coroutine function in a task. A generator (of either kind) that it gives
        is returned as it is.

        Cancelling this cancels the coroutine, and does not wait for it longer than a moment.
        """
        result = function(*words) if _is_async(function) else await in_thread(function, *words)
        if not inspect.isawaitable(result):
            return result
        task = asyncio.create_task(_awaited(result), name=f"kapsl-call-{getattr(function, '__name__', 'function')}")
        try:
            await asyncio.wait((task,))
        finally:
            await self.end(task)
        return task.result()

    async def end(self, *tasks: asyncio.Task[Any]) -> None:
        """Cancel those of them that have not ended, and wait a moment for them to do so."""
        running = [task for task in tasks if not task.done()]
        if not running:
            return
        for task in running:
            task.cancel()
            self._left.add(task)
            task.add_done_callback(self._forget)
        _, stubborn = await asyncio.wait(running, timeout=LAST_STEPS)
        for task in stubborn:
            logger.warning("%s does not end though it was cancelled, and is left behind", task.get_name())

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._left.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("%s, cancelled, raised %r", task.get_name(), error)


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _is_async(function: Callable[..., Any]) -> bool:
    """Also for a partial, and for an object whose `__call__` is a coroutine function."""
    while isinstance(function, functools.partial):
        function = function.func
    candidates = (function, type(function).__call__)
    return any(inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one) for one in candidates)


async def taken_in_thread(items: Iterator[T]) -> AsyncIterator[T]:
    """The items of a plain iterator, taken in threads, a chunk ahead of whoever asks for them.

    Closing this closes the iterator, in a thread too: once the chunk that is being taken is there.
    """
    taking = in_thread(_take, items)
    try:
        while True:
            chunk, ended, error = await asyncio.shield(taking)
            if not ended:
                taking = in_thread(_take, items)
            for item in chunk:
                yield item
            if error is not None:
                raise error
            if ended:
                return
    finally:
        taking.add_done_callback(lambda _: _close_in_thread(items))


def _take(items: Iterator[T]) -> tuple[list[T], bool, Exception | None]:
    """The next chunk, whether it is the last, and what went wrong after it."""
    chunk: list[T] = []
    until = time.monotonic() + PATIENCE
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) == CHUNK or time.monotonic() > until:
                return chunk, False, None
    except Exception as error:
        return chunk, True, error
    return chunk, True, None


def _close_in_thread(items: Iterator[Any]) -> None:
    close = getattr(items, "close", None)
    if close is not None:
        in_thread(close).add_done_callback(_log_error)


def _log_error(closed: asyncio.Future[Any]) -> None:
    if not closed.cancelled() and (error := closed.exception()) is not None:
        logger.warning("an iterator of requests could not be closed: %s: %s", type(error).__name__, error)
