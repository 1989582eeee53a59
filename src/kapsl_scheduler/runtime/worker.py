"""One engine slot: pull a batch, run it, hand the outcome to the loop.

A slot is driven in one of three ways that share these steps: by its own thread, by the loop's thread while its calls
prove shorter than a thread hop, or by a task if its engine is asynchronous (so virtual time drives the real thing).
What is not here: the queue and who is woken (runtime.dispatch), what an outcome means (runtime.settlement).
"""

from __future__ import annotations

import abc
import asyncio
import inspect
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, Final, cast

from kapsl_scheduler.core.batch import Batch
from kapsl_scheduler.core.lanes import Slot
from kapsl_scheduler.core.latency import LatencyTable
from kapsl_scheduler.errors import EngineError, ModelLoadError, Unavailable
from kapsl_scheduler.ports import Engine
from kapsl_scheduler.runtime.stream import StreamChannel
from kapsl_scheduler.runtime.warmup import slowest_size
from kapsl_scheduler.types import Tensors

if TYPE_CHECKING:
    from kapsl_scheduler.runtime.dispatch import Dispatch

__all__ = ["EngineState", "Outcome", "TaskWorker", "ThreadWorker", "Worker"]

logger = logging.getLogger(__name__)

LOOP_CALL_LIMIT: Final = 150e-6
"""Seconds: an engine whose slowest batch is shorter in warm-up may run on the loop's thread: a hop costs as much."""
LONG_LOOP_CALLS: Final = 3
HELD_UP: Final = 0.5e-3
"""Seconds between the pull and the call from which on deadlines are looked at again: a thread may have waited for the
processor, or for the interpreter."""
STUCK_AFTER: Final = 5.0
"""Seconds: a call that runs longer than this, and than twenty times its predicted time, counts as stuck."""
PROBE_FIRST: Final = 0.5
"""Seconds until the first health check of a lost engine; the wait doubles up to `PROBE_AT_MOST`."""
PROBE_AT_MOST: Final = 30.0


class EngineState:
    """One engine behind a dispatch: its latency model, and whether it works. Changed under the dispatch's lock."""

    def __init__(self, index: int, engine: Engine) -> None:
        self.index = index
        self.engine = engine
        self.latency = LatencyTable()
        self.ready = False
        self.lost = False
        self.on_loop = False
        self.long_calls: deque[float] = deque(maxlen=LONG_LOOP_CALLS)  # when they ended, of those on the loop's thread

    @property
    def name(self) -> str:
        return f"{type(self.engine).__name__}-{self.index}"


class Outcome:
    """One engine call (or stream) that ended: what came back, or why nothing did."""

    __slots__ = ("batch", "elapsed", "ended", "error", "outputs", "state")

    def __init__(self, state: EngineState, batch: Batch) -> None:
        self.state = state
        self.batch = batch
        self.outputs: Tensors | None = None
        self.error: BaseException | None = None
        self.elapsed = 0.0
        self.ended = 0.0


class Worker(abc.ABC):
    """A slot and its driver. The first slot of an engine loads, measures and unloads it."""

    def __init__(self, dispatch: Dispatch, state: EngineState, slot: Slot, number: int) -> None:
        self.dispatch = dispatch
        self.state = state
        self.slot = slot
        # On the loop's thread only calls run: a stream would block it between its chunks.
        self.loop_slot = Slot(slot.engine, slot.latency, delivery=slot.delivery, streams=False)
        self.name = f"{state.name}.{number}"
        self.owns_engine = number == 0
        self.started = False
        self.wake_at = math.inf
        self.parked = False  # to wait until it is woken, as its last look at the queue told it
        self.running: Batch | None = None
        self.loaded: asyncio.Future[None] = dispatch.loop.create_future()
        self.measured: asyncio.Future[None] = dispatch.loop.create_future()
        self.ended: asyncio.Future[None] = dispatch.loop.create_future()

    @abc.abstractmethod
    def start(self) -> None:
        """Begin. The engine's first slot loads it and then waits for `go`, twice: to measure, and to pull."""

    @abc.abstractmethod
    def go(self) -> None:
        """Go on after loading, and after measuring."""

    @abc.abstractmethod
    def wake(self) -> None:
        """Pull again: called by whoever took this slot off the idle list."""

    @abc.abstractmethod
    def stop(self) -> None:
        """End when the present call has ended."""

    @abc.abstractmethod
    async def abandon(self, patience: float) -> None:
        """Give the slot up: its call hangs."""

    def run_call(self, batch: Batch) -> Outcome | None:
        """Run one batch on this thread. Whatever the engine raises is its callers' answer, never the slot's end. None
        if the start was held up for so long that all members are due to expire: then nothing is run."""
        clock, stack = self.dispatch.clock, self.dispatch.layout.stack
        outcome = Outcome(self.state, batch)
        started = batch.started
        try:
            inputs = stack(batch.members)
            started = clock()
            if started - batch.started > HELD_UP:
                rest = self.dispatch.drop_late(self, batch, started)
                if rest is None:
                    return None
                if rest is not batch:
                    outcome.batch = rest
                    inputs = stack(rest.members)
            outcome.outputs = self.state.engine.infer(inputs)
        except BaseException as error:
            outcome.error = error
        outcome.ended = clock()
        outcome.elapsed = outcome.ended - started
        return outcome

    def is_stuck(self, now: float) -> bool:
        """Whether a call runs far beyond its time. A stream takes what time it takes."""
        batch = self.running
        if batch is None or batch.members[0].stream is not None:
            return False
        predicted = self.state.latency[batch.shape].upper(batch.rows) or 0.0
        return now - batch.started > max(STUCK_AFTER, 20 * predicted)

    def decide_loop_thread(self) -> None:
        """From warm-up runs, before there is traffic, decide whether calls may run on the loop's thread."""
        engine, dispatch = self.state.engine, self.dispatch
        if engine.bounded_call:
            longest = slowest_size(
                engine, dispatch.admission, self.state.latency, dispatch.clock, dispatch.batch_policy.max_batch_size
            )
            self.state.on_loop = longest is not None and longest <= LOOP_CALL_LIMIT


class ThreadWorker(Worker):
    """A slot with a thread of its own: the thread is a daemon, so that a hung call cannot keep the process."""

    def __init__(self, dispatch: Dispatch, state: EngineState, slot: Slot, number: int) -> None:
        super().__init__(dispatch, state, slot, number)
        self._gate = threading.Lock()  # held while parked; whoever took the slot off the idle list releases it
        self._gate.acquire()
        self._stopped = threading.Event()
        self._abandoned = False
        self._thread = threading.Thread(target=self._main, name=f"kapsl-{self.name}", daemon=True)

    def start(self) -> None:
        self.started = True
        self._thread.start()

    def go(self) -> None:
        self._gate.release()

    def wake(self) -> None:
        self._gate.release()

    def stop(self) -> None:
        self._stopped.set()
        if self._gate.locked():
            self._gate.release()

    async def abandon(self, patience: float) -> None:
        """Python cannot end a thread: it stays until its call returns, and does no more than unload the engine then."""
        self._abandoned = True

    def _main(self) -> None:
        try:
            if self._prepare():
                self._serve()
        except BaseException:
            logger.exception("%s: the slot failed", self.name)
            self.dispatch.fail(self)
        finally:
            if self.owns_engine:
                self._stopped.wait()
                self._unload()
            self._tell(self.ended)

    def _prepare(self) -> bool:
        if not self.owns_engine:
            return True
        try:
            self.state.engine.load()
            self.state.engine.warmup()
        except BaseException as error:
            self._tell(self.loaded, load_error(self.state, error))
            return False
        self._tell(self.loaded)
        self._gate.acquire()
        if self._stopped.is_set():
            return False
        try:
            self.decide_loop_thread()
        except BaseException as error:
            self._tell(self.measured, load_error(self.state, error))
            return False
        self._tell(self.measured)
        self._gate.acquire()
        return not self._stopped.is_set()

    def _serve(self) -> None:
        outcome: Outcome | None = None
        while True:
            batch = self.dispatch.next(self, outcome)
            outcome = None
            if batch is not None:
                outcome = self.run_call(batch) if batch.members[0].stream is None else self._run_stream(batch)
                if self._abandoned:
                    return
            elif self._stopped.is_set():
                return
            else:
                self._park()

    def _park(self) -> None:
        if not self.parked:
            self._probe()
            return
        timeout = self.wake_at - self.dispatch.clock()
        if timeout == math.inf:
            self._gate.acquire()
        elif not self._gate.acquire(timeout=max(timeout, 0.0)) and not self.dispatch.unpark(self):
            self._gate.acquire()  # somebody has just taken this slot, and will wake it

    def _probe(self) -> None:
        """Ask the lost engine for its health until it is well, or the slot is to stop."""
        delay = PROBE_FIRST
        while self.state.lost and not self._stopped.wait(delay):
            delay = min(2 * delay, PROBE_AT_MOST)
            try:
                if self.state.engine.health_check():
                    self.dispatch.recovered(self.state)
            except Exception:
                logger.warning("%s: the health check failed", self.name, exc_info=True)

    def _run_stream(self, batch: Batch) -> Outcome:
        clock = self.dispatch.clock
        outcome = Outcome(self.state, batch)
        item = batch.members[0]
        channel = cast(StreamChannel, item.stream)
        started = clock()
        try:
            with closing(cast(Any, self.state.engine.infer_stream(self.dispatch.layout.stack([item])))) as chunks:
                for chunk in chunks:
                    if not channel.put(chunk):
                        break
        except BaseException as error:
            outcome.error = error
        outcome.ended = clock()
        outcome.elapsed = outcome.ended - started
        return outcome

    def _unload(self) -> None:
        try:
            self.state.engine.unload()
        except Exception:
            logger.exception("%s: unloading the engine failed", self.name)

    def _tell(self, future: asyncio.Future[None], error: BaseException | None = None) -> None:
        try:
            self.dispatch.loop.call_soon_threadsafe(_resolve, future, error)
        except RuntimeError:
            logger.debug("%s: the event loop was closed before the slot ended", self.name)


class TaskWorker(Worker):
    """A slot of an asynchronous engine: a task of the loop, awaited by `Dispatch.stop`."""

    def __init__(self, dispatch: Dispatch, state: EngineState, slot: Slot, number: int) -> None:
        super().__init__(dispatch, state, slot, number)
        self._gate = asyncio.Event()
        self._stopped = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.started = True
        self._task = self.dispatch.loop.create_task(self._main(), name=f"kapsl-{self.name}")

    def go(self) -> None:
        self._gate.set()

    def wake(self) -> None:
        # Whoever wakes it may be the thread of another engine's slot.
        self.dispatch.loop.call_soon_threadsafe(self._gate.set)

    def stop(self) -> None:
        self._stopped.set()
        self._gate.set()

    async def abandon(self, patience: float) -> None:
        """A task, unlike a thread, can be ended."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=patience)

    async def _main(self) -> None:
        try:
            if await self._prepare():
                await self._serve()
        except asyncio.CancelledError:
            self._stopped.set()  # the loop is ending, whether or not somebody closes the scheduler
            raise
        except Exception:
            logger.exception("%s: the slot failed", self.name)
            self.dispatch.fail(self)
        finally:
            if self.owns_engine:
                await self._stopped.wait()
                await self._unload()
            _resolve(self.ended, None)

    async def _passed(self) -> None:
        await self._gate.wait()
        self._gate.clear()

    async def _prepare(self) -> bool:
        if not self.owns_engine:
            return True
        engine = self.state.engine
        try:
            await _settled(engine.load)
            await _settled(engine.warmup)
        except Exception as error:
            _resolve(self.loaded, load_error(self.state, error))
            return False
        _resolve(self.loaded, None)
        await self._passed()
        _resolve(self.measured, None)
        if not self._stopped.is_set():
            await self._passed()
        return not self._stopped.is_set()

    async def _serve(self) -> None:
        outcome: Outcome | None = None
        while True:
            batch = self.dispatch.next(self, outcome)
            outcome = None
            if batch is not None:
                outcome = await self._run(batch)
            elif self._stopped.is_set():
                return
            else:
                await self._park()

    async def _park(self) -> None:
        if not self.parked:
            await self._probe()
            return
        if self.wake_at == math.inf:
            await self._passed()
            return
        try:
            async with asyncio.timeout(max(self.wake_at - self.dispatch.clock(), 0.0)):
                await self._passed()
        except TimeoutError:
            if not self.dispatch.unpark(self):
                await self._passed()

    async def _probe(self) -> None:
        delay = PROBE_FIRST
        while self.state.lost and not self._stopped.is_set():
            try:
                async with asyncio.timeout(delay):
                    await self._stopped.wait()
                return
            except TimeoutError:
                delay = min(2 * delay, PROBE_AT_MOST)
            try:
                if await _settled(self.state.engine.health_check):
                    self.dispatch.recovered(self.state)
            except Exception:
                logger.warning("%s: the health check failed", self.name, exc_info=True)

    async def _run(self, batch: Batch) -> Outcome:
        clock = self.dispatch.clock
        outcome = Outcome(self.state, batch)
        engine = cast(Any, self.state.engine)
        started = clock()
        try:
            if batch.members[0].stream is None:
                outcome.outputs = await engine.infer(self.dispatch.layout.stack(batch.members))
            else:
                await self._run_stream(batch)
        except asyncio.CancelledError as error:
            if self._task is not None and self._task.cancelling():
                raise
            outcome.error = error  # something that the engine awaits was cancelled, not this slot
        except Exception as error:
            outcome.error = error
        outcome.ended = clock()
        outcome.elapsed = outcome.ended - started
        return outcome

    async def _run_stream(self, batch: Batch) -> None:
        item = batch.members[0]
        channel = cast(StreamChannel, item.stream)
        chunks = cast(Callable[[Tensors], AsyncIterator[Tensors]], self.state.engine.infer_stream)(
            self.dispatch.layout.stack([item])
        )
        async with aclosing(cast(Any, chunks)) as open_chunks:
            async for chunk in open_chunks:
                if not await channel.put_async(chunk):
                    break

    async def _unload(self) -> None:
        try:
            await _settled(self.state.engine.unload)
        except Exception:
            logger.exception("%s: unloading the engine failed", self.name)


def load_error(state: EngineState, error: BaseException) -> EngineError:
    """What loading raised, as an `EngineError`."""
    if isinstance(error, EngineError) and not isinstance(error, Unavailable):
        return error
    wrapped = ModelLoadError(f"{state.name}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _resolve(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


async def _settled(verb: Callable[[], Any]) -> Any:
    """What a verb of an engine returns, awaited if it is awaitable: the verbs may be of either kind."""
    value = verb()
    return await value if inspect.isawaitable(value) else value
