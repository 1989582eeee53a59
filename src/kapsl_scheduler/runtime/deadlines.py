"""The deadlines of all requests on one timer: a heap, and a single `call_later` for the earliest.

What is not here: what an alarm means (runtime.scheduler), and the queue's own look at deadlines (core.queue).
"""

from __future__ import annotations

import asyncio
import enum
import heapq
import math
from collections.abc import Callable
from typing import Final

from kapsl_scheduler.core.batch import Pending
from kapsl_scheduler.ports import Clock

__all__ = ["Alarm", "Deadlines"]

_GARBAGE: Final = 256  # entries of answered requests tolerated before the heap is first swept


class Alarm(enum.IntEnum):
    """What a moment means to a request."""

    DEADLINE = 0
    ROOM = 1
    """The wait for room in the queue ends."""
    FIRST_CHUNK = 2
    """The wait for the first chunk of a stream ends."""


class Deadlines:
    """Calls `on_alarm(item, alarm)` on the loop for every moment that comes while the item's future is pending.

    An answered request leaves its entry behind, to be swept when such entries outnumber the others: taking it out would
    cost every request what now only a sweep costs.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Clock, on_alarm: Callable[[Pending, Alarm], None]
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._on_alarm = on_alarm
        self._heap: list[tuple[float, int, int, Pending]] = []
        self._count = 0
        self._sweep_at = _GARBAGE
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, when: float, item: Pending, alarm: Alarm) -> None:
        """Watch for a moment, in the clock's seconds."""
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, alarm, item))
        if len(self._heap) > self._sweep_at:
            self._sweep()
        if when < self._timer_at:
            self._set_timer(when)

    def close(self) -> None:
        """No alarm rings any more."""
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        self._heap = [entry for entry in self._heap if not entry[3].future.done()]
        heapq.heapify(self._heap)
        self._sweep_at = 2 * len(self._heap) + _GARBAGE

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_later(max(when - self._clock(), 0.0), self._ring)

    def _ring(self) -> None:
        now = self._clock()
        heap = self._heap
        self._timer, self._timer_at = None, math.inf
        while heap and (heap[0][0] <= now or heap[0][3].future.done()):
            _, _, alarm, item = heapq.heappop(heap)
            if not item.future.done():
                self._on_alarm(item, Alarm(alarm))
        if heap and heap[0][0] < self._timer_at:
            self._set_timer(heap[0][0])
