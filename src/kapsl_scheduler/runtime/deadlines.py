"""The deadlines of all requests on one timer.

What is not here: what an alarm means (runtime.scheduler), and the queue's own look at deadlines (core.queue).
"""

from __future__ import annotations

import asyncio
import enum
import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Final

from kapsl_scheduler.core.batch import Pending
from kapsl_scheduler.ports import Clock

__all__ = ["Alarm", "Deadlines"]

_LINES: Final = 16
_GARBAGE: Final = 256  # entries of answered requests tolerated in a line or the heap before the first sweep


class Alarm(enum.IntEnum):
    """What a moment means to a request."""

    DEADLINE = 0
    ROOM = 1
    """The wait for room in the queue ends."""
    FIRST_CHUNK = 2
    """The wait for the first chunk of a stream ends."""


class Deadlines:
    """Calls `on_alarm(item, alarm)` on the loop for every moment that comes while the item's future is pending.

    Deadlines that are equally far ahead come in the order in which they were added, so each distance has a plain line
    and adding costs no comparison; distances beyond the first sixteen, and the rarer alarms, share a heap. Requests
    that were answered are dropped from the front of their line when the next one joins it.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Clock, on_alarm: Callable[[Pending, Alarm], None]
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._on_alarm = on_alarm
        self._lines: dict[float, deque[Pending]] = {}
        self._heap: list[tuple[float, int, Alarm, Pending]] = []
        self._count = 0
        self._sweep_at = _GARBAGE
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def __len__(self) -> int:
        return len(self._heap) + sum(map(len, self._lines.values()))

    def add_deadline(self, item: Pending, timeout: float) -> None:
        """Watch for the item's deadline, `timeout` seconds after its arrival."""
        line = self._lines.get(timeout)
        if line is None:
            line = self._new_line(timeout)
            if line is None:
                self.add(item, timeout, Alarm.DEADLINE)
                return
        line.append(item)
        while line[0].future.done():
            line.popleft()
        if len(line) > self._sweep_at:  # one that waits long keeps those behind it
            self._sweep()
        if item.deadline < self._timer_at:
            self._set_timer(item.deadline)

    def add(self, item: Pending, seconds: float, alarm: Alarm) -> None:
        """Watch for the moment `seconds` after the item's arrival."""
        when = item.arrival + seconds
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, alarm, item))
        if len(self._heap) > self._sweep_at:
            self._sweep()
        if when < self._timer_at:
            self._set_timer(when)

    def close(self) -> None:
        """No alarm rings any more."""
        self._heap.clear()
        self._lines.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _new_line(self, timeout: float) -> deque[Pending] | None:
        if len(self._lines) >= _LINES:
            self._lines = {key: line for key, line in self._lines.items() if line}
        if len(self._lines) >= _LINES:
            return None
        line = self._lines[timeout] = deque()
        return line

    def _sweep(self) -> None:
        self._heap = [entry for entry in self._heap if not entry[3].future.done()]
        heapq.heapify(self._heap)
        for timeout, line in self._lines.items():
            self._lines[timeout] = deque(item for item in line if not item.future.done())
        self._sweep_at = 2 * len(self) + _GARBAGE

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_later(max(when - self._clock(), 0.0), self._ring)

    def _ring(self) -> None:
        now = self._clock()
        self._timer, self._timer_at = None, math.inf
        heap = self._heap
        for line in self._lines.values():
            while line and (line[0].deadline <= now or line[0].future.done()):
                item = line.popleft()
                self._count += 1
                heapq.heappush(heap, (item.deadline, self._count, Alarm.DEADLINE, item))
        while heap and (heap[0][0] <= now or heap[0][3].future.done()):
            _, _, alarm, item = heapq.heappop(heap)
            if not item.future.done():
                self._on_alarm(item, alarm)
        earliest = min((line[0].deadline for line in self._lines.values() if line), default=math.inf)
        if heap:
            earliest = min(earliest, heap[0][0])
        if earliest < self._timer_at:
            self._set_timer(earliest)
