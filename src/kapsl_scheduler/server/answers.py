"""Answers over HTTP: the one table from error to status, of HTTP and of gRPC, and errors in JSON.

What is not here: which route answers what (`server.http`), and errors over gRPC (`server.grpc_answers`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final

import msgspec
from starlette.responses import Response

from kapsl_scheduler import errors

__all__ = [
    "JSON",
    "Answer",
    "error_answer",
    "error_body",
    "grpc_status_of",
    "json_response",
    "response_of",
    "retry_seconds",
    "status_of",
]

JSON: Final = "application/json"

_STATUS: Final[Mapping[type[BaseException], tuple[int, str]]] = {
    errors.InvalidInput: (400, "INVALID_ARGUMENT"),
    errors.Unauthorized: (401, "UNAUTHENTICATED"),
    errors.Forbidden: (403, "PERMISSION_DENIED"),
    errors.ModelNotLoaded: (404, "NOT_FOUND"),
    errors.ResourceExhausted: (413, "RESOURCE_EXHAUSTED"),  # a fixed limit: the same request would fail again
    errors.Overloaded: (429, "RESOURCE_EXHAUSTED"),
    errors.Cancelled: (499, "CANCELLED"),  # the client went away, or somebody cancelled for it
    errors.Unavailable: (503, "UNAVAILABLE"),
    errors.DeadlineExceeded: (504, "DEADLINE_EXCEEDED"),
    errors.InvalidExpression: (400, "INVALID_ARGUMENT"),
    errors.InvalidJob: (400, "INVALID_ARGUMENT"),
    errors.NotFound: (404, "NOT_FOUND"),
    errors.DuplicateId: (409, "ALREADY_EXISTS"),
    errors.StoreError: (503, "UNAVAILABLE"),
    errors.CronError: (503, "UNAVAILABLE"),  # the scheduler of the jobs is closing
    BaseException: (500, "INTERNAL"),
}
"""The statuses of HTTP and of gRPC. A class that is not here has those of its nearest base."""
_TRY_AGAIN: Final = frozenset({429, 503})
_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus} | {499: "Client Closed Request"}


class Answer(msgspec.Struct, gc=False):
    """A status, headers that go with it, and a body."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = (("content-type", JSON),)

    def head(self, more: bytes = b"") -> bytes:
        """Status line and headers, `more` of them among them (each line with its end), for HTTP/1.1."""
        return _start(self.status, len(self.body), self.headers) + more + b"\r\n"


@lru_cache(256)  # most answers of a model differ in their bodies only
def _start(status: int, length: int, headers: tuple[tuple[str, str], ...]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"HTTP/1.1 {status} {_PHRASES.get(status, '')}\r\ncontent-length: {length}\r\n{lines}".encode("latin-1")


def status_of(error: BaseException) -> int:
    """The HTTP status of an error."""
    return _statuses(error)[0]


def grpc_status_of(error: BaseException) -> str:
    """The name of the gRPC status of an error."""
    return _statuses(error)[1]


def _statuses(error: BaseException) -> tuple[int, str]:
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def retry_seconds(error: BaseException) -> int | None:
    """Whole seconds after which to ask again, at least 1; None for what does not pass by waiting."""
    if status_of(error) not in _TRY_AGAIN:
        return None
    return max(1, math.ceil(getattr(error, "retry_after", None) or 0))


def error_answer(error: BaseException, status: int | None = None) -> Answer:
    """An error with its code and all that it says of itself, and the status of its class unless another is given. What
    is no error of ours is not shown."""
    if not isinstance(error, errors.EngineError | errors.CronError):
        return error_body(500, "the server failed; its log says why", "internal")
    status = status or status_of(error)
    retry_after = getattr(error, "retry_after", None)
    details: dict[str, Any] = {} if retry_after is None else {"retry_after": retry_after}
    if isinstance(error, errors.InvalidJob | errors.InvalidPackage):
        details["faults"] = error.faults
    elif isinstance(error, errors.InvalidExpression):
        details |= {key: getattr(error, key) for key in ("text", "field", "token", "position", "hint")}
    answer = error_body(status, str(error) or error.code, error.code, **details)
    if status == 401:
        answer.headers += (("www-authenticate", "Bearer"),)
    if (seconds := retry_seconds(error)) is not None:
        answer.headers += (("retry-after", str(seconds)),)
    return answer


def error_body(status: int, message: str, code: str, **details: Any) -> Answer:
    return Answer(status, msgspec.json.encode({"error": message, "code": code, **details}))


def response_of(answer: Answer) -> Response:
    """The same for Starlette."""
    return Response(answer.body, answer.status, dict(answer.headers))


def json_response(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type=JSON)
