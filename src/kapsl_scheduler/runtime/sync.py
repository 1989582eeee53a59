"""SyncScheduler: the same scheduler for callers without an event loop, on a loop thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from kapsl_scheduler.runtime.metrics import SchedulerHealth, SchedulerStatistics
from kapsl_scheduler.runtime.scheduler import DRAIN, Scheduler
from kapsl_scheduler.types import EngineMetrics, InferenceResponse, ModelInfo

__all__ = ["SyncScheduler"]

T = TypeVar("T")


class SyncScheduler:
    """A `Scheduler` behind plain calls, usable from any thread. Takes `Scheduler`'s parameters.

    Use it with `with`: entering starts the loop's thread and loads the engines, leaving drains and closes.
    """

    def __init__(self, engines: Iterable[Any], **parameters: Any) -> None:
        self._scheduler = Scheduler(engines, **parameters)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kapsl-loop", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._run(self._scheduler.__aenter__())
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
        return self.submit(request, **options).result()

    def try_infer(self, request: Any, **options: Any) -> InferenceResponse:
        """`Scheduler.try_infer`, blocking."""
        return self._run(self._scheduler.try_infer(request, **options))

    def submit(self, request: Any, **options: Any) -> concurrent.futures.Future[InferenceResponse]:
        """`Scheduler.infer` as a future; cancelling the future cancels the request."""
        return asyncio.run_coroutine_threadsafe(self._scheduler.infer(request, **options), self._loop)

    def infer_many(self, requests: Iterable[Any], **options: Any) -> list[Any]:
        """`Scheduler.infer_many`, blocking."""
        return self._run(self._scheduler.infer_many(requests, **options))

    def infer_stream(self, request: Any, **options: Any) -> Iterator[InferenceResponse]:
        """`Scheduler.infer_stream` as a plain iterator; closing it closes the stream."""
        stream = self._scheduler.infer_stream(request, **options)
        try:
            while True:
                try:
                    chunk = self._run(stream.__anext__())
                except StopAsyncIteration:
                    return
                yield chunk
        finally:
            self._run(stream.aclose())

    def statistics(self) -> SchedulerStatistics:
        """`Scheduler.statistics`."""
        return self._scheduler.statistics()

    def metrics(self) -> EngineMetrics:
        """`Scheduler.metrics`."""
        return self._scheduler.metrics()

    def model_info(self) -> ModelInfo:
        """`Scheduler.model_info`."""
        return self._scheduler.model_info()

    def health(self) -> SchedulerHealth:
        """`Scheduler.health`."""
        return self._scheduler.health()

    def get_queue_depth(self) -> tuple[int, int]:
        """`Scheduler.get_queue_depth`."""
        return self._scheduler.get_queue_depth()

    def close(self, drain: float = DRAIN) -> None:
        """`Scheduler.close`, and the end of the loop's thread."""
        if self._loop.is_closed() or not self._thread.is_alive():
            return
        try:
            self._run(self._scheduler.close(drain))
        finally:
            self._end_loop()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a SyncScheduler must not be used from its own loop's thread")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
