"""Deadlines and cancellation: the caller is told at once, what is queued never runs, nobody else is touched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kapsl_scheduler import BatchPolicy, InferenceResponse, QueueOverflowPolicy, QueuePolicy, Scheduler
from kapsl_scheduler.errors import DeadlineExceeded, InferenceError, InvalidInput, Overloaded, Unavailable
from kapsl_scheduler.testing import FakeAsyncEngine, Fault, FaultPlan
from tests.runtime.helpers import numbered, start, virtual_scheduler
from tests.runtime.virtual import virtual

WHERE = ["running", "queued", "waiting"]


def crowded(engine: FakeAsyncEngine) -> Scheduler:
    """Room for one request in each place, so that where a request stands follows from its turn."""
    return virtual_scheduler(engine, batch=BatchPolicy(max_batch_size=1), queue=QueuePolicy(max_size=1))


def slow() -> FakeAsyncEngine:
    return FakeAsyncEngine(cost=lambda rows: 0.01)


async def fill(scheduler: Scheduler, *options: dict[str, Any]) -> list[asyncio.Task[Any]]:
    """One request that runs, one that is queued, one that waits for room, with the options of each."""
    callers: list[asyncio.Task[Any]] = []
    for number, each in enumerate(options):
        callers += await start(scheduler.infer(numbered(number), **each))
    found = scheduler.statistics()
    assert (found.running, found.queued, found.waiting) == (1, 1, 1)
    return callers


@pytest.mark.parametrize("place", range(3), ids=WHERE)
@virtual
async def test_at_the_deadline_the_caller_is_told_wherever_its_request_stands(place: int) -> None:
    engine = slow()
    options: list[dict[str, Any]] = [{}, {}, {}]
    options[place] = {"timeout": 0.004}
    async with crowded(engine) as scheduler:
        callers = await fill(scheduler, *options)
        with pytest.raises(DeadlineExceeded):
            await callers[place]
        assert asyncio.get_running_loop().time() == pytest.approx(0.004)
        others = [caller for caller in callers if caller is not callers[place]]
        answers = await asyncio.gather(*others)
        found = scheduler.statistics()
    assert [answer.output[0, 0] for answer in answers] == [n for n in range(3) if n != place]
    assert (found.expired, found.withdrawn) == ((0, 1) if WHERE[place] == "waiting" else (1, 0))
    assert found.discarded == (WHERE[place] == "running")
    assert len(engine.calls) == (3 if WHERE[place] == "running" else 2)


@pytest.mark.parametrize("place", range(3), ids=WHERE)
@virtual
async def test_a_cancelled_request_is_gone_and_nothing_changes_for_the_others(place: int) -> None:
    engine = slow()
    async with crowded(engine) as scheduler:
        callers = await fill(scheduler, {}, {}, {})
        await asyncio.sleep(0.004)
        callers[place].cancel()
        with pytest.raises(asyncio.CancelledError):
            await callers[place]
        assert asyncio.get_running_loop().time() == pytest.approx(0.004)
        others = [caller for caller in callers if caller is not callers[place]]
        answers = await asyncio.gather(*others)
        found = scheduler.statistics()
    assert [answer.output[0, 0] for answer in answers] == [n for n in range(3) if n != place]
    assert (found.cancelled, found.withdrawn) == ((0, 1) if WHERE[place] == "waiting" else (1, 0))
    assert len(engine.calls) == (3 if WHERE[place] == "running" else 2)


@pytest.mark.parametrize("place", range(3), ids=WHERE)
@virtual
async def test_what_was_submitted_is_taken_back_wherever_it_stands(place: int) -> None:
    engine = slow()
    async with crowded(engine) as scheduler:
        submitted, told = [], Told()
        for number in range(3):
            submitted.append(scheduler.infer_then(numbered(number), told))
            await start()
        gone = submitted.pop(place)
        for _ in range(2):
            scheduler.withdraw(gone)
        await asyncio.sleep(1.0)
        scheduler.withdraw(submitted[0])  # which has its answer
        found = scheduler.statistics()
    assert told.heard == [n for n in range(3) if n != place]
    assert (found.cancelled, found.withdrawn, found.succeeded) == (
        (0, 1, 2) if WHERE[place] == "waiting" else (1, 0, 2)
    )
    assert len(engine.calls) == (3 if WHERE[place] == "running" else 2)


@virtual
async def test_what_cannot_be_submitted_is_said_at_once() -> None:
    async with virtual_scheduler(slow()) as scheduler:
        with pytest.raises(InvalidInput, match="timeout"):
            scheduler.infer_then(numbered(0), Told(), timeout=-1.0)
    with pytest.raises(Unavailable):
        scheduler.infer_then(numbered(0), Told())


@virtual
async def test_who_submitted_is_told_of_a_refusal_an_error_and_the_end() -> None:
    engine = FakeAsyncEngine(cost=lambda rows: 0.01, faults=FaultPlan(Fault(error=RuntimeError)))
    told = Told()
    refuses = QueuePolicy(max_size=1, overflow=QueueOverflowPolicy.DROP_NEWEST)
    async with virtual_scheduler(engine, batch=BatchPolicy(max_batch_size=1), queue=refuses) as scheduler:
        for _ in range(3):
            scheduler.infer_then(numbered(0), told)
            await start()
        assert told.heard == [Overloaded]
        await asyncio.sleep(0.015)
        assert told.heard == [Overloaded, InferenceError]
        await scheduler.close(0.0)
    assert told.heard == [Overloaded, InferenceError, Unavailable]


@virtual
async def test_who_is_told_may_submit_again_and_fail_without_harm(caplog: pytest.LogCaptureFixture) -> None:
    told, again = Told(), Told()
    async with virtual_scheduler(slow(), batch=BatchPolicy(max_batch_size=4)) as scheduler:

        def fail(*_: Any) -> None:
            scheduler.infer_then(numbered(8), again)
            raise asyncio.CancelledError

        for number, then in enumerate((told, fail, told)):
            scheduler.infer_then(numbered(number), then)
        await asyncio.sleep(1.0)
        found = scheduler.statistics()
    assert (told.heard, again.heard) == ([0, 2], [8])
    assert (found.succeeded, found.running) == (4, 0)
    assert "failed on its answer" in caplog.text


@virtual
async def test_what_those_who_are_called_back_do_is_no_time_of_their_requests() -> None:
    """Else later ones with deadlines would be given up as if their answers came so late."""
    worked, told = [0.0], Told()

    def clock() -> float:
        return asyncio.get_running_loop().time() + worked[0]

    def work(*_: Any) -> None:
        worked[0] += 0.5

    async with Scheduler([slow()], clock=clock) as scheduler:
        for _ in range(5):
            scheduler.infer_then(numbered(0), work)
            await asyncio.sleep(0.02)
        figures = scheduler.statistics().classes["latency_critical"]
        assert figures.latency_total == pytest.approx(5 * 0.01)
        scheduler.infer_then(numbered(1), told, timeout=0.05)
        await asyncio.sleep(0.02)
    assert told.heard == [1]


class Told:
    """What was told to whoever submitted: the number of an answer, the class of an error."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def __call__(self, response: InferenceResponse | None, error: BaseException | None) -> None:
        self.heard.append(type(error) if response is None else response.output[0, 0])


@virtual
async def test_cancelling_a_member_of_a_running_batch_drops_only_its_answer() -> None:
    async with virtual_scheduler(slow()) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(3)))
        callers[1].cancel()
        answers = await asyncio.gather(*callers, return_exceptions=True)
        found = scheduler.statistics()
    assert [type(answer).__name__ for answer in answers] == [
        "InferenceResponse",
        "CancelledError",
        "InferenceResponse",
    ]
    assert (found.succeeded, found.cancelled, found.discarded) == (2, 1, 1)


@virtual
async def test_a_queued_request_that_goes_leaves_its_room_to_who_waits() -> None:
    async with crowded(slow()) as scheduler:
        callers = await fill(scheduler, {}, {}, {})
        callers[1].cancel()
        await start()
        found = scheduler.statistics()
        assert (found.running, found.queued, found.waiting) == (1, 1, 0)
        await asyncio.gather(*callers, return_exceptions=True)


@virtual
async def test_an_answer_before_the_deadline_stands() -> None:
    async with virtual_scheduler(slow()) as scheduler:
        answer = await scheduler.infer(numbered(4), timeout=0.011)
        await asyncio.sleep(1)
    assert answer.output[0, 0] == 4
    assert scheduler.statistics().expired == 0


@virtual
async def test_who_is_due_to_expire_is_told_at_the_pull_and_not_run() -> None:
    engine = slow()
    async with virtual_scheduler(engine, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        for number in range(3):  # three measurements are believed
            await scheduler.infer(numbered(number))
        callers = await start(scheduler.infer(numbered(3)))
        callers += await start(scheduler.infer(numbered(4), timeout=0.015))
        with pytest.raises(DeadlineExceeded):
            await callers[1]
        assert asyncio.get_running_loop().time() == pytest.approx(0.04)  # the pull, not the deadline
        await callers[0]
    assert len(engine.calls) == 4


@pytest.mark.parametrize("end", [asyncio.Task.cancel, None], ids=["cancelled", "expired"])
@virtual
async def test_thousands_that_go_leave_nothing(end: Callable[[Any], Any] | None) -> None:
    queue = QueuePolicy(max_size=20_000)
    async with virtual_scheduler(slow(), queue=queue) as scheduler:
        await start(scheduler.infer(numbered(0)))
        timeout = None if end else 0.005
        callers = await start(*(scheduler.infer(numbered(1), timeout=timeout) for _ in range(2_000)))
        assert scheduler.statistics().queued == 2_000
        for caller in callers:
            if end:
                end(caller)
        await asyncio.gather(*callers, return_exceptions=True)
        found = scheduler.statistics()
        assert (found.queued, found.cancelled + found.expired) == (0, 2_000)
        scheduler._main.queue.validate()
