"""What the scheduler says of itself: statistics, health, metrics, its repr; and what an observer is told."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
import pytest

from kapsl_scheduler import BatchPolicy, Priority, QueuePolicy, Scheduler
from kapsl_scheduler.errors import Unavailable
from kapsl_scheduler.runtime.metrics import BOUNDS, Durations, Histogram, counts_of
from kapsl_scheduler.testing import FakeAsyncEngine, FakeEngine, Fault, FaultPlan
from tests.runtime.helpers import numbered, session_of, start, virtual_scheduler
from tests.runtime.virtual import virtual

CALL = 0.01
POISON = 13.0


def slow(**parameters: Any) -> FakeAsyncEngine:
    return FakeAsyncEngine(cost=lambda rows: CALL, **parameters)


def statuses(scheduler: Scheduler) -> list[str]:
    return [engine.status for engine in scheduler.health().engines]


# ----------------------------------------------------------------------------------------------- statistics


@virtual
async def test_statistics_are_the_books_and_the_load() -> None:
    batch, queue = BatchPolicy(max_batch_size=2), QueuePolicy(max_size=2)
    async with virtual_scheduler(slow(), batch=batch, queue=queue) as scheduler:
        callers = await start(scheduler.infer(numbered(0, rows=2)))
        low = Priority.THROUGHPUT
        callers += await start(*(scheduler.infer(numbered(n), priority=low) for n in range(5)))
        found = scheduler.statistics()
        assert (found.offered, found.admitted, found.waiting, found.queued, found.running) == (6, 3, 3, 2, 1)
        assert (found.calls_in_flight, found.slots) == (1, 1)
        assert [found.classes[priority.name.lower()].queued for priority in Priority] == [0, 2, 0]
        await asyncio.gather(*callers)
        found = scheduler.statistics()
    assert (found.calls, found.rows, found.batch_sizes) == (4, 7, {1: 1, 2: 3})
    assert found.busy_time == pytest.approx(4 * CALL)
    live, throughput = found.classes["latency_critical"], found.classes["throughput"]
    assert (live.succeeded, throughput.succeeded) == (1, 5)
    assert (live.queue_time_total, live.latency_total) == (0.0, pytest.approx(CALL))
    assert throughput.latency_total == pytest.approx((2 + 2 + 3 + 3 + 4) * CALL)
    assert throughput.queue_time_total == pytest.approx((1 + 1 + 2 + 2 + 3) * CALL)
    assert live.latency_p50 == pytest.approx(CALL, rel=0.2)
    assert found.classes["background"].latency_p99 is None


@virtual
async def test_latencies_between_two_moments_are_the_difference_of_their_counts() -> None:
    async with virtual_scheduler(slow()) as scheduler:
        await scheduler.infer(numbered(0))
        before = scheduler.statistics().classes
        await scheduler.infer(numbered(1))
        await scheduler.infer(numbered(2), priority=Priority.THROUGHPUT)
        after = scheduler.statistics().classes
    new = {
        name: [
            now - then
            for now, then in zip(
                counts_of(after[name].latency_counts), counts_of(before[name].latency_counts), strict=True
            )
        ]
        for name in ("latency_critical", "throughput", "background")
    }
    assert {name: sum(counts) for name, counts in new.items()} == {
        "latency_critical": 1,
        "throughput": 1,
        "background": 0,
    }
    assert BOUNDS[new["throughput"].index(1)] == pytest.approx(CALL, rel=0.2)


@virtual
async def test_statistics_can_be_sent_anywhere() -> None:
    async with virtual_scheduler(slow()) as scheduler:
        await scheduler.infer(numbered(1))
        found = msgspec.to_builtins(scheduler.statistics())
    assert found["succeeded"] == 1
    assert found["classes"]["latency_critical"]["succeeded"] == 1


@virtual
async def test_depth_counts_what_is_queued_and_running() -> None:
    async with virtual_scheduler(slow(), batch=BatchPolicy(max_batch_size=1)) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(4)))
        assert scheduler.get_queue_depth() == (0, 4)
        await asyncio.gather(*callers)
        assert scheduler.get_queue_depth() == (0, 0)


@virtual
async def test_metrics_add_the_engines_up() -> None:
    engines = [slow(faults=FaultPlan(Fault(value=POISON, error=ValueError))) for _ in range(2)]
    async with virtual_scheduler(*engines, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        await scheduler.infer_many([numbered(n) for n in (1, 2, 3, POISON)], return_exceptions=True)
        found = scheduler.metrics()
    assert (found.calls, found.rows, found.errors) == (4, 3, 1)
    assert found.busy_time == pytest.approx(4 * CALL)


@virtual
async def test_repr_says_what_statistics_say() -> None:
    scheduler = virtual_scheduler(slow(), batch=BatchPolicy(max_batch_size=2))
    assert repr(scheduler) == "<Scheduler starting>"
    async with scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(5)))
        assert repr(scheduler) == "<Scheduler 'fake' ready: 3 queued, 2 running, 1 calls in flight of 1 slots>"
        await asyncio.gather(*callers)
    assert repr(scheduler) == "<Scheduler closed>"


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 0.010), (90, 0.010), (99, 1.0), (100, 1.0)], ids=["p50", "p90", "p99", "p100"]
)
def test_a_percentile_is_right_to_within_a_bucket(percent: float, expected: float) -> None:
    histogram, durations = Histogram(), Durations()
    histogram.extend([-0.010] * 95 + [-1.0] * 5, 0.0)
    for microseconds in [10_000] * 95 + [1_000_000] * 5:
        durations.add(microseconds)
    assert histogram.percentile(percent) == durations.percentile(percent) == pytest.approx(expected, rel=0.2)


def test_what_is_beyond_the_buckets_counts_as_the_last() -> None:
    histogram, durations = Histogram(), Durations()
    histogram.extend([0.0], 1e6)
    durations.add(1_000_000_000_000)
    assert histogram.percentile(50) == durations.percentile(50) == pytest.approx(140, rel=0.25)


def test_there_is_no_percentile_of_nothing() -> None:
    assert Histogram().percentile(50) is None
    assert Durations().percentile(50) is None


def test_whole_microseconds_are_sorted_as_seconds_are() -> None:
    histogram, durations = Histogram(), Durations()
    for bound in BOUNDS:
        for microseconds in (int(bound * 1e6), int(bound * 1e6) + 1):
            histogram.extend([0.0], microseconds / 1e6)
            durations.add(microseconds)
    assert durations.counts == histogram.counts
    assert durations.total == pytest.approx(histogram.total)


def test_less_than_nothing_counts_as_nothing() -> None:
    durations = Durations()
    durations.add(2_000_000)
    durations.add(-5_000_000)
    assert (durations.count, durations.counts[0], durations.total) == (2, 1, 2.0)


# --------------------------------------------------------------------------------------------------- health


@virtual
async def test_a_scheduler_that_was_not_entered_is_not_ready() -> None:
    health = virtual_scheduler(slow()).health()
    assert (health.healthy, health.ready, health.status) == (False, False, "starting")


@virtual
async def test_health_knows_no_load() -> None:
    queue = QueuePolicy(max_size=100, max_waiting=100)
    async with virtual_scheduler(slow(), batch=BatchPolicy(max_batch_size=1), queue=queue) as scheduler:
        idle = scheduler.health()
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(300)))
        assert scheduler.health() == idle
        assert (idle.healthy, idle.ready, idle.status) == (True, True, "ready")
        await asyncio.gather(*callers, return_exceptions=True)


@virtual
async def test_a_call_far_beyond_its_time_is_stuck() -> None:
    engine = slow(faults=FaultPlan(Fault(calls={2}, hang=True)))
    async with virtual_scheduler(engine) as scheduler:
        await scheduler.infer(numbered(1))
        callers = await start(scheduler.infer(numbered(1)))
        await asyncio.sleep(4.9)
        assert statuses(scheduler) == ["ready"]
        await asyncio.sleep(0.2)
        health = scheduler.health()
        assert (statuses(scheduler), health.healthy, health.ready) == (["stuck"], False, False)
        engine.release()
        await asyncio.gather(*callers)
        assert scheduler.health().healthy


@virtual
async def test_a_long_call_is_stuck_only_far_beyond_what_such_calls_take() -> None:
    engine = FakeAsyncEngine(cost=lambda rows: 1.0, faults=FaultPlan(Fault(calls={4}, hang=True)))
    async with virtual_scheduler(engine) as scheduler:
        for _ in range(3):
            await scheduler.infer(numbered(1))
        callers = await start(scheduler.infer(numbered(1)))
        await asyncio.sleep(19)
        assert statuses(scheduler) == ["ready"]
        await asyncio.sleep(2)
        assert statuses(scheduler) == ["stuck"]
        engine.release()
        await asyncio.gather(*callers)


@virtual
async def test_a_stream_takes_what_time_it_takes() -> None:
    engine = FakeAsyncEngine(cost=lambda rows: 4.0, chunks=10)
    async with virtual_scheduler(engine) as scheduler:
        async for _ in scheduler.infer_stream(numbered(1)):
            assert scheduler.health().healthy


@virtual
async def test_some_engines_lost_is_degraded_and_all_is_unavailable() -> None:
    engines = [slow(faults=FaultPlan(Fault(value=POISON, error=Unavailable, failed_checks=9))) for _ in range(2)]
    async with virtual_scheduler(*engines) as scheduler:
        engines[1]._faults = None
        await scheduler.infer(numbered(POISON), session_id=session_of(0))
        health = scheduler.health()
        assert (health.healthy, health.ready, health.status) == (False, True, "degraded")
        assert [engine.name for engine in health.engines] == ["FakeAsyncEngine-0", "FakeAsyncEngine-1"]
        assert statuses(scheduler) == ["lost", "ready"]
        engines[1].lose(failed_checks=9)
        await asyncio.gather(scheduler.infer(numbered(1)), return_exceptions=True)
        health = scheduler.health()
        assert (health.healthy, health.ready, health.status) == (False, False, "unavailable")


# ------------------------------------------------------------------------------------------------- observer


class Diary:
    """An observer that remembers, and may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self._error = error

    def on_call(self, **figures: Any) -> None:
        self.calls.append(figures)
        if self._error is not None:
            raise self._error


@virtual
async def test_an_observer_is_told_of_every_call() -> None:
    diary = Diary()
    engine = slow(faults=FaultPlan(Fault(value=POISON, error=ValueError)))
    async with virtual_scheduler(engine, observer=diary) as scheduler:
        await scheduler.infer_many([numbered(1, rows=2), numbered(2)])
        await asyncio.gather(scheduler.infer(numbered(POISON)), return_exceptions=True)
    members = [[item.rows for item in call.pop("members")] for call in diary.calls]
    assert members == [[2, 1], [1]]
    assert diary.calls == [
        {"rows": 3, "requests": 2, "started": 0.0, "elapsed": pytest.approx(CALL), "failed": False},
        {"rows": 1, "requests": 1, "started": pytest.approx(CALL), "elapsed": pytest.approx(CALL), "failed": True},
    ]


@virtual
async def test_an_observer_that_fails_is_logged_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Two engines end their calls in the same moment, so that both are told of in one pass."""
    diary = Diary(error=KeyError("broken"))
    async with virtual_scheduler(slow(), slow(), observer=diary) as scheduler, asyncio.timeout(1):
        answers = await scheduler.infer_many([numbered(n) for n in range(128)])
    assert len(answers) == 128
    assert len(diary.calls) == 4
    settlement = "kapsl_scheduler.runtime.settlement"
    assert [(record.name, record.levelno) for record in caplog.records] == [(settlement, logging.ERROR)] * 4


async def test_an_observer_is_told_on_the_loops_thread() -> None:
    threads: list[asyncio.AbstractEventLoop] = []

    class Here:
        def on_call(self, **figures: Any) -> None:
            threads.append(asyncio.get_running_loop())

    async with Scheduler([FakeEngine()], observer=Here()) as scheduler:
        await scheduler.infer(numbered(1))
        await start()
        assert threads == [asyncio.get_running_loop()]
