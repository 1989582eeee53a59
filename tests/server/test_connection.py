"""Connections below the routes: heads and trailers without an end, and what is no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import uvicorn
from uvicorn.server import ServerState

from kapsl_scheduler.server.connection import MAX_HEAD_BYTES, Connection

POST = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
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


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Application, asyncio.StreamReader, asyncio.StreamWriter]]:
    application = Application()
    config = uvicorn.Config(application, log_config=None, lifespan="off", ws="none")
    state = ServerState()
    lost = asyncio.Event()

    class Watched(Connection):
        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            lost.set()

    server = await asyncio.get_running_loop().create_server(lambda: Watched(config, state, {}), "127.0.0.1", 0)
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
