"""RequestQueue: the bounded queue in front of an engine's slots, and the one place that decides what runs next.

Every change of state is one synchronous call that returns what to do: `push` who was evicted, `pull` the next
batch, who is too late for it and when to look again. The caller owns the lock around a queue and passes `now`.
What is not here: futures, timers and counters of outcomes (runtime), stacking rows (core.batch).
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from kapsl_scheduler.core.batch import Batch, BatchPolicy, Pending, Shape, State
from kapsl_scheduler.core.lanes import ClassQueue, Lane, Slot, most_urgent
from kapsl_scheduler.core.latency import LatencyModel
from kapsl_scheduler.core.shares import ShareWindow, TenantLedger
from kapsl_scheduler.errors import Overloaded, ResourceExhausted
from kapsl_scheduler.types import Priority

__all__ = ["DEFAULT_HORIZON", "Pull", "QueueOverflowPolicy", "QueuePolicy", "RequestQueue"]

DEFAULT_HORIZON: Final = 1.0
"""Seconds: a request without a deadline is ordered as if it had this one."""

_UNMEASURED_ROW: Final = 1e-6  # seconds; only tells tenants apart until the first call has been timed

LIVE: Final = Priority.LATENCY_CRITICAL
THROUGHPUT: Final = Priority.THROUGHPUT
BACKGROUND: Final = Priority.BACKGROUND
WAITING: Final = State.WAITING
QUEUED: Final = State.QUEUED
RUNNING: Final = State.RUNNING
RETURNED: Final = State.RETURNED
DONE: Final = State.DONE


class QueueOverflowPolicy(enum.Enum):
    """What a full queue does with one more request.

    `BLOCK`: it waits for room, in class, then arrival order; nothing is evicted. `DROP_NEWEST`: the newest
    request of the lowest class below it makes room, else it is refused. `DROP_OLDEST`: the oldest request of
    the lowest class not above it makes room, else it is refused.
    """

    BLOCK = "block"
    DROP_NEWEST = "drop_newest"
    DROP_OLDEST = "drop_oldest"


class QueuePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How much may be queued, and what happens beyond.

    `max_size` counts queued requests of all classes, `max_bytes` their inputs; neither counts what runs or waits
    for room. `block_timeout` (seconds, None: no limit) and `max_waiting` (requests) bound the wait for room.
    `shares`: the fraction of engine time that a class below `LATENCY_CRITICAL` keeps while it is backlogged, one
    number for both or a mapping. `tenant_fairness`: serve the `metadata.tenant` with the least cost served first.
    """

    max_size: int = 1024
    max_bytes: int | None = None
    overflow: QueueOverflowPolicy = QueueOverflowPolicy.BLOCK
    block_timeout: float | None = None
    max_waiting: int = 1024
    shares: float | Mapping[Priority, float] = 0.05
    tenant_fairness: bool = False

    def __post_init__(self) -> None:
        # A policy may be given by its value, as in "block".
        msgspec.structs.force_setattr(self, "overflow", QueueOverflowPolicy(self.overflow))
        if self.max_size < 1:
            raise ValueError(f"max_size: expected at least 1, got {self.max_size}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes: expected at least 1 or None, got {self.max_bytes}")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting: expected at least 0, got {self.max_waiting}")
        if self.block_timeout is not None and not self.block_timeout >= 0:
            raise ValueError(f"block_timeout: expected at least 0 seconds or None, got {self.block_timeout}")
        shares = self.share_by_class()
        if any(not 0 <= share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
            raise ValueError(f"shares: expected fractions from 0 that add up to less than 1, got {self.shares}")

    def share_by_class(self) -> dict[Priority, float]:
        """The share of each class below the first."""
        below = (Priority.THROUGHPUT, Priority.BACKGROUND)
        if isinstance(self.shares, Mapping):
            return {priority: self.shares.get(priority, 0.05) for priority in below}
        return dict.fromkeys(below, self.shares)


class Pull(msgspec.Struct):
    """What a slot should do now: run `batch` if there is one, else look again at `wake_at` (infinite: when told).

    `expired` left the queue because their deadline comes before the batch that they would join is done.
    """

    batch: Batch | None
    expired: Sequence[Pending]
    wake_at: float


class RequestQueue:
    """Requests of all classes, in the order in which they will run. Not thread-safe: the caller holds a lock.

    `slots` is the number of slots that pull from it, for the estimate in `Overloaded.retry_after`.
    """

    def __init__(self, batch: BatchPolicy, policy: QueuePolicy, *, slots: int = 1) -> None:
        self.policy = policy
        self.batch_policy = batch
        self.slots = slots
        self.queued = 0
        self.queued_bytes = 0
        self.background_bound = batch.background_slice
        self._classes = tuple(ClassQueue(priority) for priority in Priority)
        self._waiting = tuple(deque[Pending]() for _ in Priority)
        self._waiting_count = 0
        self._max_size, self._max_bytes = policy.max_size, policy.max_bytes
        self._holds_back = batch.max_queue_delay > 0
        self._fair = policy.tenant_fairness
        self._sequence = 0
        self._shares = ShareWindow(policy.share_by_class())
        self._tenants = TenantLedger()
        self._row_time = 0.0  # smoothed engine seconds per row, for retry_after

    # ------------------------------------------------------------------------------------------- figures

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return self._waiting_count

    def queued_by_class(self) -> tuple[int, ...]:
        return tuple(queue.count for queue in self._classes)

    @property
    def rows(self) -> int:
        """Rows queued, those waiting for room not among them."""
        return sum(queue.rows for queue in self._classes)

    def has_any(self) -> bool:
        """Whether anything is queued or returned."""
        return self.queued > 0 or any(queue.returned for queue in self._classes)

    def has_work(self, slot: Slot) -> bool:
        """Whether there is anything that the slot might run, now or after a delay."""
        for queue in self._classes:
            if queue.count and queue.lanes(slot):
                return True
            if queue.returned and queue.has_returned(slot):
                return True
        return False

    def is_background_only(self) -> bool:
        """Whether there is work, and all of it is background work that nobody waits to get past."""
        background = self._classes[BACKGROUND]
        above = any(queue.returned for queue in self._classes)
        return self.queued == background.count > 0 and not above and not self._waiting_count

    def drain_time(self) -> float:
        """Predicted seconds until what is queued now has run."""
        return self.rows * self._row_time / max(self.slots, 1)

    # ---------------------------------------------------------------------------------------------- push

    def push(
        self,
        item: Pending,
        now: float,
        overflow: QueueOverflowPolicy | None = None,
        *,
        may_wait: bool = True,
    ) -> Sequence[Pending]:
        """Queue a request; afterwards its state says QUEUED or WAITING (for room). Returns who was evicted for it.

        Raises `Overloaded` if there is no room and the policy refuses it, `ResourceExhausted` if it alone is
        larger than `max_bytes`.
        """
        self._sequence += 1
        item.sequence = self._sequence
        most = self._max_bytes
        if most is not None and item.nbytes > most:
            raise ResourceExhausted(f"inputs of {item.nbytes} bytes exceed the queue's max_bytes of {most}")
        barred = self._waiting_count and any(self._waiting[: item.priority + 1])
        if not barred and self.queued < self._max_size and (most is None or self._fits(item)):
            self._admit(item)
            return ()
        overflow = overflow or self.policy.overflow
        if overflow is QueueOverflowPolicy.BLOCK:
            if not may_wait or self._waiting_count >= self.policy.max_waiting:
                raise self._overloaded("the queue is full")
            item.state = WAITING
            self._waiting[item.priority].append(item)
            self._waiting_count += 1
            return ()
        victims = self._victims(item, overflow)
        if not victims:
            raise self._overloaded("the queue is full")
        for victim in victims:
            self._discard(victim)
        self._admit(item)
        self._promote()  # the victims may have been larger than what they made room for
        return victims

    def _fits(self, item: Pending) -> bool:
        return self.queued < self._max_size and (
            self._max_bytes is None or self.queued_bytes + item.nbytes <= self._max_bytes
        )

    def _admit(self, item: Pending) -> None:
        self._classes[item.priority].push(item)
        self.queued += 1
        self.queued_bytes += item.nbytes
        if self._holds_back:
            for below in self._classes[item.priority + 1 :]:
                below.urged = max(below.urged, item.arrival)  # who waited for room may have arrived before the last
        if self._fair:
            self._tenants.arrive(item.tenant)

    def _victims(self, item: Pending, overflow: QueueOverflowPolicy) -> list[Pending]:
        """Who must go for `item` to fit; empty if even all who may go would not do."""
        newest = overflow is QueueOverflowPolicy.DROP_NEWEST
        highest = item.priority + 1 if newest else item.priority
        places = self.policy.max_size - self.queued
        room = math.inf if self.policy.max_bytes is None else self.policy.max_bytes - self.queued_bytes
        victims: list[Pending] = []
        for queue in reversed(self._classes[highest:]):
            for victim in queue.newest_first() if newest else queue.oldest_first():
                if places >= 1 and room >= item.nbytes:
                    return victims
                victims.append(victim)
                places += 1
                room += victim.nbytes
        return victims if places >= 1 and room >= item.nbytes else []

    def _overloaded(self, message: str) -> Overloaded:
        return Overloaded(
            f"{message}: {self.queued} queued (max_size {self.policy.max_size}), {self.waiting} waiting for room",
            retry_after=self.drain_time(),
        )

    def evicted(self) -> Overloaded:
        """The error for a request that was evicted."""
        return self._overloaded("evicted for a more urgent or newer request")

    # -------------------------------------------------------------------------------------------- remove

    def remove(self, item: Pending) -> bool:
        """Take out a request that is waiting, queued or returned; False if it runs or is done."""
        state = item.state
        if state is QUEUED:
            self._discard(item)
            self._promote()
        elif state is WAITING:
            item.state = DONE
            self._waiting[item.priority].remove(item)
            self._waiting_count -= 1
            self._promote()
        elif state is RETURNED:
            item.state = DONE
            self._classes[item.priority].returned.remove(item)
        else:
            return False
        return True

    def clear(self) -> tuple[list[Pending], list[Pending]]:
        """Take everything out. Returns who waited for room, and who was queued or returned."""
        waiting = [item for line in self._waiting for item in line]
        for item in waiting:
            self.remove(item)
        admitted: list[Pending] = []
        for queue in self._classes:
            admitted += queue.returned
            admitted += queue.oldest_first()
        for item in admitted:
            self.remove(item)
        for queue in self._classes:
            queue.forget()
        return waiting, admitted

    def unpin(self, engine: int) -> None:
        """Requests pinned to an engine that is lost may run anywhere."""
        for queue in self._classes:
            queue.unpin(engine)
        for item in (item for line in self._waiting for item in line if item.pin == engine):
            item.pin = None

    def _discard(self, item: Pending) -> None:
        item.state = DONE
        self._classes[item.priority].discard(item)
        self.queued -= 1
        self.queued_bytes -= item.nbytes
        if self._fair:
            self._tenants.leave(item.tenant)

    def _promote(self) -> None:
        """Let those who wait for room in, in class, then arrival order, as far as there is room."""
        if not self._waiting_count:
            return
        for waiting in self._waiting:
            while waiting:
                if not self._fits(waiting[0]):
                    return
                self._waiting_count -= 1
                self._admit(waiting.popleft())

    # ---------------------------------------------------------------------------------------------- pull

    def pull(self, now: float, slot: Slot) -> Pull:
        """The next batch for a free slot; its members are RUNNING afterwards."""
        expired: list[Pending] = []
        while True:
            pressed = self._waiting_count > 0
            if pressed:
                self._promote_leaders(slot)
            found = len(expired)
            batch, wake_at = self._next_batch(now, slot, expired, pressed)
            if not pressed:
                break
            self._promote()
            if batch is not None or len(expired) == found:
                break
            # Only places of those who are too late were freed: this slot serves whoever took them.
        return Pull(batch, expired, wake_at)

    def give_back(self, items: Iterable[Pending]) -> None:
        """Members of a failed call come back to run alone, ahead of their class. They stay among the running: they
        take no room in the queue."""
        for item in items:
            item.state = RETURNED
            self._classes[item.priority].returned.append(item)

    def finish(self, batch: Batch, elapsed: float, now: float) -> None:
        """A call ended after `elapsed` seconds of engine time: the shares' and the tenants' accounts."""
        per_row = elapsed / batch.rows
        if batch.members[0].stream is None:  # a stream takes the time that its reader takes
            self._row_time += 0.2 * (per_row - self._row_time) if self._row_time else per_row
        if batch.backlog[1] or batch.backlog[2] or batch.rows_by_class[LIVE] != batch.rows:
            self._shares.record(now, [per_row * rows for rows in batch.rows_by_class], batch.backlog)
        if self._fair:
            for item in batch.members:
                self._tenants.charge(item.tenant, per_row * item.rows)

    def _promote_leaders(self, slot: Slot) -> None:
        """Those who wait for room and outrank all that is queued go straight through the full queue into the batch
        that this pull is about to form; the bound holds again before anybody looks."""
        waiting = next(line for line in self._waiting if line)
        first = waiting[0]
        priority = first.priority
        outranked = not any(queue.count or queue.returned for queue in self._classes[: priority + 1])
        if not outranked or self._due_below(priority, slot) is not None:
            return
        limit = 0
        if first.shape.batchable and first.stream is None and not self.batch_policy.preferred_batch_sizes:
            limit = self._row_limit(priority, slot.latency[first.shape], first.rows)
        rows = 0
        while waiting and (rows == 0 or rows + waiting[0].rows <= limit):
            item = waiting[0]
            if item.shape is not first.shape or not slot.accepts(item.pin, stream=item.stream is not None):
                break
            if (item.stream is None) != (first.stream is None):
                break
            rows += item.rows
            self._waiting_count -= 1
            self._admit(waiting.popleft())

    def _next_batch(self, now: float, slot: Slot, expired: list[Pending], pressed: bool) -> tuple[Batch | None, float]:
        """The next batch, and when to look again if there is none. Nothing is held back while others are `pressed` to
        wait for room."""
        for queue in self._classes:
            if queue.returned and (batch := self._alone(queue, now, slot, expired)) is not None:
                return batch, math.inf
            # A leader that turns out to be too late makes no batch: then the next most urgent leads.
            while queue.count and (lanes := queue.lanes(slot)):
                ready, held_until = self._ready(queue, lanes, now, pressed)
                lane = most_urgent(ready, self._tenants.cost)
                if lane is None:
                    return None, held_until  # held back on purpose, and what is below with it
                batch = self._lead(queue, lane, _Filling(now, slot, expired))
                if batch is not None:
                    return batch, math.inf
        return None, math.inf

    def _alone(self, queue: ClassQueue, now: float, slot: Slot, expired: list[Pending]) -> Batch | None:
        """The next request that came back from a failed call, in a batch of its own."""
        while (item := queue.next_returned(slot)) is not None:
            if item.deadline < slot.answers_by(slot.latency[item.shape], item.rows, now):
                item.state = DONE
                expired.append(item)
                continue
            item.state = RUNNING
            filling = _Filling(now, slot, expired)
            filling.members.append(item)
            filling.rows = filling.rows_by_class[queue.priority] = item.rows
            return self._batch(filling, queue.priority, item.shape)
        return None

    def _ready(self, queue: ClassQueue, lanes: list[Lane], now: float, pressed: bool) -> tuple[list[Lane], float]:
        """The lanes that may start, and when the first of the others may."""
        policy = self.batch_policy
        if not policy.max_queue_delay or queue.priority is LIVE or pressed:
            return lanes, math.inf
        enough = min(policy.preferred_batch_sizes, default=policy.max_batch_size)
        ready: list[Lane] = []
        together: dict[Shape, list[Lane]] = {}  # lanes that would share a batch are held together
        for lane in lanes:
            if lane.stream or not lane.shape.batchable:
                ready.append(lane)
            else:
                together.setdefault(lane.shape, []).append(lane)
        held_until = math.inf
        for alike in together.values():
            oldest = min(item.arrival for lane in alike for item in lane)
            full = sum(lane.rows for lane in alike) >= enough
            if full or oldest <= queue.urged or oldest + policy.max_queue_delay <= now:
                ready += alike
            else:
                held_until = min(held_until, oldest + policy.max_queue_delay)
        return ready, held_until

    def _due_below(self, priority: Priority, slot: Slot) -> ClassQueue | None:
        """The class below `priority` whose share of engine time is due and that has work for the slot."""
        for queue in self._classes[priority + 1 :]:
            if queue.count and self._shares.due(queue.priority) and queue.lanes(slot):
                return queue
        return None

    def _lead(self, queue: ClassQueue, lane: Lane, filling: _Filling) -> Batch | None:
        """A batch led by `lane`, with the rows in it that a lower class is owed; where those do not fit in, one
        call led by the class that is owed. None if all in reach were too late."""
        below = self.queued > queue.count
        owed = self._due_below(queue.priority, filling.slot) if below else None
        if owed is None or self._reserve(filling, queue, lane, owed):
            return self._form(queue, lane, filling)
        leading = most_urgent(owed.lanes(filling.slot), self._tenants.cost)
        assert leading is not None, "a class whose share is due has work"
        return self._form(owed, leading, filling, self.batch_policy.background_slice)

    def _reserve(self, filling: _Filling, queue: ClassQueue, lane: Lane, owed: ClassQueue) -> bool:
        """Keep rows for the class `owed` in the batch that `lane` is to lead. False if its first would not fit in."""
        guests = self._alike(owed, lane, filling.slot)
        guest = most_urgent(guests, self._tenants.cost)
        if guest is None:
            return False
        filling.model = filling.slot.latency[lane.shape]
        wanted = guest.first().rows
        room = self._limit(queue, lane, filling) - lane.first().rows
        if wanted > room:
            return False
        share = math.ceil(self._shares.shares[owed.priority] * self.batch_policy.max_batch_size)
        filling.owed = owed
        filling.reserved = min(max(wanted, share), room, sum(guest.rows for guest in guests))
        return True

    def _form(self, queue: ClassQueue, lane: Lane, filling: _Filling, within: float = math.inf) -> Batch | None:
        """Take the leaders, then who rides along. `within` bounds the predicted time of the batch."""
        filling.model = filling.slot.latency[lane.shape]
        limit = self._limit(queue, lane, filling, within)
        self._take(filling, queue, self._alike(queue, lane, filling.slot), limit - filling.reserved)
        if not filling.members:
            return None
        if self.queued > queue.count:
            self._ride(filling, queue, lane, limit)
        if queue.priority is BACKGROUND:
            predicted = filling.model.upper(filling.rows) or 0.0
            self.background_bound = max(self.background_bound, predicted)
        return self._batch(filling, queue.priority, lane.shape)

    def _limit(self, queue: ClassQueue, lane: Lane, filling: _Filling, within: float = math.inf) -> int:
        """The most rows of a batch that `lane` leads. One request always may, whatever its rows."""
        own = lane.first().rows
        if lane.stream or not lane.shape.batchable:
            return own
        limit = self._row_limit(queue.priority, filling.model, own, within)
        if self.batch_policy.preferred_batch_sizes:
            limit = self._preferred(limit, self._alike(queue, lane, filling.slot))
        return max(limit, own)

    def _row_limit(self, priority: Priority, model: LatencyModel, own: int, within: float = math.inf) -> int:
        """The most rows that a batch led by the class may have, its leader's `own` aside. Where the leader alone is
        beyond the background slice, rows that add nothing to its time may come with it: the bound stays what it is."""
        policy = self.batch_policy
        if priority is BACKGROUND:
            within = max(policy.background_slice, model.upper(own) or 0.0)
        elif priority is THROUGHPUT:
            within = min(within, policy.max_batch_time or math.inf)
        if within == math.inf:
            return policy.max_batch_size
        return model.rows_within(within, 1, policy.max_batch_size)

    def _preferred(self, limit: int, lanes: list[Lane]) -> int:
        """The largest preferred size that the waiting rows fill; without one, `limit` itself."""
        available = min(limit, sum(lane.rows for lane in lanes))
        return max((size for size in self.batch_policy.preferred_batch_sizes if size <= available), default=limit)

    def _alike(self, queue: ClassQueue, lane: Lane, slot: Slot) -> list[Lane]:
        """The lanes of a class whose rows may join those of `lane` in one call on the slot, itself among them."""
        if lane.stream or not lane.shape.batchable:
            return [lane] if lane.priority is queue.priority else []
        if lane.count == queue.count and lane.priority is queue.priority:
            return [lane]
        return [other for other in queue.lanes(slot) if other.shape is lane.shape and not other.stream]

    def _take(self, filling: _Filling, queue: ClassQueue, lanes: list[Lane], limit: int) -> None:
        """Move requests from the lanes into the batch, in order, up to `limit` rows in all. Who would be too late for
        the batch is dropped instead; if that is its leader, the class may have a more urgent one elsewhere."""
        one_by_one = len(lanes) > 1
        cost = self._tenants.cost.copy() if self._fair else {}
        latest = filling.ends_by(lanes, limit)
        while (lane := most_urgent(lanes, cost)) is not None:
            first = len(filling.members)
            rows = lane.take(limit - filling.rows, latest, filling.members, 1 if one_by_one else math.inf)
            taken = filling.members[first:] if first else filling.members
            filling.rows += rows
            filling.rows_by_class[queue.priority] += rows
            self._left(queue, taken, rows)
            if one_by_one and taken:
                if self._fair:
                    cost[taken[0].tenant] += rows * (self._row_time or _UNMEASURED_ROW)
                continue
            head = lane.head()
            if head is None or filling.rows + head.rows > limit or head.deadline >= latest:
                break
            self._discard(head)
            filling.expired.append(head)
            if not filling.members:
                break
            latest = filling.ends_by(lanes, limit)

    def _left(self, queue: ClassQueue, items: Sequence[Pending], rows: int) -> None:
        """Account for requests that have just been taken out of their lane."""
        queue.left(len(items), rows)
        self.queued -= len(items)
        self.queued_bytes -= sum([item.nbytes for item in items])
        if self._fair:
            for item in items:
                self._tenants.leave(item.tenant)

    def _ride(self, filling: _Filling, queue: ClassQueue, lane: Lane, limit: int) -> None:
        """Rows of lower classes join while the predicted time stays within the slack, and nobody gets late by it; a
        class whose share is due gets the rows reserved for it in any case."""
        slot, model = filling.slot, filling.model
        alone = model.upper(filling.rows)
        if filling.owed is not None:
            room = filling.rows + filling.reserved
            filling.reserved = 0
            self._take(filling, filling.owed, self._alike(filling.owed, lane, slot), room)
            if any(leading.count for leading in self._alike(queue, lane, slot)):
                return  # leaders stood back for that share, not for others
        if alone is None:
            return
        within = (1 + self.batch_policy.fill_slack) * alone
        for other in self._classes[queue.priority + 1 :]:
            if other.count and filling.rows < limit and (lanes := self._alike(other, lane, slot)):
                in_time = min([member.deadline for member in filling.members]) - filling.now
                room = model.rows_within(min(within, in_time), filling.rows, limit)
                if room > filling.rows:
                    self._take(filling, other, lanes, room)

    def _batch(self, filling: _Filling, leader: Priority, shape: Shape) -> Batch:
        return Batch(
            members=filling.members,
            rows=filling.rows,
            shape=shape,
            leader=leader,
            rows_by_class=tuple(filling.rows_by_class),
            backlog=tuple([queue.count > 0 for queue in self._classes]),
            started=filling.now,
        )

    # ---------------------------------------------------------------------------------------- self-check

    def validate(self) -> None:
        """Check every count against the containers; for tests. Raises `AssertionError`."""
        for queue in self._classes:
            items = list(queue.oldest_first())
            assert queue.count == len(items) == len({id(item) for item in items}), "count of a class"
            assert queue.rows == sum(item.rows for item in items), "rows of a class"
            assert all(item.priority is queue.priority for item in items), "a request in another class's queue"
        everything = [item for queue in self._classes for item in queue.oldest_first()]
        assert self.queued == len(everything) <= self.policy.max_size, "queued"
        assert self.queued_bytes == sum(item.nbytes for item in everything), "bytes"
        assert self.policy.max_bytes is None or self.queued_bytes <= self.policy.max_bytes, "max_bytes"
        assert self._waiting_count == sum(map(len, self._waiting)) <= self.policy.max_waiting, "waiting"
        first = next((line[0] for line in self._waiting if line), None)
        assert first is None or not self._fits(first), "somebody waits for room that is there"


class _Filling:
    """A batch in the making."""

    __slots__ = ("expired", "members", "model", "now", "owed", "reserved", "rows", "rows_by_class", "slot")

    def __init__(self, now: float, slot: Slot, expired: list[Pending]) -> None:
        self.now = now
        self.slot = slot
        self.expired = expired
        self.members: list[Pending] = []
        self.rows = 0
        self.rows_by_class = [0] * len(Priority)
        self.owed: ClassQueue | None = None  # the class whose share is due, and the rows kept for it
        self.reserved = 0
        self.model: LatencyModel

    def ends_by(self, lanes: list[Lane], limit: int) -> float:
        """The moment before which the batch will surely not be answered, if it takes the lanes' rows up to the limit,
        and those reserved."""
        available = self.rows + sum([lane.rows for lane in lanes])
        return self.slot.answers_by(self.model, min(limit, available) + self.reserved, self.now)
