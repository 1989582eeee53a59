"""SyncScheduler: the whole of the API from plain threads, and its end."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import Priority, QueuePolicy, SyncScheduler
from kapsl_scheduler.errors import DeadlineExceeded, InferenceError, ModelLoadError, Overloaded, Unavailable
from kapsl_scheduler.testing import FakeAsyncEngine, FakeEngine, Fault, FaultPlan
from kapsl_scheduler.types import InferenceResponse
from tests.runtime.helpers import numbered, until

POISON = 13.0


def hanging(*calls: int) -> FakeEngine:
    return FakeEngine(faults=FaultPlan(Fault(calls=set(calls or (1,)), hang=True)))


def test_infer_blocks_and_answers() -> None:
    with SyncScheduler([FakeEngine()]) as scheduler:
        response = scheduler.infer(numbered(7), priority=Priority.THROUGHPUT, timeout=10)
    assert np.array_equal(response.output, numbered(7))


def test_infer_raises_what_the_scheduler_raises() -> None:
    engine = FakeEngine(faults=FaultPlan(Fault(value=POISON, error=ValueError)))
    with SyncScheduler([engine]) as scheduler, pytest.raises(InferenceError) as caught:
        scheduler.infer(numbered(POISON))
    assert isinstance(caught.value.__cause__, ValueError)


def test_try_infer_never_waits_for_room() -> None:
    engine = hanging()
    with SyncScheduler([engine], queue=QueuePolicy(max_size=1)) as scheduler:
        first = scheduler.submit(numbered(1))
        until(lambda: engine.in_flight)
        second = scheduler.submit(numbered(2))
        until(lambda: scheduler.statistics().queued)
        with pytest.raises(Overloaded):
            scheduler.try_infer(numbered(3))
        engine.release()
        assert [future.result(5).output[0, 0] for future in (first, second)] == [1, 2]


def test_infer_many_keeps_the_order() -> None:
    with SyncScheduler([FakeEngine()]) as scheduler:
        answers = scheduler.infer_many([numbered(n) for n in range(50)], return_exceptions=True)
    assert [answer.output[0, 0] for answer in answers] == list(range(50))


def test_submit_from_many_threads() -> None:
    with SyncScheduler([FakeEngine(), FakeEngine()]) as scheduler:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            futures = list(pool.map(lambda n: scheduler.submit(numbered(n)), range(200)))
        assert [future.result(5).output[0, 0] for future in futures] == list(range(200))


def test_cancelling_the_future_cancels_the_request() -> None:
    engine = hanging()
    with SyncScheduler([engine]) as scheduler:
        first = scheduler.submit(numbered(1))
        until(lambda: engine.in_flight)
        second = scheduler.submit(numbered(2))
        until(lambda: scheduler.statistics().queued)
        assert second.cancel()
        until(lambda: not scheduler.statistics().queued)
        engine.release()
        first.result(5)
        assert scheduler.statistics().cancelled == 1
    assert len(engine.calls) == 1


def test_a_timeout_is_kept_though_the_engine_hangs() -> None:
    engine = hanging()
    with SyncScheduler([engine]) as scheduler:
        with pytest.raises(DeadlineExceeded):
            scheduler.infer(numbered(1), timeout=0.01)
        engine.release()


def test_infer_stream_is_a_plain_iterator() -> None:
    with SyncScheduler([FakeEngine(chunks=40)]) as scheduler:
        chunks = list(scheduler.infer_stream(numbered(5)))
    assert [chunk.output[0, 0] for chunk in chunks] == [5] * 40


def test_closing_the_iterator_closes_the_stream() -> None:
    with SyncScheduler([FakeEngine(chunks=10**9)]) as scheduler:
        stream: Any = scheduler.infer_stream(numbered(5))
        assert isinstance(next(stream), InferenceResponse)
        stream.close()
        assert scheduler.statistics().cancelled == 1


def test_a_stream_left_open_ends_with_the_scheduler() -> None:
    with SyncScheduler([FakeEngine(chunks=10**9)]) as scheduler:
        stream: Any = scheduler.infer_stream(numbered(5))
        next(stream)
        scheduler.close(drain=0)
        with pytest.raises(Unavailable):
            list(stream)


def test_an_asynchronous_engine_runs_on_the_schedulers_loop() -> None:
    engine = FakeAsyncEngine()
    with SyncScheduler([engine]) as scheduler:
        scheduler.infer(numbered(1))
    assert engine.calls[0].thread == scheduler._thread.ident


def test_reports() -> None:
    with SyncScheduler([FakeEngine()]) as scheduler:
        scheduler.infer(numbered(1, rows=3))
        assert scheduler.model_info().name == "fake"
        assert scheduler.health().ready
        assert scheduler.metrics().rows == 3
        assert scheduler.get_queue_depth() == (0, 0)
        assert scheduler.statistics().succeeded == 1
        assert repr(scheduler) == "<SyncScheduler 'fake' ready: 0 queued, 0 running, 0 calls in flight of 1 slots>"
    assert scheduler.statistics().succeeded == 1
    assert repr(scheduler) == "<SyncScheduler closed>"


# ----------------------------------------------------------------------------------------------- its end


def test_a_load_error_is_raised_on_entering_and_leaves_no_thread() -> None:
    class Broken(FakeEngine):
        def load(self) -> None:
            raise OSError("no such file")

    with pytest.raises(ModelLoadError, match="no such file"), SyncScheduler([Broken()]):
        pass


def test_leaving_by_an_exception_does_not_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kapsl_scheduler.runtime.scheduler.HUNG_AFTER", 0.01)
    engine = hanging()
    futures: list[concurrent.futures.Future[Any]] = []

    def left_by_an_exception() -> None:
        with SyncScheduler([engine]) as scheduler:
            futures.extend(scheduler.submit(numbered(n)) for n in range(2))
            until(lambda: engine.in_flight)
            raise KeyError

    with pytest.raises(KeyError):
        left_by_an_exception()
    engine.release()
    assert all(isinstance(future.exception(5), Unavailable) for future in futures)


def test_closing_twice_and_from_two_threads_does_nothing_more() -> None:
    scheduler = SyncScheduler([FakeEngine()])
    with scheduler:
        threads = [threading.Thread(target=scheduler.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        scheduler.close()
    assert not any(thread.is_alive() for thread in threads)


def test_a_second_close_cuts_the_drain_of_the_first_short() -> None:
    engine = hanging()
    with SyncScheduler([engine]) as scheduler:
        future = scheduler.submit(numbered(1))
        until(lambda: engine.in_flight)
        first = threading.Thread(target=scheduler.close, args=(60.0,))
        first.start()
        until(lambda: scheduler.health().status == "closing")
        second = threading.Thread(target=scheduler.close, args=(0.0,))
        second.start()
        assert isinstance(future.exception(5), Unavailable)
        engine.release()
        for thread in (first, second):
            thread.join(5)
            assert not thread.is_alive()


def test_calls_after_the_end_are_unavailable() -> None:
    with SyncScheduler([FakeEngine()]) as scheduler:
        pass
    for call in (scheduler.infer, scheduler.submit, scheduler.try_infer):
        with pytest.raises(Unavailable):
            call(numbered(1))


def test_calls_before_it_was_entered_are_told_how() -> None:
    scheduler = SyncScheduler([FakeEngine()])
    for call in (scheduler.infer, scheduler.submit, scheduler.try_infer):
        with pytest.raises(RuntimeError, match="with SyncScheduler"):
            call(numbered(1))
    scheduler.close()


def test_it_is_entered_once() -> None:
    scheduler = SyncScheduler([FakeEngine()])
    with scheduler, pytest.raises(RuntimeError, match="once"):
        scheduler.__enter__()


def test_a_call_from_its_own_loops_thread_is_an_error_and_no_deadlock() -> None:
    heard: list[BaseException] = []

    class Curious:
        def on_call(self, **figures: Any) -> None:
            assert scheduler.statistics().calls == 1
            try:
                scheduler.infer(numbered(2))
            except RuntimeError as error:
                heard.append(error)

    scheduler = SyncScheduler([FakeEngine()], observer=Curious())
    with scheduler:
        scheduler.infer(numbered(1))
        scheduler.metrics()  # the observer is told after the answer was given
    assert "own loop's thread" in str(heard[0])


def test_nobody_waits_for_ever_when_calls_race_with_the_end() -> None:
    for _ in range(20):
        scheduler = SyncScheduler([FakeEngine()])
        outcomes: list[str] = []
        gone = threading.Event()

        def call(scheduler: SyncScheduler, outcomes: list[str], gone: threading.Event) -> None:
            while not gone.is_set():
                try:
                    scheduler.submit(numbered(1)).result(5)
                except Unavailable:
                    gone.set()
                    outcomes.append("unavailable")

        with scheduler:
            threads = [threading.Thread(target=call, args=(scheduler, outcomes, gone)) for _ in range(4)]
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join(5)
        assert not any(thread.is_alive() for thread in threads)
        assert outcomes
