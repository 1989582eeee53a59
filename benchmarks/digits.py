"""Suite `digits`: a real, very fast model, where the scheduler's own cost shows.

Closed loops of 1, 32 and 256 callers with everything on (class, timeout, response object), against the engine called
directly and against other batchers, interleaved in one process. A lone caller is compared by latency. What the peers
are lives in peers.py.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from benchmarks.devices import WatchedOnnxEngine, direct_rate, open_digits, random_rows
from benchmarks.load import Caller, Closed, Flag, closed_loop
from benchmarks.loops import run_on
from benchmarks.peers import PEERS, open_peer
from benchmarks.report import Label, Report
from benchmarks.stats import median, paired_ratios, percentile
from kapsl_scheduler import BatchPolicy, Priority, Scheduler
from kapsl_scheduler.types import Array

__all__ = ["Options", "run"]

MAX_BATCH: Final = 32
OURS: Final = "kapsl"
OWN_THREAD: Final = "kapsl, own thread"
DIRECT: Final = "engine directly"
HOP: Final = "thread hop"
CROWD: Final = 256
TIMEOUT: Final = 30.0  # seconds: a deadline that no stall of a busy machine reaches
ON_LOOP: Final = 0.9  # of the calls: then the lone caller is held to the target for the loop's thread


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` and `warmup` are per trial."""

    model: Path
    loops: Sequence[str] = ("uvloop", "asyncio")
    callers: Sequence[int] = (1, 32, 256)
    peers: Sequence[str] = tuple(PEERS)
    rounds: int = 3
    seconds: float = 2.0
    warmup: float = 0.5


class _Trial(msgspec.Struct):
    """One contender, once: requests per second, the rest in seconds; rows per call, the share of calls on the loop."""

    rate: float
    p50: float = math.nan
    p99: float = math.nan
    longest_block: float = math.nan
    batch_rows: float = math.nan
    loop_share: float = math.nan

    @classmethod
    def of(cls, closed: Closed, batch_rows: float = math.nan, loop_share: float = math.nan) -> _Trial:
        p50, p99 = (percentile(closed.latencies, percent) for percent in (50, 99))
        return cls(closed.rate, p50, p99, closed.longest_block, batch_rows, loop_share)


def run(options: Options) -> Report:
    """All contenders in turn, round after round, for each loop and number of callers."""
    report = Report.begin("digits", _settings(options))
    function = open_digits(options.model)
    for loop in options.loops:
        for callers in options.callers:
            _crowd(report, options, function, loop, callers)
    if absent := [name for name in PEERS if name not in options.peers]:
        report.notes.append(f"Not measured: {', '.join(absent)}.")
    report.notes.append(
        f"Ratios are medians of the rounds' own ratios. Peers marked tuned wait for nobody and block the loop with "
        f"the engine; the others wait at most 2 ms. Batches of at most {MAX_BATCH} rows on both sides."
    )
    return report


def _settings(options: Options) -> dict[str, Label | list[Label]]:
    return {
        "rounds": options.rounds,
        "seconds": options.seconds,
        "max batch": MAX_BATCH,
        "peers": list(options.peers),
    }


# ------------------------------------------------------------------------------------------------ contenders


@asynccontextmanager
async def _our_callers(engine: WatchedOnnxEngine, rows: Array) -> AsyncIterator[tuple[Scheduler, Caller]]:
    requests = [rows[index : index + 1] for index in range(len(rows))]
    async with Scheduler([engine], batch=BatchPolicy(max_batch_size=MAX_BATCH)) as scheduler:
        infer = scheduler.infer

        async def caller(index: int, stamps: list[float], flag: Flag) -> None:
            request = requests[index]
            while flag.running:
                response = await infer(request, priority=Priority.LATENCY_CRITICAL, timeout=TIMEOUT)
                _ = response.output
                stamps.append(time.perf_counter())

        yield scheduler, caller


async def _ours(engine: WatchedOnnxEngine, rows: Array, expected: Array, options: Options) -> _Trial:
    async with _our_callers(engine, rows) as (scheduler, caller):
        answers = await scheduler.infer_many([row[None] for row in rows], timeout=TIMEOUT)
        _check([answer.output[0] for answer in answers], expected)
        engine.forget_calls()
        closed = await closed_loop(caller, len(rows), warmup=options.warmup, seconds=options.seconds)
        figures = scheduler.statistics()
    return _Trial.of(closed, figures.rows / max(figures.calls, 1), engine.loop_share)


async def _theirs(
    peer_name: str, function: Callable[[Array], Array], rows: Array, expected: Array, options: Options
) -> _Trial:
    peer = open_peer(peer_name, function, max_batch=MAX_BATCH)
    call = peer.call

    async def caller(index: int, stamps: list[float], flag: Flag) -> None:
        row = rows[index]
        while flag.running:
            await call(row)
            stamps.append(time.perf_counter())

    try:
        _check(await asyncio.gather(*(call(row) for row in rows)), expected)
        closed = await closed_loop(caller, len(rows), warmup=options.warmup, seconds=options.seconds)
    finally:
        await peer.close()
    return _Trial.of(closed)


def _check(answers: Sequence[Array], expected: Array) -> None:
    """A batcher that mixes up its callers' answers has no figures."""
    if not np.allclose(np.stack(answers), expected, atol=1e-5):
        raise AssertionError("answers differ from the engine's own")


def _directly(function: Callable[[Array], Array], rows: Array, options: Options) -> _Trial:
    """The engine in a plain loop: on full batches, or call by call on one row for the lone caller."""
    if len(rows) > 1:
        batch = np.ascontiguousarray(np.resize(rows, (MAX_BATCH, rows.shape[1])))
        direct_rate(function, batch, options.warmup)
        return _Trial(direct_rate(function, batch, options.seconds), batch_rows=MAX_BATCH)
    stamps = [time.perf_counter()]
    stop = stamps[0] + options.seconds
    while stamps[-1] < stop:
        function(rows)
        stamps.append(time.perf_counter())
    latencies = [after - before for before, after in itertools.pairwise(stamps)]
    return _Trial.of(Closed(len(latencies) / sum(latencies), latencies, math.nan), 1)


async def _hop(options: Options) -> _Trial:
    """There and back: a lock wakes a thread, `call_soon_threadsafe` wakes the loop. Nothing else."""
    loop = asyncio.get_running_loop()
    there = threading.Lock()
    there.acquire()
    waiting: list[asyncio.Future[None]] = []
    flag = Flag()

    def thread() -> None:
        while True:
            there.acquire()
            if not flag.running:
                return
            loop.call_soon_threadsafe(waiting.pop().set_result, None)

    async def caller(_index: int, stamps: list[float], own: Flag) -> None:
        while own.running:
            future = loop.create_future()
            waiting.append(future)
            there.release()
            await future
            stamps.append(time.perf_counter())

    worker = threading.Thread(target=thread, daemon=True)
    worker.start()
    closed = await closed_loop(caller, 1, warmup=options.warmup, seconds=options.seconds)
    flag.running = False
    there.release()
    worker.join()
    return _Trial.of(closed)


# ----------------------------------------------------------------------------------------------------- trials


def _crowd(report: Report, options: Options, function: Callable[[Array], Array], loop: str, callers: int) -> None:
    """One loop, one number of callers: every contender once per round, then the figures."""
    rows = random_rows(callers)
    expected = function(rows)

    def ours(*, own_thread: bool) -> _Trial:
        engine = WatchedOnnxEngine(options.model, own_thread=own_thread)
        return run_on(loop, _ours(engine, rows, expected, options))

    contenders: dict[str, Callable[[], _Trial]] = {
        DIRECT: lambda: _directly(function, rows, options),
        OURS: lambda: ours(own_thread=False),
        OWN_THREAD: lambda: ours(own_thread=True),
    }
    if callers == 1:
        contenders[HOP] = lambda: run_on(loop, _hop(options))
    for peer in options.peers:
        contenders[peer] = lambda peer=peer: run_on(loop, _theirs(peer, function, rows, expected, options))  # type: ignore[misc]
    trials: dict[str, list[_Trial]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, trial in contenders.items():
            trials[name].append(trial())
    if callers == 1:
        _report_lone(report, loop, trials)
    else:
        _report_crowd(report, loop, callers, trials)


def _report_crowd(report: Report, loop: str, callers: int, trials: dict[str, list[_Trial]]) -> None:
    direct = [trial.rate for trial in trials[DIRECT]]
    for name, rounds in trials.items():
        labels: dict[str, Label] = {"loop": loop, "callers": callers, "contender": name}
        rates = [trial.rate for trial in rounds]
        report.add(labels, "rate", "requests/s", rates, "higher")
        report.add(labels, "of direct", "", paired_ratios(rates, direct), "higher")
        if name == DIRECT:
            continue
        report.add(labels, "p50", "ms", [t.p50 * 1e3 for t in rounds], "lower")
        report.add(labels, "p99", "ms", [t.p99 * 1e3 for t in rounds], "lower")
        report.add(labels, "longest block", "ms", [t.longest_block * 1e3 for t in rounds], "lower")
        if name in (OURS, OWN_THREAD):
            report.add(labels, "mean batch", "rows", [trial.batch_rows for trial in rounds])
            report.add(labels, "on loop", "of calls", [trial.loop_share for trial in rounds])
    _crowd_targets(report, loop, callers, [*trials])


def _crowd_targets(report: Report, loop: str, callers: int, names: Sequence[str]) -> None:
    """Against the best of the peers as recommended; beside it, with no target, against the best of all."""

    labels: dict[str, Label] = {"loop": loop, "callers": callers}

    def ratios_to_best(among: Sequence[str]) -> list[float]:
        rates = {name: report.find("rate", {**labels, "contender": name}).samples for name in among}
        best = max(rates.values(), key=median)
        return paired_ratios(ours.samples, best)

    ours = report.find("rate", {**labels, "contender": OURS})
    peers = [name for name in names if name in PEERS]
    recommended = [name for name in peers if PEERS[name].recommended]
    if recommended:
        over = report.add(labels, "over best peer", "x", ratios_to_best(recommended), "higher")
    if len(peers) > len(recommended):
        report.add(labels, "over best tuned peer", "x", ratios_to_best(peers), "higher")
    if callers != CROWD or loop != "uvloop":
        return
    share = report.find("of direct", {**labels, "contender": OURS}).value
    report.at_least(f"digits, {loop}, {callers} callers, share of the direct engine", share, 0.35)
    if recommended:
        name = f"digits, {loop}, {callers} callers, over the best in-process batcher"
        report.at_least(name, over.value, 3.5, "x")


def _report_lone(report: Report, loop: str, trials: dict[str, list[_Trial]]) -> None:
    """Medians of latencies in microseconds, and what comes on top of the direct call."""
    p50 = {name: [trial.p50 * 1e6 for trial in rounds] for name, rounds in trials.items()}
    for name, rounds in trials.items():
        labels: dict[str, Label] = {"loop": loop, "lone caller": name}
        p99 = [trial.p99 * 1e6 for trial in rounds]
        report.add(labels, "p50", "us", p50[name], "lower")
        report.add(labels, "p99", "us", p99, "lower")
        report.add(labels, "requests/s", "", [trial.rate for trial in rounds], "higher")
        if name not in (DIRECT, HOP):
            extra = [mine - direct for mine, direct in zip(p50[name], p50[DIRECT], strict=True)]
            report.add(labels, "above direct", "us", extra, "lower")
            report.add(labels, "above direct in hops", "", paired_ratios(extra, p50[HOP]), "lower")
        if name in (OURS, OWN_THREAD):
            report.add(labels, "on loop", "of calls", [trial.loop_share for trial in rounds])
    title = f"digits, {loop}, lone caller"
    above = "above the direct call"
    labels = {"loop": loop, "lone caller": OURS}
    if median([trial.loop_share for trial in trials[OURS]]) > ON_LOOP:
        report.at_most(f"{title} on the loop, {above}", report.find("above direct", labels).value, 25.0, "us")
    else:
        hops = report.find("above direct in hops", labels)
        report.at_most(f"{title} whose engine left the loop, {above}", hops.value, 2.0, "hops")
    threaded = report.find("above direct in hops", {**labels, "lone caller": OWN_THREAD})
    report.at_most(f"{title}, own thread, {above}", threaded.value, 2.0, "hops")
