"""A slot that is held up between its pull and its call looks at the deadlines again: what is due by now is not run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kapsl_scheduler import DeadlineExceeded, Priority, Scheduler
from kapsl_scheduler.core.batch import Layout
from kapsl_scheduler.testing import FakeEngine, Fault, FaultPlan, VirtualClock
from tests.runtime.helpers import FIXED_INFO, numbered, until_async

CALL = 0.010  # seconds


@pytest.fixture
def hold_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[VirtualClock, float], None]:
    """The next batch takes so much longer from its pull to its call."""

    def arrange(clock: VirtualClock, seconds: float) -> None:
        stack = Layout.stack

        def slow(layout: Layout, members: Any) -> Any:
            monkeypatch.setattr(Layout, "stack", stack)
            clock.advance(seconds)
            return stack(layout, members)

        monkeypatch.setattr(Layout, "stack", slow)

    return arrange


async def offered(
    hold_up: Callable[[VirtualClock, float], None], on_loop: bool, seconds: float, *timeouts: float | None
) -> tuple[list[Any], list[int], Scheduler]:
    """What became of requests with these timeouts, pulled together by a slot that was held up for so long; and the rows
    of the calls that were made."""
    clock = VirtualClock()
    cost = 100e-6 if on_loop else CALL
    engine = FakeEngine(info=FIXED_INFO, cost=lambda rows: cost, spend=clock.advance, clock=clock)
    engine.bounded_call = on_loop
    async with Scheduler([engine], clock=clock) as scheduler:
        for number in range(4):  # so many before anybody is condemned on what calls take
            await scheduler.infer(numbered(number))
        await until_async(lambda: scheduler._main._idle)
        before = len(engine.calls)
        hold_up(clock, seconds)
        calls = [scheduler.infer(numbered(n), timeout=timeout) for n, timeout in enumerate(timeouts)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        await scheduler.infer(numbered(9), priority=Priority.THROUGHPUT)  # the slot goes on
    figures = scheduler.statistics()
    assert figures.offered == figures.succeeded + figures.expired
    assert figures.calls_in_flight == 0
    return results, [call.rows for call in engine.calls[before:-1]], scheduler


@pytest.mark.parametrize("on_loop", [False, True], ids=["own thread", "loop's thread"])
async def test_who_is_due_by_now_is_dropped_and_the_others_run(
    hold_up: Callable[[VirtualClock, float], None], on_loop: bool
) -> None:
    results, rows, scheduler = await offered(hold_up, on_loop, 0.5, None, 0.3, 5.0)
    assert [isinstance(result, DeadlineExceeded) for result in results] == [False, True, False]
    assert [results[n].output[0, 0] for n in (0, 2)] == [0, 2]
    assert rows == [2]
    assert scheduler.statistics().expired == 1


@pytest.mark.parametrize("on_loop", [False, True], ids=["own thread", "loop's thread"])
async def test_a_batch_of_which_all_are_due_is_not_run(
    hold_up: Callable[[VirtualClock, float], None], on_loop: bool
) -> None:
    results, rows, _ = await offered(hold_up, on_loop, 0.5, 0.3, 0.4)
    assert all(isinstance(result, DeadlineExceeded) for result in results)
    assert rows == []


@pytest.mark.parametrize("seconds", [0.0, 0.0004, 0.4])
async def test_a_batch_that_is_still_in_time_runs_as_it_is(
    hold_up: Callable[[VirtualClock, float], None], seconds: float
) -> None:
    results, rows, _ = await offered(hold_up, False, seconds, 0.6, 0.5)
    assert [result.output[0, 0] for result in results] == [0, 1]
    assert rows == [2]


async def test_who_was_dropped_hears_so_though_the_call_of_the_others_hangs(
    hold_up: Callable[[VirtualClock, float], None],
) -> None:
    clock = VirtualClock()
    engine = FakeEngine(info=FIXED_INFO, cost=lambda rows: CALL, spend=clock.advance, clock=clock)
    async with Scheduler([engine], clock=clock) as scheduler:
        for number in range(4):
            await scheduler.infer(numbered(number))
        await until_async(lambda: scheduler._main._idle)
        engine._faults = FaultPlan(Fault(hang=True))
        hold_up(clock, 0.5)
        late, hangs = (asyncio.ensure_future(scheduler.infer(numbered(n), timeout=t)) for n, t in ((0, 0.3), (1, None)))
        with pytest.raises(DeadlineExceeded):
            await late
        assert not hangs.done()
        engine.release()
        assert (await hangs).output[0, 0] == 1
