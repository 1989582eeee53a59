"""SyncScheduler: the same scheduler for callers without an event loop, on a loop thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from kapsl_scheduler.errors import Unavailable
from kapsl_scheduler.runtime.metrics import SchedulerHealth, SchedulerStatistics
from kapsl_scheduler.runtime.scheduler import DRAIN, Scheduler
from kapsl_scheduler.types import EngineMetrics, InferenceResponse, ModelInfo

__all__ = ["SyncScheduler"]

T = TypeVar("T")


class SyncScheduler:
    """A `Scheduler` behind plain calls, usable from any thread. Takes `Scheduler`'s parameters.

    Use it with `with`: entering starts the loop's thread and loads the engines, leaving drains and closes. Calls raise
    `RuntimeError` before it was entered and `Unavailable` after it was closed.
    """

    def __init__(self, engines: Iterable[Any], **parameters: Any) -> None:
        self._scheduler = Scheduler(engines, **parameters)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="kapsl-loop", daemon=True)
        self._door = threading.Lock()  # held while work is handed to the loop, so that none comes after its end
        self._ended = False

    def __repr__(self) -> str:
        return f"<Sync{self._ask(self._scheduler.__repr__)[1:]}"

    def __enter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError("each SyncScheduler is entered once")
        self._loop = asyncio.new_event_loop()
        self._thread.start()
        try:
            self._run(self._scheduler.__aenter__)
        except BaseException:
            self._end_loop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=DRAIN if error is None else 0.0)

    def infer(self, request: Any, **options: Any) -> InferenceResponse:
        """`Scheduler.infer`, blocking. Takes its keywords and raises its errors."""
        return self._run(lambda: self._scheduler.infer(request, **options))

    def try_infer(self, request: Any, **options: Any) -> InferenceResponse:
        """`Scheduler.try_infer`, blocking."""
        return self._run(lambda: self._scheduler.try_infer(request, **options))

    def submit(self, request: Any, **options: Any) -> concurrent.futures.Future[InferenceResponse]:
        """`Scheduler.infer` as a future; cancelling the future cancels the request."""
        return self._send(lambda: self._scheduler.infer(request, **options))

    def infer_many(self, requests: Iterable[Any], **options: Any) -> list[Any]:
        """`Scheduler.infer_many`, blocking."""
        return self._run(lambda: self._scheduler.infer_many(requests, **options))

    def infer_stream(self, request: Any, **options: Any) -> Iterator[InferenceResponse]:
        """`Scheduler.infer_stream` as a plain iterator; closing it closes the stream."""
        stream = self._scheduler.infer_stream(request, **options)
        try:
            while (chunk := self._run(lambda: _anext_or_none(stream))) is not None:
                yield chunk
        finally:
            with suppress(Unavailable):
                self._run(stream.aclose)

    def statistics(self) -> SchedulerStatistics:
        """`Scheduler.statistics`."""
        return self._ask(self._scheduler.statistics)

    def metrics(self) -> EngineMetrics:
        """`Scheduler.metrics`."""
        return self._ask(self._scheduler.metrics)

    def model_info(self) -> ModelInfo:
        """`Scheduler.model_info`."""
        return self._ask(self._scheduler.model_info)

    def health(self) -> SchedulerHealth:
        """`Scheduler.health`."""
        return self._ask(self._scheduler.health)

    def get_queue_depth(self) -> tuple[int, int]:
        """`Scheduler.get_queue_depth`."""
        return self._ask(self._scheduler.get_queue_depth)

    def close(self, drain: float = DRAIN) -> None:
        """`Scheduler.close`, and the end of the loop's thread."""
        if self._loop is None:
            return
        try:
            with suppress(Unavailable):
                self._run(lambda: self._scheduler.close(drain))
        finally:
            self._end_loop()

    # --------------------------------------------------------------------------------------- the loop

    def _send(self, work: Callable[[], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        with self._door:
            if self._loop is None:
                raise RuntimeError("the scheduler was not entered: use `with SyncScheduler(...)`")
            if self._ended:
                raise Unavailable("the scheduler is closed")
            return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if threading.current_thread() is self._thread:
            raise RuntimeError("a SyncScheduler must not be used from its own loop's thread")
        return self._send(work).result()

    def _ask(self, question: Callable[[], T]) -> T:
        """Asked on the loop, whose thread writes the books; here, where there is none or this is it."""

        async def answer() -> T:
            return question()

        if self._loop is not None and threading.current_thread() is not self._thread:
            with suppress(Unavailable):
                return self._run(answer)
        return question()

    def _main(self) -> None:
        loop = self._loop
        assert loop is not None
        loop.run_forever()
        # Who came through the door just before it was shut hears so from the scheduler; the rest is cancelled.
        for _ in range(2):
            loop.run_until_complete(asyncio.sleep(0))
        if left := asyncio.all_tasks(loop):
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.wait(left))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    def _end_loop(self) -> None:
        with self._door:
            if not self._ended and self._loop is not None:
                self._ended = True
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


async def _anext_or_none(stream: Any) -> Any:
    """The next chunk, or None at the end."""
    return await anext(stream, None)
