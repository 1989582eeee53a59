"""Jobs come, change and go: registering, adopting, updating, packages, names that are bound, unregistering."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Coroutine
from typing import Any

import msgspec
import numpy as np
import pytest

from kapsl_scheduler import (
    CronExpression,
    CronJob,
    CronScheduler,
    DuplicateId,
    Exclusion,
    Firing,
    FiringPolicy,
    Interval,
    InvalidExpression,
    InvalidJob,
    Named,
    Overlap,
    Priority,
    RunPolicy,
    StoreError,
)
from kapsl_scheduler.core.runs import Change
from kapsl_scheduler.packages.manifest import CronJobDef, IntervalDef, Manifest, NamedTensor
from kapsl_scheduler.ports import RunQuery
from kapsl_scheduler.runtime import cron_catalogue
from kapsl_scheduler.runtime.cron_ledger import Entry, Intent
from kapsl_scheduler.stores.memory import MemoryStore
from kapsl_scheduler.testing import WallClock
from kapsl_scheduler.testing.engines import FAKE_INFO
from tests.runtime.cron import FaultyStore, Target, X, a_job, at, counts, cron_over, history, next_event, run_ended
from tests.runtime.virtual import virtual, with_threads

DAY = 86_400
replace = msgspec.structs.replace


async def make(firing: Firing) -> Any:
    return X


async def always(firing: Firing) -> bool:
    return True


class Model(Target):
    """A target that knows its model."""

    def model_info(self) -> Any:
        return FAKE_INFO


async def passes_during(work: Coroutine[Any, Any, Any]) -> int:
    """How often others get the loop while it goes on."""
    passes = 0
    task = asyncio.create_task(work)
    while not task.done():
        await asyncio.sleep(0)
        passes += 1
    await task
    return passes


# ---------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"max_concurrent_runs": 0}, "max_concurrent_runs: expected at least 1, got 0"),
        ({"history_keep": 0}, "history_keep: expected at least 1, got 0"),
        ({"history_max_age": 0}, "history_max_age: expected more than 0 seconds, got 0"),
        ({"lease": float("nan")}, "lease: expected more than 0 seconds, got nan"),
    ],
)
def test_parameters_that_make_no_sense(parameters: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        CronScheduler(Target(), **parameters)


def test_a_target_must_be_one() -> None:
    with pytest.raises(TypeError, match="target: expected something with infer"):
        CronScheduler(object())


# ----------------------------------------------------------------------------------------- registering


@virtual
async def test_a_job_that_is_wrong_is_refused_and_leaves_nothing() -> None:
    async with cron_over() as cron:
        with pytest.raises(InvalidExpression):
            await cron.register(a_job(schedule="* * * * *"))
        with pytest.raises(InvalidJob) as caught:
            await cron.register(a_job(firing=FiringPolicy(max_runs=0), run=RunPolicy(attempts=0)))
        assert len(caught.value.faults) == 2
        with pytest.raises(InvalidJob, match="cannot be stored"):
            await cron.register(a_job(request=object()))
        assert await cron.list_jobs() == []
        await cron.register(a_job())


@pytest.mark.parametrize(
    "job",
    [
        a_job(schedule="0 0 0 30 2 *"),
        a_job(schedule="0 0 0 1 1 * 2025"),
        a_job(firing=FiringPolicy(end=at(0))),
        a_job(firing=FiringPolicy(end=at(100), exclude=(Exclusion(at(0), at(100)),))),
    ],
)
@virtual
async def test_a_schedule_that_never_fires_is_refused(job: CronJob) -> None:
    async with cron_over() as cron:
        with pytest.raises(InvalidJob, match="schedule: it never fires from now on"):
            await cron.register(job)
        assert await cron.list_jobs() == []


@virtual
async def test_an_id_is_registered_once() -> None:
    async with cron_over() as cron:
        await cron.register(a_job())
        with pytest.raises(DuplicateId, match="a job 'job' is registered already"):
            await cron.register(a_job())
        await cron.unregister("job")
        await cron.register(a_job())
        await cron.register(a_job("JOB"))


@virtual
async def test_latency_critical_jobs_need_leave() -> None:
    target = Target()
    async with cron_over(target) as cron:
        with pytest.raises(InvalidJob, match="latency-critical jobs would delay live requests"):
            await cron.register(a_job(priority=Priority.LATENCY_CRITICAL))
    async with cron_over(target, allow_latency_critical=True) as cron:
        await cron.register(a_job(priority=Priority.LATENCY_CRITICAL))
        await run_ended(cron)
    assert target.calls[0].options["priority"] is Priority.LATENCY_CRITICAL


@virtual
async def test_a_job_names_its_model_where_there_are_several() -> None:
    class Models:
        def target(self, model: str) -> Target:
            return models[model]

    models = {"a": Target(), "b": Target()}
    async with cron_over(Models()) as cron:
        with pytest.raises(InvalidJob, match="model: expected the name of a model, got None"):
            await cron.register(a_job())
        await cron.register(a_job(model="b"))
        await run_ended(cron)
    assert (len(models["a"].calls), len(models["b"].calls)) == (0, 1)
    async with cron_over() as cron:
        with pytest.raises(InvalidJob, match="model: there is but one model here"):
            await cron.register(a_job(model="b"))


@virtual
async def test_what_is_known_of_a_job() -> None:
    async with cron_over() as cron:
        await cron.register(a_job("b", CronExpression("0 0 9 * * *", "Europe/Berlin"), overflow_policy="block"))
        await cron.register(a_job("a", 90, package="p"))
        a, b = await cron.list_jobs()
        assert (a.id, a.schedule, a.tz, a.package, a.next_firing) == ("a", "Every 90 seconds", "UTC", "p", at(90))
        assert (b.id, b.schedule, b.tz) == ("b", "0 0 9 * * *", "Europe/Berlin")
        assert b.description == "At 09:00:00 every day, Europe/Berlin time"
        assert (b.enabled, b.priority, b.overflow_policy.value) == (True, Priority.BACKGROUND, "block")
        assert await cron.job_info("a") == a
        assert cron.job("a").schedule == Interval(90)
        assert cron.definition("a").startswith(b'{"id":"a",')
        assert repr(cron) == "<CronScheduler open: 2 jobs, 0 running>"


@virtual
async def test_several_jobs_are_registered_all_or_none() -> None:
    async with cron_over() as cron:
        await cron.register(a_job("there"))
        with pytest.raises(InvalidJob) as caught:
            await cron.register_all([a_job("a"), a_job("b", 0), a_job("c", None), a_job("d", "0 0 0 30 2 *")])
        assert [fault[:7] for fault in caught.value.faults] == ["job 'b'", "job 'c'", "job 'd'"]
        with pytest.raises(DuplicateId):
            await cron.register_all([a_job("a"), a_job("there")])
        with pytest.raises(DuplicateId):
            await cron.register_all([a_job("a"), a_job("a")])
        assert [info.id for info in await cron.list_jobs()] == ["there"]
        await cron.register_all([a_job("a"), a_job("b")])
        assert len(await cron.list_jobs()) == 3


@virtual
async def test_a_store_that_fails_registers_none_of_several() -> None:
    store = FaultyStore(instant=True, fails=lambda name, number: "before" if (name, number) == ("commit", 2) else None)
    async with cron_over(store=store) as cron:
        await cron.register(a_job("known"))
        await cron.unregister("nothing")
        with pytest.raises(StoreError):
            await cron.register_all([a_job("a"), a_job("b")])
        assert [info.id for info in await cron.list_jobs()] == ["known"]
        await cron.register_all([a_job("a"), a_job("b")])


@pytest.mark.parametrize("passes", range(1, 40, 3))
@virtual
async def test_several_that_are_cancelled_on_their_way_are_all_there_or_none(passes: int) -> None:
    async with cron_over(store=FaultyStore()) as cron:
        registering = asyncio.create_task(cron.register_all([a_job(f"job{number}", 1) for number in range(200)]))
        for _ in range(passes):
            await asyncio.sleep(0)
        registering.cancel()
        done = await asyncio.gather(registering, return_exceptions=True)
        await asyncio.sleep(1.5)
        assert len(await cron.list_jobs(limit=1000)) == (200 if done == [None] else 0)


@pytest.mark.parametrize("passes", range(1, 40, 6))
@virtual
async def test_who_is_cancelled_again_while_several_are_taken_back_leaves_none(passes: int) -> None:
    async with cron_over(store=FaultyStore()) as cron:
        registering = asyncio.create_task(cron.register_all([a_job(f"job{number}", DAY) for number in range(200)]))
        for _ in range(2):
            for _ in range(passes):
                await asyncio.sleep(0)
            registering.cancel()
        done = await asyncio.gather(registering, return_exceptions=True)
        await asyncio.sleep(1.5)
        assert len(await cron.list_jobs(limit=1000)) == (200 if done == [None] else 0)


@virtual
async def test_taking_back_does_not_touch_what_has_not_been_handed_in() -> None:
    """Another process registers the last of them meanwhile."""
    held = MemoryStore()
    store = FaultyStore(held, yields=itertools.repeat(20))
    async with (
        cron_over(store=store) as cron,
        CronScheduler(Target(), store=FaultyStore(held), clock=WallClock()) as other,
    ):
        registering = asyncio.create_task(cron.register_all([a_job(f"job{number}", DAY) for number in range(200)]))
        for _ in range(20):  # until the first of them are on their way
            await asyncio.sleep(0)
        assert store.counts["commit"] == 1
        await other.register(a_job("job199", DAY))
        registering.cancel()
        await asyncio.sleep(0)
        await cron._ledger.read_changes()
        assert await asyncio.gather(registering, return_exceptions=True) != [None]
        assert [info.id for info in await cron.list_jobs()] == ["job199"]


@virtual
async def test_what_would_never_fire_again_is_not_put_back() -> None:
    """And keeps nothing else from being taken back."""
    last = 10**6  # the commit that is the last to succeed
    store = FaultyStore(fails=lambda name, number: "before" if name == "commit" and number > last else None)
    clock = WallClock()
    async with cron_over(store=store, clock=clock) as cron:
        await cron.register(a_job("once", "0 0 9 2 3 ? 2026"))  # in half a minute
    async with cron_over(store=store, clock=clock) as cron:
        last = store.counts["commit"] + 1
        with pytest.raises(StoreError, match="a planned failure"):
            await cron.register_all([a_job("once", DAY), *(a_job(f"job{number}", DAY) for number in range(100))])
        await asyncio.sleep(60)
        last = 10**6
        await asyncio.sleep(5)
        assert [info.id for info in await cron.list_jobs()] == ["once"]


@pytest.mark.parametrize("how", ["resume", "update"])
@virtual
async def test_a_job_goes_on_behind_what_the_history_has_from_before_the_clock_was_set_back(how: str) -> None:
    clock = WallClock()
    async with cron_over(clock=clock) as cron:
        await cron.register(a_job(schedule="0 * * * * *"))
        await asyncio.sleep(95)
        await cron.unregister("job")
        clock.step(-70)
        await cron.register(a_job(schedule="0 * * * * *"))
        await cron.pause("job")
        await asyncio.sleep(40)
        if how == "resume":
            assert (await cron.resume("job")).enabled
        else:
            assert (await cron.update(a_job(schedule="30 * * * * *"))).schedule == "30 * * * * *"


@virtual
async def test_whoever_cannot_do_with_a_run_that_is_there_already_is_told_that_nothing_was_written() -> None:
    class Twice(Intent):
        def decide(self, entry: Entry | None) -> Change | None:
            return Change(job=self.job, expected=None, created=(run,))

    async with cron_over() as cron:
        await cron.register(a_job())
        await cron.trigger("job")
        (run,) = await cron._ledger.store.runs(RunQuery())
        with pytest.raises(RuntimeError, match="job 'job': nothing was written"):
            await cron._ledger.do(Twice("job"))


# -------------------------------------------------------------------------------------------- adopting


@virtual
async def test_a_job_that_the_store_knows_is_adopted_as_it_is() -> None:
    store, clock = MemoryStore(), WallClock()
    async with cron_over(store=store, clock=clock) as cron:
        await cron.register(a_job())
        await asyncio.sleep(70)
    async with cron_over(store=store, clock=clock) as cron:
        assert await counts(cron) == {"succeeded": 1}
        await cron.register(a_job(), on_conflict="error")  # the same
        await asyncio.sleep(100)
        assert await history(cron) == [(60, "succeeded", ""), (120, "succeeded", "")]  # its phase as well
        with pytest.raises(DuplicateId):
            await cron.register(a_job())


@virtual
async def test_another_definition_takes_its_place_and_keeps_counters_and_phase() -> None:
    store, clock = MemoryStore(), WallClock()
    async with cron_over(store=store, clock=clock) as cron:
        await cron.register(a_job())
        await asyncio.sleep(70)
    async with cron_over(store=store, clock=clock) as cron:
        with pytest.raises(InvalidJob, match="the store has another job of this id, and on_conflict is 'error'"):
            await cron.register(a_job(schedule=45), on_conflict="error")
        with pytest.raises(InvalidJob, match="the store has another job of this id"):
            await cron.register_all([a_job("new"), a_job(schedule=45)], on_conflict="error")
        with pytest.raises(ValueError, match="on_conflict: expected 'update' or 'error', got 'x'"):
            await cron.register(a_job(), on_conflict="x")
        assert [info.id for info in await cron.list_jobs()] == ["job"]
        await cron.register(a_job(schedule=45))
        assert cron.preview("job", 3) == [at(90), at(135), at(180)]
        assert await counts(cron) == {"succeeded": 1}


@virtual
async def test_what_was_due_while_nobody_was_there_follows_the_misfire_rule() -> None:
    store, clock = MemoryStore(), WallClock()
    async with cron_over(store=store, clock=clock) as cron:
        await cron.register(a_job())
        await cron.register(a_job("strict", firing=FiringPolicy(misfire_grace=5)))
    await asyncio.sleep(610)
    async with cron_over(store=store, clock=clock) as cron:
        await asyncio.sleep(1)
        assert await history(cron) == [(540, "missed", "coalesced"), (600, "succeeded", "")]
        assert await history(cron, "strict") == [(600, "missed", "late")]


@virtual
async def test_a_job_whose_callables_are_not_there_waits_for_them() -> None:
    store, clock, target = MemoryStore(), WallClock(), Target()
    async with cron_over(store=store, clock=clock) as cron:
        await cron.register(a_job(request=make, firing=FiringPolicy(misfire_grace=3600)))
    async with cron_over(target, store=store, clock=clock) as cron:
        await asyncio.sleep(610)
        info = await cron.job_info("job")
        assert info is not None
        name = "tests.runtime.test_cron_registering:make"
        assert info.waiting_for == f"request: nothing is bound as {name!r}"
        assert (info.due, info.next_firing) == (0, None)
        with pytest.raises(InvalidJob, match="it cannot run here: request: nothing is bound"):
            await cron.trigger("job")
        with pytest.raises(InvalidJob, match="it cannot run here"):
            await cron.backfill("job", at(0), at(100))
        cron.bind("another", make)
        cron.bind(name, make)
        await asyncio.sleep(1)
        assert await history(cron) == [(540, "missed", "coalesced"), (600, "succeeded", "")]
    assert len(target.calls) == 1


@virtual
async def test_a_job_is_bound_by_being_registered() -> None:
    store = MemoryStore()
    async with cron_over(store=store) as cron:
        await cron.register(a_job(request=make))
    async with cron_over(store=store) as cron:
        await cron.register(a_job(request=make), on_conflict="error")
        assert (await run_ended(cron)).state.value == "succeeded"


@virtual
async def test_names_may_stand_for_callables_that_are_bound_before() -> None:
    heard: list[Any] = []

    async def done(id: str, result: Any) -> None:
        heard.append(id)

    async with cron_over() as cron:
        job = a_job(request=Named("make"), on_result=Named("done"), condition=Named("yes"), sink=Named("sink"))
        with pytest.raises(InvalidJob) as caught:
            await cron.register(job)
        assert len(caught.value.faults) == 4
        cron.bind("make", make)
        cron.bind("done", done)
        await cron.register(replace(job, condition=None, sink=None))
        assert (await run_ended(cron)).state.value == "succeeded"
    assert heard == ["job"]


class Row:
    """Callables that share their names with others: methods of two objects."""

    def __init__(self, value: float) -> None:
        self.value = value

    async def request(self, firing: Firing) -> Any:
        return X * self.value


@pytest.mark.parametrize("shared", [MemoryStore, FaultyStore])
@virtual
async def test_callables_of_one_name_are_not_taken_for_each_other(shared: Any) -> None:
    store, clock, target = shared(), WallClock(), Target()
    async with cron_over(store=store, clock=clock) as cron:
        await cron.register(a_job("one", request=Row(1).request))
        await cron.register(a_job("two", request=Row(2).request))
    async with cron_over(target, store=store, clock=clock) as cron:
        await cron.register(a_job("two", request=Row(2).request))
        info = await cron.job_info("one")
        assert info is not None
        assert info.waiting_for == "request: nothing is bound as 'tests.runtime.test_cron_registering:Row.request'"
        with pytest.raises(InvalidJob):
            await cron.trigger("one")
        assert (await run_ended(cron, "two")).state.value == "succeeded"
        await cron.register(a_job("one", request=Row(1).request))
        assert (await run_ended(cron, "one")).state.value == "succeeded"
    assert [int(call.request[0, 0]) for call in target.calls] == [2, 1]


@virtual
async def test_a_job_that_is_read_again_keeps_its_own_callables() -> None:
    """Two processes; the other one changes the job, whose function only this one has."""
    store, target = FaultyStore(), Target()
    other = FaultyStore(store.held)
    async with (
        cron_over(target, store=store, lease=3.0) as cron,
        CronScheduler(Target(), store=other, lease=3.0) as far,
    ):
        await cron.register(a_job(schedule=DAY, request=Row(3).request))
        await asyncio.sleep(2)
        await far.register(a_job(schedule=DAY, request=Row(4).request, run=RunPolicy(attempts=2)))
        await asyncio.sleep(2)
        assert cron.job("job").run.attempts == 2
        await run_ended(cron)
    assert [int(call.request[0, 0]) for call in target.calls] == [3]


@virtual
async def test_a_job_that_is_edited_by_its_own_definition_keeps_its_own_callables() -> None:
    """Also when it is read again, here because another process changes it; a field that names another loses its own."""
    store, target = FaultyStore(), Target()
    other = FaultyStore(store.held)
    async with (
        cron_over(target, store=store, lease=3.0) as cron,
        CronScheduler(Target(), store=other, lease=3.0) as far,
    ):
        await cron.register(a_job(schedule=DAY, request=Row(3).request, condition=Row(5).request))
        cron.bind("always", always)
        edited = replace(cron.parse(cron.definition("job")), condition=Named("always"))
        await cron.update(edited)
        await asyncio.sleep(2)
        far.bind("always", always)
        await far.register(a_job(schedule=DAY, request=Row(4).request, condition=Named("always"), enabled=False))
        await asyncio.sleep(2)
        assert not cron.job("job").enabled
        assert cron.job("job").condition is always
        await run_ended(cron)
    assert [int(call.request[0, 0]) for call in target.calls] == [3]


@pytest.mark.parametrize("how", ["register", "register_all", "update"])
@virtual
async def test_a_registration_that_is_refused_leaves_a_job_the_callables_it_has(how: str) -> None:
    """They are looked up when the job is read again: here, because another process changes it."""
    broken = False

    def fails(name: str, number: int) -> str | None:
        nonlocal broken
        strikes, broken = broken and name == "commit", broken and name != "commit"
        return "before" if strikes else None

    store, target = FaultyStore(fails=fails), Target()
    async with (
        cron_over(target, store=store, lease=3.0) as cron,
        CronScheduler(Target(), store=FaultyStore(store.held), lease=3.0) as far,
    ):
        await cron.register(a_job(schedule=DAY, request=Row(3).request))
        wrong = a_job(schedule=DAY, request=Row(5).request, run=RunPolicy(attempts=3))
        if how == "register":
            with pytest.raises(DuplicateId):
                await cron.register(wrong)
        elif how == "register_all":
            with pytest.raises(DuplicateId):
                await cron.register_all([a_job("other"), wrong])
        else:
            broken = True
            with pytest.raises(StoreError):
                await cron.update(wrong)
        await asyncio.sleep(2)
        await far.register(a_job(schedule=DAY, request=Row(4).request, run=RunPolicy(attempts=2)))
        await asyncio.sleep(2)
        assert cron.job("job").run.attempts == 2
        await run_ended(cron)
    assert [int(call.request[0, 0]) for call in target.calls] == [3]


@virtual
async def test_a_name_stands_for_one_callable() -> None:
    async with cron_over() as cron:
        cron.bind("make", make)
        cron.bind("make", make)
        with pytest.raises(ValueError, match="name: 'make' is bound to another callable"):
            cron.bind("make", print)


@virtual
async def test_an_adapter_that_breaks_keeps_only_its_own_job(caplog: pytest.LogCaptureFixture) -> None:
    class Source(msgspec.Struct, tag="odd"):
        def items(self, firing: Any, memory: Any) -> Any: ...

    def adapters(kind: str, settings: Any) -> Any:
        raise ZeroDivisionError("a mistake")

    store = MemoryStore()
    async with cron_over(store=store) as cron:
        await cron.register(a_job("odd", request=Source()))
        await cron.register(a_job("other"))
    async with cron_over(store=store, adapters=adapters) as cron:
        info = await cron.job_info("odd")
        assert info is not None
        assert info.waiting_for == "ZeroDivisionError: a mistake"
        assert (await run_ended(cron, "other")).state.value == "succeeded"


@virtual
async def test_a_stored_job_that_cannot_be_read_waits_and_can_be_removed_or_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Source(msgspec.Struct, tag="gone"):
        def items(self, firing: Any, memory: Any) -> Any: ...

    store = MemoryStore()
    async with cron_over(store=store) as cron:
        await cron.register(a_job(request=Source()))
        await cron.register(a_job("other", request=Source()))
    async with cron_over(store=store) as cron:
        info = await cron.job_info("job")
        assert info is not None
        assert (info.waiting_for or "").startswith(
            "job 'job': source: no source of type 'gone' is known here; adapters="
        )
        assert (info.schedule, info.description) == ("", "")
        with pytest.raises(InvalidJob, match="no source of type"):
            cron.job("job")
        assert cron.preview("job") == []
        await cron.pause("job")
        await cron.resume("job")
        await asyncio.sleep(100)
        await cron.update(a_job())
        assert cron.preview("job", 1) == [at(120)]
        assert await cron.unregister("other")


# ------------------------------------------------------------------------------------------ many and large


@pytest.mark.slow
@virtual
async def test_many_jobs_do_not_keep_others_from_the_loop() -> None:
    store = MemoryStore()
    async with cron_over(store=store) as cron:
        assert await passes_during(cron.register_all(a_job(f"job-{n}", request=Named("m")) for n in range(0))) < 5
        cron.bind("m", make)
        jobs = [a_job(f"job-{n:04}", request=Named("m")) for n in range(1000)]
        assert await passes_during(cron.register_all(jobs)) >= 2 * 1000 // 128
        assert await passes_during(cron.list_jobs()) >= 1000 // 128
    later = CronScheduler(Target(), store=store, clock=WallClock())
    assert await passes_during(later.__aenter__()) >= 1000 // 128
    try:
        later.bind("m", make)
        info = await later.job_info("job-0999")
        assert info is not None
        assert info.waiting_for is not None  # its turn comes
        for _ in range(20):
            await asyncio.sleep(0)
        assert [info.id for info in await later.list_jobs() if info.waiting_for is not None] == []
    finally:
        await later.close()


@with_threads
async def test_a_large_request_is_copied_and_written_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []
    original = cron_catalogue.encode_job

    def encode_job(job: CronJob) -> bytes:
        threads.append(threading.current_thread() is threading.main_thread())
        return original(job)

    monkeypatch.setattr(cron_catalogue, "encode_job", encode_job)
    target, large = Target(), np.ones((1, 100_000), np.float32)
    async with cron_over(target) as cron:
        await cron.register(a_job(request=large))
        await cron.register(a_job("small"))
        large[:] = 2.0
        assert (await run_ended(cron)).state.value == "succeeded"
    assert threads == [False, True]
    assert target.calls[0].request[0, 0] == 1.0


@virtual
async def test_of_two_that_register_one_id_at_once_one_is_refused() -> None:
    large = np.ones((1, 100_000), np.float32)
    async with cron_over() as cron:
        results = await asyncio.gather(
            cron.register(a_job(request=large)), cron.register(a_job(request=large)), return_exceptions=True
        )
        assert sorted(type(result).__name__ for result in results) == ["DuplicateId", "NoneType"]
        both = await asyncio.gather(
            cron.register_all([a_job("a"), a_job("b")]), cron.register_all([a_job("b")]), return_exceptions=True
        )
        assert sorted(type(result).__name__ for result in both) == ["DuplicateId", "NoneType"]


# -------------------------------------------------------------------------------------------- updating


@virtual
async def test_an_update_keeps_counters_and_phase_and_accounts_for_what_was_due() -> None:
    clock = WallClock()
    async with cron_over(clock=clock) as cron:
        await cron.register(a_job())
        await asyncio.sleep(70)
        info = await cron.update(replace(cron.job("job"), schedule=Interval(45)))
        assert (info.succeeded, info.next_firing) == (1, at(90))
        clock.step(3600)
        info = await cron.update(replace(cron.job("job"), schedule="0 * * * * *"))
        assert (info.missed, info.next_firing) == (80, at(3690))
        assert (await history(cron))[-1] == (3645, "missed", "updated")
        events = cron.events()
        await cron.update(replace(cron.job("job"), run=RunPolicy(attempts=2)))
        assert (await next_event(events, "updated")).job == "job"
        await events.aclose()


@virtual
async def test_an_update_of_anything_but_the_schedule_loses_no_occurrence() -> None:
    clock = WallClock()
    async with cron_over(clock=clock) as cron:
        await cron.register(a_job())
        clock.step(61)
        await cron.update(a_job(run=RunPolicy(attempts=2)))
        await asyncio.sleep(1)
        assert await history(cron) == [(60, "succeeded", "")]


@virtual
async def test_an_update_may_pause_and_resume() -> None:
    async with cron_over() as cron:
        await cron.register(a_job())
        assert (await cron.update(a_job(enabled=False))).paused == "not enabled"
        await asyncio.sleep(100)
        assert (await cron.update(a_job())).enabled
        await asyncio.sleep(30)
        assert await history(cron) == [(60, "missed", "paused"), (120, "succeeded", "")]
        await cron.pause("job", reason="mine")
        assert (await cron.update(a_job(enabled=False))).paused == "mine"
        assert (await cron.update(a_job())).paused == "mine"


@virtual
async def test_an_update_that_is_wrong_changes_nothing() -> None:
    async with cron_over() as cron:
        await cron.register(a_job())
        with pytest.raises(InvalidJob):
            await cron.update(a_job(request=None))
        assert cron.preview("job", 1) == [at(60)]


@virtual
async def test_text_makes_a_job() -> None:
    async with cron_over() as cron:
        await cron.register(cron.parse(b'{"id": "t", "schedule": "0 * * * * *", "value": [[1, 2]]}'))
        assert (await run_ended(cron, "t")).state.value == "succeeded"
        with pytest.raises(InvalidJob):
            cron.parse(b"{}")


# --------------------------------------------------------------------------------------- unregistering


@virtual
async def test_what_runs_goes_on_when_its_job_is_unregistered() -> None:
    target = Target(seconds=100)
    async with cron_over(target) as cron:
        await cron.register(a_job(firing=FiringPolicy(overlap=Overlap.BUFFER_ONE)))
        await asyncio.sleep(130)
        events = cron.events()
        assert await cron.unregister("job")
        assert await cron.unregister("job") is False
        assert await cron.job_info("job") is None
        assert [state for _, state, _ in await history(cron)] == ["running", "cancelled"]
        assert (await history(cron))[1] == (120, "cancelled", "unregistered")
        assert [(await anext(events)).kind for _ in range(2)] == ["ended", "unregistered"]
        await asyncio.sleep(100)
        assert [state for _, state, _ in await history(cron)] == ["succeeded", "cancelled"]
        await events.aclose()
    assert len(target.calls) == 1


@virtual
async def test_or_it_is_cancelled() -> None:
    target = Target(seconds=100)
    async with cron_over(target) as cron:
        await cron.register(a_job())
        await cron.backfill("job", at(-120), at(0))
        await asyncio.sleep(70)
        assert await cron.unregister("job", cancel=True)
        await asyncio.sleep(0)
        assert target.cancelled == 2
        assert {(state, reason) for _, state, reason in await history(cron)} == {("cancelled", "unregistered")}
        await asyncio.sleep(1000)
    assert len(target.calls) == 2


@pytest.mark.parametrize("overlap", [Overlap.SKIP, Overlap.CANCEL_OTHER])
@virtual
async def test_what_a_job_left_behind_is_in_nobodys_books(overlap: Overlap) -> None:
    target = Target(does=lambda number: 200.0 if number == 1 else 70)
    async with cron_over(target) as cron:
        await cron.register(a_job())
        await asyncio.sleep(61)
        await cron.unregister("job")
        await cron.register(a_job(firing=FiringPolicy(overlap=overlap)))
        await asyncio.sleep(251)
        expected = {Overlap.SKIP: {"succeeded": 2, "skipped": 2}, Overlap.CANCEL_OTHER: {"cancelled": 3, "pending": 1}}
        assert await counts(cron) == expected[overlap]
        assert (await history(cron))[0] == (60, "succeeded", "")


@virtual
async def test_a_run_that_its_job_met_again_is_not_made_twice() -> None:
    target, clock = Target(), WallClock()
    async with cron_over(target, clock=clock) as cron:
        await cron.register(a_job(schedule="0 * * * * *"))
        await asyncio.sleep(31)
        await cron.unregister("job")
        clock.step(-20)
        await cron.register(a_job(schedule="0 * * * * *"))
        await asyncio.sleep(90)
        assert await history(cron) == [(30, "succeeded", ""), (90, "succeeded", "")]
        assert await counts(cron) == {"succeeded": 1}


# -------------------------------------------------------------------------------------------- packages


def a_manifest(*jobs: CronJobDef, name: str = "digits") -> Manifest:
    return Manifest(name, "onnx", "1", "2026", "m.onnx", cron_jobs=jobs)


def declared(id: str, schedule: Any = "0 * * * * *", **fields: Any) -> CronJobDef:
    return CronJobDef(id, schedule, X, **fields)


@virtual
async def test_the_jobs_of_a_manifest_are_registered_under_its_name() -> None:
    target = Model()
    async with cron_over(target) as cron:
        extra = NamedTensor("mask", np.zeros(3, np.uint8))
        await cron.register_from_manifest(
            a_manifest(
                declared("a"), declared("b", IntervalDef(45), additional_inputs=(extra,), overflow_policy="block")
            )
        )
        a, b = await cron.list_jobs()
        assert (a.id, a.package, a.priority) == ("digits:a", "digits", Priority.BACKGROUND)
        assert (b.id, b.schedule, b.overflow_policy.value) == ("digits:b", "Every 45 seconds", "block")
        await run_ended(cron, "digits:b")
    assert target.calls[0].request.keys() == {"x", "mask"}


@pytest.mark.parametrize(("allowed", "priority"), [(False, Priority.THROUGHPUT), (True, Priority.LATENCY_CRITICAL)])
@virtual
async def test_a_manifest_may_ask_for_the_first_class(
    allowed: bool, priority: Priority, caplog: pytest.LogCaptureFixture
) -> None:
    async with cron_over(Model(), allow_latency_critical=allowed) as cron:
        await cron.register_from_def(declared("a", priority="latency_critical"), package="p")
        info = await cron.job_info("p:a")
        assert info is not None
        assert info.priority is priority
    assert ("asks to be latency-critical and runs as throughput" in caplog.text) is not allowed


@virtual
async def test_a_manifest_is_registered_whole_or_not_at_all() -> None:
    async with cron_over(Model()) as cron:
        with pytest.raises(InvalidJob) as caught:
            await cron.register_from_manifest(
                a_manifest(declared("a"), declared("b", "x"), declared("c", "0 0 0 30 2 *"))
            )
        assert len(caught.value.faults) == 2
        assert await cron.list_jobs() == []
        await cron.register_from_manifest(a_manifest(declared("a")))
        await cron.register_from_manifest(a_manifest(declared("b"), declared("a")))
        assert [info.id for info in await cron.list_jobs()] == ["digits:a", "digits:b"]
        await asyncio.sleep(31)
        assert await counts(cron, "digits:a") == {"succeeded": 1}


@virtual
async def test_a_package_takes_exactly_its_own_jobs_with_it() -> None:
    target = Model(seconds=100)
    async with cron_over(target) as cron:
        await cron.register_from_manifest(a_manifest(declared("a"), declared("b")))
        await cron.register_from_manifest(a_manifest(declared("a"), name="other"))
        await cron.register(a_job("digits"))
        await cron.register(a_job("digits:c"))
        await asyncio.sleep(40)
        assert await cron.unregister_package("digits", cancel=True) == ["digits:a", "digits:b"]
        assert [info.id for info in await cron.list_jobs()] == ["digits", "digits:c", "other:a"]
        assert await cron.unregister_package("digits") == []
        await asyncio.sleep(0)
        assert target.cancelled == 2
        await cron.register_from_manifest(a_manifest(declared("a")))


@virtual
async def test_stored_jobs_of_a_package_wait_for_it_and_go_with_a_newer_one() -> None:
    store, clock = MemoryStore(), WallClock()
    async with cron_over(Model(), store=store, clock=clock) as cron:
        await cron.register_from_manifest(a_manifest(declared("a"), declared("b")))
        await asyncio.sleep(31)
    async with cron_over(Model(), store=store, clock=clock) as cron:
        info = await cron.job_info("digits:a")
        assert info is not None
        assert info.waiting_for == "package: 'digits' is not loaded"
        await asyncio.sleep(60)
        with pytest.raises(InvalidJob):
            await cron.register_from_manifest(a_manifest(declared("x", "x")))
        cron.bind("anything", make)  # which has the jobs looked at again
        assert await counts(cron, "digits:a") == {"succeeded": 1}
        await cron.register_from_manifest(a_manifest(declared("a"), declared("c")))
        assert [info.id for info in await cron.list_jobs()] == ["digits:a", "digits:c"]
        await asyncio.sleep(1)
        assert await counts(cron, "digits:a") == {"succeeded": 2}
