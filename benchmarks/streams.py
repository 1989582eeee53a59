"""Suite `streams`: how long the first piece of a streamed text is on its way, from the engine's `yield` to the client.

The engine writes into each piece when it yielded it, by the clock that both processes read. Beside it, in the same
turns, a bare Starlette application on uvicorn streams the same pieces: what the way costs without a scheduler.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.loops import run_on
from benchmarks.report import Report
from benchmarks.servers import process_of
from benchmarks.stats import median, percentile

__all__ = ["Options", "run"]

OURS: Final = """
import time
import numpy as np
from kapsl_scheduler.app import run
from kapsl_scheduler.engines import CallableEngine

def clock(text_input):
    for _ in range({pieces}):
        time.sleep({pause})
        yield {{"text_output": np.array([str(time.monotonic_ns())], object)}}

import sys
engine = CallableEngine(
    clock, name="clock", inputs={{"text_input": ("string", (1,))}}, outputs={{"text_output": ("string", (1,))}}
)
run({{"clock": engine}}, port=int(sys.argv[2]), socket=None)
"""

BARE: Final = """
import asyncio, json, sys, time
import uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

async def pieces():
    for _ in range({pieces}):
        await asyncio.sleep({pause})
        yield "data: " + json.dumps({{"text_output": str(time.monotonic_ns())}}) + "\\n\\n"

async def stream(request):
    await request.body()
    return StreamingResponse(pieces(), media_type="text/event-stream")

app = Starlette(routes=[Route("/v2/models/clock/generate_stream", stream, methods=["POST"])])
uvicorn.run(app, port=int(sys.argv[2]), loop="uvloop", http="httptools", log_level="error")
"""

BODY: Final = json.dumps({"text_input": "when?"}).encode()
REQUEST: Final = (
    b"POST /v2/models/clock/generate_stream HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(BODY)
) + BODY


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`cycles` streams one after another in each round, of `pieces` each, `pause` (seconds) apart."""

    loop: str = "uvloop"
    rounds: int = 5
    cycles: int = 40
    pieces: int = 5
    pause: float = 0.005


def run(options: Options) -> Report:
    """Both servers in turns."""
    report = Report.begin(
        "streams",
        {"rounds": options.rounds, "streams": options.cycles, "pieces": options.pieces, "loop": options.loop},
    )
    first: dict[str, list[list[float]]] = {"kapsl-scheduler": [], "bare": []}
    later: dict[str, list[list[float]]] = {"kapsl-scheduler": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        scripts = {}
        for name, text in (("kapsl-scheduler", OURS), ("bare", BARE)):
            scripts[name] = Path(folder) / f"{name}.py"
            scripts[name].write_text(text.format(pieces=options.pieces, pause=options.pause), "utf-8")
        with (
            process_of([sys.executable, str(scripts["kapsl-scheduler"])]) as ours,
            process_of([sys.executable, str(scripts["bare"])]) as bare,
        ):
            ports = {"kapsl-scheduler": ours, "bare": bare}
            for _ in range(options.rounds):
                for name, port in ports.items():
                    ways = run_on(options.loop, _trial(port, options.cycles))
                    first[name].append([way[0] for way in ways])
                    later[name].append([took for way in ways for took in way[1:]])
    for piece, seen in (("first", first), ("later", later)):
        for name, rounds in seen.items():
            labels = {"server": name, "piece": piece}
            for percent in (50, 99):
                report.add(labels, f"p{percent}", "us", [percentile(took, percent) * 1e6 for took in rounds], "lower")
    for percent in (50, 99):
        took = median([percentile(one, percent) for one in first["kapsl-scheduler"]])
        report.at_most(f"first piece, p{percent}", took * 1e3, 1.0, "ms")
    return report


async def _trial(port: int, streams: int) -> list[list[float]]:
    """For each stream, how long each of its pieces was on its way, in seconds."""
    loop = asyncio.get_running_loop()
    _, caller = await loop.create_connection(_Reader, "127.0.0.1", port)
    seen = [await caller.stream() for _ in range(streams)]
    caller.close()
    return seen


class _Reader(asyncio.Protocol):
    """One connection, one stream at a time."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._came = b""
        self._took: list[float] = []
        self._done: asyncio.Future[list[float]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def close(self) -> None:
        self._transport.close()

    async def stream(self) -> list[float]:
        self._came, self._took = b"", []
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(REQUEST)
        return await self._done

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self._came += data
        *events, self._came = self._came.split(b"\n\n")
        for event in events:
            start = event.index(b"{")
            told = json.loads(event[start:])["text_output"]
            self._took.append((now - int(told)) / 1e9)
        if b"0\r\n\r\n" in self._came and self._done is not None and not self._done.done():
            self._done.set_result(self._took)
