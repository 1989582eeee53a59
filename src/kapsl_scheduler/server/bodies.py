"""Bodies of HTTP requests and answers: read within bounds, packed and unpacked, long ones beside the loop.

What is not here: which route reads what (`server.http`), answers and their statuses (`server.answers`).
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Any, Final, TypeVar

from starlette.types import Receive, Scope

from kapsl_scheduler.errors import Cancelled, InvalidInput, ResourceExhausted
from kapsl_scheduler.server.answers import Answer

__all__ = ["LONG_BODY", "beside_the_loop", "check_size", "compressed", "plain", "read_body", "worth_packing"]

Result = TypeVar("Result")

LONG_BODY: Final = 512 << 10
"""Bytes of a body whose JSON takes more than a few milliseconds."""
WORTH_PACKING: Final = 1 << 10
"""Bytes of an answer below which packing it costs more than it spares."""
LONG_PACKING: Final = 64 << 10
"""Bytes whose packing takes more than a millisecond."""

_WINDOW: Final = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body, of `limit` bytes at most. Raises `ResourceExhausted` as soon as there are more, `Cancelled` if the
    client goes away first."""
    declared = next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)
    check_size(declared, limit)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        check_size(len(body), limit)
        return body
    collected = bytearray()
    while message["type"] == "http.request":
        collected += message.get("body", b"")
        check_size(len(collected), limit)
        if not message.get("more_body", False):
            return bytes(collected)
        message = await receive()
    raise Cancelled("the client went away before its request was complete")


def check_size(size: int, limit: int) -> None:
    """Raises `ResourceExhausted`."""
    if size > limit:
        raise ResourceExhausted(f"the request body has {size} bytes or more, expected at most {limit}")


async def beside_the_loop(beside: bool, function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls the function, in a thread if `beside`: it then takes turns with the loop instead of keeping everybody
    waiting until it is done."""
    if beside:
        return await asyncio.to_thread(function, *arguments)
    return function(*arguments)


async def plain(body: bytes, encoding: bytes, limit: int) -> bytes:
    """A body as it was before it was packed: `limit` bytes of it at most, or `ResourceExhausted` is raised. Raises
    `InvalidInput` for what is not packed as the encoding says."""
    name = encoding.decode("latin-1").strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _WINDOW:
        raise InvalidInput(f"content-encoding: {name!r} came, expected one of {', '.join(_WINDOW)}, identity")
    return await beside_the_loop(len(body) > LONG_PACKING, _unpacked, body, name, limit)


def _unpacked(body: bytes, name: str, limit: int) -> bytes:
    unpacking = zlib.decompressobj(_WINDOW[name])
    try:
        unpacked = unpacking.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidInput(f"content-encoding: the body is not {name}: {error}") from None
    check_size(len(unpacked), limit)
    if not unpacking.eof or unpacking.unused_data:
        raise InvalidInput(f"content-encoding: the body is not one whole {name} stream")
    return unpacked


def worth_packing(answer: Answer) -> bool:
    return len(answer.body) >= WORTH_PACKING


async def compressed(answer: Answer, accepted: bytes) -> Answer:
    """The answer, packed if that is worth it and the client takes it."""
    if not worth_packing(answer):
        return answer
    name = _taken(accepted.decode("latin-1"))
    if name is None:
        return answer
    body = await beside_the_loop(len(answer.body) > LONG_PACKING, _packed, answer.body, name)
    return Answer(answer.status, body, (*answer.headers, ("content-encoding", name), ("vary", "accept-encoding")))


def _taken(accepted: str) -> str | None:
    """Which of our encodings an `Accept-Encoding` header likes best (RFC 9110, section 12.5.3)."""
    liked: dict[str, float] = {}
    for part in accepted.lower().split(","):
        name, _, weight = part.partition(";")
        try:
            liked[name.strip()] = float(weight.partition("=")[2] or 1.0)
        except ValueError:
            liked[name.strip()] = 0.0
    ours = {name: liked.get(name, liked.get("*", 0.0)) for name in _WINDOW}
    best = max(ours, key=lambda name: ours[name])
    return best if ours[best] > 0 else None


def _packed(body: bytes, name: str) -> bytes:
    packing = zlib.compressobj(1, wbits=_WINDOW[name])
    return packing.compress(body) + packing.flush()
