"""How the next batch forms: which class leads, who is owed a share, who rides along, and how large it may be.

What is not here: who is let into the queue and who must go when it is full (core.queue), the containers (core.lanes).
"""

from __future__ import annotations

import math
from typing import Final

from kapsl_scheduler.core.batch import Batch, BatchPolicy, Pending, Shape, State
from kapsl_scheduler.core.lanes import Backlog, ClassQueue, Lane, Slot, most_urgent
from kapsl_scheduler.core.latency import LatencyModel
from kapsl_scheduler.core.shares import ShareWindow
from kapsl_scheduler.types import Priority

__all__ = ["BatchFormer"]

_UNMEASURED_ROW: Final = 1e-6  # seconds; only tells tenants apart until the first call has been timed

LIVE: Final = Priority.LATENCY_CRITICAL
THROUGHPUT: Final = Priority.THROUGHPUT
BACKGROUND: Final = Priority.BACKGROUND
RUNNING: Final = State.RUNNING
DONE: Final = State.DONE


class BatchFormer:
    """Forms batches out of a backlog by a policy; `shares` is what the classes below the first keep of engine time.

    `row_time` is the smoothed seconds of engine time per row, 0 before the first call; `background_bound` what a batch
    of background work may add to a live request, in seconds.
    """

    def __init__(self, policy: BatchPolicy, backlog: Backlog, shares: ShareWindow) -> None:
        self.row_time = 0.0
        self.background_bound = policy.background_slice
        self._policy = policy
        self._backlog = backlog
        self._classes = backlog.classes
        self._tenants = backlog.tenants
        self._shares = shares
        whole = not backlog.fair and not policy.preferred_batch_sizes
        uncut = whole and not policy.max_queue_delay and policy.max_batch_time is None
        self._uncut = (whole, uncut, False)  # by class: whether batches take all that is there, up to the largest size

    def ended(self, batch: Batch, elapsed: float, now: float) -> None:
        """A call ended after `elapsed` seconds of engine time: the shares' and the tenants' accounts."""
        per_row = elapsed / batch.rows
        if batch.members[0].stream is None:  # a stream takes the time that its reader takes
            self.row_time += 0.2 * (per_row - self.row_time) if self.row_time else per_row
        if batch.backlog[1] or batch.backlog[2] or batch.rows_by_class[LIVE] != batch.rows:
            self._shares.record(now, [per_row * rows for rows in batch.rows_by_class], batch.backlog)
        if self._backlog.fair:
            for item in batch.members:
                self._tenants.charge(item.tenant, per_row * item.rows)

    def plain_batch(self, now: float, slot: Slot) -> Batch | None:
        """The common case of `next_batch`, kept bare: one class has work, all in one lane, and nothing holds it back,
        cuts it or is too late for it. None if it is not so."""
        for queue in self._classes:
            if queue.returned:
                return None
            if queue.count:
                break
        lane = queue.only_lane()
        priority = queue.priority
        if lane is None or self._backlog.queued != queue.count or not self._uncut[priority]:
            return None
        shape = lane.shape
        if not shape.batchable or not slot.calls:
            return None
        limit = self._policy.max_batch_size
        latest = slot.answers_by(slot.latency[shape], min(limit, lane.rows), now)
        members = lane.take_single_rows(limit, latest)
        if members is None:
            return None
        rows = len(members)
        self._backlog.left(queue, members, rows)
        rows_by_class = (rows, 0, 0) if priority is LIVE else (0, rows, 0)
        left = queue.count > 0
        backlog = (left, False, False) if priority is LIVE else (False, left, False)
        return Batch(members, rows, shape, priority, rows_by_class, backlog, now)

    def next_batch(self, now: float, slot: Slot, expired: list[Pending], pressed: bool) -> tuple[Batch | None, float]:
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
        policy = self._policy
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
            if sum(lane.rows for lane in alike) >= enough:
                ready += alike
                continue
            oldest = min(item.arrival for lane in alike for item in lane)
            if oldest <= queue.urged or oldest + policy.max_queue_delay <= now:
                ready += alike
            else:
                held_until = min(held_until, oldest + policy.max_queue_delay)
        return ready, held_until

    def due_below(self, priority: Priority, slot: Slot) -> ClassQueue | None:
        """The class below `priority` whose share of engine time is due and that has work for the slot."""
        for queue in self._classes[priority + 1 :]:
            if queue.count and self._shares.due(queue.priority) and queue.lanes(slot):
                return queue
        return None

    def _lead(self, queue: ClassQueue, lane: Lane, filling: _Filling) -> Batch | None:
        """A batch led by `lane`, with the rows in it that a lower class is owed; where those do not fit in, one
        call led by the class that is owed. None if all in reach were too late."""
        below = self._backlog.queued > queue.count
        owed = self.due_below(queue.priority, filling.slot) if below else None
        if owed is None or self._reserve(filling, queue, lane, owed):
            return self._form(queue, lane, filling)
        leading = most_urgent(owed.lanes(filling.slot), self._tenants.cost)
        assert leading is not None, "a class whose share is due has work"
        return self._form(owed, leading, filling, self._policy.background_slice)

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
        share = math.ceil(self._shares.shares[owed.priority] * self._policy.max_batch_size)
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
        if self._backlog.queued > queue.count:
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
        if self._policy.preferred_batch_sizes:
            limit = self._preferred(limit, self._alike(queue, lane, filling.slot))
        return max(limit, own)

    def leader_limit(self, priority: Priority, model: LatencyModel, own: int) -> int:
        """The most rows that those who wait for room may bring to the batch that they are to lead. 0 with preferred
        sizes: those depend on who is queued."""
        return 0 if self._policy.preferred_batch_sizes else self._row_limit(priority, model, own)

    def _row_limit(self, priority: Priority, model: LatencyModel, own: int, within: float = math.inf) -> int:
        """The most rows that a batch led by the class may have, its leader's `own` aside. Where the leader alone is
        beyond the background slice, rows that add nothing to its time may come with it: the bound stays what it is."""
        policy = self._policy
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
        return max((size for size in self._policy.preferred_batch_sizes if size <= available), default=limit)

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
        cost = self._tenants.cost.copy() if self._backlog.fair else {}
        latest = filling.ends_by(lanes, limit)
        while (lane := most_urgent(lanes, cost)) is not None:
            first = len(filling.members)
            rows = lane.take(limit - filling.rows, latest, filling.members, 1 if one_by_one else math.inf)
            taken = filling.members[first:] if first else filling.members
            filling.rows += rows
            filling.rows_by_class[queue.priority] += rows
            self._backlog.left(queue, taken, rows)
            if one_by_one and taken:
                if self._backlog.fair:
                    cost[taken[0].tenant] += rows * (self.row_time or _UNMEASURED_ROW)
                continue
            head = lane.head()
            if head is None or filling.rows + head.rows > limit or head.deadline >= latest:
                break
            self._backlog.discard(head)
            filling.expired.append(head)
            if not filling.members:
                break
            latest = filling.ends_by(lanes, limit)

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
        within = (1 + self._policy.fill_slack) * alone
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
