"""The Open Inference Protocol v2 over HTTP: routes, the table from error to status, bounds.

`HttpApi` is an ASGI application. What is not here: the form of a tensor (`server.oip`), and sockets, signals and
the order of shutting down (`app`).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NoReturn

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from kapsl_scheduler import errors
from kapsl_scheduler.runtime.cron_scheduler import CronScheduler
from kapsl_scheduler.runtime.registry import ModelRegistry, ServedModel
from kapsl_scheduler.server.bodies import JSON, LONG_BODY, beside_the_loop, json_response, read_body
from kapsl_scheduler.server.cron import CronApi
from kapsl_scheduler.server.metrics import Metrics
from kapsl_scheduler.server.oip import InferCall, check_outputs, decode_request, encode_reply, model_metadata
from kapsl_scheduler.types import InferenceResponse

__all__ = ["HttpApi", "status_of"]

_log = logging.getLogger(__name__)

# The one table from error to status. A class that is not here has the status of its nearest base.
_STATUS: Final[Mapping[type[BaseException], int]] = {
    errors.InvalidInput: 400,
    errors.ModelNotLoaded: 404,
    errors.ResourceExhausted: 413,  # a fixed limit: the same request would fail again
    errors.Overloaded: 429,
    errors.Cancelled: 499,  # the client went away, or somebody cancelled for it
    errors.Unavailable: 503,
    errors.DeadlineExceeded: 504,
    errors.InvalidExpression: 400,
    errors.InvalidJob: 400,
    errors.NotFound: 404,
    errors.DuplicateId: 409,
    errors.StoreError: 503,
    errors.CronError: 503,  # the scheduler of the jobs is closing
    BaseException: 500,
}
# Seconds before it is looked whether the client is still there. A task that watches costs as much as the rest of
# a short request, and one that is answered by then needs none; a client that goes sooner is noticed then.
_WATCH_AFTER: Final = 0.05
_LOAD_BYTES: Final = 64 << 10  # a request to load or unload says next to nothing
# Clients say by a header that a body is not plain JSON.
_FOREIGN_FORMS: Final[Mapping[bytes, str]] = {
    b"content-encoding": "a compressed body",
    b"inference-header-content-length": "binary tensor data",
}
_EXPECTED: Final = "expected JSON as it is, with the values of each tensor in data"
# Values of an answer whose JSON takes more than a few milliseconds.
_LONG_ANSWER: Final = 32 << 10
_TRY_AGAIN: Final = frozenset({429, 503})


def status_of(error: BaseException) -> int:
    """The HTTP status of an error."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def _error_response(error: BaseException) -> Response:
    status = status_of(error)
    if not isinstance(error, errors.EngineError | errors.CronError):
        return _error_body(500, "the server failed; its log says why", "internal")
    retry_after = getattr(error, "retry_after", None)
    details: dict[str, Any] = {} if retry_after is None else {"retry_after": retry_after}
    if isinstance(error, errors.InvalidJob | errors.InvalidPackage):
        details["faults"] = error.faults
    elif isinstance(error, errors.InvalidExpression):
        details |= {key: getattr(error, key) for key in ("text", "field", "token", "position", "hint")}
    response = _error_body(status, str(error) or error.code, error.code, **details)
    if status in _TRY_AGAIN:
        response.headers["retry-after"] = str(max(1, math.ceil(retry_after or 0)))
    return response


def _error_body(status: int, message: str, code: str, **details: Any) -> Response:
    return json_response({"error": message, "code": code, **details}, status)


def _index_entry(model: ServedModel) -> dict[str, str]:
    state, reason = ("READY", "") if model.ready else ("UNAVAILABLE", "its engines are not ready")
    return {"name": model.name, "version": model.info.version, "state": state, "reason": reason}


class _LoadRequest(msgspec.Struct):
    parameters: dict[str, Any] | None = None


class HttpApi:
    """The server's routes over a registry of models.

    Bodies beyond `max_body_bytes` are refused with 413, inference requests beyond `max_in_flight` at a time with
    429; health and metadata are answered all the same. While `draining` is true the server says that it is not
    ready, and refuses to change jobs; inference requests that come all the same are answered. `reload` loads a model
    anew from where it came, `unload` takes it out of service; without them there are no routes for that. With a `cron`
    scheduler there are the routes of its jobs.
    """

    def __init__(
        self,
        registry: ModelRegistry[Any],
        *,
        version: str,
        max_body_bytes: int = 64 << 20,
        max_in_flight: int = 4096,
        reload: Callable[[str], Awaitable[ServedModel]] | None = None,
        unload: Callable[[str], Awaitable[None]] | None = None,
        cron: CronScheduler | None = None,
    ) -> None:
        self.draining = False
        self._reload = reload
        self._unload = unload
        self._cron = None if cron is None else CronApi(cron, registry, self._check_open, max_body_bytes=max_body_bytes)
        self._metrics = Metrics(version, cron)
        self._registry = registry
        self._version = version
        self._max_body_bytes = max_body_bytes
        self._max_in_flight = max_in_flight
        self._in_flight = 0
        self._answers: dict[str, Counter[int]] = {}
        self._routes = self._build_routes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._routes(scope, receive, send)

    def _build_routes(self) -> Starlette:
        model = "/v2/models/{model}"
        version = model + "/versions/{version}"
        infer = _Endpoint(self)
        routes: list[BaseRoute] = [
            Route(model + "/infer", infer, methods=["POST"]),
            Route(version + "/infer", infer, methods=["POST"]),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2", self._server),
            Route("/v2/repository/index", self._index, methods=["POST"]),
            Route("/metrics", self._figures),
        ]
        for prefix in (model, version):
            routes += [
                Route(prefix, self._model),
                Route(prefix + "/ready", self._model_ready),
                Route(prefix + "/stats", self._model_stats),
            ]
        if self._reload is not None:
            routes.append(Route("/v2/repository/models/{model}/load", self._load, methods=["POST"]))
        if self._unload is not None:
            routes.append(Route("/v2/repository/models/{model}/unload", self._take_out, methods=["POST"]))
        if self._cron is not None:
            routes += self._cron.routes()
        app = Starlette(
            routes=routes,
            exception_handlers={
                HTTPException: self._no_such_route,
                errors.EngineError: self._failed,
                errors.CronError: self._failed,
                Exception: self._failed,
            },
        )
        app.router.redirect_slashes = False
        return app

    # ------------------------------------------------------------------------------------------ inference

    async def infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one inference request."""
        # Counted until the answer is sent: a client that is slow to send or to read holds memory too.
        self._in_flight += 1
        try:
            await self._infer(scope, receive, send)
        finally:
            self._in_flight -= 1

    async def _infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["model"]
        try:
            if self._in_flight > self._max_in_flight:
                raise errors.Overloaded(f"{self._max_in_flight} inference requests are in flight, which is the limit")
            body = await read_body(scope, receive, self._max_body_bytes)
            version = scope["path_params"].get("version", "")
            self._registry.get(name, version)  # before much is decoded for nobody
            call = await beside_the_loop(len(body) > LONG_BODY, _decode, body, scope)
            model = self._registry.get(name, version)
            if call.outputs and model.info.outputs:
                check_outputs(call.outputs, (spec.name for spec in model.info.outputs))
            answer = await _infer_while_connected(model, call, receive)
            long = sum(array.size for array in answer.outputs.values()) > _LONG_ANSWER
            encoded = await beside_the_loop(long, encode_reply, model.info, name, answer.outputs, call)
            response = Response(encoded, media_type=JSON)
        except errors.EngineError as error:
            response = _error_response(error)
            if response.status_code == 500:
                _log.error("inference on %r failed: %s: %s", name, error.code, error)
        except Exception as error:
            _log.exception("inference on %r failed unexpectedly", name)
            response = _error_response(error)
        if name in self._registry:  # or every name that a stranger makes up would be remembered
            self._answers.setdefault(name, Counter())[response.status_code] += 1
        await response(scope, receive, send)

    # ------------------------------------------------------------------------------------------- the rest

    async def _live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def _ready(self, request: Request) -> Response:
        ready = not self.draining and self._registry.ready()
        return json_response({"ready": ready}, 200 if ready else 503)

    async def _server(self, request: Request) -> Response:
        return json_response({"name": "kapsl-scheduler", "version": self._version, "extensions": ["schedule_policy"]})

    async def _index(self, request: Request) -> Response:
        return json_response([_index_entry(model) for model in self._registry.list()])

    async def _load(self, request: Request) -> Response:
        await _read_plain(request, "load")
        assert self._reload is not None
        return json_response(_index_entry(await self._reload(request.path_params["model"])))

    async def _take_out(self, request: Request) -> Response:
        await _read_plain(request, "unload")
        assert self._unload is not None
        await self._unload(request.path_params["model"])
        return json_response({})

    async def _figures(self, request: Request) -> Response:
        text, kind = await self._metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind})

    async def _model(self, request: Request) -> Response:
        model = self._requested(request)
        return json_response(model_metadata(model.name, model.info))

    async def _model_ready(self, request: Request) -> Response:
        model = self._requested(request)
        ready = not self.draining and model.ready
        return json_response({"name": model.name, "ready": ready}, 200 if ready else 503)

    async def _model_stats(self, request: Request) -> Response:
        model = self._requested(request)
        statistics = model.scheduler.statistics()
        answers = self._answers.get(model.name, Counter())
        entry = {
            "name": model.name,
            "version": model.info.version,
            "inference_count": statistics.rows,
            "execution_count": statistics.calls,
            "answers": {str(status): count for status, count in sorted(answers.items())},
            "scheduler": statistics,
        }
        return json_response({"model_stats": [entry]})

    def _requested(self, request: Request) -> ServedModel:
        parameters = request.path_params
        return self._registry.get(parameters["model"], parameters.get("version", ""))

    def _check_open(self) -> None:
        if self.draining:
            raise errors.Unavailable("the server is closing")

    async def _failed(self, request: Request, error: Exception) -> Response:
        return _error_response(error)

    async def _no_such_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message, code = error.detail, "http_error"
        if error.status_code == 404:
            message, code = f"nothing is at {request.url.path}; the routes begin at /v2", "not_found"
            if self._cron is None and request.url.path.startswith("/v2/cron/"):
                message = "this server runs no jobs: it was started with --no-cron"
        elif error.status_code == 405:
            message, code = f"{request.method} is not a method of {request.url.path}", "method_not_allowed"
        response = _error_body(error.status_code, message, code)
        response.headers.update(error.headers or {})
        return response


class _Endpoint:
    """The infer route as a bare ASGI application: its body is read once and bounded while it is read."""

    def __init__(self, api: HttpApi) -> None:
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._api.infer(scope, receive, send)


async def _read_plain(request: Request, what: str) -> None:
    """Reads the body of a request that has nothing to say but its path. Raises `InvalidInput` if it says more."""
    body = await read_body(request.scope, request.receive, _LOAD_BYTES)
    try:
        parameters = msgspec.json.decode(body or b"{}", type=_LoadRequest).parameters
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise errors.InvalidInput(f"the request body is no {what} request: {error}") from None
    if parameters:
        raise errors.InvalidInput(f"parameters: {', '.join(parameters)} came, expected none: a model is {what}ed as is")


def _decode(body: bytes, scope: Scope) -> InferCall:
    try:
        return decode_request(body)
    except errors.InvalidInput:
        for name, value in scope["headers"]:  # only a body that cannot be read pays for this look at its form
            if form := _FOREIGN_FORMS.get(name):
                raise errors.InvalidInput(
                    f"{form} came ({name.decode()}: {value.decode('latin-1')}), {_EXPECTED}"
                ) from None
        raise


async def _infer_while_connected(model: ServedModel, call: InferCall, receive: Receive) -> InferenceResponse:
    """Runs the call; a client that goes away cancels it, and `Cancelled` is raised."""
    watchers: list[asyncio.Task[NoReturn]] = []
    try:
        async with asyncio.TaskGroup() as group:
            watch = asyncio.get_running_loop().call_later(
                _WATCH_AFTER, lambda: watchers.append(group.create_task(_fail_when_gone(receive)))
            )
            try:
                return await model.scheduler.infer(call.request, priority=call.priority, timeout=call.timeout)
            finally:
                watch.cancel()
                for watcher in watchers:
                    watcher.cancel()
    except ExceptionGroup as failures:
        error = failures.exceptions[0]
        raise error from error.__cause__


async def _fail_when_gone(receive: Receive) -> NoReturn:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise errors.Cancelled("the client went away before its answer was ready")
