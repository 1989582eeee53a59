"""Streams: chunks, who may close them and what becomes of the engine's generator, time limits, slots."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import BatchPolicy, Scheduler
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.errors import DeadlineExceeded, InferenceError, InvalidInput, Overloaded, Unavailable
from kapsl_scheduler.testing import FakeAsyncEngine, Fault, FaultPlan
from kapsl_scheduler.types import InferenceResponse, Tensors
from tests.runtime.helpers import FIXED_INFO, numbered, start, until_async, virtual_scheduler
from tests.runtime.virtual import virtual

CHUNK = 0.01


class CountingEngine(FakeAsyncEngine):
    """Streams numbers, and knows how many it has made and whether its generator was closed."""

    def __init__(self, chunks: int, *, gap: float = CHUNK, fails_at: int | None = None) -> None:
        super().__init__(info=FIXED_INFO)
        self.made = 0
        self.closed = False
        self._parameters = chunks, gap, fails_at

    async def infer_stream(self, inputs: Tensors) -> AsyncIterator[Tensors]:
        chunks, gap, fails_at = self._parameters
        try:
            for number in range(chunks):
                await asyncio.sleep(gap)
                if number == fails_at:
                    raise ValueError("broken off")
                self.made += 1
                yield {"y": numbered(number)}
        finally:
            self.closed = True


async def read(scheduler: Scheduler, request: Any = None, **options: Any) -> list[InferenceResponse]:
    request = numbered(0) if request is None else request
    return [response async for response in scheduler.infer_stream(request, **options)]


async def read_into(got: list[int], stream: AsyncIterator[InferenceResponse], pause: float | None = None) -> None:
    """The number of each chunk as it comes: what was read stays read when the stream ends in an error."""
    async for response in stream:
        got.append(int(response.output[0, 0]))
        if pause is not None:
            await asyncio.sleep(pause)


# ---------------------------------------------------------------------------------------------------- chunks


@virtual
async def test_every_chunk_comes_in_order_when_it_is_made() -> None:
    loop = asyncio.get_running_loop()
    async with virtual_scheduler(CountingEngine(3)) as scheduler:
        stream = scheduler.infer_stream(numbered(0))
        times = [(response.output[0, 0], loop.time()) async for response in stream]
        found = scheduler.statistics()
    assert times == [(n, pytest.approx((n + 1) * CHUNK)) for n in range(3)]
    assert (found.succeeded, found.calls, found.calls_in_flight) == (1, 1, 0)


@virtual
async def test_a_chunk_for_a_bare_row_comes_without_the_batch_axis() -> None:
    async with virtual_scheduler(CountingEngine(2)) as scheduler:
        responses = await read(scheduler, numbered(0)[0])
    assert [response.output.shape for response in responses] == [(2,), (2,)]


@virtual
async def test_a_chunk_says_how_long_the_first_took_and_how_long_the_stream_runs() -> None:
    async with virtual_scheduler(CountingEngine(2)) as scheduler:
        first, second = await read(scheduler)
    assert (first.queue_time, first.compute_time) == (pytest.approx(CHUNK), 0.0)
    assert second.compute_time == pytest.approx(CHUNK)


@virtual
async def test_a_stream_without_chunks_ends() -> None:
    async with virtual_scheduler(CountingEngine(0)) as scheduler:
        assert await read(scheduler) == []
        assert scheduler.statistics().succeeded == 1


@virtual
async def test_an_error_comes_after_the_chunks_before_it() -> None:
    got: list[int] = []
    async with virtual_scheduler(CountingEngine(5, fails_at=2)) as scheduler:
        with pytest.raises(InferenceError, match="broken off") as caught:
            await read_into(got, scheduler.infer_stream(numbered(0)))
        found = scheduler.statistics()
    assert got == [0, 1]
    assert isinstance(caught.value.__cause__, ValueError)
    assert (found.failed, found.retried) == (1, 0)


@virtual
async def test_a_stream_never_shares_its_call() -> None:
    engine = FakeAsyncEngine(cost=lambda rows: CHUNK, chunks=2)
    async with virtual_scheduler(engine) as scheduler:
        await asyncio.gather(read(scheduler), read(scheduler), scheduler.infer(numbered(0)))
    assert engine.batch_rows == [1, 1, 1]
    assert engine.max_in_flight == 1


@virtual
async def test_what_is_invalid_is_told_before_the_first_chunk_and_leaves_nothing() -> None:
    engine = CountingEngine(3)
    async with virtual_scheduler(engine) as scheduler:
        with pytest.raises(InvalidInput):
            await read(scheduler, np.zeros((1, 2)))
        with pytest.raises(InvalidInput, match="first_chunk_timeout"):
            await read(scheduler, first_chunk_timeout=0.0)
        found = scheduler.statistics()
        assert (found.offered, found.invalid, found.running + found.queued) == (2, 2, 0)
    assert engine.made == 0


# ----------------------------------------------------------------------------------------------- who leaves


@virtual
async def test_closing_the_iterator_closes_the_generator_between_chunks_and_frees_the_slot() -> None:
    engine = CountingEngine(100)
    async with virtual_scheduler(engine) as scheduler:
        async with aclosing(scheduler.infer_stream(numbered(0))) as stream:
            async for _ in stream:
                break
        assert scheduler.statistics().cancelled == 1
        await scheduler.infer(numbered(1))
        assert asyncio.get_running_loop().time() == pytest.approx(2 * CHUNK)
    assert engine.closed
    assert engine.made == 2


@virtual
async def test_cancelling_the_reader_closes_the_stream() -> None:
    engine = CountingEngine(100)
    async with virtual_scheduler(engine) as scheduler:
        [reader] = await start(read(scheduler))
        await asyncio.sleep(3.5 * CHUNK)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        found = scheduler.statistics()
        assert (found.cancelled, found.running) == (1, 0)
    assert engine.closed
    assert engine.made == 4


@virtual
async def test_a_stream_cancelled_while_queued_never_starts() -> None:
    engine = CountingEngine(2)
    async with virtual_scheduler(engine) as scheduler:
        first, second = await start(read(scheduler), read(scheduler))
        second.cancel()
        await first
        assert scheduler.statistics().cancelled == 1
    assert engine.made == 2


@virtual
async def test_a_reader_that_stalls_loses_the_stream_and_the_slot_is_free() -> None:
    engine = CountingEngine(100, gap=0.001)
    loop = asyncio.get_running_loop()
    async with virtual_scheduler(engine) as scheduler:
        stream = scheduler.infer_stream(numbered(0))
        await anext(stream)
        await asyncio.sleep(10)
        await scheduler.infer(numbered(1))
        assert loop.time() == pytest.approx(10.001)
        got: list[int] = []
        with pytest.raises(Overloaded, match="unread"):
            await read_into(got, stream)
        assert scheduler.statistics().failed == 1
    assert len(got) == 16
    assert engine.closed


@virtual
async def test_a_slow_reader_slows_the_engine_and_gets_everything() -> None:
    engine = CountingEngine(60, gap=0.001)
    async with virtual_scheduler(engine) as scheduler:
        [reader] = await start(read_into(got := [], scheduler.infer_stream(numbered(0)), pause=1.0))
        for second in range(40):
            await asyncio.sleep(1)
            assert engine.made <= second + 2 + 17  # what was read, the buffer, and one in the engine's hands
        await reader
    assert got == list(range(60))


# ---------------------------------------------------------------------------------------------- time limits


@virtual
async def test_the_timeout_bounds_the_whole_stream() -> None:
    engine = CountingEngine(100)
    got: list[int] = []
    async with virtual_scheduler(engine) as scheduler:
        with pytest.raises(DeadlineExceeded):
            await read_into(got, scheduler.infer_stream(numbered(0), timeout=3.5 * CHUNK))
        assert asyncio.get_running_loop().time() == pytest.approx(3.5 * CHUNK)
        assert scheduler.statistics().expired == 1
    assert len(got) == 3
    assert engine.closed


@virtual
async def test_the_timeout_reaches_a_reader_that_is_slower_than_the_engine() -> None:
    engine = CountingEngine(10_000, gap=0.001)
    async with virtual_scheduler(engine) as scheduler:
        got: list[int] = []
        with pytest.raises(DeadlineExceeded):
            await read_into(got, scheduler.infer_stream(numbered(0), timeout=0.1), pause=CHUNK)
    assert len(got) <= 10 + 17
    assert engine.made <= 10 + 18


@virtual
async def test_first_chunk_timeout_bounds_the_first_chunk() -> None:
    async with virtual_scheduler(CountingEngine(5)) as scheduler:
        with pytest.raises(DeadlineExceeded, match="first chunk"):
            await read(scheduler, first_chunk_timeout=0.5 * CHUNK)
        assert asyncio.get_running_loop().time() == pytest.approx(0.5 * CHUNK)


@virtual
async def test_first_chunk_timeout_is_over_with_the_first_chunk() -> None:
    async with virtual_scheduler(CountingEngine(5)) as scheduler:
        assert len(await read(scheduler, first_chunk_timeout=1.5 * CHUNK)) == 5


# ---------------------------------------------------------------------------------------------------- slots


@virtual
async def test_a_stream_holds_a_slot() -> None:
    async with virtual_scheduler(CountingEngine(5)) as scheduler:
        [reader] = await start(read(scheduler))
        found = scheduler.statistics()
        assert (found.calls_in_flight, found.streams_in_flight) == (1, 0)
        await scheduler.infer(numbered(1))
        assert asyncio.get_running_loop().time() == pytest.approx(5 * CHUNK)
        await reader


@virtual
async def test_max_streams_run_beside_the_calls_and_do_not_count_as_calls() -> None:
    engine = CountingEngine(5)
    engine.max_streams = 2
    async with virtual_scheduler(engine) as scheduler:
        readers = await start(*(read(scheduler) for _ in range(3)))
        await asyncio.sleep(0.1 * CHUNK)
        found = scheduler.statistics()
        assert (found.calls_in_flight, found.streams_in_flight, found.slots, found.queued) == (0, 2, 1, 1)
        await scheduler.infer(numbered(1))
        assert asyncio.get_running_loop().time() == 0.1 * CHUNK
        await asyncio.gather(*readers)
        assert asyncio.get_running_loop().time() == pytest.approx(10 * CHUNK)


@virtual
async def test_a_lost_engine_breaks_its_stream_off() -> None:
    engine = FakeAsyncEngine(faults=FaultPlan(Fault(calls={1}, error=Unavailable)))
    async with virtual_scheduler(engine) as scheduler:
        with pytest.raises(Unavailable):
            await read(scheduler)


@virtual
async def test_closing_the_scheduler_ends_an_endless_stream() -> None:
    engine = CountingEngine(10**9)
    async with virtual_scheduler(engine) as scheduler:
        [reader] = await start(read(scheduler))
        await asyncio.sleep(3.5 * CHUNK)
        await scheduler.close(drain=CHUNK)
        assert asyncio.get_running_loop().time() <= 6 * CHUNK
        with pytest.raises(Unavailable):
            await reader
    assert engine.closed


# ------------------------------------------------------------------------------------------- in a thread


class Generator:
    """A function that yields in the slot's thread, and says when it was closed."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.closed = threading.Event()
        self.threads: set[int] = set()

    def __call__(self, x: Any) -> Iterator[Any]:
        try:
            for number in range(self.chunks):
                self.threads.add(threading.get_ident())
                yield numbered(number)
        finally:
            self.closed.set()


def engine_of(generator: Generator) -> CallableEngine:
    def stream(x: Any) -> Iterator[Any]:
        yield from generator(x)

    return CallableEngine(stream, inputs={"x": ("float32", (None, 2))})


async def test_a_generator_streams_from_the_slots_own_thread() -> None:
    generator = Generator(200)
    async with Scheduler([engine_of(generator)], batch=BatchPolicy()) as scheduler:
        numbers = [int(response.output[0, 0]) for response in await read(scheduler)]
    assert numbers == list(range(200))
    assert threading.get_ident() not in generator.threads


async def test_closing_early_closes_the_generator_in_its_thread() -> None:
    generator = Generator(10**9)
    async with Scheduler([engine_of(generator)]) as scheduler:
        async with aclosing(scheduler.infer_stream(numbered(0))) as stream:
            async for _ in stream:
                break
        assert (await scheduler.infer_many([]), scheduler.statistics().cancelled) == ([], 1)
        await until_async(generator.closed.is_set)


async def test_a_stalled_reader_loses_a_generator_in_a_thread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kapsl_scheduler.runtime.stream.STREAM_STALL", 0.01)
    generator = Generator(10**9)
    async with Scheduler([engine_of(generator)]) as scheduler:
        stream = scheduler.infer_stream(numbered(0))
        await anext(stream)
        await until_async(generator.closed.is_set)
        with pytest.raises(Overloaded, match="unread"):
            await read_into([], stream)


async def test_the_timeout_ends_a_generator_that_waits_for_room() -> None:
    generator = Generator(10**9)
    async with Scheduler([engine_of(generator)]) as scheduler:
        stream = scheduler.infer_stream(numbered(0), timeout=0.02)
        await anext(stream)
        await until_async(generator.closed.is_set)
        with pytest.raises(DeadlineExceeded):
            await read_into([], stream)
