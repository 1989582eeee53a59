"""Suite `cron`: what jobs cost, and how late they fire, against APScheduler 3 and against bare timers of the loop.

Every figure comes from a scheduler whose target does nothing. What jobs cost live requests is suite `cron-live`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.loops import run_on
from benchmarks.report import Label, Report
from benchmarks.stats import percentile
from kapsl_scheduler import CronJob, CronScheduler, FiringPolicy, Interval
from kapsl_scheduler.core.jobs import moment
from kapsl_scheduler.ports import JobStore
from kapsl_scheduler.stores import MemoryStore, SqliteStore
from kapsl_scheduler.testing import run_virtual

__all__ = ["Options", "run"]

TIMERS: Final = 200
ROW: Final = np.zeros((1, 64), np.float32)
HOURLY: Final = "0 0 * * * *"
YEAR: Final = 365 * 86_400


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` is how long timers are watched in a trial, `slow` what the slow run takes, `jobs` how many are many,
    `year_days` how much of a year is simulated."""

    loop: str = "uvloop"
    rounds: int = 3
    seconds: float = 20.0
    slow: float = 10.0
    jobs: int = 10_000
    year_days: float = 365.0


class NullTarget:
    """Answers at once, and remembers when it was asked."""

    def __init__(self, expected: int = 0) -> None:
        self.asked: list[float] = []
        self.all_there = asyncio.Event()
        self._expected = expected

    async def infer(self, request: Any, **how: Any) -> Any:
        self.asked.append(time.time())
        if len(self.asked) == self._expected:
            self.all_there.set()


def run(options: Options) -> Report:
    """All figures, interleaved with those that they are compared with."""
    settings: dict[str, Label | list[Label]] = {
        "rounds": options.rounds,
        "seconds": options.seconds,
        "jobs": options.jobs,
        "loop": options.loop,
    }
    report = Report.begin("cron", settings)
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    _registration(report, options)
    _memory(report, options)
    _idle(report, options)
    _burst(report, options)
    _lateness(report, options)
    _slow_run(report, options)
    _year(report, options)
    return report


# -------------------------------------------------------------------------------------------------- many jobs


def _registration(report: Report, options: Options) -> None:
    ways: dict[str, Callable[[int], Coroutine[Any, Any, float]]] = {
        "ours": _register_ours,
        "ours, all at once": _register_all,
        "APScheduler 3": _register_peer,
    }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            samples[name].append(run_on(options.loop, way(options.jobs)))
    taken = {
        name: report.add({"registering": name}, "time", "us a job", [s / options.jobs * 1e6 for s in took], "lower")
        for name, took in samples.items()
    }
    ratio = taken["ours"].value / taken["APScheduler 3"].value
    report.at_most(f"registering {options.jobs:,} jobs over APScheduler 3", ratio, 0.4)


def _jobs(number: int, schedule: Any = HOURLY) -> list[CronJob]:
    return [CronJob(f"job-{n}", schedule, ROW) for n in range(number)]


async def _register_ours(number: int) -> float:
    async with CronScheduler(NullTarget()) as cron:
        jobs = _jobs(number)
        start = time.perf_counter()
        for job in jobs:
            await cron.register(job)
        return time.perf_counter() - start


async def _register_all(number: int) -> float:
    async with CronScheduler(NullTarget()) as cron:
        jobs = _jobs(number)
        start = time.perf_counter()
        await cron.register_all(jobs)
        return time.perf_counter() - start


async def _register_peer(number: int) -> float:
    async with _peer() as scheduler:
        start = time.perf_counter()
        for n in range(number):
            scheduler.add_job(_nothing, "cron", minute=0, second=0, id=f"job-{n}", args=(ROW,))
        return time.perf_counter() - start


async def _nothing(*_: Any) -> None:
    """What a job of the peer does."""


@asynccontextmanager
async def _peer() -> AsyncIterator[Any]:
    from apscheduler.schedulers.asyncio import AsyncIOScheduler

    scheduler = AsyncIOScheduler(timezone="UTC")
    scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.shutdown(wait=False)


def _memory(report: Report, options: Options) -> None:
    async def trial() -> tuple[float, int]:
        async with CronScheduler(NullTarget()) as cron:
            await cron.register(CronJob("warm", HOURLY, ROW))
            gc.collect()
            tracemalloc.start()
            for n in range(options.jobs):
                await cron.register(CronJob(f"job-{n}", HOURLY, ROW))
            gc.collect()
            taken, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            payload = ROW.nbytes + len(cron.definition("job-0"))
            return taken / options.jobs - payload, len(asyncio.all_tasks())

    bytes_each, tasks = run_on(options.loop, trial())
    report.add({"idle": "jobs"}, "beyond its payload", "bytes a job", [bytes_each], "lower")
    report.add({"idle": "jobs"}, "tasks", "", [tasks], "lower")
    report.at_most("memory of an idle job beyond its payload", bytes_each, 2048, "bytes")


def _idle(report: Report, options: Options) -> None:
    async def trial() -> float:
        async with CronScheduler(NullTarget()) as cron:
            await cron.register_all(_jobs(options.jobs, Interval(3600.0)))
            cpu, start = time.process_time(), time.perf_counter()
            await asyncio.sleep(options.seconds)
            return (time.process_time() - cpu) / (time.perf_counter() - start)

    shares = [run_on(options.loop, trial()) * 100 for _ in range(options.rounds)]
    idle = report.add({"idle": "jobs"}, "CPU", "% of a core", shares, "lower")
    report.at_most(f"CPU with {options.jobs:,} idle jobs", idle.value, 1.0, "% of a core")


def _burst(report: Report, options: Options) -> None:
    """All jobs due at one moment: when the last of them has been dispatched."""

    async def trial(store: JobStore) -> float:
        target = NullTarget(options.jobs)
        due = time.time_ns() // 1000 + 500_000 + options.jobs * 200
        schedule, policy = Interval(3600.0, moment(due)), FiringPolicy(start=moment(due))
        async with CronScheduler(target, store=store) as cron:
            await cron.register_all(CronJob(f"job-{n}", schedule, ROW, firing=policy) for n in range(options.jobs))
            async with asyncio.timeout(60):
                await target.all_there.wait()
        return max(target.asked) - due / 1e6

    samples: dict[str, list[float]] = {"memory": [], "SQLite": []}
    for _ in range(options.rounds):
        samples["memory"].append(run_on(options.loop, trial(MemoryStore())))
        with tempfile.TemporaryDirectory() as folder:
            samples["SQLite"].append(run_on(options.loop, trial(SqliteStore(Path(folder) / "cron.db"))))
    last = {
        name: report.add({"store": name}, "all due at once, the last dispatched after", "s", took, "lower")
        for name, took in samples.items()
    }
    report.at_most(f"{options.jobs:,} due at once, in memory", last["memory"].value, 1.0, "s")


# ---------------------------------------------------------------------------------------------------- lateness


class _Watched(msgspec.Struct):
    """Seconds that each firing came late, and the processor seconds that they took."""

    late: list[float]
    cpu: float


def _lateness(report: Report, options: Options) -> None:
    ways: dict[str, Callable[[float], Coroutine[Any, Any, _Watched]]] = {
        "bare call_at": _bare_timers,
        "ours": _our_timers,
        "APScheduler 3": _peer_timers,
    }
    trials: dict[str, list[_Watched]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            trials[name].append(run_on(options.loop, way(options.seconds)))
    p99: dict[str, float] = {}
    cpu: dict[str, float] = {}
    for name, rounds in trials.items():
        labels: dict[str, Label] = {"200 jobs at 1 s": name}
        report.add(labels, "firings", "", [len(trial.late) for trial in rounds])
        report.add(labels, "late p50", "ms", [percentile(trial.late, 50) * 1e3 for trial in rounds], "lower")
        p99[name] = report.add(
            labels, "late p99", "ms", [percentile(trial.late, 99) * 1e3 for trial in rounds], "lower"
        ).value
        cpu[name] = report.add(labels, "CPU", "s", [trial.cpu for trial in rounds], "lower").value
    report.at_most("p99 lateness of 200 jobs at 1 s", p99["ours"], 1.5 * p99["bare call_at"] + 2.0, "ms")
    report.at_most("CPU of 200 jobs at 1 s over APScheduler 3", cpu["ours"] / cpu["APScheduler 3"], 1.0)


async def _bare_timers(seconds: float) -> _Watched:
    loop = asyncio.get_running_loop()
    late: list[float] = []
    running = True

    def fire(due: float) -> None:
        late.append(max(loop.time() - due, 0.0))
        if running:
            loop.call_at(due + 1.0, fire, due + 1.0)

    cpu = time.process_time()
    first = loop.time() + 1.0
    for _ in range(TIMERS):
        loop.call_at(first, fire, first)
    await asyncio.sleep(seconds + 0.5)
    running = False
    return _Watched(late, time.process_time() - cpu)


async def _our_timers(seconds: float) -> _Watched:
    target = NullTarget()
    async with CronScheduler(target) as cron:
        cpu = time.process_time()
        anchor = time.time_ns() // 1000
        await cron.register_all(CronJob(f"job-{n}", Interval(1.0, moment(anchor)), ROW) for n in range(TIMERS))
        await asyncio.sleep(seconds + 0.5)
        cpu = time.process_time() - cpu
    return _Watched([(asked - anchor / 1e6) % 1.0 for asked in target.asked], cpu)


async def _peer_timers(seconds: float) -> _Watched:
    late: list[float] = []
    start = time.time()

    async def fire() -> None:
        late.append((time.time() - start) % 1.0)

    async with _peer() as scheduler:
        cpu = time.process_time()
        for number in range(TIMERS):
            scheduler.add_job(fire, "interval", seconds=1, id=f"job-{number}", start_date=moment(round(start * 1e6)))
        await asyncio.sleep(seconds + 0.5)
        cpu = time.process_time() - cpu
    return _Watched(late, cpu)


def _slow_run(report: Report, options: Options) -> None:
    """One job's run takes long; fifty others fire every half second meanwhile."""

    async def trial() -> list[float]:
        target = NullTarget()
        anchor = time.time_ns() // 1000

        async def slow(firing: Any) -> None:
            await asyncio.sleep(options.slow)

        async with CronScheduler(target) as cron:
            await cron.register(CronJob("slow", Interval(0.5, moment(anchor)), slow))
            others = (CronJob(f"job-{n}", Interval(0.5, moment(anchor)), ROW) for n in range(50))
            await cron.register_all(others)
            await asyncio.sleep(options.slow + 1.0)
            await cron.close(0.0)
        return [(asked - anchor / 1e6) % 0.5 for asked in target.asked]

    late = run_on(options.loop, trial())
    worst = report.add(
        {"beside": f"a run of {options.slow:g} s"},
        "late p99 of the others",
        "ms",
        [percentile(late, 99) * 1e3],
        "lower",
    )
    report.at_most(f"p99 lateness beside a run of {options.slow:g} s", worst.value, 50.0, "ms")


# -------------------------------------------------------------------------------------------------- simulation


def _year(report: Report, options: Options) -> None:
    """A minutely job in virtual time: every firing counted."""
    start = 1_767_225_600_000_000

    async def trial() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        target = NullTarget()
        async with CronScheduler(target, clock=lambda: start + round(loop.time() * 1e6)) as cron:
            await cron.register(CronJob("minutely", "0 * * * * *", ROW))
            await asyncio.sleep(options.year_days * 86_400 + 1)
            info = await cron.job_info("minutely")
        assert info is not None
        return info.succeeded, len(target.asked)

    begin = time.perf_counter()
    succeeded, asked = run_virtual(trial())
    took = time.perf_counter() - begin
    expected = round(options.year_days * 1440)
    year = report.add({"simulated days": options.year_days}, "took", "s", [took], "lower")
    report.add({"simulated days": options.year_days}, "a firing", "us", [took / expected * 1e6], "lower")
    report.exactly("firings of a minutely job", succeeded, expected)
    report.exactly("calls of its target", asked, expected)
    report.at_most("a simulated year", year.value * YEAR / (options.year_days * 86_400), 20.0, "s")
