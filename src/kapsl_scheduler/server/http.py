"""The server's HTTP application: the routes of all its parts, and what becomes of what they raise.

A part is a group of routes with one subject, in a module of its own. What is not here: what the parts answer, the
connection that inference requests come through (`server.door`), and sockets, signals and the order of shutting down
(`app`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Message, Receive, Scope, Send

from kapsl_scheduler import errors
from kapsl_scheduler.server.access import Caller, Guard, Role, role_for
from kapsl_scheduler.server.answers import error_answer, error_body, response_of
from kapsl_scheduler.server.inference import Inference
from kapsl_scheduler.server.journal import ACCESS, AUDIT, log_request
from kapsl_scheduler.server.metrics import Metrics
from kapsl_scheduler.server.openapi import Document
from kapsl_scheduler.server.service import Service

__all__ = ["HttpApi", "Part"]


_LOOKS: Final = frozenset({"GET", "HEAD"})


class Part(Protocol):
    """Routes with one subject."""

    def routes(self) -> list[BaseRoute]: ...


class HttpApi:
    """The application over a service. Bodies of inference requests beyond `max_body_bytes` are refused with 413.
    `absent` says of the beginnings of paths why nothing is there. What the `guard` refuses does not come to a route;
    what changes something is told to the log `kapsl_scheduler.audit`, with `access_log` every request to
    `kapsl_scheduler.access`."""

    def __init__(
        self,
        service: Service,
        *,
        max_body_bytes: int = 64 << 20,
        metrics: Metrics | None = None,
        parts: Iterable[Part] = (),
        absent: dict[str, str] | None = None,
        guard: Guard | None = None,
        access_log: bool = False,
    ) -> None:
        self._service = service
        self._metrics = metrics or Metrics(service)
        self._http = self._metrics.http
        self.inference = Inference(
            service, max_body_bytes=max_body_bytes, guard=guard, access_log=access_log, http=self._http
        )
        self._guard = guard
        self._access_log = access_log
        self._absent = absent or {}
        model = "/v2/models/{model}"
        routes: list[BaseRoute] = [
            Route(model + "/infer", self.inference, methods=["POST"]),
            Route(model + "/versions/{version}/infer", self.inference, methods=["POST"]),
            Route("/metrics", self._figures),
            Route("/metrics/triton", self._figures_for_triton),
        ]
        for part in parts:
            routes += part.routes()
        routes.append(Route("/openapi.json", Document(service.version, routes, service.registry).answer))
        self._routes = Starlette(
            routes=routes,
            exception_handlers={
                HTTPException: self._no_such_route,
                errors.EngineError: self._failed,
                errors.CronError: self._failed,
                Exception: self._failed,
            },
        )
        self._routes.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        changes = method not in _LOOKS and (role_for(method, path) or Role.READER) > Role.READER
        begun, status = time.perf_counter(), 499  # if nothing is answered, as the client has gone
        caller: Caller | None = None

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._service.draining:
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        try:
            try:
                caller = None if self._guard is None else self._guard.admit(method, path, dict(scope["headers"]))
                if caller is not None and method not in _LOOKS:
                    caller.enter(time.monotonic())
            except errors.EngineError as error:
                caller = None
                await response_of(error_answer(error))(scope, receive, told)
            else:
                try:
                    await self._routes(scope, receive, told)
                finally:
                    if caller is not None and method not in _LOOKS:
                        caller.leave()
        finally:
            self._http.answered(scope, status)
            who = "" if caller is None else caller.token.name
            if changes:
                log_request(AUDIT, who, method, path, status, begun)
            if self._access_log:
                log_request(ACCESS, who, method, path, status, begun)

    async def _figures(self, request: Request) -> Response:
        text, kind = await self._metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind})

    async def _figures_for_triton(self, request: Request) -> Response:
        text, kind = self._metrics.render_triton()
        return Response(text, headers={"content-type": kind})

    async def _failed(self, request: Request, error: Exception) -> Response:
        return response_of(error_answer(error))

    async def _no_such_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message, code = error.detail, "http_error"
        path = request.url.path
        if error.status_code == 404:
            message, code = f"nothing is at {path}; the routes begin at /v2", "not_found"
            message = next((why for start, why in self._absent.items() if path.startswith(start)), message)
        elif error.status_code == 405:
            message, code = f"{request.method} is not a method of {path}", "method_not_allowed"
        response = response_of(error_body(error.status_code, message, code))
        response.headers.update(error.headers or {})
        return response
