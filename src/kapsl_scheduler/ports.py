"""Every seam on one page: what an adapter must offer and what the runtime may rely on. Protocols are structural.

No behaviour lives here. Each port has a contract suite in `tests/contract`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from kapsl_scheduler.core.batch import Pending
from kapsl_scheduler.core.queue import QueueOverflowPolicy
from kapsl_scheduler.core.runs import Change, Firing, JobRecord, Run, RunState
from kapsl_scheduler.types import EngineMetrics, InferenceResponse, ModelInfo, Priority, Tensors

__all__ = [
    "AsyncEngine",
    "Clock",
    "Committed",
    "CronTarget",
    "Engine",
    "Exists",
    "JobStore",
    "Observer",
    "ReplicaScheduler",
    "Result",
    "RunQuery",
    "Sink",
    "SinkItem",
    "SinkWriter",
    "Source",
    "SourceItem",
    "Stale",
    "is_source",
]


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
    """Told of each engine call, on the loop's thread. An absent observer costs a None check. `members` are the requests
    that were in it: to be read, and not kept."""

    def on_call(
        self, *, rows: int, requests: int, started: float, elapsed: float, failed: bool, members: Sequence[Pending]
    ) -> None: ...


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


# --------------------------------------------------------------------------------------------- cron: target


class CronTarget(Protocol):
    """What jobs fire into: a `Scheduler`, a named model of a server, or anything else that answers so."""

    async def infer(
        self,
        request: Any,
        *,
        priority: Priority | None = None,
        timeout: float | None = None,
        force_cpu: bool = False,
        overflow: QueueOverflowPolicy | None = None,
        block_timeout: float | None = None,
    ) -> InferenceResponse: ...


# ---------------------------------------------------------------------------------------------- cron: store


class Committed(msgspec.Struct, gc=False, frozen=True):
    """The change was written. `version` is the job's now; 0 where the job was left as it is, or removed.
    `numbers` are those that the created runs were given, `ended` the runs that a removal has cancelled, as they are
    now, the oldest first."""

    version: int
    numbers: tuple[int, ...] = ()
    ended: tuple[Run, ...] = ()


class Stale(msgspec.Struct, frozen=True):
    """Nothing of the change was written: the job has another version (or an updated run is not open any more, or
    another's). `record` is what the job is now, None if it is gone."""

    record: JobRecord | None


class Exists(msgspec.Struct, frozen=True):
    """Nothing of the change was written: `run` is there already, which it was to create."""

    run: Run


Result = Committed | Stale | Exists


class RunQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which runs: of one job (None: of all), in these states (empty: any), of this origin, of this owner, with numbers
    below `before` and above `after`; with `outside_backfills`, only those of the schedule and of triggers (`limit` 0).
    At most `limit`, by number: the newest first, or the oldest."""

    job: str | None = None
    states: tuple[RunState, ...] = ()
    origin: str | None = None
    owner: str | None = None
    before: int | None = None
    after: int | None = None
    oldest_first: bool = False
    outside_backfills: bool = False
    limit: int = 100


class JobStore(Protocol):
    """Keeps jobs, their runs and what their sources remember. One suite tests every adapter: `tests/contract`.

    A batch of changes is written in one transaction. Every call may raise `StoreError`; then nothing of it was
    written. A call that is cancelled may be carried out nevertheless. Several processes may use one store.

    `instant` stores live in memory: their coroutines never suspend, and nobody else can change what they hold.
    """

    instant: bool

    async def open(self) -> None:
        """Make ready, creating or migrating what is stored. Raises `StoreError` where that cannot be. Opening twice
        does nothing, and a closed store can be opened again, with what it held."""

    async def close(self) -> None:
        """Write what is under way and let go of all files and threads: until it is opened again, every other call
        raises `StoreError`. Closing twice does nothing."""

    async def jobs(self, ids: Sequence[str] | None = None) -> list[JobRecord]:
        """All jobs, or those of these ids that are there, by id."""

    async def versions(self) -> dict[str, int]:
        """The version of every job: a cheap look at what others have changed."""

    async def commit(self, changes: Sequence[Change]) -> list[Result]:
        """Write each change or leave all of it out; a result for each, in order. Later changes see earlier ones."""

    async def runs(self, query: RunQuery) -> list[Run]: ...

    async def run(self, job: str, nominal: int, origin: str) -> Run | None: ...

    async def numbered(self, number: int) -> Run | None:
        """The run that was given this number."""

    async def memory(self, job: str) -> dict[str, str]:
        """What the job's source and sink have remembered."""

    async def beat(self, owner: str) -> None:
        """Say that this process lives."""

    async def beats(self) -> dict[str, int]:
        """How often each process has said so: a figure that stands still is a process that does not live."""

    async def forget(self, owner: str) -> None:
        """This process has ended, and nothing of it is open."""

    async def prune(self, *, keep: int, before: int) -> int:
        """Delete ended runs: those beyond the newest `keep` ended ones of their job, and those that ended (or were due,
        where no end is recorded) before `before`, in microseconds since 1970. Returns how many.

        A large store does it piece by piece, so that others can write meanwhile: after an error or a cancellation
        some may be gone."""

    async def compact(self) -> None:
        """Give back to the system what deletions have freed."""


# ------------------------------------------------------------------------------------- cron: sources, sinks


class SourceItem(msgspec.Struct, frozen=True):
    """One request of a source. `key` says where it came from, for people. `marks` are what the source wants remembered
    once this item and all before it are delivered (None: forget that key).

    Where `error` is set there is no request (it is None): this row or file cannot be read. It goes to the sink in its
    turn, as a failed item, and its marks count as those of others. `progress` is how much of what the firing found to
    do lies behind once this item is delivered, from 0 to 1; None where the source cannot say.
    """

    request: Any
    key: str
    marks: Mapping[str, str | None] = {}
    error: Exception | None = None
    progress: float | None = None


@runtime_checkable
class Source(Protocol):
    """Where a firing's requests come from. Its settings are its fields (a `msgspec.Struct` with a tag), so that a job
    can be stored; it holds nothing else.

    `items` runs in a thread of its own and may block; what makes the whole source useless is raised by the call
    itself. `memory` is what was remembered of earlier items, also over restarts: an interrupted run goes on behind
    them. A job has one memory: a source's keys begin with `source:`, a sink's with `sink:`, and neither touches
    others. Closing the iterator frees what it holds.
    """

    def items(self, firing: Firing, memory: Mapping[str, str]) -> Iterator[SourceItem]: ...


def is_source(value: Any) -> bool:
    """Whether a job's request is a source: a mapping of inputs has `items` too. (An `isinstance` of a protocol costs
    more than all else that a firing does.)"""
    return hasattr(value, "items") and not isinstance(value, Mapping)


class SinkItem(msgspec.Struct, frozen=True):
    """What became of one request: its answer, or its error. `key` is the source's, else its number in the firing."""

    key: str
    response: InferenceResponse | None
    error: Exception | None = None


@runtime_checkable
class SinkWriter(Protocol):
    """The results of one attempt of a run, in the order of its requests. All calls run in a thread, one at a time.

    After a call that raised only `close` is called. The run's next attempt, the next run, and one that takes this one's
    place open the sink once it is closed, unless that takes seconds.
    """

    def write(self, items: Sequence[SinkItem]) -> None: ...

    def flush(self) -> Mapping[str, str | None]:
        """All that was written is where it belongs, for good. Returns what the sink wants remembered with it.

        The first `flush` comes before the first `write`, so that where a run began is remembered too: a run that is
        cut short before its next `flush` is resumed from there.
        """

    def close(self) -> None:
        """After the last `flush`, or after a failure: let go of files and connections. What was written since the last
        `flush` may be lost, but nothing that was flushed."""


@runtime_checkable
class Sink(Protocol):
    """Where a firing's answers go. Its settings are its fields, as with a source.

    `memory` is what its writers have remembered: an attempt that resumes an interrupted one (`firing.attempt` above 1)
    goes on behind the last flush, so that nothing is there twice. What is about one run stands under `sink:` and its
    `firing.key`, and is to be forgotten once that run is among `firing.ended`.
    """

    def open(self, firing: Firing, memory: Mapping[str, str]) -> SinkWriter: ...
