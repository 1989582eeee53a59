"""What is told of jobs and runs: events, figures, history and its bounds."""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
from collections import Counter
from typing import Any

import pytest

from kapsl_scheduler import CronStatistics, FiringPolicy, InferenceError, NotFound, RunPolicy, RunState
from kapsl_scheduler.core.runs import Run
from kapsl_scheduler.runtime.cron_metrics import MAX_JOBS, OTHER_JOBS, CronFigures
from kapsl_scheduler.testing import WallClock
from tests.runtime.cron import FaultyStore, Target, a_job, at, counts, cron_over, history
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


def check_sums(found: CronStatistics) -> None:
    """What all jobs have done is what each of them has."""
    assert found.fired == sum(found.fired_by_job.values())
    outcomes: Counter[tuple[str, str]] = Counter()
    for each in found.outcomes_by_job.values():
        outcomes.update(each)
    assert found.outcomes == outcomes


@virtual
async def test_jobs_have_figures_of_their_own() -> None:
    clock = WallClock()
    async with cron_over(Target(does=lambda number: 0.1 if number == 1 else 5.0), clock=clock) as cron:
        await cron.register(a_job("quick", 10, firing=FiringPolicy(max_runs=1)))
        await asyncio.sleep(15)
        await cron.register(a_job("slow", 100, firing=FiringPolicy(max_runs=1)))
        await cron.register(a_job("never", 86_400))
        clock.step(120)
        await asyncio.sleep(60)
        found = cron.statistics()
    check_sums(found)
    assert found.fired_by_job == {"quick": 1, "slow": 1}
    assert found.outcomes_by_job == {"quick": {("succeeded", ""): 1}, "slow": {("succeeded", ""): 1}}
    assert found.duration_p99_by_job == pytest.approx({"quick": 0.1, "slow": 5.0}, rel=0.2)
    assert found.lateness_p99_by_job["quick"] < 0.001
    assert 20 < found.lateness_p99_by_job["slow"] < 60


@virtual
async def test_jobs_beyond_a_bound_share_their_figures() -> None:
    async with cron_over() as cron:
        for number in range(MAX_JOBS + 5):
            await cron.register(a_job(f"{number:04}", 60))
        await asyncio.sleep(61)
        found = cron.statistics()
        check_sums(found)
        assert len(found.outcomes_by_job) == len(found.lateness_p99_by_job) == MAX_JOBS + 1
        assert found.outcomes_by_job[OTHER_JOBS] == {("succeeded", ""): 5}
        assert found.outcomes == {("succeeded", ""): MAX_JOBS + 5}


@virtual
async def test_a_job_of_the_name_that_the_others_have_is_one_of_them() -> None:
    async with cron_over() as cron:
        await cron.register(a_job(OTHER_JOBS))
        await asyncio.sleep(61)
        assert cron.figures.of_job == {}
        assert cron.statistics().fired_by_job == {OTHER_JOBS: 1}
        await cron.unregister(OTHER_JOBS)
        assert cron.statistics().fired == 1


@virtual
async def test_a_job_that_is_gone_gives_its_figures_back_and_none_is_lost() -> None:
    async with cron_over(Target(seconds=7)) as cron:
        for number in range(MAX_JOBS + 1):
            await cron.register(a_job(f"{number:04}", 60))
        await asyncio.sleep(70)
        before = cron.statistics()
        assert "0200" not in before.fired_by_job
        await asyncio.sleep(53)
        await cron.unregister("0000")  # in the middle of its second run
        now = cron.statistics()
        check_sums(now)
        assert now.fired == 2 * (MAX_JOBS + 1)
        assert now.outcomes == before.outcomes
        assert (now.duration_p50, now.duration_p99) == (before.duration_p50, before.duration_p99)
        assert "0000" not in now.outcomes_by_job.keys() | now.fired_by_job.keys() | now.duration_p99_by_job.keys()
        assert now.fired_by_job[OTHER_JOBS] == 4
        await asyncio.sleep(10)
        after = cron.statistics()
        check_sums(after)
        assert after.outcomes == {("succeeded", ""): 2 * (MAX_JOBS + 1)}
        assert "0000" not in after.outcomes_by_job
        assert after.outcomes_by_job["0200"] == {("succeeded", ""): 1}  # which another has now
        assert after.outcomes_by_job[OTHER_JOBS] == {("succeeded", ""): 3}


@virtual
async def test_the_last_runs_of_a_job_that_is_gone_are_no_reason_to_give_it_a_place_again() -> None:
    async with cron_over(Target(seconds=7)) as cron:
        await cron.register(a_job())
        await asyncio.sleep(61)
        await cron.unregister("job")
        await asyncio.sleep(10)
        assert cron.figures.of_job == {}
        assert cron.statistics().outcomes_by_job == {OTHER_JOBS: {("succeeded", ""): 1}}


def test_a_sum_is_the_same_whoever_has_its_parts() -> None:
    """One that falls by a rounding error would be taken for a counter that has begun anew."""
    figures = CronFigures(lambda job: True)
    for number in range(100):
        run = Run(job=f"{number}", nominal=0, state=RunState.SUCCEEDED, first=0, due=0, started=0, ended=number * 7 + 1)
        figures.started(run, number * 13 + 1)
        figures.ended(run)
    seen = []
    for number in range(0, 100, 3):
        total = figures.total()
        seen.append((total.lateness.total, total.lateness.counts, total.duration.total, total.duration.counts))
        figures.give_back(f"{number}")
    assert all(each == seen[0] for each in seen)


def test_figures_for_another_thread_stay_as_they_are() -> None:
    figures = CronFigures(lambda job: True)
    run = Run(job="a", nominal=0, state=RunState.SUCCEEDED, first=0, due=0, started=0, ended=5)

    def seen(figures: CronFigures) -> Any:
        return [
            (each.lateness.counts, each.duration.total, dict(each.outcomes))
            for each in (*figures.of_job.values(), figures.others, figures.gone, figures.total())
        ]

    figures.ended(run)
    copy = figures.copy()
    before = seen(copy)
    assert before == seen(figures)
    figures.started(run, 10)
    figures.ended(run)
    figures.give_back("a")
    assert seen(copy) == before


@virtual
async def test_overdue_counts_jobs_whose_time_has_come() -> None:
    clock = WallClock()
    async with cron_over(clock=clock) as cron:
        await cron.register(a_job())
        await cron.register(a_job("other", 3600))
        await asyncio.sleep(1)
        assert (cron.statistics().overdue, cron.statistics().overdue_by_job) == (0, {})
        clock.step(61)
        assert (cron.statistics().overdue, cron.statistics().overdue_by_job) == (1, {"job": 2.0})
        await asyncio.sleep(31)
        assert (cron.statistics().overdue, cron.statistics().overdue_by_job) == (0, {})
        assert (cron.statistics().lateness_p50 or 0) > 25


@virtual
async def test_what_a_failing_store_keeps_from_being_decided_is_overdue_too() -> None:
    broken = True
    store = FaultyStore(fails=lambda name, number: "before" if name == "commit" and number > 2 and broken else None)
    async with cron_over(store=store) as cron:
        await cron.register(a_job())
        await cron.register(a_job("spread", 60, firing=FiringPolicy(spread=30)))
        await asyncio.sleep(100)
        found = cron.statistics()
        assert found.store_failing is not None
        assert (found.overdue, found.overdue_by_job["job"]) == (2, 40.0)
        assert 10 < found.overdue_by_job["spread"] < 40
        broken = False
        await asyncio.sleep(3)
        assert cron.statistics().overdue == 0


def test_jobs_that_are_overdue_and_have_no_place_share_one() -> None:
    figures = CronFigures(lambda job: True)
    for number in range(MAX_JOBS - 1):
        figures.ended(Run(job=f"{number}", nominal=1, state=RunState.MISSED, first=1, due=1))
    found = figures.by_place({"7": 3.0, "new": 1.0, "late": 2.0, "later": 5.0, "less": 4.0})
    assert found == {"7": 3.0, "new": 1.0, OTHER_JOBS: 5.0}


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
