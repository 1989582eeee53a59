"""The deadlines of all requests on one timer.

What is not here: what an alarm means (runtime.scheduler), and the queue's own look at deadlines (core.queue).
"""

from __future__ import annotations

import asyncio
import enum
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Final

from kapsl_scheduler.core.batch import Pending
from kapsl_scheduler.ports import Clock

__all__ = ["Alarm", "Deadlines"]

_LINES: Final = 16
_GARBAGE: Final = 32  # entries of answered requests tolerated in a line or the heap beyond the others


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
    and adding costs no comparison; distances beyond the first sixteen, and the rarer alarms, share a heap. Who was
    answered is dropped in bulk: the members of a batch mostly are the front of their line. The rest is swept.
    """

    def __init__(self, clock: Clock, on_alarm: Callable[[Pending, Alarm], None]) -> None:
        self._clock = clock
        self._on_alarm = on_alarm
        self._lines: dict[float | None, list[Pending]] = {}
        self._heap: list[tuple[float, int, Alarm, Pending]] = []
        self._count = 0
        self._sweep_at = _GARBAGE
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def __len__(self) -> int:
        return len(self._heap) + sum(map(len, self._lines.values()))

    def add_all(self, items: Sequence[Pending]) -> None:
        """Watch for the deadlines of requests, given in the order of their arrival."""
        if len(items) == 1 or len({item.timeout for item in items}) == 1:  # as mostly
            self._add_alike(items)
        else:
            for item in items:
                self._add_alike([item])

    def _add_alike(self, items: Sequence[Pending]) -> None:
        timeout = items[0].timeout
        if timeout is None:
            return
        line = self._lines.get(timeout)
        if line is None:
            line = self._new_line(timeout)
            if line is None:
                for item in items:
                    self.add(item, timeout, Alarm.DEADLINE)
                return
        line += items
        if len(line) > self._sweep_at:
            self._sweep()
        if items[0].deadline < self._timer_at:
            self._set_timer(items[0].deadline)

    def answered(self, members: list[Pending]) -> None:
        """The members of a batch have had their answers."""
        line = self._lines.get(members[0].timeout)
        if line and line[0].future.done():
            size = len(members)
            del line[: size if line[:size] == members else _leading(line, -math.inf)]

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

    def _new_line(self, timeout: float) -> list[Pending] | None:
        if len(self._lines) >= _LINES:
            self._lines = {key: line for key, line in self._lines.items() if line}
        if len(self._lines) >= _LINES:
            return None
        line: list[Pending] = []
        self._lines[timeout] = line
        return line

    def _sweep(self) -> None:
        self._heap = [entry for entry in self._heap if not entry[3].future.done()]
        heapq.heapify(self._heap)
        for line in self._lines.values():
            line[:] = [item for item in line if not item.future.done()]
        self._sweep_at = 2 * len(self) + _GARBAGE

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        seconds = max(when - self._clock(), 0.0)
        self._timer = asyncio.get_running_loop().call_later(seconds, self._ring)

    def _ring(self) -> None:
        now = self._clock()
        self._timer, self._timer_at = None, math.inf
        heap = self._heap
        for line in self._lines.values():
            over = _leading(line, now)
            for item in line[:over]:
                self._count += 1
                heapq.heappush(heap, (item.deadline, self._count, Alarm.DEADLINE, item))
            del line[:over]
        while heap and (heap[0][0] <= now or heap[0][3].future.done()):
            _, _, alarm, item = heapq.heappop(heap)
            if not item.future.done():
                self._on_alarm(item, alarm)
        earliest = min((line[0].deadline for line in self._lines.values() if line), default=math.inf)
        if heap:
            earliest = min(earliest, heap[0][0])
        if earliest < self._timer_at:
            self._set_timer(earliest)


def _leading(line: list[Pending], now: float) -> int:
    """How many at the front of a line have had their answer, or whose deadline has come."""
    count = 0
    for item in line:
        if item.deadline > now and not item.future.done():
            break
        count += 1
    return count
