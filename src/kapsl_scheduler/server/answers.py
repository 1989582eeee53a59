"""Answers over HTTP: the one table from error to status, and errors in JSON.

What is not here: which route answers what (`server.http`), and the statuses of other protocols.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec
from starlette.responses import Response

from kapsl_scheduler import errors

__all__ = ["JSON", "Answer", "error_answer", "error_body", "json_response", "response_of", "status_of"]

JSON: Final = "application/json"

_STATUS: Final[Mapping[type[BaseException], int]] = {
    errors.InvalidInput: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
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
"""A class that is not here has the status of its nearest base."""
_TRY_AGAIN: Final = frozenset({429, 503})
_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus} | {499: "Client Closed Request"}


class Answer(msgspec.Struct, gc=False):
    """A status, headers that go with it, and a body."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = (("content-type", JSON),)

    def head(self, more: bytes = b"") -> bytes:
        """Status line and headers, `more` of them among them (each line with its end), for HTTP/1.1."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        start = f"HTTP/1.1 {self.status} {_PHRASES.get(self.status, '')}\r\ncontent-length: {len(self.body)}\r\n{lines}"
        return start.encode("latin-1") + more + b"\r\n"


def status_of(error: BaseException) -> int:
    """The HTTP status of an error."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


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
    if status in _TRY_AGAIN:
        answer.headers += (("retry-after", str(max(1, math.ceil(retry_after or 0)))),)
    return answer


def error_body(status: int, message: str, code: str, **details: Any) -> Answer:
    return Answer(status, msgspec.json.encode({"error": message, "code": code, **details}))


def response_of(answer: Answer) -> Response:
    """The same for Starlette."""
    return Response(answer.body, answer.status, dict(answer.headers))


def json_response(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type=JSON)
