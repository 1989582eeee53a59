"""One HTTP connection: uvicorn's protocol with a bound on heads, and JSON for what ends below the routes.

What is not here: routes, bodies and their bounds (`server.http`).
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["MAX_HEAD_BYTES", "Connection"]

MAX_HEAD_BYTES: Final = 64 << 10
"""How much may come without the end of a request's head, or of the trailers after its body. The parser keeps all of
it: without a bound one connection could fill the memory."""


class Connection(HttpToolsProtocol):
    """Refuses an endless head with 431; says what is no HTTP in JSON, as every other error."""

    _unfinished = 0
    """Bytes since a head was complete or a piece of a body came, where data is being received."""

    def data_received(self, data: bytes) -> None:
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MAX_HEAD_BYTES and not self.transport.is_closing():
            message = f"the head of the request has more than {MAX_HEAD_BYTES} bytes"
            self._end(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message, "head_too_large")

    def on_headers_complete(self) -> None:
        self._unfinished = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unfinished = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser fails."""
        self._end(HTTPStatus.BAD_REQUEST, msg, "bad_request")

    def _end(self, status: HTTPStatus, message: str, code: str) -> None:
        if self.cycle is None or self.cycle.response_complete:  # else it would stand within another answer
            body = msgspec.json.encode({"error": message, "code": code})
            head = (
                f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
