"""The stream that keeps the dashboard current: a sample of the server and what has happened to jobs, once a second.

One stream a page: browsers allow six connections to a server. What is not here: what a sample says
(`server.dashboard.samples`), and the stream of job events for programs (`server.event_stream`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from kapsl_scheduler.errors import Overloaded
from kapsl_scheduler.runtime.cron_scheduler import CronScheduler
from kapsl_scheduler.runtime.cron_views import CronEvent
from kapsl_scheduler.server.dashboard.samples import PERIOD, Sampler
from kapsl_scheduler.server.event_stream import shown, written
from kapsl_scheduler.server.presence import SentEvents
from kapsl_scheduler.server.service import Service

__all__ = ["Live"]

MOST: Final = 100
"""Listeners at a time."""
MOST_EVENTS: Final = 200
"""Events of one second that a page is sent, the newest; it hears how many more there were."""


class Live:
    """The route `/dashboard/live`: server-sent events `hello` (the server, the version of the pages, the samples so
    far), then `second` each second (a sample, events of jobs, how many of these were left out). It ends when the
    client goes or the server begins to close."""

    def __init__(self, service: Service, cron: CronScheduler | None, *, pages: str) -> None:
        self._service = service
        self._cron = cron
        self._pages = pages
        self._sampler = Sampler(service, cron)
        self._open = 0

    def routes(self) -> list[BaseRoute]:
        return [Route("/dashboard/live", self._listen)]

    async def _listen(self, request: Request) -> Response:
        self._service.check_open()
        if self._open >= MOST:
            raise Overloaded(f"{MOST} pages of the dashboard are open, which is the limit")
        told = self._told()
        return SentEvents(await anext(told), told)

    async def _told(self) -> AsyncGenerator[bytes, None]:
        """What a page hears, until the server closes. It counts as a listener from the first word until it is
        closed."""
        self._open += 1
        collected = _Collected()
        events = None if self._cron is None else self._cron.events()
        following = None if events is None else asyncio.create_task(collected.follow(events), name="events of jobs")
        try:
            last = self._sampler.latest().number
            history = self._sampler.history()
            yield written("hello", {"version": self._service.version, "pages": self._pages, "history": history})
            while not self._service.draining:
                await asyncio.sleep(PERIOD)
                number, sample = self._sampler.latest()
                if number != last:
                    last = number
                    happened, lost = collected.take()
                    yield written("second", {"sample": sample, "events": happened, "lost": lost})
        finally:
            self._open -= 1
            if events is not None and following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)  # the events cannot be closed before
                await events.aclose()


class _Collected:
    """Events since they were last taken, the newest of them."""

    def __init__(self) -> None:
        self._events: deque[CronEvent] = deque(maxlen=MOST_EVENTS)
        self._lost = 0

    async def follow(self, events: AsyncGenerator[CronEvent, None]) -> None:
        async for event in events:
            self._lost += event.lost + (len(self._events) == MOST_EVENTS)
            self._events.append(event)

    def take(self) -> tuple[list[dict[str, Any]], int]:
        happened, lost = [shown(event) for event in self._events], self._lost
        self._events.clear()
        self._lost = 0
        return happened, lost
