"""Suite `queue10k`: 10,000 requests queued on a slow engine.

The engine is held, the queue filled to its bound and beyond, then everything is answered; several times over. Calls in
flight must never exceed the slots, the overflow must begin exactly at the bound, and memory must stay flat.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from benchmarks.devices import Device
from benchmarks.loops import run_on
from benchmarks.report import Label, Report
from kapsl_scheduler import (
    BatchPolicy,
    InferenceResponse,
    Overloaded,
    Priority,
    QueueOverflowPolicy,
    QueuePolicy,
    Scheduler,
)
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.types import Array

__all__ = ["Options", "run"]

BOUND: Final = 10_000
BEYOND: Final = 500
PER_CALL: Final = 0.002
FLAT_MB: Final = 4.0
ENTRY: Final = 30.0  # seconds


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`slots` is the engine's number of slots; the first cycle is the warm-up of the allocator."""

    loops: Sequence[str] = ("uvloop", "asyncio")
    slots: int = 2
    cycles: int = 6


class _Cycle(msgspec.Struct):
    """One filling: how many were refused and how many the queue held then; seconds and resident MB after it."""

    queued: int
    refused: int
    answered: int
    fill_seconds: float
    drain_seconds: float
    resident_mb: float


class _Gate:
    """A slow device that can be held shut: then its calls wait inside, in flight, each having released `entered`."""

    def __init__(self) -> None:
        self.device = Device(PER_CALL)
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.open.set()

    def __call__(self, rows: Array) -> Array:
        if not self.open.is_set():
            self.entered.release()
            self.open.wait()
        return self.device(rows)

    def engine(self) -> CallableEngine:
        return CallableEngine(self, name="gate", inputs={"row": ("float64", (None, 1))})


def run(options: Options) -> Report:
    """Several cycles on each loop."""
    settings: dict[str, Label | list[Label]] = {"bound": BOUND, "slots": options.slots, "cycles": options.cycles}
    report = Report.begin("queue10k", settings)
    for loop in options.loops:
        gate = _Gate()
        cycles = run_on(loop, _cycles(gate, options))
        _report_loop(report, options, loop, gate, cycles)
    return report


def _report_loop(report: Report, options: Options, loop: str, gate: _Gate, cycles: list[_Cycle]) -> None:
    labels: dict[str, Label] = {"loop": loop}
    report.add(labels, "queued", "", [cycle.queued for cycle in cycles])
    report.add(labels, "refused", "", [cycle.refused for cycle in cycles])
    report.add(labels, "answered", "", [cycle.answered for cycle in cycles])
    report.add(labels, "fill", "us/request", [c.fill_seconds / c.queued * 1e6 for c in cycles], "lower")
    report.add(labels, "drain", "rows/s", [c.answered / c.drain_seconds for c in cycles], "higher")
    resident = [cycle.resident_mb for cycle in cycles]
    report.add(labels, "resident", "MB", resident, "lower")
    in_flight = report.add(labels, "most calls at once", "", [gate.device.most_at_once])
    report.at_most(f"queue10k, {loop}, calls in flight", in_flight.value, options.slots)
    exact = {"queued when full": BOUND, "refused beyond the bound": BEYOND, "answered": BOUND + options.slots}
    for name, expected in exact.items():
        counts = report.find(name.split()[0], labels).samples
        worst = max(counts, key=lambda count: abs(count - expected))
        report.exactly(f"queue10k, {loop}, {name}", worst, expected)
    if len(resident) > 2:
        growth = resident[-1] - resident[1]
        report.add(labels, "growth after the second cycle", "MB", [growth], "lower")
        report.at_most(f"queue10k, {loop}, memory growth after the second cycle", growth, FLAT_MB, "MB")


async def _cycles(gate: _Gate, options: Options) -> list[_Cycle]:
    policy = QueuePolicy(max_size=BOUND, overflow=QueueOverflowPolicy.DROP_NEWEST)
    scheduler = Scheduler(
        [gate.engine()], batch=BatchPolicy(max_batch_size=32), queue=policy, workers_per_engine=options.slots
    )
    async with scheduler:
        return [await _cycle(gate, scheduler, options.slots) for _ in range(options.cycles)]


async def _cycle(gate: _Gate, scheduler: Scheduler, slots: int) -> _Cycle:
    """Hold the engine, fill every slot, fill the queue, go beyond its bound, let go."""
    gate.open.clear()
    gate.device.calls.clear()
    tasks: list[asyncio.Task[InferenceResponse | Overloaded]] = []
    for _ in range(slots):
        tasks.append(asyncio.create_task(_ask(scheduler)))
        if not await asyncio.to_thread(gate.entered.acquire, True, ENTRY):
            raise AssertionError(f"a slot did not start its call within {ENTRY} s")
    start = time.perf_counter()
    tasks += [asyncio.create_task(_ask(scheduler)) for _ in range(BOUND + BEYOND)]
    await asyncio.sleep(0)
    filled = time.perf_counter()
    queued = scheduler.statistics().queued
    gate.open.set()
    outcomes = await asyncio.gather(*tasks)
    stop = time.perf_counter()
    refused = sum(isinstance(outcome, Overloaded) for outcome in outcomes)
    answered = len(outcomes) - refused
    del tasks, outcomes
    return _Cycle(queued, refused, answered, filled - start, stop - filled, _resident_mb())


async def _ask(scheduler: Scheduler) -> InferenceResponse | Overloaded:
    try:
        return await scheduler.infer(np.zeros((1, 1)), priority=Priority.THROUGHPUT)
    except Overloaded as refusal:
        return refusal


def _resident_mb() -> float:
    """Resident memory of this process, garbage collected; NaN where /proc is missing."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
