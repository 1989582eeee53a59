"""The queue of RULES.md in plain lists, slow and direct: what `RequestQueue` is compared with.

No lanes, heaps or running counts: every question is answered by looking at all requests. How long a call will take is
asked of the same latency model that the queue asks, told the same measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from kapsl_scheduler.core.batch import BatchPolicy, Shape
from kapsl_scheduler.core.lanes import Slot
from kapsl_scheduler.core.queue import DEFAULT_HORIZON, QueueOverflowPolicy, QueuePolicy
from kapsl_scheduler.types import Priority


@dataclass(eq=False)
class Request:
    """`number` counts arrivals: it is who the request is, and its place among those that arrive at one moment."""

    number: int
    priority: Priority
    rows: int
    shape: Shape
    arrival: float
    deadline: float
    nbytes: int = 1
    pin: int | None = None
    tenant: str | None = None
    stream: bool = False

    @property
    def urgency(self) -> float:
        return self.arrival + DEFAULT_HORIZON if self.deadline == math.inf else self.deadline

    @property
    def batchable(self) -> bool:
        return self.shape.batchable and not self.stream

    def may_run_on(self, slot: Slot) -> bool:
        return (slot.streams if self.stream else slot.calls) and self.pin in (None, slot.engine)

    def may_join(self, other: Request) -> bool:
        return self.batchable and other.batchable and self.shape is other.shape


@dataclass
class Call:
    """One call: its members in order, and which classes still had work queued when it started."""

    members: list[Request]
    leader: Priority
    backlog: tuple[bool, ...] = ()

    @property
    def rows(self) -> int:
        return rows_of(self.members)

    def rows_by_class(self) -> tuple[int, ...]:
        return tuple(rows_of(r for r in self.members if r.priority is priority) for priority in Priority)


@dataclass
class Forming:
    """A pull under way: who it found too late, and whether somebody waits for room, which ends every delay."""

    now: float
    slot: Slot
    pressed: bool
    late: list[Request] = field(default_factory=list)
    held_until: float = math.inf


def rows_of(requests: Iterable[Request]) -> int:
    return sum(request.rows for request in requests)


class NaiveQueue:
    def __init__(self, batch: BatchPolicy, policy: QueuePolicy, slots: int) -> None:
        self.batch = batch
        self.policy = policy
        self.slots = slots
        self.queued: list[Request] = []  # in the order in which they came in
        self.waiting: list[Request] = []  # in the order in which they arrived
        self.returned: list[Request] = []
        self.came_in: list[Request] = []  # everybody who was ever queued
        self.ended: list[tuple[Call, float]] = []  # every call and its seconds
        self.cost: dict[str | None, float] = {}
        self.row_time = 0.0

    # ------------------------------------------------------------------------------------- full queues

    def push(self, request: Request, overflow: QueueOverflowPolicy, may_wait: bool) -> tuple[str, list[Request]]:
        """What became of the request, and who was evicted for it."""
        if self.policy.max_bytes is not None and request.nbytes > self.policy.max_bytes:
            return "too large", []
        overtakes = [other for other in self.waiting if other.priority <= request.priority]
        if self._fits(request) and not overtakes:
            self._enter(request)
            return "queued", []
        if overflow is QueueOverflowPolicy.BLOCK:
            if not may_wait or len(self.waiting) >= self.policy.max_waiting:
                return "refused", []
            self.waiting.append(request)
            return "waiting", []
        evicted = self._victims(request, newest=overflow is QueueOverflowPolicy.DROP_NEWEST)
        if not evicted:
            return "refused", []
        self.queued = [other for other in self.queued if other not in evicted]
        self._enter(request)
        self._let_in()
        return "queued", evicted

    def _victims(self, request: Request, *, newest: bool) -> list[Request]:
        """Of the lowest class below the request's the newest, or of the lowest not above it the oldest, until the
        request fits; nobody if it would not."""
        staying, victims = self.queued, []
        while not self._fits(request, staying):
            highest = request.priority + 1 if newest else request.priority
            allowed = [r for r in staying if r.priority >= highest]
            if not allowed:
                return []
            lowest = max(r.priority for r in allowed)
            by_arrival = sorted((r for r in allowed if r.priority is lowest), key=lambda request: request.number)
            victim = by_arrival[-1 if newest else 0]
            victims.append(victim)
            staying = [r for r in staying if r is not victim]
        return victims

    def _fits(self, request: Request, queued: list[Request] | None = None) -> bool:
        queued = self.queued if queued is None else queued
        bound = math.inf if self.policy.max_bytes is None else self.policy.max_bytes
        return len(queued) < self.policy.max_size and sum(r.nbytes for r in queued) + request.nbytes <= bound

    def _enter(self, request: Request) -> None:
        if self.policy.tenant_fairness and all(other.tenant != request.tenant for other in self.queued):
            level = min((self.cost[other.tenant] for other in self.queued), default=0.0)
            self.cost[request.tenant] = max(self.cost.get(request.tenant, 0.0), level)
        self.queued.append(request)
        self.came_in.append(request)

    def line(self) -> list[Request]:
        """Those who wait for room, in class, then arrival order."""
        return sorted(self.waiting, key=lambda request: (request.priority, request.number))

    def _let_in(self) -> None:
        for request in self.line():
            if not self._fits(request):
                return
            self.waiting.remove(request)
            self._enter(request)

    def _let_leaders_in(self, slot: Slot) -> None:
        """Those who wait for room and go before all that is queued need none: they are in the batch to come."""
        line = self.line()
        if not line:
            return
        first = line[0]
        if any(r.priority <= first.priority for r in self.queued + self.returned):
            return
        if self._owed(first.priority, slot) is not None:
            return
        room = first.rows
        if first.batchable and not self.batch.preferred_batch_sizes:
            room = max(first.rows, self._row_limit(first, slot))
        for request in line:
            alike = request is first or (request.may_join(first) and request.priority is first.priority)
            if not alike or not request.may_run_on(slot) or request.rows > room:
                return
            room -= request.rows
            self.waiting.remove(request)
            self._enter(request)

    def retry_after(self) -> float:
        return rows_of(self.queued) * self.row_time / self.slots

    # ------------------------------------------------------------------------- leaving by other ways

    def remove(self, request: Request) -> bool:
        for place in (self.queued, self.waiting, self.returned):
            if request in place:
                place.remove(request)
                self._let_in()
                return True
        return False

    def clear(self) -> tuple[list[Request], list[Request]]:
        waiting = self.line()
        in_order = self.returned + sorted(self.queued, key=lambda request: request.number)
        admitted = [r for p in Priority for r in in_order if r.priority is p]
        self.queued, self.waiting, self.returned = [], [], []
        return waiting, admitted

    def unpin(self, engine: int) -> None:
        for request in self.queued + self.waiting + self.returned:
            if request.pin == engine:
                request.pin = None

    def give_back(self, requests: list[Request]) -> None:
        self.returned += requests

    # ------------------------------------------------------------------------------------------- order

    def pull(self, now: float, slot: Slot) -> tuple[Call | None, list[Request], float]:
        """The call to make, who is too late, and when to look again."""
        forming = Forming(now, slot, bool(self.waiting))
        call = None
        while call is None:
            forming.pressed = bool(self.waiting)
            self._let_leaders_in(slot)
            late = len(forming.late)
            call = self._next(forming)
            if call is not None:
                call.backlog = tuple(any(r.priority is p for r in self.queued) for p in Priority)
            self._let_in()
            if not forming.pressed or len(forming.late) == late:
                break  # nobody came in after the choice was made
        return call, forming.late, math.inf if call is not None else forming.held_until

    def _next(self, forming: Forming) -> Call | None:
        for priority in Priority:
            for request in [r for r in self.returned if r.priority is priority and r.may_run_on(forming.slot)]:
                self.returned.remove(request)
                if not self._is_late(request, request.rows, forming):
                    return Call([request], priority)
                forming.late.append(request)
            while work := self._work(priority, forming.slot):
                ready = [r for r in work if self._held_until(r, work, forming) <= forming.now]
                if not ready:
                    forming.held_until = min(self._held_until(r, work, forming) for r in work)
                    return None
                call = self._lead(min(ready, key=self._place), forming)
                if call is not None:
                    return call
        return None

    def _work(self, priority: Priority, slot: Slot) -> list[Request]:
        return [r for r in self.queued if r.priority is priority and r.may_run_on(slot)]

    def _place(self, request: Request) -> tuple[float, float, int]:
        """Within a class: tenant by least cost served, then deadline, then arrival."""
        return self.cost.get(request.tenant, 0.0), request.urgency, request.number

    def _held_until(self, request: Request, work: list[Request], forming: Forming) -> float:
        """The delay holds only work below the first class, counts from arrival, and ends when more urgent work
        arrives; a batch that is full, or fills a preferred size, is not held, nor is what fills none."""
        if not request.batchable or request.priority is Priority.LATENCY_CRITICAL or forming.pressed:
            return -math.inf
        alike = [r for r in work if r.may_join(request)]
        if rows_of(alike) >= min(self.batch.preferred_batch_sizes, default=self.batch.max_batch_size):
            return -math.inf
        oldest = min(r.arrival for r in alike)
        if any(r.priority < request.priority and r.arrival >= oldest for r in self.came_in):
            return -math.inf
        return oldest + self.batch.max_queue_delay

    def _owed(self, priority: Priority, slot: Slot) -> Priority | None:
        """The first class below `priority` that is backlogged and has had less than its share of the engine's time."""
        for below in (Priority.THROUGHPUT, Priority.BACKGROUND):
            if below > priority and self._work(below, slot):
                served = opportunity = 0.0
                for call, seconds in self.ended:
                    rows = call.rows_by_class()[below]
                    if rows or call.backlog[below]:
                        served += seconds / call.rows * rows
                        opportunity += seconds
                if served < self.policy.share_by_class()[below] * opportunity:
                    return below
        return None

    # ----------------------------------------------------------------------------------------- batches

    def _lead(self, head: Request, forming: Forming) -> Call | None:
        """A batch led by `head`. A class whose share is due gets rows in it, else a call of at most a slice."""
        limit = self._limit(head, forming.slot)
        owed = self._owed(head.priority, forming.slot)
        if owed is None:
            return self._form(head, limit, forming)
        work = self._work(owed, forming.slot)
        guests = [r for r in work if r.may_join(head)]
        if guests:
            guest = min(guests, key=self._place)
            if head.rows + guest.rows <= limit:
                share = math.ceil(self.policy.share_by_class()[owed] * self.batch.max_batch_size)
                reserved = min(max(guest.rows, share), limit - head.rows, rows_of(guests))
                return self._form(head, limit, forming, owed, reserved)
        head = min(work, key=self._place)
        return self._form(head, self._limit(head, forming.slot, self.batch.background_slice), forming)

    def _form(
        self, head: Request, limit: int, forming: Forming, owed: Priority | None = None, reserved: int = 0
    ) -> Call | None:
        members: list[Request] = []
        limit = max(limit, head.rows)
        self._fill(members, head, head.priority, max(limit - reserved, head.rows), forming, reserved)
        if not members or not head.batchable:
            return Call(members, head.priority) if members else None
        leaders = rows_of(members)
        if owed is not None:
            self._fill(members, head, owed, leaders + reserved, forming)
            if any(r.may_join(head) for r in self._work(head.priority, forming.slot)):
                return Call(members, head.priority)  # they stood back for that share, not for others
        model = forming.slot.latency[head.shape]
        alone = model.upper(leaders)
        for below in [p for p in Priority if p > head.priority and alone is not None]:
            within = (1 + self.batch.fill_slack) * (alone or 0.0)
            in_time = min(member.deadline for member in members) - forming.now
            room = model.rows_within(min(within, in_time), rows_of(members), limit) if rows_of(members) < limit else 0
            self._fill(members, head, below, room, forming)
        return Call(members, head.priority)

    def _fill(
        self,
        members: list[Request],
        head: Request,
        priority: Priority,
        limit: int,
        forming: Forming,
        reserved: int = 0,
    ) -> None:
        """Move the requests of a class that may share a call with `head` into the batch, in order, up to `limit` rows.
        Who is due to expire is not run. If that is the leader, the class has another."""
        cost = dict(self.cost)
        while True:
            candidates = [r for r in self._work(priority, forming.slot) if r is head or r.may_join(head)]
            if not candidates:
                return
            place = lambda r: (cost.get(r.tenant, 0.0), r.urgency, r.number)  # noqa: E731
            request = min(candidates, key=place)
            if rows_of(members) + request.rows > limit:
                return
            self.queued.remove(request)
            if self._is_late(request, min(limit, rows_of(members + candidates)) + reserved, forming, head.shape):
                forming.late.append(request)
                if not members:
                    return
            else:
                members.append(request)
                if self.policy.tenant_fairness:
                    cost[request.tenant] += request.rows * (self.row_time or 1e-6)

    def _is_late(self, request: Request, rows: int, forming: Forming, shape: Shape | None = None) -> bool:
        """Due to expire: the deadline is earlier than now + the predicted time of the batch that it would join, the
        way back of its answers included. Without measurements the prediction is 0."""
        predicted = forming.slot.latency[shape or request.shape].lower(rows, forming.now)
        answered = forming.now + predicted
        if predicted:
            answered += forming.slot.delivery.expected
        return request.deadline < answered

    def _limit(self, head: Request, slot: Slot, within: float = math.inf) -> int:
        """The rows that a batch led by `head` may have: with preferred sizes the largest that is filled."""
        if not head.batchable:
            return head.rows
        limit = self._row_limit(head, slot, within)
        waiting = min(limit, rows_of(r for r in self._work(head.priority, slot) if r.may_join(head)))
        return max((size for size in self.batch.preferred_batch_sizes if size <= waiting), default=limit)

    def _row_limit(self, head: Request, slot: Slot, within: float = math.inf) -> int:
        if head.priority is Priority.THROUGHPUT and self.batch.max_batch_time is not None:
            within = min(within, self.batch.max_batch_time)
        if head.priority is Priority.BACKGROUND:
            within = max(self.batch.background_slice, slot.latency[head.shape].upper(head.rows) or 0.0)
        if within == math.inf:
            return self.batch.max_batch_size
        return slot.latency[head.shape].rows_within(within, 1, self.batch.max_batch_size)

    # ------------------------------------------------------------------------------------------- after

    def finish(self, call: Call, seconds: float) -> None:
        self.ended.append((call, seconds))
        per_row = seconds / call.rows
        if not call.members[0].stream:
            self.row_time += 0.2 * (per_row - self.row_time) if self.row_time else per_row
        if self.policy.tenant_fairness:
            for request in call.members:
                self.cost[request.tenant] += per_row * request.rows
