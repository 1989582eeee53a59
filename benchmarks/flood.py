"""Suite `flood`: what live requests wait while a flood of lower classes keeps the one slot busy, and what the flood
keeps.

Live requests come one at a time from a caller that thinks between them for an exponentially distributed time: every
request arrives at a random moment of whatever the engine is doing, and none waits for another live one. With
`live="poisson"` they come open loop instead, latency counted from the intended arrival.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Final, Literal

import msgspec
import numpy as np

from benchmarks.devices import Call, Device, calibrate_sleep
from benchmarks.load import Flag, open_loop, poisson_arrivals
from benchmarks.loops import LoopWatch, in_turns
from benchmarks.report import Label, Measurement, Report
from benchmarks.stats import percentile
from kapsl_scheduler import BatchPolicy, Priority, Scheduler
from kapsl_scheduler.types import Array

__all__ = [
    "CASES",
    "FLOOD_ROW",
    "Case",
    "LiveOptions",
    "Options",
    "Trial",
    "flood_share",
    "measured",
    "report_live",
    "run",
]

LIVE_ROW: Final = np.ones((1, 1))
FLOOD_ROW: Final = np.zeros((1, 1))
FLAT: Final = 1.2  # p99 at the largest flood over p99 at the smallest


class LiveOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` and `warmup` are per trial; `think` is the live caller's mean pause, in seconds."""

    loop: str = "uvloop"
    live: Literal["closed", "poisson"] = "closed"
    think: float = 0.02
    rounds: int = 3
    seconds: float = 10.0
    warmup: float = 1.0

    def settings(self) -> dict[str, Label | list[Label]]:
        """For the report."""
        return {
            "rounds": self.rounds,
            "seconds": self.seconds,
            "live": self.live,
            "mean pause ms": self.think * 1e3,
        }


class Options(LiveOptions, frozen=True, kw_only=True):
    """`floods` are numbers of callers."""

    floods: Sequence[int] = (64, 256, 1024)


class Case(msgspec.Struct, frozen=True):
    """An engine, the policy in front of it, the class that floods it and the longest batch that class may form."""

    name: str
    per_call: float
    per_row: float
    batch: BatchPolicy
    flood: Priority

    @property
    def longest_allowed(self) -> float:
        """Seconds: for background work the slice, or one request where that is longer."""
        full = self.per_call + self.per_row * self.batch.max_batch_size
        if self.flood is Priority.BACKGROUND:
            return max(self.batch.background_slice, self.per_call + self.per_row)
        return min(full, self.batch.max_batch_time or full)

    @property
    def may_add(self) -> float:
        """Seconds that the flood may add to a live request."""
        return self.longest_allowed * (1.0 if self.flood is Priority.BACKGROUND else 1.3)


CASES: Final = (
    Case("5 ms a call", 0.005, 0.0, BatchPolicy(), Priority.THROUGHPUT),
    Case("0.3 ms + 0.9 ms a row", 0.0003, 0.0009, BatchPolicy(max_batch_time=0.010), Priority.THROUGHPUT),
    Case("5 ms a call", 0.005, 0.0, BatchPolicy(), Priority.BACKGROUND),
    Case("0.3 ms + 0.9 ms a row", 0.0003, 0.0009, BatchPolicy(max_batch_time=0.010), Priority.BACKGROUND),
)


class Trial(msgspec.Struct):
    """One flood: live latencies and the longest batch in seconds, the flood's share, its rows per second."""

    latencies: list[float]
    share: float
    flood_rate: float
    flood_batch: float
    longest_batch: float
    longest_block: float


def run(options: Options) -> Report:
    """Every case: no flood, then each flood, round after round."""
    report = Report.begin("flood", options.settings())
    overshoot = calibrate_sleep(0.005)
    for case in CASES:
        trial = partial(_trial, options, case, overshoot)
        _report_case(report, case, in_turns(options.loop, (0, *options.floods), options.rounds, trial))
    report.notes.append(
        "share: of the engine time that live requests leave, what the flood had. May add: 1.3 x the longest batch "
        "allowed; for background work max(background slice, one request)."
    )
    return report


def _report_case(report: Report, case: Case, trials: dict[int, list[Trial]]) -> None:
    title = f"{case.name}, {case.flood.name} flood"
    unloaded = 0.0
    p99: dict[int, float] = {}
    for flooders, rounds in trials.items():
        labels: dict[str, Label] = {"engine": case.name, "flood": case.flood.name, "flooders": flooders}
        worst = report_live(report, labels, rounds)
        report.add(labels, "live requests", "", [len(trial.latencies) for trial in rounds])
        report.add(labels, "longest batch", "ms", [trial.longest_batch * 1e3 for trial in rounds], "lower")
        if not flooders:
            unloaded = worst.value
            continue
        p99[flooders] = worst.value
        share = report.add(labels, "share", "", [trial.share for trial in rounds], "higher")
        report.add(labels, "flood rate", "rows/s", [trial.flood_rate for trial in rounds], "higher")
        report.add(labels, "flood batch", "rows", [trial.flood_batch for trial in rounds])
        bound = unloaded + case.may_add * 1e3
        report.add(labels, "bound", "ms", [bound])
        report.at_most(f"{title} of {flooders}, live p99", worst.value, bound, "ms")
        report.at_least(f"{title} of {flooders}, the flood's share", share.value, 0.8)
    if len(p99) > 1:
        flatness = p99[max(p99)] / p99[min(p99)]
        report.at_most(f"{title}, live p99 at {max(p99)} over {min(p99)} flooders", flatness, FLAT)


def report_live(report: Report, labels: dict[str, Label], rounds: Sequence[Trial]) -> Measurement:
    """What live requests met; hands back their 99th percentile."""
    report.add(labels, "live p50", "ms", [percentile(t.latencies, 50) * 1e3 for t in rounds], "lower")
    report.add(labels, "longest block", "ms", [trial.longest_block * 1e3 for trial in rounds], "lower")
    return report.add(labels, "live p99", "ms", [percentile(t.latencies, 99) * 1e3 for t in rounds], "lower")


# ------------------------------------------------------------------------------------------------------ trial


async def _trial(options: Options, case: Case, overshoot: float, flooders: int, seed: int) -> Trial:
    device = Device(case.per_call, case.per_row, overshoot=overshoot)
    flag = Flag()
    async with Scheduler([device.engine(1)], batch=case.batch) as scheduler, asyncio.TaskGroup() as group:
        for _ in range(flooders):
            group.create_task(_flooder(scheduler, case.flood, flag))
        trial = await measured(scheduler, device, options, seed=seed)
        flag.running = False
    return trial


async def measured(scheduler: Scheduler, device: Device, options: LiveOptions, *, seed: int) -> Trial:
    """Live requests through the warm-up and then the seconds that count, while others flood the device."""
    await _live_latencies(scheduler, options, options.warmup, seed=seed + 1000)
    start = time.perf_counter()
    with LoopWatch() as watch:
        latencies = await _live_latencies(scheduler, options, options.seconds, seed=seed)
    stop = time.perf_counter()
    calls = [call for call in device.calls if start <= call.start and call.stop <= stop]
    flood_calls = [call for call in calls if not call.rows.any()]
    flood_rows = sum(int((call.rows == 0).sum()) for call in calls)
    return Trial(
        latencies=latencies,
        share=flood_share(calls, device, stop - start),
        flood_rate=flood_rows / (stop - start),
        flood_batch=sum(len(call.rows) for call in flood_calls) / max(len(flood_calls), 1),
        longest_batch=max((call.stop - call.start for call in calls), default=0.0),
        longest_block=watch.longest,
    )


def flood_share(calls: Sequence[Call], device: Device, seconds: float) -> float:
    """Of the engine time that live requests leave, the fraction that went to flood rows.

    Live rows (marked with 1) need what a call of them alone would cost; what a mixed call takes beyond that, and
    every call without live rows, is the flood's. Idle time is nobody's.
    """
    for_live = for_flood = 0.0
    for call in calls:
        live_rows = int(_marks(call.rows).sum())
        needed = device.seconds(live_rows) if live_rows else 0.0
        for_live += needed
        for_flood += max(call.stop - call.start - needed, 0.0) if live_rows < len(call.rows) else 0.0
    return for_flood / (seconds - for_live)


def _marks(rows: Array) -> Array:
    marks: Array = rows[:, 0]
    return marks


async def _flooder(scheduler: Scheduler, priority: Priority, flag: Flag) -> None:
    while flag.running:
        await scheduler.infer(FLOOD_ROW, priority=priority)


async def _live_latencies(scheduler: Scheduler, options: LiveOptions, seconds: float, *, seed: int) -> list[float]:
    """Live latencies in seconds, over that many seconds."""
    rng = np.random.default_rng(seed)
    if options.live == "poisson":

        async def request(_index: int, _intended: float) -> str:
            await scheduler.infer(LIVE_ROW, priority=Priority.LATENCY_CRITICAL)
            return "answered"

        return (await open_loop(request, poisson_arrivals(1 / options.think, seconds, rng))).latencies
    latencies: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        await asyncio.sleep(rng.exponential(options.think))
        start = time.perf_counter()
        await scheduler.infer(LIVE_ROW, priority=Priority.LATENCY_CRITICAL)
        latencies.append(time.perf_counter() - start)
    return latencies
