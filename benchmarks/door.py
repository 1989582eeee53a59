"""Suite `door`: the digits model over HTTP, one digit a request, by the real server in a process of its own: tensors as
bytes and as JSON, against other servers of models where they are installed: mosec, whose front is written in Rust,
LitServe, BentoML and Ray Serve.

Client and servers share the cores. Each server answers the same client, which reads no more of an answer than it must,
and is asked on 1, 32 and 128 connections that each have one request at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from benchmarks.devices import DIGITS
from benchmarks.door_peers import PEERS, installed
from benchmarks.loops import run_on
from benchmarks.report import Label, Report
from benchmarks.servers import process_of
from benchmarks.stats import percentile

__all__ = ["Options", "binary_request", "run"]

CONNECTIONS: Final = (1, 32, 128)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` is how long each server is asked on so many connections in a round."""

    loop: str = "uvloop"
    rounds: int = 3
    seconds: float = 4.0


class _Way(NamedTuple):
    """A server's port, and the bytes of a request."""

    port: int
    request: bytes


class _Trial(NamedTuple):
    """Answers a second, how long each took, and the number of those that were none."""

    rate: float
    latencies: list[float]
    refused: int


def run(options: Options) -> Report:
    """Every way of asking on every number of connections, round after round."""
    settings: dict[str, Label | list[Label]] = {
        "rounds": options.rounds,
        "seconds": options.seconds,
        "loop": options.loop,
        "connections": list(CONNECTIONS),
    }
    report = Report.begin("door", settings)
    with _servers() as ways:
        trials: dict[tuple[str, int], list[_Trial]] = {(name, number): [] for number in CONNECTIONS for name in ways}
        for _ in range(options.rounds):
            for (name, number), done in trials.items():
                done.append(run_on(options.loop, _trial(ways[name], number, options.seconds)))
    for (name, number), done in trials.items():
        labels: dict[str, Label] = {"asked": name, "connections": number}
        report.add(labels, "requests", "1/s", [trial.rate for trial in done], "higher")
        report.add(labels, "p50", "ms", [percentile(trial.latencies, 50) * 1e3 for trial in done], "lower")
        report.add(labels, "p99", "ms", [percentile(trial.latencies, 99) * 1e3 for trial in done], "lower")
    for name in ("binary", "JSON"):
        report.exactly(
            f"{name}: requests that were not answered",
            sum(one.refused for n in CONNECTIONS for one in trials[name, n]),
            0,
        )
    for name in ways.keys() & PEERS.keys():
        own, least = ("binary", 1.4) if PEERS[name].raw else ("JSON", 8.0)
        for number in CONNECTIONS[1:]:
            ours, theirs = (report.find("requests", {"asked": one, "connections": number}).value for one in (own, name))
            report.at_least(f"{own} over {name}, {number} connections", ours / theirs, least)
    if peers := ways.keys() & PEERS.keys():
        alone = {name: report.find("p50", {"asked": name, "connections": 1}).value for name in ("binary", *peers)}
        best = min(peers, key=lambda name: alone[name])
        report.at_most(f"p50 of a lone request over that of the best peer, {best}", alone["binary"] / alone[best], 0.2)
    return report


@contextlib.contextmanager
def _servers() -> Iterator[Mapping[str, _Way]]:
    """What can be asked, while the servers run."""
    digit = np.random.default_rng(0).random((1, 64)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ours = stack.enter_context(
            process_of([sys.executable, "-m", "kapsl_scheduler", "serve", "--no-cron"], str(DIGITS))
        )
        ways = {"binary": _Way(ours, binary_request(digit)), "JSON": _Way(ours, _json(digit))}
        for name, peer in installed().items():
            script = Path(folder) / f"digits_{peer.module.replace('.', '_')}.py"
            script.write_text(peer.written(str(DIGITS), folder, script.stem), "utf-8")
            port = stack.enter_context(process_of([sys.executable, str(script)]))
            row = [round(float(value), 4) for value in digit[0]]
            body = digit.tobytes() if peer.raw else msgspec.json.encode({"x": [row] if peer.rows else row})
            ways[name] = _Way(port, _post(peer.path, body, "" if peer.raw else "content-type: application/json\r\n"))
        yield ways


def _post(path: str, body: bytes, header: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{header}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _tensor(**more: Any) -> dict[str, Any]:
    return {"name": "pixels", "shape": [1, 64], "datatype": "FP32", **more}


def binary_request(digit: Any) -> bytes:
    """An inference of one digit, its tensor as bytes."""
    tensor = _tensor(parameters={"binary_data_size": digit.nbytes})
    head = msgspec.json.encode({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    header = f"inference-header-content-length: {len(head)}\r\n"
    return _post("/v2/models/digits/infer", head + digit.tobytes(), header)


def _json(digit: Any) -> bytes:
    body = msgspec.json.encode({"inputs": [_tensor(data=[round(float(value), 4) for value in digit[0]])]})
    return _post("/v2/models/digits/infer", body)


class _Caller(asyncio.Protocol):
    """One connection: the next request as soon as an answer is there, until it is told to stop."""

    def __init__(self, request: bytes, latencies: list[float]) -> None:
        self.running = True
        self.refused = 0
        self._request = request
        self._latencies = latencies
        self._came = b""
        self._asked = 0.0
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._ask()

    def close(self) -> None:
        self._transport.close()

    def _ask(self) -> None:
        self._asked = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        came = self._came = self._came + data if self._came else data
        head = came.find(b"\r\n\r\n")
        if head < 0:
            return
        length = came.find(b"content-length: ", 0, head) + 16
        if length < 16:  # it comes in chunks
            if not came.endswith(b"0\r\n\r\n"):
                return
        elif len(came) < head + 4 + int(came[length : came.find(b"\r\n", length)]):
            return
        self._came = b""
        if came.startswith(b"HTTP/1.1 200"):
            self._latencies.append(time.perf_counter() - self._asked)
        else:
            self.refused += 1
        if self.running:
            self._ask()


async def _trial(way: _Way, connections: int, seconds: float) -> _Trial:
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    callers = [
        (await loop.create_connection(lambda: _Caller(way.request, latencies), "127.0.0.1", way.port))[1]
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds / 8)
    latencies.clear()
    begun = time.perf_counter()
    await asyncio.sleep(seconds)
    rate = len(latencies) / (time.perf_counter() - begun)
    for caller in callers:
        caller.running = False
    await asyncio.sleep(0.2)
    for caller in callers:
        caller.close()
    return _Trial(rate, latencies, sum(caller.refused for caller in callers))
