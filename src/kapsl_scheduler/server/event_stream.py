"""What happens to jobs, as server-sent events to whoever listens.

What is not here: what is told (`runtime.cron_events`), how it is shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kapsl_scheduler.errors import Overloaded
from kapsl_scheduler.runtime.cron_views import CronEvent

__all__ = ["EventStreams", "shown"]

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


class EventStreams:
    """Opens streams of `events`, a bounded number at a time."""

    def __init__(self, events: Callable[[], AsyncGenerator[CronEvent, None]]) -> None:
        self._events = events
        self._open = 0

    def open(self) -> Response:
        """A stream that goes on until the events end or the client goes. Raises `Overloaded` beyond the bound."""
        if self._open >= MOST:
            raise Overloaded(f"{MOST} clients listen to events, which is the limit")
        return _Stream(self)

    async def run(self, receive: Receive, send: Send) -> None:
        self._open += 1
        events = self._events()
        gone = asyncio.create_task(_disconnected(receive))
        following: asyncio.Task[CronEvent | None] | None = None
        try:
            await _send(send, b": from now on\n\n")
            while True:
                if following is None:
                    following = asyncio.create_task(_next(events))
                waited: set[asyncio.Task[Any]] = {following, gone}
                await asyncio.wait(waited, timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if not following.done():
                    await _send(send, b": still here\n\n")
                    continue
                event, following = following.result(), None
                if event is None:
                    await _send(send, b"", more=False)
                    return
                data = msgspec.json.encode(shown(event))
                await _send(send, b"event: %b\ndata: %b\n\n" % (event.kind.encode(), data))
        finally:
            self._open -= 1
            gone.cancel()
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)  # the events cannot be closed before
            await events.aclose()


class _Stream(Response):
    media_type = "text/event-stream"

    def __init__(self, streams: EventStreams) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._streams.run(receive, send)


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _next(events: AsyncGenerator[CronEvent, None]) -> CronEvent | None:
    return await anext(events, None)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
