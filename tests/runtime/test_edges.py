"""What went wrong once, or nearly: memory, engines of both kinds together, callers who ask for much or odd things."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    Priority,
    QueueOverflowPolicy,
    QueuePolicy,
    Scheduler,
    Unavailable,
)
from kapsl_scheduler.errors import EngineError
from kapsl_scheduler.testing import FakeAsyncEngine, FakeEngine, Fault, FaultPlan
from tests.runtime.virtual import virtual


def row(value: float = 1.0) -> Any:
    return np.full((1, 4), value, np.float32)


def here(engine: Any, **parameters: Any) -> Scheduler:
    return Scheduler(engine, clock=asyncio.get_running_loop().time, **parameters)


@virtual
async def test_what_failed_expired_or_was_cancelled_is_not_kept() -> None:
    kept: list[weakref.ref[Any]] = []

    def watched(value: float) -> Any:
        array = row(value)
        kept.append(weakref.ref(array))
        return array

    faults = FaultPlan(Fault(value=3.0, error=ValueError("three")))
    async with here(FakeAsyncEngine(cost=lambda rows: 1.0, faults=faults)) as scheduler:
        first = asyncio.ensure_future(scheduler.infer(row()))
        await asyncio.sleep(0.5)
        late = asyncio.ensure_future(scheduler.infer(watched(2.0), timeout=0.1))
        gone = asyncio.ensure_future(scheduler.infer(watched(4.0)))
        bad = asyncio.ensure_future(scheduler.infer(watched(3.0)))
        await asyncio.sleep(0)
        gone.cancel()
        results = await asyncio.gather(first, late, gone, bad, return_exceptions=True)
        assert isinstance(results[1], DeadlineExceeded)
        assert isinstance(results[2], asyncio.CancelledError)
        assert isinstance(results[3], EngineError)
        del first, late, gone, bad, results
        scheduler._main.engines[0].engine.calls.clear()  # type: ignore[attr-defined]  # the fake records its inputs
        await asyncio.sleep(20)
        gc.collect()
        assert [reference() for reference in kept] == [None, None, None]


@virtual
async def test_a_burst_that_is_over_is_not_kept() -> None:
    engine = FakeAsyncEngine(cost=lambda rows: 0.01)
    async with here(engine) as scheduler:
        burst = [row(value) for value in range(100)]
        kept = [weakref.ref(array) for array in burst]
        await asyncio.gather(*(scheduler.infer(array, priority=Priority.THROUGHPUT, timeout=60) for array in burst))
        engine.calls.clear()
        burst.clear()
        gc.collect()
        assert not any(reference() is not None for reference in kept)


async def test_engines_of_both_kinds_wake_each_other() -> None:
    """A thread's slot hands work to a task's slot: the loop must hear of it."""
    both_run = asyncio.Event()
    loop = asyncio.get_running_loop()
    running: list[str] = []

    def note(kind: str) -> None:
        running.append(kind)
        if len(set(running)) == 2:
            both_run.set()

    class Threaded(FakeEngine):
        def infer(self, inputs: Any) -> Any:
            loop.call_soon_threadsafe(note, "thread")
            asyncio.run_coroutine_threadsafe(both_run.wait(), loop).result(5)
            return super().infer(inputs)

    class Tasked(FakeAsyncEngine):
        async def infer(self, inputs: Any) -> Any:
            note("task")
            await both_run.wait()
            return await super().infer(inputs)

    async with Scheduler([Tasked(), Threaded()], batch=None) as scheduler:
        requests = [np.ones((1, width), np.float32) for width in (3, 4)]  # two shapes: two calls
        async with asyncio.timeout(5):
            await asyncio.gather(*(scheduler.infer(request) for request in requests))
    assert sorted(running) == ["task", "thread"]


@virtual
async def test_infer_many_does_not_crowd_itself_out() -> None:
    policy = QueuePolicy(max_size=10, max_waiting=0)
    async with here(FakeAsyncEngine(cost=lambda rows: 0.01), queue=policy) as scheduler:
        answers = await scheduler.infer_many([row(value) for value in range(200)])
        assert [answer.output[0, 0] for answer in answers] == list(range(200))
        [joined] = await scheduler.infer_many([np.ones((1000, 4), np.float32)])
        assert joined.output.shape == (1000, 4)


@virtual
async def test_a_policy_may_be_named_by_its_value() -> None:
    assert QueuePolicy(overflow="drop_newest").overflow is QueueOverflowPolicy.DROP_NEWEST  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sometimes"):
        QueuePolicy(overflow="sometimes")  # type: ignore[arg-type]
    async with here(FakeAsyncEngine(cost=lambda rows: 1.0), queue=QueuePolicy(max_size=1)) as scheduler:
        running = asyncio.ensure_future(scheduler.infer(row()))
        await asyncio.sleep(0.1)
        queued = asyncio.ensure_future(scheduler.infer(row()))
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded):
            await scheduler.infer(row(), overflow="drop_newest")  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="overflow: expected one of block, drop_newest, drop_oldest"):
            await scheduler.infer(row(), overflow="sometimes")  # type: ignore[arg-type]
        assert (await scheduler.infer(row(), priority="background")).batch_rows == 1  # type: ignore[arg-type]
        await asyncio.gather(running, queued)


@virtual
@pytest.mark.parametrize(
    "options",
    [{"block_timeout": -1}, {"block_timeout": "x"}, {"timeout": "5"}, {"timeout": 0}, {"priority": "urgent"}],
)
async def test_odd_limits_are_invalid_and_counted(options: dict[str, Any]) -> None:
    async with here(FakeAsyncEngine()) as scheduler:
        with pytest.raises(InvalidInput, match=next(iter(options))):
            await scheduler.infer(row(), **options)
        assert scheduler.statistics().invalid == 1


@virtual
async def test_a_second_closer_waits_and_may_shorten_the_drain() -> None:
    engine = FakeAsyncEngine(cost=lambda rows: 100.0)
    scheduler = await here(engine).__aenter__()
    caller = asyncio.ensure_future(scheduler.infer(row()))
    await asyncio.sleep(1)
    patient = asyncio.ensure_future(scheduler.close(drain=50))
    await asyncio.sleep(1)
    await scheduler.close(drain=2)
    assert asyncio.get_running_loop().time() < 10
    await patient
    assert scheduler.health().status == "closed"
    assert not scheduler.health().healthy
    assert {engine.status for engine in scheduler.health().engines} == {"unloaded"}
    with pytest.raises(Unavailable):
        await caller


async def test_closing_from_another_loop_is_refused() -> None:
    async with Scheduler([FakeEngine()]) as scheduler:
        with pytest.raises(RuntimeError, match="SyncScheduler"):
            await asyncio.to_thread(asyncio.run, scheduler.close())


def test_what_is_no_engine_is_named() -> None:
    with pytest.raises(TypeError, match="CallableEngine"):
        Scheduler([lambda rows: rows])
    Scheduler(FakeEngine())  # a single engine needs no list
