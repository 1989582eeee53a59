"""The containers under the queue: a lane holds requests that may share a batch, a class its lanes.

Order and removal live here; which class leads, how large a batch is and what a full queue does: core.queue.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from kapsl_scheduler.core.batch import Pending, State
from kapsl_scheduler.core.latency import Deviation, LatencyModel, LatencyTable
from kapsl_scheduler.types import Priority

__all__ = ["ClassQueue", "Lane", "Slot", "most_urgent"]

QUEUED: Final = State.QUEUED
RUNNING: Final = State.RUNNING
_EMPTY_LANES: Final = 32  # empty lanes kept for the next request of their kind
_GARBAGE: Final = 64  # dead entries tolerated beyond the live ones before a container is rebuilt


class Slot:
    """One engine slot as the queue sees it: who pulls, and what it may be given.

    `engine` is the index that pinned requests name; `calls` and `streams` say which kinds this slot runs. `latency` is
    what the engine's calls take, `delivery` what comes on top until the callers have their answers: the way back, and
    what calls take beyond their prediction.
    """

    __slots__ = ("calls", "delivery", "engine", "latency", "streams")

    def __init__(
        self,
        engine: int,
        latency: LatencyTable,
        *,
        delivery: Deviation | None = None,
        calls: bool = True,
        streams: bool = True,
    ) -> None:
        self.engine = engine
        self.latency = latency
        self.delivery = delivery or Deviation()
        self.calls = calls
        self.streams = streams

    def accepts(self, pin: int | None, *, stream: bool) -> bool:
        return (self.streams if stream else self.calls) and (pin is None or pin == self.engine)

    def answers_by(self, model: LatencyModel, rows: int, now: float) -> float:
        """The moment before which a call of `rows` rows that starts now will surely not be answered. Where the model
        condemns nobody, the delivery does not either: one slow delivery would let none pass that could show better."""
        seconds = model.lower(rows, now)
        return now + seconds + self.delivery.expected if seconds else now


class Lane:
    """Queued requests of one class, shape, tenant and pin, by urgency, then arrival.

    Requests whose urgency does not fall stand in a plain queue, the few others in a heap: deadlines mostly come
    in order, and then a push and a pop cost no comparison with the rest. What was cancelled or evicted is
    skipped when met, and swept when it outnumbers the living.
    """

    __slots__ = ("_fifo", "_heap", "count", "pin", "priority", "rows", "shape", "stream", "tenant")

    def __init__(self, first: Pending) -> None:
        self.priority = first.priority
        self.shape = first.shape
        self.tenant = first.tenant
        self.pin = first.pin
        self.stream = first.stream is not None
        self.count = 0
        self.rows = 0
        self._fifo: deque[Pending] = deque()
        self._heap: list[tuple[float, int, Pending]] = []

    def push(self, item: Pending) -> None:
        item.state = QUEUED
        item.lane = self
        fifo = self._fifo
        urgency = item.urgency
        if (
            not fifo
            or urgency > (last := fifo[-1]).urgency
            or (urgency == last.urgency and item.sequence > last.sequence)
        ):
            fifo.append(item)
        else:
            heapq.heappush(self._heap, (item.urgency, item.sequence, item))
        self.count += 1
        self.rows += item.rows

    def head(self) -> Pending | None:
        """The most urgent request, left in place."""
        fifo, heap = self._fifo, self._heap
        while fifo and fifo[0].state is not QUEUED:
            fifo.popleft()
        if not heap:
            return fifo[0] if fifo else None
        while heap and heap[0][2].state is not QUEUED:
            heapq.heappop(heap)
        if not heap:
            return fifo[0] if fifo else None
        if fifo and (fifo[0].urgency, fifo[0].sequence) < heap[0][:2]:
            return fifo[0]
        return heap[0][2]

    def first(self) -> Pending:
        """The most urgent request of a lane that has work, left in place."""
        head = self.head()
        assert head is not None, "the lane has no work"
        return head

    def take(self, room: int, latest: float, members: list[Pending], at_most: float = math.inf) -> int:
        """Move requests in order into `members` while their rows fit `room`; they are RUNNING then. The first member of
        a batch fits in any case. Stops at one that fits but is due before `latest`. Returns the rows moved."""
        fifo, heap = self._fifo, self._heap
        rows = count = 0
        while count < at_most:
            item = fifo[0] if fifo else None
            if heap or (item is not None and item.state is not QUEUED):
                item = self.head()
            if item is None or (rows + item.rows > room and members) or item.deadline < latest:
                break
            if heap:
                self._pop(item)
            else:
                fifo.popleft()
            item.state = RUNNING
            members.append(item)
            rows += item.rows
            count += 1
        self.count -= count
        self.rows -= rows
        return rows

    def _pop(self, item: Pending) -> None:
        """Take out what `head` has just returned."""
        if self._fifo and self._fifo[0] is item:
            self._fifo.popleft()
        else:
            heapq.heappop(self._heap)

    def discard(self, item: Pending) -> None:
        """Account for a request that leaves from anywhere; its state no longer says QUEUED."""
        self.count -= 1
        self.rows -= item.rows
        if len(self._fifo) + len(self._heap) > 2 * self.count + _GARBAGE:
            self._fifo = deque(item for item in self._fifo if item.state is QUEUED)
            self._heap = [entry for entry in self._heap if entry[2].state is QUEUED]
            heapq.heapify(self._heap)

    def __iter__(self) -> Iterator[Pending]:
        """The living, in no particular order."""
        for item in self._fifo:
            if item.state is QUEUED:
                yield item
        for _, _, item in self._heap:
            if item.state is QUEUED:
                yield item


class ClassQueue:
    """The requests of one class: its lanes, those returned to run alone, and the order of arrival."""

    __slots__ = ("_arrivals", "_lanes", "_latest", "_sweep_at", "count", "priority", "returned", "rows", "urged")

    def __init__(self, priority: Priority) -> None:
        self.priority = priority
        self.count = 0
        self.rows = 0
        self.returned: deque[Pending] = deque()
        self.urged = float("-inf")  # when more urgent work last arrived: it ends the delay of what was there
        self._lanes: dict[object, Lane] = {}
        self._latest: Lane | None = None  # where the last request was put
        self._arrivals: deque[Pending] = deque()
        self._sweep_at = _GARBAGE

    def push(self, item: Pending) -> None:
        plain = item.tenant is None and item.pin is None and item.stream is None
        lane = self._latest = (self._lanes.get(item.shape) if plain else None) or self._lane_of(item)
        lane.push(item)
        self.count += 1
        self.rows += item.rows
        arrivals = self._arrivals
        arrivals.append(item)
        # Mostly the first to arrive are the first to leave; what stays behind them is swept.
        while arrivals[0].state is not QUEUED:
            arrivals.popleft()
        if len(arrivals) > self._sweep_at:
            self._arrivals = deque(item for item in arrivals if item.state is QUEUED)
            self._sweep_at = 2 * len(self._arrivals) + _GARBAGE

    def discard(self, item: Pending) -> None:
        """Account for a queued request that leaves from anywhere; its state no longer says QUEUED."""
        item.lane.discard(item)
        self.left(1, item.rows)

    def left(self, count: int, rows: int) -> None:
        """Account for requests that have left their lane."""
        self.count -= count
        self.rows -= rows
        if not self.count:
            self._arrivals.clear()  # else the last burst would be held until the next request

    def unpin(self, engine: int) -> None:
        """Requests pinned to the engine may run anywhere; they keep their place."""
        self._latest = None
        for key, lane in list(self._lanes.items()):
            if lane.pin == engine:
                del self._lanes[key]
                for item in lane:
                    item.pin = None
                    self._lane_of(item).push(item)
        for item in self.returned:
            item.pin = None if item.pin == engine else item.pin

    def forget(self) -> None:
        """Drop what the containers still hold of requests that have left: they may be queued again elsewhere, and
        would look alive here."""
        self.returned.clear()
        self._lanes.clear()
        self._latest = None
        self._arrivals.clear()

    def lanes(self, slot: Slot) -> list[Lane]:
        """The lanes with work that the slot may run."""
        latest = self._latest
        if latest is not None and latest.count == self.count:  # mostly there is only one
            return [latest] if slot.accepts(latest.pin, stream=latest.stream) else []
        return [lane for lane in self._lanes.values() if lane.count and slot.accepts(lane.pin, stream=lane.stream)]

    def has_returned(self, slot: Slot) -> bool:
        """Whether somebody waits to run alone who may run on the slot."""
        return any(slot.accepts(item.pin, stream=False) for item in self.returned)

    def next_returned(self, slot: Slot) -> Pending | None:
        """The first request that waits to run alone and may run on this slot, taken out."""
        for index, item in enumerate(self.returned):
            if slot.accepts(item.pin, stream=False):
                del self.returned[index]
                return item
        return None

    def newest_first(self) -> Iterator[Pending]:
        """The queued requests from the last to arrive."""
        arrivals = self._arrivals
        while arrivals and arrivals[-1].state is not QUEUED:
            arrivals.pop()
        return (item for item in reversed(arrivals) if item.state is QUEUED)

    def oldest_first(self) -> Iterator[Pending]:
        """The queued requests from the first to arrive."""
        arrivals = self._arrivals
        while arrivals and arrivals[0].state is not QUEUED:
            arrivals.popleft()
        return (item for item in arrivals if item.state is QUEUED)

    def _lane_of(self, item: Pending) -> Lane:
        key: object = item.shape
        if item.tenant is not None or item.pin is not None or item.stream is not None:
            key = (item.shape, item.tenant, item.pin, item.stream is not None)
        lane = self._lanes.get(key)
        if lane is None:
            if len(self._lanes) > _EMPTY_LANES:
                self._lanes = {key: lane for key, lane in self._lanes.items() if lane.count}
            lane = Lane(item)
            self._lanes[key] = lane
        return lane


def most_urgent(lanes: Sequence[Lane], cost: Mapping[str | None, float]) -> Lane | None:
    """The lane that goes first: the tenant with the least cost served, then urgency, then arrival."""
    if len(lanes) == 1:
        return lanes[0] if lanes[0].count else None
    best: tuple[float, float, int] | None = None
    chosen: Lane | None = None
    for lane in lanes:
        head = lane.head()
        if head is not None:
            order = (cost.get(lane.tenant, 0.0), head.urgency, head.sequence)
            if best is None or order < best:
                best, chosen = order, lane
    return chosen
