"""One inference over HTTP: the bytes of a request to those of its answer.

The door (`server.door`), which reads the bytes off the connection itself, asks `Inference.begin`; an ASGI server comes
by way of `__call__`. What is not here: the form of tensors (`server.oip_json`), counting and bounds of what is in
flight (`server.service`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from starlette.types import Receive, Scope, Send

from kapsl_scheduler.errors import Cancelled, EngineError, InvalidInput
from kapsl_scheduler.runtime.registry import ServedModel
from kapsl_scheduler.server.access import Guard
from kapsl_scheduler.server.answers import Answer, error_answer, response_of
from kapsl_scheduler.server.bodies import LONG_BODY, beside_the_loop, compressed, plain, read_body, worth_packing
from kapsl_scheduler.server.http_figures import INFER_ROUTE, HttpFigures
from kapsl_scheduler.server.oip import InferCall
from kapsl_scheduler.server.oip_json import decode_request, encode_reply
from kapsl_scheduler.server.presence import while_connected
from kapsl_scheduler.server.service import Service
from kapsl_scheduler.types import InferenceResponse, ModelInfo

if TYPE_CHECKING:
    from kapsl_scheduler.server.tracing import RequestTrace

__all__ = ["Begun", "InferHead", "Inference", "Later"]

logger = logging.getLogger(__name__)

Later = Callable[[], Coroutine[Any, Any, Answer]]
"""Where something is to be waited for: what makes the answer. Every error but a cancellation is an answer too."""

LONG_ANSWER: Final = 32 << 10
"""Values of an answer whose JSON takes more than a few milliseconds."""

_HEADER_LENGTH_NAME: Final = "inference-header-content-length"
_HEADER_LENGTH: Final = _HEADER_LENGTH_NAME.encode()
_TIMING: Final = b"kapsl-timing"
"""The header of a request that asks how its answer came about."""


class InferHead:
    """What the head of a request asks for. It is read once, and asked again as often as the same head comes."""

    __slots__ = ("accepted", "fault", "header_length", "headers", "name", "packed", "tells_timing", "version")

    def __init__(self, name: str, version: str, headers: Mapping[bytes, bytes]) -> None:
        self.name = name
        self.version = version
        self.headers = headers
        self.header_length: int | None = None  # bytes of JSON before tensors as bytes
        self.fault: InvalidInput | None = None
        self.packed = b"content-encoding" in headers
        self.accepted = headers.get(b"accept-encoding")
        self.tells_timing = _TIMING in headers
        if (text := headers.get(_HEADER_LENGTH)) is not None:
            if text.isdigit() and len(text) < 20:
                self.header_length = int(text)
            else:
                said = text.decode("latin-1")
                self.fault = InvalidInput(f"{_HEADER_LENGTH_NAME}: expected the number of bytes of JSON, got {said!r}")

    def check(self) -> None:
        """Raises `InvalidInput`, a new one each time."""
        if self.fault is not None:
            raise self.fault.fresh()


class Inference:
    """The infer route over the models of a service. Bodies beyond `max_body_bytes` are refused. `guard` and
    `access_log` are for whoever does not come by way of the application, which has them too."""

    def __init__(
        self,
        service: Service,
        *,
        max_body_bytes: int,
        guard: Guard | None = None,
        access_log: bool = False,
        http: HttpFigures | None = None,
    ) -> None:
        self.service = service
        self.max_body_bytes = max_body_bytes
        self.guard = guard
        self.access_log = access_log
        self.http = http or HttpFigures()

    def begin(self, head: InferHead, body: bytes, then: Callable[[Answer | Later], None]) -> Begun | Answer | Later:
        """Asks a model there and then, as for most requests nothing has to be waited for first; `then` is told what to
        answer, in the way of `Scheduler.infer_then`. The answer, if the model was not even asked; where something is to
        be waited for, what does it all."""
        if self.service.tracing is not None and (trace := self._sampled(head)) is not None:
            return partial(self._traced, head, body, trace)
        if head.packed or len(body) > LONG_BODY:
            return partial(self._answer, head, body)
        begun = perf_counter_ns()
        try:
            model = self.service.registry.get(head.name, head.version)
            head.check()
            call = decode_request(body, head.header_length, model=model.info)
            read = perf_counter_ns()
            return Begun(self, head, model, call, then, begun, read)
        except Exception as error:
            return self.failed(head, begun, error)

    def answer(self, head: InferHead, body: bytes) -> Coroutine[Any, Any, Answer]:
        """What to answer a request for a model; every error but a cancellation is an answer too. Cancelling it takes
        the request back."""
        trace = self._sampled(head)
        return self._answer(head, body) if trace is None else self._traced(head, body, trace)

    def _sampled(self, head: InferHead) -> Callable[[], RequestTrace] | None:
        tracing = self.service.tracing
        return None if tracing is None else tracing.sampled("POST", INFER_ROUTE, head.name, head.headers)

    async def _traced(self, head: InferHead, body: bytes, begin: Callable[[], RequestTrace]) -> Answer:
        trace = begin()  # not before: a task may be cancelled before it begins, and nobody would end it
        status = 499  # if it is cancelled, as the client has gone
        try:
            answer = await self._answer(head, body, trace)
            status = answer.status
        finally:
            trace.end(status)
        return answer

    async def _answer(self, head: InferHead, body: bytes, trace: RequestTrace | None = None) -> Answer:
        begun = perf_counter_ns()
        service = self.service
        registry = service.registry
        try:
            model = registry.get(head.name, head.version)  # before much is decoded for nobody
            if head.packed:
                body = await plain(body, head.headers[b"content-encoding"], self.max_body_bytes)
            head.check()
            header_length = head.header_length
            if (len(body) if header_length is None else header_length) > LONG_BODY:
                call = await asyncio.to_thread(decode_request, body, header_length, model=model.info)
                model = registry.get(head.name, head.version)
            else:
                call = decode_request(body, header_length, model=model.info)
            read = perf_counter_ns()
            response = await service.infer(model, call, trace)
            done = perf_counter_ns()
            answer = await _written(model.info, head, response, call)
        except Exception as error:
            return self.failed(head, begun, error)
        service.figures_of(model).succeeded(begun, read, done, response)
        return answer

    def failed(self, head: InferHead, begun: int, error: Exception) -> Answer:
        """The answer to a request that came at `begun` and ended in an error, which is counted."""
        answer = error_answer(error)
        if not isinstance(error, EngineError):
            logger.error("inference on %r failed unexpectedly", head.name, exc_info=error)
        elif answer.status == 500:
            logger.error("inference on %r failed: %s: %s", head.name, error.code, error)
        self.service.figures(head.name, head.version).failed(begun, error)
        return answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The route as an ASGI application."""
        where = scope["path_params"]
        head = InferHead(where["model"], where.get("version", ""), dict(scope["headers"]))
        try:
            self.service.enter()
        except EngineError as error:
            await response_of(self.failed(head, perf_counter_ns(), error))(scope, receive, send)
            return
        try:
            try:
                body = await read_body(scope, receive, self.max_body_bytes)
                answer = await while_connected(receive, self.answer(head, body))
            except EngineError as error:
                answer = self.failed(head, perf_counter_ns(), error)
            await response_of(answer)(scope, receive, send)
        finally:
            self.service.leave()


class Begun:
    """A request that its model is asked, and what is needed for its answer, which is told to `then`. `begun` and `read`
    are moments of `time.perf_counter_ns`: when it came, when it was read. Raises what `Service.infer_then` raises."""

    __slots__ = ("_begun", "_call", "_head", "_inference", "_model", "_read", "_submitted", "_then")

    def __init__(
        self,
        inference: Inference,
        head: InferHead,
        model: ServedModel,
        call: InferCall,
        then: Callable[[Answer | Later], None],
        begun: int,
        read: int,
    ) -> None:
        self._inference = inference
        self._head = head
        self._model = model
        self._call = call
        self._then = then
        self._begun = begun
        self._read = read
        self._submitted = inference.service.infer_then(model, call, self._told)

    def _told(self, response: InferenceResponse | None, error: BaseException | None) -> None:
        if response is None:
            assert isinstance(error, Exception)
            self._then(self._failed(error))
            return
        done = perf_counter_ns()
        answer: Answer | Later
        try:
            written = None
            if not _is_long(response, self._call):
                written = _encoded(self._model.info, self._head, response, self._call)
            if written is None or (self._head.accepted is not None and worth_packing(written)):
                answer = partial(self._finished, response, done, written)
            else:
                answer = self._succeeded(written, response, done)
        except Exception as fault:
            answer = self._failed(fault)
        self._then(answer)

    async def _finished(self, response: InferenceResponse, done: int, written: Answer | None) -> Answer:
        try:
            answer = await _written(self._model.info, self._head, response, self._call, written)
        except Exception as error:
            return self._failed(error)
        return self._succeeded(answer, response, done)

    def withdraw(self) -> None:
        """Nobody waits for the answer any more: the request is taken back, and counted as that."""
        self._model.scheduler.withdraw(self._submitted)
        self._failed(Cancelled("the client went away before its answer was ready"))

    def _succeeded(self, answer: Answer, response: InferenceResponse, done: int) -> Answer:
        self._inference.service.figures_of(self._model).succeeded(self._begun, self._read, done, response)
        return answer

    def _failed(self, error: Exception) -> Answer:
        return self._inference.failed(self._head, self._begun, error)


def _timing(response: InferenceResponse) -> tuple[tuple[str, str], ...]:
    return (
        ("kapsl-batch-rows", str(response.batch_rows)),
        ("kapsl-queue-time-us", f"{response.queue_time * 1e6:.0f}"),
        ("kapsl-compute-time-us", f"{response.compute_time * 1e6:.0f}"),
    )


def _is_long(response: InferenceResponse, call: InferCall) -> bool:
    return call.binary is not True and sum(array.size for array in response.outputs.values()) > LONG_ANSWER


async def _written(
    info: ModelInfo, head: InferHead, response: InferenceResponse, call: InferCall, answer: Answer | None = None
) -> Answer:
    """The answer, encoded unless it is already, and packed if the client takes that."""
    if answer is None:
        answer = await beside_the_loop(_is_long(response, call), _encoded, info, head, response, call)
    return answer if head.accepted is None else await compressed(answer, head.accepted)


def _encoded(info: ModelInfo, head: InferHead, response: InferenceResponse, call: InferCall) -> Answer:
    body, header_length = encode_reply(info, head.name, response.outputs, call)
    answer = Answer(200, body)
    if header_length is not None:
        answer.headers = (("content-type", "application/octet-stream"), (_HEADER_LENGTH_NAME, str(header_length)))
    if head.tells_timing:
        answer.headers += _timing(response)
    return answer
