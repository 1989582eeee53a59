"""Events of jobs as a stream: what comes, when it ends, and that it is bounded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kapsl_scheduler.server import event_stream
from tests.server.api import Server, assert_error, serving_jobs, until
from tests.server.test_cron_http import post, put


class Listener:
    """A client of the stream over bare ASGI: what it was sent, and a way to go away."""

    def __init__(self, server: Server) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.sent: list[bytes] = []
        self.complete = False
        self.gone = asyncio.Event()
        self.wanted: bytes | None = None
        self.came = asyncio.Event()  # set when what is wanted comes
        self._server = server

    async def listen(self) -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v2/cron/events",
            "raw_path": b"/v2/cron/events",
            "query_string": b"",
            "root_path": "",
            "headers": [],
        }
        await self._server.api(scope, self._receive, self._send)

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        lines = [chunk.decode().splitlines() for chunk in self.sent if chunk.startswith(b"event: ")]
        return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data, *_ in lines]

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.sent.append(message["body"])
            if message["body"] == self.wanted:
                self.came.set()
            self.complete = not message.get("more_body", False)


@asynccontextmanager
async def listening(server: Server) -> AsyncIterator[Listener]:
    listener = Listener(server)
    task = asyncio.create_task(listener.listen())
    await until(lambda: bool(listener.sent))
    try:
        yield listener
    finally:
        listener.gone.set()
        await task


async def test_what_happens_is_told_as_it_happens() -> None:
    async with serving_jobs() as server, listening(server) as listener:
        await put(server)
        run = (await post(server, "/trigger", {"origin": "mine"})).json()
        await until(lambda: len(listener.events()) == 3)
        await post(server, "/pause")
        await server.client.delete("/v2/cron/jobs/p:night")
        await until(lambda: len(listener.events()) == 5)

    assert (listener.status, listener.headers[b"content-type"]) == (200, b"text/event-stream; charset=utf-8")
    assert b"content-length" not in listener.headers
    kinds = [(kind, event["job"]) for kind, event in listener.events()]
    assert kinds == [(kind, "p:night") for kind in ("registered", "started", "ended", "paused", "unregistered")]
    told = [event["run"] for _, event in listener.events()]
    assert told[1] == run
    assert (told[2]["state"], told[2]["count"], told[3]) == ("succeeded", 1, None)
    assert not listener.complete


async def test_the_stream_ends_when_the_scheduler_is_closed() -> None:
    async with serving_jobs() as server, listening(server) as listener:
        assert not listener.complete
        await server.cron.close()
        await until(lambda: listener.complete)
        assert listener.sent[-1] == b""


async def test_silence_is_broken_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "KEEP_ALIVE", 0.001)
    async with serving_jobs() as server, listening(server) as listener:
        listener.wanted = b": still here\n\n"
        async with asyncio.timeout(5.0):
            await listener.came.wait()
        await put(server)  # and it goes on
        await until(lambda: bool(listener.events()))
        assert [kind for kind, _ in listener.events()] == ["registered"]


async def test_listeners_are_bounded_and_those_that_go_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MOST", 1)
    async with serving_jobs() as server:
        async with listening(server):
            assert_error(await server.client.get("/v2/cron/events"), 429, "overloaded")
        async with listening(server) as listener:
            assert listener.status == 200
