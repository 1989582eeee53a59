"""One HTTP connection. The infer route is answered here, from the connection's bytes to its bytes, without a framework
in between; every other route is the application's.

It is uvicorn's protocol with another cycle for inference requests, a bound on heads, and JSON for what ends below the
routes. What is not here: what an inference answers (`server.inference`), other routes (`server.http`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from http import HTTPStatus
from time import monotonic, perf_counter, perf_counter_ns
from typing import Any, Final, NamedTuple
from urllib.parse import unquote_to_bytes

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kapsl_scheduler.errors import (
    Cancelled,
    EngineError,
    Forbidden,
    Overloaded,
    ResourceExhausted,
    Unauthorized,
)
from kapsl_scheduler.server.access import Caller
from kapsl_scheduler.server.answers import Answer, error_answer, error_body
from kapsl_scheduler.server.bodies import check_size
from kapsl_scheduler.server.http_figures import NO_ROUTE
from kapsl_scheduler.server.inference import Begun, Inference, InferHead, Later
from kapsl_scheduler.server.journal import ACCESS, log_request

__all__ = ["MAX_HEAD_BYTES", "Connection"]

MAX_HEAD_BYTES: Final = 64 << 10
"""How much may come without the end of a request's head, or of the trailers after its body. The parser keeps all of
it: without a bound one connection could fill the memory."""

AHEAD: Final = 16
"""Requests sent ahead of an answer with which a connection is read no further, until some of them are answered. While
it is not read, it is not seen that its client has gone."""
AHEAD_BYTES: Final = 64 << 10
"""The same for the body of one that is sent ahead."""

KNOWN_HEAD_BYTES: Final = 2048
"""How long a head may be that is remembered: most clients send the same one again and again."""

_INFER: Final = re.compile(rb"/v2/models/([^/?#]+)(?:/versions/([^/?#]+))?/infer(?:[?#].*)?")
_AT_ONCE: Final = (ResourceExhausted, Unauthorized, Forbidden)
"""Refusals for which the body is not waited for."""
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_CLOSE: Final = b"connection: close\r\n"


class Connection(HttpToolsProtocol):
    """Answers inference requests by `inference`. Refuses an endless head with 431, and connections beyond the `most`
    at a time with 503; says what is no HTTP in JSON, as every other error.

    One that is idle after an inference is closed by `close_if_stalled`, which spares a timer for each request.
    """

    _unfinished = 0
    """Bytes since a head was complete or a piece of a body came, where data is being received."""
    _between = True
    """Whether all messages that have begun are complete."""
    _known: _Known | None = None
    """The latest inference request that came in one piece."""
    _dates: tuple[Any, bytes] = (None, b"")
    """uvicorn's headers of every answer, of which the date changes each second, and the same as lines."""

    def __init__(self, inference: Inference | None, most: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._most = most
        self._moved = self.loop.time()  # when the client last sent, or took, something
        self._unsent = 0
        self.running: _Exchange | None = None  # the one whose turn it is, until it is answered
        self._inference = inference

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self._end(error_answer(Overloaded(f"{self._most} connections are open, which is the limit"), 503))

    def data_received(self, data: bytes) -> None:
        self._moved = self.loop.time()
        known, before = self._known, self.cycle
        begins = self._between and (before is None or before.response_complete)
        if known is not None and begins and len(data) == known.size and data.startswith(known.text):
            # Nothing that the parser could say of it is new.
            self._unset_keepalive_if_required()
            self.cycle = exchange = _Exchange(self, known.head)  # type: ignore[assignment]
            exchange.take_all(data[len(known.text) :])
            return
        self._unfinished += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        cycle: Any = self.cycle
        if begins and cycle is not before and self._between and type(cycle) is _Exchange:
            self._known = _known(data, cycle.head)
        if self._unfinished > MAX_HEAD_BYTES and not self.transport.is_closing():
            message = f"the head of the request has more than {MAX_HEAD_BYTES} bytes"
            self._end(error_body(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message, "head_too_large"))

    def _parse(self, data: bytes) -> None:
        """Have the parser read it. A request that asks for another protocol is answered in this one, as RFC 9110 (7.8)
        lets a server do; the parser would take what follows its head, its body too, for that other protocol."""
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                method = self.parser.get_method()
                if method == b"CONNECT":  # no request, but the end of HTTP on this connection
                    self._end(error_body(HTTPStatus.METHOD_NOT_ALLOWED, "CONNECT is not offered", "method_not_allowed"))
                    return
                rest = rest[upgrade.args[0] :]
                head = _head_without_upgrade(method, self.url, self.parser.get_http_version(), self.headers)
                self.parser = httptools.HttpRequestParser(self)
                # As uvicorn has it: what follows a request that closes the connection is no error.
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(head)

    def on_message_begin(self) -> None:
        self._between = False
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        self._unfinished = 0
        if self.parser.should_upgrade():  # it comes again without that
            return
        if (
            self._inference is not None
            and (route := _INFER.fullmatch(self.url)) is not None
            and self.parser.get_method() == b"POST"
        ):
            self._begin_inference(self._inference, *route.groups())
            return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()  # which makes what an application is told of the request
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()

    def _begin_inference(self, inference: Inference, name: bytes, version: bytes | None) -> None:
        before = self.cycle
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        head = _Head(inference, name, version, dict(self.headers), keep_alive)
        self.cycle = exchange = _Exchange(self, head)  # type: ignore[assignment]
        if before is not None and not before.response_complete:
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]
            self._read_no_further()
        else:
            exchange.its_turn()

    def _read_no_further(self) -> None:
        if len(self.pipeline) >= AHEAD:
            self.flow.pause_reading()

    def on_body(self, body: bytes) -> None:
        self._unfinished = 0
        cycle: Any = self.cycle
        if type(cycle) is not _Exchange:
            super().on_body(body)
        elif cycle.take(body) > AHEAD_BYTES and not cycle.is_next:
            self.flow.pause_reading()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._between = True
        cycle: Any = self.cycle
        if type(cycle) is _Exchange:
            cycle.complete()
        else:
            super().on_message_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """What uvicorn calls for a request that waited for its turn."""
        if type(cycle) is _Exchange:
            cycle.its_turn()
        else:
            super()._start_asgi_task(cycle, app)

    def close_if_stalled(self, patience: float) -> None:
        """Let go of a client that has not sent or taken a byte for so many seconds, though it is its turn; and of one
        that has had its answers and has not asked again in the time that uvicorn gives it."""
        now = self.loop.time()
        if self.flow.write_paused:
            unsent = self.transport.get_write_buffer_size()
            if unsent != self._unsent:
                self._unsent, self._moved = unsent, now
            its_turn = True
        else:
            cycle: Any = self.cycle
            ahead = type(cycle) is _Exchange and not cycle.is_next
            its_turn = not ahead and (cycle is None or cycle.more_body or cycle.response_complete)
            if cycle is not None and cycle.response_complete and self._between:
                patience = self.timeout_keep_alive
        if its_turn and now - self._moved >= patience:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        # Not only for the latest, as uvicorn has it.
        waiting: Any = self.pipeline
        for cycle, _ in waiting:
            if type(cycle) is _Exchange:
                cycle.lost()
        running, self.running = self.running, None
        if running is not None:
            running.lost()
        super().connection_lost(exc)
        # What is left of it is a ring of objects, which the collector finds late: it must not hold a head until then.
        self.url, self.headers = b"", []
        self.scope = {}  # type: ignore[typeddict-item]
        if self.cycle is not None and self.cycle.response_complete:
            self.cycle = None  # type: ignore[assignment]

    def on_response_complete(self) -> None:
        """What uvicorn calls when it has answered."""
        super().on_response_complete()
        self._read_no_further()  # uvicorn reads on after each answer

    def on_answer(self) -> None:
        """The same when an inference is answered."""
        self.running = None
        self._moved = self.loop.time()  # its client has been waiting; and what is next may not have been read for long
        if self.pipeline:
            self.on_response_complete()
        elif not self.transport.is_closing():
            self.server_state.total_requests += 1
            self.flow.resume_reading()

    def date_lines(self) -> bytes:
        """Headers of every answer, each with its end."""
        now = self.server_state.default_headers
        known, lines = self._dates
        if known is not now:
            lines = b"".join(b"%b: %b\r\n" % header for header in now)
            self._dates = (now, lines)
        return lines

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser fails."""
        self._end(error_body(HTTPStatus.BAD_REQUEST, msg, "bad_request"))

    def _end(self, answer: Answer) -> None:
        if self.cycle is None or self.cycle.response_complete:  # else it would stand within another answer
            self.transport.write(answer.head(_CLOSE) + answer.body)
            if self._inference is not None:
                self._inference.http.count("(other)", NO_ROUTE, answer.status)
        self.transport.close()


def _head_without_upgrade(method: bytes, url: bytes, version: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A head that has been read, as if it had not asked for another protocol."""
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    for name, value in headers:
        if name == b"connection":
            kept = (option.strip() for option in value.split(b",") if option.strip().lower() != b"upgrade")
            value = b", ".join(kept)
        if name != b"upgrade":
            lines.append(b"%b: %b" % (name, value))
    return b"\r\n".join((*lines, b"", b""))


class _Head(InferHead):
    """The head of an inference request on a connection: from whom it is, and why it is refused, if it is."""

    __slots__ = ("caller", "inference", "keep_alive", "refused")

    def __init__(
        self, inference: Inference, name: bytes, version: bytes | None, headers: dict[bytes, bytes], keep_alive: bool
    ) -> None:
        super().__init__(_text(name), "" if version is None else _text(version), headers)
        self.inference = inference
        self.keep_alive = keep_alive
        self.caller: Caller | None = None
        self.refused: EngineError | None = None
        try:
            if inference.guard is not None:
                self.caller = inference.guard.admit_inference(headers)
            check_size(int(headers.get(b"content-length", 0)), inference.max_body_bytes)
        except EngineError as error:
            self.refused = error


class _Known(NamedTuple):
    """A head as it came, and the length of the whole request."""

    text: bytes
    size: int
    head: _Head


def _known(data: bytes, head: _Head) -> _Known | None:
    """What is worth knowing of a request that came in one piece and whose body has a length."""
    end = data.find(b"\r\n\r\n") + 4
    length = head.headers.get(b"content-length")
    if (
        end > KNOWN_HEAD_BYTES
        or head.refused is not None
        or b"expect" in head.headers
        or b"transfer-encoding" in head.headers
        or length is None
        or end + int(length) != len(data)
    ):
        return None
    return _Known(data[:end], len(data), head)


class _Exchange:
    """An inference request and its answer, where uvicorn has a cycle of its application: uvicorn reads
    `response_complete`, sets `keep_alive` and `disconnected`, and sets the `message_event` of one whose connection is
    lost.

    It is answered once its body is complete and it is its turn. From its turn on it is one of the service's requests in
    flight, also while its body comes: a client that is slow to send holds memory too. What waits for its turn is
    bounded by what is read ahead.
    """

    __slots__ = (
        "_begun",
        "_body",
        "_came",
        "_charged",
        "_complete",
        "_connection",
        "_entered",
        "_made",
        "_refused",
        "_size",
        "_task",
        "disconnected",
        "head",
        "is_next",
        "keep_alive",
        "response_complete",
    )

    def __init__(self, connection: Connection, head: _Head) -> None:
        self._connection = connection
        self.head = head
        self._body: list[bytes] = []
        self._size = 0
        self._complete = False
        self.is_next = False
        self._entered = False
        self._charged: Caller | None = None
        self._begun: Begun | None = None
        self._made: Answer | None = None
        self._task: asyncio.Task[None] | None = None
        self._refused = head.refused
        self.keep_alive = head.keep_alive
        self.disconnected = False
        self.response_complete = False
        self._came = perf_counter()

    @property
    def more_body(self) -> bool:
        """Whether the client has not sent all of it."""
        return not self._complete

    def its_turn(self) -> None:
        """Its answer is the next on the connection."""
        self.is_next = True
        self._connection.running = self
        if self._refused is None:
            try:
                if (caller := self.head.caller) is not None:
                    caller.enter(monotonic())
                    self._charged = caller
                self.head.inference.service.enter()
                self._entered = True
            except Overloaded as error:
                self._refused = error
        if self._complete or isinstance(self._refused, _AT_ONCE):
            self._begin()
        elif self.head.headers.get(b"expect", b"").lower() == b"100-continue":
            self._connection.transport.write(_CONTINUE)

    def take(self, piece: bytes) -> int:
        """More of the body. How much of it is held."""
        if self._refused is not None:
            return 0
        self._size += len(piece)
        self._body.append(piece)
        if self._size > self.head.inference.max_body_bytes:
            self._body.clear()
            try:
                check_size(self._size, self.head.inference.max_body_bytes)
            except ResourceExhausted as error:
                self._refused = error
            if self.is_next:
                self._begin()
        return self._size

    def take_all(self, body: bytes) -> None:
        """The whole body, whose length the head has told, when it is its turn."""
        self._body.append(body)
        self._complete = True
        self.its_turn()

    def complete(self) -> None:
        """The body is there."""
        if not self._complete:
            self._complete = True
            if self.is_next:
                self._begin()

    def _begin(self) -> None:
        if self._begun is not None or self._task is not None or self.response_complete:
            return
        head = self.head
        if self._refused is not None:
            made: Begun | Answer | Later = head.inference.failed(head, perf_counter_ns(), self._refused)
        else:
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            made = head.inference.begin(head, body, self._told)
        if isinstance(made, Begun):
            self._begun = made
        else:
            self._answer_later(made)

    def _told(self, answer: Answer | Later) -> None:
        """The model has answered."""
        self._begun = None
        if isinstance(answer, Answer) and not self._connection.flow.write_paused:
            self._send(answer)
        else:
            self._answer_later(answer)

    def _answer_later(self, answer: Answer | Later) -> None:
        """By a task, where something is to be waited for. It costs half as much as all else that the door does for a
        request. Refusals have one too: what is left of their requests is read before they end."""
        connection = self._connection
        if isinstance(answer, Answer):
            self._made = answer
        self._task = task = connection.loop.create_task(self._wait(answer))
        connection.tasks.add(task)
        task.add_done_callback(self._waited)

    async def _wait(self, answer: Answer | Later) -> None:
        self._made = answer if isinstance(answer, Answer) else await answer()
        if self._connection.flow.write_paused:
            await self._connection.flow.drain()

    def _waited(self, task: asyncio.Task[None]) -> None:
        connection, head = self._connection, self.head
        connection.tasks.discard(task)
        made, self._made = self._made, None  # an idle connection keeps its latest exchange
        if made is None:  # the task was cancelled, perhaps before it began
            gone = Cancelled("the client went away before its answer was ready")
            head.inference.failed(head, round(self._came * 1e9), gone)
        elif not (task.cancelled() or self.disconnected):
            self._send(made)
            return
        self._leave()
        if not self.disconnected:  # the server ends
            connection.transport.close()

    def _send(self, answer: Answer) -> None:
        connection, head = self._connection, self.head
        inference = head.inference
        # Nobody will read the rest of a request; and who comes while the server drains is to find another one.
        if not self._complete or (inference.service.draining and not connection.pipeline):
            self.keep_alive = False
        inference.http.inferences[answer.status] += 1
        lines = connection.date_lines()
        connection.transport.write(answer.head(lines if self.keep_alive else lines + _CLOSE) + answer.body)
        if inference.access_log:
            who = "" if head.caller is None else head.caller.token.name
            log_request(ACCESS, who, "POST", f"/v2/models/{head.name}/infer", answer.status, self._came)
        self._leave()
        self.response_complete = True
        if not self.keep_alive:
            connection.transport.close()
        connection.on_answer()

    @property
    def message_event(self) -> _Exchange:
        """Not an attribute: an object that names itself is freed by the collector only."""
        return self

    def set(self) -> None:
        """uvicorn's word that something has happened."""

    def lost(self) -> None:
        """The connection is: nobody waits for the answer."""
        self.disconnected = True
        if self._task is not None:
            self._task.cancel()
        elif self._begun is not None:
            self._begun.withdraw()
            self._begun = None
        self.response_complete = True
        self._leave()

    def _leave(self) -> None:
        self._body.clear()  # an idle connection keeps its latest exchange
        if self._charged is not None:
            self._charged.leave()
            self._charged = None
        if self._entered:
            self._entered = False
            self.head.inference.service.leave()


def _text(raw: bytes) -> str:
    return (unquote_to_bytes(raw) if b"%" in raw else raw).decode("utf-8", "replace")
