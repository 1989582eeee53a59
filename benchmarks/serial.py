"""Suite `serial`: a serial device of 1 ms + 20 us a row, where batching is worth everything.

Closed loops of 32 and 256 callers, in each class, against the device called directly on full batches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from benchmarks.devices import Device, calibrate_sleep, direct_rate
from benchmarks.load import Closed, Flag, closed_loop
from benchmarks.loops import run_on
from benchmarks.report import Label, Report
from benchmarks.stats import paired_ratios, percentile
from kapsl_scheduler import BatchPolicy, Priority, Scheduler

__all__ = ["Options", "run"]

PER_CALL: Final = 0.001
PER_ROW: Final = 20e-6
MAX_BATCH: Final = 32
LIMITS: Final = {32: 0.85, 256: 0.95}
TIMEOUT: Final = 30.0  # seconds: a deadline that no stall of a busy machine reaches


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` and `warmup` are per trial."""

    loops: Sequence[str] = ("uvloop",)
    callers: Sequence[int] = (32, 256)
    rounds: int = 3
    seconds: float = 3.0
    warmup: float = 0.5


class _Trial(msgspec.Struct):
    closed: Closed
    mean_batch: float


def run(options: Options) -> Report:
    """The device alone, then each class, round after round."""
    overshoot = calibrate_sleep(PER_CALL + PER_ROW * MAX_BATCH)
    settings: dict[str, Label | list[Label]] = {
        "rounds": options.rounds,
        "seconds": options.seconds,
        "max batch": MAX_BATCH,
        "sleep overshoot us": round(overshoot * 1e6),
    }
    report = Report.begin("serial", settings)
    for loop in options.loops:
        for callers in options.callers:
            _run_case(report, options, loop, callers, overshoot)
    return report


def _run_case(report: Report, options: Options, loop: str, callers: int, overshoot: float) -> None:
    direct: list[float] = []
    trials: dict[Priority, list[_Trial]] = {priority: [] for priority in Priority}
    batch = np.zeros((MAX_BATCH, 1))
    for _ in range(options.rounds):
        direct.append(direct_rate(Device(PER_CALL, PER_ROW, overshoot=overshoot), batch, options.seconds / 2))
        for priority, rounds in trials.items():
            rounds.append(run_on(loop, _trial(options, priority, callers, overshoot)))
    report.add({"loop": loop, "callers": callers, "class": "engine directly"}, "rate", "rows/s", direct, "higher")
    for priority, rounds in trials.items():
        labels: dict[str, Label] = {"loop": loop, "callers": callers, "class": priority.name}
        rates = [trial.closed.rate for trial in rounds]
        report.add(labels, "rate", "rows/s", rates, "higher")
        share = report.add(labels, "of direct", "", paired_ratios(rates, direct), "higher")
        for percent in (50, 99):
            latencies = [percentile(trial.closed.latencies, percent) * 1e3 for trial in rounds]
            report.add(labels, f"p{percent}", "ms", latencies, "lower")
        report.add(labels, "mean batch", "rows", [trial.mean_batch for trial in rounds])
        blocks = [trial.closed.longest_block * 1e3 for trial in rounds]
        report.add(labels, "longest block", "ms", blocks, "lower")
        if callers in LIMITS:
            name = f"serial, {loop}, {callers} callers, {priority.name}, share of the direct engine"
            report.at_least(name, share.value, LIMITS[callers])


async def _trial(options: Options, priority: Priority, callers: int, overshoot: float) -> _Trial:
    device = Device(PER_CALL, PER_ROW, overshoot=overshoot)
    row = np.zeros((1, 1))
    async with Scheduler([device.engine(1)], batch=BatchPolicy(max_batch_size=MAX_BATCH)) as scheduler:
        infer = scheduler.infer

        async def caller(_index: int, stamps: list[float], flag: Flag) -> None:
            while flag.running:
                response = await infer(row, priority=priority, timeout=TIMEOUT)
                _ = response.output
                stamps.append(time.perf_counter())

        closed = await closed_loop(caller, callers, warmup=options.warmup, seconds=options.seconds)
        figures = scheduler.statistics()
    return _Trial(closed, figures.rows / max(figures.calls, 1))
