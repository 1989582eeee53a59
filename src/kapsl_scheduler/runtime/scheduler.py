"""Scheduler: one model on one machine. The public calls, and the life of it all.

The loop that entered the scheduler owns all futures, timers and counters here; slots own theirs (runtime.worker), and
the queue decides (core.queue). What is not here: how a request enters (runtime.entrance) and what becomes of it
(runtime.settlement), callers without a loop (runtime.sync), many models (runtime.registry).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Self

from kapsl_scheduler.core.admission import Admission
from kapsl_scheduler.core.batch import BatchPolicy, Pending, State
from kapsl_scheduler.core.queue import QueueOverflowPolicy, QueuePolicy
from kapsl_scheduler.errors import (
    DeadlineExceeded,
    EngineError,
    InvalidInput,
    ModelLoadError,
    ModelNotLoaded,
    Unavailable,
)
from kapsl_scheduler.ports import Clock, Engine, Observer
from kapsl_scheduler.runtime.deadlines import Alarm, Deadlines
from kapsl_scheduler.runtime.dispatch import Dispatch
from kapsl_scheduler.runtime.entrance import Entrance, Phase, PriorityPolicy
from kapsl_scheduler.runtime.metrics import EngineHealth, SchedulerHealth, SchedulerStatistics
from kapsl_scheduler.runtime.reply import Reply, Told
from kapsl_scheduler.runtime.settlement import Settlement, as_engine_error, report
from kapsl_scheduler.runtime.stream import StreamChannel
from kapsl_scheduler.runtime.worker import PROBE_FIRST
from kapsl_scheduler.types import EngineMetrics, InferenceResponse, ModelInfo, Priority

__all__ = ["Scheduler"]

logger = logging.getLogger(__name__)

DRAIN: Final = 10.0
"""Seconds that `async with` gives requests to end when it is left."""
HUNG_AFTER: Final = 1.0
"""Seconds that a slot has to end its call once nobody waits for it."""

WAITING: Final = State.WAITING


class Scheduler:
    """Schedules the requests for one model over its engines.

    `engines` run the same model (equal `model_info`). `batch` and `queue` are the policies. `workers_per_engine` is the
    number of slots of each engine, `cpu_workers` that of the CPU lane for `force_cpu`. With `enable_fallback`, requests
    whose engine is lost, and new ones while none works, go to the CPU lane. `default_priority` is the class of requests
    that name none: a `Priority`, or a policy such as `determine_priority`. `clock` gives monotonic seconds. `observer`
    is told of every engine call.

    Use it with `async with`: entering loads and warms up the engines, leaving drains and closes. All calls belong to
    the event loop that entered it; `SyncScheduler` is for callers without one.
    """

    def __init__(
        self,
        engines: Iterable[Any],
        *,
        batch: BatchPolicy | None = None,
        queue: QueuePolicy | None = None,
        workers_per_engine: int = 1,
        cpu_workers: int = 1,
        enable_fallback: bool = False,
        default_priority: PriorityPolicy = Priority.LATENCY_CRITICAL,
        clock: Clock = time.monotonic,
        observer: Observer | None = None,
    ) -> None:
        several: Any = (engines,) if hasattr(engines, "infer") else engines
        self._engines: tuple[Engine, ...] = tuple(several)
        if not self._engines:
            raise ValueError("engines: expected at least one")
        for engine in self._engines:
            if not hasattr(engine, "infer"):
                raise TypeError(f"engines: {engine!r} is no engine; CallableEngine makes one of a function")
        for name, number in (("workers_per_engine", workers_per_engine), ("cpu_workers", cpu_workers)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        self._batch = batch or BatchPolicy()
        self._queue = queue or QueuePolicy()
        self._workers_per_engine = workers_per_engine
        self._cpu_workers = cpu_workers
        self._fallback = enable_fallback
        self._clock = clock
        self._deadlines = Deadlines(clock, self._on_alarm)
        self._settlement = Settlement(clock, observer, self._deadlines, self._refuge)
        self._books = self._settlement.books
        self._main = Dispatch(self._batch, self._queue, clock, self._settlement)
        self._entrance = Entrance(self._books, self._main, clock, default_priority, self._elsewhere)
        self._cpu: Dispatch | None = None
        self._cpu_start: asyncio.Task[None] | None = None
        self._drain: asyncio.Timeout | None = None  # while `close` lets requests end
        self._closed = asyncio.Event()

    def __repr__(self) -> str:
        if self._entrance.phase is not Phase.OPEN:
            return f"<Scheduler {self._entrance.phase.value}>"
        figures = self.statistics()
        return (
            f"<Scheduler {self._entrance.admission.info.name!r} {self._entrance.phase.value}: {figures.queued} queued, "
            f"{figures.running} running, {figures.calls_in_flight} calls in flight of {figures.slots} slots>"
        )

    # ------------------------------------------------------------------------------------- lifecycle

    async def __aenter__(self) -> Self:
        if self._entrance.phase is not Phase.NEW:
            raise RuntimeError(f"the scheduler is {self._entrance.phase.value}: each is entered once")
        self._entrance.belong()
        self._entrance.shut(Phase.LOADING)
        try:
            await self._main.load(self._engines, self._workers_per_engine)
            infos = [state.engine.model_info() for state in self._main.engines]
            if any(info != infos[0] for info in infos):
                raise ModelLoadError(f"the engines of one scheduler must run the same model, got {infos}")
            self._entrance.admission = Admission(infos[0], self._batch.max_batch_size)
            await self._main.serve(self._entrance.admission)
            if self._fallback:
                self._cpu_lane()
                if self._cpu_start is not None:
                    await self._cpu_start
            if self._entrance.phase.value == Phase.CLOSING.value:  # by another task, while this one waited
                raise Unavailable("the scheduler was closed while it was starting")
            self._entrance.open()
        except BaseException:
            try:
                await self._stop()
            finally:
                self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(drain=DRAIN if error is None else 0.0)

    async def close(self, drain: float = DRAIN) -> None:
        """Refuse new requests, let those that are there end for up to `drain` seconds, fail the rest with
        `Unavailable` (those of an `infer_many` that have not had their turn among them), stop the slots and unload the
        engines. One that is still starting is stopped when its engines are loaded: who enters it hears `Unavailable`.

        A slot whose call hangs is left behind and named in the log. A program that ends while such a call is inside C++
        code should flush and `os._exit`: Python's own end may abort it when the call comes back. Closing what is
        closed, or never was entered, does nothing; closing while another closes waits for it, and shortens its drain if
        this one is shorter. Cancelling it cuts the drain short; the rest is done all the same.
        """
        if self._entrance.phase in (Phase.NEW, Phase.CLOSED):
            return
        self._entrance.check_loop()
        until = asyncio.get_running_loop().time() + drain
        if self._entrance.phase is Phase.LOADING:
            self._entrance.shut(Phase.CLOSING)
        if self._entrance.phase is Phase.CLOSING:
            drain_timer = self._drain
            if drain_timer is not None and until < (drain_timer.when() or math.inf) and not drain_timer.expired():
                drain_timer.reschedule(until)
            await self._closed.wait()
            return
        self._entrance.shut(Phase.CLOSING)
        self._let_in()
        drain_timer = self._drain = asyncio.timeout_at(until)
        try:
            async with drain_timer:
                if drain > 0:
                    await self._settlement.drained()
        except TimeoutError:
            pass
        finally:
            self._drain = None
            try:
                self._fail_all(Unavailable("the scheduler was closed before the request was answered"))
                await self._stop()
            finally:
                self._end()

    def _end(self) -> None:
        self._deadlines.close()
        self._entrance.shut(Phase.CLOSED)
        self._closed.set()

    async def _stop(self) -> None:
        if self._cpu_start is not None:
            self._cpu_start.cancel()
            await asyncio.gather(self._cpu_start, return_exceptions=True)
        for dispatch in self._dispatches():
            await dispatch.stop(HUNG_AFTER)

    def _let_in(self) -> None:
        """Before anybody looks: who has just arrived is in the queue. Seen from another thread, they have not arrived
        yet."""
        if self._entrance.is_here():
            for dispatch in self._dispatches():
                dispatch.let_in()

    def _dispatches(self) -> list[Dispatch]:
        return [self._main] if self._cpu is None else [self._main, self._cpu]

    def _cpu_lane(self) -> Dispatch:
        """Where `force_cpu` goes: the main dispatch if its engine is on the CPU already, else a lane of its own, whose
        engine is loaded when first asked for. Its queue takes requests meanwhile."""
        if self._cpu is None:
            engine = self._engines[0].for_cpu()
            if engine is None:
                raise InvalidInput("force_cpu: the engine has no variant for the CPU")
            if engine in self._engines:
                return self._main
            lane = self._cpu = Dispatch(self._batch, self._queue, self._clock, self._settlement)
            lane.loop = asyncio.get_running_loop()
            self._cpu_start = lane.loop.create_task(self._start_cpu(lane, engine))
        return self._cpu

    async def _start_cpu(self, lane: Dispatch, engine: Engine) -> None:
        try:
            await lane.load([engine], self._cpu_workers)
            info, other = self._entrance.admission.info, engine.model_info()
            if (info.inputs, info.outputs) != (other.inputs, other.outputs):
                raise ModelLoadError(f"the engine's variant for the CPU is another model: {other}, expected {info}")
            await lane.serve(self._entrance.admission)
        except Exception as failure:
            error = as_engine_error(failure)
            lane.works = False
            await lane.stop(HUNG_AFTER)
            lane.let_in()
            with lane.lock:
                waiting, queued = lane.queue.clear()
            self._books.refused += self._settlement.fail(waiting, error)
            self._books.failed += self._settlement.fail(queued, error)
            self._cpu, self._cpu_start = None, None  # the next request tries again
            if self._fallback:
                raise error from failure

    # -------------------------------------------------------------------------------------- requests

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
    ) -> InferenceResponse:
        """Answer one request: an `InferenceRequest`, a mapping of arrays, or one array.

        `timeout` (seconds) covers waiting and running. `session_id` keeps a session on one engine. `overflow` and
        `block_timeout` (seconds) override the queue's policy for this call. Keywords beat the request's metadata.

        Raises `InvalidInput`, `Overloaded`, `ResourceExhausted`, `DeadlineExceeded`, `Unavailable`, or what the engine
        raised (`InferenceError` with `__cause__` if that is no `EngineError`). Cancelling the await takes the request
        out of the queue at once; if it runs already, its answer is dropped.
        """
        item = self._entrance.come_in(request, priority, timeout, session_id, force_cpu, overflow, block_timeout)
        try:
            response: InferenceResponse = await item.future
        except asyncio.CancelledError:
            self._abandon(item)
            raise
        return response

    def infer_then(
        self, request: Any, then: Told, *, priority: Priority | None = None, timeout: float | None = None
    ) -> Pending:
        """`infer` for a caller that has no coroutine to await it in: `then` is told the answer, or the error, on the
        loop and in the midst of the scheduler's work. It must neither block nor ask for statistics nor withdraw
        anything, but may submit another request; what it raises is logged.

        Returns what `withdraw` takes. Raises `InvalidInput`, `Unavailable`, and `RuntimeError` on another loop.
        """
        return self._entrance.come_in(request, priority, timeout, None, False, None, None, Reply(then))

    def withdraw(self, submitted: Pending) -> None:
        """Take back what was submitted: out of the queue at once; if it runs already, its answer is dropped. Nobody is
        told. What has its answer, or was taken back before, is left as it is. Raises
        `RuntimeError` on another loop."""
        self._entrance.check_loop()
        if submitted.future is not self._entrance.nobody:
            self._abandon(submitted)

    async def try_infer(
        self,
        request: Any,
        *,
        priority: Priority | None = None,
        timeout: float | None = None,
        session_id: str | None = None,
        force_cpu: bool = False,
    ) -> InferenceResponse:
        """Like `infer`, but never waits for room and never evicts: `Overloaded` at once when the queue is full."""
        return await self.infer(
            request,
            priority=priority,
            timeout=timeout,
            session_id=session_id,
            force_cpu=force_cpu,
            overflow=QueueOverflowPolicy.BLOCK,
            block_timeout=0.0,
        )

    async def infer_many(
        self,
        requests: Iterable[Any],
        *,
        priority: Priority | None = None,
        timeout: float | None = None,
        session_id: str | None = None,
        force_cpu: bool = False,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Answer several requests, in their order. One with more rows than `max_batch_size` is split into several calls
        and its answer joined again.

        With `return_exceptions`, errors stand in the list in place of answers; without, an invalid request is raised
        before any is queued, and of later errors the first while the others go on, as in `asyncio.gather`. Cancelling
        the await cancels them all.
        """
        answers: list[list[Pending] | EngineError] = []
        for request in requests:
            try:
                answers.append(self._entrance.enter_parts(request, priority, timeout, session_id, force_cpu))
            except EngineError as error:
                if not return_exceptions:
                    raise
                answers.append(error)
        offered: list[Pending] = []
        try:
            await self._offer_in_turn([item for parts in answers if isinstance(parts, list) for item in parts], offered)
            await asyncio.gather(*(item.future for item in offered), return_exceptions=return_exceptions)
        except asyncio.CancelledError:
            for item in offered:
                if item.future.done() and not item.future.cancelled():
                    item.future.exception()  # nobody will hear of it, and that is no fault
                self._abandon(item)
            raise
        return [self._joined(answer) if isinstance(answer, list) else answer for answer in answers]

    async def _offer_in_turn(self, items: Iterable[Pending], offered: list[Pending]) -> None:
        """Offer requests, no more of them at a time than the queue holds: they must not crowd each other out."""
        room = asyncio.Semaphore(self._queue.max_size)
        waited = False
        for item in items:
            waited = waited or room.locked()
            await room.acquire()
            try:
                if waited:
                    self._entrance.enter_again(item)
                    if item.timeout is not None:  # others have arrived after it, and have been let in before it
                        self._deadlines.add(item, item.timeout, Alarm.DEADLINE)
                        item.timeout = None
                item.home.offer(item)
            except EngineError as error:
                item.future.set_exception(error)
            offered.append(item)
            item.future.add_done_callback(lambda _: room.release())

    async def infer_stream(
        self,
        request: Any,
        *,
        priority: Priority | None = None,
        timeout: float | None = None,
        session_id: str | None = None,
        force_cpu: bool = False,
        first_chunk_timeout: float | None = None,
    ) -> AsyncGenerator[InferenceResponse, None]:
        """The partial results of one request, each as an `InferenceResponse`.

        `timeout` (seconds) bounds the whole stream, `first_chunk_timeout` the wait for its first chunk; both raise
        `DeadlineExceeded`. A reader that leaves the buffer of 16 chunks full for 5 s gets `Overloaded`. Closing the
        iterator closes the engine's generator at its next chunk. Raises what `infer` raises.
        """
        item = self._entrance.enter(request, priority, timeout, session_id, force_cpu)
        if first_chunk_timeout is not None and not first_chunk_timeout > 0:
            error = InvalidInput(f"first_chunk_timeout: expected more than 0 seconds, got {first_chunk_timeout!r}")
            self._entrance.count_refusal(error)
            raise error
        channel = item.stream = StreamChannel(asyncio.get_running_loop(), self._clock)
        item.set_apart()
        item.future.add_done_callback(channel.end_with)
        item.home.offer(item)
        if first_chunk_timeout is not None:
            self._deadlines.add(item, first_chunk_timeout, Alarm.FIRST_CHUNK)
        try:
            while (chunk := await channel.next_chunk()) is not None:
                outputs = item.home.layout.row(chunk) if item.bare else dict(chunk)
                first_at = channel.first_at or item.arrival
                yield InferenceResponse.of(
                    outputs, first_at - item.arrival, self._clock() - first_at, item.rows, item.request_id
                )
        finally:
            channel.close()
            self._abandon(item)

    # ---------------------------------------------------------------------------------------- the way in

    def _elsewhere(self, force_cpu: bool) -> Dispatch:
        """Where a request goes that asks for the CPU, or that finds no working engine."""
        if force_cpu or self._fallback:
            lane = self._cpu_lane()
            if lane.works:
                return lane
        raise Unavailable("no engine works", retry_after=PROBE_FIRST)

    # --------------------------------------------------------------------------------------- the way out

    def _abandon(self, item: Pending) -> None:
        """The caller has gone: out of the queue at once; if it runs, its answer will be dropped."""
        future = item.future
        if not future.done():
            future.cancel()
        elif not future.cancelled():
            return  # answered in the same pass of the loop
        state = item.home.take_out(item)
        # Whoever still holds the request need not hold its inputs, nor what its caller was doing (a cancelled future
        # does, by the traceback of its error).
        item.future = self._entrance.nobody
        if state is not State.RUNNING:
            item.inputs = ()
        if state is WAITING:
            self._books.withdrawn += 1
        else:
            self._books.cancelled += 1
        self._settlement.closed(1)

    def _on_alarm(self, item: Pending, alarm: Alarm) -> None:
        if alarm is Alarm.ROOM:
            refusal = item.home.give_up_room(item)
            if refusal is not None:
                self._books.refused += self._settlement.fail([item], refusal)
            return
        if alarm is Alarm.FIRST_CHUNK and item.stream.first_at is not None:
            return
        waited = "the first chunk" if alarm is Alarm.FIRST_CHUNK else "the answer"
        error = DeadlineExceeded(f"the deadline passed before {waited} was there")
        if item.home.take_out(item) is WAITING:
            self._books.withdrawn += self._settlement.fail([item], error)
        else:
            self._books.expired += self._settlement.fail([item], error)

    def _fail_all(self, error: EngineError) -> None:
        for dispatch in self._dispatches():
            waiting, admitted = dispatch.shut()
            self._books.refused += self._settlement.fail(waiting, error)
            self._books.failed += self._settlement.fail(admitted, error)

    def _refuge(self, dispatch: Dispatch) -> Dispatch | None:
        """Who takes over when no engine of a dispatch works."""
        if not self._fallback or dispatch is self._cpu:
            return None
        lane = self._cpu_lane()
        return lane if lane.works else None

    def _joined(self, parts: Sequence[Pending]) -> Any:
        """The answer to one request that went in several parts; its first error if one of them failed."""
        error: BaseException | None
        for part in parts:
            if (error := part.future.exception()) is not None:
                return error
        answers: list[InferenceResponse] = [part.future.result() for part in parts]
        first, *others = answers
        if not others:
            return first
        return InferenceResponse.of(
            self._main.layout.join([answer.outputs for answer in answers]),
            max(answer.queue_time for answer in answers),
            sum(answer.compute_time for answer in answers),
            max(answer.batch_rows for answer in answers),
            parts[0].request_id,
        )

    # ----------------------------------------------------------------------------------------- reports

    def model_info(self) -> ModelInfo:
        """What the model takes and gives. Raises `ModelNotLoaded` before the scheduler was entered."""
        if not hasattr(self._entrance, "admission"):
            raise ModelNotLoaded("the scheduler has not loaded its model")
        return self._entrance.admission.info

    def statistics(self) -> SchedulerStatistics:
        """The books and the load, as of now."""
        self._let_in()
        return report(self._books, self._dispatches())

    def metrics(self) -> EngineMetrics:
        """What the engines have done, all together."""
        every = [state.engine.metrics() for dispatch in self._dispatches() for state in dispatch.engines]
        return EngineMetrics(
            calls=sum(metrics.calls for metrics in every),
            rows=sum(metrics.rows for metrics in every),
            errors=sum(metrics.errors for metrics in every),
            busy_time=sum(metrics.busy_time for metrics in every),
        )

    def health(self) -> SchedulerHealth:
        """Whether the engines work, never how busy they are."""
        engines = tuple(health for dispatch in self._dispatches() for health in dispatch.health())
        if self._entrance.phase is Phase.CLOSED:
            engines = tuple(EngineHealth(engine.name, "unloaded") for engine in engines)
        working = sum(engine.status == "ready" for engine in engines)
        status = self._entrance.phase.value
        if self._entrance.phase is Phase.OPEN and working < len(engines):
            status = "degraded" if working else "unavailable"
        return SchedulerHealth(
            healthy=self._entrance.phase is Phase.OPEN and working == len(engines),
            ready=self._entrance.phase is Phase.OPEN and working > 0,
            status=status,
            engines=engines,
        )

    def get_queue_depth(self) -> tuple[int, int]:
        """Requests queued and running: (on the CPU lane, on the engines)."""
        self._let_in()
        return (0 if self._cpu is None else self._cpu.depth()), self._main.depth()
