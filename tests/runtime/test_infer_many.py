"""Several requests at once: their order, requests too large for one call, errors among them, cancellation."""

from __future__ import annotations

import asyncio
import gc

import numpy as np
import pytest

from kapsl_scheduler import BatchPolicy, QueueOverflowPolicy, QueuePolicy
from kapsl_scheduler.errors import DeadlineExceeded, InferenceError, InvalidInput, ResourceExhausted, Unavailable
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
    queue = QueuePolicy(max_bytes=32)
    async with virtual_scheduler(poisoned(), queue=queue) as scheduler:
        sent = [numbered(1), np.zeros((1, 2)), numbered(POISON), numbered(2, rows=5), numbered(3)]
        answers = await scheduler.infer_many(sent, return_exceptions=True)
        found = scheduler.statistics()
    wanted = [InferenceResponse, InvalidInput, InferenceError, ResourceExhausted, InferenceResponse]
    assert [type(answer) for answer in answers] == wanted
    assert (found.offered, found.invalid, found.failed, found.succeeded) == (5, 2, 1, 2)


@virtual
async def test_a_list_longer_than_the_queue_does_not_crowd_itself_out() -> None:
    queue = QueuePolicy(max_size=4, overflow=QueueOverflowPolicy.DROP_OLDEST)
    async with virtual_scheduler(slow(), batch=BatchPolicy(max_batch_size=2), queue=queue) as scheduler:
        answers = await scheduler.infer_many([numbered(n) for n in range(50)])
    assert [answer.output[0, 0] for answer in answers] == list(range(50))


@virtual
async def test_a_list_longer_than_the_queue_hears_of_the_end_in_every_place() -> None:
    queue = QueuePolicy(max_size=4)
    async with virtual_scheduler(slow(), batch=BatchPolicy(max_batch_size=2), queue=queue) as scheduler:
        [caller] = await start(scheduler.infer_many([numbered(n) for n in range(50)], return_exceptions=True))
        await asyncio.sleep(0.015)
        await scheduler.close(drain=0)
        async with asyncio.timeout(1):
            answers = await caller
        found = scheduler.statistics()
    assert [type(answer) for answer in answers] == [InferenceResponse] * 2 + [Unavailable] * 48
    assert (found.offered, found.succeeded, found.failed + found.refused) == (50, 2, 48)


@virtual
async def test_a_list_longer_than_the_queue_hears_of_a_lost_engine_in_every_place() -> None:
    engine = slow(faults=FaultPlan(Fault(calls={2}, error=Unavailable, failed_checks=10**9)))
    batch, queue = BatchPolicy(max_batch_size=2), QueuePolicy(max_size=4)
    async with virtual_scheduler(engine, batch=batch, queue=queue) as scheduler, asyncio.timeout(1):
        answers = await scheduler.infer_many([numbered(n) for n in range(50)], return_exceptions=True)
    assert [type(answer) for answer in answers] == [InferenceResponse] * 2 + [Unavailable] * 48


@virtual
async def test_without_return_exceptions_the_first_error_is_raised_and_the_others_go_on() -> None:
    engine = poisoned()
    async with virtual_scheduler(engine, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        with pytest.raises(InferenceError):
            await scheduler.infer_many([numbered(POISON), numbered(1), numbered(2)])
        assert asyncio.get_running_loop().time() == pytest.approx(0.01)
    assert scheduler.statistics().succeeded == 2


@virtual
async def test_without_return_exceptions_an_invalid_request_keeps_all_of_them_out() -> None:
    engine = slow()
    async with virtual_scheduler(engine) as scheduler:
        with pytest.raises(InvalidInput):
            await scheduler.infer_many([numbered(1), np.zeros((1, 2)), numbered(2)])
        assert scheduler.statistics().offered == 1
    assert engine.calls == []


@virtual
async def test_cancelled_after_some_have_failed_nothing_is_said_of_unheard_errors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch, queue = BatchPolicy(max_batch_size=1), QueuePolicy(max_size=1)
    async with virtual_scheduler(poisoned(), batch=batch, queue=queue) as scheduler:
        [caller] = await start(scheduler.infer_many([numbered(POISON) for _ in range(4)]))
        await asyncio.sleep(0.025)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        del caller
        gc.collect()
    assert not caplog.records


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
        assert (found.running, found.queued, found.waiting) == (2, 2, 0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        found = scheduler.statistics()
        assert (found.running, found.queued, found.waiting) == (0, 0, 0)
        assert (found.offered, found.cancelled) == (4, 4)
    assert engine.batch_rows == [2]
