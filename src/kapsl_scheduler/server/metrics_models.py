"""The figures of the models and of the process around them, for `/metrics`.

`figures_of` reads the counters of every model at one moment, on the loop; the collector writes them in whatever thread.
What is not here: the counting (`runtime.metrics`, `server.service`), the figures of jobs (`server.metrics`), and
Triton's names (`server.metrics_triton`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from kapsl_scheduler.runtime.metrics import BOUNDS, Latencies, counts_of
from kapsl_scheduler.server.http_figures import HttpFigures
from kapsl_scheduler.server.service import Service

__all__ = ["FINE", "ModelFigures", "ModelsCollector", "ServerFigures", "figures_of", "histogram", "server_figures"]

FINE: Final = BOUNDS[::4]
"""Where the buckets of a histogram end: each at twice the seconds of the one before, from 10 us to 84 s."""
_OUTCOMES: Final = ("succeeded", "failed", "expired", "cancelled", "evicted", "refused", "invalid", "withdrawn")

_Labels = TypeVar("_Labels", bound=tuple[str, ...])

Exemplars = Mapping[tuple[str, str, str], Mapping[int, Exemplar]]
"""By model, version and class: of a bucket (an index of `BOUNDS`), the last traced answer that fell into it."""


class Counts(Protocol):
    """A histogram over `BOUNDS`."""

    @property
    def counts(self) -> Sequence[int]: ...
    @property
    def total(self) -> float: ...


class ModelFigures(NamedTuple):
    """One model as it was at a moment."""

    name: str
    version: str
    statistics: Any
    latencies: Mapping[str, Counts]
    ready: bool
    engines: Mapping[str, bool]
    answers: Mapping[int, int]
    success: int
    fail: int
    success_ns: int
    queue_ns: int
    compute_ns: int
    read_ns: int
    write_ns: int

    @property
    def labels(self) -> tuple[str, str]:
        """What its series have in common; versions of a model stand side by side."""
        return self.name, self.version


class ServerFigures(NamedTuple):
    """What is around the models, as it was at a moment. `connections` is None where nobody counts them."""

    ready: bool
    draining: bool
    in_flight: int
    max_in_flight: int
    refused: int
    connections: int | None
    answers: Mapping[tuple[str, str, int], int]


def figures_of(service: Service) -> list[ModelFigures]:
    """Every model's, as of now. To be called on the loop."""
    found = []
    for model in service.registry.list():
        health, figures = model.scheduler.health(), service.figures_of(model)
        statistics = model.scheduler.statistics()
        found.append(
            ModelFigures(
                name=model.name,
                version=model.info.version,
                statistics=statistics,
                latencies={
                    name: Latencies(counts_of(each.latency_counts), each.latency_total)
                    for name, each in statistics.classes.items()
                },
                ready=health.ready,
                engines={engine.name: engine.status == "ready" for engine in health.engines},
                answers=dict(figures.answers),
                success=figures.success,
                fail=figures.fail,
                success_ns=figures.success_ns,
                queue_ns=round(figures.queue_time * 1e9),
                compute_ns=round(figures.compute_time * 1e9),
                read_ns=figures.read_ns,
                write_ns=figures.write_ns,
            )
        )
    return found


def server_figures(service: Service, http: HttpFigures, connections: int | None) -> ServerFigures:
    """The process's, as of now. To be called on the loop."""
    return ServerFigures(
        ready=service.ready(),
        draining=service.draining,
        in_flight=service.in_flight,
        max_in_flight=service.max_in_flight,
        refused=service.refused,
        connections=connections,
        answers=http.answers(),
    )


class ModelsCollector(Collector):
    """Models and the server as they were at a moment: nothing of it changes any more."""

    def __init__(self, server: ServerFigures, models: Sequence[ModelFigures], exemplars: Exemplars) -> None:
        self._server = server
        self._models = models
        self._exemplars = exemplars

    def collect(self) -> Iterator[Metric]:
        yield from self._of_server()
        yield from self._requests()
        yield from self._load()
        yield from self._work()

    def _of_server(self) -> Iterator[Metric]:
        server = self._server
        yield GaugeMetricFamily("kapsl_ready", "Whether every model can answer, and the server stays.", server.ready)
        yield GaugeMetricFamily("kapsl_draining", "Whether the server has been told to end.", server.draining)
        yield GaugeMetricFamily("kapsl_in_flight", "Inference requests in the server.", server.in_flight)
        yield GaugeMetricFamily("kapsl_in_flight_limit", "How many of them there may be.", server.max_in_flight)
        yield CounterMetricFamily(
            "kapsl_in_flight_refused", "Inference requests refused as so many were in the server.", server.refused
        )
        if server.connections is not None:
            yield GaugeMetricFamily("kapsl_http_connections", "Open HTTP connections.", server.connections)
        answers = CounterMetricFamily("kapsl_http_requests", "Answers over HTTP.", labels=["method", "route", "status"])
        for (method, route, status), count in sorted(server.answers.items()):
            answers.add_metric([method, route, str(status)], count)
        yield answers

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "kapsl_requests",
            "Requests that a model's scheduler is done with, by outcome.",
            labels=["model", "version", "outcome"],
        )
        answers = CounterMetricFamily(
            "kapsl_answers",
            "Answers to a model's clients over all protocols, by the HTTP status that they have or would have.",
            labels=["model", "version", "status"],
        )
        for model in self._models:
            for outcome in _OUTCOMES:
                requests.add_metric([*model.labels, outcome], getattr(model.statistics, outcome))
            for status, count in sorted(model.answers.items()):
                answers.add_metric([*model.labels, str(status)], count)
        yield requests
        yield answers
        yield self._counters("kapsl_retried", "Requests that ran again as their batch had failed.", "retried")
        yield self._counters("kapsl_discarded", "Answers that came after their caller had gone.", "discarded")
        yield histogram(
            "kapsl_request_latency_seconds",
            "From a request's arrival at its scheduler to its answer.",
            ("model", "version", "class"),
            {(*model.labels, name): each for model in self._models for name, each in model.latencies.items()},
            FINE,
            self._exemplars,
        )
        queue = CounterMetricFamily(
            "kapsl_queue_seconds", "Seconds that answered requests had waited.", labels=["model", "version", "class"]
        )
        for model in self._models:
            for name, each in model.statistics.classes.items():
                queue.add_metric([*model.labels, name], each.queue_time_total)
        yield queue

    def _load(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily("kapsl_queued", "Requests in a model's queue.", labels=["model", "version", "class"])
        for model in self._models:
            for name, each in model.statistics.classes.items():
                queued.add_metric([*model.labels, name], each.queued)
        yield queued
        yield self._gauges("kapsl_waiting", "Requests that wait for room in a model's queue.", "waiting")
        yield self._gauges("kapsl_running", "Requests that an engine works on.", "running")
        yield self._gauges("kapsl_calls_in_flight", "Engine calls that are being made.", "calls_in_flight")
        yield self._gauges("kapsl_streams_in_flight", "Streams that are being made.", "streams_in_flight")
        yield self._gauges("kapsl_slots", "Engine calls that may be made at a time.", "slots")
        ready = GaugeMetricFamily("kapsl_model_ready", "Whether a model can take work.", labels=["model", "version"])
        engines = GaugeMetricFamily(
            "kapsl_engine_ready",
            "Whether an engine works: it is not lost, stuck or loading.",
            labels=["model", "version", "engine"],
        )
        for model in self._models:
            ready.add_metric([*model.labels], model.ready)
            for name, works in model.engines.items():
                engines.add_metric([*model.labels, name], works)
        yield ready
        yield engines

    def _work(self) -> Iterator[Metric]:
        yield self._counters("kapsl_calls", "Engine calls.", "calls")
        yield self._counters("kapsl_rows", "Rows in engine calls.", "rows")
        yield self._counters("kapsl_engine_busy_seconds", "Seconds that engines worked.", "busy_time")
        yield self._gauges(
            "kapsl_background_bound_seconds", "What background work may add to a live request.", "background_bound"
        )
        batches = HistogramMetricFamily("kapsl_batch_rows", "Engine calls by their rows.", labels=["model", "version"])
        for model in self._models:
            batches.add_metric([*model.labels], _batches(model.statistics), model.statistics.rows)
        yield batches
        codec = CounterMetricFamily(
            "kapsl_codec_seconds", "Seconds from bytes to tensors and back.", labels=["model", "version", "step"]
        )
        for model in self._models:
            codec.add_metric([*model.labels, "read"], model.read_ns / 1e9)
            codec.add_metric([*model.labels, "write"], model.write_ns / 1e9)
        yield codec

    def _counters(self, name: str, text: str, field: str) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=["model", "version"])
        for model in self._models:
            family.add_metric([*model.labels], getattr(model.statistics, field))
        return family

    def _gauges(self, name: str, text: str, field: str) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["model", "version"])
        for model in self._models:
            family.add_metric([*model.labels], getattr(model.statistics, field))
        return family


def _batches(statistics: Any) -> list[tuple[str, float]]:
    """Calls by rows, in buckets that end at powers of two and at the model's largest batch. A model whose requests
    never share a call may have calls beyond it."""
    sizes: Mapping[int, int] = statistics.batch_sizes
    most: int = statistics.max_batch_size
    bounds = sorted({1 << power for power in range(most.bit_length())} | {most})
    buckets = [(str(bound), float(sum(n for size, n in sizes.items() if size <= bound))) for bound in bounds]
    return [*buckets, ("+Inf", float(sum(sizes.values())))]


def histogram(
    name: str,
    text: str,
    labels: Sequence[str],
    of: Mapping[_Labels, Counts],
    bounds: Iterable[float],
    exemplars: Mapping[_Labels, Mapping[int, Exemplar]] | None = None,
) -> HistogramMetricFamily:
    """One series for each set of label values; `bounds` are some of `BOUNDS`."""
    places = [(f"{bound:.10g}", BOUNDS.index(bound)) for bound in bounds]
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, each in of.items():
        below = list(accumulate(each.counts))
        buckets: list[Any] = [(bound, below[place]) for bound, place in places]
        buckets.append(("+Inf", below[-1]))
        for index, exemplar in (exemplars or {}).get(values, {}).items():
            number = next((number for number, (_, place) in enumerate(places) if index <= place), len(places))
            buckets[number] = (*buckets[number][:2], exemplar)
        family.add_metric(values, buckets, each.total)
    return family
