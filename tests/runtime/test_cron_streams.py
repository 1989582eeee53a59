"""Firings of many requests: bounded, in order, with a sink and checkpoints, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from kapsl_scheduler import (
    CronOverflowPolicy,
    CronRun,
    Firing,
    FiringPolicy,
    InferenceError,
    InvalidInput,
    OnInterrupt,
    Overlap,
    Overloaded,
    RunPolicy,
    StoreError,
    Unavailable,
)
from kapsl_scheduler.ports import SinkItem, SourceItem
from kapsl_scheduler.runtime.cron_feed import Feed, numbered
from kapsl_scheduler.runtime.cron_stream import Stream
from kapsl_scheduler.runtime.offload import Strangers, taken_in_thread
from kapsl_scheduler.stores.memory import MemoryStore
from kapsl_scheduler.testing import WallClock
from tests.runtime.cron import FaultyStore, Target, X, a_job, at, counts, cron_over, history, next_event, run_ended
from tests.runtime.helpers import until_async
from tests.runtime.virtual import virtual, with_threads

DAY = 86_400


class Rows(msgspec.Struct, frozen=True, tag="rows"):
    """Numbers up to a limit, behind those that are remembered; `bad` ones cannot be read."""

    upto: int = 5
    bad: tuple[int, ...] = ()
    breaks_at: int | None = None

    def items(self, firing: Firing, memory: Mapping[str, str]) -> Iterator[SourceItem]:
        for number in range(int(memory.get("next", "0")), self.upto):
            if number == self.breaks_at:
                raise OSError("the disk is gone")
            error = ValueError("not a row") if number in self.bad else None
            request = None if error else X * number
            marks = {"next": str(number + 1)}
            yield SourceItem(request, f"row{number}", marks, error, (number + 1) / self.upto)


class Kept:
    """What a sink has been given, for good and otherwise, by all its writers."""

    def __init__(self) -> None:
        self.flushed: list[str] = []
        self.errors: dict[str, str] = {}
        self.opened: list[dict[str, str]] = []
        self.closed = 0
        self.threads: set[int] = set()
        self.fails: dict[str, Exception] = {}
        self.hangs: threading.Event | None = None
        self.batches: list[int] = []
        self.wanted = threading.Event()
        self.ended: list[list[str]] = []


KEPT = Kept()


@pytest.fixture(autouse=True)
def fresh() -> None:
    KEPT.__init__()  # type: ignore[misc]


class Writer:
    def __init__(self) -> None:
        self._items: list[str] = []

    def write(self, items: Sequence[SinkItem]) -> None:
        KEPT.threads.add(threading.get_ident())
        KEPT.batches.append(len(items))
        if KEPT.hangs is not None:
            KEPT.hangs.wait()
        if "write" in KEPT.fails:
            raise KEPT.fails["write"]
        self._items += [item.key for item in items]
        KEPT.errors |= {item.key: str(item.error) for item in items if item.error is not None}

    def flush(self) -> Mapping[str, str | None]:
        if "flush" in KEPT.fails:
            raise KEPT.fails["flush"]
        KEPT.flushed += self._items
        self._items = []
        return {"size": str(len(KEPT.flushed)), "old": None}

    def close(self) -> None:
        KEPT.closed += 1


class Breaking(msgspec.Struct, frozen=True, tag="breaking"):
    """Its first writer fails in its second `flush`, and loses what it was given since the first."""

    def open(self, firing: Firing, memory: Mapping[str, str]) -> Writer:
        KEPT.opened.append(dict(memory))
        return Writer() if len(KEPT.opened) > 1 else BreakingWriter()


class BreakingWriter(Writer):
    def flush(self) -> Mapping[str, str | None]:
        if self._items:
            raise OSError("disk full")
        return super().flush()


class GoingBack(msgspec.Struct, frozen=True, tag="going back"):
    """Opened again, it is as it was when it was last remembered."""

    def open(self, firing: Firing, memory: Mapping[str, str]) -> Writer:
        del KEPT.flushed[int(memory.get("size", "0")) :]
        return Writer()


class Exclusive(msgspec.Struct, frozen=True, tag="exclusive"):
    """One writer at a time. Its writers are slow to close, unless somebody comes and finds it open."""

    def open(self, firing: Firing, memory: Mapping[str, str]) -> Writer:
        if KEPT.closed < len(KEPT.opened):
            KEPT.wanted.set()
            raise Unavailable("another run is writing")
        KEPT.opened.append(dict(memory))
        return ExclusiveWriter()


class ExclusiveWriter(Writer):
    def close(self) -> None:
        KEPT.wanted.wait(0.02)
        super().close()


class Marking(msgspec.Struct, frozen=True, tag="marking"):
    """Remembers each run by its key."""

    def open(self, firing: Firing, memory: Mapping[str, str]) -> Writer:
        KEPT.ended.append(sorted(firing.ended))
        return MarkingWriter(f"sink:{firing.key}")


class MarkingWriter(Writer):
    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key

    def flush(self) -> Mapping[str, str | None]:
        return {self._key: "here", "sink:": "no run's"}


class SlowToOpen(msgspec.Struct, frozen=True, tag="slow to open"):
    def open(self, firing: Firing, memory: Mapping[str, str]) -> Writer:
        assert KEPT.hangs is not None
        KEPT.hangs.wait()
        return Writer()


class Lines(msgspec.Struct, frozen=True, tag="lines"):
    def open(self, firing: Firing, memory: Mapping[str, str]) -> Writer:
        if "open" in KEPT.fails:
            raise KEPT.fails["open"]
        KEPT.opened.append(dict(memory))
        return Writer()


def keys(*numbers: int) -> list[str]:
    return [f"row{number}" for number in numbers]


def adapters(kind: str, settings: Mapping[str, Any]) -> Any:
    return msgspec.convert(settings, {"source": Rows, "sink": Lines}[kind])


async def stubborn(*words: Any) -> Any:
    """A minute, whoever cancels it."""
    loop = asyncio.get_running_loop()
    until = loop.time() + 60
    while (left := until - loop.time()) > 0:
        try:
            await asyncio.sleep(left)
        except asyncio.CancelledError:
            continue


def outcome(run: CronRun) -> tuple[str, str]:
    return run.state.value, run.reason


def job(source: Rows | None = None, **fields: Any) -> Any:
    return a_job(schedule=DAY, request=source or Rows(), sink=Lines(), **fields)


# ------------------------------------------------------------------------------------------- the way of it


@pytest.mark.slow
@with_threads
async def test_from_a_source_to_a_sink_in_order() -> None:
    target, heard = Target(does=lambda number: 1.0 / number), []

    async def on_result(id: str, result: Any) -> None:
        heard.append(result)

    store = MemoryStore()
    async with cron_over(target, store=store) as cron:
        await cron.register(job(Rows(10), on_result=on_result, run=RunPolicy(max_in_flight=4)))
        run = await run_ended(cron)
        assert (outcome(run), run.requests, run.rows) == (("succeeded", ""), 10, 10)
        assert await store.memory("job") == {"next": "10", "size": "10"}
        await until_async(lambda: KEPT.closed)
        run = await run_ended(cron)  # there is nothing more
        assert outcome(run) == ("succeeded", "nothing to do")
    assert KEPT.flushed == keys(*range(10))  # though the later ones were answered earlier
    assert KEPT.opened == [{}, {"next": "10", "size": "10"}]
    assert threading.get_ident() not in KEPT.threads
    assert target.most == 4
    assert heard == [None, None]


@virtual
async def test_answers_go_to_a_plain_sink_in_batches() -> None:
    batches: list[list[SinkItem]] = []

    async def sink(items: list[SinkItem]) -> None:
        batches.append(list(items))

    async def make(firing: Firing) -> AsyncIterator[Any]:
        for number in range(600):
            yield X * number

    async with cron_over() as cron:
        await cron.register(a_job(schedule=DAY, request=make, sink=sink))
        await cron.register(a_job("one", schedule=DAY, request=X, sink=sink))
        assert (await run_ended(cron)).requests == 600
        assert [len(batch) for batch in batches] == [256, 256, 88]
        assert [item.key for batch in batches for item in batch] == [str(number) for number in range(600)]
        assert (await run_ended(cron, "one")).requests == 1
        assert batches[-1][0].response is not None

        async def single(firing: Firing) -> Any:
            return X

        await cron.update(a_job("one", schedule=DAY, request=single, sink=sink))
        assert (await run_ended(cron, "one")).requests == 1
        assert len(batches) == 5


@virtual
async def test_however_long_the_stream_what_is_on_its_way_is_bounded() -> None:
    made = 0
    target = Target(seconds=1.0)

    async def make(firing: Firing) -> AsyncIterator[Any]:
        nonlocal made
        for _ in range(1000):
            made += 1
            yield X

    async with cron_over(target) as cron:
        await cron.register(a_job(schedule=DAY, request=make, run=RunPolicy(max_in_flight=7)))
        await cron.trigger("job")
        await asyncio.sleep(10.5)
        assert made <= 1 + 7 * 10 + 7
        (run,) = await cron.runs("job")
        assert 60 <= run.requests <= made
        await cron.close(drain=0)
    assert target.most == 7
    assert target.in_flight == 0


@pytest.mark.slow
@with_threads
async def test_checkpoints_say_how_far_it_is() -> None:
    store, target = MemoryStore(), Target(seconds=1.0)
    async with cron_over(target, store=store) as cron:
        await cron.register(job(Rows(6), run=RunPolicy(max_in_flight=1)))
        run = await cron.trigger("job")
        await asyncio.sleep(3.5)
        shown = await cron.run(run.number)
        assert shown.progress is not None
        assert 0 < shown.progress < 1
        remembered = int((await store.memory("job"))["next"])
        assert 1 <= remembered <= len(target.calls)
        assert KEPT.flushed == keys(*range(remembered))
        await asyncio.sleep(3)
        assert KEPT.flushed == keys(*range(6))


# -------------------------------------------------------------------------------------------- what goes wrong


@with_threads
async def test_a_bad_item_harms_only_itself() -> None:
    target = Target(does=lambda number: InvalidInput("shape") if number == 2 else 0.0)
    async with cron_over(target) as cron:
        await cron.register(job(Rows(6, bad=(0, 3)), run=RunPolicy(max_in_flight=1)))
        run = await run_ended(cron)
        assert outcome(run) == ("failed", "error")
        assert run.error == "PartlyFailed: 3 of 6 requests failed, the first (row0): ValueError: not a row"
        assert (run.requests, run.failed_requests) == (6, 3)
    assert KEPT.flushed == keys(*range(6))
    assert KEPT.errors == {"row0": "not a row", "row2": "shape", "row3": "not a row"}
    assert len(target.calls) == 4


@virtual
async def test_a_first_item_that_the_model_refuses_harms_only_itself() -> None:
    async def make(firing: Firing) -> list[Any]:
        return [X, X * 2]

    heard: list[Any] = []

    async def on_result(id: str, result: Any) -> None:
        heard.append(result)

    async with cron_over(Target(does=lambda number: InferenceError("no") if number == 1 else 0.0)) as cron:
        await cron.register(a_job(schedule=DAY, request=make, on_result=on_result))
        run = await run_ended(cron)
        assert (outcome(run), run.requests, run.failed_requests) == (("failed", "inference_error"), 2, 1)
    assert type(heard[0]).__name__ == "PartlyFailed"
    assert isinstance(heard[0].__cause__, InferenceError)


@pytest.mark.parametrize("attempts", [1, 2])
@virtual
async def test_a_model_that_answers_nothing_is_given_up(attempts: int) -> None:
    target = Target(does=lambda number: InferenceError("no"))

    async def make(firing: Firing) -> list[Any]:
        return [X] * 500

    async with cron_over(target) as cron:
        await cron.register(a_job(schedule=DAY, request=make, run=RunPolicy(attempts=attempts, max_in_flight=1)))
        run = await run_ended(cron)
        assert (outcome(run), run.failed_requests) == (("failed", "inference_error"), 100)
    assert len(target.calls) == 100 * attempts


@virtual
async def test_bad_requests_are_no_reason_to_give_up() -> None:
    async def make(firing: Firing) -> list[Any]:
        return [X] * 300

    async with cron_over(Target(does=lambda number: InvalidInput("no"))) as cron:
        await cron.register(a_job(schedule=DAY, request=make))
        run = await run_ended(cron)
        assert (run.requests, run.failed_requests) == (300, 300)


@virtual
async def test_a_model_that_is_gone_ends_the_attempt_and_the_next_sends_the_rest() -> None:
    target = Target(does=lambda number: Unavailable("gone") if number == 3 else 0.0)

    async def make(firing: Firing) -> list[Any]:
        return [X * number for number in range(4)]

    async with cron_over(target) as cron:
        await cron.register(a_job(schedule=DAY, request=make, run=RunPolicy(attempts=2, max_in_flight=1)))
        run = await run_ended(cron)
        assert (outcome(run), run.attempt, run.requests) == (("succeeded", ""), 2, 4)
    assert target.in_flight == 0
    assert [int(call.request[0, 0]) for call in target.calls] == [0, 1, 2, 2, 3]


@with_threads
async def test_what_the_model_failed_at_the_end_is_offered_again() -> None:
    """An outage that outlasts the source: nothing behind it was answered, so the rows are not at fault."""
    down = True
    target = Target(does=lambda number: InferenceError("out of order") if down and number > 3 else 0.0)
    store = MemoryStore()
    async with cron_over(target, store=store) as cron:
        await cron.register(job(Rows(6), run=RunPolicy(max_in_flight=2)))
        run = await run_ended(cron)
        assert (outcome(run), run.error) == (("failed", "inference_error"), "InferenceError: out of order")
        assert (run.requests, run.failed_requests) == (6, 3)
        assert (await store.memory("job"))["next"] == "3"
        assert KEPT.flushed == keys(0, 1, 2)
        down = False
        run = await run_ended(cron)
        assert (outcome(run), run.requests) == (("succeeded", ""), 3)
    assert KEPT.flushed == keys(*range(6))
    assert KEPT.errors == {}


@with_threads
async def test_what_the_model_fails_while_it_answers_others_has_failed() -> None:
    """Bad rows wait in their place until it is known whether it is they or the model."""
    faults: dict[int, Exception] = {2: InferenceError("poison"), 3: InvalidInput("shape"), 4: InferenceError("poison")}
    target = Target(does=lambda number: faults.get(number, 0.0))
    store = MemoryStore()
    async with cron_over(target, store=store) as cron:
        await cron.register(job(Rows(6), run=RunPolicy(max_in_flight=1, attempts=3)))
        run = await run_ended(cron)
        assert (outcome(run), run.attempt, run.failed_requests) == (("failed", "inference_error"), 1, 3)
        assert run.error == "PartlyFailed: 3 of 6 requests failed, the first (row1): InferenceError: poison"
        assert (await store.memory("job"))["next"] == "6"
    assert KEPT.flushed == keys(*range(6))
    assert KEPT.errors == {"row1": "poison", "row2": "shape", "row3": "poison"}


@with_threads
async def test_an_outage_in_the_middle_costs_attempts_but_no_row() -> None:
    target = Target(does=lambda number: InferenceError("out of order") if 150 <= number < 300 else 0.0)
    async with cron_over(target) as cron:
        await cron.register(job(Rows(400), run=RunPolicy(max_in_flight=1, attempts=5)))
        run = await run_ended(cron)
        assert (outcome(run), run.attempt) == (("failed", "inference_error"), 2)
        # The first hundred in a row ended an attempt; the fifty after it were confirmed by the next answer.
        assert (run.requests, run.failed_requests) == (400, 50)
    assert KEPT.flushed == keys(*range(400))


@virtual
async def test_what_a_callable_made_is_sent_again_only_where_it_is_not_certain() -> None:
    """A generator is made once, and goes on where it was; each request is in the sink once."""
    made: list[int] = []
    sunk: list[str] = []
    target = Target(does=lambda number: Unavailable("gone") if number in (300, 500) else 0.0)

    async def make(firing: Firing) -> AsyncIterator[Any]:
        for number in range(700):
            made.append(number)
            yield X * number

    async def sink(items: list[SinkItem]) -> None:
        sunk.extend(item.key for item in items)

    async with cron_over(target) as cron:
        await cron.register(
            a_job(schedule=DAY, request=make, sink=sink, run=RunPolicy(attempts=3, max_in_flight=1, backoff=30))
        )
        run = await run_ended(cron)
        assert (outcome(run), run.attempt, run.requests) == (("succeeded", ""), 3, 700)
    assert made == list(range(700))
    assert sunk == [str(number) for number in range(700)]
    assert len(target.calls) == 702


@with_threads
async def test_what_a_sink_has_lost_is_sent_again() -> None:
    """Answers that were written and not yet flushed, by a run whose requests nobody else has."""

    async def make(firing: Firing) -> AsyncIterator[Any]:
        for number in range(20):
            yield X * number

    async with cron_over() as cron:
        await cron.register(
            a_job(schedule=DAY, request=make, sink=Breaking(), run=RunPolicy(attempts=2, max_in_flight=4))
        )
        run = await run_ended(cron)
        assert (outcome(run), run.attempt) == (("succeeded", ""), 2)
    assert KEPT.flushed == [str(number) for number in range(20)]


@virtual
async def test_an_answer_that_comes_while_a_sink_fails_is_not_lost_and_all_are_counted_once() -> None:
    """The sink breaks when it is given what was in doubt until that answer came."""
    sunk: list[str] = []
    target = Target(does=lambda number: InferenceError("bad") if number == 256 else 0.0)

    async def sink(items: list[SinkItem]) -> None:
        if items[-1].error is not None:
            raise OSError("the other side is gone")
        sunk.extend(item.key for item in items)

    def make(firing: Firing) -> list[Any]:
        return [X] * 300

    async with cron_over(target) as cron:
        await cron.register(a_job(schedule=DAY, request=make, sink=sink, run=RunPolicy(attempts=2, max_in_flight=1)))
        run = await run_ended(cron)
        assert (outcome(run), run.attempt) == (("succeeded", ""), 2)  # what failed once was answered when sent again
        assert (run.requests, run.failed_requests, run.rows) == (300, 0, 300)
    assert sunk == [str(number) for number in range(300)]


class Host:
    """An execution of which checkpoints fail, those of the numbers `fails`."""

    def __init__(self, *fails: int) -> None:
        self.fails = fails
        self.done: float | None = None
        self.discarded = False
        self.strangers = Strangers()
        self.remembered: dict[str, str] = {}
        self.checkpoints = self.counted = 0

    def add(self, request: Any, response: Any, rows: int = 1) -> None:
        self.counted += 1

    def counts(self) -> tuple[int, ...]:
        return (self.counted,)

    def recount(self, counts: tuple[int, ...]) -> None:
        (self.counted,) = counts

    async def infer(self, request: Any, *, starts: bool = True) -> Any:
        await asyncio.sleep(0.6)
        return request

    async def checkpoint(self, memory: Mapping[str, str | None]) -> bool:
        self.checkpoints += 1
        if self.checkpoints in self.fails:
            raise StoreError("locked for a moment")
        self.remembered |= {key: value for key, value in memory.items() if value is not None}
        return True

    async def memory(self) -> Mapping[str, str]:
        return dict(self.remembered)

    async def ended(self, memory: Mapping[str, str]) -> frozenset[str]:
        return frozenset()

    async def alone(self) -> None:
        """It always is."""


@pytest.mark.slow
@pytest.mark.parametrize("fails", [(2,), (2, 3)], ids=["once", "twice"])
@pytest.mark.parametrize("lasts", [False, True], ids=["source", "callable"])
@with_threads
async def test_a_checkpoint_that_fails_leaves_source_and_sink_where_they_were_together(
    lasts: bool, fails: tuple[int, ...]
) -> None:
    firing = Firing("job", at(0), "schedule", 1)
    host = Host(*fails)
    stream = Stream(host, GoingBack(), 1, keep=False)

    def feed() -> Feed:
        items = numbered([X] * 10) if lasts else taken_in_thread(Rows(upto=10).items(firing, host.remembered))
        return Feed(items, ahead=1, lasts=lasts, strangers=host.strangers)

    first = feed()
    with pytest.raises(StoreError):
        await stream.run(first, firing, final=False)
    second = first if lasts else feed()
    await stream.run(second, firing, final=True)
    await first.close()
    await second.close()
    assert KEPT.flushed == ([str(number) for number in range(10)] if lasts else keys(*range(10)))
    assert (stream.requests, host.counted) == (10, 10)


@virtual
async def test_a_bad_item_in_front_does_not_stand_for_the_request_that_asks_for_room() -> None:
    """The first that is really sent decides whether the firing takes place."""
    target = Target(does=lambda number: Overloaded("full"))
    async with cron_over(target) as cron:
        source = Rows(upto=3, bad=(0,))
        await cron.register(a_job(schedule=DAY, request=source, overflow_policy=CronOverflowPolicy.SKIP_IF_BUSY))
        run = await run_ended(cron)
        assert (outcome(run), run.requests) == (("skipped", "busy"), 0)
    assert len(target.calls) == 1


@virtual
async def test_an_iterator_that_breaks_is_made_anew_and_goes_on_behind_what_is_certain() -> None:
    makes: list[int] = []
    sunk: list[str] = []
    target = Target()

    async def make(firing: Firing) -> AsyncIterator[Any]:
        makes.append(firing.attempt)
        for number in range(5):
            if number == 3 and len(makes) == 1:
                raise OSError("the database is gone")
            yield X * number

    async def sink(items: list[SinkItem]) -> None:
        sunk.extend(item.key for item in items)

    async with cron_over(target) as cron:
        await cron.register(a_job(schedule=DAY, request=make, sink=sink, run=RunPolicy(attempts=2)))
        run = await run_ended(cron)
        assert (outcome(run), run.attempt, run.requests, run.rows) == (("succeeded", ""), 2, 5, 5)
    assert makes == [1, 2]
    assert sunk == ["0", "1", "2", "3", "4"]
    assert [int(call.request[0, 0]) for call in target.calls] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["list", "iterator"])
@with_threads
async def test_what_a_callable_made_goes_on_in_the_next_process_behind_what_is_certain(kind: str) -> None:
    store, clock = MemoryStore(), WallClock()
    target = Target(does=lambda number: None if number == 4 else InvalidInput("bad") if number == 2 else 0.0)
    policy = RunPolicy(max_in_flight=1, on_interrupt=OnInterrupt.RESUME)

    async def make(firing: Firing) -> Any:
        requests = [X * number for number in range(6)]
        return requests if kind == "list" else iter(requests)

    def again() -> Any:
        return a_job(schedule=DAY, request=make, sink=Lines(), run=policy)

    async with cron_over(target, store=store, clock=clock, adapters=adapters) as cron:
        await cron.register(again())
        number = (await cron.trigger("job")).number
        await until_async(lambda: len(target.calls) == 4)
        await cron.close(drain=0)
    async with cron_over(target, store=store, clock=clock, adapters=adapters) as cron:
        events = cron.events()
        await cron.register(again())
        await next_event(events, "ended")
        run = await cron.run(number)
        assert (outcome(run), run.attempt) == (("failed", "error"), 2)
        assert (run.requests, run.failed_requests, run.rows) == (6, 1, 6)
    assert KEPT.flushed == [str(number) for number in range(6)]
    assert [int(call.request[0, 0]) for call in target.calls] == [0, 1, 2, 3, 3, 4, 5]


@virtual
async def test_a_list_whose_answers_are_to_be_heard_together_begins_anew_in_the_next_process() -> None:
    store, clock, heard = MemoryStore(), WallClock(), []
    target = Target(seconds=1.0)
    policy = RunPolicy(max_in_flight=1, on_interrupt=OnInterrupt.RESUME)

    async def make(firing: Firing) -> list[Any]:
        return [X * number for number in range(6)]

    async def on_result(id: str, result: Any) -> None:
        heard.append(result)

    for seconds in (4.5, 10):
        async with cron_over(target, store=store, clock=clock) as cron:
            await cron.register(a_job(schedule=DAY, request=make, on_result=on_result, run=policy))
            if not target.calls:
                await cron.trigger("job")
            await asyncio.sleep(seconds)
            (run,) = await cron.runs("job")
            await cron.close(drain=0)
    assert (outcome(run), run.attempt, run.requests, run.rows) == (("succeeded", ""), 2, 6, 6)
    assert [int(answer.outputs["y"][0, 0]) for answer in heard[0]] == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("followed", [False, True])
@with_threads
async def test_a_run_whose_job_is_gone_goes_on_behind_what_was_done(followed: bool) -> None:
    """Also where another job has taken the id, of which it does not touch what that remembers."""
    target = Target(does=lambda number: Unavailable("gone") if number == 4 else 0.0)
    store = MemoryStore()
    async with cron_over(target, store=store) as cron:
        await cron.register(job(Rows(6), run=RunPolicy(max_in_flight=1, attempts=2, backoff=5)))
        number = (await cron.trigger("job")).number
        await until_async(lambda: len(target.calls) == 4)
        await asyncio.sleep(1)
        await cron.unregister("job")
        if followed:
            await asyncio.sleep(1)
            await cron.register(job(Rows(3)))
        await asyncio.sleep(5)
        run = await cron.run(number)
        assert (outcome(run), run.attempt, run.requests) == (("succeeded", ""), 2, 6)
        assert await store.memory("job") == {}
    assert KEPT.flushed == keys(*range(6))
    assert KEPT.opened[1]["next"] == "3"


@virtual
async def test_a_list_keeps_its_answers_from_one_attempt_to_the_next() -> None:
    heard: list[Any] = []

    async def make(firing: Firing) -> list[Any]:
        return [X * number for number in range(4)]

    async def on_result(id: str, result: Any) -> None:
        heard.append(result)

    target = Target(does=lambda number: Unavailable("gone") if number == 3 else 0.0)
    async with cron_over(target) as cron:
        await cron.register(
            a_job(schedule=DAY, request=make, on_result=on_result, run=RunPolicy(attempts=2, max_in_flight=1))
        )
        assert outcome(await run_ended(cron)) == ("succeeded", "")
    assert [int(answer.outputs["y"][0, 0]) for answer in heard[0]] == [0, 1, 2, 3]


@virtual
async def test_the_last_of_a_list_that_fails_has_failed_when_all_attempts_have() -> None:
    heard: list[Any] = []
    sunk: list[SinkItem] = []

    async def make(firing: Firing) -> list[Any]:
        return [X, X]

    async def on_result(id: str, result: Any) -> None:
        heard.append(result)

    async def sink(items: list[SinkItem]) -> None:
        sunk.extend(items)

    target = Target(does=lambda number: InferenceError("no") if number > 1 else 0.0)
    async with cron_over(target) as cron:
        await cron.register(
            a_job(schedule=DAY, request=make, on_result=on_result, sink=sink, run=RunPolicy(attempts=3))
        )
        run = await run_ended(cron)
        assert (outcome(run), run.attempt) == (("failed", "inference_error"), 3)
        assert (run.requests, run.failed_requests, len(target.calls)) == (2, 1, 4)
    assert [(item.key, str(item.error)) for item in sunk] == [("0", "None"), ("1", "no")]
    assert type(heard[0]).__name__ == "PartlyFailed"


@virtual
async def test_answers_are_handed_on_also_while_the_next_request_is_long_in_coming() -> None:
    sunk: list[str] = []
    store = MemoryStore()

    async def make(firing: Firing) -> AsyncIterator[Any]:
        yield X
        yield X
        await asyncio.sleep(1000)
        yield X

    async def sink(items: list[SinkItem]) -> None:
        sunk.extend(item.key for item in items)

    async with cron_over(store=store) as cron:
        await cron.register(a_job(schedule=DAY, request=make, sink=sink))
        run = await cron.trigger("job")
        await asyncio.sleep(3)
        assert sunk == ["0", "1"]
        record = await store.numbered(run.number)
        assert record is not None
        assert record.requests == 2
        await asyncio.sleep(1000)
        assert sunk == ["0", "1", "2"]


@virtual
async def test_a_generator_that_is_slow_to_end_does_not_outlive_the_timeout(caplog: pytest.LogCaptureFixture) -> None:
    async def make(firing: Firing) -> AsyncIterator[Any]:
        try:
            while True:
                yield X
                await asyncio.sleep(1)
        finally:
            await asyncio.sleep(600)

    async with cron_over() as cron:
        await cron.register(a_job(schedule=DAY, request=make, run=RunPolicy(timeout=5)))
        run = await run_ended(cron)
        assert outcome(run) == ("failed", "timeout")
        assert run.duration is not None
        assert 5 <= run.duration < 6
        await asyncio.sleep(700)
    assert "is left behind" in caplog.text


@pytest.mark.parametrize("field", ["request", "condition", "sink"])
@virtual
async def test_a_coroutine_that_does_not_heed_its_cancellation_does_not_outlive_the_timeout(field: str) -> None:
    async with cron_over() as cron:
        await cron.register(a_job(schedule=DAY, **{field: stubborn}, run=RunPolicy(timeout=5)))
        run = await run_ended(cron)
        assert outcome(run) == ("failed", "timeout")
        assert run.duration is not None
        assert 5 <= run.duration < 6
        await asyncio.sleep(100)


@with_threads
async def test_a_source_that_breaks_fails_the_run_and_keeps_what_was_done() -> None:
    store = MemoryStore()
    async with cron_over(store=store) as cron:
        await cron.register(job(Rows(5, breaks_at=3), run=RunPolicy(max_in_flight=1)))
        run = await run_ended(cron)
        assert (outcome(run), run.error) == (("failed", "error"), "OSError: the disk is gone")
        assert KEPT.flushed == keys(*range(int((await store.memory("job"))["next"])))
        await cron.update(job(Rows(5)))
        assert outcome(await run_ended(cron)) == ("succeeded", "")
    assert KEPT.flushed == keys(*range(5))


@pytest.mark.parametrize("place", ["open", "write", "flush"])
@with_threads
async def test_a_sink_that_fails_fails_the_run_and_nothing_is_remembered_that_it_may_have_lost(place: str) -> None:
    KEPT.fails[place] = OSError("disk full")
    store = MemoryStore()
    async with cron_over(store=store) as cron:
        await cron.register(job(Rows(5)))
        run = await run_ended(cron)
        assert (outcome(run), run.error) == (("failed", "error"), "OSError: disk full")
        assert "next" not in await store.memory("job")
        KEPT.fails.clear()
        assert outcome(await run_ended(cron)) == ("succeeded", "")
        await until_async(lambda: KEPT.closed == 2 - (place == "open"))
    assert KEPT.flushed == keys(*range(5))


@virtual
async def test_a_plain_sink_that_raises_fails_the_run() -> None:
    async def sink(items: Any) -> None:
        raise OSError("no room")

    async with cron_over() as cron:
        await cron.register(a_job(schedule=DAY, sink=sink))
        run = await run_ended(cron)
        assert (outcome(run), run.error) == (("failed", "error"), "OSError: no room")


@with_threads
async def test_what_a_plain_sink_may_have_lost_is_not_remembered_as_done() -> None:
    async def sink(items: Any) -> None:
        raise OSError("no room")

    store = MemoryStore()
    async with cron_over(store=store) as cron:
        await cron.register(a_job(schedule=DAY, request=Rows(5), sink=sink))
        assert outcome(await run_ended(cron)) == ("failed", "error")
        assert await store.memory("job") == {}


@pytest.mark.slow
@with_threads
async def test_a_timeout_in_the_middle_leaves_the_rest_to_the_next_firing() -> None:
    store, target = MemoryStore(), Target(does=lambda number: None if number == 4 else 0.0)
    async with cron_over(target, store=store) as cron:
        await cron.register(job(Rows(6), run=RunPolicy(max_in_flight=1, timeout=50)))
        run = await run_ended(cron)
        assert outcome(run) == ("failed", "timeout")
        assert (await store.memory("job"))["next"] == "3"
        assert KEPT.flushed == keys(0, 1, 2)
        run = await run_ended(cron)
        assert (outcome(run), run.requests) == (("succeeded", ""), 3)
    assert KEPT.flushed == keys(*range(6))
    assert target.cancelled == 1


@with_threads
async def test_a_sink_that_hangs_costs_the_run_its_timeout_and_half_a_second() -> None:
    KEPT.hangs = threading.Event()
    async with cron_over() as cron:
        await cron.register(job(run=RunPolicy(timeout=1)))
        run = await run_ended(cron)
        assert outcome(run) == ("failed", "timeout")
        assert run.duration == 1.5
        KEPT.hangs.set()
        await until_async(lambda: KEPT.closed)


@virtual
async def test_a_stream_that_is_cancelled_takes_everything_back() -> None:
    closed = []

    async def make(firing: Firing) -> AsyncIterator[Any]:
        try:
            while True:
                yield X
        finally:
            closed.append(True)

    target = Target(does=lambda number: 0.0 if number == 1 else None)
    async with cron_over(target) as cron:
        await cron.register(a_job(schedule=DAY, request=make, run=RunPolicy(timeout=5)))
        run = await run_ended(cron)
        assert outcome(run) == ("failed", "timeout")
        assert (target.in_flight, target.cancelled, closed) == (0, 64, [True])


@pytest.mark.parametrize("how", ["timeout", "shutdown", "unregistered"])
@virtual
async def test_what_ends_a_run_is_heard_while_a_failed_attempt_has_its_last_word(how: str) -> None:
    target = Target(does=lambda number: Unavailable("gone") if number == 2 else 0.0)
    words: list[str] = []

    async def make(firing: Firing) -> AsyncIterator[Any]:
        yield X
        await asyncio.sleep(1.5)
        yield X

    async def sink(items: list[SinkItem]) -> None:
        words.append("begun")
        await asyncio.sleep(0.4)
        words.append("ended")

    policy = RunPolicy(timeout=1.7 if how == "timeout" else None, attempts=5, backoff=100)
    async with cron_over(target) as cron:
        await cron.register(a_job(schedule=DAY, request=make, sink=sink, run=policy))
        number = (await cron.trigger("job")).number
        await asyncio.sleep(1.7)
        assert words == ["begun"]
        if how == "unregistered":
            await cron.unregister("job", cancel=True)
        elif how == "shutdown":
            await cron.close(drain=0)
        await asyncio.sleep(0.2)
        assert cron.statistics().running == 0
        if how != "shutdown":
            run = await cron.run(number)
            assert outcome(run) == (("failed", how) if how == "timeout" else ("cancelled", how))
            assert run.attempt == 1
    assert words == ["begun"]
    assert len(target.calls) == 2


@with_threads
async def test_the_next_attempt_finds_the_sink_closed() -> None:
    target = Target(does=lambda number: Unavailable("gone") if number in (2, 4) else 0.0)
    async with cron_over(target) as cron:
        policy = RunPolicy(attempts=3, backoff=0, max_in_flight=1)
        await cron.register(a_job(schedule=DAY, request=Rows(5), sink=Exclusive(), run=policy))
        run = await run_ended(cron)
        assert (outcome(run), run.attempt) == (("succeeded", ""), 3)
    assert KEPT.flushed == keys(*range(5))


@pytest.mark.slow
@with_threads
async def test_a_run_that_takes_the_place_of_others_finds_the_sink_closed_and_nothing_in_it_twice() -> None:
    target = Target(seconds=1.6)  # of each run one row is certain when the next comes, and another is not
    async with cron_over(target) as cron:
        policy = RunPolicy(max_in_flight=1)
        firing = FiringPolicy(overlap=Overlap.CANCEL_OTHER)
        await cron.register(a_job(schedule=3.5, request=Rows(100), sink=Exclusive(), firing=firing, run=policy))
        await asyncio.sleep(12)
        assert [run[1:] for run in await history(cron)] == [("cancelled", "overlap")] * 2 + [("running", "")]
        assert KEPT.flushed == keys(0, 1)
    assert KEPT.flushed == keys(*range(len(KEPT.flushed)))


@with_threads
async def test_a_sink_hears_which_of_the_runs_that_it_remembers_have_ended() -> None:
    """Also of those of another process."""
    store = FaultyStore()
    first = Target(does=lambda number: None if number == 1 else 0.0)

    def a_marked_job() -> Any:
        firing = FiringPolicy(overlap=Overlap.ALLOW, max_running=5)
        return a_job(schedule=DAY, request=[[1.0]], sink=Marking(), firing=firing)

    def key(run: CronRun) -> str:
        return Firing("job", run.nominal, run.origin, 1).key

    clock = WallClock()
    async with (
        cron_over(first, store=store, clock=clock) as near,
        cron_over(store=FaultyStore(store.held), clock=clock) as far,
    ):
        await near.register(a_marked_job())
        await far.register(a_marked_job())
        hangs = await near.trigger("job")
        await until_async(lambda: first.calls)
        runs = [await run_ended(far), await run_ended(far), await run_ended(near)]
        assert KEPT.ended == [[], [], sorted(map(key, runs[:1])), sorted(map(key, runs[:2]))]
        assert (await near.run(hangs.number)).state.open
        assert set(await store.held.memory("job")) == {"sink:", *(f"sink:{key(run)}" for run in (hangs, *runs))}


@with_threads
async def test_a_sink_that_is_still_being_opened_when_its_run_ends_is_closed_too() -> None:
    KEPT.hangs = threading.Event()
    async with cron_over() as cron:
        await cron.register(a_job(schedule=DAY, request=Rows(5), sink=SlowToOpen(), run=RunPolicy(timeout=1)))
        run = await run_ended(cron)
        assert outcome(run) == ("failed", "timeout")
        assert KEPT.closed == 0
        KEPT.hangs.set()
        await until_async(lambda: KEPT.closed)


class Stubborn(Target):
    """Its calls take their time, whoever cancels them."""

    async def infer(self, request: Any, **options: Any) -> Any:
        work = asyncio.ensure_future(super().infer(request, **options))
        while not work.done():
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                continue
        return work.result()


@pytest.mark.slow
@with_threads
async def test_a_run_that_is_cancelled_a_second_time_lets_go_of_its_sink() -> None:
    async with cron_over(Stubborn(seconds=10)) as cron:
        await cron.register(job(run=RunPolicy(timeout=5)))
        await cron.trigger("job")
        await asyncio.sleep(5.05)  # its timeout has struck, and it waits for its calls to end
        await cron.unregister("job", cancel=True)
        await until_async(lambda: KEPT.closed)
        await asyncio.sleep(6)  # those calls have ended too
    assert KEPT.closed == 1


@with_threads
async def test_an_interrupted_stream_goes_on_where_it_was_in_the_next_process() -> None:
    store, clock = MemoryStore(), WallClock()
    target = Target(does=lambda number: None if number == 4 else 0.0)
    running = RunPolicy(max_in_flight=1, on_interrupt=OnInterrupt.RESUME)
    async with cron_over(target, store=store, clock=clock, adapters=adapters) as cron:
        await cron.register(job(Rows(6), run=running))
        await cron.trigger("job")
        await until_async(lambda: len(target.calls) == 4)
        await cron.close(drain=0)
        assert await counts(cron) == {"pending": 1}
    assert KEPT.flushed == keys(0, 1, 2)
    async with cron_over(target, store=store, clock=clock, adapters=adapters) as cron:
        event = await next_event(cron.events(), "ended")
        assert event.run is not None
        assert (outcome(event.run), event.run.attempt, event.run.requests) == (("succeeded", ""), 2, 6)
        assert await counts(cron) == {"succeeded": 1}
        info = await cron.job_info("job")
        assert info is not None
        assert info.fired_count == 1
    assert KEPT.flushed == keys(*range(6))


@virtual
async def test_a_generator_that_cannot_be_closed_is_told_of() -> None:
    async def make(firing: Firing) -> AsyncIterator[Any]:
        yield X
        raise KeyError("half way")

    async with cron_over() as cron:
        await cron.register(a_job(schedule=DAY, request=make))
        run = await run_ended(cron)
        assert (outcome(run), run.error, run.requests) == (("failed", "error"), "KeyError: 'half way'", 1)


@with_threads
async def test_an_iterator_that_cannot_be_closed_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Odd:
        def __iter__(self) -> Odd:
            return self

        def __next__(self) -> Any:
            raise StopIteration

        def close(self) -> None:
            raise OSError("it sticks")

    async with cron_over() as cron:
        await cron.register(a_job(schedule=DAY, request=lambda firing: Odd()))
        assert outcome(await run_ended(cron)) == ("succeeded", "nothing to do")
        await until_async(lambda: "could not be closed: OSError: it sticks" in caplog.text)


@virtual
async def test_rows_are_counted_where_requests_have_a_batch_axis() -> None:
    async def make(firing: Firing) -> list[Any]:
        return [np.zeros((3, 2)), {"x": np.zeros((4, 2))}, np.zeros(5), 1.5]

    async with cron_over() as cron:
        await cron.register(a_job(schedule=DAY, request=make))
        run = await run_ended(cron)
        assert (run.requests, run.rows, run.input_bytes) == (4, 3 + 4 + 1 + 1, 48 + 64 + 40)


@pytest.mark.slow
@with_threads
async def test_everything_may_hang_and_the_run_ends_within_a_second_of_its_timeout() -> None:
    """Its sink, its requests, its target and its callback."""
    KEPT.hangs = threading.Event()

    async def make(firing: Firing) -> AsyncIterator[Any]:
        for _ in range(300):
            yield X
        await stubborn()
        yield X

    async with cron_over() as cron:
        await cron.register(
            a_job(schedule=DAY, request=make, sink=Lines(), on_result=stubborn, run=RunPolicy(timeout=5))
        )
        run = await run_ended(cron)
        assert outcome(run) == ("failed", "timeout")
        assert run.callback_error
        assert run.duration is not None
        assert 5 <= run.duration < 6
        KEPT.hangs.set()
        await asyncio.sleep(100)
