"""How one run goes: its requests, its hooks, its time, its attempts."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import (
    Backend,
    Firing,
    InferenceError,
    InferenceRequest,
    InferenceResponse,
    InvalidInput,
    RunPolicy,
    RunState,
    Scheduler,
    Unavailable,
)
from kapsl_scheduler.testing import FakeAsyncEngine, Fault, FaultPlan
from tests.runtime.cron import Target, X, a_job, at, counts, cron_over, history, run_ended
from tests.runtime.helpers import until_async
from tests.runtime.virtual import virtual, with_threads

OK = ("succeeded", "")


class Heard:
    """A callback that notes what it is told."""

    def __init__(self) -> None:
        self.results: list[Any] = []

    async def __call__(self, id: str, result: Any) -> None:
        self.results.append(result)


def outcome(run: Any) -> tuple[str, str]:
    return run.state.value, run.reason


# -------------------------------------------------------------------------------------------- requests


@virtual
async def test_a_fixed_request_is_copied_once() -> None:
    target, x = Target(), np.ones((1, 2), np.float32)
    async with cron_over(target) as cron:
        await cron.register(a_job(request={"x": x}))
        x[:] = 7
        await run_ended(cron)
        await run_ended(cron)
    first, second = (call.request["x"] for call in target.calls)
    assert first.tolist() == [[1, 1]]
    assert first is second
    assert not first.flags.writeable


@virtual
async def test_sizes_and_times_are_recorded() -> None:
    async with cron_over(Target(seconds=2.5)) as cron:
        await cron.register(a_job(request=InferenceRequest({"x": X}, session_id="s")))
        await asyncio.sleep(70)
        (run,) = await cron.runs("job")
        assert (run.requests, run.rows, run.failed_requests) == (1, 1, 0)
        assert run.input_bytes == 8
        assert run.output_bytes > 0
        assert (run.nominal, run.due, run.started, run.ended) == (at(60), at(60), at(60), at(62.5))
        assert (run.duration, run.count, run.attempt, run.progress) == (2.5, 1, 1, None)
        info = await cron.job_info("job")
        assert info is not None
        assert (info.last_firing, info.last_outcome, info.last_duration) == (at(60), RunState.SUCCEEDED, 2.5)
        assert (info.fired_count, info.missed_count, info.running) == (1, 0, 0)


@virtual
async def test_a_coroutine_function_makes_the_request_of_a_firing() -> None:
    target, heard = Target(), Heard()
    firings: list[Firing] = []

    async def make(firing: Firing) -> Any:
        firings.append(firing)
        return X * len(firings)

    async with cron_over(target) as cron:
        await cron.register(a_job(request=make, on_result=heard))
        await asyncio.sleep(130)
    assert firings == [Firing("job", at(60), "schedule", 1), Firing("job", at(120), "schedule", 1)]
    assert [call.request.tolist() for call in target.calls] == [[[1, 1]], [[2, 2]]]
    assert heard.results[0].outputs["y"].tolist() == [[1, 1]]


@virtual
async def test_a_list_of_requests_has_a_list_of_answers() -> None:
    target, heard = Target(seconds=1), Heard()

    async def make(firing: Firing) -> list[Any]:
        return [X * number for number in range(10)]

    async with cron_over(target) as cron:
        await cron.register(a_job(request=make, on_result=heard, run=RunPolicy(max_in_flight=3)))
        await asyncio.sleep(100)
        (run,) = await cron.runs("job")
        assert (outcome(run), run.requests, run.rows) == (OK, 10, 10)
    assert [answer.outputs["y"][0, 0] for answer in heard.results[0]] == list(range(10))
    assert target.most == 3


@virtual
async def test_nothing_to_do_is_a_success() -> None:
    target, heard = Target(), Heard()

    async def nothing(firing: Firing) -> None: ...

    async def empty(firing: Firing) -> list[Any]:
        return []

    async with cron_over(target) as cron:
        await cron.register(a_job(request=nothing, on_result=heard))
        await cron.register(a_job("empty", request=empty, on_result=heard))
        assert outcome(await run_ended(cron)) == ("succeeded", "nothing to do")
        assert outcome(await run_ended(cron, "empty")) == ("succeeded", "nothing to do")
    assert heard.results == [None, []]
    assert target.calls == []


@virtual
async def test_an_async_generator_streams_requests_without_keeping_answers() -> None:
    target, heard, closed = Target(), Heard(), []

    async def make(firing: Firing) -> AsyncIterator[Any]:
        try:
            for number in range(1000):
                yield X * number
        finally:
            closed.append(True)

    async with cron_over(target) as cron:
        await cron.register(a_job(request=make, on_result=heard))
        run = await run_ended(cron)
        assert (outcome(run), run.requests) == (OK, 1000)
    assert heard.results == [None]
    assert closed == [True]
    assert target.most <= 64


@with_threads
async def test_plain_functions_are_called_in_threads() -> None:
    target, heard, threads = Target(), Heard(), set()

    def make(firing: Firing) -> Any:
        threads.add(threading.current_thread().name)
        return X

    def plain(id: str, result: Any) -> None:
        threads.add(threading.current_thread().name)
        heard.results.append(id)

    async with cron_over(target) as cron:
        await cron.register(a_job(request=make, on_result=plain, condition=lambda firing: True))
        assert outcome(await run_ended(cron)) == OK
    assert threads == {"kapsl-call-make", "kapsl-call-plain"}
    assert heard.results == ["job"]


@with_threads
async def test_a_plain_generator_is_taken_in_threads_a_chunk_ahead() -> None:
    target, here, threads, closed = Target(), threading.get_ident(), set(), threading.Event()

    def make(firing: Firing) -> Iterator[Any]:
        try:
            for number in range(200):
                threads.add(threading.get_ident())
                yield X * number
        finally:
            closed.set()

    async with cron_over(target) as cron:
        await cron.register(a_job(request=make))
        run = await run_ended(cron)
        assert (outcome(run), run.requests) == (OK, 200)
        await until_async(closed.is_set)
    assert here not in threads
    assert [call.request[0, 0] for call in target.calls] == list(range(200))


@with_threads
async def test_a_plain_function_may_return_a_coroutine_or_a_partial_be_one() -> None:
    async def later() -> Any:
        return X

    async def two(extra: Any, firing: Firing) -> Any:
        return X

    async with cron_over() as cron:
        await cron.register(a_job(request=lambda firing: later()))
        await cron.register(a_job("partial", request=functools.partial(two, 1)))
        assert outcome(await run_ended(cron)) == OK
        assert outcome(await run_ended(cron, "partial")) == OK


@with_threads
async def test_a_plain_function_that_hangs_costs_nobody_but_itself() -> None:
    go_on = threading.Event()
    async with cron_over() as cron:
        await cron.register(a_job("hangs", request=lambda firing: go_on.wait(), run=RunPolicy(timeout=5)))
        await cron.register(a_job("other"))
        assert outcome(await run_ended(cron, "hangs")) == ("failed", "timeout")
        assert outcome(await run_ended(cron, "other")) == OK
    go_on.set()


@pytest.mark.parametrize(
    ("raises", "error"),
    [
        (SystemExit, "RuntimeError: <function"),
        (StopIteration, "RuntimeError: <function"),
        (asyncio.CancelledError, "RuntimeError: <function"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
@with_threads
async def test_whatever_a_plain_function_raises_is_an_error_of_its_run(raises: Any, error: str) -> None:
    def make(firing: Firing) -> Any:
        raise raises

    async with cron_over() as cron:
        await cron.register(a_job(request=make))
        run = await run_ended(cron)
        assert outcome(run) == ("failed", "error")
        assert run.error.startswith(error)


@virtual
async def test_a_cancellation_that_comes_from_within_is_a_failure() -> None:
    async def make(firing: Firing) -> Any:
        raise asyncio.CancelledError

    async with cron_over() as cron:
        await cron.register(a_job(request=make, run=RunPolicy(attempts=2)))
        await cron.register(a_job("callback", on_result=lambda id, result: None))
        run = await run_ended(cron)
        assert (outcome(run), run.attempt) == (("failed", "cancelled"), 2)
        assert run.error == "RuntimeError: something that the run awaited was cancelled"


# ------------------------------------------------------------------------------------------- on_result


@virtual
async def test_on_result_hears_the_answer_or_the_error_but_nothing_of_a_skipped_firing() -> None:
    heard = Heard()
    target = Target(does=lambda number: [0.0, InferenceError("no"), 100.0][number - 1])
    async with cron_over(target) as cron:
        await cron.register(a_job(on_result=heard))
        await asyncio.sleep(245)
        assert [state for _, state, _ in await history(cron)] == ["succeeded", "failed", "running", "skipped"]
    answer, error = heard.results[:2]
    assert isinstance(answer, InferenceResponse)
    assert isinstance(error, InferenceError)


@pytest.mark.parametrize("is_async", [True, False])
@with_threads
async def test_a_callback_that_raises_is_recorded_and_harms_nobody(is_async: bool) -> None:
    def plain(id: str, result: Any) -> None:
        raise KeyError("what")

    async def coroutine(id: str, result: Any) -> None:
        plain(id, result)

    async with cron_over() as cron:
        await cron.register(a_job(on_result=coroutine if is_async else plain))
        run = await run_ended(cron)
        assert (outcome(run), run.error, run.callback_error) == (OK, "", "KeyError: 'what'")
        assert (await run_ended(cron)).number == 2


@virtual
async def test_a_callback_that_hangs_is_left_after_half_a_minute() -> None:
    async def hang(id: str, result: Any) -> None:
        await asyncio.Event().wait()

    async with cron_over() as cron:
        await cron.register(a_job(on_result=hang))
        await cron.register(a_job("limited", on_result=hang, run=RunPolicy(timeout=2)))
        run = await run_ended(cron)
        assert (outcome(run), run.duration, run.callback_error) == (OK, 30, "TimeoutError")
        run = await run_ended(cron, "limited")
        assert (outcome(run), run.duration) == (OK, 2)


@virtual
async def test_a_callback_after_a_timeout_has_half_a_second() -> None:
    async def hang(id: str, result: Any) -> None:
        await asyncio.sleep(0.7)

    async with cron_over(Target(does=lambda number: None)) as cron:
        await cron.register(a_job(on_result=hang, run=RunPolicy(timeout=2)))
        run = await run_ended(cron)
        assert (outcome(run), run.duration, run.callback_error) == (("failed", "timeout"), 2.5, "TimeoutError")


@virtual
async def test_a_callback_that_is_cut_short_takes_nothing_from_its_run() -> None:
    async def hang(id: str, result: Any) -> None:
        await asyncio.Event().wait()

    async with cron_over() as cron:
        await cron.register(a_job(on_result=hang))
        await cron.trigger("job")
        await asyncio.sleep(1)
        await cron.close(drain=0)
        assert await counts(cron) == {"succeeded": 1}


@virtual
async def test_a_cancellation_within_a_callback_is_the_callbacks_own() -> None:
    async def odd(id: str, result: Any) -> None:
        raise asyncio.CancelledError

    async with cron_over() as cron:
        await cron.register(a_job(on_result=odd))
        run = await run_ended(cron)
        assert (outcome(run), run.callback_error) == (OK, "something that it awaited was cancelled")


# ------------------------------------------------------------------------------------------- condition


@virtual
async def test_a_condition_is_asked_first() -> None:
    target, heard, answers = Target(), Heard(), [False, True, 0]

    async def condition(firing: Firing) -> Any:
        return answers.pop(0)

    async with cron_over(target) as cron:
        await cron.register(a_job(condition=condition, on_result=heard))
        assert outcome(await run_ended(cron)) == ("skipped", "condition")
        assert outcome(await run_ended(cron)) == OK
        assert outcome(await run_ended(cron)) == ("skipped", "condition")
    assert len(target.calls) == len(heard.results) == 1


@virtual
async def test_a_condition_that_raises_says_no_and_is_recorded() -> None:
    async def condition(firing: Firing) -> bool:
        raise OSError("no disk")

    async with cron_over() as cron:
        await cron.register(a_job(condition=condition))
        run = await run_ended(cron)
        assert (outcome(run), run.error) == (("skipped", "condition"), "OSError: no disk")


@virtual
async def test_a_firing_that_has_begun_is_not_asked_about_again() -> None:
    answers = [True, False]

    async def condition(firing: Firing) -> bool:
        return answers.pop(0)

    async with cron_over(Target(does=lambda number: InferenceError("no"))) as cron:
        await cron.register(a_job(condition=condition, run=RunPolicy(attempts=3)))
        run = await run_ended(cron)
        assert (outcome(run), run.attempt) == (("failed", "inference_error"), 3)


# ----------------------------------------------------------------------------------- timeouts, attempts


@virtual
async def test_a_run_ends_within_a_second_of_its_timeout_when_its_engine_hangs() -> None:
    engine = FakeAsyncEngine(faults=FaultPlan(Fault(calls={1}, hang=True)))
    loop = asyncio.get_running_loop()
    async with Scheduler([engine], clock=loop.time) as scheduler, cron_over(scheduler) as cron:
        await cron.register(a_job(run=RunPolicy(timeout=5)))
        run = await run_ended(cron)
        assert outcome(run) == ("failed", "timeout")
        assert run.duration is not None
        assert 5 <= run.duration <= 6
        engine.release()


@virtual
async def test_the_timeout_bounds_all_attempts_together() -> None:
    target = Target(does=lambda number: Unavailable("gone"))
    async with cron_over(target) as cron:
        await cron.register(a_job(run=RunPolicy(timeout=10, attempts=100, backoff=1)))
        run = await run_ended(cron)
        assert (outcome(run), run.duration, run.attempt) == (("failed", "timeout"), 10, 4)
        assert run.error == "TimeoutError: the run took longer than its timeout of 10 s"
    assert target.times == [0, 1, 3, 7]


@virtual
async def test_attempts_wait_twice_as_long_each_time() -> None:
    target = Target(does=lambda number: Backend("driver") if number < 6 else 0.0)
    async with cron_over(target) as cron:
        await cron.register(a_job(run=RunPolicy(attempts=6, backoff=2, max_backoff=9)))
        run = await run_ended(cron)
        assert (outcome(run), run.attempt, run.requests, run.failed_requests) == (OK, 6, 6, 5)
        assert await counts(cron) == {"succeeded": 1}
        info = await cron.job_info("job")
        assert info is not None
        assert info.fired_count == 1
    assert target.times == [0, 2, 6, 14, 23, 32]


@virtual
async def test_very_many_attempts_are_no_trouble() -> None:
    target = Target(does=lambda number: Backend("driver"))
    async with cron_over(target) as cron:
        await cron.register(a_job(run=RunPolicy(attempts=1100, max_backoff=1)))
        assert (await run_ended(cron)).attempt == 1100


class Fleeting(Exception):
    """Nobody knows whether it passes."""


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (Unavailable("x"), True),
        (InferenceError("x"), True),
        (Fleeting("x"), True),
        (InvalidInput("x"), False),
        (ValueError("x"), False),
        (TypeError("x"), False),
    ],
)
@virtual
async def test_only_what_may_pass_is_tried_again(error: Exception, again: bool) -> None:
    target = Target(does=lambda number: error)
    async with cron_over(target) as cron:
        await cron.register(a_job(run=RunPolicy(attempts=2)))
        run = await run_ended(cron)
        assert run.state is RunState.FAILED
        assert run.reason == getattr(error, "code", "error")
        assert run.error == f"{type(error).__name__}: x"
    assert len(target.calls) == 1 + again


@virtual
async def test_a_run_goes_on_under_the_definition_it_began_with() -> None:
    target = Target(seconds=10)
    async with cron_over(target) as cron:
        await cron.register(a_job())
        await asyncio.sleep(61)
        await cron.update(a_job(schedule=30, request=X * 2))
        await asyncio.sleep(30)
    assert [call.request[0, 0] for call in target.calls] == [1, 2]


@virtual
async def test_an_error_of_the_scheduler_itself_ends_its_run(caplog: pytest.LogCaptureFixture) -> None:
    class Odd:
        broken = False

        def target(self, model: str) -> Any:
            if self.broken:
                raise SystemError("what now")

    odd = Odd()
    async with cron_over(odd) as cron:
        await cron.register(a_job(model="m"))
        odd.broken = True
        run = await run_ended(cron)
        assert (outcome(run), run.error) == (("failed", "error"), "SystemError: what now")
