"""What a flood, a share and an overload cost whom: exact statements in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kapsl_scheduler import BatchPolicy, Priority, QueueOverflowPolicy, QueuePolicy, Scheduler
from kapsl_scheduler.errors import DeadlineExceeded, Overloaded
from kapsl_scheduler.testing import FakeAsyncEngine
from tests.runtime.virtual import virtual
from tests.sim.load import closed_loop, one_row, open_loop, p99, probe

pytestmark = pytest.mark.slow

CALL = 0.005
EXACT = 1e-9

LIVE, THROUGHPUT, BACKGROUND = Priority


def serial(rows: int) -> float:
    """An engine that takes its time however many rows a call has."""
    return CALL


def growing(rows: int) -> float:
    """An engine whose time grows with its rows."""
    return 0.3e-3 + 0.9e-3 * rows


def scheduler_over(engine: FakeAsyncEngine, **parameters: Any) -> Scheduler:
    return Scheduler([engine], clock=asyncio.get_running_loop().time, **parameters)


async def flooded(
    cost: Callable[[int], float], callers: int, priority: Priority, batch: BatchPolicy
) -> tuple[list[float], FakeAsyncEngine]:
    """Live requests' seconds under a flood, and the engine that served both."""
    engine = FakeAsyncEngine(cost=cost)
    queue = QueuePolicy(max_size=2048)
    async with scheduler_over(engine, batch=batch, queue=queue) as scheduler, closed_loop(scheduler, callers, priority):
        return await probe(scheduler, 60, gap=0.02), engine


async def _unloaded(cost: Callable[[int], float]) -> float:
    async with scheduler_over(FakeAsyncEngine(cost=cost)) as scheduler:
        return p99(await probe(scheduler, 20, gap=0.02))


# --------------------------------------------------------------------------------------------- floods


@pytest.mark.parametrize("callers", [64, 256, 1024])
@virtual
async def test_live_requests_wait_for_one_call_behind_a_flood_of_any_size(callers: int) -> None:
    taken, _ = await flooded(serial, callers, THROUGHPUT, BatchPolicy())
    assert p99(taken) <= await _unloaded(serial) + 1.3 * CALL
    assert max(taken) <= 2 * CALL + EXACT


@virtual
async def test_the_wait_is_flat_in_the_size_of_the_flood() -> None:
    waits = [p99((await flooded(serial, callers, THROUGHPUT, BatchPolicy()))[0]) for callers in (64, 1024)]
    assert waits[1] <= 1.05 * waits[0]


@pytest.mark.parametrize("callers", [64, 1024])
@virtual
async def test_max_batch_time_bounds_the_wait_on_an_engine_whose_time_grows(callers: int) -> None:
    limit = 0.005
    taken, engine = await flooded(growing, callers, THROUGHPUT, BatchPolicy(max_batch_time=limit))
    assert p99(taken) <= await _unloaded(growing) + 1.3 * limit
    assert max(engine.batch_rows) == 5  # 4.8 ms: six rows would take 5.7


@virtual
async def test_live_requests_carry_few_rows_of_a_flood_on_an_engine_whose_time_grows() -> None:
    """`fill_slack`: a live batch of one row may take a quarter longer for others' rows, and no more."""
    _, engine = await flooded(growing, 64, THROUGHPUT, BatchPolicy(max_batch_time=0.005, fill_slack=1.0))
    assert engine.batch_rows.count(2) >= 50  # 2.1 ms fit 2 x 1.2 ms, three rows would not


@virtual
async def test_a_flood_keeps_the_engine_time_that_live_requests_leave() -> None:
    engine = FakeAsyncEngine(cost=serial)
    async with scheduler_over(engine) as scheduler, closed_loop(scheduler, 256, THROUGHPUT):
        loop = asyncio.get_running_loop()
        started = loop.time()
        taken = await probe(scheduler, 60, gap=0.02)
        elapsed = loop.time() - started
        rows = scheduler.statistics().classes["throughput"].succeeded
    left = elapsed - len(taken) * CALL
    assert rows >= 0.8 * 32 * left / CALL


@pytest.mark.parametrize("callers", [64, 1024])
@virtual
async def test_a_background_flood_costs_a_live_request_at_most_one_slice(callers: int) -> None:
    slice_ = 0.003
    taken, engine = await flooded(growing, callers, BACKGROUND, BatchPolicy(background_slice=slice_))
    assert max(taken) <= await _unloaded(growing) + slice_ + EXACT
    assert max(engine.batch_rows) == 3


@virtual
async def test_a_background_request_longer_than_the_slice_is_the_bound_and_stated() -> None:
    engine = FakeAsyncEngine(cost=serial)
    async with (
        scheduler_over(engine, batch=BatchPolicy(background_slice=0.001)) as scheduler,
        closed_loop(scheduler, 64, BACKGROUND),
    ):
        taken = await probe(scheduler, 50, gap=0.02)
        assert scheduler.statistics().background_bound == pytest.approx(CALL)
    assert max(taken) <= 2 * CALL + EXACT
    assert set(engine.batch_rows) <= {1, 2}  # a live row may ride with one


# --------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("below", [THROUGHPUT, BACKGROUND])
@pytest.mark.parametrize("share", [0.05, 0.2])
@virtual
async def test_a_lower_class_keeps_its_share_while_live_requests_flood(below: Priority, share: float) -> None:
    engine = FakeAsyncEngine(cost=serial)
    async with (
        scheduler_over(engine, batch=BatchPolicy(max_batch_size=8), queue=QueuePolicy(shares=share)) as scheduler,
        closed_loop(scheduler, 64, LIVE),
        closed_loop(scheduler, 64, below),
    ):
        await asyncio.sleep(3.0)
        classes = scheduler.statistics().classes
    served = classes[below.name.lower()].succeeded
    everything = served + classes["latency_critical"].succeeded
    assert share * 0.95 <= served / everything <= share + 1 / 8  # it comes in whole rows of a batch of eight


@virtual
async def test_without_a_share_nothing_below_runs_while_live_requests_flood() -> None:
    engine = FakeAsyncEngine(cost=serial)
    async with (
        scheduler_over(engine, batch=BatchPolicy(max_batch_size=8), queue=QueuePolicy(shares=0.0)) as scheduler,
        closed_loop(scheduler, 64, LIVE),
        closed_loop(scheduler, 64, THROUGHPUT),
    ):
        await asyncio.sleep(1.0)
        assert scheduler.statistics().classes["throughput"].succeeded == 0


# ------------------------------------------------------------------------------------------- overload

BATCH = BatchPolicy(max_batch_size=8)
CAPACITY = 8 / CALL
DEADLINE = 0.05


@pytest.mark.parametrize("seed", range(3))
@virtual
async def test_goodput_at_twice_the_capacity(seed: int) -> None:
    engine = FakeAsyncEngine(cost=serial)
    async with scheduler_over(engine, batch=BATCH) as scheduler:
        heard = await open_loop(scheduler, 2 * CAPACITY, 1.0, seed, timeout=DEADLINE)
        found = scheduler.statistics()
    assert len(heard.answered) >= 0.9 * CAPACITY
    assert max(heard.answered) <= DEADLINE
    assert found.discarded == 0  # nobody was run who was due to expire
    assert sum(engine.batch_rows) == len(heard.answered)
    assert set(heard.errors) == {DeadlineExceeded}


@pytest.mark.parametrize("max_size", [64, 1024])
@virtual
async def test_refusals_and_goodput_at_ten_times_the_capacity(max_size: int) -> None:
    engine = FakeAsyncEngine(cost=serial)
    queue = QueuePolicy(max_size=max_size, overflow=QueueOverflowPolicy.DROP_NEWEST)
    async with scheduler_over(engine, batch=BATCH, queue=queue) as scheduler:
        heard = await open_loop(scheduler, 10 * CAPACITY, 0.5, timeout=DEADLINE)
        found = scheduler.statistics()
    assert len(heard.answered) >= 0.9 * CAPACITY * 0.5
    assert found.discarded == 0
    assert (heard.errors[Overloaded] > 0) == (max_size < 10 * CAPACITY * DEADLINE)
    assert heard.slowest[Overloaded] == 0.0  # refused where they stand


@virtual
async def test_a_queue_of_ten_thousand_stays_within_its_bounds() -> None:
    engine = FakeAsyncEngine(cost=serial)
    queue = QueuePolicy(max_size=1000, max_waiting=500)
    async with scheduler_over(engine, batch=BatchPolicy(max_batch_size=32), queue=queue) as scheduler:
        callers = [asyncio.ensure_future(scheduler.infer(one_row())) for _ in range(10_000)]
        await asyncio.sleep(0)
        found = scheduler.statistics()
        assert (found.queued, found.waiting, found.refused) == (1000, 500, 8500)
        answers = await asyncio.gather(*callers, return_exceptions=True)
    assert sum(isinstance(answer, Overloaded) for answer in answers) == 8500
    assert engine.max_in_flight == 1
