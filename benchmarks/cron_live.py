"""Suite `cron-live`: what live requests pay for jobs that would keep the engine busy all the time, and what those get.

One job streams requests without end in the background class; live requests come one at a time from a caller that thinks
between them, as in suite `flood`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from benchmarks import flood
from benchmarks.devices import Device, calibrate_sleep
from benchmarks.loops import LoopWatch, run_on
from benchmarks.report import Label, Report
from benchmarks.stats import percentile
from kapsl_scheduler import BatchPolicy, CronJob, CronScheduler, Scheduler

__all__ = ["Options", "run"]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` and `warmup` are per trial; `think` is the live caller's mean pause, in seconds."""

    loop: str = "uvloop"
    think: float = 0.02
    rounds: int = 3
    seconds: float = 10.0
    warmup: float = 1.0


class _Case(msgspec.Struct, frozen=True):
    name: str
    per_call: float
    per_row: float
    batch: BatchPolicy


CASES: Final = (
    _Case("5 ms a call", 0.005, 0.0, BatchPolicy()),
    _Case("0.3 ms + 0.9 ms a row", 0.0003, 0.0009, BatchPolicy(max_batch_time=0.010)),
)


class _Trial(msgspec.Struct):
    latencies: list[float]
    share: float
    rows_per_second: float
    longest_block: float


def run(options: Options) -> Report:
    """Every case without jobs and with them, round after round."""
    settings: dict[str, Label | list[Label]] = {
        "rounds": options.rounds,
        "seconds": options.seconds,
        "mean pause ms": options.think * 1e3,
    }
    report = Report.begin("cron-live", settings)
    overshoot = calibrate_sleep(0.005)
    for case in CASES:
        trials: dict[str, list[_Trial]] = {"none": [], "saturating": []}
        for number in range(options.rounds):
            for jobs, rounds in trials.items():
                rounds.append(run_on(options.loop, _trial(case, jobs != "none", options, overshoot, seed=number)))
        _report_case(report, case, trials)
    report.notes.append("share: of the engine time that live requests leave, what the job's requests had.")
    return report


def _report_case(report: Report, case: _Case, trials: dict[str, list[_Trial]]) -> None:
    p99: dict[str, float] = {}
    for jobs, rounds in trials.items():
        labels: dict[str, Label] = {"engine": case.name, "jobs": jobs}
        report.add(labels, "live p50", "ms", [percentile(t.latencies, 50) * 1e3 for t in rounds], "lower")
        p99[jobs] = report.add(
            labels, "live p99", "ms", [percentile(t.latencies, 99) * 1e3 for t in rounds], "lower"
        ).value
        report.add(labels, "share", "", [trial.share for trial in rounds], "higher")
        report.add(labels, "rows", "rows/s", [trial.rows_per_second for trial in rounds], "higher")
        report.add(labels, "longest block", "ms", [trial.longest_block * 1e3 for trial in rounds], "lower")
    slice_ms = max(case.batch.background_slice, case.per_call + case.per_row) * 1e3
    report.at_most(f"{case.name}, live p99 with jobs", p99["saturating"], 1.05 * p99["none"] + slice_ms, "ms")
    share = report.find("share", {"engine": case.name, "jobs": "saturating"})
    report.at_least(f"{case.name}, the jobs' share", share.value, 0.9)


async def _trial(case: _Case, with_jobs: bool, options: Options, overshoot: float, *, seed: int) -> _Trial:
    device = Device(case.per_call, case.per_row, overshoot=overshoot)
    live = flood.Options(think=options.think)
    async with Scheduler([device.engine(1)], batch=case.batch) as scheduler, CronScheduler(scheduler) as cron:
        if with_jobs:
            await cron.register(CronJob("saturating", 3600, _endless))
            await cron.trigger("saturating")
        await flood.live_latencies(scheduler, live, options.warmup, seed=seed + 1000)
        start = time.perf_counter()
        with LoopWatch() as watch:
            latencies = await flood.live_latencies(scheduler, live, options.seconds, seed=seed)
        stop = time.perf_counter()
        await cron.close(0.0)
    calls = [call for call in device.calls if start <= call.start and call.stop <= stop]
    rows = sum(int((call.rows == 0).sum()) for call in calls)
    return _Trial(latencies, flood.flood_share(calls, device, stop - start), rows / (stop - start), watch.longest)


async def _endless(firing: Any) -> AsyncIterator[Any]:
    while True:
        yield flood.FLOOD_ROW
