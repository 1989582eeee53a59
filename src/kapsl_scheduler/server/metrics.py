"""`/metrics`: the figures of the server as Prometheus and OpenMetrics read them.

The counters of each part of the server are read when somebody asks; nothing is counted twice. What is not here: the
counting (`runtime.cron_metrics`), and the figures of models (`server.metrics_models`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import GCCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from kapsl_scheduler.runtime.cron_metrics import OTHER_JOBS, CronFigures, CronStatistics, JobFigures
from kapsl_scheduler.runtime.cron_scheduler import CronScheduler
from kapsl_scheduler.runtime.metrics import BOUNDS
from kapsl_scheduler.server.http_figures import HttpFigures
from kapsl_scheduler.server.metrics_models import FINE, ModelsCollector, figures_of, histogram, server_figures
from kapsl_scheduler.server.metrics_triton import CONTENT_TYPE, triton_page
from kapsl_scheduler.server.service import Service

__all__ = ["Metrics"]

_COARSE: Final = BOUNDS[28:96:12]
"""Where those of one job do: 1.3 ms, 10 ms, 82 ms, 0.66 s, 5.2 s, 42 s. Each bucket costs 400 lines at 200 jobs, which
every scrape makes, sends and stores; to tell in time from late, and short from long, a few will do."""
_MOST_OUTCOMES: Final = 50
"""Outcomes of one job that have a series of their own: a reason may be a word of somebody's own error."""
_OTHER: Final = "(other)"


class Metrics:
    """All figures of one server. `connections` says how many HTTP connections are open; `http` is what the server's
    HTTP parts count in."""

    def __init__(
        self, service: Service, cron: CronScheduler | None = None, *, connections: Callable[[], int] | None = None
    ) -> None:
        self.http = HttpFigures()
        self._service = service
        self._cron = cron
        self._connections = connections
        # What they say is read anew each time they are collected.
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        GCCollector(registry=self._process)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The figures as of now in the format that an `Accept` header asks for, and its content type. They are read
        here and written beside the loop: for 200 jobs, or as many models, that takes some 20 milliseconds."""
        try:
            encode, kind = choose_encoder(accept)
        except (TypeError, ValueError):  # it asks for a version that is none
            encode, kind = choose_encoder("")
        service = self._service
        connections = None if self._connections is None else self._connections()
        exemplars = {} if service.tracing is None else service.tracing.exemplars()
        registry = CollectorRegistry()
        registry.register(_BuildCollector(service.version))
        registry.register(
            ModelsCollector(server_figures(service, self.http, connections), figures_of(service), exemplars)
        )
        if self._cron is not None:
            registry.register(_CronCollector(self._cron.statistics(), self._cron.figures.copy()))
        registry.register(self._process)
        return await asyncio.to_thread(encode, registry), kind

    def render_triton(self) -> tuple[bytes, str]:
        """Those of the models under Triton's names, and the content type."""
        return triton_page(figures_of(self._service)), CONTENT_TYPE


class _BuildCollector(Collector):
    def __init__(self, version: str) -> None:
        self._version = version

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("kapsl_build_info", "The version that runs.", labels=["version"])
        build.add_metric([self._version], 1)
        yield build


class _CronCollector(Collector):
    """Jobs as they were at a moment: nothing of it changes any more."""

    def __init__(self, statistics: CronStatistics, figures: CronFigures) -> None:
        self._statistics = statistics
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        now, figures = self._statistics, self._figures
        yield GaugeMetricFamily("kapsl_cron_jobs", "Jobs that are known.", value=now.jobs)
        yield GaugeMetricFamily("kapsl_cron_running", "Runs in progress.", value=now.running)
        yield GaugeMetricFamily("kapsl_cron_waiting", "Runs that wait for one of the places to run.", value=now.waiting)
        yield GaugeMetricFamily(
            "kapsl_cron_overdue",
            "Jobs whose time has come and whose firing has not been decided.",
            value=now.overdue,
        )
        yield GaugeMetricFamily(
            "kapsl_cron_store_up", "Whether the store can be written to.", value=now.store_failing is None
        )
        total = figures.total()
        yield CounterMetricFamily("kapsl_cron_fired", "Runs that were dispatched.", value=now.fired)
        yield _ended(total)
        lateness, duration = "From when a run was due to its start.", "From the start of a run to its end."
        yield histogram("kapsl_cron_lateness_seconds", lateness, (), {(): total.lateness}, FINE)
        yield histogram("kapsl_cron_duration_seconds", duration, (), {(): total.duration}, FINE)

        # What jobs have done that are gone is in the figures of all only: a series that took it over would jump, and
        # count it again for whoever asks how much was added of late.
        by_job = {(job,): each for job, each in (figures.of_job | {OTHER_JOBS: figures.others}).items()}
        yield _outcomes(by_job)
        for name, text, of in (
            ("lateness", lateness, {job: each.lateness for job, each in by_job.items()}),
            ("duration", duration, {job: each.duration for job, each in by_job.items()}),
        ):
            yield histogram(f"kapsl_cron_job_{name}_seconds", text, ("cron_job",), of, _COARSE)
        overdue = GaugeMetricFamily(
            "kapsl_cron_job_overdue_seconds",
            "Seconds since a job's time came whose firing has not been decided.",
            labels=["cron_job"],
        )
        for job in by_job | dict.fromkeys((job,) for job in now.overdue_by_job):
            overdue.add_metric(job, now.overdue_by_job.get(job[0], 0.0))
        yield overdue


def _ended(total: JobFigures) -> CounterMetricFamily:
    ended = CounterMetricFamily("kapsl_cron_ended", "Occurrences of all jobs by how they ended.", labels=["state"])
    counts: Counter[str] = Counter()
    for (state, _), count in total.outcomes.items():
        counts[state] += count
    for state, count in counts.items():
        ended.add_metric([state], count)
    return ended


def _outcomes(by_job: Mapping[tuple[str], JobFigures]) -> CounterMetricFamily:
    outcomes = CounterMetricFamily(
        "kapsl_cron_outcomes", "Occurrences of a job by how they ended and why.", labels=["cron_job", "state", "reason"]
    )
    for job, each in by_job.items():
        for outcome, count in _bounded(each.outcomes).items():
            outcomes.add_metric(job + outcome, count)
    return outcomes


def _bounded(counts: Mapping[tuple[str, str], int]) -> Mapping[tuple[str, str], int]:
    if len(counts) <= _MOST_OUTCOMES:
        return counts
    kept: Counter[tuple[str, str]] = Counter()
    for number, ((state, reason), count) in enumerate(counts.items()):
        kept[state, reason if number < _MOST_OUTCOMES else _OTHER] += count
    return kept
