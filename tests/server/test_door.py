"""Connections below the routes: inference requests, which are answered there; heads and trailers without an end, and
what is no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import re
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import uvicorn
from uvicorn.server import ServerState

from kapsl_scheduler.errors import InferenceError
from kapsl_scheduler.server import bodies, inference
from kapsl_scheduler.server.door import MAX_HEAD_BYTES, Connection
from tests.server.api import Gate, Server, body_of, serving, settled, until

POST = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
UPGRADE = (b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c")
CHUNKED = b"POST /v2/models/m/infer HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n"
LINE = b"name: " + b"v" * 1000 + b"\r\n"
TOO_MUCH = MAX_HEAD_BYTES + 1  # and not a byte more: what the server leaves unread resets the connection


class Application:
    """Answers each request with the length of its body."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.left: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        length, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.append(scope["path"])
                return
            self.asked.set()
            length += len(message["body"])
            more = message["more_body"]
        body = str(length).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


class Wire(asyncio.Transport):
    """The server's end of a connection, without a socket."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False
        self.aborted = False
        self.lost = False

    def write(self, data: Any) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        """It is not read but by the test."""

    def resume_reading(self) -> None:
        """The same."""


def config_of(application: Any) -> uvicorn.Config:
    return uvicorn.Config(application, log_config=None, lifespan="off", ws="none")


@asynccontextmanager
async def connected(
    application: Any = None, most: int = 100, made: list[Connection] | None = None
) -> AsyncIterator[tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]]:
    application = application or Application()
    config = config_of(application)
    state = ServerState()
    lost = asyncio.Event()

    class Watched(Connection):
        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            lost.set()

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if made is not None:
                made.append(self)

    server = await asyncio.get_running_loop().create_server(
        lambda: Watched(getattr(application, "inference", None), most, config, state, {}), "127.0.0.1", 0
    )
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            yield application, reader, writer
        finally:
            writer.close()
            await lost.wait()
            await asyncio.gather(*state.tasks)


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
    return int(head.split()[1]), await reader.readexactly(length)


async def all_answered(connection: Connection, server: Server) -> None:
    """Until all is answered that can be."""

    def idle() -> bool:
        figures = server.scheduler.statistics()
        return not (connection.tasks or figures.queued or figures.running)

    await settled(idle)


def decoded(body: bytes) -> dict[str, str]:
    said: dict[str, str] = msgspec.json.decode(body)
    return said


@pytest.mark.parametrize(
    ("opening", "endless"), [(b"GET / HTTP/1.1\r\n", LINE), (b"GET / HTTP/1.1\r\nname: ", b"v"), (b"GET /", b"v")]
)
async def test_a_head_without_an_end_is_refused_and_its_connection_closed(opening: bytes, endless: bytes) -> None:
    async with connected() as (_, reader, writer):
        writer.write((opening + endless * (TOO_MUCH // len(endless) + 1))[:TOO_MUCH])

        status, body = await answer(reader)

        assert (status, decoded(body)["code"]) == (431, "head_too_large")
        assert await reader.read() == b""


async def test_trailers_without_an_end_close_the_connection_and_their_request_ends() -> None:
    async with connected() as (application, reader, writer):
        writer.write(POST + b"2\r\nab\r\n0\r\n")
        await application.asked.wait()
        writer.write((LINE * 100)[:TOO_MUCH])

        assert await reader.read() == b""

    assert application.left == ["/"]


async def test_heads_and_bodies_within_the_bounds_are_served_on_one_connection() -> None:
    chunk = b"1\r\na\r\n"
    async with connected() as (_, reader, writer):
        for _ in range(3):
            writer.write(POST[:-2] + LINE * 30 + b"\r\n" + chunk * MAX_HEAD_BYTES + b"0\r\n" + LINE * 30 + b"\r\n")
            assert await answer(reader) == (200, b"%d" % MAX_HEAD_BYTES)


async def test_what_is_no_http_is_refused_in_json(caplog: pytest.LogCaptureFixture) -> None:
    async with connected() as (_, reader, writer):
        writer.write(b"EHLO x\r\n\r\n")

        status, body = await answer(reader)

        assert (status, decoded(body)["code"]) == (400, "bad_request")
        assert await reader.read() == b""


# ------------------------------------------------------------------------------------------ inference


def infer(data: Any = (1, 2), *headers: bytes, path: bytes = b"/v2/models/m/infer", version: bytes = b"1.1") -> bytes:
    body = body_of(data)
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"POST %b HTTP/%b\r\ncontent-length: %d\r\n%b\r\n%b" % (path, version, len(body), lines, body)


def values(body: bytes) -> Any:
    return msgspec.json.decode(body)["outputs"][0]["data"]


@pytest.mark.parametrize(
    "path",
    [b"/v2/models/m/infer", b"/v2/models/m/versions/3/infer", b"/v2/models/%6d/infer?x=1", b"/v2/models/m/infer?"],
)
async def test_inferences_are_answered_on_one_connection(path: bytes) -> None:
    async with serving() as server, connected(server.api) as (_, reader, writer):
        for number in range(3):
            writer.write(infer([number, 1], path=path))
            status, body = await answer(reader)
            assert (status, values(body)) == (200, [number * 2, 2])
        assert server.api.inference.service.in_flight == 0


async def test_a_request_in_many_pieces_is_put_together() -> None:
    async with serving() as server, connected(server.api) as (_, reader, writer):
        request = infer()
        for start in range(0, len(request), 7):
            writer.write(request[start : start + 7])
            await writer.drain()
            await asyncio.sleep(0)
        assert (await answer(reader))[0] == 200


@pytest.mark.parametrize("cut", [0, -1, -5, -60])
async def test_a_request_that_asks_for_another_protocol_is_answered_in_this_one(cut: int) -> None:
    """With its body, in one piece or apart, and so are those behind it, whichever route they are for."""
    index = b"POST /v2/repository/index HTTP/1.1\r\n" + b"\r\n".join(UPGRADE)
    other = index + b"\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    request = infer([3, 4], *UPGRADE)
    async with serving() as server, connected(server.api) as (_, reader, writer):
        for _ in range(2):
            writer.write(request[: cut or None])
            await writer.drain()
            await asyncio.sleep(0)
            writer.write((request[cut:] if cut else b"") + other + infer())
            found = [await answer(reader) for _ in range(3)]
            assert [status for status, _ in found] == [200] * 3
            assert [values(found[0][1]), values(found[2][1])] == [[6, 8], [2, 4]]


@pytest.mark.parametrize("path", [b"/v2/models/m/infer", b"/v2/repository/index"])
async def test_no_request_hides_in_the_body_of_another(path: bytes) -> None:
    inner = b"GET /v2/health/live HTTP/1.1\r\n\r\n"
    length = b"content-length: %d" % len(inner)
    head = b"\r\n".join((b"POST %b HTTP/1.1" % path, length, *UPGRADE, b"", b""))
    async with serving() as server, connected(server.api) as (_, reader, writer):
        writer.write(head)
        await writer.drain()
        await asyncio.sleep(0)
        writer.write(inner)
        assert (await answer(reader))[0] == 400
        writer.write(infer())
        assert values((await answer(reader))[1]) == [2, 4]


async def test_a_tunnel_is_not_offered() -> None:
    async with connected() as (_, reader, writer):
        writer.write(b"CONNECT x:1 HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n")
        assert (await answer(reader))[0] == 405
        assert await reader.read() == b""


async def test_a_head_that_came_before_is_not_read_again() -> None:
    made: list[Connection] = []
    async with serving() as server, connected(server.api, made=made) as (_, reader, writer):
        for number in range(4):
            writer.write(infer([number, 1]))
            assert values((await answer(reader))[1]) == [number * 2, 2]
            made[0].parser = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "other",
    [
        infer([5, 6, 7, 8]),  # another length
        infer([5, 6], b"x: y"),
        infer([5, 6], b"x: z"),
        infer([5, 6], path=b"/v2/models/n/infer"),
        infer([5, 6], b"expect: 100-continue"),
        infer([5, 6], *UPGRADE),
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        CHUNKED + b"0\r\n\r\n",
        b"GET /v2/health/live HTTP/1.1\r\n\r\n",
        infer() + infer(),
        infer() + b"GET /v2",
        infer()[:-1],
        infer()[:40],
        b"no HTTP\r\n\r\n",
    ],
)
async def test_what_a_connection_remembers_changes_no_answer(other: bytes) -> None:
    """Between two requests that it remembers: the answers are those of connections that remember nothing."""
    found = []
    async with serving() as server:
        for remembers in (True, False):
            wire = Wire()
            connection = Connection(server.api.inference, 100, config_of(server.api), ServerState(), {})
            connection.connection_made(wire)
            for piece in (infer(), infer([3, 4]), other, infer([3, 4]), infer()):
                if not remembers:
                    connection._known = None
                if not wire.closed:
                    connection.data_received(piece)
                await all_answered(connection, server)
            connection.connection_lost(None)
            found.append((wire.closed, re.sub(rb"date: [^\r]*", b"", wire.sent)))
    assert found[0] == found[1]
    assert found[0][1].count(b"HTTP/1.1 200") >= 2


async def test_what_is_sent_ahead_is_answered_in_order() -> None:
    """Inference requests and others on one connection, all sent before the first is answered."""
    gate = Gate()
    ready = b"GET /v2/health/live HTTP/1.1\r\n\r\n"
    async with serving(gate) as server, connected(server.api) as (_, reader, writer):
        writer.write(infer([1, 1]) + ready + infer([2, 2]) + infer([3, 3], path=b"/v2/models/no/infer") + ready)
        await gate.entered.wait()
        gate.open.set()
        bodies = [await answer(reader) for _ in range(5)]
        assert [status for status, _ in bodies] == [200, 200, 200, 404, 200]
        assert [values(bodies[0][1]), values(bodies[2][1])] == [[2, 2], [4, 4]]
        assert server.api.inference.service.in_flight == 0


async def test_one_connection_holds_one_place_however_much_it_sends_ahead() -> None:
    """And is read no further than a little ahead of its answers."""
    made: list[Connection] = []
    gate = Gate()
    tiny = b"POST /v2/models/m/infer HTTP/1.1\r\n\r\n"
    async with serving(gate, max_in_flight=2) as server:
        service = server.api.inference.service
        async with connected(server.api, made=made) as (_, reader, writer):
            writer.write(infer())
            await gate.entered.wait()
            writer.write(tiny * 100)
            await settled(lambda: len(made[0].pipeline) == 100)
            assert (service.in_flight, made[0].flow.read_paused) == (1, True)
            gate.open.set()
            assert (await answer(reader))[0] == 200
            assert [(await answer(reader))[0] for _ in range(80)] == [400] * 80
            await settled(lambda: not made[0].pipeline)
            assert not made[0].flow.read_paused
        assert service.in_flight == 0


async def test_a_long_body_that_is_sent_ahead_is_read_when_it_is_its_turn() -> None:
    """It does not hold memory until then, and its client is not taken for one that stalls."""
    made: list[Connection] = []
    gate = Gate()
    body = body_of((1, 2))[:-1] + b" " * (4 << 20) + b"}"
    long = b"POST /v2/models/m/infer HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    async with serving(gate, max_body_bytes=8 << 20) as server, connected(server.api, made=made) as (_, reader, writer):
        writer.write(infer())
        await gate.entered.wait()
        writer.write(long)
        await settled(lambda: made[0].flow.read_paused)
        assert made[0].cycle._size < 1 << 20
        made[0]._moved -= 1001
        made[0].close_if_stalled(1000.0)
        gate.open.set()
        assert [(await answer(reader))[0] for _ in range(2)] == [200, 200]


async def test_an_error_is_answered_with_its_type_and_the_connection_goes_on() -> None:
    async with serving(max_body_bytes=1000) as server, connected(server.api) as (_, reader, writer):
        writer.write(infer(["x", 2]))
        status, body = await answer(reader)
        assert (status, decoded(body)["code"]) == (400, "invalid_input")
        writer.write(infer())
        assert (await answer(reader))[0] == 200
        stats = (await server.client.get("/v2/models/m/stats")).json()["model_stats"][0]
        assert stats["answers"] == {"200": 1, "400": 1}


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_too_large_is_refused_before_it_is_there_and_its_connection_closed(
    announced: bool,
) -> None:
    head = b"content-length: 1001" if announced else b"transfer-encoding: chunked"
    async with serving(max_body_bytes=1000) as server, connected(server.api) as (_, reader, writer):
        writer.write(b"POST /v2/models/m/infer HTTP/1.1\r\n" + head + b"\r\n\r\n")
        writer.write(b"" if announced else b"3e9\r\n" + b" " * 1001)
        status, body = await answer(reader)
        assert (status, decoded(body)["code"]) == (413, "resource_exhausted")
        assert await reader.read() == b""
        assert server.api.inference.service.in_flight == 0


async def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    async with serving() as server, connected(server.api) as (_, reader, writer):
        request = infer((1, 2), b"expect: 100-continue")
        head, _, body = request.partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await answer(reader))[0] == 200


@pytest.mark.parametrize("request_", [infer((1, 2), b"connection: close"), infer(version=b"1.0")])
async def test_a_connection_that_is_not_to_be_kept_is_closed(request_: bytes) -> None:
    async with serving() as server, connected(server.api) as (_, reader, writer):
        writer.write(request_)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" in head
        assert values(await reader.read()) == [2, 4]


@pytest.mark.parametrize("ahead", [b"", infer(), infer()[:-1]])
async def test_a_client_that_goes_away_takes_its_requests_back(ahead: bytes) -> None:
    """Also what it has sent ahead, whole or not."""
    gate = Gate()
    async with serving(gate) as server:
        async with connected(server.api) as (_, _reader, writer):
            writer.write(infer() + ahead)
            await gate.entered.wait()
            writer.close()
            await settled(lambda: server.scheduler.statistics().cancelled == 1)
            await settled(lambda: server.api.inference.service.in_flight == 0)
        gate.open.set()
        stats = (await server.client.get("/v2/models/m/stats")).json()["model_stats"][0]
        assert stats["answers"] == {"499": 1}


@asynccontextmanager
async def wired(server: Server, *, unread: bool = False) -> AsyncIterator[tuple[Connection, Wire]]:
    """A connection without a socket, whose client does in one pass of the loop what it likes; or, `unread`, has asked
    and does not read, and its answer is there."""
    wire = Wire()
    connection = Connection(server.api.inference, 100, config_of(server.api), ServerState(), {})
    connection.connection_made(wire)
    if unread:
        connection.flow.pause_writing()
        connection.data_received(infer())
        await settled(lambda: server.api.inference.service.figures("m").success == 1)
    try:
        yield connection, wire
    finally:
        if not wire.lost:
            wire.lost = True
            connection.connection_lost(None)
        await all_answered(connection, server)


@pytest.mark.parametrize("header", [(), (b"content-encoding: gzip",)])
async def test_a_client_that_sends_and_goes_away_at_once_leaves_nothing_behind(header: tuple[bytes, ...]) -> None:
    async with serving() as server:
        async with wired(server) as (connection, wire):
            connection.data_received(infer([1, 2], *header))
            wire.lost = True
            connection.connection_lost(None)
        assert server.api.inference.service.in_flight == 0
        stats = (await server.client.get("/v2/models/m/stats")).json()["model_stats"][0]
        assert stats["answers"] == {"499": 1}
        assert wire.sent == b""


async def test_a_client_that_goes_away_while_its_answer_is_written_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "LONG_ANSWER", 0)
    async with serving() as server:
        async with wired(server) as (connection, wire):
            connection.data_received(infer())
            await until(lambda: bool(connection.tasks))
            wire.lost = True
            connection.connection_lost(None)
        assert wire.sent == b""
        assert server.api.inference.service.in_flight == 0
        assert dict(server.api.inference.service.figures("m").answers) == {499: 1}


async def failing(x: Any) -> Any:
    raise RuntimeError("out of paper")


@pytest.mark.parametrize("long", [False, True])
async def test_an_answer_waits_for_a_client_that_reads_slowly(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "LONG_ANSWER", 0 if long else 100)
    async with serving() as server, wired(server, unread=True) as (connection, wire):
        assert wire.sent == b""
        connection.flow.resume_writing()
        await all_answered(connection, server)
        assert values(wire.sent.partition(b"\r\n\r\n")[2]) == [2, 4]


async def test_a_server_that_ends_cuts_short_what_waits() -> None:
    async with serving() as server, wired(server, unread=True) as (connection, wire):
        for task in connection.tasks:
            task.cancel()
        await all_answered(connection, server)
        assert (wire.closed, wire.sent) == (True, b"")
        assert server.api.inference.service.in_flight == 0
        assert server.api.inference.service.figures("m").fail == 0  # it was answered


@pytest.mark.parametrize("long", [False, True])
async def test_what_json_cannot_carry_is_an_error(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: Any) -> Any:
        raise InferenceError("no text")

    monkeypatch.setattr(inference, "LONG_ANSWER", 0 if long else 100)
    monkeypatch.setattr(inference, "encode_reply", encode)
    async with serving() as server, connected(server.api) as (_, reader, writer):
        writer.write(infer())
        status, body = await answer(reader)
        assert (status, decoded(body)["error"]) == (500, "no text")
        assert server.api.inference.service.figures("m").fail == 1


async def test_a_model_that_fails_is_said() -> None:
    async with serving(failing) as server, connected(server.api) as (_, reader, writer):
        writer.write(infer())
        status, body = await answer(reader)
        assert (status, decoded(body)["error"]) == (500, "RuntimeError: out of paper")


@pytest.mark.parametrize("header", [(), (b"content-encoding: identity",)])
async def test_a_length_that_is_none_is_refused(header: tuple[bytes, ...]) -> None:
    async with serving() as server, connected(server.api) as (_, reader, writer):
        for _ in range(2):
            writer.write(infer([1, 2], b"inference-header-content-length: x", *header))
            status, body = await answer(reader)
            assert status == 400
            assert "expected the number of bytes of JSON, got 'x'" in decoded(body)["error"]


@pytest.mark.parametrize("header", [b"", b"content-encoding: identity\r\n"])
async def test_priority_and_timeout_are_the_requests_own(header: bytes) -> None:
    gate = Gate()

    def asking(**parameters: int) -> bytes:
        body = body_of(parameters=parameters)
        return b"POST /v2/models/m/infer HTTP/1.1\r\ncontent-length: %d\r\n%b\r\n%b" % (len(body), header, body)

    async with serving(gate) as server, connected(server.api) as (_, reader, writer):
        writer.write(asking(timeout=5_000))
        assert (await answer(reader))[0] == 504
        gate.open.set()
        writer.write(asking(priority=3))
        assert (await answer(reader))[0] == 200
        assert server.scheduler.statistics().classes["background"].succeeded == 1


@pytest.mark.parametrize("long", [False, True])
async def test_a_long_body_has_a_task(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "LONG_BODY", 10 if long else 1000)
    async with serving() as server, wired(server) as (connection, wire):
        connection.data_received(infer())
        assert bool(connection.tasks) == long
        await all_answered(connection, server)
        assert values(wire.sent.partition(b"\r\n\r\n")[2]) == [2, 4]


async def test_an_output_that_there_is_none_of_is_refused_before_anything_is_run() -> None:
    async with serving() as server, connected(server.api) as (_, reader, writer):
        body = body_of(outputs=[{"name": "z"}])
        writer.write(b"POST /v2/models/m/infer HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        assert (await answer(reader))[0] == 400
        assert server.scheduler.statistics().offered == 0


@pytest.mark.parametrize("worth", [10, 1000])
async def test_an_answer_has_a_task_where_it_is_packed(worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "WORTH_PACKING", worth)
    made: list[Any] = []

    class Tasks(set[Any]):
        def add(self, task: Any) -> None:
            super().add(task)
            made.append(task)

    async with serving() as server, wired(server) as (connection, wire):
        connection.tasks = Tasks()
        connection.data_received(infer([1, 2], b"accept-encoding: gzip"))
        await all_answered(connection, server)
        assert (b"content-encoding: gzip" in wire.sent, len(made)) == ((True, 1) if worth == 10 else (False, 0))


async def test_bodies_are_unpacked_and_answers_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "WORTH_PACKING", 10)
    packed = gzip.compress(body_of())
    async with serving() as server, wired(server) as (connection, wire):
        connection.data_received(
            b"POST /v2/models/m/infer HTTP/1.1\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n%b"
            % (len(packed), packed)
        )
        await all_answered(connection, server)
        assert values(wire.sent.partition(b"\r\n\r\n")[2]) == [2, 4]
        wire.sent = b""
        connection.data_received(infer([3, 4], b"accept-encoding: gzip"))
        await all_answered(connection, server)
        head, _, body = wire.sent.partition(b"\r\n\r\n")
        assert b"content-encoding: gzip" in head
        assert values(gzip.decompress(body)) == [6, 8]


async def test_a_client_has_its_time_from_the_answer_on_to_ask_again() -> None:
    gate = Gate()
    async with serving(gate) as server, wired(server) as (connection, wire):
        connection.data_received(infer())
        await gate.entered.wait()
        connection._moved -= connection.timeout_keep_alive + 1  # the model takes its time
        gate.open.set()
        await all_answered(connection, server)
        assert wire.sent
        connection.close_if_stalled(1000.0)
        assert not wire.aborted
        connection._moved -= connection.timeout_keep_alive + 1
        connection.close_if_stalled(1000.0)
        assert wire.aborted


async def test_a_connection_that_is_lost_holds_no_exchange() -> None:
    async with serving() as server, wired(server, unread=True) as (connection, wire):
        exchange: Any = connection.running
        wire.lost = True
        connection.connection_lost(None)
        await all_answered(connection, server)
        assert connection.running is None
        assert (exchange._made, exchange._begun, exchange._body) == (None, None, [])


async def test_what_is_answered_needs_no_collector_and_an_idle_connection_holds_nothing_of_it() -> None:
    seen: list[weakref.ref[Any]] = []

    async def watch(x: Any) -> Any:
        seen.append(weakref.ref(x))
        return x * 2

    async with serving(watch) as server, wired(server) as (connection, wire):
        gc.collect()
        gc.disable()
        try:
            for number in range(50):
                connection.data_received(infer([1, 2], *([b"content-encoding: identity"] if number % 2 else [])))
                await all_answered(connection, server)
            assert [one() for one in seen] == [None] * 50
            assert gc.collect() < 50
        finally:
            gc.enable()
        assert wire.sent.count(b"HTTP/1.1 200") == 50
        idle: Any = connection.cycle
        assert (idle._body, idle._begun, idle._made) == ([], None, None)


async def test_a_request_that_never_ends_holds_a_place_only_as_long_as_its_client_is_there() -> None:
    async with serving() as server:
        service = server.api.inference.service
        async with connected(server.api) as (_, _reader, writer):
            writer.write(infer()[:-1])
            await settled(lambda: service.in_flight == 1)
        assert service.in_flight == 0


async def test_beyond_the_requests_in_flight_the_next_is_refused_and_its_connection_goes_on() -> None:
    gate = Gate()
    async with serving(gate, max_in_flight=1) as server, asyncio.TaskGroup() as group:
        running = group.create_task(server.infer())
        await gate.entered.wait()
        async with connected(server.api) as (_, reader, writer):
            writer.write(infer())
            status, body = await answer(reader)
            assert (status, decoded(body)["code"]) == (429, "overloaded")
            gate.open.set()
            await running
            writer.write(infer())
            assert (await answer(reader))[0] == 200
        assert server.api.inference.service.in_flight == 0


# -------------------------------------------------------------------------------------- bounds of clients


async def test_connections_are_bounded() -> None:
    async with connected(most=0) as (_, reader, _writer):
        status, body = await answer(reader)
        assert (status, decoded(body)["code"]) == (503, "overloaded")
        assert await reader.read() == b""


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v2/models/m/infer HT", infer()[:-1], CHUNKED, b"GET /v2 HTTP/1.1\r\nx: "]
)
async def test_a_client_that_stalls_in_the_middle_of_a_request_is_let_go(sent: bytes) -> None:
    made: list[Connection] = []
    async with serving() as server, connected(server.api, made=made) as (_, reader, writer):
        writer.write(sent)
        await settled(lambda: bool(made) and (not sent or made[0]._moved > 0))
        for _ in range(3):
            await asyncio.sleep(0)
        made[0].close_if_stalled(1000.0)
        assert not made[0].transport.is_closing()
        made[0]._moved -= 1001
        made[0].close_if_stalled(1000.0)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    assert server.api.inference.service.in_flight == 0


@pytest.mark.parametrize("behind", [b"", b"\r\n", b"POST /v2/mod"])
async def test_a_client_that_waits_is_not_let_go(behind: bytes) -> None:
    """For its answer, or with its next request: that is not its turn, or uvicorn's; whatever it has sent behind."""
    made: list[Connection] = []
    gate = Gate()
    async with serving(gate) as server, connected(server.api, made=made) as (_, reader, writer):
        writer.write(infer())
        await gate.entered.wait()
        made[0]._moved = 0.0
        writer.write(behind)
        await settled(lambda: not behind or made[0]._moved > 0)
        made[0]._moved -= 1001
        made[0].close_if_stalled(1000.0)
        gate.open.set()
        assert (await answer(reader))[0] == 200
        made[0]._moved = made[0].loop.time() - made[0].timeout_keep_alive + 1
        made[0].close_if_stalled(1000.0)
        writer.write(infer().removeprefix(behind))
        assert (await answer(reader))[0] == 200
        made[0]._moved = made[0].loop.time() - made[0].timeout_keep_alive - 1
        made[0].close_if_stalled(1000.0)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""


async def test_a_client_that_does_not_read_is_let_go_and_one_that_reads_slowly_is_not() -> None:
    made: list[Connection] = []
    async with connected(made=made) as (_, reader, writer):
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await answer(reader)
        connection = made[0]
        connection.transport.write(bytes(64 << 20))
        assert connection.flow.write_paused
        connection.close_if_stalled(1000.0)
        before = connection.transport.get_write_buffer_size()
        await reader.readexactly(16 << 20)
        await settled(lambda: connection.transport.get_write_buffer_size() < before)
        connection._moved -= 1001
        connection.close_if_stalled(1000.0)  # it has taken something since
        assert not connection.transport.is_closing()
        connection._moved -= 1001
        connection._unsent = connection.transport.get_write_buffer_size()
        connection.close_if_stalled(1000.0)
        assert connection.transport.is_closing()


async def test_a_server_that_drains_answers_and_closes_behind_what_was_sent_ahead() -> None:
    async with serving() as server, connected(server.api) as (_, reader, writer):
        server.api.inference.service.draining = True
        writer.write(infer() + infer())
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head
        rest = await reader.read()

    assert rest.count(b"HTTP/1.1 200") == 1
    assert b"connection: close" in rest


async def test_answers_of_the_door_are_counted_by_status() -> None:
    async with serving() as server, connected(server.api) as (_, reader, writer):
        for request in (infer(), infer(), infer("wrong"), b"GET /v2 HTTP/1.1\r\n\r\n", b"no http\r\n\r\n"):
            writer.write(request)
            await answer(reader)
        counts = server.api.inference.http.answers()

    route = "/v2/models/{model}/infer"
    assert (counts["POST", route, 200], counts["POST", route, 400]) == (2, 1)
    assert counts["GET", "/v2", 200] == 1
    assert counts["(other)", "(none)", 400] == 1
