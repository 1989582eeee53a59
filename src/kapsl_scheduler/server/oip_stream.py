"""`ModelStreamInfer` of the Open Inference Protocol: requests of one stream, which are worked on side by side.

A model that gives one answer to a request is answered in the order of the requests. One that streams gives several,
when they are ready; each says whether it is the last in `triton_final_response`. What is wrong with a request is an
answer too, with its `id`, and the stream goes on. What is not here: a single inference (`server.oip_grpc`), messages
(`server.oip_proto`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

import grpc.aio

from kapsl_scheduler.errors import Cancelled, CronError, EngineError, Overloaded, Unavailable
from kapsl_scheduler.server.answers import status_of
from kapsl_scheduler.server.bodies import LONG_BODY, beside_the_loop
from kapsl_scheduler.server.grpc_answers import Context, shown
from kapsl_scheduler.server.grpc_door import Asking, Stream
from kapsl_scheduler.server.journal import ACCESS, log_request
from kapsl_scheduler.server.oip_grpc import SERVICE, Asked, begin_trace, bounded_by, come_in, ended, leave, read_request
from kapsl_scheduler.server.oip_proto import Message, encode_response, message_class, parsed
from kapsl_scheduler.server.service import Service
from kapsl_scheduler.types import InferenceResponse

if TYPE_CHECKING:
    from kapsl_scheduler.server.tracing import RequestTrace

__all__ = ["InferStreams"]

logger = logging.getLogger(__name__)

AHEAD: Final = 256
"""Requests of one stream that may wait for their answers; it is read no further until one of them is answered."""
MOST: Final = 512
"""Streams that may be open, asking or not."""

_FINAL: Final = "triton_final_response"
_WITH_EMPTY: Final = "triton_enable_empty_final_response"

_Request: Final = message_class("inference.ModelInferRequest")
_Response: Final = message_class("inference.ModelInferResponse")
_Answer: Final = message_class("inference.ModelStreamInferResponse")


class InferStreams:
    """The streams over a service."""

    def __init__(self, service: Service, *, access_log: bool = False) -> None:
        self.service = service
        self.access_log = access_log
        self._open: set[_Stream] = set()
        self.closed = False

    def call(self) -> Stream:
        return Stream(self._run)

    def close(self) -> None:
        """Reads no more requests of any stream. Each ends once those that it has read are answered."""
        self.closed = True
        for stream in self._open:
            stream.close()

    async def _run(self, requests: AsyncIterator[bytes], context: Context, asking: Asking) -> None:
        if len(self._open) >= MOST:
            raise Overloaded(f"{MOST} streams are open, which is the limit")
        stream = _Stream(self, context, asking)
        self._open.add(stream)
        try:
            ended = await stream.run(requests)
        finally:
            self._open.discard(stream)
        if not ended:
            raise Unavailable("the server is closing")


class _Stream:
    """One stream: a reader, and a task for each request that waits for its answers."""

    def __init__(self, streams: InferStreams, context: Context, asking: Asking) -> None:
        self._streams = streams
        self._service = streams.service
        self._access_log = streams.access_log
        self._context = context
        self._asking = asking
        self._reader: asyncio.Task[bool] | None = None
        self._writing = asyncio.Lock()  # gRPC takes one message at a time

    async def run(self, requests: AsyncIterator[bytes]) -> bool:
        """Answers all requests. Whether it came to their end, and not to that of the server."""
        async with asyncio.TaskGroup() as group:
            self._reader = group.create_task(self._read(requests, group))
            if self._streams.closed:
                self.close()
        return not self._reader.cancelled()

    def close(self) -> None:
        """Reads no more."""
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self, requests: AsyncIterator[bytes], group: asyncio.TaskGroup) -> bool:
        room = asyncio.Semaphore(AHEAD)
        loop = asyncio.get_running_loop()
        before: asyncio.Future[None] = loop.create_future()
        before.set_result(None)
        async for body in requests:
            await room.acquire()
            turn = _Turn(before, loop.create_future())
            before = turn.over
            group.create_task(self._answer(body, turn)).add_done_callback(lambda _: room.release())
        return True

    async def _answer(self, body: bytes, turn: _Turn) -> None:
        begun = perf_counter_ns()
        request = _Request()
        trace: RequestTrace | None = None
        failure: BaseException | None = None
        try:
            request = await beside_the_loop(len(body) > LONG_BODY, parsed, _Request, body)
            trace = begin_trace(self._service, "ModelStreamInfer", request, self._context)
            come_in(self._service, self._asking.caller)
            try:
                asked = await read_request(self._service, request, len(body))
                bounded_by(asked.call, self._context.time_remaining())
                answer = self._several if asked.model.info.streams else self._single
                await answer(request, asked, begun, turn, trace)
            finally:
                leave(self._service, self._asking.caller)
        except (asyncio.CancelledError, grpc.aio.BaseError) as error:
            failure = Cancelled("the client went away before its stream ended")
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            failure = error
            if not isinstance(error, EngineError | CronError):
                logger.error("inference on %r failed unexpectedly", request.model_name, exc_info=error)
            await turn.come()
            await self._refuse(request, error)
        finally:
            turn.end()
            ended(self._service, request, begun, failure, trace)
            if self._access_log:
                status = 200 if failure is None else status_of(failure)
                path = f"/{SERVICE}/ModelStreamInfer/{request.model_name}"
                log_request(ACCESS, self._asking.who, "GRPC", path, status, begun / 1e9)

    async def _single(
        self, request: Message, asked: Asked, begun: int, turn: _Turn, trace: RequestTrace | None
    ) -> None:
        model, call, _ = asked
        read = perf_counter_ns()
        response = await self._service.infer(model, call, trace)
        done = perf_counter_ns()
        answer = self._encoded(asked, request, response, final=True)
        await turn.come()
        await self._write(answer)
        self._service.figures_of(model).succeeded(begun, read, done, response)

    async def _several(
        self, request: Message, asked: Asked, begun: int, turn: _Turn, trace: RequestTrace | None
    ) -> None:
        """The answers as they come; nobody knows which is the last until there is no other. So it is an empty answer
        that says so, if the client has asked for one."""
        model, call, parameters = asked
        turn.end()
        async with aclosing(self._service.stream(model, call, trace)) as chunks:
            async for chunk in chunks:
                await self._write(self._encoded(asked, request, chunk, final=False))
        if parameters.get(_WITH_EMPTY) is True:
            await self._write(_Answer(infer_response=_last(request, model.info.version)))
        self._service.figures_of(model).ended(begun)

    def _encoded(self, asked: Asked, request: Message, response: InferenceResponse, *, final: bool) -> Message:
        answer = encode_response(asked.model.info, request.model_name, response.outputs, asked.call)
        answer.parameters[_FINAL].bool_param = final
        return _Answer(infer_response=answer)

    async def _refuse(self, request: Message, error: Exception) -> None:
        code, text = shown(error)
        named = _last(request, request.model_version)
        named.parameters["kapsl_code"].string_param = code
        try:
            await self._write(_Answer(error_message=text, infer_response=named))
        except grpc.aio.BaseError:
            pass  # nobody is there to hear it

    async def _write(self, answer: Message) -> None:
        data = answer.SerializeToString()
        async with self._writing:
            await self._context.write(data)


class _Turn:
    """A request's place in the order of answers: it is over when the request's answer is sent and all that came before
    are over."""

    __slots__ = ("_before", "over")

    def __init__(self, before: asyncio.Future[None], over: asyncio.Future[None]) -> None:
        self._before = before
        self.over = over

    async def come(self) -> None:
        """Until it is this request's turn."""
        if not self._before.done():
            await asyncio.wait((self._before,))

    def end(self) -> None:
        """The request's answer is sent, there is none, or it keeps no order: whoever comes next waits only for those
        that came before."""
        if self._before.done():
            self._over()
        else:
            self._before.add_done_callback(self._over)

    def _over(self, _: object = None) -> None:
        if not self.over.done():
            self.over.set_result(None)


def _last(request: Message, version: str) -> Message:
    """An answer without outputs that says that there is no other."""
    return _Response(
        model_name=request.model_name, model_version=version, id=request.id, parameters={_FINAL: {"bool_param": True}}
    )
