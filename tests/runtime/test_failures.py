"""A batch fails: the guilty is found alone, the others are answered, and retries stay within their budget."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import BatchPolicy, Priority, QueuePolicy
from kapsl_scheduler.errors import Backend, DeadlineExceeded, EngineError, InferenceError
from kapsl_scheduler.testing import FakeAsyncEngine, Fault, FaultPlan
from kapsl_scheduler.types import InferenceResponse, Tensors
from tests.runtime.helpers import numbered, start, virtual_scheduler
from tests.runtime.virtual import virtual

POISON = 13.0
CALL = 0.01


class PoisonError(Exception):
    """What poison makes the engine raise."""


def poisoned(error: Any = PoisonError) -> FakeAsyncEngine:
    return FakeAsyncEngine(cost=lambda rows: CALL, faults=FaultPlan(Fault(value=POISON, error=error)))


@virtual
async def test_a_bad_item_harms_only_itself() -> None:
    engine = poisoned()
    async with virtual_scheduler(engine) as scheduler:
        numbers = [1, 2, POISON, 3]
        answers = await asyncio.gather(*(scheduler.infer(numbered(n)) for n in numbers), return_exceptions=True)
        found = scheduler.statistics()
    assert [type(answer) for answer in answers] == [
        InferenceResponse,
        InferenceResponse,
        InferenceError,
        InferenceResponse,
    ]
    assert [answer.output[0, 0] for answer in answers if isinstance(answer, InferenceResponse)] == [1, 2, 3]
    assert engine.batch_rows == [4, 1, 1, 1, 1]
    assert (found.succeeded, found.failed, found.retried) == (3, 1, 4)


@virtual
async def test_what_the_engine_raised_is_the_cause() -> None:
    async with virtual_scheduler(poisoned(PoisonError("too bitter"))) as scheduler:
        with pytest.raises(InferenceError, match="PoisonError: too bitter") as caught:
            await scheduler.infer(numbered(POISON))
    assert isinstance(caught.value.__cause__, PoisonError)


@virtual
async def test_an_engine_error_keeps_its_type() -> None:
    async with virtual_scheduler(poisoned(Backend("the driver is gone"))) as scheduler:
        with pytest.raises(Backend, match="the driver is gone"):
            await scheduler.infer(numbered(POISON))


@virtual
async def test_each_caller_gets_an_error_of_its_own() -> None:
    engine = poisoned()
    engine.retry = False
    async with virtual_scheduler(engine) as scheduler:
        answers = await asyncio.gather(*(scheduler.infer(numbered(POISON)) for _ in range(3)), return_exceptions=True)
    assert len({id(answer) for answer in answers}) == 3


@virtual
async def test_a_lone_request_that_fails_is_not_run_again() -> None:
    engine = poisoned()
    async with virtual_scheduler(engine) as scheduler:
        with pytest.raises(InferenceError):
            await scheduler.infer(numbered(POISON, rows=4))
    assert engine.batch_rows == [4]


@virtual
async def test_an_engine_whose_calls_have_effects_is_not_called_again() -> None:
    engine = poisoned()
    engine.retry = False
    async with virtual_scheduler(engine) as scheduler:
        answers = await asyncio.gather(*(scheduler.infer(numbered(n)) for n in (1, POISON)), return_exceptions=True)
        assert scheduler.statistics().failed == 2
    assert [type(answer) for answer in answers] == [InferenceError, InferenceError]
    assert engine.batch_rows == [2]


@virtual
async def test_beyond_the_retry_budget_members_fail_with_the_error_of_their_batch() -> None:
    """100 retries are saved up at the start; ten more a second do not matter here."""
    engine = FakeAsyncEngine(cost=lambda rows: 1e-6, faults=FaultPlan(Fault(error=PoisonError)))
    async with virtual_scheduler(engine) as scheduler:
        for _ in range(8):
            await scheduler.infer_many([numbered(1)] * 32, return_exceptions=True)
        found = scheduler.statistics()
        assert (found.retried, found.failed, len(engine.calls)) == (100, 8 * 32, 8 + 100)
        await asyncio.sleep(2)
        await scheduler.infer_many([numbered(1)] * 32, return_exceptions=True)
        assert scheduler.statistics().retried == 120


@virtual
async def test_members_come_back_in_front_of_their_class_and_behind_a_higher_one() -> None:
    engine = poisoned()
    queue = QueuePolicy(shares=0.0)
    low = Priority.THROUGHPUT
    async with virtual_scheduler(engine, batch=BatchPolicy(max_batch_size=2), queue=queue) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n), priority=low) for n in (1, POISON)))
        callers += await start(scheduler.infer(numbered(5), priority=low), scheduler.infer(numbered(6)))
        await asyncio.gather(*callers, return_exceptions=True)
    assert [call.inputs["x"][0, 0] for call in engine.calls] == [1, 6, 1, POISON, 5]
    assert engine.batch_rows == [2, 1, 1, 1, 1]


@virtual
async def test_a_member_that_came_back_still_has_its_deadline() -> None:
    async with virtual_scheduler(poisoned()) as scheduler:
        callers = await start(
            scheduler.infer(numbered(POISON)), scheduler.infer(numbered(1), timeout=0.5), scheduler.infer(numbered(2))
        )
        late = await start(scheduler.infer(numbered(3), timeout=1.5 * CALL))
        answers = await asyncio.gather(*callers, *late, return_exceptions=True)
    assert [type(answer) for answer in answers] == [
        InferenceError,
        InferenceResponse,
        InferenceResponse,
        DeadlineExceeded,
    ]


@virtual
async def test_a_member_that_came_back_can_be_cancelled() -> None:
    engine = poisoned()
    async with virtual_scheduler(engine) as scheduler:
        callers = await start(*(scheduler.infer(numbered(n)) for n in (POISON, 1, 2)))
        await asyncio.sleep(1.5 * CALL)  # the first of them runs alone
        callers[2].cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        found = scheduler.statistics()
    assert engine.batch_rows == [3, 1, 1]
    assert (found.succeeded, found.failed, found.cancelled) == (1, 1, 1)


# ----------------------------------------------------------------------------- outputs that are no answer


class OddEngine(FakeAsyncEngine):
    """Returns what it is told to."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self._outputs = outputs

    async def infer(self, inputs: Tensors) -> Any:
        return self._outputs


@pytest.mark.parametrize(
    "outputs",
    [None, 5, {"y": np.zeros((7, 2), np.float32)}, {"y": np.float32(1)}, {"y": "text"}],
    ids=["nothing", "a number", "other rows", "a scalar", "text"],
)
@pytest.mark.parametrize("callers", [1, 2])
@virtual
async def test_outputs_that_do_not_fit_the_batch_are_the_engines_failure(outputs: Any, callers: int) -> None:
    async with virtual_scheduler(OddEngine(outputs)) as scheduler:
        answers = await asyncio.gather(*(scheduler.infer(numbered(n)) for n in range(callers)), return_exceptions=True)
        found = scheduler.statistics()
    assert all(isinstance(answer, EngineError) for answer in answers), answers
    assert (found.failed, found.running) == (callers, 0)


class CancellingEngine(FakeAsyncEngine):
    """What it awaits was cancelled by somebody else."""

    async def infer(self, inputs: Tensors) -> Tensors:
        if inputs["x"][0, 0] == POISON:
            raise asyncio.CancelledError
        return await super().infer(inputs)


@virtual
async def test_a_cancellation_inside_the_engine_is_a_failure_and_not_the_end_of_the_slot() -> None:
    async with virtual_scheduler(CancellingEngine()) as scheduler:
        with pytest.raises(InferenceError):
            await scheduler.infer(numbered(POISON), timeout=1.0)
        assert (await scheduler.infer(numbered(1), timeout=1.0)).output[0, 0] == 1
