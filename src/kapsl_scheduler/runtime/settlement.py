"""Settlement: what becomes of requests. Answers, errors, retries, and the books of them.

Everything here runs on the loop's thread. What is not here: admission (runtime.entrance), and how calls are made
(runtime.worker).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final, cast

from kapsl_scheduler.core.batch import Pending, State
from kapsl_scheduler.core.health import RetryBudget
from kapsl_scheduler.errors import DeadlineExceeded, EngineError, InferenceError, ResourceExhausted, Unavailable
from kapsl_scheduler.ports import Clock, Observer
from kapsl_scheduler.runtime.deadlines import Alarm, Deadlines
from kapsl_scheduler.runtime.dispatch import Dispatch
from kapsl_scheduler.runtime.metrics import Books, ClassStatistics, SchedulerStatistics, by_bound, percentile_of
from kapsl_scheduler.runtime.worker import Outcome
from kapsl_scheduler.types import Array, InferenceResponse, Priority, Tensors

__all__ = ["Settlement", "as_engine_error", "report"]

logger = logging.getLogger(__name__)


_NONE: Final[tuple[Array, ...]] = ()


class Settlement:
    """Resolves each request's future exactly once, if its caller still waits.

    `deadlines` watches over those who are let in. `refuge` names the dispatch that takes over when no engine of a
    dispatch works, or None.
    """

    def __init__(
        self,
        clock: Clock,
        observer: Observer | None,
        deadlines: Deadlines,
        refuge: Callable[[Dispatch], Dispatch | None],
    ) -> None:
        self.books = Books()
        self._deadlines = deadlines
        self._drained: asyncio.Event | None = None
        self._clock = clock
        self._observer = observer
        self._refuge = refuge
        self._budget = RetryBudget(clock())

    def closed(self, requests: int) -> None:
        """So many requests have had their answer, or their caller has gone."""
        self.books.open -= requests
        if self._drained is not None and not self.books.open:
            self._drained.set()

    async def drained(self) -> None:
        """Wait until nobody waits for an answer."""
        if self.books.open:
            self._drained = asyncio.Event()
            await self._drained.wait()

    def arrived(self, requests: int) -> None:
        """So many requests have arrived; what becomes of each is told next."""
        self.books.offered += requests
        self.books.open += requests

    def let_in(self, items: Sequence[Pending]) -> None:
        """Requests are queued, or wait for room."""
        self._deadlines.add_all(items)

    def waits(self, item: Pending, seconds: float) -> None:
        """A request waits for room, and for so long at most."""
        self._deadlines.add(item, seconds, Alarm.ROOM)

    def turn_away(self, item: Pending, refusal: EngineError) -> None:
        """A request that has just arrived does not get in."""
        if isinstance(refusal, ResourceExhausted):
            self.books.invalid += self.fail([item], refusal)
        else:
            self.books.refused += self.fail([item], refusal)

    def evict(self, items: Sequence[Pending], eviction: EngineError) -> None:
        """Queued requests have made room for others."""
        self.books.evicted += self.fail(items, eviction)

    def fail(self, items: Iterable[Pending], error: EngineError) -> int:
        """Give each caller that still waits an instance of the error of its own. Returns how many those were; which
        line of the books they belong to is the caller's to say."""
        failed = 0
        for item in items:
            if item.state is not State.RUNNING:
                item.inputs = _NONE  # whoever still holds the request need not hold them
            item.state = State.DONE
            if not item.future.done():
                item.future.set_exception(error.fresh())
                failed += 1
        self.closed(failed)
        return failed

    def settle(self, dispatch: Dispatch, outcomes: Sequence[Outcome], late: Sequence[Pending]) -> None:
        """Calls have ended, and requests were found too late for theirs."""
        if late:
            error = DeadlineExceeded("the deadline comes before the request could be answered")
            self.books.expired += self.fail(late, error)
        for outcome in outcomes:
            try:
                self._settle(dispatch, outcome)
            except Exception:
                logger.exception("what a call came to could not be told to its callers")
                self.books.failed += self.fail(outcome.batch.members, InferenceError("the scheduler failed"))

    def _settle(self, dispatch: Dispatch, outcome: Outcome) -> None:
        if outcome.error is None:
            try:
                self._answer(dispatch, outcome)
            except Exception as error:  # outputs that do not fit the batch are the engine's failure
                outcome.error = error
        if outcome.error is not None:
            self._recover(dispatch, outcome, as_engine_error(outcome.error))
        self._count(outcome)

    def broken(self, items: Sequence[Pending]) -> None:
        """Requests that have arrived could not be let in, for no fault of theirs."""
        self.books.failed += self.fail(items, InferenceError("the scheduler failed"))

    def lost(self, dispatch: Dispatch, engine: int) -> None:
        """A slot of the engine has failed, and the engine is not used any more."""
        self._after_loss(dispatch, engine, Unavailable("the engine's slot failed"))

    def _count(self, outcome: Outcome) -> None:
        books, batch = self.books, outcome.batch
        books.calls += 1
        books.rows += batch.rows
        books.busy_time += outcome.elapsed
        books.batch_sizes[batch.rows] = books.batch_sizes.get(batch.rows, 0) + 1
        if self._observer is not None:
            try:
                self._observer.on_call(
                    rows=batch.rows,
                    requests=len(batch.members),
                    started=batch.started,
                    elapsed=outcome.elapsed,
                    failed=outcome.error is not None,
                    members=batch.members,
                )
            except Exception:
                logger.exception("the observer failed")

    def _answer(self, dispatch: Dispatch, outcome: Outcome) -> None:
        """Each member's rows to its caller."""
        batch, elapsed, books = outcome.batch, outcome.elapsed, self.books
        # A stream's chunks have gone their own way: its future only says that it ended.
        stream = batch.members[0].stream is not None
        outputs = cast(Tensors, outcome.outputs)
        parts: Iterable[tuple[Array, ...]] = [_NONE] if stream else dispatch.layout.split(outputs, batch)
        names = () if stream else tuple(outputs)
        started, rows, members = batch.started, batch.rows, batch.members
        now = self._clock()  # and not after those who submitted have been called back
        gone: set[int] = set()  # by identity: a search through a large batch for each member would block the loop
        for item, part in zip(members, parts, strict=True):
            item.inputs = _NONE  # whoever still holds the request need not hold them
            try:
                item.future.set_result(
                    InferenceResponse(names, part, started - item.arrival, elapsed, rows, item.request_id)
                )
            except asyncio.InvalidStateError:
                gone.add(id(item))
        self._deadlines.answered(members)
        if gone:
            members = [item for item in members if id(item) not in gone]
            books.discarded += len(gone)
        if rows == batch.rows_by_class[batch.leader]:
            books.classes[batch.leader].add(started, now, [item.arrival for item in members])
        else:
            for item in members:
                books.classes[item.priority].add(started, now, [item.arrival])
        books.succeeded += len(members)
        self._budget.earn(len(members))
        self.closed(len(members))

    def _recover(self, dispatch: Dispatch, outcome: Outcome, error: EngineError) -> None:
        """A call failed: its members come back to run alone, where that may help and the budget allows."""
        batch, books = outcome.batch, self.books
        met_loss = isinstance(error, Unavailable)
        lost = met_loss or outcome.state.lost  # by another slot's call, or by this one
        members = [item for item in batch.members if not item.future.done()]
        books.discarded += len(batch.members) - len(members)
        may_return = outcome.state.engine.retry and batch.members[0].stream is None and not dispatch.stopping
        if lost:
            for item in members:
                item.losses += met_loss
                item.unpin()
        if not met_loss and len(batch.members) == 1:
            may_return = False
        now = self._clock()
        back = [item for item in members if may_return and item.losses < 2 and self._budget.take(now)]
        books.retried += len(back)
        returns = {id(item) for item in back}
        books.failed += self.fail((item for item in members if id(item) not in returns), error)
        for item in batch.members:
            if id(item) not in returns:
                item.inputs = _NONE
        with dispatch.lock:
            dispatch.queue.give_back(back)
        dispatch.turn_soon()
        if lost:
            gone = error if met_loss else Unavailable("the engine was lost")
            self._after_loss(dispatch, outcome.state.index, gone)

    def _after_loss(self, dispatch: Dispatch, engine: int, error: EngineError) -> None:
        """An engine is lost: its sessions may go anywhere; if no other works, everybody goes to the refuge."""
        dispatch.let_in()
        with dispatch.lock:
            dispatch.queue.unpin(engine)
            dispatch.turn_soon()
            if dispatch.works:
                return
            waiting, queued = dispatch.queue.clear()
        refuge = self._refuge(dispatch)
        if refuge is None:
            self.books.refused += self.fail(waiting, error)
            self.books.failed += self.fail(queued, error)
            return
        self.books.failed += self._move(queued, refuge, may_wait=False)
        self.books.refused += self._move(waiting, refuge, may_wait=True)

    def _move(self, items: Iterable[Pending], refuge: Dispatch, *, may_wait: bool) -> int:
        """Let the refuge take requests over. Returns how many it had no room for: those have failed."""
        failed = 0
        for item in items:
            item.home = refuge
            try:
                with refuge.lock:
                    refuge.take_over(item, may_wait=may_wait)
            except EngineError as refusal:
                failed += self.fail([item], refusal)
        return failed


def as_engine_error(error: BaseException) -> EngineError:
    """What an engine raised, as its callers hear it."""
    if isinstance(error, EngineError):
        return error
    try:
        wrapped = InferenceError(f"{type(error).__name__}: {error}")
    except Exception:  # it cannot even say what it is
        wrapped = InferenceError(type(error).__name__)
    wrapped.__cause__ = error
    return wrapped


def report(books: Books, dispatches: Sequence[Dispatch]) -> SchedulerStatistics:
    """The books together with what the queues and the slots hold at this moment."""
    waiting = queued = calls_in_flight = streams_in_flight = slots = 0
    queued_by_class = [0] * len(Priority)
    for dispatch in dispatches:
        with dispatch.lock:
            waiting += dispatch.queue.waiting
            queued += dispatch.queue.queued
            for priority, count in enumerate(dispatch.queue.queued_by_class()):
                queued_by_class[priority] += count
            calls_in_flight += dispatch.calls_in_flight
            streams_in_flight += dispatch.streams_in_flight
            slots += dispatch.queue.slots
    admitted = books.offered - books.invalid - books.refused - books.withdrawn - waiting
    ended = books.succeeded + books.failed + books.expired + books.cancelled + books.evicted
    classes: dict[str, ClassStatistics] = {}
    for priority, figures in zip(Priority, books.classes, strict=True):
        counts, total = figures.latency.latencies()
        classes[priority.name.lower()] = ClassStatistics(
            queued=queued_by_class[priority],
            succeeded=sum(counts),
            latency_p50=percentile_of(counts, 50),
            latency_p99=percentile_of(counts, 99),
            latency_total=total,
            queue_time_total=figures.queue_time,
            latency_counts=by_bound(counts),
        )
    return SchedulerStatistics(
        offered=books.offered,
        invalid=books.invalid,
        refused=books.refused,
        withdrawn=books.withdrawn,
        waiting=waiting,
        admitted=admitted,
        succeeded=books.succeeded,
        failed=books.failed,
        expired=books.expired,
        cancelled=books.cancelled,
        evicted=books.evicted,
        queued=queued,
        running=admitted - ended - queued,
        discarded=books.discarded,
        retried=books.retried,
        calls=books.calls,
        rows=books.rows,
        calls_in_flight=calls_in_flight,
        streams_in_flight=streams_in_flight,
        slots=slots,
        max_batch_size=dispatches[0].batch_policy.max_batch_size,
        busy_time=books.busy_time,
        batch_sizes=dict(sorted(books.batch_sizes.items())),
        classes=classes,
        background_bound=max(dispatch.queue.background_bound for dispatch in dispatches),
        longest_loop_call=max(dispatch.longest_loop_call for dispatch in dispatches),
    )
