"""The driver that virtual time cannot cover: real threads, switched as often as the interpreter can.

Callers, cancellations, deadlines, failures and losses at random for a bounded time; afterwards the books balance and
every answer has gone to its own caller.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import BatchPolicy, Priority, QueueOverflowPolicy, QueuePolicy, Scheduler
from kapsl_scheduler.errors import DeadlineExceeded, EngineError, InferenceError, Overloaded, Unavailable
from kapsl_scheduler.testing import FakeEngine, Fault, FaultPlan
from kapsl_scheduler.types import Tensors
from tests.runtime.helpers import FIXED_INFO, numbered, until_async

SECONDS = 0.6
CALLERS = 48
POISON = -1.0


def doubled(inputs: Tensors) -> Tensors:
    return {"y": inputs["x"] * 2}


def engine(seed: int, *, bounded: bool) -> FakeEngine:
    faults = FaultPlan(
        Fault(value=POISON, error=ValueError),
        Fault(probability=0.002, error=Unavailable, failed_checks=1),
        Fault(probability=0.05, delay=0.001),
        seed=seed,
    )
    made = FakeEngine(doubled, info=FIXED_INFO, faults=faults, chunks=3)
    made.bounded_call, made.max_streams = bounded, seed % 2
    return made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads are switched as often as possible, lost engines are soon asked again, and bounded engines stay on the
    loop's thread."""
    monkeypatch.setattr("kapsl_scheduler.runtime.worker.PROBE_FIRST", 0.002)
    for limit in ("worker.LOOP_CALL_LIMIT", "dispatch.LOOP_CALL_LIMIT", "dispatch.LONG_LOOP_CALL"):
        monkeypatch.setattr(f"kapsl_scheduler.runtime.{limit}", 10.0)
    monkeypatch.setattr("kapsl_scheduler.runtime.worker.HELD_UP", 0.0)  # every start counts as held up
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Crowd:
    """Callers that ask until the time is over, and what they heard."""

    def __init__(self, scheduler: Scheduler, seed: int) -> None:
        self.scheduler = scheduler
        self.rng = random.Random(seed)
        self.heard: Counter[str] = Counter()
        self._end = time.monotonic() + SECONDS

    async def run(self) -> None:
        async with asyncio.TaskGroup() as callers:
            for number in range(CALLERS):
                callers.create_task(self._ask(number))

    async def _ask(self, number: int) -> None:
        while time.monotonic() < self._end:
            number += CALLERS
            kind = self.rng.random()
            work = self._stream(number) if kind < 0.05 else self._infer(number)
            task = asyncio.ensure_future(work)
            if kind > 0.8:
                await asyncio.sleep(self.rng.choice((0, 0, 0.0002)))
                task.cancel()
            try:
                self.heard[await task] += 1
            except asyncio.CancelledError:
                self.heard["cancelled"] += 1
            except EngineError as error:
                self.heard[self._word(error)] += 1
            self.check()

    def _word(self, error: EngineError) -> str:
        match error:
            case DeadlineExceeded():
                return "late"
            case Overloaded() if "evicted" in str(error):
                return "evicted"
            case Overloaded() | Unavailable() | InferenceError(__cause__=ValueError()):
                return "refused or failed"
        raise AssertionError(error)

    def _options(self) -> dict[str, Any]:
        rng = self.rng
        options: dict[str, Any] = {"priority": rng.choice(list(Priority))}
        if rng.random() < 0.2:
            options["timeout"] = rng.choice((0.0005, 0.005, 1.0))
        if rng.random() < 0.2:
            options["session_id"] = rng.choice("abcd")
        return options

    async def _infer(self, number: int) -> str:
        x = numbered(number, rows=self.rng.randrange(1, 4))
        if self.rng.random() < 0.002:
            x[0, 1] = POISON
        options = self._options()
        if self.rng.random() < 0.1:
            options["overflow"] = self.rng.choice(list(QueueOverflowPolicy))
        response = await self.scheduler.infer(x, **options)
        assert np.array_equal(response.output, 2 * x), (response.output, x)
        return "succeeded"

    async def _stream(self, number: int) -> str:
        x = numbered(number)
        chunks = 0
        async with aclosing(self.scheduler.infer_stream(x, **self._options())) as stream:
            async for response in stream:
                assert np.array_equal(response.output, 2 * x)
                chunks += 1
        assert chunks == 3
        return "succeeded"

    def check(self) -> None:
        found = self.scheduler.statistics()
        ended = found.succeeded + found.failed + found.expired + found.cancelled + found.evicted
        assert found.offered == found.invalid + found.refused + found.withdrawn + found.waiting + found.admitted
        assert found.admitted == ended + found.queued + found.running
        assert self.scheduler._books.open == found.waiting + found.queued + found.running
        assert found.running >= 0
        assert 0 <= found.calls_in_flight <= found.slots
        assert found.queued <= self.scheduler._queue.max_size

    def compare(self) -> None:
        """What the scheduler counted is what was heard. A caller cancelled in the very moment of its answer hears of
        the cancellation, and the answer counts."""
        self.check()
        found, heard = self.scheduler.statistics(), self.heard
        assert found.waiting == found.queued == found.running == 0
        raced = heard["cancelled"] + heard["late"] - (found.withdrawn + found.expired + found.cancelled)
        assert raced >= 0
        assert found.offered == heard.total()
        others = found.succeeded + found.failed + found.refused + found.evicted
        assert others == heard["succeeded"] + heard["refused or failed"] + heard["evicted"] + raced
        assert found.succeeded >= heard["succeeded"] > 100


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("seed", range(4))
async def test_many_callers_over_real_threads(seed: int) -> None:
    engines = [engine(10 * seed + number, bounded=seed == 3) for number in range(1 + seed % 3)]
    for each in engines:
        each.cpu = engine(99, bounded=False)
    scheduler = Scheduler(
        engines,
        workers_per_engine=1 + seed % 2,
        batch=BatchPolicy(max_batch_size=8, max_queue_delay=0.0005 if seed == 1 else 0.0),
        queue=QueuePolicy(max_size=16, max_waiting=64, overflow=list(QueueOverflowPolicy)[seed % 3]),
        enable_fallback=seed == 2,
    )
    async with scheduler, asyncio.timeout(10):
        crowd = Crowd(scheduler, seed)
        await crowd.run()
        crowd.compare()
    assert all(each.max_in_flight <= 1 + seed % 2 for each in engines)
    assert (scheduler.statistics().longest_loop_call > 0) == (seed == 3)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
async def test_closing_in_the_middle_of_it_all() -> None:
    """Everybody hears something, whatever the threads are doing at that moment."""
    for seed in range(30):
        engines = [engine(seed + number, bounded=False) for number in range(2)]
        async with asyncio.timeout(10):
            async with Scheduler(engines, workers_per_engine=2, batch=BatchPolicy(max_batch_size=4)) as scheduler:
                callers = [asyncio.ensure_future(scheduler.infer(numbered(n))) for n in range(200)]
                await until_async(lambda: scheduler.statistics().succeeded)
                await scheduler.close(drain=0)
                found = scheduler.statistics()
            answers = await asyncio.gather(*callers, return_exceptions=True)
        answered = sum(not isinstance(answer, BaseException) for answer in answers)
        assert found.queued == found.waiting == found.running == 0
        assert (found.succeeded, found.failed + found.refused) == (answered, 200 - answered)
        assert not any(each.loaded for each in engines)
