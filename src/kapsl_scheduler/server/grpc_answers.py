"""Errors over gRPC: a status, and behind it what else an error says of itself.

What is not here: which error has which status (`server.answers`), and who ends a call in one (`server.grpc_door`).
"""

from __future__ import annotations

from typing import Any, Final, NoReturn
from urllib.parse import quote

import grpc
import grpc.aio

from kapsl_scheduler.errors import CronError, EngineError
from kapsl_scheduler.server.answers import grpc_status_of, retry_seconds

__all__ = ["Context", "refuse", "shown"]

Context = Any
"""What gRPC knows of a call: `grpc.aio.ServicerContext`."""

_UNSHOWN: Final = "the server failed; its log says why"

_MOST_DETAILS: Final = 4096
"""Bytes of a status's text. It travels among the headers, of which clients take 8 KiB by default."""


def shown(error: BaseException) -> tuple[str, str]:
    """The code and the text of an error, as a client hears them. What is no error of ours is not shown."""
    if not isinstance(error, EngineError | CronError):
        return "internal", _UNSHOWN
    return error.code, _clipped(str(error) or error.code)


async def refuse(context: Context, error: BaseException) -> NoReturn:
    """Ends a call with an error, by raising what gRPC wants raised.

    The error's code travels behind the status as `kapsl-code`, and the seconds after which to ask again as
    `retry-after`. Where the error says so itself, gRPC's own retries hear it too (`grpc-retry-pushback-ms`).
    """
    code, text = shown(error)
    trailing = [("kapsl-code", code)]
    if (seconds := retry_seconds(error)) is not None:
        trailing.append(("retry-after", str(seconds)))
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        trailing.append(("grpc-retry-pushback-ms", str(max(1, round(retry_after * 1e3)))))
    await context.abort(grpc.StatusCode[grpc_status_of(error)], text, tuple(trailing))
    raise AssertionError("gRPC goes on after the end of a call")


def _clipped(text: str) -> str:
    """So much of a text as a status can carry, which sends what is not ASCII as several bytes each."""
    if len(text) * 12 <= _MOST_DETAILS or len(quote(text)) <= _MOST_DETAILS:
        return text
    return text[: _MOST_DETAILS // 12] + "…"
