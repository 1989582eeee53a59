"""Jobs and a scheduler that is full: a real `Scheduler` over fake engines, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kapsl_scheduler import (
    BatchPolicy,
    CronOverflowPolicy,
    Firing,
    Overloaded,
    Priority,
    QueueOverflowPolicy,
    QueuePolicy,
    RunPolicy,
    Scheduler,
)
from kapsl_scheduler.testing import FakeAsyncEngine
from tests.runtime.cron import X, a_job, counts, cron_over, run_ended
from tests.runtime.helpers import start
from tests.runtime.virtual import virtual

DAY = 86_400
BLOCK = CronOverflowPolicy.BLOCK


@asynccontextmanager
async def full(**queue: Any) -> AsyncIterator[Scheduler]:
    """One engine at work for ten seconds on each row, and one background request in a queue with room for one."""
    engine = FakeAsyncEngine(cost=lambda rows: 10.0)
    policy = QueuePolicy(max_size=1, **queue)
    loop = asyncio.get_running_loop()
    async with Scheduler([engine], queue=policy, batch=BatchPolicy(max_batch_size=1), clock=loop.time) as scheduler:
        (running,) = await start(scheduler.infer(X, priority=Priority.BACKGROUND))
        (queued,) = await start(scheduler.infer(X, priority=Priority.BACKGROUND))
        yield scheduler
        await asyncio.gather(running, queued, return_exceptions=True)


@pytest.mark.parametrize("overflow", list(QueueOverflowPolicy))
@virtual
async def test_a_firing_that_finds_no_room_is_skipped_whatever_the_queues_policy(overflow: QueueOverflowPolicy) -> None:
    heard: list[Any] = []

    async def on_result(id: str, result: Any) -> None:
        heard.append(result)

    async with full(overflow=overflow) as scheduler, cron_over(scheduler) as cron:
        await cron.register(a_job(on_result=on_result))
        run = await run_ended(cron)
        assert (run.state.value, run.reason, run.duration) == ("skipped", "busy", 0.0)
        assert "Overloaded" in run.error
        info = await cron.job_info("job")
        assert info is not None
        assert (info.missed_count, info.fired_count) == (1, 1)
        assert scheduler.statistics().evicted == 0
    assert heard == []


@virtual
async def test_a_firing_may_wait_for_room() -> None:
    async with full() as scheduler, cron_over(scheduler) as cron:
        await cron.register(a_job(overflow_policy=BLOCK))
        run = await run_ended(cron)
        assert (run.state.value, run.duration) == ("succeeded", 30.0)


@virtual
async def test_a_firing_may_wait_so_long_for_room() -> None:
    policy = QueueOverflowPolicy.DROP_OLDEST
    async with full(overflow=policy) as scheduler, cron_over(scheduler) as cron:
        await cron.register(a_job(overflow_policy=BLOCK, run=RunPolicy(block_timeout=5)))
        run = await run_ended(cron)
        assert (run.state.value, run.reason, run.duration) == ("skipped", "busy", 5.0)
        await cron.register(a_job("patient", overflow_policy=BLOCK, run=RunPolicy(block_timeout=50)))
        assert (await run_ended(cron, "patient")).state.value == "succeeded"


@virtual
async def test_work_that_makes_room_for_others_has_failed_and_its_callback_is_called() -> None:
    heard: list[Any] = []

    async def on_result(id: str, result: Any) -> None:
        heard.append(result)

    engine = FakeAsyncEngine(cost=lambda rows: 10.0)
    queue = QueuePolicy(max_size=1, overflow=QueueOverflowPolicy.DROP_OLDEST)
    loop = asyncio.get_running_loop()
    async with (
        Scheduler([engine], queue=queue, batch=BatchPolicy(max_batch_size=1), clock=loop.time) as scheduler,
        cron_over(scheduler) as cron,
    ):
        await cron.register(a_job(schedule=DAY, on_result=on_result))
        await cron.register(a_job("again", DAY, on_result=on_result, run=RunPolicy(attempts=2, backoff=60)))
        for id in ("job", "again"):
            (running,) = await start(scheduler.infer(X))
            await cron.trigger(id)
            await asyncio.sleep(1)
            await scheduler.infer(X)  # a live request, for which there is no other place
            await running
        await asyncio.sleep(100)
        (run,) = await cron.runs("job")
        assert (run.state.value, run.reason, run.failed_requests) == ("failed", "evicted", 1)
        (run,) = await cron.runs("again")
        assert (run.state.value, run.attempt, run.requests) == ("succeeded", 2, 2)
        info = await cron.job_info("job")
        assert info is not None
        assert (info.missed_count, info.fired_count, info.failed) == (0, 1, 1)
    assert isinstance(heard[0], Overloaded)
    assert heard[0].evicted


@virtual
async def test_an_attempt_that_finds_no_room_is_a_failure_of_a_firing_that_has_begun() -> None:
    engine = FakeAsyncEngine(cost=lambda rows: 10.0)
    queue = QueuePolicy(max_size=1, overflow=QueueOverflowPolicy.DROP_OLDEST)
    loop = asyncio.get_running_loop()
    async with (
        Scheduler([engine], queue=queue, batch=BatchPolicy(max_batch_size=1), clock=loop.time) as scheduler,
        cron_over(scheduler) as cron,
    ):
        await cron.register(a_job(run=RunPolicy(attempts=2, backoff=1)))
        (running,) = await start(scheduler.infer(X))
        await cron.trigger("job")
        await asyncio.sleep(1)
        (live,) = await start(scheduler.infer(X))
        await asyncio.gather(running, live)
        assert await counts(cron) == {"failed": 1}
        (run,) = await cron.runs("job")
        assert (run.state.value, run.reason, run.attempt) == ("failed", "busy", 2)


@virtual
async def test_jobs_run_behind_live_requests() -> None:
    order: list[float] = []

    def note(inputs: Any) -> Any:
        order.append(float(inputs["x"][0, 0]))
        return {"y": inputs["x"]}

    engine = FakeAsyncEngine(note, cost=lambda rows: 1.0)
    loop = asyncio.get_running_loop()
    async with (
        Scheduler([engine], batch=BatchPolicy(max_batch_size=1), clock=loop.time) as scheduler,
        cron_over(scheduler) as cron,
    ):
        await cron.register(a_job(request=X * 9))
        first = await start(scheduler.infer(X * 0))
        await cron.trigger("job")
        await start()
        later = await start(*(scheduler.infer(X * number) for number in (1, 2)))
        await asyncio.gather(*first, *later)
        await asyncio.sleep(5)
    assert order[0] == 0
    assert order.index(9) > order.index(1)


@virtual
async def test_a_stream_whose_first_item_finds_no_room_is_skipped() -> None:
    async def make(firing: Firing) -> AsyncIterator[Any]:
        for _ in range(3):
            yield X

    async with full() as scheduler, cron_over(scheduler) as cron:
        await cron.register(a_job(request=make))
        run = await run_ended(cron)
        assert (run.state.value, run.reason, run.requests) == ("skipped", "busy", 0)
        await asyncio.sleep(25)
        run = await run_ended(cron)
        assert (run.state.value, run.requests) == ("succeeded", 3)


@virtual
async def test_a_stream_that_has_begun_waits_for_room_and_sends_again_what_had_to_make_room() -> None:
    engine = FakeAsyncEngine(cost=lambda rows: 1.0)
    queue = QueuePolicy(max_size=2, overflow=QueueOverflowPolicy.DROP_OLDEST)
    loop = asyncio.get_running_loop()

    async def make(firing: Firing) -> AsyncIterator[Any]:
        for number in range(20):
            yield X * number

    async with (
        Scheduler([engine], queue=queue, batch=BatchPolicy(max_batch_size=1), clock=loop.time) as scheduler,
        cron_over(scheduler) as cron,
    ):
        await cron.register(a_job(schedule=DAY, request=make))
        (running,) = await start(scheduler.infer(X))
        await cron.trigger("job")
        for _ in range(10):
            await asyncio.sleep(0.5)
            await asyncio.gather(*(scheduler.infer(X) for _ in range(2)))
        await running
        await asyncio.sleep(60)
        (run,) = await cron.runs("job")
        assert (run.state.value, run.requests, run.failed_requests) == ("succeeded", 20, 0)
        assert scheduler.statistics().evicted > 0
