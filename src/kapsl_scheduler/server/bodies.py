"""Bodies of HTTP requests and answers: read within bounds, written as JSON, long ones beside the loop.

What is not here: which route reads what, and the table from error to status (`server.http`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope

from kapsl_scheduler.errors import Cancelled, ResourceExhausted

__all__ = ["JSON", "LONG_BODY", "beside_the_loop", "json_response", "read_body"]

Result = TypeVar("Result")

JSON: Final = "application/json"
LONG_BODY: Final = 512 << 10
"""Bytes of a body whose JSON takes more than a few milliseconds."""


def json_response(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type=JSON)


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body, of `limit` bytes at most. Raises `ResourceExhausted` as soon as there are more, `Cancelled` if the
    client goes away first."""
    declared = next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)
    _check_size(declared, limit)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        _check_size(len(body), limit)
        return body
    collected = bytearray()
    while message["type"] == "http.request":
        collected += message.get("body", b"")
        _check_size(len(collected), limit)
        if not message.get("more_body", False):
            return bytes(collected)
        message = await receive()
    raise Cancelled("the client went away before its request was complete")


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ResourceExhausted(f"the request body has {size} bytes or more, expected at most {limit}")


async def beside_the_loop(beside: bool, function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls the function, in a thread if `beside`: it then takes turns with the loop instead of keeping everybody
    waiting until it is done."""
    if beside:
        return await asyncio.to_thread(function, *arguments)
    return function(*arguments)
