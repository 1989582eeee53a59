"""Requests, shapes and slots for the tests of the core: plain values, every field with a default."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from kapsl_scheduler.core.batch import Batch, BatchPolicy, Pending, Shape
from kapsl_scheduler.core.lanes import Slot
from kapsl_scheduler.core.latency import LatencyTable
from kapsl_scheduler.core.queue import DEFAULT_HORIZON, Pull, QueuePolicy, RequestQueue
from kapsl_scheduler.types import Priority

LIVE, THROUGHPUT, BACKGROUND = Priority
SHAPE = Shape("rows of one kind", batchable=True)
OTHER = Shape("rows of another kind", batchable=True)
LONE = Shape("never batched", batchable=False)


@cache
def _shape_of(kind: Shape, names: tuple[str, ...]) -> Shape:
    return Shape(kind.description, names, batchable=kind.batchable)


def pending(
    priority: Priority = LIVE,
    rows: int = 1,
    *,
    shape: Shape = SHAPE,
    at: float = 0.0,
    timeout: float | None = None,
    nbytes: int = 1,
    name: Any = None,
    inputs: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Pending:
    """A request that arrives at `at`; `name` (any value) is what tests know it by."""
    deadline = math.inf if timeout is None else at + timeout
    if inputs:
        shape = _shape_of(shape, tuple(inputs))
    item = Pending(
        inputs=tuple((inputs or {}).values()),
        rows=rows,
        shape=shape,
        bare=fields.pop("bare", False),
        priority=priority,
        arrival=at,
        deadline=deadline,
        urgency=at + DEFAULT_HORIZON if timeout is None else deadline,
        timeout=timeout,
        nbytes=nbytes,
        future=name,
        **fields,
    )
    item.set_apart()
    return item


def several(count: int, priority: Priority = LIVE, rows: int = 1, **fields: Any) -> list[Pending]:
    return [pending(priority, rows, **fields) for _ in range(count)]


def queue_of(*items: Pending, slots: int = 1, policy: QueuePolicy | None = None, **batch: Any) -> RequestQueue:
    """A queue with a batch policy of these fields, and these requests pushed at their arrival."""
    queue = RequestQueue(BatchPolicy(**batch), policy or QueuePolicy(), slots=slots)
    push_all(queue, items)
    return queue


def push_all(queue: RequestQueue, items: Iterable[Pending]) -> None:
    for item in items:
        queue.push(item)


def slot_of(engine: int = 0, times: dict[int, float] | None = None, *, shape: Shape = SHAPE, **kinds: bool) -> Slot:
    """A slot of an engine that has been measured: `times` gives seconds by rows, measured often enough at moment 0."""
    slot = Slot(engine, LatencyTable(), **kinds)
    measure(slot, times or {}, shape=shape)
    return slot


def measure(slot: Slot, times: dict[int, float], *, shape: Shape = SHAPE, now: float = 0.0) -> None:
    for _ in range(3):
        for rows, seconds in times.items():
            slot.latency[shape].observe(rows, seconds, now)


def members(pull: Pull) -> list[Pending]:
    """The members of a pull's batch; none if it has no batch."""
    return [] if pull.batch is None else pull.batch.members


def names(items: Sequence[Pending]) -> list[Any]:
    return [item.future for item in items]


def drained(queue: RequestQueue, slot: Slot, now: float = 0.0) -> list[list[Pending]]:
    """The batches that a slot would run one after another, if calls took no time."""
    batches = []
    while (batch := queue.pull(now, slot).batch) is not None:
        batches.append(batch.members)
    return batches


def finish(queue: RequestQueue, batch: Batch | None, elapsed: float, now: float) -> None:
    assert batch is not None
    queue.finish(batch, elapsed, now)
