"""One request: what may be handed in, what comes back, how it is classed; and never waiting for room."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import (
    BatchPolicy,
    InferenceRequest,
    Priority,
    QueueOverflowPolicy,
    QueuePolicy,
    RequestMetadata,
    Scheduler,
    determine_priority,
)
from kapsl_scheduler.errors import DeadlineExceeded, InvalidInput, Overloaded, ResourceExhausted
from kapsl_scheduler.testing import FakeAsyncEngine
from tests.runtime.helpers import FIXED_INFO, numbered, start, virtual_scheduler
from tests.runtime.virtual import virtual


def slow(seconds: float = 0.01, **parameters: Any) -> FakeAsyncEngine:
    return FakeAsyncEngine(cost=lambda rows: seconds, **parameters)


@pytest.mark.parametrize(
    "request_",
    [
        numbered(7),
        {"x": numbered(7)},
        [[7, 0]],
        InferenceRequest(numbered(7)),
        InferenceRequest({"x": [[7.0, 0.0]]}),
    ],
)
@virtual
async def test_a_request_may_be_an_array_a_mapping_a_list_or_an_object(request_: Any) -> None:
    async with virtual_scheduler(FakeAsyncEngine()) as scheduler:
        response = await scheduler.infer(request_)
    assert np.array_equal(response.outputs["y"], numbered(7))


@virtual
async def test_a_bare_row_comes_back_without_the_batch_axis() -> None:
    async with virtual_scheduler(FakeAsyncEngine(info=FIXED_INFO)) as scheduler:
        response = await scheduler.infer(numbered(7)[0])
    assert response.output.shape == (2,)


@virtual
async def test_a_lone_request_reaches_the_engine_without_a_copy() -> None:
    engine = FakeAsyncEngine()
    x = numbered(1, rows=3)
    async with virtual_scheduler(engine) as scheduler:
        await scheduler.infer(x)
    assert engine.calls[0].inputs["x"] is x


@virtual
async def test_the_response_says_how_long_it_took_and_with_how_many() -> None:
    async with virtual_scheduler(slow()) as scheduler:
        first, *others = await start(*(scheduler.infer(numbered(n)) for n in range(3)))
        late = asyncio.ensure_future(scheduler.infer(numbered(9)))
        responses = [await caller for caller in (first, *others)]
        last = await late
    assert [response.batch_rows for response in responses] == [3, 3, 3]
    assert [response.queue_time for response in responses] == [0.0, 0.0, 0.0]
    assert responses[0].compute_time == pytest.approx(0.01)
    assert (last.queue_time, last.batch_rows) == (pytest.approx(0.01), 1)


@virtual
async def test_an_id_that_the_caller_gave_comes_back_and_another_is_made_when_asked_for() -> None:
    async with virtual_scheduler(FakeAsyncEngine()) as scheduler:
        given = await scheduler.infer(InferenceRequest(numbered(1), metadata=RequestMetadata(request_id="mine")))
        made = await scheduler.infer(numbered(1))
    assert given.request_id == "mine"
    assert made.request_id == made.request_id != "mine"


@virtual
async def test_an_idle_engine_starts_at_once_and_who_is_ready_then_shares_the_call() -> None:
    engine = slow()
    async with virtual_scheduler(engine) as scheduler:
        await asyncio.gather(*(scheduler.infer(numbered(n)) for n in range(5)))
    assert engine.batch_rows == [5]
    assert engine.calls[0].started == 0.0


@virtual
async def test_batches_form_while_the_engine_is_busy() -> None:
    engine = slow()
    async with virtual_scheduler(engine) as scheduler:
        await start(scheduler.infer(numbered(0)))
        await asyncio.gather(*(scheduler.infer(numbered(n)) for n in range(6)))
    assert engine.batch_rows == [1, 6]


@virtual
async def test_rows_of_different_shapes_take_turns() -> None:
    engine = slow()
    wide = np.ones((1, 5), np.float32)
    async with virtual_scheduler(engine) as scheduler:
        answers = await asyncio.gather(*(scheduler.infer(x) for x in (numbered(1), wide, numbered(2), wide)))
    assert [answer.output.shape for answer in answers] == [(1, 2), (1, 5), (1, 2), (1, 5)]
    assert [call.shapes["x"] for call in engine.calls] == [(2, 2), (2, 5)]


@virtual
async def test_every_member_gets_its_own_rows_in_order() -> None:
    async with virtual_scheduler(slow()) as scheduler:
        sent = [numbered(n, rows=1 + n % 3) for n in range(9)]
        answers = await asyncio.gather(*(scheduler.infer(x) for x in sent))
    assert all(np.array_equal(answer.output, x) for answer, x in zip(answers, sent, strict=True))


@virtual
async def test_the_more_urgent_class_goes_first() -> None:
    engine = slow()
    batch, queue = BatchPolicy(max_batch_size=1), QueuePolicy(shares=0.0)
    async with virtual_scheduler(engine, batch=batch, queue=queue) as scheduler:
        callers = await start(
            scheduler.infer(numbered(0)),
            *(scheduler.infer(numbered(1 + p), priority=p) for p in reversed(Priority)),
        )
        await asyncio.gather(*callers)
    assert [call.inputs["x"][0, 0] for call in engine.calls] == [0, 1, 2, 3]


@virtual
async def test_within_a_class_the_nearer_deadline_goes_first() -> None:
    engine = slow()
    async with virtual_scheduler(engine, batch=BatchPolicy(max_batch_size=1)) as scheduler:
        await asyncio.gather(
            scheduler.infer(numbered(0)),
            scheduler.infer(numbered(1)),
            scheduler.infer(numbered(2), timeout=0.9),
            scheduler.infer(numbered(3), timeout=0.5),
        )
    assert [call.inputs["x"][0, 0] for call in engine.calls] == [3, 2, 0, 1]


@virtual
async def test_the_delay_holds_only_what_is_not_live() -> None:
    engine = slow()
    batch = BatchPolicy(max_queue_delay=0.5)
    async with virtual_scheduler(engine, batch=batch) as scheduler:
        await scheduler.infer(numbered(0))
        assert asyncio.get_running_loop().time() == pytest.approx(0.01)
        low = Priority.THROUGHPUT
        await asyncio.gather(scheduler.infer(numbered(1), priority=low), scheduler.infer(numbered(2), priority=low))
        assert asyncio.get_running_loop().time() == pytest.approx(0.01 + 0.5 + 0.01)
    assert engine.batch_rows == [1, 2]


@virtual
async def test_the_delay_ends_when_something_more_urgent_arrives() -> None:
    engine = slow()
    async with virtual_scheduler(engine, batch=BatchPolicy(max_queue_delay=0.5)) as scheduler:
        callers = await start(scheduler.infer(numbered(1), priority=Priority.THROUGHPUT))
        await asyncio.sleep(0.1)
        await scheduler.infer(numbered(2))
        await asyncio.gather(*callers)
        assert asyncio.get_running_loop().time() <= 0.1 + 0.02 + 1e-9


# ------------------------------------------------------------------------------------------ class and keywords


@virtual
async def test_a_request_that_names_no_class_is_live() -> None:
    async with virtual_scheduler(FakeAsyncEngine()) as scheduler:
        await scheduler.infer(numbered(1))
        assert scheduler.statistics().classes["latency_critical"].succeeded == 1


@pytest.mark.parametrize(
    ("timeout", "rows", "expected"),
    [(0.1, 8, "latency_critical"), (None, 8, "throughput"), (None, 4, "latency_critical")],
)
@virtual
async def test_the_default_class_may_be_a_policy(timeout: float | None, rows: int, expected: str) -> None:
    def large(profile: Any) -> Priority:
        return determine_priority(type(profile)(sla_deadline=profile.sla_deadline, batch_size=profile.batch_size))

    async with virtual_scheduler(FakeAsyncEngine(), default_priority=large) as scheduler:
        await scheduler.infer(numbered(1, rows=rows), timeout=timeout)
        assert scheduler.statistics().classes[expected].succeeded == 1


@virtual
async def test_metadata_sets_the_class_and_the_timeout_and_keywords_beat_it() -> None:
    request = InferenceRequest(
        numbered(1), metadata=RequestMetadata(priority=Priority.BACKGROUND, timeout_ms=5, request_id="a")
    )
    async with virtual_scheduler(slow(0.01)) as scheduler:
        with pytest.raises(DeadlineExceeded):
            await scheduler.infer(request)
        await scheduler.infer(request, priority=Priority.THROUGHPUT, timeout=1.0)
        found = scheduler.statistics()
    assert (found.expired, found.classes["throughput"].succeeded) == (1, 1)


@pytest.mark.parametrize(
    ("inputs", "options", "says"),
    [
        (numbered(1)[None], {}, "rank 3"),
        (numbered(1).astype(np.float64), {}, "float64"),
        ({"z": numbered(1)}, {}, "'z'"),
        (numbered(1, rows=33), {}, "33 rows"),
        (numbered(1), {"timeout": 0.0}, "timeout"),
        (numbered(1), {"timeout": float("nan")}, "timeout"),
        (numbered(1), {"priority": 9}, "priority"),
        (numbered(1), {"priority": "urgent"}, "priority"),
        (numbered(1), {"overflow": "explode"}, "overflow"),
        (numbered(1), {"block_timeout": -1.0}, "block_timeout"),
        (InferenceRequest(numbered(1), metadata=RequestMetadata(timeout_ms=-1)), {}, "timeout_ms"),
    ],
)
@virtual
async def test_what_is_invalid_ends_at_the_door_and_is_counted(inputs: Any, options: Any, says: str) -> None:
    engine = FakeAsyncEngine()
    async with virtual_scheduler(engine) as scheduler:
        with pytest.raises(InvalidInput, match=says):
            await scheduler.infer(inputs, **options)
        found = scheduler.statistics()
    assert (found.offered, found.invalid, engine.calls) == (1, 1, [])


# ------------------------------------------------------------------------------------------------ full queues


@virtual
async def test_try_infer_is_answered_when_there_is_room() -> None:
    async with virtual_scheduler(slow()) as scheduler:
        response = await scheduler.try_infer(numbered(3), priority=Priority.THROUGHPUT, timeout=1.0)
    assert response.output[0, 0] == 3


@virtual
async def test_try_infer_never_waits_and_never_evicts() -> None:
    queue = QueuePolicy(max_size=1, overflow=QueueOverflowPolicy.DROP_OLDEST)
    async with virtual_scheduler(slow(), queue=queue) as scheduler:
        callers = await start(scheduler.infer(numbered(0)))
        callers += await start(scheduler.infer(numbered(1), priority=Priority.BACKGROUND))
        with pytest.raises(Overloaded) as caught:
            await scheduler.try_infer(numbered(2))
        assert asyncio.get_running_loop().time() == 0.0
        await asyncio.gather(*callers)
        found = scheduler.statistics()
    assert (found.refused, found.evicted, found.succeeded) == (1, 0, 2)
    assert caught.value.retry_after is not None


@virtual
async def test_who_waits_for_room_is_let_in_when_there_is_some() -> None:
    engine = slow()
    batch = BatchPolicy(max_batch_size=1)
    async with virtual_scheduler(engine, batch=batch, queue=QueuePolicy(max_size=1)) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in range(4)))
        assert scheduler.statistics().waiting == 2
        await asyncio.gather(*callers)
    assert [call.inputs["x"][0, 0] for call in engine.calls] == [0, 1, 2, 3]


@virtual
async def test_the_wait_for_room_ends_after_block_timeout() -> None:
    async with virtual_scheduler(slow(), queue=QueuePolicy(max_size=1, block_timeout=0.004)) as scheduler:
        callers = await start(scheduler.infer(numbered(0)))
        callers += await start(scheduler.infer(numbered(1)))
        with pytest.raises(Overloaded, match="in time"):
            await scheduler.infer(numbered(2))
        assert asyncio.get_running_loop().time() == pytest.approx(0.004)
        await asyncio.gather(*callers)
        assert scheduler.statistics().refused == 1


@virtual
async def test_the_block_timeout_of_a_call_beats_the_queues() -> None:
    async with virtual_scheduler(slow(), queue=QueuePolicy(max_size=1, block_timeout=0.001)) as scheduler:
        callers = await start(scheduler.infer(numbered(0)))
        callers += await start(scheduler.infer(numbered(1)), scheduler.infer(numbered(2), block_timeout=1.0))
        answers = await asyncio.gather(*callers)
    assert [answer.output[0, 0] for answer in answers] == [0, 1, 2]


@virtual
async def test_the_overflow_policy_of_a_call_beats_the_queues() -> None:
    async with virtual_scheduler(slow(), queue=QueuePolicy(max_size=1)) as scheduler:
        callers = await start(scheduler.infer(numbered(0)))
        callers += await start(scheduler.infer(numbered(1)))
        kept = await scheduler.infer(numbered(2), overflow=QueueOverflowPolicy.DROP_OLDEST)
        first, evicted = await asyncio.gather(*callers, return_exceptions=True)
        found = scheduler.statistics()
    assert kept.output[0, 0] == 2
    assert first.output[0, 0] == 0
    assert isinstance(evicted, Overloaded)
    assert "evicted" in str(evicted)
    assert (found.evicted, found.refused) == (1, 0)


@virtual
async def test_class_and_overflow_policy_may_be_given_by_name() -> None:
    async with virtual_scheduler(slow(), queue=QueuePolicy(max_size=1)) as scheduler:
        callers = await start(scheduler.infer(numbered(0), priority="throughput"))  # type: ignore[arg-type]
        callers += await start(scheduler.infer(numbered(1)))
        kept = await scheduler.infer(numbered(2), overflow="drop_oldest")  # type: ignore[arg-type]
        await asyncio.gather(*callers, return_exceptions=True)
        found = scheduler.statistics()
    assert kept.output[0, 0] == 2
    assert (found.classes["throughput"].succeeded, found.evicted) == (1, 1)


@virtual
async def test_a_request_larger_than_the_queue_ever_holds_is_told_so() -> None:
    async with virtual_scheduler(slow(), queue=QueuePolicy(max_bytes=16)) as scheduler:
        await scheduler.infer(numbered(1, rows=2))
        with pytest.raises(ResourceExhausted, match="24 bytes"):
            await scheduler.infer(numbered(1, rows=3))


# ---------------------------------------------------------------------------------------------- whose loop


async def test_a_call_from_another_loop_is_told_of_syncscheduler() -> None:
    async with Scheduler([FakeAsyncEngine()]) as scheduler:

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="SyncScheduler"):
                asyncio.run(scheduler.infer(numbered(1)))

        await asyncio.to_thread(elsewhere)
        assert scheduler.statistics().offered == 0


async def test_a_call_before_entering_is_told_how_to_enter() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await Scheduler([FakeAsyncEngine()]).infer(numbered(1))
