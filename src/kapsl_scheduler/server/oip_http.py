"""The Open Inference Protocol v2 over HTTP, all but the infer route: health, metadata, configuration, statistics, the
model repository, settings of logs and traces.

What is not here: inference (`server.inference`), the same over gRPC, and what a description of a model looks like
(`server.oip_models`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.runtime.registry import ServedModel
from kapsl_scheduler.server.answers import json_response
from kapsl_scheduler.server.bodies import read_body
from kapsl_scheduler.server.oip_models import (
    LogSettings,
    check_order,
    checked_traces,
    index_entry,
    model_config,
    model_metadata,
    model_statistics,
    server_metadata,
)
from kapsl_scheduler.server.service import Service

__all__ = ["OipApi"]

_ORDER_BYTES: Final = 64 << 10  # a request to load or unload says next to nothing


class _Order(msgspec.Struct):
    parameters: dict[str, Any] | None = None


class _IndexRequest(msgspec.Struct):
    ready: bool = False


class OipApi:
    """The routes over a service. `reload` loads a model anew from where it came, `unload` takes it out of service;
    without them there are no routes for that."""

    def __init__(
        self,
        service: Service,
        *,
        reload: Callable[[str], Awaitable[ServedModel]] | None = None,
        unload: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._service = service
        self._reload = reload
        self._unload = unload
        self._logs = LogSettings(logging.getLogger("kapsl_scheduler"))

    def routes(self) -> list[BaseRoute]:
        model = "/v2/models/{model}"
        routes: list[BaseRoute] = [
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2", self._server),
            Route("/v2/models/stats", self._all_stats),
            Route("/v2/repository/index", self._index, methods=["POST"]),
            Route("/v2/logging", self._show_logs),
            Route("/v2/logging", self._set_logs, methods=["POST"]),
        ]
        for prefix in (model, model + "/versions/{version}"):
            routes += [
                Route(prefix, self._model),
                Route(prefix + "/ready", self._model_ready),
                Route(prefix + "/config", self._model_config),
                Route(prefix + "/stats", self._model_stats),
            ]
        for path in ("/v2/trace/setting", model + "/trace/setting"):
            routes += [Route(path, self._show_traces), Route(path, self._set_traces, methods=["POST"])]
        if self._reload is not None:
            routes.append(Route("/v2/repository/models/{model}/load", self._load, methods=["POST"]))
        if self._unload is not None:
            routes.append(Route("/v2/repository/models/{model}/unload", self._take_out, methods=["POST"]))
        return routes

    async def _live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def _ready(self, request: Request) -> Response:
        ready = self._service.ready()
        return json_response({"ready": ready}, 200 if ready else 503)

    async def _server(self, request: Request) -> Response:
        return json_response(server_metadata(self._service.version))

    async def _model(self, request: Request) -> Response:
        model = self._requested(request)
        versions = [one.info.version for one in self._service.registry.versions(model.name)]
        return json_response(model_metadata(model.name, model.info, versions))

    async def _model_ready(self, request: Request) -> Response:
        model = self._requested(request)
        ready = not self._service.draining and model.ready
        return json_response({"name": model.name, "ready": ready}, 200 if ready else 503)

    async def _model_config(self, request: Request) -> Response:
        return json_response(model_config(self._requested(request)))

    async def _model_stats(self, request: Request) -> Response:
        model = self._requested(request)
        return json_response({"model_stats": [model_statistics(model, self._service.figures_of(model))]})

    async def _all_stats(self, request: Request) -> Response:
        models = self._service.registry.list()
        return json_response(
            {"model_stats": [model_statistics(model, self._service.figures_of(model)) for model in models]}
        )

    def _requested(self, request: Request) -> ServedModel:
        parameters = request.path_params
        return self._service.registry.get(parameters["model"], parameters.get("version", ""))

    # ------------------------------------------------------------------------------------------ repository

    async def _index(self, request: Request) -> Response:
        asked = await _read(request, _IndexRequest, "repository index")
        models = self._service.registry.list()
        return json_response([index_entry(model) for model in models if model.ready or not asked.ready])

    async def _load(self, request: Request) -> Response:
        await _read_plain(request, "load")
        assert self._reload is not None
        return json_response(index_entry(await self._reload(request.path_params["model"])))

    async def _take_out(self, request: Request) -> Response:
        await _read_plain(request, "unload")
        assert self._unload is not None
        await self._unload(request.path_params["model"])
        return json_response({})

    # -------------------------------------------------------------------------------------------- settings

    async def _show_logs(self, request: Request) -> Response:
        return json_response(self._logs.shown())

    async def _set_logs(self, request: Request) -> Response:
        self._logs.set(await _read(request, dict[str, Any], "log settings"))
        return json_response(self._logs.shown())

    async def _show_traces(self, request: Request) -> Response:
        if "model" in request.path_params:
            self._requested(request)
        return json_response(checked_traces({}))

    async def _set_traces(self, request: Request) -> Response:
        if "model" in request.path_params:
            self._requested(request)
        return json_response(checked_traces(await _read(request, dict[str, Any], "trace settings")))


async def _read(request: Request, kind: Any, what: str) -> Any:
    body = await read_body(request.scope, request.receive, _ORDER_BYTES)
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the request body is no {what} request: {error}") from None


async def _read_plain(request: Request, what: str) -> None:
    """Reads the body of a request that has nothing to say but its path. Raises `InvalidInput` if it says more."""
    check_order((await _read(request, _Order, what)).parameters or {}, what)
