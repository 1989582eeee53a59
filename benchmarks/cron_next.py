"""Suite `cron-next`: next occurrences a second of cron expressions of every kind, the worst cases, memory.

Each contender goes through one kind of expression from the same start, each answer being the next question. APScheduler
3 (the extra `dev` has it) is asked for the same times with its own trigger; where the answers differ the suite fails.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib import util
from itertools import count
from typing import Any, Final
from zoneinfo import ZoneInfo

import msgspec

from benchmarks.report import Label, Report
from kapsl_scheduler.core.cron import CronExpression
from kapsl_scheduler.core.cron_zones import Zone

__all__ = ["Options", "run"]

START: Final = datetime(2026, 1, 1, tzinfo=UTC)
STEPS: Final = 2_000  # of one repeat
PEER_STEPS: Final = 50
ORDINARY: Final[dict[str, tuple[str, str, dict[str, str]]]] = {
    "every 15 seconds": ("*/15 * * * * *", "UTC", {"second": "*/15"}),
    "every minute": ("0 * * * * *", "UTC", {"second": "0"}),
    "working hours": (
        "0 */5 9-17 * * MON-FRI",
        "UTC",
        {"second": "0", "minute": "*/5", "hour": "9-17", "day_of_week": "0-4"},
    ),
    "daily": ("0 0 9 * * *", "UTC", {"second": "0", "minute": "0", "hour": "9"}),
    "monthly": ("0 0 0 1 * *", "UTC", {"second": "0", "minute": "0", "hour": "0", "day": "1"}),
    "daily in Berlin": ("0 0 9 * * *", "Europe/Berlin", {"second": "0", "minute": "0", "hour": "9"}),
    "every 5 minutes in New York": ("0 */5 * * * *", "America/New_York", {"second": "0", "minute": "*/5"}),
}
"""By kind: the expression, its zone, and APScheduler's fields for it."""
WORST: Final[dict[str, tuple[str, str, bool]]] = {
    "once in decades": ("0 0 0 29 2 SUN", "UTC", False),
    "never": ("0 0 0 30 2 *", "UTC", False),
    "never in a zone": ("0 0 0 30 2 *", "Asia/Gaza", False),
    "in years gone by": ("* * * * * * 1970", "Europe/Berlin", False),
    "only in gaps": ("* * 2 8-14 3 SUN", "America/New_York", False),
    "only in gaps, literal": ("0 30 2 8-14 3 SUN", "America/New_York", True),
}
"""By kind: the expression, its zone, whether it is literal."""
JOBS: Final = 10_000


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`repeats` per round; the fastest of a round counts, since all that can happen to it is to be disturbed."""

    rounds: int = 5
    repeats: int = 20


def run(options: Options) -> Report:
    """Every kind and every contender, round after round."""
    settings: dict[str, Label | list[Label]] = {"rounds": options.rounds, "steps": STEPS}
    report = Report.begin("cron-next", settings)
    peer = util.find_spec("apscheduler") is not None
    if not peer:
        report.notes.append("without APScheduler 3: install the extra `dev`")
    for kind, (text, zone, fields) in ORDINARY.items():
        expression = CronExpression(text, zone)
        contenders: dict[str, Callable[[], float]] = {
            "next_us": lambda one=expression: _microseconds(one),  # type: ignore[misc]
            "next": lambda one=expression: _datetimes(one),  # type: ignore[misc]
        }
        if peer:
            trigger = _trigger(fields, zone)
            _check(expression, trigger)
            contenders["APScheduler 3"] = lambda one=trigger: _peer(one)  # type: ignore[misc]
        rates = _rates(options, contenders)
        for name, samples in rates.items():
            report.add({"kind": kind, "contender": name}, "rate", "next/s", samples, "higher")
        slowest = min(*rates["next_us"], *rates["next"])
        report.at_least(f"{kind}: next a second", slowest, 100_000)
        if peer:
            ratios = [ours / theirs for ours, theirs in zip(rates["next"], rates["APScheduler 3"], strict=True)]
            report.add({"kind": kind, "contender": "next"}, "over APScheduler 3", "x", ratios, "higher")
    worst = 0.0
    for kind, (text, zone, literal) in WORST.items():
        samples = [_worst(CronExpression(text, zone, literal=literal)) for _ in range(options.rounds)]
        worst = max(worst, *samples)
        report.add({"kind": kind}, "worst", "ms", samples, "lower")
    report.at_most("the worst case of next", worst, 10, "ms")
    tables = [_table() for _ in range(options.rounds)]
    report.add({"kind": "a zone's table, once per zone and process"}, "worst", "ms", tables, "lower")
    report.add({"kind": f"{JOBS:,} different expressions in one zone"}, "memory", "bytes each", [_memory()], "lower")
    return report


def _rates(options: Options, contenders: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, contender in contenders.items():
            gc.collect()
            rates[name].append(max(contender() for _ in range(options.repeats)))
    return rates


# ---------------------------------------------------------------------------------------------------- contenders
# Each returns next occurrences a second.


def _microseconds(expression: CronExpression) -> float:
    at: int | None = int(START.timestamp()) * 1_000_000
    start = time.perf_counter()
    for _ in range(STEPS):
        at = expression.next_us(at or 0)
    return STEPS / (time.perf_counter() - start)


def _datetimes(expression: CronExpression) -> float:
    at: datetime | None = START
    start = time.perf_counter()
    for _ in range(STEPS):
        at = expression.next(at or START)
    return STEPS / (time.perf_counter() - start)


def _peer(trigger: Any) -> float:
    at, moment = START, timedelta(microseconds=1)
    start = time.perf_counter()
    for _ in range(PEER_STEPS):
        at = trigger.get_next_fire_time(None, at + moment)
    return PEER_STEPS / (time.perf_counter() - start)


def _trigger(fields: dict[str, str], zone: str) -> Any:
    from apscheduler.triggers.cron import CronTrigger

    return CronTrigger(**fields, timezone=UTC if zone == "UTC" else ZoneInfo(zone))


def _check(expression: CronExpression, trigger: Any) -> None:
    at: datetime | None = START
    for _ in range(50):
        assert at is not None
        expected = trigger.get_next_fire_time(None, at + timedelta(microseconds=1))
        at = expression.next(at)
        if at != expected:
            raise AssertionError(f"{expression!r}: {at}, APScheduler {expected}")


# ---------------------------------------------------------------------------------------------------- extremes


def _worst(expression: CronExpression) -> float:
    """Milliseconds of the slowest of a few questions, each of an earlier year: what was found for later days does
    not help then."""
    slowest = 0.0
    for year in (2089, 2061, 2007, 1970):
        at = int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
        start = time.perf_counter()
        expression.next_us(at)
        slowest = max(slowest, time.perf_counter() - start)
    return slowest * 1e3


def _table() -> float:
    start = time.perf_counter()
    Zone(ZoneInfo("Europe/Berlin"))
    return (time.perf_counter() - start) * 1e3


def _memory() -> float:
    CronExpression("@daily", "Europe/Berlin")  # the zone's table is there already
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    number = count()
    kept = [
        CronExpression(f"{(index := next(number)) % 60} {index // 60 % 60} {index // 3600} * * *", "Europe/Berlin")
        for _ in range(JOBS)
    ]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / len(kept)
