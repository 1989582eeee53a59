"""RequestQueue: the bounded queue in front of an engine's slots, and the one place that decides who is let in.

Every change of state is one synchronous call that returns what to do: `push` who was evicted, `pull` the next
batch, who is too late for it and when to look again. The caller owns the lock around a queue and passes `now`.
What is not here: how a batch forms (core.forming), the containers (core.lanes), futures, timers and counters of
outcomes (runtime).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

import msgspec

from kapsl_scheduler.core.batch import Batch, Pending, State
from kapsl_scheduler.core.forming import BatchFormer
from kapsl_scheduler.core.lanes import Backlog, Slot
from kapsl_scheduler.core.policies import BatchPolicy, QueueOverflowPolicy, QueuePolicy
from kapsl_scheduler.core.shares import ShareWindow
from kapsl_scheduler.errors import Overloaded, ResourceExhausted
from kapsl_scheduler.types import Priority

__all__ = ["DEFAULT_HORIZON", "Pull", "QueueOverflowPolicy", "QueuePolicy", "RequestQueue"]

DEFAULT_HORIZON: Final = 1.0
"""Seconds: a request without a deadline is ordered as if it had this one."""

BACKGROUND: Final = Priority.BACKGROUND
WAITING: Final = State.WAITING
QUEUED: Final = State.QUEUED
RETURNED: Final = State.RETURNED
DONE: Final = State.DONE


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
        self.slots = slots
        self._backlog = Backlog(count_bytes=policy.max_bytes is not None, fair=policy.tenant_fairness)
        self._classes = self._backlog.classes
        self._former = BatchFormer(batch, self._backlog, ShareWindow(policy.share_by_class()))
        self._waiting = tuple(deque[Pending]() for _ in Priority)
        self._waiting_count = 0
        self._max_size, self._max_bytes = policy.max_size, policy.max_bytes
        self._holds_back = batch.max_queue_delay > 0
        self._sequence = 0

    # ------------------------------------------------------------------------------------------- figures

    @property
    def queued(self) -> int:
        """Requests queued, those waiting for room not among them."""
        return self._backlog.queued

    @property
    def queued_bytes(self) -> int:
        """Bytes of the queued requests' inputs; kept only where `max_bytes` bounds them."""
        return self._backlog.queued_bytes

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return self._waiting_count

    @property
    def rows(self) -> int:
        """Rows queued, those waiting for room not among them."""
        return self._backlog.rows

    @property
    def background_bound(self) -> float:
        """Seconds that background work may add to a live request."""
        return self._former.background_bound

    @property
    def returned(self) -> int:
        """Requests that wait to run alone."""
        return sum(len(queue.returned) for queue in self._classes)

    def queued_by_class(self) -> tuple[int, ...]:
        return tuple(queue.count for queue in self._classes)

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
        return self.rows * self._former.row_time / max(self.slots, 1)

    # ---------------------------------------------------------------------------------------------- push

    def push_many(self, items: Sequence[Pending]) -> int:
        """Queue requests, in the order of their arrival, up to the first for which there is no room at once. Returns
        how many; what becomes of that one is for `push` to say. The same as to push them one by one, at a fraction of
        the cost."""
        if self._waiting_count or self._max_bytes is not None:
            return 0
        room = self._max_size - self.queued
        if len(items) > room:
            items = items[:room]
        if not items:
            return 0
        first = items[0]
        shape, priority, apart = first.shape, first.priority, first.apart
        sequence = self._sequence
        alike = True
        for item in items:
            sequence += 1
            item.sequence = sequence
            if item.shape is not shape or item.priority is not priority or item.apart is not apart:
                alike = False
        self._sequence = sequence
        if alike:  # as mostly
            self._admit(items)
        else:
            for _, group in groupby(items, key=lambda item: (item.priority, item.apart, id(item.shape))):
                self._admit([*group])
        return len(items)

    def push(
        self,
        item: Pending,
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
        if not barred and self._fits(item):
            self._admit([item])
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
            self._backlog.discard(victim)
        self._admit([item])
        self._promote()  # the victims may have been larger than what they made room for
        return victims

    def _fits(self, item: Pending) -> bool:
        return self.queued < self._max_size and (
            self._max_bytes is None or self.queued_bytes + item.nbytes <= self._max_bytes
        )

    def _admit(self, items: Sequence[Pending]) -> None:
        """Queue requests of one class and one lane."""
        self._backlog.extend(items)
        if self._holds_back:
            arrival = max(item.arrival for item in items)  # who waited for room may have arrived before the last
            for below in self._classes[items[0].priority + 1 :]:
                below.urged = max(below.urged, arrival)

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
        error = self._overloaded("evicted for a more urgent or newer request")
        error.evicted = True
        return error

    # -------------------------------------------------------------------------------------------- remove

    def remove(self, item: Pending) -> bool:
        """Take out a request that is waiting, queued or returned; False if it runs or is done."""
        state = item.state
        if state is QUEUED:
            self._backlog.discard(item)
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
            item.unpin()

    def _promote(self) -> None:
        """Let those who wait for room in, in class, then arrival order, as far as there is room."""
        if not self._waiting_count:
            return
        for waiting in self._waiting:
            while waiting:
                if not self._fits(waiting[0]):
                    return
                self._waiting_count -= 1
                self._admit([waiting.popleft()])

    # ---------------------------------------------------------------------------------------------- pull

    def pull(self, now: float, slot: Slot) -> Pull:
        """The next batch for a free slot; its members are RUNNING afterwards."""
        if not self._waiting_count and (plain := self._former.plain_batch(now, slot)) is not None:
            return Pull(plain, (), math.inf)
        expired: list[Pending] = []
        while True:
            pressed = self._waiting_count > 0
            if pressed:
                self._promote_leaders(slot)
            found = len(expired)
            batch, wake_at = self._former.next_batch(now, slot, expired, pressed)
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
        self._former.ended(batch, elapsed, now)

    def _promote_leaders(self, slot: Slot) -> None:
        """Those who wait for room and outrank all that is queued go straight through the full queue into the batch
        that this pull is about to form; the bound holds again before anybody looks."""
        waiting = next(line for line in self._waiting if line)
        first = waiting[0]
        priority = first.priority
        outranked = not any(queue.count or queue.returned for queue in self._classes[: priority + 1])
        if not outranked or self._former.due_below(priority, slot) is not None:
            return
        limit = 0
        if first.shape.batchable and first.stream is None:
            limit = self._former.leader_limit(priority, slot.latency[first.shape], first.rows)
        rows = 0
        while waiting and (rows == 0 or rows + waiting[0].rows <= limit):
            item = waiting[0]
            if item.shape is not first.shape or not slot.accepts(item.pin, stream=item.stream is not None):
                break
            if (item.stream is None) != (first.stream is None):
                break
            rows += item.rows
            self._waiting_count -= 1
            self._admit([waiting.popleft()])

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
        if self.policy.max_bytes is not None:
            assert self.queued_bytes == sum(item.nbytes for item in everything) <= self.policy.max_bytes, "bytes"
        assert self._waiting_count == sum(map(len, self._waiting)) <= self.policy.max_waiting, "waiting"
        first = next((line[0] for line in self._waiting if line), None)
        assert first is None or not self._fits(first), "somebody waits for room that is there"
