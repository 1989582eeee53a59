"""One inference over HTTP: the bytes of a request to those of its answer.

Whoever has the bytes asks `Inference.answer`: the door (`server.door`), which reads them off the connection itself, or
an ASGI server by way of `__call__`. What is not here: the form of tensors (`server.oip_json`), counting and bounds of
what is in flight (`server.service`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kapsl_scheduler.errors import EngineError, InvalidInput
from kapsl_scheduler.server.access import Guard
from kapsl_scheduler.server.answers import Answer, error_answer, response_of
from kapsl_scheduler.server.bodies import LONG_BODY, beside_the_loop, compressed, plain, read_body
from kapsl_scheduler.server.http_figures import INFER_ROUTE, HttpFigures
from kapsl_scheduler.server.oip import InferCall
from kapsl_scheduler.server.oip_json import decode_request, encode_reply
from kapsl_scheduler.server.presence import while_connected
from kapsl_scheduler.server.service import Service
from kapsl_scheduler.types import Array, InferenceResponse, ModelInfo

if TYPE_CHECKING:
    from kapsl_scheduler.server.tracing import RequestTrace

__all__ = ["Inference"]

logger = logging.getLogger(__name__)

LONG_ANSWER: Final = 32 << 10
"""Values of an answer whose JSON takes more than a few milliseconds."""

_HEADER_LENGTH: Final = b"inference-header-content-length"
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
            header_length = None if _HEADER_LENGTH not in headers else _length(headers[_HEADER_LENGTH])
            if (len(body) if header_length is None else header_length) > LONG_BODY:
                call = await asyncio.to_thread(decode_request, body, header_length, model=model.info)
                model = registry.get(name, version)
            else:
                call = decode_request(body, header_length, model=model.info)
            read = perf_counter_ns()
            response = await service.infer(model, call, trace)
            done = perf_counter_ns()
            answer = await _written(model.info, name, response.outputs, call)
            if _TIMING in headers:
                answer.headers += _timing(response)
            if b"accept-encoding" in headers:
                answer = await compressed(answer, headers[b"accept-encoding"])
        except EngineError as error:
            answer = error_answer(error)
            if answer.status == 500:
                logger.error("inference on %r failed: %s: %s", name, error.code, error)
            service.figures(name, version).failed(begun, error)
        except Exception as error:
            logger.exception("inference on %r failed unexpectedly", name)
            answer = error_answer(error)
            service.figures(name, version).failed(begun, error)
        else:
            service.figures_of(model).succeeded(begun, read, done, response)
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


def _length(text: bytes) -> int:
    if text.isdigit() and len(text) < 20:
        return int(text)
    raise InvalidInput(
        f"{_HEADER_LENGTH.decode()}: expected the number of bytes of JSON, got {text.decode('latin-1')!r}"
    )


def _timing(response: InferenceResponse) -> tuple[tuple[str, str], ...]:
    return (
        ("kapsl-batch-rows", str(response.batch_rows)),
        ("kapsl-queue-time-us", f"{response.queue_time * 1e6:.0f}"),
        ("kapsl-compute-time-us", f"{response.compute_time * 1e6:.0f}"),
    )


async def _written(info: ModelInfo, name: str, outputs: Mapping[str, Array], call: InferCall) -> Answer:
    long = call.binary is not True and sum(array.size for array in outputs.values()) > LONG_ANSWER
    body, header_length = await beside_the_loop(long, encode_reply, info, name, outputs, call)
    if header_length is None:
        return Answer(200, body)
    headers = (("content-type", "application/octet-stream"), (_HEADER_LENGTH.decode(), str(header_length)))
    return Answer(200, body, headers)
