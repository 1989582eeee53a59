"""One timer for all jobs: which of them are due by the wall clock, and when to look again.

What is not here: what a job that is due does (`core.firing`).
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Final

from kapsl_scheduler.runtime.cron_ledger import Entry

__all__ = ["Alarm"]

LONGEST: Final = 30.0
"""Seconds after which the wall clock is looked at in any case: it may have been set, and the machine may have slept,
which the loop's clock does not count."""


class Alarm:
    """Jobs by when they are due. `wall` gives microseconds since 1970."""

    def __init__(self, wall: Callable[[], int]) -> None:
        self._wall = wall
        self._heap: list[tuple[int, int, Entry]] = []
        self._places = 0
        self._void = 0  # items of the heap whose job is due at another moment by now
        self._sleeper: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle

    def set(self, entry: Entry, due: int | None) -> None:
        """A job is due at another moment (None: not at all)."""
        self._void += entry.due is not None
        entry.due = due
        self._places += 1
        entry.place = self._places
        if due is None:
            return
        earlier = not self._heap or due < self._heap[0][0]
        heapq.heappush(self._heap, (due, self._places, entry))
        if earlier and self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)
        if self._void > len(self._heap) // 2 + 64:
            self._heap = [item for item in self._heap if item[2].place == item[1]]
            heapq.heapify(self._heap)
            self._void = 0

    async def next(self) -> list[Entry]:
        """Wait until some jobs are due. Each is given once, until it is set anew."""
        loop = asyncio.get_running_loop()
        while not (due := self._due()):
            self._sleeper = loop.create_future()
            self._arm(loop)
            try:
                await self._sleeper
            finally:
                self._timer.cancel()
                self._sleeper = None
        return due

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_at(loop.time() + self._until_next(), self._strike, loop)

    def _strike(self, loop: asyncio.AbstractEventLoop) -> None:
        sleeper = self._sleeper
        if sleeper is None or sleeper.done():
            return
        if self._until_next() > 0:
            self._arm(loop)  # it was but a look at the wall clock
        else:
            sleeper.set_result(None)

    def overdue(self) -> int:
        """How many jobs are due now and have not been given."""
        now = self._wall()
        return sum(due <= now and entry.place == place for due, place, entry in self._heap)

    def _until_next(self) -> float:
        while self._heap and self._heap[0][2].place != self._heap[0][1]:
            heapq.heappop(self._heap)
            self._void -= 1
        if not self._heap:
            return LONGEST
        return min(LONGEST, (self._heap[0][0] - self._wall()) / 1e6)

    def _due(self) -> list[Entry]:
        now = self._wall()
        found = []
        while self._heap and self._heap[0][0] <= now:
            _, place, entry = heapq.heappop(self._heap)
            if entry.place == place:
                entry.due = None
                found.append(entry)
            else:
                self._void -= 1
        return found
