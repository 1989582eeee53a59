"""When jobs fire: schedules, stalls, clocks, overlap, pauses, triggers, backfills. The planner itself: tests/core."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

import pytest

from kapsl_scheduler import (
    Coalesce,
    CronError,
    FiringPolicy,
    InvalidJob,
    NotFound,
    Overlap,
    RunPolicy,
    RunState,
)
from kapsl_scheduler.testing import WallClock
from tests.runtime.cron import Target, a_job, at, counts, cron_over, history, next_event
from tests.runtime.virtual import virtual


def overlapping(overlap: Overlap, **policy: Any) -> FiringPolicy:
    return FiringPolicy(overlap=overlap, **policy)


# ---------------------------------------------------------------------------------------------- on time


@virtual
async def test_a_job_fires_on_its_schedule_to_the_microsecond() -> None:
    target = Target()
    async with cron_over(target) as cron:
        await cron.register(a_job(schedule="0 */10 9 * * *"))
        await asyncio.sleep(3600)
    assert target.times == [30, 630, 1230, 1830, 2430, 3030]


@virtual
async def test_an_interval_begins_after_one_full_period() -> None:
    target = Target()
    async with cron_over(target) as cron:
        await asyncio.sleep(7)
        await cron.register(a_job(schedule=45.5))
        await asyncio.sleep(140)
    assert target.times == [52.5, 98, 143.5]


@virtual
async def test_one_job_that_runs_for_ten_seconds_makes_no_other_late() -> None:
    slow, target = Target(seconds=10), Target()

    class Both:
        def target(self, model: str) -> Target:
            return slow if model == "slow" else target

    async with cron_over(Both()) as cron:
        await cron.register(a_job("slow", 1, model="slow", firing=overlapping(Overlap.ALLOW, max_running=20)))
        for number in range(20):
            await cron.register(a_job(f"quick{number}", 1, model="quick"))
        await asyncio.sleep(60.5)
        statistics = cron.statistics()
        assert statistics.lateness_p99 is not None
        assert statistics.lateness_p99 < 0.050
    assert len(target.calls) == 20 * 60
    assert all(time == int(time) for time in target.times)
    assert slow.most == 10


@virtual
async def test_a_job_is_fired_with_its_class_and_settings() -> None:
    target = Target()
    async with cron_over(target) as cron:
        await cron.register(a_job(force_cpu=True, run=RunPolicy(timeout=5)))
        await asyncio.sleep(61)
    options = target.calls[0].options
    assert options["priority"].name == "BACKGROUND"
    assert options["force_cpu"] is True
    assert options["timeout"] == 5
    assert (options["overflow"].name, options["block_timeout"]) == ("BLOCK", 0.0)


@virtual
async def test_spread_delays_a_job_but_not_its_nominal_time() -> None:
    target = Target()
    async with cron_over(target) as cron:
        await cron.register(a_job("a", firing=FiringPolicy(spread=30)))
        await asyncio.sleep(130)
        assert await history(cron, "a") == [(60, "succeeded", ""), (120, "succeeded", "")]
    assert target.times == [65.383343, 125.383343]


@virtual
async def test_start_end_and_the_cap_on_runs() -> None:
    target = Target()
    async with cron_over(target) as cron:
        await cron.register(a_job("between", firing=FiringPolicy(start=at(100), end=at(300))))
        await cron.register(a_job("capped", firing=FiringPolicy(max_runs=2)))
        await asyncio.sleep(3600)
        assert [seconds for seconds, _, _ in await history(cron, "between")] == [120, 180, 240]
        assert [seconds for seconds, _, _ in await history(cron, "capped")] == [60, 120]
        for id in ("between", "capped"):
            info = await cron.job_info(id)
            assert info is not None
            assert info.next_firing is None


@virtual
async def test_a_skipped_firing_does_not_end_a_capped_job() -> None:
    target = Target(seconds=70)
    async with cron_over(target) as cron:
        await cron.register(a_job(firing=FiringPolicy(max_runs=2)))
        await asyncio.sleep(600)
        assert await history(cron) == [(60, "succeeded", ""), (120, "skipped", "overlap"), (180, "succeeded", "")]


# ------------------------------------------------------------------------------------ stalls and clocks


@virtual
async def test_a_suspension_of_an_hour_costs_one_run_and_is_noticed_within_thirty_seconds() -> None:
    target, clock = Target(), WallClock()
    async with cron_over(target, clock=clock) as cron:
        await cron.register(a_job("cron", "0 * * * * *"))
        await cron.register(a_job("interval", 60))
        await cron.register(a_job("all", 60, firing=FiringPolicy(coalesce=Coalesce.ALL, overlap=Overlap.BUFFER_ALL)))
        await asyncio.sleep(61)
        clock.step(3600)
        await asyncio.sleep(30)
        assert await counts(cron, "cron") == {"succeeded": 1 + 1, "missed": 60}
        assert await counts(cron, "interval") == {"succeeded": 1 + 1, "missed": 59}
        assert await counts(cron, "all") == {"succeeded": 61}
        await asyncio.sleep(60)
        assert await counts(cron, "interval") == {"succeeded": 1 + 1 + 1, "missed": 59}


@virtual
async def test_a_long_wait_looks_at_the_wall_clock_every_thirty_seconds() -> None:
    target, clock = Target(), WallClock()
    async with cron_over(target, clock=clock) as cron:
        await cron.register(a_job(schedule="0 0 0 1 1 *"))  # in ten months
        await asyncio.sleep(1)
        clock.step((dt.datetime(2027, 1, 1, tzinfo=dt.UTC) - clock.now).total_seconds() + 5)
        await asyncio.sleep(29)
    assert target.times == [30]


@virtual
async def test_a_step_back_repeats_nothing_and_loses_nothing() -> None:
    target, clock = Target(), WallClock()
    async with cron_over(target, clock=clock) as cron:
        await cron.register(a_job(schedule="0 * * * * *"))
        await asyncio.sleep(91)  # 30 and 90
        clock.step(-600)
        await asyncio.sleep(599)
        assert await counts(cron) == {"succeeded": 2}
        await asyncio.sleep(61)
        assert [seconds for seconds, _, _ in await history(cron)] == [30, 90, 150]
    assert target.times == [30, 90, 750]


@virtual
async def test_a_step_forward_is_a_stall() -> None:
    target, clock = Target(), WallClock()
    async with cron_over(target, clock=clock) as cron:
        await cron.register(a_job())
        clock.step(190)
        await asyncio.sleep(31)
        assert await history(cron) == [(120, "missed", "coalesced"), (180, "succeeded", "")]
        await asyncio.sleep(20)
        assert (await history(cron))[2:] == [(240, "succeeded", "")]


@virtual
async def test_what_is_found_too_late_is_missed() -> None:
    clock = WallClock()
    async with cron_over(clock=clock) as cron:
        await cron.register(a_job(firing=FiringPolicy(misfire_grace=5)))
        await cron.register(a_job("earliest", firing=FiringPolicy(coalesce=Coalesce.EARLIEST)))
        clock.step(70)
        await asyncio.sleep(30)
        assert await history(cron) == [(60, "missed", "late")]
        assert await history(cron, "earliest") == [(60, "succeeded", "")]


# --------------------------------------------------------------------------------------------- overlap


@virtual
async def test_a_firing_is_skipped_while_another_runs() -> None:
    target = Target(seconds=100)
    async with cron_over(target) as cron:
        await cron.register(a_job())
        await asyncio.sleep(301)
        assert await counts(cron) == {"succeeded": 2, "skipped": 2, "pending": 1}
        assert (await history(cron))[1] == (120, "skipped", "overlap")
    assert target.most == 1


@virtual
async def test_one_firing_waits_for_the_one_that_runs() -> None:
    target = Target(seconds=130)
    async with cron_over(target) as cron:
        await cron.register(a_job(firing=overlapping(Overlap.BUFFER_ONE)))
        await asyncio.sleep(200)
        assert [state for _, state, _ in await history(cron)] == ["succeeded", "running", "skipped"]
    assert target.times == [60, 190]


@virtual
async def test_several_firings_wait_in_order() -> None:
    target = Target(does=lambda number: 150 if number == 1 else 1)
    async with cron_over(target) as cron:
        await cron.register(a_job(firing=overlapping(Overlap.BUFFER_ALL, max_buffered=5)))
        await asyncio.sleep(235)
        assert [seconds for seconds, _, _ in await history(cron)] == [60, 120, 180]
        assert await counts(cron) == {"succeeded": 3}
    assert target.times == [60, 210, 211]


@virtual
async def test_a_new_firing_takes_the_place_of_the_one_that_runs() -> None:
    target = Target(does=lambda number: None if number < 4 else 1)
    async with cron_over(target) as cron:
        await cron.register(a_job(firing=overlapping(Overlap.CANCEL_OTHER)))
        await asyncio.sleep(250)
        assert await history(cron) == [*((n * 60, "cancelled", "overlap") for n in (1, 2, 3)), (240, "succeeded", "")]
    assert target.cancelled == 3
    assert target.most == 1


@virtual
async def test_one_that_does_not_let_go_is_cancelled_once() -> None:
    """And must not hold up those that come."""
    left = asyncio.Event()

    async def stubborn(firing: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await left.wait()

    async with cron_over() as cron:
        await cron.register(a_job(request=stubborn, firing=overlapping(Overlap.CANCEL_OTHER)))
        await asyncio.sleep(250)
        assert [state for _, state, _ in await history(cron)] == ["cancelled", "cancelled", "cancelled", "running"]
        left.set()
        await asyncio.sleep(1)
        assert await counts(cron) == {"cancelled": 3, "pending": 1}


@virtual
async def test_what_waits_for_its_place_is_cancelled_too() -> None:
    async with cron_over(Target(does=lambda number: None), max_concurrent_runs=1) as cron:
        await cron.register(a_job("other", firing=FiringPolicy(max_runs=1)))
        await cron.register(a_job(firing=overlapping(Overlap.CANCEL_OTHER)))
        await asyncio.sleep(190)
        assert cron.statistics().waiting == 3  # two of them have no more to say
        assert [state for _, state, _ in await history(cron)] == ["cancelled", "cancelled", "running"]


@virtual
async def test_so_many_run_side_by_side() -> None:
    target = Target(seconds=200)
    async with cron_over(target) as cron:
        await cron.register(a_job(firing=overlapping(Overlap.ALLOW, max_running=3)))
        await asyncio.sleep(245)
        assert await counts(cron) == {"pending": 3, "skipped": 1}
    assert target.most == 3


@virtual
async def test_the_timeout_of_a_run_begins_when_it_does() -> None:
    target = Target(seconds=5)
    async with cron_over(target, max_concurrent_runs=1) as cron:
        for name in "abc":
            await cron.register(a_job(name, run=RunPolicy(timeout=6)))
        await asyncio.sleep(80)
        assert [await counts(cron, name) for name in "abc"] == [{"succeeded": 1}] * 3


@virtual
async def test_the_others_wait_for_one_of_the_places_of_all() -> None:
    target = Target(seconds=5)
    async with cron_over(target, max_concurrent_runs=2) as cron:
        for name in "abcde":
            await cron.register(a_job(name))
        await asyncio.sleep(61)
        statistics = cron.statistics()
        assert (statistics.running, statistics.waiting) == (2, 3)
        shown = {run.job: run for run in await cron.runs()}
        assert [(shown[name].started, shown[name].reason) for name in "be"] == [
            (at(60), ""),
            (None, "waiting for a place"),
        ]
        assert shown["e"].state.value == "running"
        await asyncio.sleep(20)
        shown = {run.job: run for run in await cron.runs()}
        assert [(shown[name].started, shown[name].duration) for name in "bce"] == [
            (at(60), 5),
            (at(65), 5),
            (at(70), 5),
        ]
        assert (shown["e"].due, shown["e"].reason) == (at(60), "")
        assert cron.statistics().lateness_p99 == pytest.approx(10, rel=0.2)
        assert [await counts(cron, name) for name in "abcde"] == [{"succeeded": 1}] * 5
    assert target.most == 2
    assert target.times == [60, 60, 65, 65, 70]


# --------------------------------------------------------------------------------------- pause, resume


@virtual
async def test_a_paused_job_does_not_fire_and_goes_on_from_now() -> None:
    target = Target()
    async with cron_over(target) as cron:
        await cron.register(a_job())
        await asyncio.sleep(61)
        info = await cron.pause("job", reason="holidays")
        assert (info.enabled, info.paused, info.next_firing) == (False, "holidays", None)
        await asyncio.sleep(600)
        assert await counts(cron) == {"succeeded": 1}
        info = await cron.resume("job")
        assert (info.enabled, info.paused, info.next_firing) == (True, "", at(720))
        assert await history(cron) == [(60, "succeeded", ""), (660, "missed", "paused")]
        await asyncio.sleep(60)
        assert await counts(cron) == {"succeeded": 2, "missed": 10}


@virtual
async def test_a_job_that_is_resumed_may_catch_up() -> None:
    async with cron_over() as cron:
        await cron.register(a_job())
        await cron.pause("job")
        await asyncio.sleep(601)
        await cron.resume("job", catch_up=True)
        await asyncio.sleep(1)
        assert await history(cron) == [(540, "missed", "coalesced"), (600, "succeeded", "")]


@virtual
async def test_pausing_and_resuming_twice_changes_nothing() -> None:
    async with cron_over() as cron:
        await cron.register(a_job())
        assert (await cron.resume("job")).due == 0
        await cron.pause("job", reason="one")
        assert (await cron.pause("job", reason="")).paused == "one"
        await cron.resume("job")
        assert (await cron.resume("job")).enabled


@virtual
async def test_what_runs_goes_on_when_its_job_is_paused() -> None:
    async with cron_over(Target(seconds=50)) as cron:
        await cron.register(a_job())
        await asyncio.sleep(61)
        await cron.pause("job")
        await asyncio.sleep(50)
        assert await counts(cron) == {"succeeded": 1}


@virtual
async def test_a_job_is_paused_after_so_many_failures_in_a_row() -> None:
    target = Target(does=lambda number: 0.0 if number == 3 else ValueError("no"))
    async with cron_over(target) as cron:
        await cron.register(a_job(run=RunPolicy(pause_after=3)))
        events = cron.events()
        await asyncio.sleep(6000)
        info = await cron.job_info("job")
        assert info is not None
        assert (info.failed, info.succeeded, info.failures_in_a_row) == (5, 1, 3)
        assert info.paused == "3 failures in a row"
        assert (await next_event(events, "paused")).job == "job"
        await events.aclose()
        info = await cron.resume("job")
        assert (info.failures_in_a_row, info.enabled) == (0, True)


@virtual
async def test_a_job_that_is_not_enabled_is_registered_paused() -> None:
    async with cron_over() as cron:
        await cron.register(a_job(enabled=False))
        await asyncio.sleep(600)
        assert await counts(cron) == {}
        await cron.resume("job")
        await asyncio.sleep(61)
        assert await counts(cron) == {"succeeded": 1, "missed": 10}


# ------------------------------------------------------------------------------------ triggers, backfills


@virtual
async def test_a_trigger_fires_once_now_also_while_the_job_is_paused() -> None:
    target = Target(seconds=3)
    async with cron_over(target) as cron:
        await cron.register(a_job())
        await cron.pause("job")
        await asyncio.sleep(7)
        run = await cron.trigger("job")
        assert (run.state, run.nominal, run.number) == (RunState.RUNNING, at(7), 1)
        assert run.origin.startswith("trigger-")
        await asyncio.sleep(5)
        assert await counts(cron) == {"succeeded": 1}
        assert (await cron.run(run.number)).state is RunState.SUCCEEDED
    assert target.times == [7]


@virtual
async def test_asked_for_twice_under_one_name_it_is_one_run() -> None:
    target = Target()
    async with cron_over(target) as cron:
        await cron.register(a_job())
        first = await cron.trigger("job", origin="deploy-7")
        await asyncio.sleep(7)
        again = await cron.trigger("job", origin="deploy-7")
        assert (again.number, again.state) == (first.number, RunState.SUCCEEDED)
        assert (await cron.trigger("job", origin="deploy-8")).number != first.number
    assert len(target.calls) == 2


@virtual
async def test_a_trigger_obeys_the_overlap_policy() -> None:
    async with cron_over(Target(seconds=10)) as cron:
        await cron.register(a_job())
        await cron.trigger("job")
        run = await cron.trigger("job")
        assert (run.state, run.reason) == (RunState.SKIPPED, "overlap")


@pytest.mark.parametrize("origin", ["", "schedule"])
@virtual
async def test_some_names_are_no_origins(origin: str) -> None:
    async with cron_over() as cron:
        await cron.register(a_job())
        with pytest.raises(InvalidJob, match=r"origin: expected 1 to 200 printable"):
            await cron.trigger("job", origin=origin)
        with pytest.raises(InvalidJob, match=r"origin: expected 1 to 200 printable"):
            await cron.backfill("job", at(-600), at(0), origin=origin)


@virtual
async def test_a_backfill_runs_every_occurrence_of_a_range_a_few_at_a_time() -> None:
    target = Target(seconds=10)
    async with cron_over(target) as cron:
        await cron.register(a_job())
        origin, number = await cron.backfill("job", at(-600), at(0), concurrency=3)
        assert number == 10
        await asyncio.sleep(5)
        assert target.in_flight == 3
        assert await counts(cron) == {"pending": 10}
        await asyncio.sleep(40)
        assert await counts(cron) == {"succeeded": 10}
        found = await cron.runs("job", origin=origin)
        assert [run.nominal for run in reversed(found)] == [at(seconds) for seconds in range(-600, 0, 60)]
        await asyncio.sleep(20)
        assert await counts(cron) == {"succeeded": 10, "pending": 1}  # the schedule's own
    assert target.most == 3


@virtual
async def test_a_backfill_goes_on_beside_the_schedule_and_is_no_overlap() -> None:
    target = Target(does=lambda number: None if number == 1 else 1)
    async with cron_over(target) as cron:
        await cron.register(a_job(firing=overlapping(Overlap.CANCEL_OTHER)))
        await cron.backfill("job", at(-60), at(0))
        await asyncio.sleep(130)
        assert [state for _, state, _ in await history(cron)] == ["running", "succeeded", "succeeded"]


@virtual
async def test_asked_for_twice_under_one_name_it_is_one_backfill() -> None:
    async with cron_over(Target(seconds=1)) as cron:
        await cron.register(a_job())
        assert await cron.backfill("job", at(-600), at(0), origin="b") == ("b", 10)
        assert await cron.backfill("job", at(-600), at(0), origin="b") == ("b", 0)
        assert await cron.backfill("job", at(-1200), at(-600), origin="b") == ("b", 0)
        assert await cron.backfill("job", at(-600), at(0), origin="c") == ("c", 10)
        await asyncio.sleep(20)
        assert await counts(cron) == {"succeeded": 20}


@virtual
async def test_what_a_backfill_may_not_be() -> None:
    async with cron_over() as cron:
        await cron.register(a_job())
        with pytest.raises(InvalidJob, match="with 1 to 10000 occurrences, got 0"):
            await cron.backfill("job", at(1), at(59))
        with pytest.raises(InvalidJob, match="with 1 to 10000 occurrences, got 10001"):
            await cron.backfill("job", at(0), at(10_001 * 60))
        with pytest.raises(InvalidJob) as caught:
            await cron.backfill("job", at(0).replace(tzinfo=None), "now", concurrency=10_001)  # type: ignore[arg-type]
        assert [fault.split(":")[0] for fault in caught.value.faults] == [
            *("backfill.start", "backfill.end", "backfill.concurrency")
        ]


@virtual
async def test_preview_says_when_a_job_is_due_next() -> None:
    async with cron_over() as cron:
        await cron.register(a_job(firing=FiringPolicy(end=at(200))))
        assert cron.preview("job", 2) == [at(60), at(120)]
        assert cron.preview("job") == [at(60), at(120), at(180)]
        await asyncio.sleep(61)
        await cron.pause("job")
        assert cron.preview("job", 1) == [at(120)]


@virtual
async def test_preview_ends_with_the_last_run_that_the_job_has_left() -> None:
    async with cron_over() as cron:
        await cron.register(a_job(firing=FiringPolicy(max_runs=3)))
        assert cron.preview("job") == [at(60), at(120), at(180)]
        await asyncio.sleep(61)
        await cron.trigger("job")  # not the schedule's
        assert cron.preview("job", 1) == [at(120)]
        assert cron.preview("job") == [at(120), at(180)]
        await asyncio.sleep(120)
        assert cron.preview("job") == []
        await cron.update(a_job(firing=FiringPolicy(max_runs=2)))  # fewer than it had
        assert cron.preview("job") == []


@pytest.mark.parametrize("n", [0, -1, 1001, True, 2.0, "3"])
@virtual
async def test_a_preview_has_from_one_to_a_thousand_times(n: Any) -> None:
    async with cron_over() as cron:
        await cron.register(a_job())
        assert len(cron.preview("job", 1000)) == 1000
        with pytest.raises(InvalidJob) as caught:
            cron.preview("job", n)
        assert caught.value.faults == (f"n: expected an integer from 1 to 1000, got {n!r}",)


@virtual
async def test_a_job_that_is_not_there_is_not_found() -> None:
    async with cron_over() as cron:
        for call in (cron.pause, cron.resume, cron.trigger):
            with pytest.raises(NotFound, match="no job 'x'"):
                await call("x")
        with pytest.raises(NotFound):
            await cron.backfill("x", at(0), at(1))
        with pytest.raises(NotFound):
            await cron.update(a_job("x"))
        for look in (cron.preview, cron.job, cron.definition):
            with pytest.raises(NotFound):
                look("x")
        with pytest.raises(NotFound, match="no run 7"):
            await cron.run(7)
        assert await cron.job_info("x") is None
        assert await cron.unregister("x") is False
        assert issubclass(NotFound, CronError)
