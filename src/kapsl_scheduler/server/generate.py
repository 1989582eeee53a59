"""Triton's generate extension: a prompt in, text out, whole or as server-sent events.

The keys of a request are the model's inputs by name, those of `parameters` too. What is not here: which models these
routes are for (`server.texts`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from kapsl_scheduler.errors import EngineError, InvalidInput
from kapsl_scheduler.runtime.registry import ServedModel
from kapsl_scheduler.server.answers import error_answer, json_response
from kapsl_scheduler.server.bodies import read_body
from kapsl_scheduler.server.oip import InferCall, set_parameters
from kapsl_scheduler.server.presence import sent_events, while_connected
from kapsl_scheduler.server.service import Flight, Service
from kapsl_scheduler.server.texts import TEXT_OUTPUT, check_text_model, text_inputs, texts_of
from kapsl_scheduler.types import Array, InferenceRequest, InferenceResponse

__all__ = ["GenerateApi"]

_MODEL: Final = "/v2/models/{model}"
_OURS: Final = ("id", "parameters", "priority", "timeout")
"""Keys that are no inputs."""


class GenerateApi:
    """The generate routes over a service."""

    def __init__(self, service: Service, *, max_body_bytes: int) -> None:
        self._service = service
        self._max_body_bytes = max_body_bytes

    def routes(self) -> list[BaseRoute]:
        routes: list[BaseRoute] = []
        for model in (_MODEL, _MODEL + "/versions/{version}"):
            routes += [
                Route(model + "/generate", self._generate, methods=["POST"]),
                Route(model + "/generate_stream", self._generate_stream, methods=["POST"]),
            ]
        return routes

    async def _generate(self, request: Request) -> Response:
        with self._flight(request, "generate") as flight:
            asked = await self._read(request, flight)
            return json_response(await while_connected(request.receive, _whole(asked)))

    async def _generate_stream(self, request: Request) -> Response:
        with self._flight(request, "generate_stream") as flight:
            events = _events(await self._read(request, flight))
            return await sent_events(request.receive, flight, events, _failed)

    def _flight(self, request: Request, route: str) -> Flight:
        name, version = _named(request)
        trace = self._service.begin_trace(f"{_MODEL}/{route}", name, request.scope["headers"])
        return Flight(self._service, name, version, trace=trace)

    async def _read(self, request: Request, flight: Flight) -> _Asked:
        """Raises `InvalidInput`, `ResourceExhausted`, `ModelNotLoaded`."""
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        model = self._service.registry.get(*_named(request))
        check_text_model(model)
        try:
            keys = msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise InvalidInput(f"the request body is no JSON object: {error}") from None
        options = keys.get("parameters") or {}
        if not isinstance(options, dict):
            raise InvalidInput(f"parameters: expected an object, got {type(options).__name__}")
        given = {**options, **keys}
        values = {name: value for name, value in given.items() if name not in _OURS}
        call = InferCall(InferenceRequest(text_inputs(model, values, {})))
        set_parameters(call, _unsigned(given, "priority"), _unsigned(given, "timeout"), 0)
        return _Asked(model, partial(self._service.stream, model, call, flight.trace), keys.get("id"))


def _named(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


class _Asked(NamedTuple):
    model: ServedModel
    chunks: Callable[[], AsyncGenerator[InferenceResponse, None]]
    id: Any

    def shown(self, outputs: Mapping[str, Array]) -> dict[str, Any]:
        """Outputs as the extension has them: one value bare, several as a list."""
        shown: dict[str, Any] = {} if self.id is None else {"id": self.id}
        shown |= {"model_name": self.model.name, "model_version": self.model.info.version}
        for name, array in outputs.items():
            values = texts_of(array) if array.dtype.kind in "OSU" else array.ravel().tolist()
            shown[name] = values[0] if len(values) == 1 else values
        return shown


async def _whole(asked: _Asked) -> dict[str, Any]:
    """All chunks as one: texts one behind the other, of other outputs the last."""
    texts: list[str] = []
    shown: dict[str, Any] = {}
    async with aclosing(asked.chunks()) as chunks:
        async for chunk in chunks:
            outputs = chunk.outputs
            shown = asked.shown(outputs)
            if TEXT_OUTPUT in outputs:
                texts += texts_of(outputs[TEXT_OUTPUT])
    if texts:
        shown[TEXT_OUTPUT] = "".join(texts)
    return shown


async def _events(asked: _Asked) -> AsyncGenerator[bytes, None]:
    async with aclosing(asked.chunks()) as chunks:
        async for chunk in chunks:
            yield b"data: %b\n\n" % msgspec.json.encode(asked.shown(chunk.outputs))


def _failed(error: EngineError) -> bytes:
    return b"data: %b\n\n" % error_answer(error).body


def _unsigned(given: Mapping[str, Any], name: str) -> int:
    value = given.get(name, 0)
    if type(value) is not int or value < 0:
        raise InvalidInput(f"{name}: expected an integer of 0 or more, got {value!r}")
    return value
