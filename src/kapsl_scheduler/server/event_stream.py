"""What happens to jobs, as server-sent events to whoever listens.

What is not here: what is told (`runtime.cron_events`), how it is shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import msgspec
from starlette.responses import Response

from kapsl_scheduler.errors import Overloaded
from kapsl_scheduler.runtime.cron_views import CronEvent
from kapsl_scheduler.server.presence import SentEvents

__all__ = ["EventStreams", "shown", "written"]

MOST: Final = 100
"""Listeners at a time: each keeps a connection and up to a thousand events."""
KEEP_ALIVE: Final = 15.0
"""Seconds without an event after which a comment is sent, so that nothing between takes the connection for dead."""


def shown(event: CronEvent) -> dict[str, Any]:
    """An event as it is told."""
    values = msgspec.structs.asdict(event)
    if event.run is not None:
        values["run"] = msgspec.structs.asdict(event.run)  # with the fields that are as usual, too
    return values


def written(kind: str, data: Any) -> bytes:
    """A server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(data))


class EventStreams:
    """Opens streams of `events`, a bounded number at a time."""

    def __init__(self, events: Callable[[], AsyncGenerator[CronEvent, None]]) -> None:
        self._events = events
        self._open = 0

    async def open(self) -> Response:
        """A stream that goes on until the events end or the client goes. Raises `Overloaded` beyond the bound."""
        if self._open >= MOST:
            raise Overloaded(f"{MOST} clients listen to events, which is the limit")
        told = self._told()
        return SentEvents(await anext(told), told)

    async def _told(self) -> AsyncGenerator[bytes, None]:
        """What a client hears. It counts as a listener from the first word until it is closed."""
        self._open += 1
        events = self._events()
        following: asyncio.Task[CronEvent | None] | None = None
        try:
            yield b": from now on\n\n"
            while True:
                if following is None:
                    following = asyncio.create_task(_next(events), name="event of jobs")
                await asyncio.wait({following}, timeout=KEEP_ALIVE)
                if not following.done():
                    yield b": still here\n\n"
                    continue
                event, following = following.result(), None
                if event is None:
                    return
                yield written(event.kind, shown(event))
        finally:
            self._open -= 1
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)  # the events cannot be closed before
            await events.aclose()


async def _next(events: AsyncGenerator[CronEvent, None]) -> CronEvent | None:
    return await anext(events, None)
