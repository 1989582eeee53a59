"""Entering and leaving: loading, warming up, draining, what is left behind."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import msgspec
import pytest

from kapsl_scheduler import BatchPolicy, QueuePolicy, Scheduler
from kapsl_scheduler.errors import Backend, ModelLoadError, ModelNotLoaded, Unavailable
from kapsl_scheduler.testing import FakeAsyncEngine, FakeEngine, Fault, FaultPlan
from kapsl_scheduler.testing.engines import FAKE_INFO
from kapsl_scheduler.types import InferenceResponse
from tests.runtime.helpers import numbered, start, until_async, virtual_scheduler
from tests.runtime.virtual import virtual


def slow(**parameters: Any) -> FakeAsyncEngine:
    return FakeAsyncEngine(cost=lambda rows: 0.01, **parameters)


def hanging(engine: Any = FakeAsyncEngine) -> Any:
    return engine(faults=FaultPlan(Fault(calls={1}, hang=True)))


# --------------------------------------------------------------------------------------------- entering


class Diary(FakeAsyncEngine):
    """Writes down what is asked of it."""

    def __init__(self, **trouble: Exception) -> None:
        super().__init__()
        self.entries: list[str] = []
        self._trouble = trouble

    async def _enter(self, verb: str) -> None:
        self.entries.append(verb)
        await asyncio.sleep(0.01)
        if verb in self._trouble:
            raise self._trouble[verb]

    async def load(self) -> None:
        await self._enter("load")
        await super().load()

    async def warmup(self) -> None:
        await self._enter("warmup")

    async def unload(self) -> None:
        await self._enter("unload")
        await super().unload()


@virtual
async def test_engines_are_loaded_and_warmed_up_before_anybody_is_let_in_and_unloaded_at_the_end() -> None:
    engines = [Diary(), Diary()]
    async with virtual_scheduler(*engines) as scheduler:
        assert [engine.entries for engine in engines] == [["load", "warmup"]] * 2
        assert asyncio.get_running_loop().time() == pytest.approx(0.02)  # at the same time
        await scheduler.infer(numbered(1))
    assert [engine.entries for engine in engines] == [["load", "warmup", "unload"]] * 2


@pytest.mark.parametrize("verb", ["load", "warmup"])
@virtual
async def test_an_engine_that_cannot_be_loaded_is_named_and_the_others_are_unloaded(verb: str) -> None:
    good, bad = Diary(), Diary(**{verb: OSError("no such file")})
    scheduler = virtual_scheduler(good, bad)
    with pytest.raises(ModelLoadError, match="Diary-1: no such file") as caught:
        await scheduler.__aenter__()
    assert isinstance(caught.value.__cause__, OSError)
    assert "unload" in good.entries
    assert repr(scheduler) == "<Scheduler closed>"


async def test_an_engine_in_a_thread_that_cannot_be_loaded_ends_the_threads_of_the_others() -> None:
    class Broken(FakeEngine):
        def load(self) -> None:
            raise OSError("no such file")

    good = FakeEngine()
    with pytest.raises(ModelLoadError, match="Broken-1: no such file"):
        await Scheduler([good, Broken()]).__aenter__()
    assert (good.loads, good.loaded) == (1, False)


@pytest.mark.parametrize("kind", [FakeAsyncEngine, FakeEngine])
async def test_an_engine_that_cannot_be_unloaded_is_logged(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Clinging(kind):  # type: ignore[misc]
        def unload(self) -> Any:
            raise OSError("busy")

    async with Scheduler([Clinging()]):
        pass
    assert "Clinging-0.0: unloading the engine failed" in caplog.text


@virtual
async def test_an_engine_error_at_loading_keeps_its_type() -> None:
    with pytest.raises(Backend):
        await virtual_scheduler(Diary(load=Backend("no driver"))).__aenter__()


@virtual
async def test_engines_of_different_models_are_refused() -> None:
    other = FakeAsyncEngine(info=msgspec.structs.replace(FAKE_INFO, name="other"))
    engine = FakeAsyncEngine()
    with pytest.raises(ModelLoadError, match="same model"):
        await virtual_scheduler(engine, other).__aenter__()
    assert not engine.loaded
    assert not other.loaded


@virtual
async def test_cancelled_while_loading_it_leaves_nothing_behind() -> None:
    scheduler = virtual_scheduler(Diary())
    [entering] = await start(scheduler.__aenter__())
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering


@virtual
async def test_it_is_entered_once() -> None:
    async with virtual_scheduler(slow()) as scheduler:
        with pytest.raises(RuntimeError, match="entered once"):
            await scheduler.__aenter__()
    with pytest.raises(RuntimeError, match="entered once"):
        await scheduler.__aenter__()


@pytest.mark.parametrize(
    ("parameters", "says"),
    [({"workers_per_engine": 0}, "workers_per_engine"), ({"cpu_workers": 0}, "cpu_workers")],
)
def test_parameters_are_checked(parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Scheduler([slow()], **parameters)


def test_at_least_one_engine_is_needed() -> None:
    with pytest.raises(ValueError, match="engines"):
        Scheduler([])


@virtual
async def test_one_engine_may_come_without_a_list() -> None:
    loop = asyncio.get_running_loop()
    async with Scheduler(slow(), clock=loop.time) as scheduler:
        assert (await scheduler.infer(numbered(1))).output[0, 0] == 1


def test_what_is_no_engine_is_refused() -> None:
    with pytest.raises(TypeError, match="CallableEngine"):
        Scheduler([len])


def test_the_model_is_not_known_before() -> None:
    with pytest.raises(ModelNotLoaded):
        Scheduler([FakeEngine()]).model_info()


# ------------------------------------------------------------------------------------------- many slots


@virtual
async def test_each_engine_has_workers_per_engine_slots_and_never_more_calls() -> None:
    engines = [slow(), slow()]
    batch = BatchPolicy(max_batch_size=1)
    async with virtual_scheduler(*engines, workers_per_engine=3, batch=batch) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(30)))
        await asyncio.sleep(0.005)
        found = scheduler.statistics()
        assert (found.slots, found.calls_in_flight, found.queued) == (6, 6, 24)
        await asyncio.gather(*callers)
        assert asyncio.get_running_loop().time() == pytest.approx(0.05)
    assert [engine.max_in_flight for engine in engines] == [3, 3]


# ---------------------------------------------------------------------------------------------- leaving


@virtual
async def test_leaving_drains_who_is_there() -> None:
    queue = QueuePolicy(max_size=2)
    async with virtual_scheduler(slow(), batch=BatchPolicy(max_batch_size=1), queue=queue) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(5)))
    assert [caller.result().output[0, 0] for caller in callers] == list(range(5))


@virtual
async def test_who_comes_while_it_drains_is_unavailable() -> None:
    async with virtual_scheduler(slow()) as scheduler:
        callers = await start(scheduler.infer(numbered(1)), scheduler.close())
        assert scheduler.health().status == "closing"
        with pytest.raises(Unavailable, match="closing"):
            await scheduler.infer(numbered(2))
        await asyncio.gather(*callers)
        with pytest.raises(Unavailable, match="closed"):
            await scheduler.infer(numbered(3))
    assert scheduler.statistics().refused == 2


@virtual
async def test_the_drain_ends_at_its_deadline_and_the_rest_hears_unavailable() -> None:
    batch, queue = BatchPolicy(max_batch_size=1), QueuePolicy(max_size=2)
    async with virtual_scheduler(slow(), batch=batch, queue=queue) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(5)))
        await scheduler.close(drain=0.015)
        answers = await asyncio.gather(*callers, return_exceptions=True)
        found = scheduler.statistics()
        assert asyncio.get_running_loop().time() == pytest.approx(0.02)  # the running call ends
    assert [type(answer) for answer in answers] == [InferenceResponse, *[Unavailable] * 4]
    assert (found.succeeded, found.failed, found.refused) == (1, 3, 1)
    assert (found.waiting, found.queued, found.running) == (0, 0, 0)


@virtual
async def test_leaving_by_an_exception_does_not_drain() -> None:
    callers: list[asyncio.Task[Any]] = []

    async def left_by_an_exception() -> None:
        async with virtual_scheduler(slow(), batch=BatchPolicy(max_batch_size=1)) as scheduler:
            callers.extend(await start(*(scheduler.infer(numbered(n)) for n in range(3))))
            raise KeyError

    with pytest.raises(KeyError):
        await left_by_an_exception()
    answers = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable] * 3


@virtual
async def test_closing_twice_and_closing_what_was_never_entered_does_nothing() -> None:
    scheduler = virtual_scheduler(slow())
    await scheduler.close()
    async with scheduler:
        await scheduler.close()
        await scheduler.close()


@virtual
async def test_a_second_close_cuts_the_drain_short_and_waits_for_the_end() -> None:
    engine = slow()
    async with virtual_scheduler(engine, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(3)), scheduler.close(drain=100))
        await scheduler.close(drain=0)
        assert not engine.loaded
        assert asyncio.get_running_loop().time() == pytest.approx(0.01)
        answers = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(answer) for answer in answers] == [*[Unavailable] * 3, type(None)]


@virtual
async def test_a_second_close_while_the_engines_are_unloaded_waits_for_the_end() -> None:
    engine = Diary()
    async with virtual_scheduler(engine) as scheduler:
        [first] = await start(scheduler.close(drain=100))
        await asyncio.sleep(0.005)
        await scheduler.close(drain=0)
        assert not engine.loaded
        await first


@virtual
async def test_cancelling_close_cuts_the_drain_short_and_does_the_rest() -> None:
    engine = slow()
    async with virtual_scheduler(engine, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(3)))
        [closing] = await start(scheduler.close(drain=100))
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        answers = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable] * 3
    assert not engine.loaded
    assert scheduler.health().status == "closed"


@virtual
async def test_a_hung_call_of_an_asynchronous_engine_is_named_and_ended(caplog: pytest.LogCaptureFixture) -> None:
    engine = hanging()
    async with virtual_scheduler(engine, workers_per_engine=2) as scheduler:
        callers = await start(scheduler.infer(numbered(1)))
        await scheduler.close(drain=1)
        assert [type(error) for error in await asyncio.gather(*callers, return_exceptions=True)] == [Unavailable]
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        f"FakeAsyncEngine-0.1: a call hangs; its slot is left behind: {engine!r}"
    ]
    assert engine.in_flight == 0
    assert not engine.loaded


async def test_a_hung_thread_is_named_and_left_behind_and_does_no_harm_later(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kapsl_scheduler.runtime.scheduler.HUNG_AFTER", 0.01)
    engine = hanging(FakeEngine)
    async with Scheduler([engine]) as scheduler:
        callers = await start(scheduler.infer(numbered(1)))
        await until_async(lambda: engine.in_flight)
        await scheduler.close(drain=0.01)
        [error] = await asyncio.gather(*callers, return_exceptions=True)
        assert isinstance(error, Unavailable)
        found = scheduler.statistics()
        assert "FakeEngine-0.0: a call hangs" in caplog.text
        caplog.clear()
        engine.release()
        await until_async(lambda: not engine.loaded)
        await start()
    assert not caplog.records
    after = scheduler.statistics()
    assert (after.succeeded, after.failed, after.discarded) == (found.succeeded, found.failed, found.discarded)


def test_a_hung_thread_that_outlives_its_loop_ends_in_silence(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kapsl_scheduler.runtime.scheduler.HUNG_AFTER", 0.01)
    engine = hanging(FakeEngine)

    async def main() -> None:
        async with Scheduler([engine]) as scheduler:
            callers = await start(scheduler.infer(numbered(1)))
            await until_async(lambda: engine.in_flight)
            await scheduler.close(drain=0.0)
            await asyncio.gather(*callers, return_exceptions=True)

    asyncio.run(main())
    caplog.clear()
    [thread] = [thread for thread in threading.enumerate() if thread.name == "kapsl-FakeEngine-0.0"]
    engine.release()
    thread.join(5)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_stream_whose_reader_stalls_does_not_hold_the_close_up(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(chunks=10**9)
    async with Scheduler([engine]) as scheduler:
        stream = scheduler.infer_stream(numbered(1))
        await anext(stream)
        await scheduler.close(drain=0)
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass
    assert not caplog.records
    assert not engine.loaded


@virtual
async def test_closing_while_the_cpu_lane_is_being_loaded() -> None:
    engine, cpu = slow(), Diary()
    engine.cpu = cpu
    async with virtual_scheduler(engine) as scheduler:
        [caller] = await start(scheduler.infer(numbered(1), force_cpu=True))
        await scheduler.close(drain=0)
        with pytest.raises(Unavailable):
            await caller
    assert not cpu.loaded
