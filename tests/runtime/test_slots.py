"""Slots of synchronous engines: their own threads, and the loop's thread for calls that prove short enough."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import msgspec
import pytest

from kapsl_scheduler import BatchPolicy, Priority, Scheduler
from kapsl_scheduler.errors import InferenceError
from kapsl_scheduler.testing import FakeAsyncEngine, FakeEngine, Fault, FaultPlan, VirtualClock
from kapsl_scheduler.types import Tensors, TensorSpec
from tests.runtime.helpers import FIXED_INFO, numbered, until_async


class Threads(FakeEngine):
    """Remembers which thread asked for what."""

    def __init__(self, **parameters: Any) -> None:
        super().__init__(**parameters)
        self.seen: dict[str, set[int]] = {}

    def _see(self, verb: str) -> None:
        self.seen.setdefault(verb, set()).add(threading.get_ident())

    def load(self) -> None:
        self._see("load")
        super().load()

    def warmup(self) -> None:
        self._see("warmup")

    def infer(self, inputs: Tensors) -> Tensors:
        self._see("infer")
        return super().infer(inputs)

    def unload(self) -> None:
        self._see("unload")
        super().unload()


async def test_an_engine_lives_in_the_thread_of_its_slot() -> None:
    engines = [Threads(), Threads()]
    async with Scheduler(engines, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        await scheduler.infer_many([numbered(n) for n in range(64)])
    homes = [engine.seen["load"] for engine in engines]
    for engine, home in zip(engines, homes, strict=True):
        assert len(home) == 1
        assert all(threads == home for threads in engine.seen.values())
    assert homes[0] != homes[1]
    assert threading.get_ident() not in homes[0] | homes[1]


async def test_each_slot_of_an_engine_has_a_thread_of_its_own() -> None:
    engine = Threads(faults=FaultPlan(Fault(calls={1, 2, 3}, hang=True)))
    async with Scheduler([engine], workers_per_engine=3, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        callers = [asyncio.ensure_future(scheduler.infer(numbered(n))) for n in range(3)]
        await until_async(lambda: engine.in_flight == 3)
        assert len(engine.seen["infer"]) == 3
        assert engine.seen["load"] < engine.seen["infer"]
        engine.release()
        await asyncio.gather(*callers)
    assert engine.loads == 1


async def test_engines_of_both_kinds_serve_one_queue() -> None:
    """A slot in a thread wakes one that is a task of the loop, and the other way round; in debug mode the loop refuses
    what is not safe between threads."""
    asyncio.get_running_loop().set_debug(True)
    engines = [FakeEngine(), FakeAsyncEngine()]
    async with Scheduler(engines, batch=BatchPolicy(max_batch_size=1)) as scheduler, asyncio.timeout(5):
        for burst in range(20):
            numbers = range(10 * burst, 10 * burst + 10)
            answers = await asyncio.gather(*(scheduler.infer(numbered(n)) for n in numbers))
            assert [answer.output[0, 0] for answer in answers] == list(numbers)
    assert all(engine.calls for engine in engines)


async def test_work_that_is_held_back_is_run_when_its_delay_is_over() -> None:
    batch = BatchPolicy(max_queue_delay=0.005, max_batch_size=8)
    async with Scheduler([FakeEngine()], batch=batch) as scheduler:
        started = time.monotonic()
        callers = (scheduler.infer(numbered(n), priority=Priority.THROUGHPUT) for n in range(3))
        answers = await asyncio.gather(*callers)
        assert time.monotonic() - started >= 0.005
    assert {answer.batch_rows for answer in answers} == {3}


# --------------------------------------------------------------------------------------- the loop's thread


def bounded(clock: VirtualClock, seconds: float, **parameters: Any) -> Threads:
    """An engine that says that its calls are bounded, and takes so long for each."""
    engine = Threads(info=FIXED_INFO, cost=lambda rows: seconds, spend=clock.advance, clock=clock, **parameters)
    engine.bounded_call = True
    return engine


async def infer_in_turn(scheduler: Scheduler, engine: Threads, count: int = 3) -> set[int]:
    """The threads of calls that each find their slot idle."""
    engine.seen["infer"] = set()
    for number in range(count):
        await until_async(lambda: scheduler._main._idle)
        assert (await scheduler.infer(numbered(number))).output[0, 0] == number
    return engine.seen["infer"]


HERE = threading.get_ident


async def test_calls_shorter_than_a_thread_hop_run_on_the_loops_thread() -> None:
    clock = VirtualClock()
    engine = bounded(clock, 50e-6)
    async with Scheduler([engine], clock=clock) as scheduler:
        assert await infer_in_turn(scheduler, engine) == {HERE()}
        assert scheduler.statistics().longest_loop_call == pytest.approx(50e-6)
    assert engine.seen["load"] == engine.seen["unload"] != {HERE()}


async def test_who_is_ready_in_one_pass_of_the_loop_shares_a_call_on_its_thread() -> None:
    clock = VirtualClock()
    engine = bounded(clock, 50e-6)
    async with Scheduler([engine], clock=clock) as scheduler:
        await until_async(lambda: scheduler._main._idle)
        answers = await asyncio.gather(*(scheduler.infer(numbered(n)) for n in range(5)))
    assert [answer.output[0, 0] for answer in answers] == list(range(5))
    assert [answer.batch_rows for answer in answers] == [5] * 5


async def test_longer_calls_keep_to_their_thread() -> None:
    clock = VirtualClock()
    engine = bounded(clock, 150e-6)
    async with Scheduler([engine], clock=clock) as scheduler:
        assert HERE() not in await infer_in_turn(scheduler, engine)
        assert scheduler.statistics().longest_loop_call == 0.0


async def test_calls_that_do_not_say_that_they_are_bounded_keep_to_their_thread() -> None:
    clock = VirtualClock()
    engine = bounded(clock, 50e-6)
    engine.bounded_call = False
    async with Scheduler([engine], clock=clock) as scheduler:
        assert HERE() not in await infer_in_turn(scheduler, engine)
    assert len(engine.calls) == 3  # and nothing was measured


async def test_a_model_without_fixed_shapes_cannot_be_measured_and_keeps_to_its_thread() -> None:
    engine = Threads()
    engine.bounded_call = True
    async with Scheduler([engine]) as scheduler:
        assert HERE() not in await infer_in_turn(scheduler, engine)


async def test_a_model_of_strings_cannot_be_measured_and_keeps_to_its_thread() -> None:
    spec = TensorSpec("x", "string", ("batch", 2), 0)
    engine = Threads(info=msgspec.structs.replace(FIXED_INFO, inputs=(spec,), outputs=(spec,)))
    engine.bounded_call = True
    async with Scheduler([engine]) as scheduler:
        await scheduler.infer([["a", "b"]])
    assert HERE() not in engine.seen["infer"]
    assert len(engine.calls) == 1


async def test_a_slow_engine_is_not_measured_for_long() -> None:
    clock = VirtualClock()
    engine = bounded(clock, 0.5)
    async with Scheduler([engine], clock=clock):
        assert len(engine.calls) == 1


async def test_after_three_long_calls_in_a_minute_the_engine_leaves_the_loops_thread_for_good() -> None:
    clock = VirtualClock()
    engine = bounded(clock, 50e-6)
    async with Scheduler([engine], clock=clock) as scheduler:
        assert await infer_in_turn(scheduler, engine) == {HERE()}
        for _ in range(3):
            engine._faults = FaultPlan(Fault(calls={1}, delay=0.02))
            assert await infer_in_turn(scheduler, engine, 1) == {HERE()}
        assert HERE() not in await infer_in_turn(scheduler, engine)
        assert scheduler.statistics().longest_loop_call == pytest.approx(0.02, rel=0.01)


async def test_a_long_call_now_and_then_is_the_machines_doing() -> None:
    clock = VirtualClock()
    engine = bounded(clock, 50e-6)
    async with Scheduler([engine], clock=clock) as scheduler:
        for _ in range(6):
            engine._faults = FaultPlan(Fault(calls={1}, delay=0.02))
            assert await infer_in_turn(scheduler, engine, 4) == {HERE()}
            clock.advance(31.0)


async def test_an_engine_that_gets_slower_leaves_the_loops_thread() -> None:
    clock = VirtualClock()
    engine = bounded(clock, 50e-6)
    async with Scheduler([engine], clock=clock) as scheduler:
        engine._faults = FaultPlan(Fault(delay=800e-6))
        await infer_in_turn(scheduler, engine, 5)
        assert HERE() not in await infer_in_turn(scheduler, engine)


async def test_a_failure_on_the_loops_thread_is_its_callers_alone() -> None:
    clock = VirtualClock()
    engine = bounded(clock, 50e-6, faults=FaultPlan(Fault(value=13.0, error=ValueError)))
    async with Scheduler([engine], clock=clock) as scheduler:
        await until_async(lambda: scheduler._main._idle)
        numbers = (1, 13, 2)
        answers = await asyncio.gather(*(scheduler.infer(numbered(n)) for n in numbers), return_exceptions=True)
    assert isinstance(answers[1], InferenceError)
    assert [answers[at].output[0, 0] for at in (0, 2)] == [1, 2]


async def test_an_engine_that_cannot_be_measured_with_zeros_keeps_to_its_thread() -> None:
    clock = VirtualClock()
    engine = bounded(clock, 50e-6, faults=FaultPlan(Fault(calls={1}, error=ValueError)))
    async with Scheduler([engine], clock=clock) as scheduler:
        assert HERE() not in await infer_in_turn(scheduler, engine)


async def test_a_stream_never_runs_on_the_loops_thread() -> None:
    clock = VirtualClock()
    engine = bounded(clock, 50e-6)
    async with Scheduler([engine], clock=clock) as scheduler:
        await until_async(lambda: scheduler._main._idle)
        assert [response.output[0, 0] async for response in scheduler.infer_stream(numbered(4))] == [4]
        assert engine.calls[-1].thread != HERE()
        assert await infer_in_turn(scheduler, engine) == {HERE()}
