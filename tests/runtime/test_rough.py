"""Rough handling: what callers and engines may hand in, and what must not come of it for anybody else."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import (
    BatchPolicy,
    DeadlineExceeded,
    InferenceError,
    InferenceRequest,
    InvalidInput,
    Overloaded,
    Priority,
    QueuePolicy,
    RequestMetadata,
    Scheduler,
    Unavailable,
)
from kapsl_scheduler.core.queue import RequestQueue
from kapsl_scheduler.errors import EngineError
from kapsl_scheduler.runtime.entrance import Phase
from kapsl_scheduler.runtime.metrics import BOUNDS, Histogram
from kapsl_scheduler.testing import FakeAsyncEngine, FakeEngine, Fault, FaultPlan
from kapsl_scheduler.testing.engines import FAKE_INFO
from kapsl_scheduler.types import InferenceResponse, ModelInfo, TensorSpec
from tests.runtime.helpers import FIXED_INFO, numbered, session_of, start, until_async, virtual_scheduler
from tests.runtime.virtual import virtual

CALL = 1.0  # seconds


def engine_with(*faults: Fault, **parameters: Any) -> FakeAsyncEngine:
    return FakeAsyncEngine(cost=lambda rows: CALL, faults=FaultPlan(*faults), **parameters)


def heard(results: list[Any]) -> list[type]:
    return [type(result) for result in results]


# ----------------------------------------------------------------------------------- what callers hand in


@pytest.mark.parametrize("verdict", [None, 7, "urgent", 1.5])
@virtual
async def test_a_policy_that_names_no_class_harms_only_who_asked_it(verdict: Any) -> None:
    async with virtual_scheduler(engine_with(), default_priority=lambda profile: verdict) as scheduler:
        asks = [scheduler.infer(numbered(n), priority=None if n == 1 else Priority.THROUGHPUT) for n in range(3)]
        results = await asyncio.gather(*asks, return_exceptions=True)
    assert heard(results) == [InferenceResponse, InvalidInput, InferenceResponse]
    assert "priority: expected one of 0 (LATENCY_CRITICAL)" in str(results[1])


@virtual
async def test_a_policy_may_name_a_class_by_its_number_or_name() -> None:
    classes = iter([1, "background"])
    async with virtual_scheduler(engine_with(), default_priority=lambda profile: next(classes)) as scheduler:
        await scheduler.infer_many([numbered(0), numbered(1)])
        assert [figures.succeeded for figures in scheduler.statistics().classes.values()] == [0, 1, 1]


def test_so_may_the_default_and_nothing_else() -> None:
    Scheduler(FakeEngine(), default_priority="throughput")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="default_priority: expected one of 0"):
        Scheduler(FakeEngine(), default_priority="urgent")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [np.array, np.float32, np.float16, Decimal, lambda seconds: 1])
@virtual
async def test_a_timeout_is_any_number_however_long_the_machine_has_been_up(kind: Any) -> None:
    up = 2e6  # seconds: beside so many, half a second is nothing to numpy's narrower floats
    loop = asyncio.get_running_loop()
    async with Scheduler(engine_with(), clock=lambda: up + loop.time()) as scheduler:
        running = await start(scheduler.infer(numbered(0)))
        asks = [scheduler.infer(numbered(n), timeout=kind(0.5) if n == 1 else 9.0) for n in range(3)]
        results = await asyncio.gather(*asks, return_exceptions=True)
        assert loop.time() == pytest.approx(2 * CALL)
        await asyncio.gather(*running)
    assert heard(results) == [InferenceResponse, DeadlineExceeded, InferenceResponse]


@pytest.mark.parametrize("timeout", [10**400, -1, math.nan, "5", b"5", [], np.array([1.0, 2.0]), True - 1])
@virtual
async def test_and_nothing_else(timeout: Any) -> None:
    async with virtual_scheduler(engine_with()) as scheduler:
        with pytest.raises(InvalidInput, match="timeout: expected more than 0 seconds, got "):
            await scheduler.infer(numbered(0), timeout=timeout)
        assert scheduler.statistics().invalid == 1


@virtual
async def test_an_endless_timeout_is_none() -> None:
    engine = engine_with()
    async with virtual_scheduler(engine, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        await start(scheduler.infer(numbered(0)))
        limits = [math.inf, None, math.inf, np.inf]
        await asyncio.gather(*(scheduler.infer(numbered(n + 1), timeout=limit) for n, limit in enumerate(limits)))
    assert [call.inputs["x"][0, 0] for call in engine.calls] == [0, 1, 2, 3, 4]  # as they arrived


@virtual
async def test_a_tenant_or_a_session_that_is_no_text_is_invalid() -> None:
    engines = [engine_with(), engine_with()]
    async with virtual_scheduler(*engines, queue=QueuePolicy(tenant_fairness=True)) as scheduler:
        for odd, name in (
            (scheduler.infer(numbered(0), session_id=7), "session_id"),  # type: ignore[arg-type]
            (scheduler.infer(InferenceRequest(numbered(0), metadata=RequestMetadata(tenant=["a"]))), "tenant"),  # type: ignore[arg-type]
        ):
            with pytest.raises(InvalidInput, match=f"{name}: expected a string, got "):
                await odd
        assert scheduler.statistics().invalid == 2


def test_shares_are_given_by_class_or_by_its_name() -> None:
    named = QueuePolicy(shares={"throughput": 0.5, "BACKGROUND": 0.1})  # type: ignore[dict-item]
    assert named.share_by_class() == {Priority.THROUGHPUT: 0.5, Priority.BACKGROUND: 0.1}
    with pytest.raises(ValueError, match="shares: expected one of 0"):
        QueuePolicy(shares={"bulk": 0.5})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="shares: expected classes below LATENCY_CRITICAL"):
        QueuePolicy(shares={Priority.LATENCY_CRITICAL: 0.5})


@virtual
async def test_an_array_of_another_byte_order_is_called_so() -> None:
    async with virtual_scheduler(engine_with()) as scheduler:
        with pytest.raises(InvalidInput, match=r"dtype >f4 \(of another byte order\), expected float32"):
            await scheduler.infer(numbered(0).astype(">f4"))


@virtual
async def test_what_breaks_while_they_are_let_in_is_told_to_those_who_arrived(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with virtual_scheduler(engine_with()) as scheduler:
        push = RequestQueue.push_many

        def broken(queue: RequestQueue, items: Any) -> int:
            push(queue, items[:1])
            raise RuntimeError("a fault of our own")

        (running,) = await start(scheduler.infer(numbered(0)))
        monkeypatch.setattr(RequestQueue, "push_many", broken)
        results = await asyncio.gather(*(scheduler.infer(numbered(n)) for n in (1, 2)), return_exceptions=True)
        monkeypatch.undo()
        assert heard(results) == [InferenceError] * 2
        assert "a fault of our own" in caplog.text
        assert (await scheduler.infer(numbered(3))).output[0, 0] == 3
        await running
        figures = scheduler.statistics()
        assert (figures.offered, figures.failed, figures.succeeded, figures.queued, figures.running) == (4, 2, 2, 0, 0)


# -------------------------------------------------------------------------------------- what engines do


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise AttributeError("no words")


class Unrepeatable(EngineError):
    def __new__(cls, *necessary: Any) -> Any:
        if not necessary:
            raise TypeError("give me a reason")
        return super().__new__(cls)


@pytest.mark.parametrize("error", [Unspeakable(), Unrepeatable("so")])
@virtual
async def test_an_error_that_cannot_be_told_is_told_all_the_same(error: Exception) -> None:
    class Failing(FakeAsyncEngine):
        async def infer(self, inputs: Any) -> Any:
            raise error

    async with virtual_scheduler(Failing()) as scheduler:
        results = await asyncio.gather(*(scheduler.infer(numbered(n)) for n in range(2)), return_exceptions=True)
        assert all(isinstance(result, EngineError) for result in results)
        assert scheduler.statistics().failed == 2


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (None, "the engine returned NoneType, expected a mapping of arrays"),
        ([[1.0, 2.0]], "the engine returned list, expected a mapping of arrays"),
        ({"y": [[1.0, 2.0]]}, "output 'y': expected an array, got list"),
    ],
)
@virtual
async def test_outputs_that_are_none_are_called_so(outputs: Any, said: str) -> None:
    async with virtual_scheduler(FakeAsyncEngine(lambda inputs: outputs)) as scheduler:
        with pytest.raises(InferenceError, match=said):
            await scheduler.infer(numbered(0))


@pytest.mark.parametrize("kind", [FakeEngine, FakeAsyncEngine])
@pytest.mark.parametrize("chunk", [None, 3, [1.0]])
async def test_a_chunk_that_is_none_ends_the_stream_with_an_error(kind: Any, chunk: Any) -> None:
    async with Scheduler(kind(lambda inputs: chunk, chunks=3)) as scheduler:
        with pytest.raises(
            InferenceError, match=r"the engine's stream has .* for a chunk, expected a mapping of arrays"
        ):
            async for _ in scheduler.infer_stream(numbered(0)):
                pass
        assert scheduler.statistics().failed == 1


@pytest.mark.parametrize("fallback", [False, True])
@virtual
async def test_a_batch_that_fails_on_an_engine_that_another_call_has_lost_is_not_given_back_to_it(
    fallback: bool,
) -> None:
    """Nobody would ever pull it there."""
    faults = FaultPlan(
        Fault(value=13.0, error=Unavailable, failed_checks=10**9),
        Fault(value=7.0, error=ValueError, delay=CALL),
    )
    spare = FakeAsyncEngine()
    engine = FakeAsyncEngine(cost=lambda rows: CALL, faults=faults)
    engine.for_cpu = lambda: spare  # type: ignore[method-assign]
    parameters: dict[str, Any] = {"workers_per_engine": 2, "enable_fallback": fallback}
    async with virtual_scheduler(engine, **parameters) as scheduler:
        fails = await start(scheduler.infer(numbered(7)), scheduler.infer(numbered(7)))
        loses = await start(scheduler.infer(numbered(13)))
        results = await asyncio.gather(*fails, *loses, return_exceptions=True)
    if fallback:
        assert heard(results) == [InferenceResponse] * 3
    else:
        assert heard(results) == [Unavailable] * 3


@virtual
async def test_nor_does_a_session_keep_its_members_there() -> None:
    faults = FaultPlan(
        Fault(value=13.0, error=Unavailable, failed_checks=10**9),
        Fault(value=7.0, error=ValueError, delay=CALL),
    )
    lost, other = FakeAsyncEngine(cost=lambda rows: CALL, faults=faults), FakeAsyncEngine()
    async with virtual_scheduler(lost, other, workers_per_engine=2) as scheduler:
        fails = await start(*(scheduler.infer(numbered(7), session_id=session_of(0)) for _ in range(2)))
        loses = await start(scheduler.infer(numbered(13), session_id=session_of(0)))
        results = await asyncio.gather(*fails, *loses, return_exceptions=True)
    assert heard(results) == [InferenceResponse] * 3


def test_an_interrupt_in_a_call_on_the_loops_thread_ends_the_program() -> None:
    class Interrupted(FakeEngine):
        def infer(self, inputs: Any) -> Any:
            if inputs["x"][0, 0] == 13:
                raise KeyboardInterrupt
            return super().infer(inputs)

    engine = Interrupted(info=FIXED_INFO)
    engine.bounded_call = True

    async def main() -> None:
        async with Scheduler(engine) as scheduler:
            await until_async(lambda: scheduler._main._idle)
            scheduler._main.engines[0].on_loop = True  # however slow this machine is
            await scheduler.infer(numbered(13))

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())


# ------------------------------------------------------------------------------------------- beginnings, ends


def test_a_loop_that_ends_without_a_close_ends() -> None:
    async def main() -> Any:
        scheduler = await Scheduler(FakeAsyncEngine()).__aenter__()
        return await scheduler.infer(numbered(1))

    assert asyncio.run(main()).output[0, 0] == 1


@virtual
async def test_a_close_that_is_cancelled_again_and_again_is_a_close() -> None:
    scheduler = await virtual_scheduler(engine_with(Fault(hang=True))).__aenter__()
    caller = asyncio.ensure_future(scheduler.infer(numbered(0)))
    closing = asyncio.ensure_future(scheduler.close(50.0))
    for _ in range(3):
        await asyncio.sleep(0)
        closing.cancel()
    await asyncio.gather(closing, caller, return_exceptions=True)
    assert scheduler._entrance.phase is Phase.CLOSED
    await asyncio.wait_for(scheduler.close(), 1.0)
    await scheduler._stop()  # what the cancelled close left behind


class Loading(FakeAsyncEngine):
    async def load(self) -> None:
        await asyncio.sleep(CALL)
        await super().load()


@virtual
async def test_entering_twice_at_once_is_refused() -> None:
    scheduler = virtual_scheduler(Loading())
    entering, again = await start(scheduler.__aenter__(), scheduler.__aenter__())
    results = await asyncio.gather(entering, again, return_exceptions=True)
    assert heard(results) == [Scheduler, RuntimeError]
    assert "the scheduler is loading: each is entered once" in str(results[1])
    await scheduler.close()


@virtual
async def test_who_closes_a_scheduler_that_is_being_entered_waits_for_it_and_it_never_opens() -> None:
    engine = Loading()
    scheduler = virtual_scheduler(engine)
    entering, closing = await start(scheduler.__aenter__(), scheduler.close())
    results = await asyncio.gather(entering, closing, return_exceptions=True)
    assert heard(results) == [Unavailable, type(None)]
    assert scheduler.health().status == "closed"
    assert not engine.loaded


@virtual
async def test_a_variant_for_the_cpu_must_be_the_same_model() -> None:
    other = ModelInfo("other", (TensorSpec("z", "float32", ("batch", 2), 0),), FAKE_INFO.outputs, batchable=True)
    engine = engine_with()
    engine.for_cpu = lambda: FakeAsyncEngine(info=other)  # type: ignore[method-assign]
    async with virtual_scheduler(engine) as scheduler:
        with pytest.raises(EngineError, match="the engine's variant for the CPU is another model"):
            await scheduler.infer(numbered(0), force_cpu=True)
        assert (await scheduler.infer(numbered(1))).output[0, 0] == 1


@virtual
async def test_a_variant_for_the_cpu_that_is_no_engine_fails_who_asked() -> None:
    engine = engine_with()
    engine.for_cpu = object  # type: ignore[method-assign,assignment,return-value]
    async with virtual_scheduler(engine) as scheduler:
        with pytest.raises(InferenceError, match="AttributeError"):
            await asyncio.wait_for(scheduler.infer(numbered(0), force_cpu=True), 5.0)


# ---------------------------------------------------------------------------------------- time, memory


@virtual
async def test_who_gets_a_place_that_another_gave_up_does_not_wait_for_the_next_event() -> None:
    queue = QueuePolicy(max_bytes=40)
    async with virtual_scheduler(engine_with(), engine_with(), queue=queue) as scheduler:
        pinned = {"session_id": session_of(0)}
        busy = await start(scheduler.infer(numbered(0), **pinned))
        queued = await start(scheduler.infer(numbered(1, rows=4), **pinned))
        large = await start(scheduler.infer(numbered(2, rows=4), block_timeout=0.2, **pinned))
        small = asyncio.ensure_future(scheduler.infer(numbered(3)))
        with pytest.raises(Overloaded, match="no room in the queue in time"):
            await large[0]
        await small
        assert asyncio.get_running_loop().time() == pytest.approx(0.2 + CALL)
        await asyncio.gather(*busy, *queued)


@virtual
async def test_one_of_many_that_waited_for_its_turn_hears_of_its_deadline_in_time() -> None:
    loop = asyncio.get_running_loop()
    queue = QueuePolicy(max_size=1)
    async with virtual_scheduler(engine_with(Fault(value=13.0, hang=True)), queue=queue) as scheduler:
        (hangs,) = await start(scheduler.infer(numbered(13)))
        many = asyncio.ensure_future(
            scheduler.infer_many([numbered(n) for n in range(3)], timeout=0.8, return_exceptions=True)
        )
        await asyncio.sleep(0.5)
        later = asyncio.ensure_future(scheduler.infer(numbered(3), timeout=0.8, overflow="drop_oldest"))
        assert heard(await many) == [Overloaded, DeadlineExceeded, DeadlineExceeded]
        assert loop.time() == pytest.approx(0.8)
        with pytest.raises(DeadlineExceeded):
            await later
        assert loop.time() == pytest.approx(1.3)
        hangs.cancel()
        await asyncio.gather(hangs, return_exceptions=True)
        await scheduler.close(0.0)


@virtual
async def test_what_was_cancelled_in_the_queue_is_not_kept_until_its_deadline() -> None:
    async with virtual_scheduler(engine_with()) as scheduler:
        (running,) = await start(scheduler.infer(numbered(0)))
        arrays = [numbered(n) for n in range(20)]
        kept = [weakref.ref(array) for array in arrays]
        callers = await start(*(scheduler.infer(array, timeout=3600.0) for array in arrays))
        arrays.clear()
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        del callers, caller
        await asyncio.sleep(0)
        gc.collect()
        assert not any(reference() is not None for reference in kept)
        await running


@virtual
async def test_one_who_waits_long_keeps_few_of_the_answers_behind_it() -> None:
    engine = FakeAsyncEngine(faults=FaultPlan(Fault(value=13.0, hang=True)))
    async with virtual_scheduler(engine, workers_per_engine=2) as scheduler:
        (hangs,) = await start(scheduler.infer(numbered(13), timeout=3600.0))
        kept = []
        for number in range(20, 270):
            answer = await scheduler.infer(numbered(number), timeout=3600.0)
            kept.append(weakref.ref(answer.output))
            del answer
        engine.calls.clear()
        gc.collect()
        assert sum(reference() is not None for reference in kept) < 80
        hangs.cancel()
        await asyncio.gather(hangs, return_exceptions=True)
        await scheduler.close(0.0)


def test_a_histogram_that_is_asked_is_not_changed() -> None:
    """Whoever asks may be another thread than the one that writes."""
    histogram = Histogram()
    histogram.extend([0.0, 0.5], 1.0)
    before = histogram._kept
    assert (histogram.count, histogram.total) == (2, 1.5)
    assert histogram._kept is before
    for _ in range(300):
        histogram.extend([0.0, 0.5], 1.0)
    histogram.extend([], 1.0)
    assert (histogram.count, histogram.total) == (602, 451.5)
    assert len(histogram._kept.fresh) < 200
    assert len(histogram.counts) == len(BOUNDS) + 1
