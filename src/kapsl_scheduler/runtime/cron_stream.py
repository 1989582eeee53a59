"""A firing of many requests: a bounded number of them on their way at a time, their answers handed on in order.

However long the stream, what is held is what is on its way and one batch of answers. At intervals the sink makes sure
of what it was given, and what is then certain is written down: the run goes on behind it after a crash. What is not
here: where requests come from and answers go (`sources`, `sinks`), attempts and outcomes (`runtime.cron_execution`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Protocol

import numpy as np

from kapsl_scheduler.core.runs import Firing
from kapsl_scheduler.errors import Backend, InferenceError, InvalidInput, Overloaded, ResourceExhausted
from kapsl_scheduler.ports import SinkItem, SinkWriter, SourceItem
from kapsl_scheduler.runtime.offload import call, in_thread
from kapsl_scheduler.types import InferenceRequest, InferenceResponse

__all__ = ["RunLost", "Stream", "numbered", "row_count"]

logger = logging.getLogger(__name__)

BATCH: Final = 256
"""Answers that a sink is given at a time."""
CHECKPOINT: Final = 2.0
"""Seconds between checkpoints."""
LAST_WORD: Final = 0.5
"""Seconds that a stream which is cut short may take to make sure of what it has."""
PAUSE: Final = 0.05
"""Seconds before a request is offered again that had to make room."""
HOPELESS: Final = 100
"""Requests that the model failed without having answered one, after which a firing gives up."""

_THE_ITEMS_OWN: Final = (InvalidInput, InferenceError, Backend, ResourceExhausted)
"""Errors that speak of one request. Others (the model is gone, say) speak of all: they end the attempt, so that what
was not tried is tried later."""


class RunLost(Exception):
    """Another process has taken the run: this one has nothing more to say about it."""


async def numbered(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[SourceItem]:
    """Plain requests as items, named by their number from 0."""
    number = 0
    if isinstance(items, AsyncIterable):
        try:
            async for request in items:
                yield SourceItem(request, str(number))
                number += 1
        finally:
            await _close(items)
    else:
        for request in items:
            yield SourceItem(request, str(number))
            number += 1


class StreamHost(Protocol):
    """The execution that the stream belongs to."""

    done: float | None

    def add(self, request: Any, response: InferenceResponse | None, rows: int = ...) -> None: ...
    def infer(self, request: Any, *, starts: bool = ...) -> Awaitable[InferenceResponse]: ...
    async def checkpoint(self, memory: Mapping[str, str | None]) -> bool: ...
    async def memory(self) -> Mapping[str, str]: ...


class Stream:
    """Sends items and hands on what becomes of them. A bad item harms only itself: of `requests` it counts the `failed`
    ones, and the first error is kept with its key. `refused` is why the first request, and with it the firing, found no
    room. `kept` has the answers in order, None for what failed, where they are to be kept."""

    def __init__(self, host: StreamHost, firing: Firing, sink: Any, most: int, *, keep: bool) -> None:
        self.requests = 0
        self.failed = 0
        self.first_error: Exception | None = None
        self.first_key = ""
        self.refused: Overloaded | None = None
        self.kept: list[InferenceResponse | None] = []
        self._host = host
        self._firing = firing
        self._sink = sink
        self._most = most
        self._keep = keep
        self._writer: SinkWriter | Callable[..., Any] | None = None
        self._answered: list[SinkItem] = []  # what the sink has not been given yet
        self._marks: dict[str, str | None] = {}  # what is to be remembered once the sink has it for good
        self._checked = 0.0
        self._at_work: asyncio.Future[Any] | None = None  # the sink, in its thread
        self._broken = False  # the sink may have lost something: nothing more is certain

    async def run(self, items: AsyncIterator[SourceItem]) -> None:
        """All items, to the last answer and the last checkpoint. Raises what the source or the sink raises.

        Cancelling it takes back what is on its way, and makes sure of what was answered, within half a second.
        """
        flying: deque[tuple[SourceItem, asyncio.Task[InferenceResponse] | None]] = deque()
        loop = asyncio.get_running_loop()
        self._checked = loop.time()
        started = False
        try:
            await self._open()
            async for item in items:
                if not started:
                    started = True
                    if not await self._begins(item):
                        return
                    continue
                task = None if item.error is not None else loop.create_task(self._send(item.request))
                flying.append((item, task))
                while flying and (len(flying) >= self._most or flying[0][1] is None or flying[0][1].done()):
                    await self._land(*flying.popleft())
            while flying:
                await self._land(*flying.popleft())
            await self._make_sure()
        except (Exception, asyncio.CancelledError):
            await self._last_word()
            raise
        finally:
            for _, task in flying:
                if task is not None:
                    task.cancel()
            await asyncio.gather(*(task for _, task in flying if task is not None), return_exceptions=True)
            await _close(items)
            await self._close()

    async def _begins(self, item: SourceItem) -> bool:
        """The first item, alone: the job's overflow policy decides whether the firing takes place."""
        if item.error is not None:
            await self._settle(item, None, item.error)
            return True
        try:
            try:
                response = await self._host.infer(item.request)
            except Overloaded as error:
                if not error.evicted:
                    self.refused = error
                    return False
                response = await self._send(item.request)
        except _THE_ITEMS_OWN as error:
            await self._settle(item, None, error)
            return True
        await self._settle(item, response, None)
        return True

    async def _send(self, request: Any) -> InferenceResponse:
        """A request of a firing that has begun: it waits for room, also when it had to make room for others."""
        while True:
            try:
                return await self._host.infer(request, starts=False)
            except Overloaded as error:
                await asyncio.sleep(min(error.retry_after or PAUSE, 1.0))

    async def _land(self, item: SourceItem, task: asyncio.Task[InferenceResponse] | None) -> None:
        if task is None:
            await self._settle(item, None, item.error)
            return
        try:
            response = await task
        except _THE_ITEMS_OWN as error:
            await self._settle(item, None, error)
        else:
            await self._settle(item, response, None)

    async def _settle(self, item: SourceItem, response: InferenceResponse | None, error: Exception | None) -> None:
        host = self._host
        self.requests += 1
        host.add(item.request, response, row_count(item.request))
        host.done = item.progress
        if error is not None:
            self.failed += 1
            if self.first_error is None:
                self.first_error, self.first_key = error, item.key
            if self.failed >= HOPELESS and self.failed == self.requests and not isinstance(error, InvalidInput):
                raise error
        if self._keep:
            self.kept.append(response)
        self._marks.update(item.marks)
        if self._sink is not None:
            self._answered.append(SinkItem(item.key, response, error))
            if len(self._answered) >= BATCH:
                await self._hand_on()
        if asyncio.get_running_loop().time() - self._checked >= CHECKPOINT:
            await self._make_sure()

    # ---------------------------------------------------------------------------------------------- sink

    async def _open(self) -> None:
        if self._sink is None:
            return
        if callable(self._sink):
            self._writer = self._sink
        else:
            memory = await self._host.memory()
            self._writer = await in_thread(self._sink.open, self._firing, memory)
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
        await call(self._writer, items)
        self._broken = False

    async def _make_sure(self) -> None:
        """A checkpoint: what the sink has for good, and where the source was then."""
        await self._hand_on()
        self._checked = asyncio.get_running_loop().time()
        memory = dict(self._marks)
        if isinstance(self._writer, SinkWriter):
            memory.update(await self._in_turn(self._writer.flush))
        self._marks = {}
        if not await self._host.checkpoint(memory):
            raise RunLost

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
        if self._broken:
            return
        try:
            async with asyncio.timeout(LAST_WORD):
                await self._make_sure()
        except (Exception, asyncio.CancelledError) as error:
            logger.debug("job %r: no last checkpoint: %r", self._firing.job, error)

    async def _close(self) -> None:
        """Let go of the sink. One that hangs is left to its thread, and closed when it comes back."""
        if not isinstance(self._writer, SinkWriter):
            return
        close = self._writer.close
        if self._at_work is None or self._at_work.done():
            _unheard(in_thread(close))
        else:
            self._at_work.add_done_callback(lambda _: _unheard(in_thread(close)))


def row_count(request: Any) -> int:
    """Rows of a request, which has its batch axis in front if it has more than one axis."""
    if isinstance(request, InferenceRequest):
        request = request.inputs
    value = next(iter(request.values()), None) if isinstance(request, Mapping) else request
    return int(value.shape[0]) if isinstance(value, np.ndarray) and value.ndim > 1 else 1


async def _close(items: Any) -> None:
    close = getattr(items, "aclose", None)
    if close is not None:
        await close()


def _unheard(future: asyncio.Future[Any]) -> None:
    """Nobody waits for this, and an error of it changes nothing: what was flushed is flushed."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
