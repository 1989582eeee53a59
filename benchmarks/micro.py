"""Suite `micro`: what the pieces of the hot path cost, in nanoseconds, without any loop or thread around them.

Push, pop, stack and split over the digits model's shapes, in batches of 32, with everything on: a class, a deadline,
a latency model that has measurements. A reference beside each says what numpy or a deque alone would cost.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.report import Label, Report
from kapsl_scheduler import BatchPolicy, Priority, QueuePolicy
from kapsl_scheduler.core.admission import Admission
from kapsl_scheduler.core.batch import Batch, Layout, Pending, Shape
from kapsl_scheduler.core.lanes import Slot
from kapsl_scheduler.core.latency import LatencyTable
from kapsl_scheduler.core.queue import RequestQueue
from kapsl_scheduler.types import Array, ModelInfo, TensorSpec

__all__ = ["Options", "run"]

MAX_BATCH: Final = 32
BATCHES: Final = 32  # batches that stand in the queue when it is measured
INFO: Final = ModelInfo(
    name="digits",
    inputs=(TensorSpec("pixels", "float32", ("batch", 64), 0),),
    outputs=(TensorSpec("probabilities", "float32", ("batch", 10), 0),),
    batchable=True,
)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`repeats` per round; the fastest of a round counts, since all that can happen to it is to be disturbed."""

    rounds: int = 5
    repeats: int = 50


def run(options: Options) -> Report:
    """Every piece, round after round."""
    settings: dict[str, Label | list[Label]] = {"rounds": options.rounds, "max batch": MAX_BATCH}
    report = Report.begin("micro", settings)
    pieces: dict[str, Callable[[], float]] = {
        "admit one array": _admit,
        "make a pending request": _make,
        "push, 32 that arrived together, per request": lambda: _push_and_pop(together=True)[0],
        "push, one alone": lambda: _push_and_pop()[0],
        "pop (pull of a full batch, per request)": lambda: _push_and_pop()[1],
        "push together, three classes at random": lambda: _push_and_pop(mixed=True, together=True)[0],
        "pop, three classes at random": lambda: _push_and_pop(mixed=True)[1],
        "reference: deque append and popleft": _deque,
        "stack, per row of 32": _stack,
        "reference: numpy.concatenate, per row": _concatenate,
        "stack a lone request": _stack_lone,
        "split, per row of 32": _split,
        "reference: 32 row views, per row": _views,
    }
    best: dict[str, list[float]] = {name: [] for name in pieces}
    for _ in range(options.rounds):
        for name, piece in pieces.items():
            gc.collect()
            best[name].append(min(piece() for _ in range(options.repeats)) * 1e9)
    for name, samples in best.items():
        report.add({"piece": name}, "time", "ns", samples, "lower")
    return report


# ------------------------------------------------------------------------------------------------------ pieces
# Each returns seconds for one request.


def _timed(work: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - start) / count


def _row() -> Array:
    return np.zeros((1, 64), np.float32)


def _admit() -> float:
    admission = Admission(INFO, MAX_BATCH)
    row = _row()
    return _timed(lambda: admission.admit(row), 1000)


def _pending(shape: Shape, row: Array, arrival: float, priority: Priority) -> Pending:
    deadline = arrival + 1.0
    return Pending((row,), 1, shape, False, priority, arrival, deadline, deadline, 1.0, 256, None)


def _make() -> float:
    shape, row = Shape("row", ("pixels",), batchable=True), _row()
    return _timed(lambda: _pending(shape, row, 0.0, Priority.LATENCY_CRITICAL), 1000)


def _requests(count: int, *, mixed: bool = False) -> list[Pending]:
    shape = Shape("row", ("pixels",), batchable=True)
    classes = np.random.default_rng(0).integers(0, len(Priority), count) if mixed else np.zeros(count, int)
    return [_pending(shape, _row(), 0.0, Priority(int(priority))) for priority in classes]


def _push_and_pop(*, mixed: bool = False, together: bool = False) -> tuple[float, float]:
    """Seconds per push, and per request of the pulls that empty the queue again. `together`: a batch at a time, as
    those who arrive in one pass of the loop."""
    requests = _requests(MAX_BATCH * BATCHES, mixed=mixed)
    queue = RequestQueue(BatchPolicy(max_batch_size=MAX_BATCH), QueuePolicy(max_size=len(requests)))
    slot = Slot(0, LatencyTable())
    for _ in range(5):
        slot.latency[requests[0].shape].observe(MAX_BATCH, 76e-6, 0.0)
    passes = [requests[index : index + MAX_BATCH] for index in range(0, len(requests), MAX_BATCH)]
    start = time.perf_counter()
    if together:
        for arrivals in passes:
            queue.push_many(arrivals)
    else:
        for request in requests:
            queue.push(request)
    pushed = time.perf_counter()
    batches: list[Batch] = []
    while (pull := queue.pull(0.0, slot)).batch is not None:
        batches.append(pull.batch)
    popped = time.perf_counter()
    if sum(batch.rows for batch in batches) != len(requests):
        raise AssertionError("the queue did not give back what it was given")
    return (pushed - start) / len(requests), (popped - pushed) / len(requests)


def _deque() -> float:
    items: deque[int] = deque()
    count = 1000
    start = time.perf_counter()
    for number in range(count):
        items.append(number)
    while items:
        items.popleft()
    return (time.perf_counter() - start) / count


def _batch() -> Batch:
    members = _requests(MAX_BATCH)
    return Batch(
        members=members,
        rows=MAX_BATCH,
        shape=members[0].shape,
        leader=Priority.LATENCY_CRITICAL,
        rows_by_class=(MAX_BATCH, 0, 0),
        backlog=(False, False, False),
        started=0.0,
    )


def _stack() -> float:
    layout, members = Layout(INFO), _requests(MAX_BATCH)
    return _timed(lambda: layout.stack(members), 100) / MAX_BATCH


def _stack_lone() -> float:
    layout, members = Layout(INFO), _requests(1)
    return _timed(lambda: layout.stack(members), 1000)


def _concatenate() -> float:
    rows = [_row() for _ in range(MAX_BATCH)]
    return _timed(lambda: np.concatenate(rows), 100) / MAX_BATCH


def _split() -> float:
    layout, batch = Layout(INFO), _batch()
    outputs = {"probabilities": np.zeros((MAX_BATCH, 10), np.float32)}
    return _timed(lambda: layout.split(outputs, batch), 100) / MAX_BATCH


def _views() -> float:
    answers = np.zeros((MAX_BATCH, 10), np.float32)
    return _timed(lambda: [answers[index : index + 1] for index in range(MAX_BATCH)], 100) / MAX_BATCH
