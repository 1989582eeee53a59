"""The demo's run: a real server process, live callers and bulk callers at the same time while a job of the package
fires, figures while it goes.

What is not here: the model and its images, which are packaged beside this file, and how they were made.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from kapsl_scheduler.client import Client, LoadTally
from kapsl_scheduler.errors import Unavailable
from kapsl_scheduler.types import Array, Priority

__all__ = ["PACKAGE", "run"]

PACKAGE: Final = Path(__file__).with_name("digits.aimod")
_TEST_IMAGES: Final = Path(__file__).with_name("digits_test.npz")
_MODEL: Final = "digits"
_JOB: Final = "digits:heartbeat"  # of the package: eight images every two seconds
_LIVE_CALLERS: Final = 4
_LIVE_PAUSE: Final = 0.03  # seconds that a live caller looks at an answer, on average
_BULK_CALLERS: Final = 8
_BULK_ROWS: Final = 8
_GOOD_ACCURACY: Final = 0.9
_WARM_UP: Final = 0.5  # seconds at the beginning that are in no comparison
_PATIENCE: Final = 60.0  # seconds for the server to start or to end


class _Images(NamedTuple):
    pixels: Array  # float32 [n, 64]
    labels: Array  # int [n]


class _Figures(NamedTuple):
    """What one group of callers saw in some time. Latencies are in seconds."""

    requests: float
    images: float
    p50: float | None
    p99: float | None


class _Phases:
    """Whether the job fires (`True`) or is paused (`False`), and what live callers saw meanwhile, in seconds."""

    def __init__(self) -> None:
        self.now: tuple[int, bool] | None = None  # numbered: a request belongs to a phase that it did not outlast
        self.latencies: dict[bool, list[float]] = {True: [], False: []}

    async def alternate(self, client: Client, seconds: float) -> None:
        """Pauses the job for half of the time: in the middle, so that what changes over time is in both halves."""
        quarter = seconds / 4
        spans = (quarter, 2 * quarter, quarter) if seconds >= 8 else (2 * quarter, 2 * quarter)
        end = time.perf_counter()
        for number, span in enumerate(spans):
            end += span
            firing = number % 2 == 0
            if number:
                await (client.resume_job(_JOB) if firing else client.pause_job(_JOB, "to compare"))
            else:
                await asyncio.sleep(_WARM_UP)
            self.now = number, firing
            await asyncio.sleep(max(0.0, end - time.perf_counter()))
            self.now = None

    def seen(self, phase: tuple[int, bool] | None, seconds: float) -> None:
        if phase is not None and phase == self.now:
            self.latencies[phase[1]].append(seconds)


class _Group:
    """Callers of one class and what they have seen."""

    def __init__(
        self, client: Client, input_name: str, priority: Priority, rows: int, phases: _Phases | None = None
    ) -> None:
        self.title = "live" if priority is Priority.LATENCY_CRITICAL else priority.name.lower()
        self.tally = LoadTally()
        self._client = client
        self._input_name = input_name
        self._priority = priority
        self._rows = rows
        self._phases = phases
        self._seen = 0
        self._right = 0
        self._window_start = 0

    @property
    def accuracy(self) -> float:
        return self._right / self._seen if self._seen else 0.0

    async def ask(self, images: _Images, rng: random.Random) -> None:
        """Sends some of the images and compares the answer with their labels."""
        first = rng.randrange(len(images.labels) - self._rows + 1)
        pixels = images.pixels[first : first + self._rows]
        labels = images.labels[first : first + self._rows]

        phase = None if self._phases is None else self._phases.now
        started = time.perf_counter()

        async def call() -> None:
            reply = await self._client.infer(_MODEL, {self._input_name: pixels}, priority=self._priority)
            if self._phases is not None:
                self._phases.seen(phase, time.perf_counter() - started)
            predicted = next(iter(reply.outputs.values())).argmax(axis=1)
            self._seen += len(predicted)
            self._right += int((predicted == labels).sum())

        await self.tally.measure(call, started)

    def window(self, seconds: float) -> _Figures:
        """The figures since the last window."""
        latencies = self.tally.latencies[self._window_start :]
        self._window_start = len(self.tally.latencies)
        return self._figures(latencies, seconds)

    def total(self, seconds: float) -> _Figures:
        return self._figures(self.tally.latencies, seconds)

    def _figures(self, latencies: list[float], seconds: float) -> _Figures:
        p50, p99 = np.percentile(latencies, (50, 99)) if latencies else (None, None)
        return _Figures(len(latencies) / seconds, len(latencies) * self._rows / seconds, p50, p99)


async def run(seconds: float) -> bool:
    """Runs the demo for `seconds` and prints what happened. Whether every request was answered, and well enough.

    Raises `Unavailable` if the server does not start.
    """
    with np.load(_TEST_IMAGES) as file:
        images = _Images(file["images"].astype(np.float32), file["labels"])
    console = Console()
    console.print(f"Serving {PACKAGE.name} and sending it {len(images.labels)} images that it has never seen.")
    async with _server() as url, Client(url) as client:
        input_name = (await client.metadata(_MODEL))["inputs"][0]["name"]
        phases = _Phases()
        live = _Group(client, input_name, Priority.LATENCY_CRITICAL, rows=1, phases=phases)
        bulk = _Group(client, input_name, Priority.THROUGHPUT, rows=_BULK_ROWS)
        started = time.perf_counter()
        end = started + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(_LIVE_CALLERS):
                group.create_task(_call(live, images, random.Random(number), end, pause=_LIVE_PAUSE))
            for number in range(_BULK_CALLERS):
                group.create_task(_call(bulk, images, random.Random(_LIVE_CALLERS + number), end))
            group.create_task(_watch(console, client, (live, bulk), end))
            group.create_task(phases.alternate(client, seconds))
        elapsed = time.perf_counter() - started
        stats = await client.stats(_MODEL)
        job = _Job.of(await client.job(_JOB), await client.runs(_JOB, limit=1000))
    cost = _Cost(phases, stats["scheduler"]["background_bound"])
    return _report(console, (live, bulk), _Batches.of(stats), job, cost, elapsed)


async def _call(group: _Group, images: _Images, rng: random.Random, end: float, *, pause: float = 0.0) -> None:
    while time.perf_counter() < end:
        await group.ask(images, rng)
        if pause:
            await asyncio.sleep(rng.expovariate(1 / pause))


@asynccontextmanager
async def _server() -> AsyncIterator[str]:
    """A server process of its own; its address. It is ended in the orderly way."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KAPSL_")}
    with tempfile.TemporaryDirectory(prefix="kapsl-demo-") as folder:
        store = str(Path(folder) / "cron.db")
        command = ("-m", "kapsl_scheduler", "serve", str(PACKAGE), "--port", "0", "--no-socket", "--store", store)
        async with _process(command, environment) as url:
            yield url


@asynccontextmanager
async def _process(command: Iterable[str], environment: dict[str, str]) -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    try:
        try:
            async with asyncio.timeout(_PATIENCE):
                words = (await process.stdout.readline()).decode().split()
        except TimeoutError:
            raise Unavailable(f"the server did not start within {_PATIENCE:g} s") from None
        if words[:2] != ["listening", "on"]:
            raise Unavailable("the server did not start; what it printed says why")
        yield words[2]
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(_PATIENCE):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


# ------------------------------------------------------------------------------------------------- show


class _Batches(NamedTuple):
    """How many calls the engine made, and how many rows they had in all and at most."""

    calls: int
    rows: int
    largest: int

    @classmethod
    def of(cls, stats: dict[str, Any]) -> _Batches:
        sizes = {int(size): count for size, count in stats["scheduler"]["batch_sizes"].items()}
        calls = sum(sizes.values())
        return cls(calls, sum(size * count for size, count in sizes.items()), max(sizes, default=0))

    def since(self, earlier: _Batches) -> _Batches:
        return _Batches(self.calls - earlier.calls, self.rows - earlier.rows, self.largest)

    def __str__(self) -> str:
        mean = self.rows / self.calls if self.calls else 0.0
        return f"batches: {mean:.1f} rows on average, {self.largest} at most"


class _Job(NamedTuple):
    """What the server knows of the job, the latest run first: how its runs ended, and in seconds how late they started
    and how long they took."""

    outcomes: Counter[str]
    last: str
    lateness: list[float]
    durations: list[float]
    error: str

    @classmethod
    def of(cls, info: dict[str, Any], runs: list[dict[str, Any]]) -> _Job:
        fired = [run for run in runs if run["started"] is not None and run["ended"] is not None]
        last = "paused" if info["paused"] else next((run["state"] for run in fired), "-")
        return cls(
            Counter(run["state"] for run in fired),
            last,
            [(_moment(run["started"]) - _moment(run["due"])).total_seconds() for run in fired],
            [run["duration"] for run in fired],
            next((run["error"] for run in fired if run["error"]), ""),
        )

    def __str__(self) -> str:
        late = _ms(_percentile(self.lateness, 50))
        return f"job {self.outcomes.total()} firings, last {self.last}, {late} late"


class _Cost(NamedTuple):
    """What live callers saw while the job fired and while it was paused; the scheduler's own bound of what it can add
    to a live request, in seconds."""

    phases: _Phases
    bound: float

    def __str__(self) -> str:
        parts = []
        for firing, word in ((True, "while it fired"), (False, "while it was paused")):
            seen = self.phases.latencies[firing]
            p50, p99 = _percentile(seen, 50), _percentile(seen, 99)
            parts.append(f"p50 {_ms(p50)}, p99 {_ms(p99)} {word} ({len(seen)} requests)")
        return (
            f"What it cost live requests: {'; '.join(parts)}. By the scheduler's bound, background work may keep one "
            f"waiting for {_ms(self.bound)}."
        )


def _moment(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text)


def _percentile(values: list[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


async def _watch(console: Console, client: Client, groups: tuple[_Group, ...], end: float) -> None:
    """Shows the last second, every second: a table in place on a terminal, else plain lines."""
    earlier = _Batches.of(await client.stats(_MODEL))
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while (left := end - time.perf_counter()) > 0:
            started = time.perf_counter()
            await asyncio.sleep(min(1.0, left))
            now = _Batches.of(await client.stats(_MODEL))
            job = _Job.of(await client.job(_JOB), await client.runs(_JOB, limit=1000))
            elapsed = time.perf_counter() - started
            rows = [(group, group.window(elapsed)) for group in groups]
            if live is None:
                lines = [*(_line(*row) for row in rows), str(job), str(now.since(earlier))]
                console.print(" | ".join(lines), soft_wrap=True)
            else:
                table = _table(rows, now.since(earlier), max(0.0, end - time.perf_counter()))
                live.update(Group(_job_table(job), table), refresh=True)
            earlier = now


def _line(group: _Group, figures: _Figures) -> str:
    latency = f"p50 {_ms(figures.p50)} p99 {_ms(figures.p99)}"
    return f"{group.title} {figures.requests:.0f}/s {latency} {group.accuracy:.1%} right"


def _table(rows: list[tuple[_Group, _Figures]], batches: _Batches, left: float | None) -> Table:
    caption = str(batches) if left is None else f"{batches}; {left:.0f} s left"
    table = Table(caption=caption)
    for heading in ("class", "requests/s", "images/s", "p50", "p99", "accuracy", "failed"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for group, figures in rows:
        table.add_row(
            group.title,
            f"{figures.requests:.0f}",
            f"{figures.images:.0f}",
            _ms(figures.p50),
            _ms(figures.p99),
            f"{group.accuracy:.1%}",
            str(group.tally.errors.total()),
        )
    return table


def _job_table(job: _Job) -> Table:
    table = Table()
    for heading in ("job", "firings", "last", "late: p50, p99", "took: p50, p99"):
        table.add_column(heading, justify="left" if heading == "job" else "right")
    times = [
        ", ".join(_ms(_percentile(values, percent)) for percent in (50, 99)) for values in (job.lateness, job.durations)
    ]
    table.add_row(_JOB, str(job.outcomes.total()), job.last, *times)
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f} ms"


def _report(
    console: Console, groups: tuple[_Group, ...], batches: _Batches, job: _Job, cost: _Cost, seconds: float
) -> bool:
    console.print(f"\nThe whole {seconds:.0f} s:")
    console.print(_table([(group, group.total(seconds)) for group in groups], batches, None))
    console.print(_job_table(job))
    console.print(str(cost), soft_wrap=True)
    faults = [
        f"{group.title}: {count} requests failed with {code}"
        for group in groups
        for code, count in group.tally.errors.items()
    ]
    faults += [
        f"{group.title}: accuracy {group.accuracy:.1%}, expected at least {_GOOD_ACCURACY:.0%}"
        for group in groups
        if group.accuracy < _GOOD_ACCURACY
    ]
    if not job.outcomes["succeeded"]:
        faults.append(f"{_JOB}: no firing succeeded")
    if job.outcomes["failed"]:
        faults.append(f"{_JOB}: {job.outcomes['failed']} firings failed, the last: {job.error}")
    console.print("\n".join(faults) if faults else "Every request was answered, and the answers are right.")
    return not faults
