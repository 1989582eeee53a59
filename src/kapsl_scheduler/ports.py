"""Every seam on one page: what an adapter must offer and what the runtime may rely on. Protocols are structural.

No behaviour lives here. Each port has a contract suite in `tests/contract`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any, Protocol, runtime_checkable

from kapsl_scheduler.core.queue import QueueOverflowPolicy
from kapsl_scheduler.types import EngineMetrics, InferenceResponse, ModelInfo, Priority, Tensors

__all__ = ["AsyncEngine", "Clock", "Engine", "Observer", "ReplicaScheduler"]


@runtime_checkable
class Engine(Protocol):
    """A model that runs. `load` and every call are made in the slot's own thread, never two at a time per slot.

    Errors: raise an `EngineError` to choose its type; `Unavailable` says that the engine is lost. Anything else
    reaches the caller as `InferenceError` with `__cause__`.

    `retry`: whether a call may be made again for the members of a failed batch (False where calls have effects).
    `bounded_call`: the call's time is bounded by its shapes and it never blocks, so it may run on the event
    loop's thread when it proves short enough; such an engine accepts calls from either thread, one at a time.
    `max_streams`: streams that may run beside the calls; 0 means that a stream takes a slot.
    """

    retry: bool
    bounded_call: bool
    max_streams: int

    def load(self) -> None:
        """Make the engine ready to answer `model_info`. Raises `ModelLoadError`."""

    def warmup(self) -> None:
        """Run whatever makes the first real call as fast as the later ones."""

    def infer(self, inputs: Tensors) -> Tensors:
        """One call over a batch that is already concatenated on each input's batch axis."""

    def infer_stream(self, inputs: Tensors) -> Iterator[Tensors]:
        """Partial results for one request. Closing the iterator ends the work."""

    def unload(self) -> None:
        """Free what `load` took. The engine may be loaded again."""

    def health_check(self) -> bool:
        """Whether the engine works (never how busy it is)."""

    def metrics(self) -> EngineMetrics: ...

    def model_info(self) -> ModelInfo: ...

    def for_cpu(self) -> Engine | None:
        """The same model on the CPU: itself if it is there already, None where there is no such thing."""


class AsyncEngine(Protocol):
    """The same engine in coroutine functions: awaited on the event loop, under the same slots.

    `infer` and `infer_stream` decide (a coroutine function and an async generator function); `load`, `warmup`,
    `unload` and `health_check` may be either kind.
    """

    retry: bool
    bounded_call: bool
    max_streams: int

    def load(self) -> Awaitable[None] | None: ...
    def warmup(self) -> Awaitable[None] | None: ...
    async def infer(self, inputs: Tensors) -> Tensors: ...
    def infer_stream(self, inputs: Tensors) -> AsyncIterator[Tensors]: ...
    def unload(self) -> Awaitable[None] | None: ...
    def health_check(self) -> Awaitable[bool] | bool: ...
    def metrics(self) -> EngineMetrics: ...
    def model_info(self) -> ModelInfo: ...
    def for_cpu(self) -> AsyncEngine | Engine | None: ...


class Clock(Protocol):
    """Monotonic seconds; only differences mean anything. Callable from any thread."""

    def __call__(self) -> float: ...


class Observer(Protocol):
    """Told of each engine call, on the loop's thread. An absent observer costs a None check."""

    def on_call(self, *, rows: int, requests: int, started: float, elapsed: float, failed: bool) -> None: ...


class ReplicaScheduler(Protocol):
    """Anything that schedules requests for one model: a local `Scheduler`, or one elsewhere behind a proxy."""

    async def infer(
        self,
        request: Any,
        *,
        priority: Priority | None = None,
        timeout: float | None = None,
        session_id: str | None = None,
        force_cpu: bool = False,
        overflow: QueueOverflowPolicy | None = None,
        block_timeout: float | None = None,
    ) -> InferenceResponse: ...

    def infer_stream(
        self,
        request: Any,
        *,
        priority: Priority | None = None,
        timeout: float | None = None,
        session_id: str | None = None,
        force_cpu: bool = False,
    ) -> AsyncIterator[InferenceResponse]: ...

    def get_queue_depth(self) -> tuple[int, int]: ...
    def model_info(self) -> ModelInfo: ...
    async def close(self, drain: float = ...) -> None: ...
