"""The way in: the short cut comes to the same as the long way, and who arrives in one pass is let in together."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest

from kapsl_scheduler import (
    BatchPolicy,
    InferenceRequest,
    InvalidInput,
    Overloaded,
    Priority,
    QueueOverflowPolicy,
    QueuePolicy,
    Scheduler,
    Unavailable,
)
from kapsl_scheduler.core.batch import Pending, State
from kapsl_scheduler.runtime.entrance import Entrance, Phase
from kapsl_scheduler.testing import FakeAsyncEngine
from tests.runtime.helpers import FIXED_INFO, numbered, start, virtual_scheduler
from tests.runtime.virtual import virtual

SLOW = 1.0  # seconds a call


def slow_engine() -> FakeAsyncEngine:
    return FakeAsyncEngine(info=FIXED_INFO, cost=lambda rows: SLOW)


async def one_waits(scheduler: Scheduler, *others: Any) -> list[asyncio.Task[Any]]:
    """The engine is busy with one request; the others are offered in one pass of the loop."""
    (first,) = await start(scheduler.infer(numbered(0)))
    return [first, *await start(*others)]


# ------------------------------------------------------------------------------------------- the short cut

PLAIN: tuple[Any, ...] = (Priority.THROUGHPUT, 2.5)


def fields(item: Pending) -> dict[str, Any]:
    """What a request is, but for what is its own alone."""
    own = msgspec.structs.asdict(item)
    (array,) = own.pop("inputs")
    future = own.pop("future")
    assert not future.done()
    return {**own, "array": id(array), "shape": id(own["shape"]), "home": id(own["home"])}


@pytest.mark.parametrize("x", [numbered(3), numbered(3, rows=4), numbered(3)[0]], ids=["row", "rows", "bare"])
@pytest.mark.parametrize("options", [PLAIN, (None, 2.5), (Priority.BACKGROUND, None), (None, None)])
@virtual
async def test_one_array_takes_the_short_cut_and_is_what_the_long_way_makes_of_it(x: Any, options: Any) -> None:
    async with virtual_scheduler(slow_engine()) as scheduler:
        entrance = scheduler._entrance
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Entrance, "enter", None)
            short = entrance.come_in(x, *options, None, False, None, None)
        assert scheduler._main.arrivals == [short]
        long = entrance.enter(InferenceRequest(x), *options, None, False)
        named = entrance.enter({"x": x}, *options, None, False)
        assert fields(short) == fields(long) == fields(named)
        short.future.cancel()
        scheduler._abandon(short)


@pytest.mark.parametrize(
    ("request_", "options", "error"),
    [
        (numbered(0).astype(np.float64), {}, "input 'x': dtype float64, expected float32"),
        (np.zeros((1, 3), np.float32), {}, "input 'x': axis 1 is 3"),
        (np.zeros((0, 2), np.float32), {}, "input 'x': no rows on axis 0"),
        (np.zeros((33, 2), np.float32), {}, "33 rows, expected at most 32"),
        (numbered(0), {"timeout": 0.0}, "timeout: expected more than 0 seconds, got 0.0"),
        (numbered(0), {"timeout": -1.0}, "timeout: expected more than 0 seconds, got -1.0"),
        (numbered(0), {"timeout": float("nan")}, "timeout: expected more than 0 seconds, got nan"),
        (numbered(0), {"priority": 7}, "priority: expected one of"),
        (numbered(0), {"overflow": "newest"}, "overflow: expected one of"),
        (numbered(0), {"block_timeout": -1.0}, "block_timeout: expected at least 0 seconds, got -1.0"),
    ],
)
@virtual
async def test_what_is_not_valid_does_not_slip_through_it(request_: Any, options: Any, error: str) -> None:
    options = {"priority": Priority.THROUGHPUT, "timeout": 2.5, **options}
    async with virtual_scheduler(slow_engine()) as scheduler:
        with pytest.raises(InvalidInput, match=error.replace("(", r"\(")):
            await scheduler.infer(request_, **options)
        assert (scheduler.statistics().offered, scheduler.statistics().invalid) == (1, 1)


@virtual
async def test_nobody_enters_a_scheduler_that_closes() -> None:
    async with virtual_scheduler(slow_engine()) as scheduler:
        (first,) = await start(scheduler.infer(numbered(0), priority=Priority.THROUGHPUT, timeout=9.0))
        (closing,) = await start(scheduler.close())
        assert scheduler._entrance.phase is Phase.CLOSING
        with pytest.raises(Unavailable, match="the scheduler is closing"):
            await scheduler.infer(numbered(1), priority=Priority.THROUGHPUT, timeout=9.0)
        await closing
        assert first.done()
    with pytest.raises(Unavailable, match="the scheduler is closed"):
        await scheduler.infer(numbered(1), priority=Priority.THROUGHPUT, timeout=9.0)


# ------------------------------------------------------------------------------------ let in together


@virtual
async def test_whoever_looks_sees_who_has_just_arrived() -> None:
    async with virtual_scheduler(slow_engine()) as scheduler:
        (first,) = await start(scheduler.infer(numbered(0)))
        item = scheduler._entrance.come_in(numbered(1), *PLAIN, None, False, None, None)
        assert item.state is State.NEW
        figures = scheduler.statistics()
        assert (figures.offered, figures.queued, figures.running) == (2, 1, 1)
        another = scheduler._entrance.come_in(numbered(2), *PLAIN, None, False, None, None)
        assert scheduler.get_queue_depth() == (0, 3)
        await asyncio.gather(first, item.future, another.future)


@virtual
async def test_the_bound_holds_for_those_who_come_in_one_pass() -> None:
    """Two find room; of the others each hears so."""
    queue = QueuePolicy(max_size=2, overflow=QueueOverflowPolicy.DROP_NEWEST)
    async with virtual_scheduler(slow_engine(), queue=queue) as scheduler:
        tasks = await one_waits(scheduler, *(scheduler.infer(numbered(n)) for n in range(1, 6)))
        assert scheduler.statistics().queued == 2
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, Overloaded) for result in results] == [False] * 3 + [True] * 3
    figures = scheduler.statistics()
    assert (figures.offered, figures.refused, figures.succeeded) == (6, 3, 3)


@virtual
async def test_a_call_has_its_own_word_on_a_full_queue_among_those_who_come_with_it() -> None:
    queue = QueuePolicy(max_size=1)
    async with virtual_scheduler(slow_engine(), queue=queue, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        tasks = await one_waits(
            scheduler,
            scheduler.infer(numbered(1), priority=Priority.BACKGROUND),
            scheduler.infer(numbered(2), overflow="drop_oldest"),  # evicts the one before it
            scheduler.try_infer(numbered(3)),
            scheduler.infer(numbered(4), block_timeout=0.5),
            scheduler.infer(numbered(5)),  # waits as long as it takes
        )
        results = await asyncio.gather(*tasks, return_exceptions=True)
    came = ["answer" if not isinstance(result, Exception) else str(result).partition(":")[0] for result in results]
    assert came == [
        "answer",
        "evicted for a more urgent or newer request",
        "answer",
        "the queue is full",
        "there was no room in the queue in time",
        "answer",
    ]
    figures = scheduler.statistics()
    assert (figures.evicted, figures.refused, figures.succeeded) == (1, 2, 3)


@virtual
async def test_who_gives_up_before_they_were_let_in_changes_nothing_for_anybody_else() -> None:
    engine = slow_engine()
    async with virtual_scheduler(engine) as scheduler:
        (first,) = await start(scheduler.infer(numbered(0)))
        tasks = [asyncio.ensure_future(scheduler.infer(numbered(n))) for n in range(1, 4)]
        await asyncio.sleep(0)  # all have arrived; the loop's turn is next
        tasks[1].cancel()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert isinstance(results[2], asyncio.CancelledError)
    assert [answer.output[0, 0] for answer in (results[0], results[1], results[3])] == [0, 1, 3]
    assert sum(call.rows for call in engine.calls) == 3
    assert scheduler.statistics().cancelled == 1


async def test_another_thread_that_asks_for_figures_lets_nobody_in() -> None:
    async with Scheduler([FakeAsyncEngine(info=FIXED_INFO)]) as scheduler:
        item = scheduler._entrance.come_in(numbered(1), *PLAIN, None, False, None, None)
        with ThreadPoolExecutor() as elsewhere:
            assert elsewhere.submit(scheduler.statistics).result().offered == 0
            assert elsewhere.submit(scheduler.get_queue_depth).result() == (0, 0)
        assert item.state is State.NEW
        assert scheduler.get_queue_depth() == (0, 1)
        await item.future
