"""What is told of jobs and runs: events, figures, history and its bounds."""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
from typing import Any

import pytest

from kapsl_scheduler import FiringPolicy, InferenceError, NotFound, RunPolicy, RunState
from kapsl_scheduler.runtime.cron_metrics import MAX_JOBS, OTHER_JOBS
from kapsl_scheduler.testing import WallClock
from tests.runtime.cron import Target, a_job, at, counts, cron_over, history
from tests.runtime.virtual import virtual


@virtual
async def test_events_tell_what_happens_in_order_until_the_end() -> None:
    async with cron_over(Target(seconds=1)) as cron:
        events = cron.events()
        await cron.register(a_job())
        await asyncio.sleep(61.5)
        await cron.update(a_job(schedule=45))
        await cron.pause("job")
        await cron.resume("job")
        await cron.unregister("job")
    told = [event async for event in events]
    assert [event.kind for event in told] == [
        *("registered", "started", "ended", "updated", "paused", "resumed", "unregistered")
    ]
    assert [event.at for event in told[:3]] == [at(0), at(60), at(61)]
    assert {event.job for event in told} == {"job"}
    started, ended = told[1].run, told[2].run
    assert started is not None
    assert ended is not None
    assert (started.state, ended.state) == (RunState.RUNNING, RunState.SUCCEEDED)
    assert started.number == ended.number


@virtual
async def test_what_is_missed_is_told_as_well() -> None:
    clock = WallClock()
    async with cron_over(clock=clock) as cron:
        await cron.register(a_job())
        events = cron.events()
        clock.step(3600)
        await cron.update(a_job(schedule=45))
        await cron.pause("job")
        clock.step(90)
        await cron.resume("job")
        assert cron.statistics().outcomes == {("missed", "updated"): 60, ("missed", "paused"): 2}
    found = [event.run for event in [event async for event in events] if event.kind == "ended"]
    assert [(run.count, run.reason, run.number) for run in found if run] == [(60, "updated", 1), (2, "paused", 2)]


@virtual
async def test_a_reader_that_is_slow_loses_the_oldest_and_hears_how_many() -> None:
    async with cron_over() as cron:
        await cron.register(a_job(schedule=1))
        events = cron.events()
        await asyncio.sleep(600.5)  # 1,200 events
        first = await anext(events)
        assert first.lost == 200
        assert first.run is not None
        assert first.run.nominal == at(101)
        assert (await anext(events)).lost == 0
        await events.aclose()


@virtual
async def test_a_reader_that_has_gone_costs_nothing() -> None:
    async with cron_over() as cron:
        await cron.register(a_job(schedule=1))
        never_begun, begun = cron.events(), cron.events()
        await asyncio.sleep(1.5)
        await anext(begun)
        await begun.aclose()
        del never_begun
        gc.collect()
        assert not cron._events.wanted
        assert not cron._events._readers


@virtual
async def test_statistics_count_how_runs_ended() -> None:
    def does(number: int) -> float | Exception:
        return InferenceError("no") if number % 5 == 0 else 0.5

    async with cron_over(Target(does=does)) as cron:
        await cron.register(a_job("a"))
        await cron.register(a_job("b", 0.25))
        await asyncio.sleep(60.1)
        found = cron.statistics()
        assert found.jobs == 2
        assert found.running >= 1  # "a" is; "b" is between two runs at times
        assert found.outcomes_by_job.keys() == {"b"}
        assert found.outcomes == found.outcomes_by_job["b"]
        assert found.outcomes.keys() == {("succeeded", ""), ("failed", "inference_error"), ("skipped", "overlap")}
        assert found.fired == sum(n for (state, _), n in found.outcomes.items() if state != "skipped") + found.running
        assert found.lateness_p99 is not None
        assert found.lateness_p99 < 0.001
        assert found.duration_p50 is not None
        assert 0.4 < found.duration_p50 < 0.6
        assert (found.overdue, found.waiting, found.store_failing) == (0, 0, None)


@virtual
async def test_jobs_beyond_a_bound_share_their_figures() -> None:
    async with cron_over() as cron:
        for number in range(MAX_JOBS + 5):
            await cron.register(a_job(f"{number:04}", 60))
        await asyncio.sleep(61)
        found = cron.statistics()
        assert len(found.outcomes_by_job) == MAX_JOBS + 1
        assert found.outcomes_by_job[OTHER_JOBS] == {("succeeded", ""): 5}
        assert found.outcomes == {("succeeded", ""): MAX_JOBS + 5}


@virtual
async def test_overdue_counts_jobs_whose_time_has_come() -> None:
    clock = WallClock()
    async with cron_over(clock=clock) as cron:
        await cron.register(a_job())
        await asyncio.sleep(1)
        assert cron.statistics().overdue == 0
        clock.step(61)
        assert cron.statistics().overdue == 1
        await asyncio.sleep(31)
        assert cron.statistics().overdue == 0
        assert (cron.statistics().lateness_p50 or 0) > 25


@virtual
async def test_history_is_read_page_by_page() -> None:
    async with cron_over() as cron:
        await cron.register(a_job(schedule=1))
        await cron.register(a_job("other", 1))
        await asyncio.sleep(10.5)
        everything = await cron.runs()
        assert len(everything) == 20
        page = await cron.runs("job", limit=4)
        assert [run.nominal for run in page] == [at(10), at(9), at(8), at(7)]
        page = await cron.runs("job", limit=4, before=page[-1].number)
        assert [run.nominal for run in page] == [at(6), at(5), at(4), at(3)]
        assert await cron.runs("job", states=[RunState.FAILED]) == []
        assert len(await cron.runs("job", states=[RunState.SUCCEEDED], origin="schedule")) == 10
        with pytest.raises(NotFound):
            await cron.run(1000)


@virtual
async def test_the_history_of_a_job_that_is_gone_stays() -> None:
    async with cron_over() as cron:
        await cron.register(a_job())
        await asyncio.sleep(61)
        await cron.unregister("job")
        assert await history(cron) == [(60, "succeeded", "")]


@virtual
async def test_history_has_its_bounds() -> None:
    async with cron_over(history_keep=50) as cron:
        await cron.register(a_job(schedule=1))
        await asyncio.sleep(1100.5)
        assert len(await history(cron)) < 50 + 500 + 1
        await cron.compact()
        assert [seconds for seconds, _, _ in await history(cron)] == list(range(1051, 1101))
        assert await counts(cron) == {"succeeded": 1100}


@virtual
async def test_history_grows_old() -> None:
    async with cron_over(history_max_age=86_400.0) as cron:
        await cron.register(a_job(schedule=3600))
        await asyncio.sleep(3 * 86_400 + 100)
        oldest = (await cron.runs())[-1].nominal
        assert at(2 * 86_400 - 3600) <= oldest <= at(2 * 86_400) + dt.timedelta(hours=1)


@virtual
async def test_what_runs_is_shown_as_far_as_it_is() -> None:
    async def make(firing: Any) -> list[Any]:
        return [1.0] * 10

    async with cron_over(Target(seconds=1)) as cron:
        await cron.register(a_job(request=make, run=RunPolicy(max_in_flight=1)))
        run = await cron.trigger("job")
        await asyncio.sleep(4.5)
        assert (await cron.run(run.number)).requests in (3, 4)
        (shown,) = await cron.runs("job")
        assert shown.requests in (3, 4)
        info = await cron.job_info("job")
        assert info is not None
        assert (info.running, info.pending) == (1, 1)


@virtual
async def test_a_clock_that_steps_back_makes_no_negative_durations() -> None:
    clock = WallClock()
    async with cron_over(Target(seconds=5), clock=clock) as cron:
        await cron.register(a_job(firing=FiringPolicy(max_runs=1)))
        await asyncio.sleep(61)
        clock.step(-3600)
        await asyncio.sleep(10)
        (run,) = await cron.runs("job")
        assert run.duration == 0.0
        info = await cron.job_info("job")
        assert info is not None
        assert info.last_duration == 0.0
        found = cron.statistics()
        assert found.duration_p50 is not None
        assert found.duration_p50 >= 0
