"""A firing of many requests: a bounded number of them on their way at a time, their answers handed on in order.

However long the stream, what is held is what is on its way, one batch of answers, and what may have to be sent again.
At intervals the sink makes sure of what it was given, and what is then certain is written down: the run goes on behind
it, in its next attempt and after a crash. What is not here: where requests come from (`runtime.cron_feed`, `sources`)
and answers go (`sinks`), attempts and outcomes (`runtime.cron_execution`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from kapsl_scheduler.core.runs import Firing
from kapsl_scheduler.errors import Backend, CronError, InferenceError, InvalidInput, Overloaded, ResourceExhausted
from kapsl_scheduler.ports import SinkItem, SinkWriter, SourceItem
from kapsl_scheduler.runtime.cron_feed import Feed
from kapsl_scheduler.runtime.offload import Strangers, in_thread
from kapsl_scheduler.types import InferenceRequest, InferenceResponse

__all__ = ["PartlyFailed", "RunLost", "Stream", "error_text", "is_cancelled", "row_count"]

logger = logging.getLogger(__name__)

BATCH: Final = 256
"""Answers that a sink is given at a time."""
CHECKPOINT: Final = 2.0
"""Seconds between checkpoints."""
CHECKPOINT_AFTER: Final = 4096
"""Requests between checkpoints where the run holds them, to send them again should the sink lose their answers."""
LAST_WORD: Final = 0.5
"""Seconds that a stream which is cut short may take to make sure of what it has, and to close its sink."""
CLOSING: Final = 5.0
"""Seconds that the sink of any other may take to close."""
PAUSE: Final = 0.05
"""Seconds before a request is offered again that had to make room."""
HOPELESS: Final = 100
"""Requests in a row that the model failed, after which an attempt gives up."""

_DOUBTFUL: Final = (InferenceError, Backend, ResourceExhausted)
"""Errors that may be the request's own fault or the model's. Others (the model is gone, say) are never the request's:
they end the attempt."""


class RunLost(Exception):
    """Another process has taken the run: this one has nothing more to say about it."""


class PartlyFailed(CronError):
    """Some requests of a firing failed by their own fault; the others were answered, and their answers handed on. It is
    not tried again: nothing is left to do."""

    code = "partly_failed"

    def __init__(self, stream: Stream) -> None:
        error = stream.first_error
        first = "before it was interrupted" if error is None else f"the first ({stream.first_key}): {error_text(error)}"
        super().__init__(f"{stream.failed} of {stream.requests} requests failed, {first}")
        self.__cause__ = error


class StreamHost(Protocol):
    """The execution that the stream belongs to."""

    done: float | None
    discarded: bool

    @property
    def strangers(self) -> Strangers: ...

    def add(self, request: Any, response: InferenceResponse | None, rows: int = ...) -> None: ...
    def counts(self) -> tuple[int, ...]: ...
    def recount(self, counts: tuple[int, ...]) -> None: ...
    def infer(self, request: Any, *, starts: bool = ...) -> Awaitable[InferenceResponse]: ...
    async def checkpoint(self, memory: Mapping[str, str | None]) -> bool: ...
    async def memory(self) -> Mapping[str, str]: ...
    async def ended(self, memory: Mapping[str, str]) -> frozenset[str]: ...
    async def alone(self) -> None: ...


class Stream:
    """Sends the items of a run, over all its attempts, and hands on what becomes of them.

    A bad item harms only itself: of `requests` it counts the `failed` ones, and the first error is kept with its key.
    Whether an error of the model is the item's own shows when a later item is answered. Until then the item is in
    doubt: it is neither handed on nor remembered as done, so that a model which is out for a while loses nothing.
    What is to be sent again is counted again, and once: an attempt that fails takes back what it counted since all was
    certain. `refused` is why the first request of an attempt, and with it the attempt, found no room. `kept` has the
    answers in order, None for what failed; it is None where they are not to be kept.
    """

    def __init__(
        self, host: StreamHost, sink: Any, most: int, *, keep: bool, requests: int = 0, failed: int = 0
    ) -> None:
        self.requests = requests  # with those of the run's earlier attempts in other processes
        self.failed = failed
        self.first_error: Exception | None = None
        self.first_key = ""
        self.refused: Overloaded | None = None
        self.kept: list[InferenceResponse | None] | None = [] if keep else None
        self._host = host
        self._sink = sink
        self._most = most
        self._begin()

    def _begin(self) -> None:
        """What belongs to one attempt."""
        self.refused = None
        self._flying: deque[tuple[SourceItem, asyncio.Task[InferenceResponse] | None]] = deque()
        self._doubtful: list[tuple[SourceItem, Exception]] = []
        self._writer: SinkWriter | Callable[..., Any] | None = None
        self._answered: list[SinkItem] = []  # what the sink has not been given yet
        self._marks: dict[str, str | None] = {}  # what is to be remembered once the sink has it for good
        self._holds = False  # whether what the sink loses is to be sent again from here
        self._uncertain: list[SourceItem] = []  # which is this
        self._checked = asyncio.get_running_loop().time()
        self._at_work: asyncio.Future[Any] | None = None  # the sink, in its thread
        self._broken = False  # the sink may have lost something: nothing more is certain
        self._all_is_certain()

    async def run(self, feed: Feed, firing: Firing, *, final: bool) -> None:
        """One attempt: all items, to the last answer and the last checkpoint. A `final` one does not leave items in
        doubt at the end: they have failed. Raises what the source, the sink and the model raise.

        However it ends before its time, what is on its way is taken back, what was answered is made sure of, within
        half a second, and the feed has the rest again. Whoever comes next finds the sink closed, unless it hangs.
        """
        self._begin()
        self._holds = feed.lasts
        whole = False
        limit: float | None = None
        try:
            await self._open(firing)
            await self._send_all(feed)
            if self.refused is None:
                if feed.error is not None:
                    raise feed.error
                if self._doubtful and not final:
                    raise self._doubtful[0][1]
                await self._settle_doubtful()
                await self._make_sure()
                whole = True
        except (Exception, asyncio.CancelledError):
            for _, task in self._flying:
                if task is not None:
                    task.cancel()
            limit = asyncio.get_running_loop().time() + LAST_WORD
            await self._last_word()
            if is_cancelled():
                raise asyncio.CancelledError from None  # also where that came during the last word, as it does but once
            raise
        finally:
            # First what takes no wait: it is done also if this is cancelled once more.
            if feed.lasts:
                feed.give_back([*self._uncertain, *(item for item, _ in (*self._doubtful, *self._flying))])
            if not whole:
                self._count_as_when_certain()
            closed = self._close()
            try:
                await self._host.strangers.end(*(task for _, task in self._flying if task is not None))
            finally:
                await self._let_close(closed, limit)

    def give_up(self) -> None:
        """There is no further attempt: what is in doubt has failed."""
        for item, error in self._doubtful:
            self._count(item, None, error)

    async def _send_all(self, feed: Feed) -> None:
        """Send what there is, as much at a time as may be on its way, and hand on the answers, as they come."""
        begun = False
        watched: asyncio.Task[Any] | None = None
        while True:
            feed.news.clear()
            while feed.ready and len(self._flying) < (self._most if begun else 1):
                self._take_off(feed.take(), begun)
            if self._flying:
                _, task = self._flying[0]
                if task is None or task.done():
                    if not begun and task is not None and self._is_refused(task):
                        return
                    begun = begun or task is not None
                    await self._land()
                    continue
                if task is not watched:
                    watched = task
                    task.add_done_callback(lambda _: feed.news.set())
            elif feed.ended and not feed.ready:
                return
            await self._wait(feed)

    def _take_off(self, item: SourceItem, begun: bool) -> None:
        task = None
        if item.error is None:
            sent = self._send(item.request) if begun else self._send_first(item.request)
            task = asyncio.get_running_loop().create_task(sent, name="cron request")
        self._flying.append((item, task))

    async def _send_first(self, request: Any) -> InferenceResponse:
        """Alone: the job's overflow policy decides whether the firing takes place."""
        try:
            return await self._host.infer(request)
        except Overloaded as error:
            if not error.evicted:
                raise
        return await self._send(request)

    async def _send(self, request: Any) -> InferenceResponse:
        """A request of a firing that has begun: it waits for room, also when it had to make room for others."""
        while True:
            try:
                return await self._host.infer(request, starts=False)
            except Overloaded as error:
                await asyncio.sleep(min(error.retry_after or PAUSE, 1.0))

    def _is_refused(self, first: asyncio.Task[InferenceResponse]) -> bool:
        error = None if first.cancelled() else first.exception()
        self.refused = error if isinstance(error, Overloaded) else None
        return self.refused is not None

    async def _wait(self, feed: Feed) -> None:
        """For something to send or to hand on; or until what has been answered is to be made sure of."""
        if not (self._marks or self._answered or self._uncertain):
            await feed.news.wait()
            return
        try:
            async with asyncio.timeout_at(self._checked + CHECKPOINT):
                await feed.news.wait()
        except TimeoutError:
            await self._make_sure()

    async def _land(self) -> None:
        """The item that was sent first of those on their way is back."""
        item, task = self._flying[0]
        error, response = item.error, None
        if task is not None:
            try:
                response = task.result()
            except (InvalidInput, *_DOUBTFUL) as failure:
                error = failure
        if error is None:
            await self._settle_doubtful()  # if that fails, this one is still on its way
            self._flying.popleft()
            await self._settle(item, response, None)
            return
        self._flying.popleft()
        if not self._doubtful and not isinstance(error, _DOUBTFUL):
            await self._settle(item, None, error)
        else:  # order is kept: behind an item in doubt, others wait
            self._doubtful.append((item, error))
            if len(self._doubtful) >= HOPELESS:
                raise self._doubtful[0][1]

    async def _settle_doubtful(self) -> None:
        """The model works: what it failed, it failed for the item's own sake."""
        while self._doubtful:
            item, error = self._doubtful.pop(0)
            await self._settle(item, None, error)

    async def _settle(self, item: SourceItem, response: InferenceResponse | None, error: Exception | None) -> None:
        """Of this item and all before it, it is known what became of them."""
        self._count(item, response, error)
        self._host.done = item.progress
        if self.kept is not None:
            self.kept.append(response)
        self._marks.update(item.marks)
        if self._sink is not None:
            self._answered.append(SinkItem(item.key, response, error))
            if self._holds:
                self._uncertain.append(item)
            if len(self._answered) >= BATCH:
                await self._hand_on()
        elif self._holds:
            self._all_is_certain()
        if asyncio.get_running_loop().time() - self._checked >= CHECKPOINT or len(self._uncertain) >= CHECKPOINT_AFTER:
            await self._make_sure()

    def _count(self, item: SourceItem, response: InferenceResponse | None, error: Exception | None) -> None:
        self.requests += 1
        self._host.add(item.request, response, row_count(item.request))
        if error is not None:
            self.failed += 1
            if self.first_error is None:
                self.first_error, self.first_key = error, item.key

    def _all_is_certain(self) -> None:
        """Whatever happens, what has been counted is not sent again."""
        self._uncertain = []
        done = self._host.done
        self._certain = self.requests, self.failed, self.first_error, self.first_key, done, self._host.counts()

    def _count_as_when_certain(self) -> None:
        self.requests, self.failed, self.first_error, self.first_key, self._host.done, counts = self._certain
        self._host.recount(counts)

    # ---------------------------------------------------------------------------------------------- sink

    async def _open(self, firing: Firing) -> None:
        if self._sink is None:
            return
        if callable(self._sink):
            self._writer = self._sink
        else:
            await self._host.alone()
            memory = await self._host.memory()
            firing = msgspec.structs.replace(firing, ended=await self._host.ended(memory))
            self._writer = await self._in_turn(self._sink.open, firing, memory)
            await self._make_sure()  # where the run begins, should it be cut short before the next

    async def _hand_on(self) -> None:
        """Give the sink what has been answered."""
        if not self._answered:
            return
        items, self._answered = self._answered, []
        if isinstance(self._writer, SinkWriter):
            await self._in_turn(self._writer.write, items)
            return
        assert self._writer is not None
        self._broken = True
        await self._host.strangers.call(self._writer, items)
        self._broken = False
        if self._holds:
            self._all_is_certain()

    async def _make_sure(self) -> None:
        """A checkpoint: what the sink has for good, and where the source was then."""
        await self._hand_on()
        self._checked = asyncio.get_running_loop().time()
        memory = dict(self._marks)
        if isinstance(self._writer, SinkWriter):
            memory.update(await self._in_turn(self._writer.flush))
        # Until it is written, a sink that is opened again goes back to what was written before.
        if not await self._host.checkpoint(memory):
            raise RunLost
        self._marks = {}
        self._all_is_certain()

    async def _in_turn(self, method: Callable[..., Any], *words: Any) -> Any:
        """Call the sink in a thread, once it is done with what it was given before: a caller that was cancelled has
        left it at work."""
        await self._sink_is_done()
        self._at_work = in_thread(method, *words)
        return await self._sink_is_done()

    async def _sink_is_done(self) -> Any:
        if self._at_work is None:
            return None
        try:
            result = await asyncio.shield(self._at_work)
        except Exception:
            self._broken = True
            raise
        self._at_work = None
        return result

    async def _last_word(self) -> None:
        """It is cut short. What the sink has may be made sure of; if not, it is done again."""
        if self._broken or self._host.discarded:  # a discarded run writes no checkpoint
            return
        try:
            async with asyncio.timeout(LAST_WORD):
                await self._make_sure()
        except (Exception, asyncio.CancelledError) as error:
            logger.debug("no last checkpoint of a run: %r", error)

    def _close(self) -> asyncio.Future[None]:
        """Let go of the sink, once it is done with what it is at: that may be its opening. The future is done when it
        is closed, whatever came of it: what was flushed is flushed."""
        writer, at_work = self._writer, self._at_work
        closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def close(before: asyncio.Future[Any] | None) -> None:
            opened = writer
            if before is not None and before.exception() is None and opened is None:
                opened = before.result()
            if isinstance(opened, SinkWriter):
                in_thread(opened.close).add_done_callback(is_closed)
            else:
                closed.set_result(None)

        def is_closed(closing: asyncio.Future[None]) -> None:
            closing.exception()  # which changes nothing
            closed.set_result(None)

        if at_work is None:
            close(None)
        else:
            at_work.add_done_callback(close)
        return closed

    async def _let_close(self, closed: asyncio.Future[None], limit: float | None) -> None:
        """Wait for it: of a run that is cancelled until the limit, of others longer. A sink that hangs is left to its
        thread."""
        if closed.done():
            return
        now = asyncio.get_running_loop().time()
        limit = now + LAST_WORD if limit is None else max(limit, now)
        try:
            await asyncio.wait((closed,), timeout=limit - now if is_cancelled() else CLOSING)
        except asyncio.CancelledError:
            await asyncio.wait((closed,), timeout=LAST_WORD)
            raise


def is_cancelled() -> bool:
    """Whether the run itself is being cancelled, and not merely something that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def row_count(request: Any) -> int:
    """Rows of a request, which has its batch axis in front if it has more than one axis."""
    if isinstance(request, InferenceRequest):
        request = request.inputs
    if not isinstance(request, np.ndarray) and isinstance(request, Mapping):
        request = next(iter(request.values()), None)
    return int(request.shape[0]) if isinstance(request, np.ndarray) and request.ndim > 1 else 1


def error_text(error: BaseException) -> str:
    """An error as a run's record has it."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
