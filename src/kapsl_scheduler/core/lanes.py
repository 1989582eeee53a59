"""The containers under the queue: a lane holds requests that may share a batch, a class its lanes, a backlog all.

Order and removal live here; which class leads and how large a batch is: core.forming; what a full queue does:
core.queue.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from kapsl_scheduler.core.batch import Pending, State
from kapsl_scheduler.core.latency import Deviation, LatencyModel, LatencyTable
from kapsl_scheduler.core.shares import TenantLedger
from kapsl_scheduler.types import Priority

__all__ = ["Backlog", "ClassQueue", "Lane", "Slot", "most_urgent"]

QUEUED: Final = State.QUEUED
RUNNING: Final = State.RUNNING
DONE: Final = State.DONE
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

    __slots__ = ("_dead", "_fifo", "_heap", "count", "pin", "priority", "rows", "shape", "stream", "tenant")

    def __init__(self, first: Pending) -> None:
        self.priority = first.priority
        self.shape = first.shape
        self.tenant = first.tenant
        self.pin = first.pin
        self.stream = first.stream is not None
        self.count = 0
        self.rows = 0
        self._dead = 0  # entries of requests that have left from the middle
        self._fifo: deque[Pending] = deque()
        self._heap: list[tuple[float, int, Pending]] = []

    def extend(self, items: Sequence[Pending]) -> None:
        """Queue requests, in the order of their arrival."""
        fifo = self._fifo
        last = fifo[-1].urgency if fifo and fifo[-1].sequence < items[0].sequence else -math.inf
        rows = 0
        in_order = last > -math.inf or not fifo
        for item in items:
            item.state = QUEUED
            rows += item.rows
            urgency = item.urgency
            if urgency < last:
                in_order = False
            last = urgency
        self.count += len(items)
        self.rows += rows
        if in_order:  # as mostly
            fifo.extend(items)
            return
        for item in items:
            if not fifo or (fifo[-1].urgency, fifo[-1].sequence) < (item.urgency, item.sequence):
                fifo.append(item)
            else:
                heapq.heappush(self._heap, (item.urgency, item.sequence, item))

    def head(self) -> Pending | None:
        """The most urgent request, left in place."""
        fifo, heap = self._fifo, self._heap
        while fifo and fifo[0].state is not QUEUED:
            fifo.popleft()
            self._dead -= 1
        while heap and heap[0][2].state is not QUEUED:
            heapq.heappop(heap)
            self._dead -= 1
        if heap and not (fifo and (fifo[0].urgency, fifo[0].sequence) < heap[0][:2]):
            return heap[0][2]
        return fifo[0] if fifo else None

    def first(self) -> Pending:
        """The most urgent request of a lane that has work, left in place."""
        head = self.head()
        assert head is not None, "the lane has no work"
        return head

    def take(self, room: int, latest: float, members: list[Pending], at_most: float = math.inf) -> int:
        """Move requests in order into `members` while their rows fit `room`; they are RUNNING then. The first member of
        a batch fits in any case. Stops at one that fits but is due before `latest`. Returns the rows moved."""
        rows = count = 0
        while count < at_most:
            item = self.head()
            if item is None or (rows + item.rows > room and members) or item.deadline < latest:
                break
            self._pop(item)
            item.state = RUNNING
            members.append(item)
            rows += item.rows
            count += 1
        self.count -= count
        self.rows -= rows
        return rows

    def take_single_rows(self, room: int, latest: float) -> list[Pending] | None:
        """The common case, kept bare: the first `room` of requests of one row each, of whom nobody has left from the
        middle and nobody is due before `latest`. None if it is not so."""
        fifo = self._fifo
        # A deadline never comes before its urgency, which does not fall along the queue.
        if self._dead or self._heap or self.rows != self.count or fifo[0].urgency < latest:
            return None
        count = min(room, self.count)
        popleft = fifo.popleft
        taken = [popleft() for _ in range(count)]
        for item in taken:
            item.state = RUNNING
        self.count -= count
        self.rows -= count
        return taken

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
        self._dead += 1
        if self._dead > self.count + _GARBAGE:
            self._fifo = deque(item for item in self._fifo if item.state is QUEUED)
            self._heap = [entry for entry in self._heap if entry[2].state is QUEUED]
            heapq.heapify(self._heap)
            self._dead = 0

    def __iter__(self) -> Iterator[Pending]:
        """The living, in no particular order."""
        for item in self._fifo:
            if item.state is QUEUED:
                yield item
        for _, _, item in self._heap:
            if item.state is QUEUED:
                yield item


class ClassQueue:
    """The requests of one class: its lanes, and those returned to run alone."""

    __slots__ = ("_arrivals", "_lanes", "_latest", "count", "priority", "returned", "rows", "urged")

    def __init__(self, priority: Priority) -> None:
        self.priority = priority
        self.count = 0
        self.rows = 0
        self.returned: deque[Pending] = deque()
        self.urged = float("-inf")  # when more urgent work last arrived: it ends the delay of what was there
        self._lanes: dict[object, Lane] = {}
        self._latest: Lane | None = None  # where the last requests were put
        self._arrivals: deque[Pending] | None = None  # see `_by_arrival`

    def extend(self, items: Sequence[Pending]) -> None:
        """Queue requests that belong in one lane, in the order of their arrival."""
        lane = self._latest = self._lane_of(items[0])
        before = lane.rows
        lane.extend(items)
        self.count += len(items)
        self.rows += lane.rows - before
        arrivals = self._arrivals
        if arrivals is not None:
            arrivals.extend(items)
            in_order = len(arrivals) == len(items) or arrivals[-len(items) - 1].sequence < items[0].sequence
            if not in_order or len(arrivals) > 2 * self.count + _GARBAGE:
                self._arrivals = None

    def discard(self, item: Pending) -> None:
        """Account for a queued request that leaves from anywhere; its state no longer says QUEUED."""
        self._lanes[_lane_key(item)].discard(item)
        self.left(1, item.rows)

    def left(self, count: int, rows: int) -> None:
        """Account for requests that have left their lane."""
        self.count -= count
        self.rows -= rows
        if not self.count:
            self._arrivals = None  # else the last burst would be held until the next request

    def unpin(self, engine: int) -> None:
        """Requests pinned to the engine may run anywhere; they keep their place."""
        self._latest = None
        for key, lane in list(self._lanes.items()):
            if lane.pin == engine:
                del self._lanes[key]
                for item in lane:
                    item.unpin()
                    self._lane_of(item).extend([item])
        for item in self.returned:
            if item.pin == engine:
                item.unpin()

    def forget(self) -> None:
        """Drop what the containers still hold of requests that have left: they may be queued again elsewhere, and
        would look alive here."""
        self.returned.clear()
        self._lanes.clear()
        self._latest = None
        self._arrivals = None

    def only_lane(self) -> Lane | None:
        """The lane in which all of the class stands, if that is so and any engine may run it."""
        lane = self._latest
        plain = lane is not None and lane.count == self.count and lane.pin is None and not lane.stream
        return lane if plain else None

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
        arrivals = self._by_arrival()
        while arrivals and arrivals[-1].state is not QUEUED:
            arrivals.pop()
        return (item for item in reversed(arrivals) if item.state is QUEUED)

    def oldest_first(self) -> Iterator[Pending]:
        """The queued requests from the first to arrive."""
        arrivals = self._by_arrival()
        while arrivals and arrivals[0].state is not QUEUED:
            arrivals.popleft()
        return (item for item in arrivals if item.state is QUEUED)

    def _by_arrival(self) -> deque[Pending]:
        """The queued requests by arrival, some that have left among them. It is made when somebody is to make room and
        kept up from then on until the class runs empty: where nobody is evicted it would be work for nothing."""
        if self._arrivals is None:
            queued = [item for lane in self._lanes.values() for item in lane]
            self._arrivals = deque(sorted(queued, key=lambda item: item.sequence))
        return self._arrivals

    def _lane_of(self, item: Pending) -> Lane:
        key = _lane_key(item)
        lane = self._lanes.get(key)
        if lane is None:
            if len(self._lanes) > _EMPTY_LANES:
                self._lanes = {key: lane for key, lane in self._lanes.items() if lane.count}
            lane = self._lanes[key] = Lane(item)
        return lane


def _lane_key(item: Pending) -> object:
    return item.shape if item.apart is None else (item.shape, item.apart)


class Backlog:
    """All that is queued, by class, and the tenants that it belongs to.

    `count_bytes`: whether `queued_bytes` is kept, `fair`: whether `tenants` is; nobody asks otherwise.
    """

    __slots__ = ("_count_bytes", "classes", "fair", "queued", "queued_bytes", "tenants")

    def __init__(self, *, count_bytes: bool, fair: bool) -> None:
        self.classes = tuple(ClassQueue(priority) for priority in Priority)
        self.queued = 0
        self.queued_bytes = 0
        self.fair = fair
        self.tenants = TenantLedger()
        self._count_bytes = count_bytes

    @property
    def rows(self) -> int:
        """Rows queued, of all classes."""
        return sum(queue.rows for queue in self.classes)

    def extend(self, items: Sequence[Pending]) -> None:
        """Queue requests of one class and one lane, in the order of their arrival."""
        self.classes[items[0].priority].extend(items)
        self.queued += len(items)
        if self._count_bytes:
            self.queued_bytes += sum(item.nbytes for item in items)
        if self.fair:
            for item in items:
                self.tenants.arrive(item.tenant)

    def discard(self, item: Pending) -> None:
        """Take out a queued request: it is DONE then."""
        item.state = DONE
        self.classes[item.priority].discard(item)
        self._gone([item])

    def left(self, queue: ClassQueue, items: Sequence[Pending], rows: int) -> None:
        """Account for requests that have just been taken out of their lane."""
        queue.left(len(items), rows)
        self._gone(items)

    def _gone(self, items: Sequence[Pending]) -> None:
        self.queued -= len(items)
        if self._count_bytes:
            self.queued_bytes -= sum(item.nbytes for item in items)
        if self.fair:
            for item in items:
                self.tenants.leave(item.tenant)


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
