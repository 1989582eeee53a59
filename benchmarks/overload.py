"""Suite `overload`: more requests with deadlines than the engine can serve.

A serial device of 5 ms, batches of 8, deadlines of 50 ms; open-loop arrivals, Poisson and bursty, at multiples of its
capacity. Goodput is what was answered within its deadline, counted from the intended arrival. The device sees every
row's deadline and counts rows that were due to expire when they were run.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np

from benchmarks.devices import Call, Device, calibrate_sleep, direct_rate
from benchmarks.load import Open, Times, bursty_arrivals, open_loop, poisson_arrivals
from benchmarks.loops import LoopWatch, run_on
from benchmarks.peers import PEERS, open_peer
from benchmarks.report import Label, Report
from benchmarks.stats import percentile
from kapsl_scheduler import (
    BatchPolicy,
    DeadlineExceeded,
    Overloaded,
    Priority,
    QueueOverflowPolicy,
    QueuePolicy,
    Scheduler,
)

__all__ = ["Options", "due_to_expire", "ideal_goodput", "run"]

PER_CALL: Final = 0.005
MAX_BATCH: Final = 8
DEADLINE: Final = 0.050
GRACE: Final = 0.001
"""Seconds allowed between the queue's decision and the device's own look at the clock: stacking, the interpreter."""
PEERS_UP_TO: Final = 2.0
"""Times the capacity: beyond it the other batchers only collect what they will never answer."""
LAG: Final = 0.005
"""Seconds: a case whose generator was later than that (p99) has offered less than it says."""
PATTERNS: Final[dict[str, Callable[[float, float, np.random.Generator], Times]]] = {
    "poisson": poisson_arrivals,
    "bursty": bursty_arrivals,
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`multiples` are of the capacity measured. Those of `peers` that run as recommended meet the same Poisson
    arrivals, from callers who give up at their deadline. `queue` is the queue's bound for `refuse_from` x and more,
    which refuses the newest; below, the queue has the library's default and only deadlines act."""

    loop: str = "uvloop"
    multiples: Sequence[float] = (0.5, 1.0, 1.5, 2.0, 10.0)
    patterns: Sequence[str] = ("poisson", "bursty")
    peers: Sequence[str] = ()
    queue: int = 48
    refuse_from: float = 10.0
    rounds: int = 3
    seconds: float = 5.0
    warmup: float = 1.0


class _Trial(msgspec.Struct):
    """Times in seconds, rates per second; of the arrivals after the warm-up only."""

    goodput: float
    ideal: float
    answered: list[float]
    refused: list[float]
    expired: list[float]
    late: int
    due_to_expire: int
    strictly: int
    lag: list[float]
    longest_block: float


def run(options: Options) -> Report:
    """Each pattern at each multiple, round after round."""
    overshoot = calibrate_sleep(PER_CALL)
    settings: dict[str, Label | list[Label]] = {
        "rounds": options.rounds,
        "seconds": options.seconds,
        "max batch": MAX_BATCH,
        "deadline ms": DEADLINE * 1e3,
        "bounded queue": options.queue,
        "refuses from": options.refuse_from,
    }
    report = Report.begin("overload", settings)
    cases = list(itertools.product(options.patterns, options.multiples))
    trials: dict[tuple[str, float], list[_Trial]] = {case: [] for case in cases}
    peers = [name for name in options.peers if PEERS[name].recommended]
    sane = [multiple for multiple in options.multiples if multiple <= PEERS_UP_TO]
    theirs: dict[tuple[str, float], list[_Answers]] = {case: [] for case in itertools.product(peers, sane)}
    capacities: list[float] = []
    for number in range(options.rounds):
        device = Device(PER_CALL, overshoot=overshoot)
        capacities.append(direct_rate(device, np.zeros((MAX_BATCH, 1)), 1.0))
        for (pattern, multiple), rounds in trials.items():
            rng = np.random.default_rng([number, round(multiple * 10)])
            length = options.warmup + options.seconds
            arrivals = PATTERNS[pattern](multiple * capacities[-1], length, rng)
            rounds.append(run_on(options.loop, _trial(options, arrivals, multiple, overshoot)))
        for (peer, multiple), answers in theirs.items():
            rng = np.random.default_rng([number, round(multiple * 10)])
            arrivals = poisson_arrivals(multiple * capacities[-1], options.warmup + options.seconds, rng)
            answers.append(run_on(options.loop, _peer_trial(options, peer, arrivals, overshoot)))
    report.add({"engine": "directly"}, "capacity", "rows/s", capacities, "higher")
    for (pattern, multiple), rounds in trials.items():
        _report_case(report, pattern, multiple, rounds, capacities)
        if percentile([lag for trial in rounds for lag in trial.lag], 99) > LAG:
            report.notes.append(f"{pattern} at {multiple:g}x: the generator fell behind; latencies include that.")
    for (peer, multiple), answers in theirs.items():
        labels: dict[str, Label] = {"arrivals": "poisson", "offered": f"{multiple:g}x", "peer": peer}
        pairs = zip(answers, capacities, strict=True)
        report.add(labels, "goodput", "of capacity", [each.goodput / c for each, c in pairs], "higher")
        for percent in (50, 99):
            values = [percentile(each.answered, percent) * 1e3 for each in answers]
            report.add(labels, f"answer p{percent}", "ms", values, "lower")
    report.notes.append(
        "ideal: the same arrivals through a server without any overhead that drops what is due to expire. "
        f"due to expire: rows run although their deadline lay before the end of their call by more than "
        f"{GRACE * 1e3:g} ms. Latencies count from the intended arrival; lag is the generator's own."
    )
    return report


def _report_case(
    report: Report, pattern: str, multiple: float, rounds: list[_Trial], capacities: Sequence[float]
) -> None:
    labels: dict[str, Label] = {"arrivals": pattern, "offered": f"{multiple:g}x"}
    title = f"overload, {pattern} at {multiple:g}x"
    pairs = list(zip(rounds, capacities, strict=True))
    goodput = report.add(labels, "goodput", "of capacity", [t.goodput / c for t, c in pairs], "higher")
    report.add(labels, "of ideal", "", [trial.goodput / trial.ideal for trial in rounds], "higher")
    report.add(labels, "answer p50", "ms", [percentile(t.answered, 50) * 1e3 for t in rounds], "lower")
    report.add(labels, "answer p99", "ms", [percentile(t.answered, 99) * 1e3 for t in rounds], "lower")
    due = report.add(labels, "due to expire run", "", [trial.due_to_expire for trial in rounds], "lower")
    report.add(labels, "with no grace", "", [trial.strictly for trial in rounds], "lower")
    report.add(labels, "answered late", "", [trial.late for trial in rounds], "lower")
    report.add(labels, "expired", "", [len(trial.expired) for trial in rounds])
    report.add(labels, "refused", "", [len(trial.refused) for trial in rounds])
    refusal = report.add(labels, "refusal p99", "ms", [percentile(t.refused, 99) * 1e3 for t in rounds], "lower")
    report.add(labels, "lag p99", "ms", [percentile(trial.lag, 99) * 1e3 for trial in rounds], "lower")
    report.add(labels, "longest block", "ms", [trial.longest_block * 1e3 for trial in rounds], "lower")
    if pattern == "poisson" and multiple == 2.0:
        report.at_least(f"{title}, goodput", goodput.value, 0.9, "of capacity")
    if multiple == 2.0:
        report.at_most(f"{title}, rows due to expire that were run", max(due.samples), 0)
    if pattern == "poisson" and multiple == 10.0:
        report.at_most(f"{title}, p99 time to a refusal", refusal.value, 5.0, "ms")


# ------------------------------------------------------------------------------------------------------ trial


async def _trial(options: Options, arrivals: Times, multiple: float, overshoot: float) -> _Trial:
    device = Device(PER_CALL, overshoot=overshoot)
    queue = QueuePolicy()
    if multiple >= options.refuse_from:
        queue = QueuePolicy(max_size=options.queue, overflow=QueueOverflowPolicy.DROP_NEWEST)
    batch = BatchPolicy(max_batch_size=MAX_BATCH)
    async with Scheduler([device.engine(1)], batch=batch, queue=queue) as scheduler:

        async def request(_index: int, intended: float) -> str:
            deadline = intended + DEADLINE
            left = deadline - time.perf_counter()
            if left <= 0:
                return "expired"
            try:
                row = np.array([[deadline]])
                await scheduler.infer(row, priority=Priority.LATENCY_CRITICAL, timeout=left)
            except DeadlineExceeded:
                return "expired"
            except Overloaded:
                return "refused"
            return "answered"

        started = time.perf_counter()
        with LoopWatch() as watch:
            result = await open_loop(request, arrivals)
    counted = _after(result, arrivals, options.warmup)
    calls = [call for call in device.calls if call.start >= started + options.warmup]
    answered = counted.of("answered")
    good = sum(latency <= DEADLINE for latency in answered)
    return _Trial(
        goodput=good / options.seconds,
        ideal=ideal_goodput(arrivals, options.warmup) / options.seconds,
        answered=answered,
        refused=counted.of("refused"),
        expired=counted.of("expired"),
        late=len(answered) - good,
        due_to_expire=due_to_expire(calls, PER_CALL, GRACE),
        strictly=due_to_expire(calls, PER_CALL, 0.0),
        lag=counted.lag,
        longest_block=watch.longest,
    )


class _Answers(msgspec.Struct):
    """What a peer's callers heard: answers in time per second, and the seconds to all of them."""

    goodput: float
    answered: list[float]


async def _peer_trial(options: Options, name: str, arrivals: Times, overshoot: float) -> _Answers:
    """Another batcher over the same device. It knows of no deadlines: its callers stop waiting at theirs. They do not
    cancel: a cancelled member takes the rest of its batch with it in some."""
    device = Device(PER_CALL, overshoot=overshoot)
    peer = open_peer(name, device, max_batch=MAX_BATCH, slow=True)
    asked: set[asyncio.Future[object]] = set()

    async def request(_index: int, intended: float) -> str:
        call = asyncio.ensure_future(peer.call(np.array([intended])))
        asked.add(call)
        await asyncio.wait({call}, timeout=max(intended + DEADLINE - time.perf_counter(), 0.0))
        return "answered" if call.done() else "expired"

    result = await open_loop(request, arrivals)
    # What was given up is still in its queue, and what it says about that is of no interest.
    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            await peer.close()
    for call in asked:
        call.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    answered = _after(result, arrivals, options.warmup).of("answered")
    return _Answers(sum(latency <= DEADLINE for latency in answered) / options.seconds, answered)


def _after(result: Open, arrivals: Times, warmup: float) -> Open:
    """The arrivals from `warmup` seconds on."""
    first = int(np.searchsorted(np.sort(arrivals), warmup))
    return Open(result.outcomes[first:], result.latencies[first:], result.lag[first:])


def due_to_expire(calls: Sequence[Call], call_seconds: float, grace: float) -> int:
    """Rows that were run although their deadline (their first column) came before the call could end."""
    return sum(int((call.rows[:, 0] + grace < call.start + call_seconds).sum()) for call in calls)


def ideal_goodput(arrivals: Times, warmup: float) -> int:
    """Answers in time to the arrivals after `warmup` from a server with no overhead at all.

    Whenever it is free it takes the oldest requests that it can still answer in time, up to a full batch.
    """
    good = index = 0
    now = 0.0
    times = [*map(float, np.sort(arrivals))]
    while index < len(times):
        now = max(now, times[index])
        while index < len(times) and times[index] + DEADLINE < now + PER_CALL:
            index += 1
        taken = 0
        while index < len(times) and taken < MAX_BATCH and times[index] <= now:
            good += times[index] >= warmup
            index += 1
            taken += 1
        now += PER_CALL if taken else 0.0
    return good
