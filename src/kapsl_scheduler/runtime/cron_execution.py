"""One dispatched run: its attempts, one after another, until it has ended.

An attempt asks the condition, gets its requests, sends them, hands out the answers. What is not here: when a run is
dispatched (`runtime.cron_scheduler`), what is written about it (`runtime.cron_intents`), the threads of somebody else's
functions (`runtime.offload`), streams of requests (`runtime.cron_stream`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from kapsl_scheduler.core.jobs import CronJob, CronOverflowPolicy, OnInterrupt, moment
from kapsl_scheduler.core.queue import QueueOverflowPolicy
from kapsl_scheduler.core.runs import Firing, JobState, Run, RunState
from kapsl_scheduler.errors import CronError, DeadlineExceeded, EngineError, Overloaded
from kapsl_scheduler.ports import CronTarget, SourceItem, is_source
from kapsl_scheduler.runtime.cron_feed import Feed, numbered
from kapsl_scheduler.runtime.cron_stream import PartlyFailed, RunLost, Stream, error_text, is_cancelled, row_count
from kapsl_scheduler.runtime.offload import Strangers, in_thread, taken_in_thread
from kapsl_scheduler.types import InferenceRequest, InferenceResponse

__all__ = ["Execution", "ExecutionHost", "nbytes"]

logger = logging.getLogger(__name__)

CALLBACK_LIMIT: Final = 30.0
"""Seconds that `on_result` may take where the job has no timeout of its own."""
CALLBACK_LEAST: Final = 0.5
CALLBACK_LAST: Final = 0.15
"""Seconds that `on_result` gets of a run that used up its timeout, and what it gets if the run was slow to end."""
BLOCK_LIMIT: Final = 60.0
"""Seconds that a firing under `block` waits for room where its job says nothing: None would be the queue's limit."""
_NOTHING: Final = (0, 0, 0, 0, 0)
"""The counts of a run that has done nothing yet."""
_LEAST: Final = 1e-3  # seconds: a timeout must be above 0, and this one is about to strike anyway


class ExecutionHost(Protocol):
    """What an execution needs of the scheduler that dispatched it."""

    strangers: Strangers

    def wall(self) -> int: ...
    def target(self, model: str | None) -> CronTarget: ...
    async def attempted(self, execution: Execution, after: Run) -> bool: ...
    def ended(self, execution: Execution, after: Run) -> None: ...
    async def alone(self, execution: Execution) -> None: ...
    def has_job(self, execution: Execution) -> bool: ...
    async def memory(self, job: str) -> Mapping[str, str]: ...
    async def ended_runs(self, job: str, keys: Collection[str]) -> frozenset[str]: ...
    async def checkpoint(self, execution: Execution, after: Run, memory: Mapping[str, str | None]) -> bool: ...


class Outcome(msgspec.Struct, frozen=True):
    """How an attempt ended. `error` is the exception, `result` what `on_result` is to hear if there is none."""

    state: RunState
    reason: str = ""
    error: Exception | None = None
    result: Any = None


class Execution:
    """A run in progress. `run` is its record as last written, `anchor` its job's when it was dispatched; `discarded`
    ones write nothing more: somebody else has written how they ended. `done` is how much of it lies behind, from 0 to
    1, where its source can say."""

    __slots__ = (
        "_failed_requests",
        "_feed",
        "_goes_ahead",
        "_host",
        "_input_bytes",
        "_job",
        "_memory",
        "_news",
        "_output_bytes",
        "_rows",
        "_stream",
        "_until",
        "anchor",
        "discarded",
        "done",
        "leave",
        "over",
        "recording",
        "requests",
        "run",
        "stopped",
        "task",
    )

    def __init__(self, host: ExecutionHost, job: CronJob, run: Run, anchor: int) -> None:
        self._host = host
        self._job = job
        self.run = run
        self.anchor = anchor
        self.requests = run.requests  # of its attempts in other processes
        self._failed_requests = run.failed_requests
        self._rows = run.rows
        self._input_bytes = run.input_bytes
        self._output_bytes = run.output_bytes
        self._goes_ahead = job.condition is None
        self._feed: Feed | None = None  # what is left of many requests, from one attempt to the next
        self._stream: Stream | None = None
        self._memory: Mapping[str, str] = {}  # as it was when it was last read
        self._news: dict[str, str | None] = {}  # what of it was written since, by this run
        self.done: float | None = None
        self._until: float | None = None  # on the loop's clock
        self.task: asyncio.Task[None] | None = None
        self.discarded = False
        self.stopped = False
        self.recording = False  # its end is being written: too late to cancel it
        self.over: asyncio.Future[None] | None = None  # done when it is, if somebody waits for it
        self.leave = "shutdown"  # the reason, should it be cancelled

    def discard(self, why: str) -> None:
        """Stop it without a word: its end is written."""
        self.discarded = True
        self.leave = why
        self.stop()

    def stop(self) -> None:
        """Cancel it, if it has begun, and once."""
        if self.task is not None and not self.stopped:
            self.stopped = True
            self.task.cancel()

    def is_of(self, books: JobState) -> bool:
        """Whether these are the books of its job: not of a later one of the same id."""
        return books.anchor == self.anchor and not self.run.detached

    def cut(self, state: RunState, reason: str, now: int) -> Run:
        """The record of the run if it ends here."""
        return self.on(self.run, state=state, reason=reason, ended=now)

    def add(self, request: Any, response: InferenceResponse | None, rows: int = 1) -> None:
        """Count a request that was answered, or (without a response) one that failed."""
        self.requests += 1
        self._rows += rows
        self._input_bytes += nbytes(request)
        if response is None:
            self._failed_requests += 1
        else:
            self._output_bytes += nbytes(getattr(response, "outputs", None))

    def counts(self) -> tuple[int, ...]:
        """What has been counted so far, for `recount`."""
        return self.requests, self._failed_requests, self._rows, self._input_bytes, self._output_bytes

    def recount(self, counts: tuple[int, ...]) -> None:
        """What was added since is to be done again."""
        self.requests, self._failed_requests, self._rows, self._input_bytes, self._output_bytes = counts

    def on(self, run: Run, **changes: Any) -> Run:
        """The record of the run with what it has done so far, over its attempts, and `changes`."""
        return msgspec.structs.replace(
            run,
            requests=self.requests,
            failed_requests=self._failed_requests,
            rows=self._rows,
            input_bytes=self._input_bytes,
            output_bytes=self._output_bytes,
            **changes,
        )

    async def __call__(self) -> None:
        """All attempts, then the end, written down. Being cancelled ends the run as cancelled."""
        try:
            timeout = self._job.run.timeout
            # The outcome of the last attempt; None where another process has taken the run.
            outcome = await (self._repeat() if timeout is None else self._repeat_within(timeout))
            if outcome is None or self.discarded:
                return
            callback_error = ""
            if self._job.on_result is not None and outcome.state is not RunState.SKIPPED:
                callback_error = await self._call_back(outcome)
        except asyncio.CancelledError:
            if not self.discarded:
                self.recording = True
                self._host.ended(self, self.cut_short())
            return
        self.recording = True
        # Not by `on`: handing keywords on costs more than all that is said here.
        after = msgspec.structs.replace(
            self.run,
            state=outcome.state,
            reason=outcome.reason,
            error="" if outcome.error is None else error_text(outcome.error),
            callback_error=callback_error,
            ended=self._host.wall(),
            requests=self.requests,
            failed_requests=self._failed_requests,
            rows=self._rows,
            input_bytes=self._input_bytes,
            output_bytes=self._output_bytes,
        )
        self._host.ended(self, after)

    def cut_short(self) -> Run:
        """What a run becomes that is cancelled: one that resumes waits for the next process, others are over."""
        if self._job.run.on_interrupt is OnInterrupt.RESUME and self.leave == "shutdown" and not self.run.detached:
            return self.on(self.run, state=RunState.PENDING, reason=self.leave, owner="")
        return self.cut(RunState.CANCELLED, self.leave, self._host.wall())

    # ------------------------------------------------------------------------------------------ attempts

    async def _repeat_within(self, timeout: float) -> Outcome | None:
        self._until = asyncio.get_running_loop().time() + timeout
        limit = asyncio.timeout_at(self._until)
        try:
            async with limit:
                return await self._repeat()
        except TimeoutError:
            error = TimeoutError(f"the run took longer than its timeout of {timeout:g} s")
            return Outcome(RunState.FAILED, "timeout", error)

    async def _repeat(self) -> Outcome | None:
        policy = self._job.run
        done = 0
        try:
            while True:
                done += 1
                try:
                    outcome = await self._perform(final=done >= policy.attempts)
                except RunLost:
                    return None
                except DeadlineExceeded as error:
                    outcome = Outcome(RunState.FAILED, "timeout", error)
                except Exception as error:
                    outcome = Outcome(RunState.FAILED, _reason(error), error)
                except asyncio.CancelledError:
                    if is_cancelled():
                        raise
                    within = RuntimeError("something that the run awaited was cancelled")
                    outcome = Outcome(RunState.FAILED, "cancelled", within)
                if outcome.state is not RunState.FAILED or done >= policy.attempts or not _may_pass(outcome.error):
                    if self._stream is not None:
                        self._stream.give_up()
                    return outcome
                await asyncio.sleep(min(policy.backoff * 2 ** min(done - 1, 60), policy.max_backoff))
                again = self.on(self.run, attempt=self.run.attempt + 1)
                if not await self._host.attempted(self, again):
                    return None
        finally:
            if self._feed is not None:
                await self._feed.close()

    async def _perform(self, *, final: bool) -> Outcome:
        """One attempt, the `final` one or not. What a callable has made is not made again for a later attempt here,
        unless an iterator broke. What is made again, there or in another process, goes on behind what is certain."""
        job = self._job
        firing = None
        if not self._goes_ahead:
            firing = self._firing()
            try:
                if not await self.strangers.call(_function(job.condition), firing):
                    return Outcome(RunState.SKIPPED, "condition")
            except Exception as error:
                return Outcome(RunState.SKIPPED, "condition", error)
            self._goes_ahead = True
        if self._feed is not None and self._feed.error is None:
            return await self._several(self._feed, final=final)
        request = job.request
        if is_source(request):
            items = await in_thread(request.items, firing or self._firing(), await self.memory())
            feed = self._feed_of(taken_in_thread(items), lasts=False)
            try:
                return await self._several(feed, final=False)
            finally:
                await feed.close()
        if callable(request):
            request = await self.strangers.call(request, firing or self._firing())
            if request is None:
                return Outcome(RunState.SUCCEEDED, "nothing to do")
            if isinstance(request, list | Iterator | AsyncIterator):
                keep = isinstance(request, list) and job.sink is None
                if keep and self._stream is None:  # what it answered elsewhere, `on_result` would never hear
                    self.recount(_NOTHING)
                self._feed = self._feed_of(numbered(request, self.requests), lasts=True)
                return await self._several(self._feed, final=final, keep=keep)
        if job.sink is not None:
            self._feed = self._feed_of(numbered([request], self.requests), lasts=True)
            return await self._several(self._feed, final=final)
        response = None
        try:
            response = await self.infer(request)
        except Overloaded as error:
            if not error.evicted:
                return self._refused(error)
            self.add(request, None, row_count(request))
            return Outcome(RunState.FAILED, "evicted", error)
        except Exception:
            self.add(request, None, row_count(request))
            raise
        self.add(request, response, row_count(request))
        return Outcome(RunState.SUCCEEDED, result=response)

    def _feed_of(self, items: AsyncIterator[SourceItem], *, lasts: bool) -> Feed:
        return Feed(items, ahead=self._job.run.max_in_flight, lasts=lasts, strangers=self.strangers)

    def _refused(self, error: Overloaded) -> Outcome:
        """There was no room: the firing does not take place, unless it has taken place already and is tried again."""
        return Outcome(RunState.SKIPPED if self.run.attempt == 1 else RunState.FAILED, "busy", error)

    async def _several(self, feed: Feed, *, final: bool, keep: bool = False) -> Outcome:
        stream = self._stream
        if stream is None:
            job = self._job
            stream = self._stream = Stream(
                self,
                job.sink,
                job.run.max_in_flight,
                keep=keep,
                requests=self.requests,
                failed=self._failed_requests,
            )
        await stream.run(feed, self._firing(), final=final)
        if stream.refused is not None:
            return self._refused(stream.refused)
        if stream.failed:
            reason = "error" if stream.first_error is None else _reason(stream.first_error)
            return Outcome(RunState.FAILED, reason, PartlyFailed(stream))
        return Outcome(RunState.SUCCEEDED, "" if stream.requests else "nothing to do", result=stream.kept)

    @property
    def strangers(self) -> Strangers:
        return self._host.strangers

    def infer(self, request: Any, *, starts: bool = True) -> Awaitable[InferenceResponse]:
        """Send a request under the job's class. One that `starts` the firing obeys the job's overflow policy; the
        others of a firing that has started wait for room."""
        job = self._job
        timeout = None if self._until is None else max(self._until - asyncio.get_running_loop().time(), _LEAST)
        wait = BLOCK_LIMIT if job.run.block_timeout is None else job.run.block_timeout
        if starts and job.overflow_policy is CronOverflowPolicy.SKIP_IF_BUSY:
            wait = 0.0
        return self._host.target(job.model).infer(
            request,
            priority=job.priority,
            timeout=timeout,
            force_cpu=job.force_cpu,
            overflow=QueueOverflowPolicy.BLOCK,
            block_timeout=wait if starts else None,
        )

    async def checkpoint(self, memory: Mapping[str, str | None]) -> bool:
        """Write down what is to be remembered, and how far the run is. False: it is another's now."""
        written = await self._host.checkpoint(self, self.on(self.run), memory)
        if written:
            self._news.update(memory)
        return written

    async def alone(self) -> None:
        """Wait until the runs that were stopped in favour of this one have let go of their sinks."""
        await self._host.alone(self)

    async def memory(self) -> Mapping[str, str]:
        """What the job's source and sink have remembered. A job that is gone has taken that with it, but for what this
        run knows of it; what there is under its id is a later job's, which may be at the same place."""
        found = await self._host.memory(self._job.id)
        if self._host.has_job(self):
            self._memory, self._news = found, {}
            return found
        known: dict[str, str | None] = {**self._memory, **self._news, **found}
        return {key: value for key, value in known.items() if value is not None}

    async def ended(self, memory: Mapping[str, str]) -> frozenset[str]:
        """The keys of runs of which the job's sink has remembered something and that have ended."""
        return await self._host.ended_runs(self._job.id, await in_thread(_runs_in, memory))

    def _firing(self) -> Firing:
        run = self.run
        return Firing(run.job, moment(run.nominal), run.origin, run.attempt)

    # ---------------------------------------------------------------------------------------- afterwards

    async def _call_back(self, outcome: Outcome) -> str:
        """Tell `on_result`. Returns what it raised, as text."""
        now = asyncio.get_running_loop().time()
        if self._until is None:
            until = now + CALLBACK_LIMIT
        else:
            until = max(min(now, self._until) + CALLBACK_LEAST, self._until, now + CALLBACK_LAST)
        result = outcome.result if outcome.error is None else outcome.error
        try:
            async with asyncio.timeout_at(until):
                await self.strangers.call(_function(self._job.on_result), self._job.id, result)
        except Exception as error:
            logger.warning("job %r: on_result failed: %s", self._job.id, error_text(error))
            return error_text(error)
        except asyncio.CancelledError:  # the run is over, whatever becomes of its callback
            return f"cut short: {self.leave}" if is_cancelled() else "something that it awaited was cancelled"
        return ""


_ANYBODYS_GUESS: Final = ("inference_error", "backend")


def _runs_in(memory: Mapping[str, str]) -> list[str]:
    """The keys of the runs that a sink has remembered. In a thread: a source may have remembered very much."""
    return [key.removeprefix("sink:") for key in memory if key.startswith("sink:")]


def _function(value: Any) -> Callable[..., Any]:
    return value  # type: ignore[no-any-return]  # a job that has been bound holds no names any more


def _reason(error: BaseException) -> str:
    code = getattr(error, "code", None)
    return code if isinstance(code, str) else "error"


def _may_pass(error: BaseException | None) -> bool:
    """Whether the same request may succeed later: the engine's errors say so themselves; of others, who knows."""
    if isinstance(error, EngineError | CronError):
        return error.retryable or error.code in _ANYBODYS_GUESS
    return not isinstance(error, ValueError | TypeError)


def nbytes(arrays: Any) -> int:
    """The bytes of the arrays in a request or an answer, as far as it holds arrays."""
    if isinstance(arrays, InferenceRequest):
        arrays = arrays.inputs
    if isinstance(arrays, np.ndarray):
        return arrays.nbytes
    if isinstance(arrays, Mapping):
        return sum(value.nbytes for value in arrays.values() if isinstance(value, np.ndarray))
    return 0
