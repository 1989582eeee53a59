"""Suite `crowd`: what a thousand idle connections and a hundred slow clients cost those who ask properly.

The digits model over HTTP by the real server. Live requests come at a steady rate over some connections; in every other
trial the crowd is there as well: clients that have had an answer and say nothing more, clients that send their heads or
their bodies a byte at a time, and clients that do not read what they asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import sys
from collections.abc import AsyncIterator
from typing import Final

import msgspec
import numpy as np

from benchmarks.devices import DIGITS
from benchmarks.door import binary_request
from benchmarks.load import open_loop, poisson_arrivals
from benchmarks.loops import run_on
from benchmarks.report import Report
from benchmarks.servers import process_of
from benchmarks.stats import median, percentile

__all__ = ["Options", "run"]

EVERY: Final = 0.5
"""Seconds between two bytes of a slow client."""
LONG_ANSWER: Final = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
READ_AHEAD: Final = 4096
"""Bytes that a client which does not read takes into its socket nevertheless."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`rate` live requests a second come for `seconds` in each trial, over at most `connections`; the crowd is of
    `idle` and `stalling` ones."""

    loop: str = "uvloop"
    rounds: int = 7
    seconds: float = 6.0
    warmup: float = 1.0
    rate: float = 500.0
    connections: int = 16
    idle: int = 1000
    stalling: int = 100


def run(options: Options) -> Report:
    """Trials with the crowd and without it, in turns."""
    report = Report.begin(
        "crowd",
        {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "rate": options.rate,
            "idle": options.idle,
            "stalling": options.stalling,
            "loop": options.loop,
        },
    )
    seen: dict[str, list[list[float]]] = {"nobody else": [], "a crowd": []}
    with process_of([sys.executable, "-m", "kapsl_scheduler", "serve", "--no-cron"], str(DIGITS)) as port:
        for _ in range(options.rounds):
            for name, trials in seen.items():
                trials.append(run_on(options.loop, _trial(port, options, crowded=name == "a crowd")))
    for name, trials in seen.items():
        for percent in (50, 99):
            values = [percentile(trial, percent) * 1e3 for trial in trials]
            report.add({"beside": name}, f"p{percent}", "ms", values, "lower")
    alone, crowded = (median([percentile(trial, 99) for trial in trials]) for trials in seen.values())
    report.at_most("live p99 beside the crowd over that alone", crowded / alone, 1.1)
    return report


async def _trial(port: int, options: Options, *, crowded: bool) -> list[float]:
    request = binary_request(np.random.default_rng(0).random((1, 64)).astype(np.float32))
    async with contextlib.AsyncExitStack() as stack:
        if crowded:
            await stack.enter_async_context(_crowd(port, request, options.idle, options.stalling))
        free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        for _ in range(options.connections):
            free.put_nowait(await asyncio.open_connection("127.0.0.1", port))

        async def ask(_index: int, _intended: float) -> str:
            connection = await free.get()
            try:
                await _answered(*connection, request)
            finally:
                free.put_nowait(connection)
            return "answered"

        rng = np.random.default_rng(1)
        await open_loop(ask, poisson_arrivals(options.rate, options.warmup, rng))
        load = await open_loop(ask, poisson_arrivals(options.rate, options.seconds, rng))
        while not free.empty():
            free.get_nowait()[1].close()
    return list(load.of("answered"))


async def _answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the server answered {head[:200]!r}")
    start = head.index(b"content-length: ") + 16
    await reader.readexactly(int(head[start : head.index(b"\r\n", start)]))


@contextlib.asynccontextmanager
async def _crowd(port: int, request: bytes, idle: int, stalling: int) -> AsyncIterator[None]:
    writers: list[asyncio.StreamWriter] = []
    tasks: list[asyncio.Task[None]] = []
    try:
        for _ in range(idle):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            await _answered(reader, writer, request)
        half = request.index(b"\r\n\r\n") + 4
        for number in range(stalling):
            if number % 3 == 2:
                tasks.append(asyncio.create_task(_does_not_read(port)))
                continue
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            begin, rest = (request[:half], request[half:]) if number % 3 else (b"", request)
            tasks.append(asyncio.create_task(_dribble(writer, begin, rest)))
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.close()


async def _dribble(writer: asyncio.StreamWriter, begin: bytes, rest: bytes) -> None:
    writer.write(begin)
    await asyncio.sleep(random.uniform(0, EVERY))  # they know nothing of each other
    for at in range(len(rest)):
        writer.write(rest[at : at + 1])
        await asyncio.sleep(EVERY)


async def _does_not_read(port: int) -> None:
    """Asks for what is longer than it takes, again and again, as far as the server lets it."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_AHEAD)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
        await asyncio.sleep(random.uniform(0, EVERY))
        while True:
            await loop.sock_sendall(client, LONG_ANSWER)
            await asyncio.sleep(EVERY)
