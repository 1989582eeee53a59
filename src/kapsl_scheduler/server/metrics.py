"""`/metrics`: the figures of the server as Prometheus and OpenMetrics read them.

Each part of the server has a collector that reads its counters when somebody asks; nothing is counted twice. What is
not here: the counting (`runtime.cron_metrics`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from kapsl_scheduler.runtime.cron_scheduler import CronScheduler
from kapsl_scheduler.runtime.metrics import BOUNDS, Histogram

__all__ = ["Metrics"]

_STEP: Final = 4
"""Buckets of a histogram that share one here, which ends at twice the seconds of the one before."""
_MOST_OUTCOMES: Final = 50
"""Outcomes of one job that have a series of their own: a reason may be a word of somebody's own error."""
_OTHER: Final = "(other)"


class Metrics:
    """All collectors of one server."""

    def __init__(self, version: str, cron: CronScheduler | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_BuildCollector(version))
        if cron is not None:
            self._registry.register(_CronCollector(cron))

    def render(self, accept: str) -> tuple[bytes, str]:
        """The figures as of now in the format that an `Accept` header asks for, and its content type."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind


class _BuildCollector(Collector):
    def __init__(self, version: str) -> None:
        self._version = version

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("kapsl_build_info", "The version that runs.", labels=["version"])
        build.add_metric([self._version], 1)
        yield build


class _CronCollector(Collector):
    def __init__(self, cron: CronScheduler) -> None:
        self._cron = cron

    def collect(self) -> Iterator[Metric]:
        now, figures = self._cron.statistics(), self._cron.figures
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
        yield CounterMetricFamily("kapsl_cron_fired", "Runs that were dispatched.", value=now.fired)
        outcomes = CounterMetricFamily(
            "kapsl_cron_outcomes", "Occurrences by how they ended and why.", labels=["job", "state", "reason"]
        )
        for job, counts in now.outcomes_by_job.items():
            for (state, reason), count in _bounded(counts).items():
                outcomes.add_metric([job, state, reason], count)
        yield outcomes
        yield _histogram("kapsl_cron_lateness_seconds", "From when a run was due to its start.", figures.lateness)
        yield _histogram("kapsl_cron_duration_seconds", "From the start of a run to its end.", figures.duration)


def _bounded(counts: Mapping[tuple[str, str], int]) -> Mapping[tuple[str, str], int]:
    if len(counts) <= _MOST_OUTCOMES:
        return counts
    kept: Counter[tuple[str, str]] = Counter()
    for number, ((state, reason), count) in enumerate(counts.items()):
        kept[state, reason if number < _MOST_OUTCOMES else _OTHER] += count
    return kept


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    counts = histogram.counts
    buckets = []
    below = start = 0
    for end in range(0, len(BOUNDS), _STEP):
        below += sum(counts[start : end + 1])
        buckets.append((f"{BOUNDS[end]:.10g}", below))
        start = end + 1
    buckets.append(("+Inf", below + sum(counts[start:])))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.total)
