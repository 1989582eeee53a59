"""Several schedulers on one store, as several processes have it: who fires, who has died, who has taken what."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any
from unittest.mock import ANY

import pytest

from kapsl_scheduler import (
    CronScheduler,
    FiringPolicy,
    Interval,
    InvalidJob,
    NotFound,
    OnInterrupt,
    Overlap,
    RunPolicy,
    RunState,
)
from kapsl_scheduler.ports import RunQuery
from kapsl_scheduler.runtime.cron_intents import Rescue
from kapsl_scheduler.stores.memory import MemoryStore
from kapsl_scheduler.testing import WallClock
from tests.runtime.cron import FaultyStore, Target, X, a_job, add_up, at, counts, cron_over, history
from tests.runtime.virtual import virtual

LEASE = 3.0
RESUME = RunPolicy(on_interrupt=OnInterrupt.RESUME)


class Processes:
    """Some on one store. `crash` leaves one as a killed process is left: nothing is written any more."""

    def __init__(self, *targets: Target, clock: WallClock | None = None, **parameters: Any) -> None:
        self.memory = MemoryStore()
        self.clock = clock or WallClock()
        self.targets = targets
        self.stores = [FaultyStore(self.memory) for _ in targets]
        self.crons = [
            CronScheduler(target, store=store, clock=self.clock, lease=LEASE, **parameters)
            for target, store in zip(targets, self.stores, strict=True)
        ]
        self._stack = AsyncExitStack()
        self._dead: list[CronScheduler] = []

    async def __aenter__(self) -> list[CronScheduler]:
        for cron in self.crons:
            await self._stack.enter_async_context(cron)
        return self.crons

    async def __aexit__(self, *error: Any) -> None:
        for store in self.stores:
            store.fails = None
        await self._stack.aclose()
        for record in await self.memory.jobs():
            assert record.state.balanced, record

    def cut_off(self, number: int) -> None:
        """Its store does not answer any more."""
        self.stores[number].fails = lambda name, count: "before"

    def back(self, number: int) -> None:
        self.stores[number].fails = None


@pytest.mark.parametrize("apart", [0.0, 0.4, 0.9])
@virtual
async def test_a_store_that_fails_for_all_of_them_longer_than_a_lease_buries_nobody(apart: float) -> None:
    targets = Target(does=lambda number: None), Target(does=lambda number: None)
    processes = Processes(*targets)
    async with processes as (one, other):
        await one.register(a_job("a", schedule=86_400))
        await asyncio.sleep(apart)
        await other.register(a_job("b", schedule=86_400))
        await one.trigger("a")
        await other.trigger("b")
        await asyncio.sleep(2 * LEASE)
        for number in (0, 1):
            processes.cut_off(number)
        await asyncio.sleep(1.5 * LEASE)
        processes.back(0)
        await asyncio.sleep(apart)
        processes.back(1)
        await asyncio.sleep(3 * LEASE)
        assert [await history(one, id) for id in ("a", "b")] == [[(ANY, "running", "")]] * 2


@virtual
async def test_who_has_died_is_found_out_also_with_a_store_that_takes_its_time() -> None:
    processes = Processes(Target(does=lambda number: None), Target())
    async with processes as (one, other):
        await one.register(a_job())
        await asyncio.sleep(2)
        await one.trigger("job")
        give_way = FaultyStore._give_way

        async def slowly() -> None:
            await asyncio.sleep(LEASE / 25)  # twice a call, of which a look has four
            await give_way(processes.stores[1])

        processes.stores[1]._give_way = slowly  # type: ignore[method-assign]
        await asyncio.sleep(LEASE)
        processes.cut_off(0)
        await asyncio.sleep(2.5 * LEASE)
        assert await history(other) == [(2, "interrupted", "crash")]
        del processes.stores[1]._give_way


@virtual
async def test_an_occurrence_is_dispatched_by_one_of_them() -> None:
    targets = Target(), Target(), Target()
    async with Processes(*targets) as crons:
        for number in range(5):
            await crons[number % 3].register(a_job(f"job{number}", 1))
        await asyncio.sleep(2)  # until all have heard of all
        await asyncio.sleep(100)
        for number in range(5):
            info = await crons[0].job_info(f"job{number}")
            assert info is not None
            assert info.due in (101, 102)
            assert (info.missed, info.skipped) == (0, 0)
    assert len({(call.at, id(call)) for target in targets for call in target.calls}) in range(505, 515)
    assert all(target.calls for target in targets)


@virtual
async def test_what_one_changes_the_others_hear_of() -> None:
    async with Processes(Target(), Target()) as (one, other):
        await one.register(a_job())
        await asyncio.sleep(LEASE / 3 + 0.1)
        assert other.preview("job", 1) == [at(60)]
        await other.pause("job", reason="mine")
        await asyncio.sleep(LEASE / 3 + 0.1)
        info = await one.job_info("job")
        assert info is not None
        assert info.paused == "mine"
        await one.resume("job")
        await one.update(a_job(schedule=45))
        await asyncio.sleep(LEASE / 3 + 0.1)
        assert other.preview("job", 1) == [at(45)]
        await one.unregister("job")
        await asyncio.sleep(LEASE / 3 + 0.1)
        assert await other.list_jobs() == []
        await other.register(a_job())


@virtual
async def test_they_hear_of_it_also_while_they_write_all_the_time() -> None:
    targets = Target(), Target()
    async with Processes(*targets) as (one, other):
        for number in range(10):
            await one.register(a_job(f"busy{number}", 0.05))
        await other.register(a_job("new"))
        await asyncio.sleep(2 * LEASE / 3)
        assert await one.job_info("new") is not None
        await other.unregister("new")
        await asyncio.sleep(2 * LEASE / 3)
        assert await one.job_info("new") is None


@virtual
async def test_a_job_that_the_other_made_meanwhile_is_adopted_or_refused() -> None:
    async with Processes(Target(), Target()) as (one, other):
        await one.register(a_job())
        with pytest.raises(InvalidJob, match="the store has another job of this id"):
            await other.register(a_job(schedule=45), on_conflict="error")
        await other.register(a_job())
        await other.trigger("job")
        await one.pause("job")  # on books that it does not know yet
        assert (await one.job_info("job")).due == 1  # type: ignore[union-attr]


@virtual
async def test_asked_for_by_both_under_one_name_it_is_one_run() -> None:
    targets = Target(seconds=1), Target(seconds=1)
    async with Processes(*targets) as (one, other):
        await one.register(a_job(firing=FiringPolicy(overlap=Overlap.ALLOW, max_running=9)))
        await asyncio.sleep(LEASE)
        first, second = await asyncio.gather(one.trigger("job", origin="x"), other.trigger("job", origin="x"))
        assert first.number == second.number
        found = await asyncio.gather(*(cron.backfill("job", at(-600), at(0), origin="b") for cron in (one, other)))
        assert sorted(found) == [("b", 0), ("b", 10)]
        await asyncio.sleep(30)
        assert (await counts(one))["succeeded"] == 11
    assert sum(len(target.calls) for target in targets) == 11


@virtual
async def test_the_runs_of_one_that_has_died_are_recorded_as_interrupted() -> None:
    processes = Processes(Target(does=lambda number: None), Target())
    async with processes as (one, other):
        await one.register(a_job())
        await one.register(a_job("resumes", run=RESUME))
        await asyncio.sleep(2)
        await one.trigger("job")
        await one.trigger("resumes")
        processes.cut_off(0)
        await asyncio.sleep(LEASE - 1.5)
        assert await history(other) == [(2, "running", "")]  # not yet
        await asyncio.sleep(LEASE)
        assert await history(other) == [(2, "interrupted", "crash")]
        assert await history(other, "resumes") == [(2, "succeeded", "")]
        (run,) = await other.runs("resumes")
        assert run.attempt == 2
        assert await counts(other) == {"interrupted": 1}
        await asyncio.sleep(LEASE)
        assert set(await processes.memory.beats()) == {other._runs.owner}
    assert len(processes.targets[1].calls) == 1


@virtual
async def test_who_was_thought_dead_lets_go_of_what_was_taken(caplog: pytest.LogCaptureFixture) -> None:
    targets = Target(does=lambda number: None), Target(seconds=30)
    processes = Processes(*targets)
    async with processes as (one, other):
        await one.register(a_job(run=RESUME))
        await asyncio.sleep(2)
        await one.trigger("job")
        processes.cut_off(0)
        await asyncio.sleep(3 * LEASE)
        assert len(targets[1].calls) == 1
        processes.back(0)
        await asyncio.sleep(LEASE)
        assert targets[0].cancelled == 1
        assert "another process has taken over a run of this one" in caplog.text
        await asyncio.sleep(30)
        assert await counts(other) == {"succeeded": 1}


@virtual
async def test_an_end_that_comes_too_late_counts_nothing() -> None:
    targets = Target(seconds=8), Target()
    processes = Processes(*targets)
    async with processes as (one, other):
        await one.register(a_job())
        await asyncio.sleep(2)
        await one.trigger("job")
        processes.cut_off(0)
        await asyncio.sleep(9)  # it has ended, and nobody could hear it
        processes.back(0)
        await asyncio.sleep(5)
        assert await history(one) == [(2, "interrupted", "crash")]
        assert await counts(one) == await counts(other) == {"interrupted": 1}


@virtual
async def test_a_new_firing_cancels_what_runs_elsewhere() -> None:
    targets = Target(does=lambda number: None), Target(does=lambda number: None)
    async with Processes(*targets) as (one, other):
        await one.register(a_job(schedule=86_400, firing=FiringPolicy(overlap=Overlap.CANCEL_OTHER)))
        await asyncio.sleep(2)
        await one.trigger("job")
        await asyncio.sleep(2)
        await other.trigger("job")
        await asyncio.sleep(2)
        assert [(state, reason) for _, state, reason in await history(one)] == [
            ("cancelled", "overlap"),
            ("running", ""),
        ]
        assert targets[0].cancelled == 1
        await asyncio.sleep(2)
        await one.trigger("job")
        await asyncio.sleep(3)
        assert await counts(one) == {"cancelled": 2, "pending": 1}


@virtual
async def test_a_firing_that_takes_the_place_of_several_after_a_stall_cancels_what_runs_elsewhere() -> None:
    targets = Target(does=lambda number: None), Target()
    clock = WallClock()
    processes = Processes(*targets, clock=clock)
    async with processes as (one, other):
        await one.register(a_job(firing=FiringPolicy(overlap=Overlap.CANCEL_OTHER)))
        await asyncio.sleep(2)
        await one.trigger("job")
        one._alarm.stop()  # only the other fires
        clock.step(600)
        await asyncio.sleep(31)
        assert [state for _, state, _ in await history(other)] == ["cancelled", "missed", "succeeded"]


@virtual
async def test_a_firing_is_not_lost_when_what_it_was_to_cancel_is_taken() -> None:
    """The run that it would cancel has been taken by a process that thought this one dead."""
    processes = Processes(Target(does=lambda number: None), Target(does=lambda number: None))
    async with processes as (one, other):
        await one.register(a_job(firing=FiringPolicy(overlap=Overlap.CANCEL_OTHER), run=RESUME))
        await asyncio.sleep(40)
        await one.trigger("job")
        other._alarm.stop()  # only the one fires
        processes.cut_off(0)
        await asyncio.sleep(8)
        assert await history(other) == [(40, "running", "")]
        one._services[2].cancel()  # it does not look what has become of its runs
        processes.back(0)
        await one._ledger.read_changes()  # only of its jobs
        await asyncio.sleep(14)
        assert await history(other) == [(40, "cancelled", "overlap"), (60, "running", "")]
        assert [target.cancelled for target in processes.targets] == [1, 1]


@virtual
async def test_a_job_removed_by_the_other_leaves_its_runs_in_nobodys_books() -> None:
    targets = Target(seconds=20), Target()
    async with Processes(*targets) as (one, other):
        await one.register(a_job(schedule=86_400))
        await asyncio.sleep(2)
        await one.trigger("job")
        await asyncio.sleep(2)
        await other.unregister("job")
        await other.register(a_job(schedule=3600))
        await asyncio.sleep(30)
        assert await history(other) == [(2, "succeeded", "")]
        assert await counts(other) == await counts(one) == {}
        assert one.preview("job", 1) == other.preview("job", 1) == [at(3604)]


@virtual
async def test_a_job_that_is_gone_leaves_its_run_in_nobodys_books_when_its_process_dies() -> None:
    """Which has not heard of the removal, and writes down how far it is."""
    processes = Processes(Target(seconds=0.1), Target())
    async with processes as (one, other):
        job = a_job(schedule=86_400, request=lambda firing: itertools.repeat(X), sink=lambda items: None)
        await one.register(job)
        await asyncio.sleep(2)
        await one.trigger("job")
        await asyncio.sleep(2)
        await other.unregister("job")
        await other.register(a_job(schedule=86_400))
        await asyncio.sleep(3)
        (run,) = await processes.memory.runs(RunQuery())
        assert (run.state, run.detached) == (RunState.RUNNING, True)
        assert run.requests > 20
        processes.cut_off(0)
        await asyncio.sleep(2 * LEASE)
        assert await history(other) == [(2, "interrupted", "crash")]
        assert await counts(other) == {}
        await other.trigger("job")
        await asyncio.sleep(1)
        assert await counts(other) == {"succeeded": 1}


@virtual
async def test_what_a_new_firing_was_to_cancel_elsewhere_is_let_be_once_its_job_is_another() -> None:
    targets = Target(does=lambda number: None), Target(does=lambda number: None)
    processes = Processes(*targets)
    async with processes as (one, other):
        job = a_job(schedule=86_400, firing=FiringPolicy(overlap=Overlap.CANCEL_OTHER))
        await one.register(job)
        await asyncio.sleep(2)
        await one.trigger("job")
        await asyncio.sleep(2)
        look = processes.stores[1]._call

        async def slow(name: str, *words: Any, **options: Any) -> Any:
            found = await look(name, *words, **options)
            if name == "runs" and len(found) == 2:  # what is to be cancelled, and in favour of what
                processes.stores[1]._call = look  # type: ignore[method-assign]
                await one.unregister("job")
                await one.register(job)
            return found

        processes.stores[1]._call = slow  # type: ignore[method-assign]
        await other.trigger("job")
        await asyncio.sleep(2)
        assert processes.stores[1]._call == look
        assert [state for _, state, _ in await history(one)] == ["running", "running"]
        assert await counts(other) == await counts(one) == {}


@virtual
async def test_what_was_asked_before_a_job_is_removed_goes_with_it_and_what_is_asked_behind_finds_none() -> None:
    target = Target(does=lambda number: None)
    store = FaultyStore()
    async with cron_over(target, store=store) as cron:
        await cron.register(a_job(firing=FiringPolicy(overlap=Overlap.BUFFER_ALL)))
        await cron.trigger("job")
        calls = cron.trigger("job"), cron.unregister("job", cancel=True), cron.trigger("job")
        before, removed, behind = await asyncio.gather(*calls, return_exceptions=True)
        assert (before.state.open, removed) == (True, True)  # type: ignore[union-attr]
        assert isinstance(behind, NotFound)
        await asyncio.sleep(1)
        assert {state for _, state, _ in await history(cron)} == {"cancelled"}
        assert target.in_flight == 0


@pytest.mark.parametrize("cancel", [True, False])
@virtual
async def test_a_job_is_removed_however_many_of_its_runs_begin_and_end_meanwhile(cancel: bool) -> None:
    """Each of them makes another version of the job, here and elsewhere."""
    targets = Target(seconds=0.001), Target()
    processes = Processes(*targets)
    async with processes as (one, other):
        await one.register(a_job(schedule=86_400))
        await one.register(a_job("b", schedule=1))
        await asyncio.sleep(LEASE)
        await one.backfill("job", at(-3600 * 24 * 900), at(0), concurrency=2)
        await asyncio.sleep(0.05)
        assert len(targets[0].calls) > 10
        before = processes.stores[1].counts["commit"]
        assert await asyncio.wait_for(other.unregister("job", cancel=cancel), 0.1)
        assert processes.stores[1].counts["commit"] - before < 20
        await asyncio.sleep(LEASE)
        states = Counter(state for _, state, _ in await history(other))
        assert sum(states.values()) == 900
        assert states.keys() == {"succeeded", "cancelled"}
        assert states["succeeded"] < 200
        assert other.statistics().outcomes[("cancelled", "unregistered")] == states["cancelled"]
        assert not await other.unregister("job")


@virtual
async def test_runs_that_wait_may_be_started_by_any_of_them() -> None:
    targets = Target(seconds=2), Target(seconds=2)
    async with Processes(*targets) as (one, other):
        await one.register(a_job(schedule=86_400, firing=FiringPolicy(overlap=Overlap.BUFFER_ALL)))
        await asyncio.sleep(2)
        for cron in (one, other, one, other):
            await cron.trigger("job")
        await asyncio.sleep(20)
        assert await counts(one) == {"succeeded": 4}
        runs = await one.runs()
        assert all(run.state is RunState.SUCCEEDED and run.attempt == 1 for run in runs)
    assert sum(len(target.calls) for target in targets) == 4


@virtual
async def test_a_job_that_is_removed_and_made_again_elsewhere_has_its_new_phase() -> None:
    async with Processes(Target(), Target()) as (one, other):
        await one.register(a_job())
        await asyncio.sleep(5)
        await one.unregister("job")
        await one.register(a_job())  # between two looks of the other
        await asyncio.sleep(LEASE)
        assert other.preview("job", 1) == one.preview("job", 1) == [at(65)]
        info = await other.job_info("job")
        assert info is not None
        add_up(info)


@virtual
async def test_runs_of_a_backfill_start_once_each_however_slow_the_store() -> None:
    """They are looked up while the start of some is being written."""
    for yields in range(8):
        target = Target()
        async with cron_over(target, store=FaultyStore(yields=itertools.repeat(yields))) as cron:
            await cron.register(a_job())
            await cron.backfill("job", at(-1200), at(0), concurrency=3)
            await asyncio.sleep(5)
            assert await counts(cron) == {"succeeded": 20}
        assert len(target.calls) == 20, yields


@virtual
async def test_what_one_does_not_know_yet_it_does_not_take_for_granted() -> None:
    async with Processes(Target(), Target()) as (one, other):
        await one.register(a_job())
        await asyncio.sleep(LEASE)
        await one.pause("job")
        await asyncio.sleep(LEASE)
        await one.resume("job")
        await other.pause("job")  # as it is, for all that it knows
        assert (await one.pause("job")).paused
        await asyncio.sleep(120)
        assert await counts(one) == {}
        await one.resume("job")
        await one.update(a_job(schedule=45))
        await other.register(a_job())  # the same as it knows
        await asyncio.sleep(LEASE)
        assert one.job("job").schedule == Interval(60)
        await one.unregister("job")
        with pytest.raises(NotFound):
            await other.update(a_job(schedule=30))
        assert await one.list_jobs() == await other.list_jobs() == []


@virtual
async def test_a_resumed_run_is_taken_over_once_however_long_that_takes_to_be_written() -> None:
    targets = Target(does=lambda number: None), Target(seconds=50)
    processes = Processes(*targets)
    async with processes as (one, other):
        await one.register(a_job(run=RESUME))
        await asyncio.sleep(2)
        await one.trigger("job")
        processes.cut_off(0)
        (run,) = await processes.memory.runs(RunQuery(states=(RunState.RUNNING,)))
        await asyncio.sleep(0.5)
        for _ in range(2):  # as two looks do while the writer is busy
            other._ledger.post(Rescue(other._runs, run, other._ledger.versions()["job"]))
        await other._ledger.settled()
        (run,) = await other.runs()
        assert (run.state, run.attempt) == (RunState.RUNNING, 2)
    assert len(targets[1].calls) == 1


@virtual
async def test_an_end_in_order_leaves_to_others_what_it_never_heard_of() -> None:
    """The firing was written, though the store said that it was not, and nobody has run it."""
    processes = Processes(Target(), Target())
    async with processes as (one, other):
        await one.register(a_job())
        await asyncio.sleep(59)
        other._alarm.stop()  # only the one fires
        processes.stores[0].fails = lambda name, number: "after" if name == "commit" else None
        await asyncio.sleep(1.1)
        processes.stores[0].fails = None
        await asyncio.sleep(0.5)
        await one.close()
        assert await history(other) == [(60, "running", "")]
        await asyncio.sleep(2 * LEASE)
        assert await history(other) == [(60, "interrupted", "crash")]


@pytest.mark.parametrize("how", ["before", "after"])
@virtual
async def test_a_run_that_goes_back_to_wait_is_counted_once_when_the_store_fails(how: str) -> None:
    target = Target(does=lambda number: None if number == 1 else 0.0)
    processes = Processes(target, target)
    async with processes as (one, other):
        await one.register(a_job(run=RESUME))
        await asyncio.sleep(LEASE)
        await one.trigger("job")
        failures = iter([how, None])
        processes.stores[0].fails = lambda name, number: next(failures, None) if name == "commit" else None
        other._alarm.stop()
        await one.close(drain=0)
        await asyncio.sleep(LEASE)
        assert await history(other) == [(3, "succeeded", "")]
        assert await counts(other) == {"succeeded": 1}
        (run,) = await other.runs()
        assert run.attempt == 2


@pytest.mark.parametrize("how", ["before", "after"])
@virtual
async def test_a_run_that_waited_starts_once_when_the_store_fails(how: str) -> None:
    target = Target(seconds=5)
    store = FaultyStore()
    async with cron_over(target, store=store, lease=LEASE) as cron:
        await cron.register(a_job(firing=FiringPolicy(overlap=Overlap.BUFFER_ALL)))
        for _ in range(3):
            await cron.trigger("job")
        await asyncio.sleep(4)
        failures = iter([None, how, how])  # the end of the first, the start of the second
        store.fails = lambda name, number: next(failures, None) if name == "commit" else None
        await asyncio.sleep(20)
        assert await counts(cron) == {"succeeded": 3}
    assert len(target.calls) == 3


@virtual
async def test_what_an_earlier_job_left_here_is_not_booked_by_the_new_one_made_elsewhere() -> None:
    targets = Target(does=lambda number: None), Target(does=lambda number: None)
    async with Processes(*targets) as (one, other):
        await one.register(a_job(schedule=86_400, firing=FiringPolicy(overlap=Overlap.CANCEL_OTHER)))
        await asyncio.sleep(2)
        await one.trigger("job")
        await asyncio.sleep(2)
        await other.unregister("job")
        await other.register(a_job(schedule=86_400, firing=FiringPolicy(overlap=Overlap.CANCEL_OTHER)))
        await asyncio.sleep(2)
        await one.trigger("job")
        await one.trigger("job")
        await asyncio.sleep(1)
        assert [state for _, state, _ in await history(one)] == ["running", "cancelled", "running"]
        assert await counts(one) == {"cancelled": 1, "pending": 1}


@virtual
async def test_asked_for_elsewhere_while_it_was_looked_up_it_is_one_run() -> None:
    async with Processes(Target(), Target()) as (one, other):
        await one.register(a_job(firing=FiringPolicy(overlap=Overlap.ALLOW, max_running=9)))
        await asyncio.sleep(LEASE)
        look = one._asked_before
        meanwhile = iter([other.trigger("job", origin="x"), other.backfill("job", at(-60), at(0), origin="y")])

        async def slow(id: str, origin: str | None) -> Any:
            found = await look(id, origin)
            if found is None and (work := next(meanwhile, None)) is not None:
                await work
                await asyncio.sleep(0.1)
                await one._ledger.read_changes()
            return found

        one._asked_before = slow  # type: ignore[method-assign]
        await one.trigger("job", origin="x")
        assert await one.backfill("job", at(-60), at(0), origin="y") == ("y", 0)
        await asyncio.sleep(1)
        assert sorted(run.origin for run in await one.runs()) == ["x", "y"]
