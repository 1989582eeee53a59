"""The Kapsl socket: frames on a stream, answered one behind the other. The same bytes on a Unix socket and on TCP.

A request is `model, op, size` and a payload, an answer `status, size` and a payload, all of them u32. A connection
reads a request, answers it, and reads the next; what a client sends ahead waits. It stays open after every error, and a
client that closes it takes back what it asked for. What is not here: payloads (`server.bincode`), what they mean
(`server.kapsl_call`), and where the socket is (`server.kapsl_listen`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import aclosing
from time import perf_counter_ns
from typing import Any, Final

from kapsl_scheduler.errors import Cancelled, EngineError, InvalidInput, Overloaded
from kapsl_scheduler.runtime.registry import ServedModel
from kapsl_scheduler.server.access import Access, Caller, Role
from kapsl_scheduler.server.answers import status_of
from kapsl_scheduler.server.bincode import decode_request, encode_answer
from kapsl_scheduler.server.bodies import LONG_BODY, beside_the_loop, check_size
from kapsl_scheduler.server.journal import ACCESS, log_request
from kapsl_scheduler.server.kapsl_call import answer_of, call_of, error_text, model_of
from kapsl_scheduler.server.model_ids import ModelIds
from kapsl_scheduler.server.oip import InferCall
from kapsl_scheduler.server.service import Figures, Service
from kapsl_scheduler.types import Priority

__all__ = ["AHEAD", "KapslSocket"]

logger = logging.getLogger(__name__)

AHEAD: Final = 64 << 10
"""Bytes that a client may send ahead of an answer before its connection is read no further. While it is not read, it is
not seen that the client has gone."""

_REQUEST: Final = struct.Struct("<III")
_ANSWER: Final = struct.Struct("<II")
_OK, _ERR, _CHUNK, _END = range(4)
_INFER, _STREAM = 1, 2
# What the original gives a request that names no class.
_DEFAULTS: Final = {_INFER: Priority.THROUGHPUT, _STREAM: Priority.LATENCY_CRITICAL}


class KapslSocket:
    """The server behind some listeners. Payloads beyond `max_body_bytes` and connections beyond the `max_connections`
    are refused. With `access`, each request says who asks by the token in its metadata."""

    def __init__(
        self,
        service: Service,
        ids: ModelIds,
        *,
        max_body_bytes: int,
        max_connections: int = 8192,
        access: Access | None = None,
        access_log: bool = False,
    ) -> None:
        self.service = service
        self.ids = ids
        self.max_body_bytes = max_body_bytes
        self.max_connections = max_connections
        self.access_log = access_log
        self.connections: set[_Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.empty = asyncio.Event()  # set where there is no connection
        self.empty.set()
        self.closing = False
        self._access = access
        self._servers: list[asyncio.Server] = []

    async def start(self, listeners: Sequence[socket.socket]) -> None:
        """Begins to take connections. The listeners are closed with the server."""
        loop = asyncio.get_running_loop()
        for listener in listeners:
            if listener.family == socket.AF_UNIX:
                server = await loop.create_unix_server(lambda: _Connection(self), sock=listener)
            else:
                server = await loop.create_server(lambda: _Connection(self), sock=listener)
            self._servers.append(server)

    async def close(self, timeout: float) -> None:
        """Takes no more connections, lets those that are being answered hear their answer within `timeout` seconds, and
        closes all. Cancelling it closes them at once."""
        self.closing = True
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.close_when_answered()
        try:
            async with asyncio.timeout(timeout):
                await self.empty.wait()
        except TimeoutError:
            pass
        finally:
            for connection in list(self.connections):
                connection.abort()
            await self.empty.wait()
            await asyncio.gather(*self.tasks, return_exceptions=True)

    def close_stalled(self, patience: float) -> None:
        """Lets go of clients that have not sent or taken a byte for so many seconds, though it is their turn."""
        for connection in list(self.connections):
            connection.close_if_stalled(patience)

    def admit(self, token: str | None) -> Caller | None:
        """Who asks; the one place where that is decided. Raises `Unauthorized`, `Forbidden`."""
        return None if self._access is None else self._access.caller(token or "", Role.READER)


class _Frame:
    """A request on its way in. One that is refused is read all the same, and not kept."""

    __slots__ = ("begun", "begun_stream", "entered", "figures", "missing", "model", "op", "pieces", "refused", "who")

    def __init__(self, head: bytes | bytearray) -> None:
        self.model, self.op, self.missing = _REQUEST.unpack(head)
        self.pieces: list[memoryview] = []
        self.refused: EngineError | None = None
        self.entered = False
        self.begun = perf_counter_ns()
        self.begun_stream = False
        self.figures = Figures()  # nobody's, until the model is known
        self.who = ""

    def take(self, data: memoryview) -> memoryview:
        """Takes what is missing, and returns the rest."""
        piece, rest = data[: self.missing], data[self.missing :]
        self.missing -= len(piece)
        if self.refused is None and piece:
            self.pieces.append(piece)
        return rest

    def payload(self) -> bytes | memoryview:
        return self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)


class _Connection(asyncio.Protocol):
    """One client."""

    _transport: asyncio.Transport

    def __init__(self, server: KapslSocket) -> None:
        self._server = server
        self._turned_away: Overloaded | None = None
        self._head = bytearray()
        self._frame: _Frame | None = None
        self._task: asyncio.Task[None] | None = None
        self._ahead = bytearray()
        self._gone = False
        self._last = False  # it is closed with the next answer
        self._writable = asyncio.Event()
        self._writable.set()
        self._loop = asyncio.get_running_loop()
        self._moved = self._loop.time()  # when the client last sent, or took, something
        self._unsent = 0

    # ------------------------------------------------------------------------------------------ the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvloop's is no subclass
        server = self._server
        self._transport = transport
        server.connections.add(self)
        server.empty.clear()
        most = server.max_connections
        if server.closing or len(server.connections) > 2 * most:
            transport.abort()
        elif len(server.connections) > most:
            # It hears why in the answer to its first request: closed before it has sent that, it might hear nothing.
            self._turned_away = Overloaded(f"{most} connections are open, which is the limit")
            self._last = True

    def connection_lost(self, error: Exception | None) -> None:
        self._gone = True
        self._writable.set()
        if self._task is not None:
            self._task.cancel()
        else:
            self._leave()
        # It and its transport are a ring, which the collector finds late: nothing is to be held until then.
        self._head.clear()
        self._ahead = bytearray()
        self._server.connections.discard(self)
        if not self._server.connections:
            self._server.empty.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._moved = self._loop.time()
        self._writable.set()

    def close_when_answered(self) -> None:
        """At once where nothing is asked; what is on its way in would be refused by then."""
        self._last = True
        if self._task is None:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def close_if_stalled(self, patience: float) -> None:
        now = self._loop.time()
        if not self._writable.is_set() or self._transport.is_closing():
            unsent = self._transport.get_write_buffer_size()
            if unsent != self._unsent:
                self._unsent, self._moved = unsent, now
        elif self._task is not None or not (self._head or self._frame or self._turned_away):
            return  # it is our turn, or nobody's
        if now - self._moved >= patience:
            self._transport.abort()

    # ------------------------------------------------------------------------------------------ requests, in turn

    def data_received(self, data: bytes | bytearray) -> None:
        self._moved = self._loop.time()
        rest = memoryview(data)
        while rest and self._task is None:
            rest = self._take(rest)
        if rest:
            self._ahead += rest
            if len(self._ahead) >= AHEAD:
                self._transport.pause_reading()

    def _take(self, data: memoryview) -> memoryview:
        """Takes what belongs to the request that is on its way in, and returns the rest."""
        if self._frame is None:
            missing = _REQUEST.size - len(self._head)
            self._head += data[:missing]
            data = data[missing:]
            if len(self._head) == _REQUEST.size:
                self._frame = self._begin()
        else:
            data = self._frame.take(data)
        if self._frame is not None and not self._frame.missing:
            self._task = task = self._loop.create_task(self._serve(self._frame))
            self._server.tasks.add(task)
            task.add_done_callback(self._server.tasks.discard)
        return data

    def _begin(self) -> _Frame:
        """A frame in flight from its head on: a client that is slow to send holds memory too."""
        frame = _Frame(self._head)
        self._head.clear()
        try:
            if self._turned_away is not None:
                raise self._turned_away
            check_size(frame.missing, self._server.max_body_bytes)
            self._server.service.enter()
            frame.entered = True
        except EngineError as error:
            frame.refused = error
        return frame

    def _leave(self) -> None:
        frame, self._frame = self._frame, None
        if frame is not None and frame.entered:
            self._server.service.leave()

    async def _serve(self, frame: _Frame) -> None:
        try:
            await self._answer(frame)
        finally:
            self._task = None
            self._leave()
        if self._last:
            self._transport.close()
        if not self._transport.is_closing():
            ahead, self._ahead = self._ahead, bytearray()
            self._transport.resume_reading()
            if ahead:
                self.data_received(ahead)

    # ------------------------------------------------------------------------------------------ answers

    async def _answer(self, frame: _Frame) -> None:
        """Answers a request. Every error but a cancellation is an answer too."""
        status = 200
        try:
            await self._work(frame)
        except asyncio.CancelledError:
            if not self._gone:
                raise
            gone = Cancelled("the client went away before its answer was there")
            frame.figures.failed(frame.begun, gone)
            status = status_of(gone)
        except Exception as error:
            frame.figures.failed(frame.begun, error)
            status = status_of(error)
            if not isinstance(error, EngineError):
                logger.exception("inference on model %d failed unexpectedly", frame.model)
            elif status == 500:
                logger.error("inference on model %d failed: %s: %s", frame.model, error.code, error)
            await self._send(_ERR, error_text(error).encode())
            if frame.begun_stream:
                await self._send(_END)
        if self._server.access_log:
            path = f"/models/{frame.model}/{'stream' if frame.op == _STREAM else 'infer'}"
            log_request(ACCESS, frame.who, "KAPSL", path, status, frame.begun / 1e9)

    async def _work(self, frame: _Frame) -> None:
        """Does what is asked for, and sends it. Raises what is wrong."""
        server = self._server
        if frame.refused is not None:
            raise frame.refused
        if frame.op not in _DEFAULTS:
            raise InvalidInput(f"op: {frame.op} came, expected {_INFER} (infer) or {_STREAM} (stream)")
        payload = frame.payload()
        request = await beside_the_loop(len(payload) > LONG_BODY, decode_request, payload)
        caller = server.admit(request.metadata.auth_token)
        if caller is not None:
            frame.who = caller.token.name
            caller.enter(time.monotonic())
        try:
            model = model_of(server.service, server.ids, frame.model, request.metadata.model_version)
            frame.figures = server.service.figures_of(model)
            call = call_of(request, model, _DEFAULTS[frame.op])
            read = perf_counter_ns()
            if frame.op == _STREAM:
                await self._stream(frame, model, call)
                return
            response = await server.service.infer(model, call)
            done = perf_counter_ns()
            await self._send(_OK, encode_answer(answer_of(response)))
            frame.figures.succeeded(frame.begun, read, done, response)
        finally:
            if caller is not None:
                caller.leave()

    async def _stream(self, frame: _Frame, model: ServedModel, call: InferCall) -> None:
        """Each chunk is made when there is room for it: a client that does not read holds its model's stream up, until
        that is closed for it."""
        chunks: Any = model.scheduler.infer_stream(call.request, priority=call.priority, timeout=call.timeout)
        async with aclosing(chunks):
            async for chunk in chunks:
                payload = encode_answer(answer_of(chunk))
                frame.begun_stream = True
                await self._send(_CHUNK, payload)
        await self._send(_END)
        frame.figures.ended(frame.begun)

    async def _send(self, status: int, payload: bytes = b"") -> None:
        """Returns when there is room for more."""
        self._transport.write(_ANSWER.pack(status, len(payload)) + payload)
        await self._writable.wait()
