"""One inference over HTTP: the bytes of a request to those of its answer.

Whoever has the bytes asks `Inference.answer`: the door (`server.door`), which reads them off the connection itself, or
an ASGI server by way of `__call__`. What is not here: the form of tensors (`server.oip_json`), counting and bounds of
what is in flight (`server.service`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kapsl_scheduler.errors import Cancelled, EngineError, InvalidInput
from kapsl_scheduler.runtime.registry import ServedModel, Submitted
from kapsl_scheduler.server.access import Guard
from kapsl_scheduler.server.answers import Answer, error_answer, response_of
from kapsl_scheduler.server.bodies import LONG_BODY, beside_the_loop, compressed, plain, read_body
from kapsl_scheduler.server.http_figures import INFER_ROUTE, HttpFigures
from kapsl_scheduler.server.oip import InferCall
from kapsl_scheduler.server.oip_json import decode_request, encode_reply
from kapsl_scheduler.server.presence import while_connected
from kapsl_scheduler.server.service import Service
from kapsl_scheduler.types import InferenceResponse, ModelInfo

if TYPE_CHECKING:
    from kapsl_scheduler.server.tracing import RequestTrace

__all__ = ["Begun", "Inference", "Later"]

logger = logging.getLogger(__name__)

Later = Callable[[], Coroutine[Any, Any, Answer]]
"""Where something is to be waited for: what makes the answer. Every error but a cancellation is an answer too."""

LONG_ANSWER: Final = 32 << 10
"""Values of an answer whose JSON takes more than a few milliseconds."""

_HEADER_LENGTH_NAME: Final = "inference-header-content-length"
_HEADER_LENGTH: Final = _HEADER_LENGTH_NAME.encode()
_TIMING: Final = b"kapsl-timing"
"""The header of a request that asks how its answer came about."""


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

    def begin(self, name: str, version: str, headers: Mapping[bytes, bytes], body: bytes) -> Begun | Answer | Later:
        """Asks a model there and then, as for most requests nothing has to be waited for first. The answer, if it was
        not even asked; where something is to be waited for, what does it all."""
        tracing = self.service.tracing
        if tracing is not None and (trace := tracing.begin("POST", INFER_ROUTE, name, headers)) is not None:
            return partial(self._traced, name, version, headers, body, trace)
        if len(body) > LONG_BODY or b"content-encoding" in headers or b"accept-encoding" in headers:
            return partial(self._answer, name, version, headers, body)
        begun = perf_counter_ns()
        try:
            model = self.service.registry.get(name, version)
            call = decode_request(body, _header_length(headers), model=model.info)
            read = perf_counter_ns()
            item = self.service.submit(model, call)
            return Begun(self, name, version, headers, model, call, item, begun, read)
        except Exception as error:
            return self.failed(name, version, begun, error)

    def answer(
        self, name: str, version: str, headers: Mapping[bytes, bytes], body: bytes
    ) -> Coroutine[Any, Any, Answer]:
        """What to answer a request for a model; every error but a cancellation is an answer too. Cancelling it takes
        the request back."""
        tracing = self.service.tracing
        if tracing is not None and (trace := tracing.begin("POST", INFER_ROUTE, name, headers)) is not None:
            return self._traced(name, version, headers, body, trace)
        return self._answer(name, version, headers, body)

    async def _traced(
        self, name: str, version: str, headers: Mapping[bytes, bytes], body: bytes, trace: RequestTrace
    ) -> Answer:
        status = 499  # if it is cancelled, as the client has gone
        try:
            answer = await self._answer(name, version, headers, body, trace)
            status = answer.status
        finally:
            trace.end(status)
        return answer

    async def _answer(
        self,
        name: str,
        version: str,
        headers: Mapping[bytes, bytes],
        body: bytes,
        trace: RequestTrace | None = None,
    ) -> Answer:
        begun = perf_counter_ns()
        service = self.service
        registry = service.registry
        try:
            model = registry.get(name, version)  # before much is decoded for nobody
            if b"content-encoding" in headers:
                body = await plain(body, headers[b"content-encoding"], self.max_body_bytes)
            header_length = _header_length(headers)
            if (len(body) if header_length is None else header_length) > LONG_BODY:
                call = await asyncio.to_thread(decode_request, body, header_length, model=model.info)
                model = registry.get(name, version)
            else:
                call = decode_request(body, header_length, model=model.info)
            read = perf_counter_ns()
            response = await service.infer(model, call, trace)
            done = perf_counter_ns()
            long = _is_long(response, call)
            answer = await beside_the_loop(long, _encoded, model.info, name, response, call, headers)
            if b"accept-encoding" in headers:
                answer = await compressed(answer, headers[b"accept-encoding"])
        except Exception as error:
            return self.failed(name, version, begun, error)
        service.figures_of(model).succeeded(begun, read, done, response)
        return answer

    def failed(self, name: str, version: str, begun: int, error: Exception) -> Answer:
        """The answer to a request that came at `begun` and ended in an error, which is counted."""
        answer = error_answer(error)
        if not isinstance(error, EngineError):
            logger.error("inference on %r failed unexpectedly", name, exc_info=error)
        elif answer.status == 500:
            logger.error("inference on %r failed: %s: %s", name, error.code, error)
        self.service.figures(name, version).failed(begun, error)
        return answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The route as an ASGI application."""
        name, version = scope["path_params"]["model"], scope["path_params"].get("version", "")
        try:
            self.service.enter()
        except EngineError as error:
            await self._refuse(name, version, error)(scope, receive, send)
            return
        try:
            try:
                body = await read_body(scope, receive, self.max_body_bytes)
                work = self.answer(name, version, dict(scope["headers"]), body)
                response = response_of(await while_connected(receive, work))
            except EngineError as error:
                response = self._refuse(name, version, error)
            await response(scope, receive, send)
        finally:
            self.service.leave()

    def _refuse(self, name: str, version: str, error: EngineError) -> Response:
        self.service.figures(name, version).failed(perf_counter_ns(), error)
        return response_of(error_answer(error))


class Begun:
    """A request that its model has been asked, and what is needed for its answer. `begun` and `read` are moments of
    `time.perf_counter_ns`: when it came, when it was read."""

    __slots__ = ("_begun", "_call", "_headers", "_inference", "_item", "_model", "_name", "_read", "_version")

    def __init__(
        self,
        inference: Inference,
        name: str,
        version: str,
        headers: Mapping[bytes, bytes],
        model: ServedModel,
        call: InferCall,
        item: Submitted,
        begun: int,
        read: int,
    ) -> None:
        self._inference = inference
        self._name = name
        self._version = version
        self._headers = headers
        self._model = model
        self._call = call
        self._item = item
        self._begun = begun
        self._read = read

    def when_done(self, then: Callable[[Any], None]) -> None:
        """`then` is called when there is something to `answer`."""
        self._item.future.add_done_callback(then)

    def answer(self) -> Answer | Later:
        """What to answer. An error is an answer too."""
        try:
            response: InferenceResponse = self._item.future.result()
            done = perf_counter_ns()
            if _is_long(response, self._call):
                return partial(self._written, response, done)
            return self._succeeded(
                _encoded(self._model.info, self._name, response, self._call, self._headers), response, done
            )
        except Exception as error:
            return self._failed(error)

    async def _written(self, response: InferenceResponse, done: int) -> Answer:
        try:
            answer = await asyncio.to_thread(
                _encoded, self._model.info, self._name, response, self._call, self._headers
            )
        except Exception as error:
            return self._failed(error)
        return self._succeeded(answer, response, done)

    def withdraw(self) -> None:
        """Nobody waits for the answer any more: the request is taken back, and counted as that."""
        self._model.scheduler.withdraw(self._item)
        self._failed(Cancelled("the client went away before its answer was ready"))

    def _succeeded(self, answer: Answer, response: InferenceResponse, done: int) -> Answer:
        self._inference.service.figures_of(self._model).succeeded(self._begun, self._read, done, response)
        return answer

    def _failed(self, error: Exception) -> Answer:
        return self._inference.failed(self._name, self._version, self._begun, error)


def _header_length(headers: Mapping[bytes, bytes]) -> int | None:
    text = headers.get(_HEADER_LENGTH)
    if text is None:
        return None
    if text.isdigit() and len(text) < 20:
        return int(text)
    raise InvalidInput(f"{_HEADER_LENGTH_NAME}: expected the number of bytes of JSON, got {text.decode('latin-1')!r}")


def _timing(response: InferenceResponse) -> tuple[tuple[str, str], ...]:
    return (
        ("kapsl-batch-rows", str(response.batch_rows)),
        ("kapsl-queue-time-us", f"{response.queue_time * 1e6:.0f}"),
        ("kapsl-compute-time-us", f"{response.compute_time * 1e6:.0f}"),
    )


def _is_long(response: InferenceResponse, call: InferCall) -> bool:
    return call.binary is not True and sum(array.size for array in response.outputs.values()) > LONG_ANSWER


def _encoded(
    info: ModelInfo, name: str, response: InferenceResponse, call: InferCall, headers: Mapping[bytes, bytes]
) -> Answer:
    body, header_length = encode_reply(info, name, response.outputs, call)
    answer = Answer(200, body)
    if header_length is not None:
        answer.headers = (("content-type", "application/octet-stream"), (_HEADER_LENGTH_NAME, str(header_length)))
    if _TIMING in headers:
        answer.headers += _timing(response)
    return answer
