"""Whether a client is still there while its request is worked on, and streams of server-sent events to it.

For routes of the application; the door sees for itself (`server.door`). What is not here: what is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Final, NoReturn, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kapsl_scheduler.errors import Cancelled, EngineError
from kapsl_scheduler.server.service import Flight

__all__ = ["SentEvents", "sent_events", "while_connected"]

Result = TypeVar("Result")

WATCH_AFTER: Final = 0.05
"""Seconds before it is looked whether the client is still there. A task that watches costs as much as the rest of
a short request, and one that is answered by then needs none; a client that goes sooner is noticed then."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work returns or raises. A client that goes away cancels it, and `Cancelled` is raised. The request's
    body must have been read."""
    watchers: list[asyncio.Task[NoReturn]] = []
    try:
        async with asyncio.TaskGroup() as group:
            watch = asyncio.get_running_loop().call_later(
                WATCH_AFTER, lambda: watchers.append(group.create_task(_fail_when_gone(receive)))
            )
            try:
                return await work
            finally:
                watch.cancel()
                for watcher in watchers:
                    watcher.cancel()
    except BaseExceptionGroup as failures:
        error = failures.exceptions[0]
        raise error from error.__cause__


async def _fail_when_gone(receive: Receive) -> NoReturn:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise Cancelled("the client went away before its answer was ready")


async def sent_events(
    receive: Receive,
    flight: Flight,
    events: AsyncGenerator[bytes, None],
    failed: Callable[[EngineError], bytes],
) -> Response:
    """The answer that sends these events, once the first is there. An error before that is raised and has a status; one
    that comes later is an event, as `failed` makes it. The flight ends with the stream."""
    stream = _streamed(flight, events, failed)
    first = await while_connected(receive, _first(stream))
    return SentEvents(first or b"", stream)


async def _first(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)


async def _streamed(
    flight: Flight, events: AsyncGenerator[bytes, None], failed: Callable[[EngineError], bytes]
) -> AsyncGenerator[bytes, None]:
    failure: BaseException | None = None
    try:
        async with aclosing(events):
            async for event in events:
                flight.keep()
                yield event
    except EngineError as error:
        if not flight.kept:
            raise
        failure = error
        yield failed(error)
    except (GeneratorExit, asyncio.CancelledError):
        failure = Cancelled("the client went away before its stream ended")
        raise
    finally:
        if flight.kept:
            flight.end(failure)


class SentEvents(Response):
    """Server-sent events: `first`, then what `events` yields, which have begun: so they hear in any case that they are
    closed, also when the client goes away before anything is sent."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending: asyncio.Task[None] | None = None
        gone = asyncio.create_task(_gone(receive), name="client of a stream")
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            sending = asyncio.create_task(self._send_all(send), name="stream of events")
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            gone.cancel()
            if sending is not None:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
