"""The requests of a run, read ahead of whoever sends them.

What is not here: sending them (`runtime.cron_stream`), the adapters that they may come from (`sources`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any

from kapsl_scheduler.ports import SourceItem
from kapsl_scheduler.runtime.offload import Strangers, taken_in_thread

__all__ = ["Feed", "numbered"]


class Feed:
    """Items in order, `ready` to be sent: at most `ahead` of them, read by a task of its own from its making on.

    `ended` says that no more will be ready, `error` why it ended before its time. `news` is set whenever any of this
    changes. A feed that `lasts` serves all attempts of a run: what one took in vain is given back for the next.
    """

    def __init__(self, items: AsyncIterator[SourceItem], *, ahead: int, lasts: bool, strangers: Strangers) -> None:
        self.ready: deque[SourceItem] = deque()
        self.ended = False
        self.error: Exception | None = None
        self.lasts = lasts
        self.news = asyncio.Event()
        self._items = items
        self._ahead = ahead
        self._closed = False
        self._room: asyncio.Future[None] | None = None
        self._strangers = strangers
        self._task = asyncio.create_task(self._read(), name="cron requests")

    def take(self) -> SourceItem:
        """The next item that is ready."""
        item = self.ready.popleft()
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        return item

    def give_back(self, items: Iterable[SourceItem]) -> None:
        """These come first again, in this order."""
        self.ready.extendleft(reversed(list(items)))

    async def close(self) -> None:
        """Read no more. A generator that is slow to end is left behind."""
        self._closed = True
        await self._strangers.end(self._task)

    async def _read(self) -> None:
        try:
            async for item in self._items:
                if self._closed:
                    return
                self.ready.append(item)
                self.news.set()
                if len(self.ready) >= self._ahead:
                    self._room = asyncio.get_running_loop().create_future()
                    await self._room
        except Exception as error:
            self.error = error
        except asyncio.CancelledError:
            if self._task.cancelling():
                raise
            self.error = RuntimeError("something that the requests awaited was cancelled")
        finally:
            self.ended = True
            self.news.set()
            await _close(self._items)


async def numbered(
    requests: list[Any] | Iterator[Any] | AsyncIterator[Any], done: int = 0
) -> AsyncIterator[SourceItem]:
    """Plain requests as items, named by their number from 0, without the first ones that are `done`. An iterator is
    read in threads."""
    number = 0
    try:
        if isinstance(requests, list):
            for number in range(done, len(requests)):
                yield SourceItem(requests[number], str(number))
            return
        if isinstance(requests, Iterator):
            requests = taken_in_thread(requests)
        async for request in requests:
            if number >= done:
                yield SourceItem(request, str(number))
            number += 1
    finally:
        await _close(requests)


async def _close(items: Any) -> None:
    """Let an async generator end."""
    if isinstance(items, AsyncIterable) and (close := getattr(items, "aclose", None)) is not None:
        await close()
