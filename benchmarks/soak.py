"""Suite `soak`: a real server at four fifths of what it can do, for ten minutes: its memory, and what became of every
request.

What it can do is measured first, by more than that: requests arrive as fast as callers were answered that had nothing
else to do. Then requests of all classes arrive open loop at a share of it, whatever the answers do. The load comes from
this process, on the same machine, over so many connections: when all are taken a request waits for one, and its latency
counts that.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from benchmarks.load import Open, open_loop, poisson_arrivals
from benchmarks.report import Report
from benchmarks.stats import median, percentile
from kapsl_scheduler.client import Client, LoadTally, closed_loop
from kapsl_scheduler.demo.run import PACKAGE
from kapsl_scheduler.errors import EngineError
from kapsl_scheduler.server.oip_json import encode_request
from kapsl_scheduler.types import Priority

__all__ = ["Options", "run"]

MODEL: Final = "digits"
PATH: Final = f"/v2/models/{MODEL}/infer"
FLAT: Final = 1.10  # memory of the last quarter over that of the second: what a first burst takes is kept for the next
END_WITHIN: Final = 30.0  # seconds


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`warmup` (seconds) is how long it is measured what the server can do, at first with so many `callers`; `share` is
    how much of that then arrives for `seconds` over `connections`, `every` (seconds) how often its memory is read."""

    seconds: float = 600.0
    warmup: float = 10.0
    share: float = 0.8
    callers: int = 32
    connections: int = 256
    every: float = 1.0


class _Soaked(msgspec.Struct):
    """What was seen: `resident` in bytes over time, `counted` by the server itself."""

    capacity: float
    load: Open
    resident: list[float]
    files: list[float]
    counted: int
    exit_code: int


def run(options: Options) -> Report:
    """One soak."""
    report = Report.begin(
        "soak",
        {
            "seconds": options.seconds,
            "share of capacity": options.share,
            "model": MODEL,
            "connections": options.connections,
        },
    )
    seen = asyncio.run(_soak(options))
    outcomes = Counter(seen.load.outcomes)
    answered = seen.load.of("answered")
    report.add({}, "capacity", "requests/s", [seen.capacity], "higher")
    report.add({}, "rate", "requests/s", [len(answered) / options.seconds])
    report.add({}, "requests", "", [len(seen.load.outcomes)])
    report.add({}, "p50", "ms", [percentile(answered, 50) * 1e3], "lower")
    report.add({}, "p99", "ms", [percentile(answered, 99) * 1e3], "lower")
    for number, part in enumerate(np.array_split(np.array(seen.resident), 8)):
        if part.size:
            report.add({"eighth": number + 1}, "resident", "MB", [median(part.tolist()) / 1e6], "lower")
    report.add({}, "open files", "", [seen.files[0], seen.files[-1]])
    _, second, _, last = [part.tolist() for part in np.array_split(np.array(seen.resident), 4)]
    report.at_most("memory, the last quarter over the second", median(last) / median(second), FLAT)
    report.exactly("requests that were not answered", len(seen.load.outcomes) - len(answered), 0)
    report.exactly("answers that the server has not counted", len(answered) - seen.counted, 0)
    report.exactly("the server's exit code", seen.exit_code, 0)
    if set(outcomes) - {"answered"}:
        report.notes.append("not answered: " + ", ".join(f"{code} {n}" for code, n in outcomes.items()))
    return report


async def _soak(options: Options) -> _Soaked:
    rng = np.random.default_rng(0)
    pixels = {"pixels": rng.random((1, 64), np.float32)}
    bodies = [encode_request(pixels, priority=priority) for priority in Priority]
    async with _server() as (process, url), Client(url) as client:
        free = asyncio.Semaphore(options.connections)

        async def request(index: int, _intended: float) -> str:
            async with free:
                try:
                    await client.post(PATH, bodies[index % len(bodies)])
                except EngineError as error:
                    return error.code
            return "answered"

        tally: LoadTally = await closed_loop(
            lambda: client.post(PATH, bodies[0]), callers=options.callers, seconds=options.warmup
        )
        begun = time.perf_counter()
        arrivals = poisson_arrivals(len(tally.latencies) / options.warmup, options.warmup, rng)
        most = await open_loop(request, arrivals)
        capacity = len(most.of("answered")) / (time.perf_counter() - begun)
        arrivals = poisson_arrivals(options.share * capacity, options.seconds, rng)
        resident: list[float] = []
        files: list[float] = []
        before = (await client.stats(MODEL))["inference_stats"]["success"]["count"]
        watching = asyncio.create_task(_watch(process.pid, options.every, resident, files))
        try:
            load = await open_loop(request, arrivals)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        counted = (await client.stats(MODEL))["inference_stats"]["success"]["count"] - before
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(END_WITHIN):
            exit_code = await process.wait()
    return _Soaked(capacity, load, resident, files, counted, exit_code)


async def _watch(pid: int, every: float, resident: list[float], files: list[float]) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    due = time.perf_counter()
    while True:
        resident.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page)  # noqa: ASYNC240  # no disk
        files.append(len(os.listdir(f"/proc/{pid}/fd")))
        due += every
        await asyncio.sleep(max(0.0, due - time.perf_counter()))


@asynccontextmanager
async def _server() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The demo's package on a server of its own, without its job. Killed at the end if it is still there."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "kapsl_scheduler", "serve", str(PACKAGE), "--port", "0", "--no-cron", "--no-socket"),
        stdout=asyncio.subprocess.PIPE,
        env={key: value for key, value in os.environ.items() if not key.startswith("KAPSL_")},
    )
    assert process.stdout is not None
    try:
        first_line = (await process.stdout.readline()).decode()
        if not first_line:
            raise OSError("the server did not start")
        yield process, first_line.split()[2]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
