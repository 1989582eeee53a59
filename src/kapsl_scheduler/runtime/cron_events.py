"""What happens to jobs and runs, told to whoever reads along.

A reader that is slow loses the oldest events, and hears how many. What is not here: history, which the store keeps.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncGenerator
from typing import Final

import msgspec

from kapsl_scheduler.runtime.cron_views import CronEvent

__all__ = ["Events"]

KEPT: Final = 1000
"""Events that are kept for a reader that has not taken them yet."""


class _Reader:
    def __init__(self) -> None:
        self.events: deque[CronEvent] = deque()
        self.lost = 0
        self.there = asyncio.Event()


class Events:
    """A broadcast. `wanted` is whether anybody reads: nobody need make events for nobody."""

    def __init__(self) -> None:
        self.wanted = False
        self._readers: set[_Reader] = set()
        self._closed = False

    def tell(self, event: CronEvent) -> None:
        for reader in self._readers:
            if len(reader.events) >= KEPT:
                reader.events.popleft()
                reader.lost += 1
            reader.events.append(event)
            reader.there.set()

    def close(self) -> None:
        """Readers get what is left, then the end."""
        self._closed = True
        for reader in self._readers:
            reader.there.set()

    def read(self) -> AsyncGenerator[CronEvent, None]:
        """Everything from this call on, until `close`."""
        reader = _Reader()
        self._readers.add(reader)
        self.wanted = True
        events = self._read(reader)
        weakref.finalize(events, self._leave, reader).atexit = False  # one that was never begun has no `finally`
        return events

    async def _read(self, reader: _Reader) -> AsyncGenerator[CronEvent, None]:
        try:
            while True:
                while reader.events:
                    event = reader.events.popleft()
                    lost, reader.lost = reader.lost, 0
                    yield msgspec.structs.replace(event, lost=lost) if lost else event
                if self._closed:
                    return
                reader.there.clear()
                await reader.there.wait()
        finally:
            self._leave(reader)

    def _leave(self, reader: _Reader) -> None:
        self._readers.discard(reader)
        self.wanted = bool(self._readers)
