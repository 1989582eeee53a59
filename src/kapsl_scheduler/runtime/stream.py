"""A stream's chunks on their way from the engine to the reader: a bounded buffer with patience.

The producer is the slot (a thread, or a task of the loop), the reader a task of the loop. What is not here: who runs
streams (worker) and how their outcome is counted (settlement).
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Mapping
from typing import Final, cast

from kapsl_scheduler.errors import InferenceError, Overloaded
from kapsl_scheduler.ports import Clock
from kapsl_scheduler.types import Tensors

__all__ = ["StreamChannel"]

BUFFERED_CHUNKS: Final = 16
STREAM_STALL: Final = 5.0
"""Seconds: a reader that leaves the buffer full for so long loses the stream."""


class StreamChannel:
    """Chunks from one producer to one reader.

    The producer calls `put` (from a thread) or awaits `put_async` (on the loop); both return False once the reader has
    gone or been told an error, and raise `Overloaded` if it stalls, `InferenceError` for what is no chunk. The reader
    awaits `next_chunk`, which returns None at the end.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
        self.first_at: float | None = None  # when the first chunk came, in the clock's seconds
        self._loop = loop
        self._clock = clock
        self._chunks: deque[Tensors] = deque()
        self._room = threading.Condition()
        self._room_async: asyncio.Event = asyncio.Event()
        self._readable = asyncio.Event()
        self._ended = False
        self._closed = False
        self._waking = False
        self._error: Exception | None = None

    # ------------------------------------------------------------------------------------ producer

    def put(self, chunk: Tensors) -> bool:
        """Hand over one chunk from the slot's thread, waiting for room."""
        _check(chunk)
        with self._room:
            if not self._room.wait_for(lambda: self._over or len(self._chunks) < BUFFERED_CHUNKS, STREAM_STALL):
                raise _stalled()
            if self._over:
                return False
            self._chunks.append(chunk)
            wake = not self._waking
            self._waking = True
        if wake:
            self._loop.call_soon_threadsafe(self._wake)
        return True

    async def put_async(self, chunk: Tensors) -> bool:
        """Hand over one chunk from a task of the loop, waiting for room."""
        _check(chunk)
        if len(self._chunks) >= BUFFERED_CHUNKS and not self._over:
            self._room_async.clear()
            try:
                async with asyncio.timeout(STREAM_STALL):
                    await self._room_async.wait()
            except TimeoutError:
                raise _stalled() from None
        if self._over:
            return False
        self._chunks.append(chunk)
        self._wake()
        return True

    @property
    def _over(self) -> bool:
        """Whether more chunks are of no use: the reader has gone, or is about to hear an error."""
        return self._closed or self._ended

    def _wake(self) -> None:
        with self._room:
            self._waking = False
        if self.first_at is None:
            self.first_at = self._clock()
        self._readable.set()

    # -------------------------------------------------------------------------------- loop's side

    def end(self, error: Exception | None = None) -> None:
        """No more chunks: the reader gets what is buffered, then the end or the error. On the loop."""
        if not self._ended:
            self._error = error
            with self._room:
                self._ended = True
                self._room.notify()
            self._room_async.set()
            self._readable.set()

    def end_with(self, future: asyncio.Future[None]) -> None:
        """End as the request's future did."""
        self.end(None if future.cancelled() else cast("Exception | None", future.exception()))

    async def next_chunk(self) -> Tensors | None:
        """The next chunk; None at the end. Raises the stream's error."""
        while not self._chunks:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return None
            self._readable.clear()
            await self._readable.wait()
        with self._room:
            chunk = self._chunks.popleft()
            self._room.notify()
        self._room_async.set()
        return chunk

    def close(self) -> None:
        """The reader has gone: the producer stops at its next chunk."""
        with self._room:
            self._closed = True
            self._chunks.clear()
            self._room.notify()
        self._room_async.set()


def _check(chunk: object) -> None:
    if not isinstance(chunk, Mapping):
        raise InferenceError(
            f"the engine's stream has {type(chunk).__name__} for a chunk, expected a mapping of arrays"
        )


def _stalled() -> Overloaded:
    return Overloaded(f"the reader left {BUFFERED_CHUNKS} chunks unread for {STREAM_STALL:g} s: the stream is closed")
