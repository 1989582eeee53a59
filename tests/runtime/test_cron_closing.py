"""Entering and leaving: what comes before and after, draining, cutting short, what is left behind."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from kapsl_scheduler import CronError, CronScheduler, FiringPolicy, OnInterrupt, Overlap, RunPolicy, StoreError
from kapsl_scheduler.ports import RunQuery
from kapsl_scheduler.stores.memory import MemoryStore
from kapsl_scheduler.testing import WallClock
from tests.runtime.cron import FaultyStore, Target, a_job, counts, cron_over, history, run_ended
from tests.runtime.helpers import start
from tests.runtime.virtual import virtual

RESUME = RunPolicy(on_interrupt=OnInterrupt.RESUME)


@virtual
async def test_calls_before_and_after_are_refused() -> None:
    cron = CronScheduler(Target(), clock=WallClock())

    async def refused(word: str) -> None:
        for call in (
            cron.register(a_job()),
            cron.register_all([a_job()]),
            cron.update(a_job()),
            cron.unregister("job"),
            cron.unregister_package("p"),
            cron.pause("job"),
            cron.resume("job"),
            cron.trigger("job"),
            cron.runs(),
            cron.run(1),
            cron.compact(),
        ):
            with pytest.raises(CronError, match=f"the cron scheduler is {word}"):
                await call

    await refused("not entered")
    await cron.close()
    async with cron:
        await cron.register(a_job())
    await refused("closed")
    assert [info.id for info in await cron.list_jobs()] == ["job"]  # reports say what was known last
    assert cron.statistics().jobs == 1
    assert [event async for event in cron.events()] == []


@virtual
async def test_it_is_entered_once() -> None:
    async with cron_over() as cron:
        with pytest.raises(RuntimeError, match="the cron scheduler is open: each is entered once"):
            await cron.__aenter__()
    with pytest.raises(RuntimeError, match="the cron scheduler is closed"):
        await cron.__aenter__()


@virtual
async def test_a_store_that_cannot_be_opened_leaves_nothing_behind() -> None:
    class Broken(FaultyStore):
        async def open(self) -> None:
            raise StoreError("no such folder")

    cron = CronScheduler(Target(), store=Broken())
    with pytest.raises(StoreError, match="no such folder"):
        await cron.__aenter__()
    await cron.close()
    with pytest.raises(RuntimeError):
        await cron.__aenter__()


@virtual
async def test_it_cannot_be_closed_while_it_opens() -> None:
    cron = CronScheduler(Target(), store=FaultyStore())
    (opening,) = await start(cron.__aenter__())
    cron._phase = "opening"
    with pytest.raises(CronError, match="is opening"):
        await cron.close()
    cron._phase = "open"
    await opening
    await cron.close()


@virtual
async def test_leaving_lets_runs_end_and_fires_no_more() -> None:
    target = Target(seconds=9)
    async with cron_over(target) as cron:
        await cron.register(a_job())
        await cron.register(a_job("soon", 61))
        await asyncio.sleep(60.5)
    assert await counts(cron) == {"succeeded": 1}
    assert await counts(cron, "soon") == {}
    assert asyncio.get_running_loop().time() == 69
    assert len(target.calls) == 1


@virtual
async def test_what_takes_longer_is_cancelled() -> None:
    target, store = Target(does=lambda number: None), MemoryStore()
    async with cron_over(target, store=store) as cron:
        await cron.register(a_job())
        await cron.register(a_job("resumes", run=RESUME))
        await asyncio.sleep(61)
    assert asyncio.get_running_loop().time() == 71
    assert await counts(cron) == {"cancelled": 1}
    assert await counts(cron, "resumes") == {"pending": 1}
    assert target.cancelled == 2
    await store.open()
    (run,) = await store.runs(RunQuery(job="resumes"))
    assert (run.state.value, run.owner, run.reason) == ("pending", "", "shutdown")
    assert await store.beats() == {}


@virtual
async def test_what_has_not_begun_is_cancelled_too() -> None:
    async with cron_over(Target(does=lambda number: None), max_concurrent_runs=1) as cron:
        await cron.register(a_job("a"))
        await cron.register(a_job("b"))
        await cron.register(a_job("c", run=RESUME))
        await asyncio.sleep(61)
        await cron.close(drain=0)
        for name, expected in (("a", "cancelled"), ("b", "cancelled"), ("c", "pending")):
            assert await counts(cron, name) == {expected: 1}


@virtual
async def test_runs_that_wait_have_their_turn_while_it_drains() -> None:
    target = Target(seconds=3)
    async with cron_over(target, max_concurrent_runs=1) as cron:
        for name in "abcde":
            await cron.register(a_job(name))
        await asyncio.sleep(61)
    assert [await counts(cron, name) for name in "abc"] == [{"succeeded": 1}] * 3
    assert await counts(cron, "e") == {"cancelled": 1}


@virtual
async def test_an_error_inside_does_not_wait() -> None:
    target = Target(does=lambda number: None)

    async def fails_inside() -> None:
        async with CronScheduler(target, clock=WallClock()) as cron:
            await cron.register(a_job())
            await asyncio.sleep(61)
            raise KeyError

    with pytest.raises(KeyError):
        await fails_inside()
    assert asyncio.get_running_loop().time() == 61


@virtual
async def test_a_run_that_was_cut_short_goes_on_in_the_next_process_and_what_waits_after_it() -> None:
    store, clock = MemoryStore(), WallClock()
    target = Target(does=lambda number: None if number == 1 else 1.0)
    policy = FiringPolicy(overlap=Overlap.BUFFER_ONE)
    async with cron_over(target, store=store, clock=clock) as cron:
        await cron.register(a_job(firing=policy, run=RESUME))
        await asyncio.sleep(130)
        await cron.close(drain=0)
        assert await counts(cron) == {"pending": 2}
    async with cron_over(target, store=store, clock=clock) as cron:
        await asyncio.sleep(5)
        assert await history(cron) == [(60, "succeeded", ""), (120, "succeeded", "")]
        runs = await cron.runs()
        assert [run.attempt for run in runs] == [1, 2]
        info = await cron.job_info("job")
        assert info is not None
        assert info.fired_count == 2


@virtual
async def test_closing_twice_is_closing_once() -> None:
    async with cron_over(Target(seconds=8)) as cron:
        await cron.register(a_job())
        await asyncio.sleep(61)
        first, second = await start(cron.close(), cron.close())
        await cron.close()
        assert first.done()
        await second
        assert await counts(cron) == {"succeeded": 1}


@virtual
async def test_cancelling_a_close_cuts_the_drain_short_and_leaves_nothing() -> None:
    target = Target(does=lambda number: None)
    async with cron_over(target) as cron:
        await cron.register(a_job())
        await asyncio.sleep(61)
        closing, other = await start(cron.close(drain=100), cron.close())
        await asyncio.sleep(1)
        closing.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
            closing.cancel()  # as often as one likes
        with pytest.raises(asyncio.CancelledError):
            await closing
        await other
        assert repr(cron).startswith("<CronScheduler closed")
        assert asyncio.get_running_loop().time() == 62
        assert await counts(cron) == {"cancelled": 1}


@virtual
async def test_somebody_who_waits_for_a_close_may_go() -> None:
    async with cron_over(Target(seconds=8)) as cron:
        await cron.register(a_job())
        await asyncio.sleep(61)
        closing, other = await start(cron.close(), cron.close())
        other.cancel()
        await closing
        assert await counts(cron) == {"succeeded": 1}


@virtual
async def test_a_run_that_does_not_end_is_left_behind_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    let_go = asyncio.Event()

    class Stubborn(Target):
        async def infer(self, request: Any, **options: Any) -> Any:
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    pass

    async with cron_over(Stubborn()) as cron:
        await cron.register(a_job())
        await asyncio.sleep(61)
        await cron.close(drain=1)
        assert asyncio.get_running_loop().time() == 67
        assert "a run does not end though it was cancelled, and is left behind" in caplog.text
        assert await counts(cron) == {"cancelled": 1}
    let_go.set()
    await asyncio.sleep(0.1)


@virtual
async def test_what_was_being_written_when_it_closed_is_not_left_running() -> None:
    """A store that takes its time: the firing is written after the drain has begun, or is over."""

    class Slow(FaultyStore):
        async def _give_way(self) -> None:
            await asyncio.sleep(0.7)

    for drain in (0.0, 0.5, 20.0):
        target, store = Target(seconds=5), Slow()
        async with CronScheduler(target, clock=WallClock(), store=store) as cron:
            await cron.register(a_job(schedule=30))
            await asyncio.sleep(30.1 - 1.4)
            await cron.close(drain=drain)
        (record,) = await store.held.jobs()
        assert record.state.balanced
        assert record.state.pending == 0, drain
        assert target.in_flight == 0
        assert await store.held.beats() == {}


@virtual
async def test_a_call_that_the_store_never_answers_ends_with_the_scheduler() -> None:
    class Stuck(FaultyStore):
        stuck = False

        async def _give_way(self) -> None:
            if self.stuck:
                await asyncio.sleep(1000)

    store = Stuck()
    cron = CronScheduler(Target(), store=store, clock=WallClock())
    await cron.__aenter__()
    await cron.register(a_job())
    store.stuck = True
    (pausing,) = await start(cron.pause("job"))
    store.stuck = False
    await cron.close()
    with pytest.raises(CronError, match="the cron scheduler is closed"):
        await pausing


@pytest.mark.parametrize("instant", [True, False])
@virtual
async def test_a_store_that_fails_for_good_does_not_keep_it_from_closing(
    instant: bool, caplog: pytest.LogCaptureFixture
) -> None:
    failing = False
    store = FaultyStore(instant=instant, fails=lambda name, number: "before" if failing else None)
    cron = CronScheduler(Target(seconds=1), store=store, clock=WallClock())
    async with cron:
        await cron.register(a_job())
        await asyncio.sleep(60.5)
        failing = True
    assert asyncio.get_running_loop().time() <= 60.5 + 10 + 5 + 0.1
    assert "does not take how the last runs ended: a planned failure" in caplog.text
    assert not store._opened


@virtual
async def test_what_fell_over_is_recorded_when_its_store_is_entered_again() -> None:
    """A store in memory outlives a scheduler that was never closed, and nobody else can be using it."""
    store, clock, target = MemoryStore(), WallClock(), Target(does=lambda number: None if number <= 2 else 0.0)
    fallen = CronScheduler(target, store=store, clock=clock)
    await fallen.__aenter__()
    await fallen.register(a_job())
    await fallen.register(a_job("resumes", run=RESUME))
    await asyncio.sleep(61)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    fallen._runs.ended = lambda execution, after: None  # type: ignore[method-assign]
    await asyncio.sleep(0)
    async with cron_over(target, store=store, clock=clock) as cron:
        await asyncio.sleep(30)
        assert await counts(cron) == {"interrupted": 1}
        assert (await history(cron))[0] == (60, "interrupted", "crash")
        assert await counts(cron, "resumes") == {"succeeded": 1}
        assert await store.beats() == {cron._runs.owner: 1 + 3}  # and no more: nobody hears it
        assert (await run_ended(cron)).state.value == "succeeded"
    await store.open()
    assert await store.beats() == {}


@virtual
async def test_a_service_that_stops_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async with cron_over() as cron:
        await cron.register(a_job())

        def broken() -> Any:
            raise SystemError("what now")

        cron._runs.history_grows.wait = broken  # type: ignore[method-assign]
        cron._runs.history_grows.set()
        with caplog.at_level(logging.CRITICAL):
            await asyncio.sleep(100)
        assert "cron watch has stopped" in caplog.text


@virtual
async def test_the_timer_goes_on_after_a_mistake_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    async with cron_over() as cron:
        await cron.register(a_job("a", 60))
        await cron.register(a_job("b", 90))
        strike, broken = cron._alarm._strike, True

        def once_broken(due: Any) -> None:
            if broken:
                raise SystemError("what now")
            strike(due)

        cron._alarm._strike = once_broken
        await asyncio.sleep(61)
        assert "jobs that are due were not looked at: ['a']" in caplog.text
        broken = False
        await asyncio.sleep(30)
        assert await counts(cron, "b") == {"succeeded": 1}
