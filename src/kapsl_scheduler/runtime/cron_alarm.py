"""One timer for all jobs: which of them are due by the wall clock, and when to look again.

What is not here: what a job that is due does (`core.firing`).
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable
from typing import Final

from kapsl_scheduler.runtime.cron_ledger import Entry

__all__ = ["Alarm"]

logger = logging.getLogger(__name__)

LONGEST: Final = 30.0
"""Seconds after which the wall clock is looked at in any case: it may have been set, and the machine may have slept,
which the loop's clock does not count."""


class Alarm:
    """Jobs by when they are due. `wall` gives microseconds since 1970. From `start` to `stop`, `strike` is given the
    jobs that are due, on the loop; each is given once, until it is set anew."""

    def __init__(self, wall: Callable[[], int], strike: Callable[[list[Entry]], None]) -> None:
        self._wall = wall
        self._strike = strike
        self._heap: list[tuple[int, int, Entry]] = []
        self._places = 0
        self._void = 0  # items of the heap whose job is due at another moment by now
        self._loop: asyncio.AbstractEventLoop | None = None  # None: it does not run, or is striking right now
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Strike from now on, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._arm(self._loop, self._wall())

    def stop(self) -> None:
        """Strike no more."""
        self._loop = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def set(self, entry: Entry, due: int | None) -> None:
        """A job is due at another moment (None: not at all)."""
        if entry.due is not None:
            self._void += 1
            if self._void > len(self._heap) // 2 + 64:
                self._heap = [item for item in self._heap if item[2].place == item[1] and item[2] is not entry]
                heapq.heapify(self._heap)
                self._void = 0
        entry.due = due
        place = self._places = self._places + 1
        entry.place = place
        if due is None:
            return
        heapq.heappush(self._heap, (due, place, entry))
        if self._loop is not None and self._timer is not None:
            now = self._wall()
            if self._loop.time() + (due - now) / 1e6 < self._timer.when():
                self._timer.cancel()
                self._arm(self._loop, now)

    def _arm(self, loop: asyncio.AbstractEventLoop, now: int) -> None:
        heap = self._heap
        while heap and heap[0][2].place != heap[0][1]:
            heapq.heappop(heap)
            self._void -= 1
        wait = min(LONGEST, (heap[0][0] - now) / 1e6) if heap else LONGEST
        self._timer = loop.call_at(loop.time() + wait, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        """What is due is given; then the timer is set anew, once for all that was set meanwhile."""
        now = self._wall()
        if self._heap and self._heap[0][0] <= now and (due := self._due(now)):
            self._loop = None
            try:
                self._strike(due)
            except Exception:
                logger.exception("jobs that are due were not looked at: %s", [entry.id for entry in due][:10])
            if self._timer is None:
                return  # stopped
            self._loop = loop
        self._arm(loop, now)

    def _due(self, now: int) -> list[Entry]:
        found: list[Entry] = []
        heap = self._heap
        while heap and heap[0][0] <= now:
            _, place, entry = heapq.heappop(heap)
            if entry.place == place:
                entry.due = None
                found.append(entry)
            else:
                self._void -= 1
        return found
