"""What the dashboard shows of a server from second to second: the load of each model, and of the jobs as a whole.

A sample says what happened since the one before it. What is not here: how it gets to a browser
(`server.dashboard.live`), and the books themselves (`runtime.metrics`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import msgspec

from kapsl_scheduler.runtime.cron_scheduler import CronScheduler
from kapsl_scheduler.runtime.metrics import Durations, SchedulerStatistics, counts_of
from kapsl_scheduler.runtime.registry import ModelScheduler, ServedModel
from kapsl_scheduler.server.service import Service

__all__ = ["PERIOD", "ClassSample", "CronSample", "Kept", "ModelSample", "Sample", "Sampler"]

PERIOD: Final = 1.0
"""Seconds between samples."""
KEPT: Final = 300
"""Samples that are kept for who comes later."""
_EARLY: Final = 0.1 * PERIOD  # timers of several listeners are not exact
_GAP: Final = 3 * PERIOD  # without a sample: an average over it would say nothing of now


class ClassSample(msgspec.Struct, frozen=True):
    """One class of requests: queued now; answers a second and the seconds that they took (None without answers)."""

    queued: int
    rate: float | None
    p50: float | None
    p99: float | None


class ModelSample(msgspec.Struct, frozen=True):
    """One version of a model; `latest` is the one that answers where a request names none. Rates are of a second, None
    where there was no sample before. `refused` counts requests that were not served for lack of room or time, `failed`
    those that ended in another error. `busy` is the share of the slots' time that was spent in calls that ended,
    `batches` how many calls had so many rows."""

    name: str
    version: str
    latest: bool
    status: str
    ready: bool
    slots: int
    max_batch_size: int
    calls_in_flight: int
    waiting: int
    queued: int
    succeeded: int
    classes: Mapping[str, ClassSample]
    requests: float | None
    rows: float | None
    refused: float | None
    failed: float | None
    busy: float | None
    batches: Mapping[int, int]


class CronSample(msgspec.Struct, frozen=True):
    """The jobs together, as `CronStatistics` has them; `fired` is a rate."""

    jobs: int
    running: int
    waiting: int
    overdue: int
    fired: float | None
    store_failing: str | None


class Sample(msgspec.Struct, frozen=True):
    """A server at a moment (`at`: seconds since 1970). `cron` is None where there are no jobs."""

    at: float
    draining: bool
    in_flight: int
    models: tuple[ModelSample, ...]
    cron: CronSample | None


class Kept(NamedTuple):
    """A sample, by the number of which nobody is sent it twice."""

    number: int
    sample: Sample


class _Earlier(NamedTuple):
    """What a model's next sample is compared with."""

    scheduler: ModelScheduler
    statistics: SchedulerStatistics
    latencies: Mapping[str, list[int]]


class Sampler:
    """Takes samples when somebody looks, at most one each `PERIOD`, and keeps the last ones. `clock` is monotonic."""

    def __init__(
        self, service: Service, cron: CronScheduler | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._service = service
        self._cron = cron
        self._clock = clock
        self._kept: deque[Kept] = deque(maxlen=KEPT)
        self._taken = float("-inf")
        self._number = 0
        self._models: dict[tuple[str, str], _Earlier] = {}  # by name and version
        self._fired: int | None = None

    def latest(self) -> Kept:
        """The sample of this second."""
        now = self._clock()
        if now - self._taken >= PERIOD - _EARLY:
            self._number += 1
            self._kept.append(Kept(self._number, self._take(now)))
        return self._kept[-1]

    def history(self) -> tuple[Sample, ...]:
        """The samples that are kept, the oldest first."""
        return tuple(kept.sample for kept in self._kept)

    def _take(self, now: float) -> Sample:
        elapsed = now - self._taken
        if elapsed > _GAP:
            self._models, self._fired = {}, None
        self._taken = now
        earlier, self._models = self._models, {}
        models = tuple(self._model(model, earlier.get(_key(model)), elapsed) for model in self._service.registry.list())
        return Sample(time.time(), self._service.draining, self._service.in_flight, models, self._jobs(elapsed))

    def _model(self, model: ServedModel, earlier: _Earlier | None, elapsed: float) -> ModelSample:
        scheduler = model.scheduler
        now: SchedulerStatistics = scheduler.statistics()
        latencies = {name: counts_of(each.latency_counts) for name, each in now.classes.items()}
        self._models[_key(model)] = _Earlier(scheduler, now, latencies)
        if earlier is not None and earlier.scheduler is not scheduler:  # another one's counts have begun anew
            earlier = None
        then = None if earlier is None else earlier.statistics

        def rate(count: Callable[[SchedulerStatistics], float]) -> float | None:
            return None if then is None else (count(now) - count(then)) / elapsed

        before = {} if then is None else then.batch_sizes
        busy = rate(lambda books: books.busy_time)
        health = scheduler.health()
        return ModelSample(
            name=model.name,
            version=model.info.version,
            latest=self._service.registry.get(model.name) is model,
            status=health.status,
            ready=health.ready,
            slots=now.slots,
            max_batch_size=now.max_batch_size,
            calls_in_flight=now.calls_in_flight,
            waiting=now.waiting,
            queued=now.queued,
            succeeded=now.succeeded,
            classes={
                name: _class(figures.queued, counts, None if earlier is None else earlier.latencies[name], elapsed)
                for (name, figures), counts in zip(now.classes.items(), latencies.values(), strict=True)
            },
            requests=rate(lambda books: books.succeeded),
            rows=rate(lambda books: books.rows),
            refused=rate(lambda books: books.refused + books.evicted + books.expired),
            failed=rate(lambda books: books.failed + books.invalid),
            busy=None if busy is None else min(1.0, busy / max(1, now.slots)),
            batches={}
            if then is None
            else {size: new for size, count in now.batch_sizes.items() if (new := count - before.get(size, 0))},
        )

    def _jobs(self, elapsed: float) -> CronSample | None:
        if self._cron is None:
            return None
        now, before = self._cron.statistics(), self._fired
        self._fired = now.fired
        fired = None if before is None else (now.fired - before) / elapsed
        return CronSample(now.jobs, now.running, now.waiting, now.overdue, fired, now.store_failing)


def _key(model: ServedModel) -> tuple[str, str]:
    return model.name, model.info.version


def _class(queued: int, counts: list[int], before: list[int] | None, elapsed: float) -> ClassSample:
    if before is None:
        return ClassSample(queued, None, None, None)
    new = Durations()
    new.counts = [now - then for now, then in zip(counts, before, strict=True)]
    return ClassSample(queued, new.count / elapsed, new.percentile(50), new.percentile(99))
