"""Engines that are lost, and who takes over: other engines, the CPU lane, nobody."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import BatchPolicy, QueuePolicy, Scheduler
from kapsl_scheduler.core.routing import rendezvous
from kapsl_scheduler.errors import InferenceError, InvalidInput, ModelLoadError, Overloaded, Unavailable
from kapsl_scheduler.testing import FakeAsyncEngine, FakeEngine, Fault, FaultPlan
from kapsl_scheduler.types import InferenceResponse
from tests.runtime.helpers import FIXED_INFO, numbered, session_of, start, until_async, virtual_scheduler
from tests.runtime.virtual import virtual

POISON = 13.0
CALL = 0.01


def engine_with(*faults: Fault) -> FakeAsyncEngine:
    return FakeAsyncEngine(cost=lambda rows: CALL, faults=FaultPlan(*faults))


def fragile(*, failed_checks: int = 10**9) -> FakeAsyncEngine:
    """An engine that is lost by one value, by default for good."""
    return engine_with(Fault(value=POISON, error=Unavailable, failed_checks=failed_checks))


def numbers(engine: FakeAsyncEngine) -> list[list[float]]:
    return [call.inputs["x"][:, 0].tolist() for call in engine.calls]


# ------------------------------------------------------------------------------------------ other engines


@virtual
async def test_members_of_a_lost_engine_run_alone_on_another() -> None:
    first, second = engine_with(Fault(error=Unavailable, failed_checks=10**9)), engine_with()
    async with virtual_scheduler(first, second, batch=BatchPolicy(max_batch_size=4)) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(8)))
        answers = await asyncio.gather(*callers)
        found = scheduler.statistics()
    assert [answer.output[0, 0] for answer in answers] == list(range(8))
    assert first.batch_rows == [4]
    assert sorted(second.batch_rows) == [1, 1, 1, 1, 4]
    assert (found.retried, found.failed) == (4, 0)


@virtual
async def test_who_loses_two_engines_fails_and_only_the_guilty_meets_a_second() -> None:
    engines = [fragile() for _ in range(3)]
    async with virtual_scheduler(*engines, batch=BatchPolicy(max_batch_size=8)) as scheduler:
        answers = await asyncio.gather(*(scheduler.infer(numbered(n)) for n in (1, POISON, 2)), return_exceptions=True)
        states = [engine.status for engine in scheduler.health().engines]
    assert [type(answer) for answer in answers] == [InferenceResponse, Unavailable, InferenceResponse]
    assert sorted(states) == ["lost", "lost", "ready"]


@virtual
async def test_a_lost_engine_gets_nothing_until_its_health_check_succeeds() -> None:
    """Checks come after 0.5 s, then after twice as long each time."""
    engines = [fragile(failed_checks=2), engine_with()]
    async with virtual_scheduler(*engines, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        answer = await scheduler.infer(numbered(POISON), session_id=session_of(0))
        assert answer.output[0, 0] == POISON  # the other engine does not mind it
        assert [engine.status for engine in scheduler.health().engines] == ["lost", "ready"]
        while asyncio.get_running_loop().time() < CALL + 0.5 + 1 + 2 - 0.1:
            await scheduler.infer_many([numbered(n) for n in range(4)])
        assert numbers(engines[0]) == [[POISON]]
        await asyncio.sleep(0.2)
        assert scheduler.health().healthy
        await scheduler.infer_many([numbered(n) for n in range(4)])
    assert len(engines[0].calls) == 3


# ---------------------------------------------------------------------------------------------- no engine


@virtual
async def test_without_a_working_engine_everybody_hears_unavailable_at_once() -> None:
    batch, queue = BatchPolicy(max_batch_size=1), QueuePolicy(max_size=1)
    async with virtual_scheduler(fragile(), batch=batch, queue=queue) as scheduler:
        callers = await start(scheduler.infer(numbered(POISON)))
        callers += await start(*(scheduler.infer(numbered(n)) for n in range(2)))
        found = scheduler.statistics()
        assert (found.running, found.queued, found.waiting) == (1, 1, 1)
        answers = await asyncio.gather(*callers, return_exceptions=True)
        assert asyncio.get_running_loop().time() == pytest.approx(CALL)
        with pytest.raises(Unavailable) as caught:
            await scheduler.infer(numbered(1))
        assert caught.value.retry_after is not None
        found = scheduler.statistics()
    assert [type(answer) for answer in answers] == [Unavailable] * 3
    assert (found.failed, found.refused) == (2, 2)


@pytest.mark.parametrize("kind", [FakeAsyncEngine, FakeEngine])
async def test_a_health_check_that_fails_is_logged_and_asked_again(
    kind: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kapsl_scheduler.runtime.worker.PROBE_FIRST", 0.001)

    class Moody(kind):  # type: ignore[misc]
        checks = 0

        def health_check(self) -> bool:
            self.checks += 1
            if self.checks == 1:
                raise OSError("who asks?")
            self.recover()
            return True

    engine = Moody(faults=FaultPlan(Fault(value=POISON, error=Unavailable)))
    async with Scheduler([engine]) as scheduler:
        with pytest.raises(Unavailable):
            await scheduler.infer(numbered(POISON))
        await until_async(lambda: scheduler.health().ready)
        assert (await scheduler.infer(numbered(3))).output[0, 0] == 3
    assert "Moody-0.0: the health check failed" in caplog.text


@pytest.mark.parametrize("kind", [FakeAsyncEngine, FakeEngine])
async def test_a_slot_that_fails_leaves_its_work_to_others(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A fault of the slot's own, which no engine can cause."""
    engines = [each(cost=lambda rows: 0.001) for each in (kind, FakeAsyncEngine)]
    async with Scheduler(engines, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        [broken, _] = scheduler._main.workers
        broken.run_call = broken._run = None  # type: ignore[method-assign,union-attr]
        answers = await asyncio.gather(*(scheduler.infer(numbered(n)) for n in range(8)))
        found = scheduler.statistics()
        assert [engine.status for engine in scheduler.health().engines] == ["lost", "ready"]
    assert [answer.output[0, 0] for answer in answers] == list(range(8))
    assert (found.succeeded, found.calls_in_flight) == (8, 0)
    assert "the slot failed" in caplog.text


@virtual
async def test_a_lone_engine_that_recovers_serves_again() -> None:
    async with virtual_scheduler(fragile(failed_checks=1)) as scheduler:
        with pytest.raises(Unavailable):
            await scheduler.infer(numbered(POISON))
        assert not scheduler.health().ready
        await asyncio.sleep(2)
        assert scheduler.health().healthy
        assert (await scheduler.infer(numbered(3))).output[0, 0] == 3


async def test_a_lone_engine_in_a_thread_that_recovers_serves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kapsl_scheduler.runtime.worker.PROBE_FIRST", 0.001)
    engine = FakeEngine(faults=FaultPlan(Fault(value=POISON, error=Unavailable)))
    async with Scheduler([engine], workers_per_engine=2) as scheduler:
        with pytest.raises(Unavailable):
            await scheduler.infer(numbered(POISON))
        await until_async(lambda: scheduler.health().ready)
        assert (await scheduler.infer(numbered(3))).output[0, 0] == 3


async def test_an_engine_on_the_loops_thread_that_is_lost_is_asked_for_its_health(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kapsl_scheduler.runtime.worker.PROBE_FIRST", 0.001)
    monkeypatch.setattr("kapsl_scheduler.runtime.worker.LOOP_CALL_LIMIT", 10.0)
    engine = FakeEngine(info=FIXED_INFO, faults=FaultPlan(Fault(value=POISON, error=Unavailable)))
    engine.bounded_call = True
    async with Scheduler([engine]) as scheduler:
        assert scheduler._main.engines[0].on_loop
        await until_async(lambda: scheduler._main._idle)
        with pytest.raises(Unavailable):
            await scheduler.infer(numbered(POISON))
        await until_async(lambda: scheduler.health().ready)
        assert (await scheduler.infer(numbered(3))).output[0, 0] == 3


# ------------------------------------------------------------------------------------------------ sessions


@virtual
async def test_a_session_stays_on_one_engine() -> None:
    engines = [engine_with() for _ in range(3)]
    async with virtual_scheduler(*engines) as scheduler:
        for name in "abcdefgh":
            for _ in range(3):
                await scheduler.infer(numbered(ord(name)), session_id=name)
    for name in "abcdefgh":
        home = rendezvous(name, range(3))
        assert [sum([ord(name)] in numbers(engine) for engine in engines)] == [1]
        assert numbers(engines[home]).count([ord(name)]) == 3


@virtual
async def test_sessions_of_a_lost_engine_move_on() -> None:
    engines = [fragile(), engine_with()]
    async with virtual_scheduler(*engines, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        callers = await start(scheduler.infer(numbered(POISON), session_id=session_of(0)))
        callers += await start(*(scheduler.infer(numbered(n), session_id=session_of(0)) for n in range(3)))
        answers = await asyncio.gather(*callers)
        later = await scheduler.infer(numbered(9), session_id=session_of(0))
        scheduler._main.queue.validate()
    assert [answer.output[0, 0] for answer in (*answers, later)] == [POISON, 0, 1, 2, 9]
    assert numbers(engines[0]) == [[POISON]]


@virtual
async def test_a_pinned_member_of_a_failed_batch_comes_back_to_its_own_engine() -> None:
    """The other engine is idle too, and the last to have become so: waking that one would help nobody."""
    fault = Fault(value=POISON, error=ValueError)
    engines = [
        FakeAsyncEngine(cost=lambda rows: CALL, faults=FaultPlan(fault)),
        FakeAsyncEngine(cost=lambda rows: CALL + 0.5e-9),  # later, but in the same pass of the loop
    ]
    async with virtual_scheduler(*engines) as scheduler:
        async with asyncio.timeout(1):
            answers = await asyncio.gather(
                *(scheduler.infer(numbered(n), session_id=session_of(0)) for n in (1, POISON)),
                scheduler.infer(numbered(5), session_id=session_of(1)),
                return_exceptions=True,
            )
    assert [type(answer) for answer in answers] == [InferenceResponse, InferenceError, InferenceResponse]
    assert (engines[0].batch_rows, engines[1].batch_rows) == ([2, 1, 1], [1])


# ------------------------------------------------------------------------------------------------ CPU lane


def with_cpu(cpu: Any, engine: FakeAsyncEngine | None = None) -> FakeAsyncEngine:
    engine = engine or fragile()
    engine.cpu = cpu
    return engine


@virtual
async def test_force_cpu_goes_to_a_lane_of_its_own_that_is_loaded_when_first_asked_for() -> None:
    cpu = engine_with()
    engine = with_cpu(cpu)
    async with virtual_scheduler(engine) as scheduler:
        assert not cpu.loaded
        [caller] = await start(scheduler.infer(numbered(1), force_cpu=True))
        assert scheduler.get_queue_depth() == (1, 0)
        await asyncio.sleep(0.5 * CALL)
        assert [engine.status for engine in scheduler.health().engines] == ["ready", "ready"]
        await scheduler.infer(numbered(2))
        await caller
        assert scheduler.statistics().slots == 2
    assert (numbers(cpu), numbers(engine)) == ([[1]], [[2]])
    assert (cpu.loads, cpu.loaded) == (1, False)


@virtual
async def test_cpu_workers_is_the_number_of_the_lanes_slots() -> None:
    cpu = engine_with()
    async with virtual_scheduler(with_cpu(cpu), cpu_workers=3, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        await scheduler.infer_many([numbered(n) for n in range(6)], force_cpu=True)
    assert cpu.max_in_flight == 3


@virtual
async def test_the_lane_has_the_same_bounds() -> None:
    queue = QueuePolicy(max_size=2, max_waiting=0)
    async with virtual_scheduler(with_cpu(engine_with()), queue=queue) as scheduler:
        await scheduler.infer(numbered(0), force_cpu=True)
        await start(scheduler.infer(numbered(0), force_cpu=True))
        answers = await asyncio.gather(
            *(scheduler.infer(numbered(n), force_cpu=True) for n in range(4)), return_exceptions=True
        )
    assert [isinstance(answer, InferenceResponse) for answer in answers] == [True, True, False, False]


@virtual
async def test_an_engine_that_is_on_the_cpu_already_shares_its_slots() -> None:
    engine = engine_with()
    async with virtual_scheduler(engine) as scheduler:
        await asyncio.gather(scheduler.infer(numbered(1), force_cpu=True), scheduler.infer(numbered(2)))
        assert scheduler.statistics().slots == 1
    assert numbers(engine) == [[1, 2]]


@virtual
async def test_without_a_cpu_variant_force_cpu_is_invalid() -> None:
    async with virtual_scheduler(with_cpu(None)) as scheduler:
        with pytest.raises(InvalidInput, match="force_cpu"):
            await scheduler.infer(numbered(1), force_cpu=True)
        assert scheduler.statistics().invalid == 1


class LoadFailsOnce(FakeAsyncEngine):
    async def load(self) -> None:
        self.tries = getattr(self, "tries", 0) + 1
        if self.tries == 1:
            raise OSError("no memory")
        await super().load()


@virtual
async def test_a_lane_that_cannot_be_loaded_fails_who_asked_and_is_tried_again() -> None:
    cpu = LoadFailsOnce()
    async with virtual_scheduler(with_cpu(cpu)) as scheduler:
        with pytest.raises(ModelLoadError, match="no memory"):
            await scheduler.infer(numbered(1), force_cpu=True)
        found = scheduler.statistics()
        assert (found.failed, found.running) == (1, 0)
        assert (await scheduler.infer(numbered(2), force_cpu=True)).output[0, 0] == 2


class ThreadLoadFails(FakeEngine):
    def load(self) -> None:
        raise OSError("no memory")


async def test_a_lane_in_a_thread_that_cannot_be_loaded_leaves_no_thread() -> None:
    engine = FakeEngine()
    engine.cpu = ThreadLoadFails()
    async with Scheduler([engine]) as scheduler:
        for _ in range(2):
            with pytest.raises(ModelLoadError, match="no memory"):
                await scheduler.infer(numbered(1), force_cpu=True)


# ------------------------------------------------------------------------------------------------- fallback


@virtual
async def test_with_fallback_a_lost_device_costs_nobody_their_answer() -> None:
    cpu = engine_with()
    engine = with_cpu(cpu, engine_with(Fault(error=Unavailable, failed_checks=10**9)))
    batch = BatchPolicy(max_batch_size=2)
    async with virtual_scheduler(engine, batch=batch, enable_fallback=True) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(5)))
        answers = await asyncio.gather(*callers)
        later = await scheduler.infer(numbered(9))
        found = scheduler.statistics()
    assert [answer.output[0, 0] for answer in (*answers, later)] == [0, 1, 2, 3, 4, 9]
    assert (found.succeeded, found.failed) == (6, 0)
    assert engine.batch_rows == [2]


@virtual
async def test_with_fallback_the_guilty_takes_nobody_along_to_the_cpu_lane() -> None:
    cpu = fragile()
    async with virtual_scheduler(with_cpu(cpu), enable_fallback=True) as scheduler:
        answers = await asyncio.gather(*(scheduler.infer(numbered(n)) for n in (1, 2, POISON)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [InferenceResponse, InferenceResponse, Unavailable]
    assert cpu.batch_rows == [1, 1, 1]


@virtual
async def test_with_fallback_who_waits_for_room_is_not_refused_for_the_loss() -> None:
    queue = QueuePolicy(max_size=1)
    engine = with_cpu(engine_with(), engine_with(Fault(error=Unavailable, failed_checks=10**9)))
    batch = BatchPolicy(max_batch_size=1)
    async with virtual_scheduler(engine, batch=batch, queue=queue, enable_fallback=True) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(4)))
        assert scheduler.statistics().waiting == 2
        answers = await asyncio.gather(*callers, return_exceptions=True)
    assert [getattr(answer, "output", np.full((1, 1), -1))[0, 0] for answer in answers] == [0, 1, 2, 3]


@virtual
async def test_with_fallback_whom_the_lane_has_no_room_for_is_told() -> None:
    cpu = engine_with(Fault(calls={1}, hang=True))
    engine = with_cpu(cpu, engine_with(Fault(error=Unavailable, failed_checks=10**9)))
    batch, queue = BatchPolicy(max_batch_size=1), QueuePolicy(max_size=2, max_waiting=0)
    async with virtual_scheduler(engine, batch=batch, queue=queue, enable_fallback=True) as scheduler:
        in_lane = await start(scheduler.infer(numbered(0), force_cpu=True))
        in_lane += await start(*(scheduler.infer(numbered(n), force_cpu=True) for n in (1, 2)))
        callers = await start(scheduler.infer(numbered(3)))
        callers += await start(*(scheduler.infer(numbered(n)) for n in (4, 5)))
        await asyncio.sleep(2 * CALL)
        cpu.release()
        answers = await asyncio.gather(*in_lane, *callers, return_exceptions=True)
        found = scheduler.statistics()
    assert [type(answer) for answer in answers] == [*[InferenceResponse] * 4, Overloaded, Overloaded]
    assert (found.succeeded, found.failed) == (4, 2)  # who was in the lost call needs no room


@virtual
async def test_fallback_that_cannot_be_loaded_is_told_when_entering() -> None:
    engine = with_cpu(LoadFailsOnce())
    with pytest.raises(ModelLoadError, match="no memory"):
        await virtual_scheduler(engine, enable_fallback=True).__aenter__()
    assert not engine.loaded


@virtual
async def test_with_fallback_a_recovered_device_serves_again() -> None:
    cpu = engine_with()
    engine = with_cpu(cpu, fragile(failed_checks=0))
    async with virtual_scheduler(engine, enable_fallback=True) as scheduler:
        answers = await asyncio.gather(scheduler.infer(numbered(POISON)), return_exceptions=True)
        assert isinstance(answers[0], InferenceResponse)  # the CPU lane does not mind it
        await asyncio.sleep(1)
        await scheduler.infer(numbered(4))
    assert numbers(engine)[-1] == [4]


@virtual
async def test_fallback_without_a_cpu_variant_is_told_when_entering() -> None:
    engine = with_cpu(None)
    with pytest.raises(InvalidInput, match="CPU"):
        async with virtual_scheduler(engine, enable_fallback=True):
            pass
    assert not engine.loaded
