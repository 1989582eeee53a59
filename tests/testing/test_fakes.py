"""The fake engines and their faults: what they record, how long they take, how they fail."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler.errors import Backend, InferenceError, Unavailable
from kapsl_scheduler.testing import (
    FakeAsyncEngine,
    FakeEngine,
    Fault,
    FaultPlan,
    VirtualClock,
    run_virtual,
    spin,
)
from kapsl_scheduler.types import ModelInfo, TensorSpec


def batch(rows: int, value: float = 0.0) -> dict[str, Any]:
    return {"x": np.full((rows, 2), value, dtype=np.float32)}


def loaded(**options: Any) -> FakeEngine:
    engine = FakeEngine(**options)
    engine.load()
    return engine


async def loaded_async(**options: Any) -> FakeAsyncEngine:
    engine = FakeAsyncEngine(**options)
    await engine.load()
    return engine


def linear(rows: int) -> float:
    return 0.001 + 0.0005 * rows


# ----------------------------------------------------------------------------------- answers and records


def test_it_echoes_under_the_output_name() -> None:
    inputs = batch(3, 7.0)
    assert loaded().infer(inputs)["y"] is inputs["x"]


def test_nothing_declared_echoes_every_input() -> None:
    inputs = {"a": np.zeros(2), "b": np.ones(2)}
    assert loaded(info=ModelInfo("bare", batchable=True)).infer(inputs) == inputs


def test_it_applies_a_function() -> None:
    engine = loaded(function=lambda inputs: {"y": inputs["x"] * 2})
    assert engine.infer(batch(1, 4.0))["y"].tolist() == [[8.0, 8.0]]


def test_it_records_calls() -> None:
    clock = VirtualClock(10.0)
    engine = loaded(cost=linear, spend=clock.advance, clock=clock)
    engine.infer(batch(2))
    engine.infer(batch(4))
    first, second = engine.calls
    assert (first.number, first.rows, first.shapes) == (1, 2, {"x": (2, 2)})
    assert (first.started, first.ended, first.error) == (10.0, 10.002, None)
    assert first.thread == threading.get_ident()
    assert (second.number, second.started) == (2, 10.002)
    assert engine.batch_rows == [2, 4]
    assert engine.metrics().busy_time == pytest.approx(0.005)


def test_rows_are_counted_on_the_batch_axis() -> None:
    info = ModelInfo("state", (TensorSpec("state", "float32", (2, "N"), 1),), batchable=True)
    engine = loaded(info=info)
    engine.infer({"state": np.zeros((2, 5), dtype=np.float32)})
    assert engine.batch_rows == [5]


def test_it_counts_loads() -> None:
    engine = FakeEngine()
    assert (engine.loaded, engine.loads) == (False, 0)
    engine.load()
    engine.unload()
    engine.load()
    assert (engine.loaded, engine.loads) == (True, 2)


def test_for_cpu_is_what_the_test_says() -> None:
    engine = FakeEngine()
    assert engine.for_cpu() is engine
    engine.cpu = None
    assert engine.for_cpu() is None


def test_spin_takes_its_time() -> None:
    started = time.perf_counter()
    spin(0.002)
    assert time.perf_counter() - started >= 0.002


# ---------------------------------------------------------------------------------------------- overlap


def test_it_records_the_most_calls_at_once() -> None:
    entered, gate = threading.Barrier(4), threading.Event()

    def wait_for_all(inputs: Any) -> Any:
        entered.wait()
        gate.wait()
        return inputs

    engine = loaded(function=wait_for_all)
    threads = [threading.Thread(target=engine.infer, args=(batch(1),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    entered.wait()
    assert engine.in_flight == 3
    gate.set()
    for thread in threads:
        thread.join()
    assert (engine.in_flight, engine.max_in_flight) == (0, 3)
    assert len({call.thread for call in engine.calls}) == 3


def test_the_async_engine_takes_exact_virtual_time() -> None:
    async def main() -> FakeAsyncEngine:
        engine = await loaded_async(cost=linear)
        await asyncio.gather(engine.infer(batch(1)), engine.infer(batch(8)))
        return engine

    engine = run_virtual(main())
    assert [call.ended for call in engine.calls] == [linear(1), linear(8)]
    assert engine.max_in_flight == 2


def test_a_cancelled_call_ends_with_its_cancellation() -> None:
    async def main() -> FakeAsyncEngine:
        engine = await loaded_async(cost=linear)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.0005):
                await engine.infer(batch(1))
        return engine

    engine = run_virtual(main())
    assert engine.in_flight == 0
    assert isinstance(engine.calls[0].error, asyncio.CancelledError)


def test_streams_beside_the_calls_are_not_calls_in_flight() -> None:
    engine = loaded(chunks=2)
    in_slot = engine.infer_stream(batch(1))
    next(in_slot)
    assert engine.in_flight == 1
    engine.max_streams = 1
    beside = engine.infer_stream(batch(1))
    next(beside)
    assert engine.in_flight == 1
    beside.close()
    in_slot.close()
    assert engine.in_flight == 0
    assert [call.in_slot for call in engine.calls] == [True, False]


# ----------------------------------------------------------------------------------------------- faults


def outcomes(engine: FakeEngine, *, calls: int, value: float = 0.0) -> list[bool]:
    came = []
    for _ in range(calls):
        try:
            engine.infer(batch(1, value))
            came.append(True)
        except InferenceError:
            came.append(False)
    return came


def test_a_fault_strikes_the_calls_it_names() -> None:
    engine = loaded(faults=FaultPlan(Fault(calls={2, 4}, error=InferenceError)))
    assert outcomes(engine, calls=5) == [True, False, True, False, True]
    assert isinstance(engine.calls[1].error, InferenceError)
    assert engine.metrics().errors == 2


def test_a_fault_strikes_the_batch_that_holds_its_value() -> None:
    engine = loaded(faults=FaultPlan(Fault(value=9.0, error=InferenceError)))
    assert outcomes(engine, calls=2) == [True, True]
    mixed = {"x": np.concatenate([batch(3)["x"], batch(1, 9.0)["x"]])}
    with pytest.raises(InferenceError):
        engine.infer(mixed)


def test_chance_is_seeded() -> None:
    def run(seed: int) -> list[bool]:
        return outcomes(loaded(faults=FaultPlan(Fault(probability=0.3, error=InferenceError), seed=seed)), calls=200)

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert 0.15 < run(1).count(False) / 200 < 0.45


def test_all_conditions_must_hold() -> None:
    engine = loaded(faults=FaultPlan(Fault(calls=range(2, 99), value=9.0, error=InferenceError)))
    assert outcomes(engine, calls=3, value=9.0) == [True, False, False]
    assert outcomes(engine, calls=1) == [True]


def test_the_first_fault_that_strikes_is_the_one() -> None:
    plan = FaultPlan(Fault(calls={1}, error=InferenceError("first")), Fault(error=Backend("second")))
    engine = loaded(faults=plan)
    with pytest.raises(InferenceError, match="first"):
        engine.infer(batch(1))
    with pytest.raises(Backend, match="second"):
        engine.infer(batch(1))


def test_every_call_has_an_error_of_its_own() -> None:
    engine = loaded(faults=FaultPlan(Fault(error=InferenceError("the same words"))))
    errors = []
    for _ in range(2):
        with pytest.raises(InferenceError, match="the same words") as caught:
            engine.infer(batch(1))
        errors.append(caught.value)
    assert errors[0] is not errors[1]


def test_engines_of_one_plan_share_its_count() -> None:
    plan = FaultPlan(Fault(calls={2}, error=InferenceError))
    first, second = loaded(faults=plan), loaded(faults=plan)
    assert outcomes(first, calls=1) + outcomes(second, calls=1) + outcomes(first, calls=1) == [True, False, True]


def test_a_delay_makes_a_call_slow() -> None:
    async def main() -> list[float]:
        engine = await loaded_async(cost=lambda rows: 0.5, faults=FaultPlan(Fault(calls={2}, delay=10.0)))
        for _ in range(3):
            await engine.infer(batch(1))
        return [(call.ended or 0.0) - call.started for call in engine.calls]

    assert run_virtual(main()) == [0.5, 10.5, 0.5]


def test_a_lost_engine_comes_back_after_its_failed_checks() -> None:
    engine = loaded(faults=FaultPlan(Fault(calls={1}, error=Unavailable, failed_checks=2)))
    for _ in range(2):
        with pytest.raises(Unavailable):
            engine.infer(batch(1))
    assert len(engine.calls) == 1
    assert [engine.health_check() for _ in range(3)] == [False, False, True]
    assert engine.infer(batch(1))


def test_a_test_may_lose_and_recover_an_engine() -> None:
    engine = loaded()
    engine.lose(failed_checks=1_000_000)
    assert not engine.health_check()
    with pytest.raises(Unavailable, match="lost"):
        engine.infer(batch(1))
    engine.recover()
    assert engine.health_check()
    assert engine.infer(batch(1))


def test_a_hanging_call_goes_on_when_released() -> None:
    entered = threading.Event()
    engine = loaded(cost=linear, spend=lambda _: entered.set(), faults=FaultPlan(Fault(hang=True)))
    thread = threading.Thread(target=engine.infer, args=(batch(1),))
    thread.start()
    entered.wait()
    assert engine.calls[0].ended is None
    engine.release()
    thread.join()
    assert engine.calls[0].ended is not None


def test_a_hanging_async_call_goes_on_when_released() -> None:
    async def main() -> float | None:
        engine = await loaded_async(faults=FaultPlan(Fault(hang=True)))
        asyncio.get_running_loop().call_later(60, engine.release)
        await engine.infer(batch(1))
        return engine.calls[0].ended

    assert run_virtual(main()) == 60.0
