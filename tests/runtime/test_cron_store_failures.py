"""A store that fails now and then, before or after it has written: nothing lost, nothing twice, and nobody waits for
what does not need it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kapsl_scheduler import CronError, CronScheduler, FiringPolicy, NotFound, Overlap, Scheduler, StoreError
from kapsl_scheduler.testing import FakeAsyncEngine, WallClock
from tests.runtime.cron import FaultyStore, Target, X, a_job, add_up, counts, cron_over, history
from tests.runtime.helpers import start
from tests.runtime.virtual import virtual

DAY = 86_400
pytestmark = pytest.mark.filterwarnings("error")


class Failing:
    """Lets commits fail while it is told to."""

    def __init__(self, how: str = "before") -> None:
        self.how: str | None = None
        self._as = how

    def __call__(self, name: str, number: int) -> str | None:
        return self.how if name == "commit" else None

    def fail(self) -> None:
        self.how = self._as

    def work(self) -> None:
        self.how = None


@pytest.mark.parametrize("instant", [True, False])
@virtual
async def test_what_was_due_meanwhile_is_not_lost(instant: bool, caplog: pytest.LogCaptureFixture) -> None:
    failing, target = Failing(), Target(seconds=10)
    async with cron_over(target, store=FaultyStore(instant=instant, fails=failing)) as cron:
        await cron.register(a_job())
        await asyncio.sleep(65)  # one runs
        failing.fail()
        await asyncio.sleep(65)  # it has ended, and another was due
        assert cron.statistics().store_failing == "a planned failure"
        assert await counts(cron) == {"pending": 1}
        assert len(target.calls) == 1
        failing.work()
        await asyncio.sleep(15)
        assert await history(cron) == [(60, "succeeded", ""), (120, "succeeded", "")]
        assert cron.statistics().store_failing is None
    assert caplog.text.count("the store of the cron jobs fails, it is tried again: a planned failure") == 1
    assert caplog.text.count("the store of the cron jobs works again") == 1


@pytest.mark.parametrize("instant", [True, False])
@virtual
async def test_an_end_that_was_not_written_is_written_though_nothing_else_happens(instant: bool) -> None:
    failing, target = Failing(), Target(seconds=1)
    async with cron_over(target, store=FaultyStore(instant=instant, fails=failing)) as cron:
        failing.work()
        await cron.register(a_job(schedule=DAY))
        await cron.trigger("job")
        failing.fail()
        await asyncio.sleep(1.1)
        assert await counts(cron) == {"pending": 1}
        failing.work()
        await asyncio.sleep(2.5)
        assert await counts(cron) == {"succeeded": 1}


@pytest.mark.parametrize("instant", [True, False])
@virtual
async def test_calls_fail_at_once_and_change_nothing(instant: bool) -> None:
    failing = Failing()
    loop = asyncio.get_running_loop()
    async with cron_over(store=FaultyStore(instant=instant, fails=failing)) as cron:
        await cron.register(a_job())
        failing.fail()
        for call in (
            cron.register(a_job("another")),
            cron.update(a_job(schedule=30)),
            cron.pause("job"),
            cron.trigger("job"),
            cron.unregister("job"),
        ):
            before = loop.time()
            with pytest.raises(StoreError, match="a planned failure"):
                await call
            assert loop.time() - before <= 2.1  # as long as the writer waits between two attempts, at most
        failing.work()
        assert await counts(cron) == {}
        assert (await cron.pause("job")).paused
        await cron.resume("job")
        await cron.register(a_job("another"))
        await asyncio.sleep(61)
        assert await counts(cron) == {"succeeded": 1}


@virtual
async def test_a_call_is_not_kept_by_what_others_have_to_write() -> None:
    """The end of a run is tried again and again, which is not for the next caller to wait for."""
    failing = Failing()
    loop = asyncio.get_running_loop()
    async with cron_over(Target(seconds=1), store=FaultyStore(instant=True, fails=failing)) as cron:
        await cron.register(a_job())
        await asyncio.sleep(60.5)
        failing.fail()
        await asyncio.sleep(30)
        with pytest.raises(StoreError):
            await cron.pause("job")
        assert loop.time() <= 90.5 + 2.1
        failing.work()
        await asyncio.sleep(3)
        assert await counts(cron) == {"succeeded": 1}


@virtual
async def test_live_traffic_does_not_notice() -> None:
    failing = Failing()
    engine = FakeAsyncEngine(cost=lambda rows: 0.01)
    loop = asyncio.get_running_loop()
    async with (
        Scheduler([engine], clock=loop.time) as scheduler,
        cron_over(scheduler, store=FaultyStore(fails=failing)) as cron,
    ):
        for number in range(20):
            await cron.register(a_job(f"job{number}", 1))
        failing.fail()
        await asyncio.sleep(1.5)
        for _ in range(50):
            before = loop.time()
            await scheduler.infer(X)
            assert loop.time() - before <= 0.021
        failing.work()
        await asyncio.sleep(5)


@virtual
async def test_a_run_whose_start_was_written_though_the_store_said_no_is_found_and_recorded() -> None:
    failing, target = Failing("after"), Target()
    async with cron_over(target, store=FaultyStore(fails=failing), lease=3) as cron:
        await cron.register(a_job())
        await asyncio.sleep(59)
        failing.fail()
        await asyncio.sleep(1.1)
        failing.work()
        await asyncio.sleep(10)
        assert target.calls == []
        assert await history(cron) == [(60, "interrupted", "crash")]
        await asyncio.sleep(60)
        assert await counts(cron) == {"succeeded": 1, "interrupted": 1}


@pytest.mark.parametrize("instant", [True, False])
@virtual
async def test_an_end_that_was_written_though_the_store_said_no_is_counted_once(instant: bool) -> None:
    failing, target = Failing("after"), Target(seconds=1)
    async with cron_over(target, store=FaultyStore(instant=instant, fails=failing)) as cron:
        await cron.register(a_job(firing=FiringPolicy(overlap=Overlap.BUFFER_ONE)))
        await asyncio.sleep(60.5)
        await cron.trigger("job")  # waits for it
        failing.fail()
        await asyncio.sleep(5)
        failing.work()
        await asyncio.sleep(10)
        assert [state for _, state, _ in await history(cron)] == ["succeeded", "succeeded"]
        await asyncio.sleep(60)
        assert await counts(cron) == {"succeeded": 3}


@pytest.mark.parametrize("how", ["before", "after"])
@virtual
async def test_any_one_commit_may_fail(how: str) -> None:
    """Whichever it is, all is accounted for in the end."""
    for number in range(2, 30):
        target = Target(seconds=0.5)
        store = FaultyStore(fails=_nth_commit(number, how))
        async with CronScheduler(target, store=store, clock=WallClock(), lease=0.9) as cron:
            await cron.register(a_job("plain", 2))
            await asyncio.sleep(0)
            for script in (
                cron.register(a_job("buffers", 1, firing=FiringPolicy(overlap=Overlap.BUFFER_ONE))),
                cron.pause("plain"),
                cron.resume("plain"),
                cron.trigger("plain", origin="once"),
                cron.trigger("plain", origin="once"),
                cron.unregister("buffers"),
            ):
                try:
                    await script
                except (StoreError, NotFound):
                    pass
                await asyncio.sleep(1.3)
            await asyncio.sleep(5)
        for record in await store.held.jobs():
            assert record.state.balanced, (number, record)
            assert record.state.pending == 0, (number, record)
        runs = await store.held.runs(_everything())
        assert not [run for run in runs if run.state.open], number
        assert sum(run.origin == "once" for run in runs) == 1, number
        assert len(target.calls) <= sum(run.state.value not in ("skipped", "missed") for run in runs)


def _everything() -> Any:
    from kapsl_scheduler.ports import RunQuery

    return RunQuery(limit=10_000)


def _nth_commit(nth: int, how: str) -> Callable[[str, int], str | None]:
    return lambda name, number: how if name == "commit" and number == nth else None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["runs", "beat", "beats", "versions", "jobs", "prune"])
@virtual
async def test_reading_that_fails_is_tried_again(method: str, caplog: pytest.LogCaptureFixture) -> None:
    broken = False
    store = FaultyStore(fails=lambda name, number: "before" if broken and name == method else None)
    async with cron_over(Target(seconds=3), store=store, lease=3) as cron:
        await cron.register(a_job(schedule=4, firing=FiringPolicy(overlap=Overlap.BUFFER_ONE)))
        await cron.backfill("job", cron.preview("job", 1)[0], cron.preview("job", 9)[-1])
        broken = True
        await asyncio.sleep(5000 if method == "prune" else 30)
        assert store.failed > (method != "jobs") * 3
        assert store.failed < 5000  # each third of a lease, at most
        broken = False
        await asyncio.sleep(60)
        info = await cron.job_info("job")
        assert info is not None
        add_up(info)
        assert info.pending <= 2
        assert info.succeeded > 15
        await cron.unregister("job", cancel=True)


@virtual
async def test_an_error_that_a_store_should_not_raise_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(FaultyStore):
        odd = False

        async def _call(self, name: str, *words: Any, **options: Any) -> Any:
            if self.odd:
                raise SystemError(name)
            return await super()._call(name, *words, **options)

    store = Odd()
    async with cron_over(store=store, lease=3) as cron:
        await cron.register(a_job(firing=FiringPolicy(overlap=Overlap.BUFFER_ONE)))
        store.odd = True
        (pausing,) = await start(cron.pause("job"))
        with pytest.raises(StoreError, match="SystemError: commit"):
            await pausing
        await asyncio.sleep(70)
        store.odd = False
        await asyncio.sleep(60)
        assert await counts(cron) == {"succeeded": 2}
    assert "raised what it should not" in caplog.text


@virtual
async def test_a_firing_that_cannot_be_decided_is_looked_at_again(caplog: pytest.LogCaptureFixture) -> None:
    async with cron_over() as cron:
        await cron.register(a_job())
        await cron.register(a_job("other"))
        timetable = cron._ledger.entries["job"].timetable
        assert timetable is not None
        good, timetable.schedule = timetable.schedule, None  # type: ignore[assignment]
        await asyncio.sleep(61)
        assert "job 'job': a change could not be decided" in caplog.text
        timetable.schedule = good
        await asyncio.sleep(30)
        assert await counts(cron) == {"succeeded": 1}
        assert await counts(cron, "other") == {"succeeded": 1}


@pytest.mark.parametrize("instant", [True, False])
@virtual
async def test_what_was_written_of_several_jobs_is_taken_back_once_the_store_works(instant: bool) -> None:
    """The store fails in the middle, and goes on failing for a while."""
    fails = False

    def planned(name: str, number: int) -> str | None:
        return "before" if fails and name == "commit" and store.counts["commit"] > failing_from else None

    store = FaultyStore(instant=instant, fails=planned)
    async with cron_over(store=store) as cron:
        await cron.register_all([a_job("there", schedule=DAY), a_job("same", schedule=DAY)])
        await cron.register_all([a_job("paused", schedule=DAY)])
        before = {id: cron.definition(id) for id in ("there", "same", "paused")}
    failing_from, fails = store.counts["commit"] + 1, True
    async with cron_over(store=store) as cron:
        changed = [a_job("there", schedule=60), a_job("same", schedule=DAY), *(a_job(f"new-{n}") for n in range(200))]
        with pytest.raises(StoreError):
            await cron.register_all(changed)
        assert len(await cron.list_jobs()) > 3  # it cannot be undone yet
        fails = False
        await asyncio.sleep(5)
        assert {info.id: cron.definition(info.id) for info in await cron.list_jobs()} == before
        await cron.register_all(changed)
        assert len(await cron.list_jobs()) == 203


@virtual
async def test_what_is_registered_again_meanwhile_is_not_taken_back() -> None:
    fails = True

    def planned(name: str, number: int) -> str | None:
        return "before" if fails and name == "commit" and number > 1 else None

    store = FaultyStore(fails=planned)
    async with cron_over(store=store) as cron:
        with pytest.raises(StoreError):
            await cron.register_all([a_job(f"job-{n}") for n in range(200)])
        written = [info.id for info in await cron.list_jobs()]
        assert written
        fails = False
        await cron.register(a_job(written[0]))
        await asyncio.sleep(5)
        assert [info.id for info in await cron.list_jobs()] == [written[0]]


@virtual
async def test_a_scheduler_whose_writer_has_stopped_says_so(caplog: pytest.LogCaptureFixture) -> None:
    store = FaultyStore()
    async with CronScheduler(Target(), store=store, clock=WallClock()) as cron:
        await cron.register(a_job())
        cron._ledger._round = None  # type: ignore[assignment,method-assign]
        with pytest.raises(CronError, match="has broken down: TypeError"):
            await cron.register(a_job("other"))
        with pytest.raises(CronError, match="has broken down: TypeError"):
            await cron.pause("job")
    assert "cron writer has stopped" in caplog.text
