"""Several requests at once: their order, requests too large for one call, errors among them, cancellation."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from kapsl_scheduler import BatchPolicy, QueuePolicy
from kapsl_scheduler.errors import DeadlineExceeded, InferenceError, InvalidInput, Overloaded
from kapsl_scheduler.testing import FakeAsyncEngine, Fault, FaultPlan
from kapsl_scheduler.types import InferenceResponse
from tests.runtime.helpers import numbered, start, virtual_scheduler
from tests.runtime.virtual import virtual

POISON = 13.0


def slow(**parameters: object) -> FakeAsyncEngine:
    return FakeAsyncEngine(cost=lambda rows: 0.01, **parameters)  # type: ignore[arg-type]


def poisoned() -> FakeAsyncEngine:
    return slow(faults=FaultPlan(Fault(value=POISON, error=ValueError)))


@virtual
async def test_answers_come_in_the_order_of_the_requests() -> None:
    async with virtual_scheduler(slow(), batch=BatchPolicy(max_batch_size=4)) as scheduler:
        sent = [numbered(n, rows=1 + n % 4) for n in range(20)]
        answers = await scheduler.infer_many(sent)
    assert all(np.array_equal(answer.output, x) for answer, x in zip(answers, sent, strict=True))


@virtual
async def test_no_requests_no_answers() -> None:
    async with virtual_scheduler(slow()) as scheduler:
        assert await scheduler.infer_many([]) == []


@virtual
async def test_a_request_with_too_many_rows_for_one_call_is_split_and_joined() -> None:
    engine = slow()
    async with virtual_scheduler(engine, batch=BatchPolicy(max_batch_size=8)) as scheduler:
        large = numbered(1, rows=20)
        [answer] = await scheduler.infer_many([large])
        found = scheduler.statistics()
    assert np.array_equal(answer.output, large)
    assert engine.batch_rows == [8, 8, 4]
    assert answer.batch_rows == 8
    assert answer.compute_time == pytest.approx(0.03)
    assert (found.offered, found.succeeded) == (3, 3)


@virtual
async def test_a_split_request_fails_as_one() -> None:
    large = numbered(1, rows=20)
    large[10, 0] = POISON
    async with virtual_scheduler(poisoned(), batch=BatchPolicy(max_batch_size=8)) as scheduler:
        answers = await scheduler.infer_many([numbered(2), large, numbered(3)], return_exceptions=True)
    assert [type(answer) for answer in answers] == [InferenceResponse, InferenceError, InferenceResponse]


@virtual
async def test_errors_stand_in_their_places() -> None:
    queue = QueuePolicy(max_size=4, max_waiting=0)
    async with virtual_scheduler(poisoned(), queue=queue) as scheduler:
        sent = [numbered(1), np.zeros((1, 2)), numbered(POISON), numbered(2), numbered(3), numbered(4)]
        answers = await scheduler.infer_many(sent, return_exceptions=True)
    wanted = [InferenceResponse, InvalidInput, InferenceError, InferenceResponse, InferenceResponse, Overloaded]
    assert [type(answer) for answer in answers] == wanted


@virtual
async def test_without_return_exceptions_the_first_error_is_raised_and_the_others_go_on() -> None:
    engine = poisoned()
    async with virtual_scheduler(engine, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        with pytest.raises(InferenceError):
            await scheduler.infer_many([numbered(POISON), numbered(1), numbered(2)])
        assert asyncio.get_running_loop().time() == pytest.approx(0.01)
    assert scheduler.statistics().succeeded == 2


@virtual
async def test_the_timeout_is_for_each() -> None:
    async with virtual_scheduler(slow(), batch=BatchPolicy(max_batch_size=1)) as scheduler:
        answers = await scheduler.infer_many([numbered(n) for n in range(3)], timeout=0.025, return_exceptions=True)
    assert [type(answer) for answer in answers] == [InferenceResponse, InferenceResponse, DeadlineExceeded]


@virtual
async def test_cancelling_cancels_all() -> None:
    engine = slow()
    batch, queue = BatchPolicy(max_batch_size=2), QueuePolicy(max_size=4)
    async with virtual_scheduler(engine, batch=batch, queue=queue) as scheduler:
        [caller] = await start(scheduler.infer_many([numbered(n) for n in range(8)], return_exceptions=True))
        found = scheduler.statistics()
        assert (found.running, found.queued, found.waiting) == (2, 4, 2)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        found = scheduler.statistics()
        assert (found.running, found.queued, found.waiting) == (0, 0, 0)
        assert found.cancelled + found.withdrawn == 8
    assert engine.batch_rows == [2]
