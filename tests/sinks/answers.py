"""Results as the tests of sinks need them, and what they have become."""

from __future__ import annotations

import datetime as dt
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from kapsl_scheduler.core.runs import Firing
from kapsl_scheduler.errors import DeadlineExceeded
from kapsl_scheduler.ports import SinkItem
from kapsl_scheduler.types import InferenceResponse


def firing(hour: int = 3, attempt: int = 1, job: str = "job", origin: str = "schedule") -> Firing:
    return Firing(job, dt.datetime(2026, 11, 25, hour, tzinfo=dt.UTC), origin, attempt)


def answer(key: str, /, **outputs: Any) -> SinkItem:
    return SinkItem(key, InferenceResponse.of({name: np.asarray(value) for name, value in outputs.items()}, 0, 0, 1))


def answers(count: int, start: int = 0) -> list[SinkItem]:
    """Results that differ; every fourth is an error."""
    items = []
    for number in range(start, start + count):
        key = f"file.csv:{number}"
        if number % 4 == 3:
            items.append(SinkItem(key, None, DeadlineExceeded(f"too late: {number}")))
        else:
            items.append(answer(key, y=np.array([[number, 0.1]], np.float32)))
    return items


def keys(items: list[SinkItem]) -> list[str]:
    return [item.key for item in items]


def remember(memory: dict[str, str], marks: Mapping[str, str | None]) -> None:
    for key, mark in marks.items():
        if mark is None:
            memory.pop(key, None)
        else:
            memory[key] = mark


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(folder.glob("*.parquet")) for row in parquet.ParquetFile(part).read().to_pylist()]


# --------------------------------------------------------------------------------------------- a receiver


@dataclass
class Post:
    path: str
    headers: Mapping[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


@dataclass
class Receiver:
    """A web server in a thread. `answers` are taken one by one: a status, or status and headers and text; then 200."""

    posts: list[Post] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    url: str = ""

    def unique(self) -> list[Post]:
        """Without those whose idempotency key has come before."""
        first: dict[str, Post] = {}
        for post in self.posts:
            first.setdefault(post.headers["idempotency-key"], post)
        return list(first.values())


@contextmanager
def receiver() -> Iterator[Receiver]:
    state = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            state.posts.append(Post(self.path, {k.lower(): v for k, v in self.headers.items()}, raw))
            given = state.answers.pop(0) if state.answers else 200
            status, headers, text = given if isinstance(given, tuple) else (given, {}, "")
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.005,))
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def raw_server(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does what `serve` does with each connection, until the block ends; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    try:
                        serve(connection)
                    except OSError:
                        pass

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
