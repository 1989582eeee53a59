"""Dispatch: a queue, its lock, and the slots that pull from it.

Slots change the queue here and under that lock, which is never held across an engine call or a callback.
What is not here: how a slot runs what it pulled (runtime.worker), what an outcome means for its callers
(runtime.settlement).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import threading
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from kapsl_scheduler.core.admission import Admission
from kapsl_scheduler.core.batch import Batch, BatchPolicy, Layout, Pending, State
from kapsl_scheduler.core.lanes import Slot
from kapsl_scheduler.core.latency import Deviation
from kapsl_scheduler.core.queue import QueueOverflowPolicy, QueuePolicy, RequestQueue
from kapsl_scheduler.errors import EngineError, Overloaded, Unavailable
from kapsl_scheduler.ports import Clock, Engine
from kapsl_scheduler.runtime.metrics import EngineHealth
from kapsl_scheduler.runtime.worker import (
    LONG_LOOP_CALLS,
    LOOP_CALL_LIMIT,
    EngineState,
    Outcome,
    TaskWorker,
    ThreadWorker,
    Worker,
)

__all__ = ["Dispatch"]

logger = logging.getLogger(__name__)

LONG_LOOP_CALL: Final = 10e-3
"""Seconds: after `LONG_LOOP_CALLS` (runtime.worker) calls on the loop's thread above it within a minute the engine
keeps to its own thread for good; likewise once the median of its last calls is above four times the limit by which
warm-up decides. Single calls are given more: their wall time includes whatever else was given the processor."""


class Listener(Protocol):
    """Who is told, on the loop's thread, what became of the calls."""

    def arrived(self, requests: int) -> None:
        """So many requests have arrived; what becomes of each is told next."""

    def let_in(self, items: Sequence[Pending]) -> None:
        """Requests are queued, or wait for room."""

    def waits(self, item: Pending, seconds: float) -> None:
        """A request waits for room, and for so long at most."""

    def turn_away(self, item: Pending, refusal: EngineError) -> None:
        """A request that has just arrived does not get in."""

    def evict(self, items: Sequence[Pending], eviction: EngineError) -> None:
        """Queued requests have made room for others."""

    def broken(self, items: Sequence[Pending]) -> None:
        """Requests that have arrived could not be let in, for no fault of theirs."""

    def settle(self, dispatch: Dispatch, outcomes: Sequence[Outcome], late: Sequence[Pending]) -> None:
        """Calls have ended, and requests were found too late for theirs."""

    def lost(self, dispatch: Dispatch, engine: int) -> None:
        """A slot of the engine has failed, and the engine is not used any more."""


class Dispatch:
    """A queue, its lock, and the slots that pull from it.

    Requests are offered one by one and let in together, at the end of the pass of the loop in which they came: what
    they have in common is done once. Whoever looks at the queue from the loop lets them in first.

    `listener` is told on the loop of who was let in, of the outcomes of calls and of the requests that were found too
    late, in one wake-up for all that ended since the last.
    """

    def __init__(
        self,
        batch: BatchPolicy,
        queue: QueuePolicy,
        clock: Clock,
        listener: Listener,
    ) -> None:
        self.batch_policy = batch
        self.queue = RequestQueue(batch, queue)
        self.clock = clock
        self.lock = threading.Lock()
        self.layout: Layout
        self.admission: Admission
        self.loop: asyncio.AbstractEventLoop
        self.engines: list[EngineState] = []
        self.workers: list[Worker] = []
        self.delivery = Deviation()
        self.calls_in_flight = 0
        self.streams_in_flight = 0
        self.longest_loop_call = 0.0
        self.stopping = False
        self.works = True
        """Whether there is an engine that is not lost. True before they are loaded: the queue takes requests then."""
        self._listener = listener
        self.arrivals: list[Pending] = []
        self._idle: list[Worker] = []
        self.armed = False
        self._outcomes: list[Outcome] = []
        self._late: list[Pending] = []
        self._notified = False

    # ------------------------------------------------------------------------------------- lifecycle

    async def load(self, engines: Iterable[Engine], workers_per_engine: int) -> None:
        """Load and warm up every engine in the thread of its first slot. Raises what `load` raises, as
        `ModelLoadError` where that is no `EngineError`."""
        self.loop = asyncio.get_running_loop()
        self.engines = [EngineState(index, engine) for index, engine in enumerate(engines)]
        for state in self.engines:
            kind = TaskWorker if inspect.iscoroutinefunction(state.engine.infer) else ThreadWorker
            streams = state.engine.max_streams
            slots = [self._slot(state, streams=not streams) for _ in range(workers_per_engine)]
            slots += [self._slot(state, calls=False) for _ in range(streams)]
            self.workers += [kind(self, state, slot, number) for number, slot in enumerate(slots)]
        self.queue.slots = sum(worker.slot.calls for worker in self.workers)
        owners = [worker for worker in self.workers if worker.owns_engine]
        for worker in owners:
            worker.start()
        await _all_done(worker.loaded for worker in owners)

    def _slot(self, state: EngineState, *, calls: bool = True, streams: bool = True) -> Slot:
        return Slot(state.index, state.latency, delivery=self.delivery, calls=calls, streams=streams)

    async def serve(self, admission: Admission) -> None:
        """Measure the engines that may run on the loop's thread, then let the slots pull."""
        self.layout = Layout(admission.info)
        self.admission = admission
        owners = [worker for worker in self.workers if worker.owns_engine]
        for worker in owners:
            worker.go()
        await _all_done(worker.measured for worker in owners)
        for state in self.engines:
            state.ready = True
        for worker in self.workers:
            if worker.owns_engine:
                worker.go()
            else:
                worker.start()

    def shut(self) -> tuple[list[Pending], list[Pending]]:
        """Let no slot pull any more. Returns who waited for room, and who was queued or is running."""
        self.let_in()
        with self.lock:
            self.stopping = True
            self._idle.clear()
            waiting, admitted = self.queue.clear()
            running = self.running()
            late, self._late = self._late, []
        return waiting, admitted + running + late

    async def stop(self, patience: float) -> list[str]:
        """End the slots and unload the engines. A slot whose call does not end within `patience` seconds is left
        behind; returns the names of those."""
        with self.lock:
            self.stopping = True
            self._idle.clear()
        hung: list[str] = []
        # The engine is unloaded by the slot that loaded it, when its other slots have ended.
        for owners in (False, True):
            group = [worker for worker in self.workers if worker.started and worker.owns_engine is owners]
            for worker in group:
                worker.stop()
            if group:
                await asyncio.wait([worker.ended for worker in group], timeout=patience)
            for worker in group:
                if not worker.ended.done():
                    logger.error("%s: a call hangs; its slot is left behind: %r", worker.name, worker.state.engine)
                    hung.append(worker.name)
                    await worker.abandon(patience)
        return hung

    # ------------------------------------------------------------------------------ the loop's side

    def offer(self, item: Pending) -> None:
        """A request arrives. Its future hears if there is no room for it."""
        self.arrivals.append(item)
        if not self.armed:
            self.turn_soon()

    def turn_soon(self) -> None:
        """Let in who arrived and wake a slot at the end of this pass of the loop, so that all who are ready now join
        its batch."""
        if not self.armed:
            self.armed = True
            self.loop.call_soon(self._turn)

    def let_in(self) -> None:
        """Queue who has arrived."""
        arrivals = self.arrivals
        if not arrivals:
            return
        self.arrivals = []
        self._listener.arrived(len(arrivals))
        try:
            with self.lock:
                count = self.queue.push_many(arrivals)
            staying = arrivals
            if count < len(arrivals):
                staying = arrivals[:count] + [item for item in arrivals[count:] if self._let_in_singly(item)]
            if staying:
                self._listener.let_in(staying)
        except Exception:
            logger.exception("those who arrived could not be let in")
            with self.lock:
                for item in arrivals:
                    self.queue.remove(item)
            self._listener.broken(arrivals)

    def _let_in_singly(self, item: Pending) -> bool:
        """There may be no room at once: the policy says what becomes of the request, and who must go for it. Returns
        whether it got in, or waits for room."""
        patience = self.queue.policy.block_timeout if item.block_timeout is None else item.block_timeout
        try:
            with self.lock:
                evicted = self.queue.push(item, item.overflow, may_wait=patience != 0)
                eviction = self.queue.evicted() if evicted else None
        except EngineError as refusal:
            self._listener.turn_away(item, refusal)
            return False
        if eviction is not None:
            self._listener.evict(evicted, eviction)
        elif patience is not None and item.state is State.WAITING:
            self._listener.waits(item, patience)
        return True

    def take_out(self, item: Pending) -> State:
        """Take a request out of the queue, wherever it stands there. Returns where that was."""
        self.let_in()
        with self.lock:
            state = item.state
            if self.queue.remove(item):
                self.turn_soon()
        return state

    def give_up_room(self, item: Pending) -> Overloaded | None:
        """A request waits for room no longer. Returns its refusal; None if it has got in meanwhile."""
        with self.lock:
            if item.state is not State.WAITING:
                return None
            self.queue.remove(item)
            self.turn_soon()  # others may have got in, in its place
            return Overloaded("there was no room in the queue in time", retry_after=self.queue.drain_time())

    def _turn(self) -> None:
        """Let in who arrived; then wake one idle slot (it wakes the next if there is more), or run its batch here."""
        self.armed = False
        self.let_in()
        with self.lock:
            worker = self._claim_idle()
            if worker is None:
                return
            batch: Batch | None = None
            if worker.state.on_loop:
                batch = self.pull(worker, worker.loop_slot)
                if batch is None:
                    self._idle.remove(worker)
        if batch is None:
            worker.wake()
        else:
            self._run_here(worker, batch)

    def _claim_idle(self) -> Worker | None:
        """An idle slot that may run something of what is there, taken off the idle list."""
        if len(self.workers) == 1:  # then it may run anything
            return self._idle.pop() if self._idle and self.works and self.queue.has_any() else None
        for index in range(len(self._idle) - 1, -1, -1):
            worker = self._idle[index]
            if not worker.state.lost and self.queue.has_work(worker.slot):
                return self._idle.pop(index)
        return None

    def _run_here(self, worker: Worker, batch: Batch) -> None:
        outcome = worker.run_call(batch)
        with self.lock:
            if outcome is not None:
                self._account(worker, outcome)
                self._judge_loop_call(worker.state, outcome)
            late, self._late = self._late, []
            lost = worker.state.lost
            if not lost:
                self._idle.append(worker)
        if lost:
            worker.wake()  # its thread asks for the engine's health
        self._listener.settle(self, [] if outcome is None else [outcome], late)
        self.turn_soon()  # after those who have just had their answers, and may ask again
        if outcome is not None and isinstance(outcome.error, (KeyboardInterrupt, SystemExit)):
            raise outcome.error  # this is the loop's own thread: they are for the program, not only for the callers

    def _judge_loop_call(self, state: EngineState, outcome: Outcome) -> None:
        """Whether the engine may stay on the loop's thread after this call."""
        self.longest_loop_call = max(self.longest_loop_call, outcome.elapsed)
        if outcome.elapsed > 4 * LOOP_CALL_LIMIT:
            batch = outcome.batch
            usual = state.latency[batch.shape].upper(batch.rows) or 0.0
            if outcome.elapsed > LONG_LOOP_CALL:
                state.long_calls.append(outcome.ended)
            often = len(state.long_calls) == LONG_LOOP_CALLS and outcome.ended - state.long_calls[0] < 60.0
            state.on_loop = not often and usual <= 4 * LOOP_CALL_LIMIT

    def _deliver(self) -> None:
        with self.lock:
            self._notified = False
            outcomes, self._outcomes = self._outcomes, []
            late, self._late = self._late, []
        now = self.clock()  # not after those who submitted have been called back, which may take as long as it likes
        self._listener.settle(self, outcomes, late)
        with self.lock:
            for outcome in outcomes:
                batch = outcome.batch
                predicted = outcome.state.latency[batch.shape].lower(batch.rows, now)
                if predicted and batch.members[0].stream is None:
                    self.delivery.observe(now - batch.started - predicted)
        self.turn_soon()  # after those who have just had their answers, and may ask again

    def take_over(self, item: Pending, *, may_wait: bool) -> None:
        """Queue a request of a dispatch none of whose engines works; one that was in the lost call comes back alone.
        Called under the lock; raises `Overloaded`."""
        if item.losses:
            self.queue.give_back([item])
        else:
            self.queue.push(item, QueueOverflowPolicy.BLOCK, may_wait=may_wait)
        self.turn_soon()

    def running(self) -> list[Pending]:
        """The members of the calls that are being made."""
        batches = [worker.running for worker in self.workers]
        return [item for batch in batches if batch is not None for item in batch.members]

    def depth(self) -> int:
        """Requests queued, returned to run alone, and running."""
        with self.lock:
            return self.queue.queued + self.queue.returned + len(self.running())

    def health(self) -> list[EngineHealth]:
        """Each engine: loading, ready, stuck or lost."""
        now = self.clock()
        with self.lock:
            return [EngineHealth(state.name, self._status(state, now)) for state in self.engines]

    def _status(self, state: EngineState, now: float) -> str:
        if not state.ready:
            return "loading"
        if state.lost:
            return "lost"
        stuck = any(worker.is_stuck(now) for worker in self.workers if worker.state is state)
        return "stuck" if stuck else "ready"

    # ------------------------------------------------------------------------------ the slots' side

    def pull(self, worker: Worker, slot: Slot) -> Batch | None:
        """The next batch for a slot, or a place on the idle list for its worker. Called under the lock."""
        pull = self.queue.pull(self.clock(), slot)
        if pull.expired:
            self._late += pull.expired
        if pull.batch is None:
            worker.wake_at = pull.wake_at
            self._idle.append(worker)
        else:
            worker.running = pull.batch
            if slot.calls:
                self.calls_in_flight += 1
            else:
                self.streams_in_flight += 1
            if self._idle and (other := self._claim_idle()) is not None:
                other.wake()
        return pull.batch

    def next(self, worker: Worker, outcome: Outcome | None) -> Batch | None:
        """Take a slot's last outcome, and give it its next batch. None if it is to park until it is woken; or, `parked`
        being False, to ask for its lost engine's health: a slot on the idle list is asleep, since whoever takes it off
        that list wakes it."""
        with self.lock:
            if outcome is not None:
                self._account(worker, outcome)
                self._outcomes.append(outcome)
            batch: Batch | None = None
            worker.parked, worker.wake_at = True, math.inf
            if self.stopping:
                pass  # `Worker.stop` wakes it
            elif worker.state.lost:
                worker.parked = False
            elif self._gives_way():
                self._idle.append(worker)
            else:
                batch = self.pull(worker, worker.slot)
            notify = not self._notified and bool(self._outcomes or self._late)
            self._notified = self._notified or notify
        if notify:
            # The last thing before the thread blocks or runs its engine: the loop's thread, once awake, would only wait
            # for the interpreter.
            self.loop.call_soon_threadsafe(self._deliver)
        return batch

    def drop_late(self, worker: Worker, batch: Batch, now: float) -> Batch | None:
        """A slot was held up before its call. What is left of the batch without the members that are due to expire by
        now; None if nothing is."""
        with self.lock:
            slot = worker.slot
            latest = slot.answers_by(slot.latency[batch.shape], batch.rows, now)
            late = [item for item in batch.members if item.deadline < latest]
            if not late:
                return batch
            self._late += late
            rest = worker.running = batch.without(late)
            if rest is None:
                self.calls_in_flight -= 1
            notify, self._notified = not self._notified, True
        if notify:
            self.loop.call_soon_threadsafe(self._deliver)
        return rest

    def _gives_way(self) -> bool:
        """Whether a slot should let the loop hand out answers before it pulls again: only background work waits, less
        than a batch of it, and those who hear their answer now may ask for something more urgent, or more of the same.
        """
        queue = self.queue
        return bool(self._outcomes) and queue.rows < self.batch_policy.max_batch_size and queue.is_background_only()

    def unpark(self, worker: Worker) -> bool:
        """A slot's wait ran out: whether it may pull. If not, somebody has claimed it and will wake it."""
        with self.lock:
            if worker in self._idle:
                self._idle.remove(worker)
                return True
            return False

    def fail(self, worker: Worker) -> None:
        """A slot has ended by a failure of its own, not its engine's: what it had comes back as from a lost engine."""
        with self.lock:
            self._lose(worker.state)
            if worker.running is not None:
                outcome = Outcome(worker.state, worker.running)
                outcome.error = Unavailable(f"{worker.name}: the slot failed")
                outcome.ended = self.clock()
                self._account(worker, outcome)
                self._outcomes.append(outcome)
        self.loop.call_soon_threadsafe(self._deliver)
        self.loop.call_soon_threadsafe(self._listener.lost, self, worker.state.index)

    def recovered(self, state: EngineState) -> None:
        """A lost engine works again: its slots pull."""
        with self.lock:
            state.lost = False
            self.works = True

    def _account(self, worker: Worker, outcome: Outcome) -> None:
        batch, elapsed = outcome.batch, outcome.elapsed
        worker.running = None
        if isinstance(outcome.error, Unavailable):
            self._lose(outcome.state)
        if not worker.slot.calls:  # a stream beside the calls takes none of their time
            self.streams_in_flight -= 1
            return
        self.calls_in_flight -= 1
        self.queue.finish(batch, elapsed, outcome.ended)
        if outcome.error is None and batch.members[0].stream is None:
            outcome.state.latency[batch.shape].observe(batch.rows, elapsed, outcome.ended)

    def _lose(self, state: EngineState) -> None:
        state.lost = True
        self.works = not all(state.lost for state in self.engines)


async def _all_done(futures: Iterable[asyncio.Future[None]]) -> None:
    """Wait for all; then raise the first error."""
    for result in await asyncio.gather(*futures, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
