"""Traces of requests and of jobs' runs, for OpenTelemetry: one tree from the door through the queue to the engine.

A sampled request has a server span, under it `queue` and an `engine call` for each call that it was in. Each engine
call that served sampled requests has a span `batch` in a trace of its own, linked to all of them and they to it. Spans
are made when what they tell of has ended, from moments that are taken anyway; who is not sampled has none made.

Only `app` imports this module, and only where tracing is configured. What is not here: which exporter (`app`), and what
the scheduler tells of its calls (`ports.Observer`).
"""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client.samples import Exemplar

from kapsl_scheduler.core.batch import Pending
from kapsl_scheduler.core.runs import RunState
from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.ports import Observer
from kapsl_scheduler.runtime.cron_views import CronEvent, CronRun
from kapsl_scheduler.runtime.metrics import BOUNDS
from kapsl_scheduler.runtime.registry import ServedModel
from kapsl_scheduler.server.oip import InferCall
from kapsl_scheduler.types import InferenceRequest, InferenceResponse, RequestMetadata

__all__ = ["RequestTrace", "Tracing"]

_LIBRARY: Final = "kapsl_scheduler"
_FAILED: Final = (RunState.FAILED, RunState.INTERRUPTED)


class _Call(NamedTuple):
    """One engine call that a request was in. Moments are the scheduler's."""

    started: float
    elapsed: float
    rows: int
    requests: int
    failed: bool
    batch: SpanContext


_CONTEXT: Final = {"traceparent": b"traceparent", "tracestate": b"tracestate"}
"""What carries a caller's trace, by W3C's names."""
_NO_METADATA: Final = RequestMetadata()


class Tracing:
    """Makes spans and hands them to `processor`, which `close` shuts down. Belongs to the event loop's thread.

    A request whose caller traces it (by the header `traceparent`) is sampled if the caller samples it; of the others
    the fraction `sample_ratio` is. The schedulers' clock must be `time.monotonic`, as it is by default.
    """

    def __init__(
        self,
        processor: SpanProcessor,
        *,
        version: str,
        sample_ratio: float = 1.0,
        service_name: str = "kapsl-scheduler",
        draw: Callable[[], float] = random.random,
    ) -> None:
        resource = Resource.create({"service.name": service_name, "service.version": version})
        # Who is sampled is decided before a span is made.
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer(_LIBRARY, version)
        self._ratio = sample_ratio
        self._draw = draw
        self._propagator = TraceContextTextMapPropagator()
        self.active: dict[str, RequestTrace] = {}
        self._exemplars: dict[tuple[str, str, str], dict[int, Exemplar]] = {}

    def close(self) -> None:
        """Sends what is left, as long as that takes: not to be called on the loop."""
        self._provider.shutdown()

    def exemplars(self) -> Mapping[tuple[str, str, str], Mapping[int, Exemplar]]:
        """By model, version and class: of each bucket of `BOUNDS` the last traced answer, as of now."""
        return {key: dict(each) for key, each in self._exemplars.items()}

    def observer(self, model: str) -> Observer:
        """Who is to be told of the engine calls of a model."""
        return _Calls(self, model)

    def begin(self, method: str, route: str, model: str, headers: Mapping[bytes, bytes]) -> RequestTrace | None:
        """A request has come over HTTP, whose `headers` are in lower case. None if it is not sampled; else the trace is
        to be ended."""
        begin = self.sampled(method, route, model, headers)
        return None if begin is None else begin()

    def sampled(
        self, method: str, route: str, model: str, headers: Mapping[bytes, bytes]
    ) -> Callable[[], RequestTrace] | None:
        """The same for whoever may never come to answer it: what begins the trace."""
        carrier = {name: headers[key].decode("latin-1") for name, key in _CONTEXT.items() if key in headers}
        return self._sampled(f"{method} {route}", {"http.request.method": method, "http.route": route}, model, carrier)

    def begin_rpc(
        self, service: str, method: str, model: str, metadata: Iterable[tuple[str, Any]]
    ) -> RequestTrace | None:
        """The same over gRPC."""
        carrier = {key: value for key, value in metadata if key in _CONTEXT}
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        begin = self._sampled(f"{service}/{method}", attributes, model, carrier)
        return None if begin is None else begin()

    def _sampled(
        self, name: str, attributes: Mapping[str, str], model: str, carrier: Mapping[str, str]
    ) -> Callable[[], RequestTrace] | None:
        context = Context()
        if carrier:
            context = self._propagator.extract(carrier, context)
        caller = get_current_span(context).get_span_context()
        sampled = caller.trace_flags.sampled if caller.is_valid else self._draw() < self._ratio
        return partial(self._begin, name, attributes, model, context) if sampled else None

    def _begin(self, name: str, attributes: Mapping[str, str], model: str, context: Context) -> RequestTrace:
        span = self.tracer.start_span(name, context, SpanKind.SERVER, {**attributes, "kapsl.model": model})
        return RequestTrace(self, span, model)

    def remember(self, model: str, version: str, priority: str, seconds: float, trace: int) -> None:
        """A traced request was answered."""
        labels = {"trace_id": f"{trace:032x}"}
        of_class = self._exemplars.setdefault((model, version, priority), {})
        of_class[bisect_left(BOUNDS, seconds)] = Exemplar(labels, seconds, time.time())

    async def follow(self, events: AsyncIterator[CronEvent]) -> None:
        """Makes a span of every run that ends, until the events do."""
        async for event in events:
            if event.kind == "ended" and event.run is not None and self._draw() < self._ratio:
                self._ran(event.run)

    def _ran(self, run: CronRun) -> None:
        if run.started is None or run.ended is None:
            return
        attributes: dict[str, Any] = {
            "kapsl.job": run.job,
            "kapsl.run": run.number,
            "kapsl.run.origin": run.origin,
            "kapsl.run.state": run.state.value,
            "kapsl.run.attempt": run.attempt,
            "kapsl.run.lateness": (run.started - run.due).total_seconds(),
        }
        span = self.tracer.start_span(
            f"job {run.job}", Context(), SpanKind.INTERNAL, attributes, start_time=_nanoseconds(run.started)
        )
        if run.error or run.state in _FAILED:
            span.set_status(Status(StatusCode.ERROR, run.error or run.reason))
        span.end(_nanoseconds(run.ended))


class RequestTrace:
    """One sampled request, from `Tracing.begin` to `end`."""

    __slots__ = (
        "_left",
        "_offset",
        "_priority",
        "_span",
        "_tracing",
        "arrived",
        "calls",
        "context",
        "key",
        "model",
        "version",
    )

    def __init__(self, tracing: Tracing, span: Span, model: str) -> None:
        self._tracing = tracing
        self._span = span
        self._offset = time.time_ns() - time.monotonic_ns()
        self._priority: str | None = None
        self._left: float | None = None  # the queue, as far as that is known
        self.model = model
        self.version = ""
        self.context = span.get_span_context()
        self.key = f"{self.context.span_id:016x}"
        self.arrived = 0.0
        self.calls: list[_Call] = []

    async def through(self, model: ServedModel, call: InferCall) -> InferenceResponse:
        """Asks the model, and makes the spans of the queue and of the engine calls. Raises what the scheduler does."""
        with self._watched(model, call) as request:
            response = await model.scheduler.infer(request, priority=call.priority, timeout=call.timeout)
        metadata = call.request.metadata or _NO_METADATA
        return InferenceResponse.of(
            response.outputs, response.queue_time, response.compute_time, response.batch_rows, metadata.request_id
        )

    async def stream(self, model: ServedModel, call: InferCall) -> AsyncGenerator[InferenceResponse, None]:
        """The same with a model that answers in chunks, whose requests are named by the trace."""
        with self._watched(model, call) as request:
            chunks: Any = model.scheduler.infer_stream(request, priority=call.priority, timeout=call.timeout)
            async with aclosing(chunks):
                async for chunk in chunks:
                    if self._left is None:  # which is all that is known if it is closed before its call is over
                        self._left = self.arrived + chunk.queue_time
                    yield chunk

    @contextmanager
    def _watched(self, model: ServedModel, call: InferCall) -> Iterator[InferenceRequest]:
        """The request as it is to be sent so that it is known in the engine calls, until this is left."""
        request, timeout = call.request, call.timeout
        # The scheduler names its members to the observer by their ids.
        metadata = msgspec.structs.replace(request.metadata or _NO_METADATA, request_id=self.key)
        self.version = model.info.version
        attributes: dict[str, Any] = {"kapsl.model.version": self.version}
        if timeout is not None:
            attributes["kapsl.timeout"] = timeout
        self._span.set_attributes(attributes)
        self.arrived = time.monotonic()
        self._tracing.active[self.key] = self
        try:
            yield InferenceRequest(request.inputs, session_id=request.session_id, metadata=metadata)
        except InvalidInput:
            raise  # it was never queued
        except BaseException:
            self._tell_calls()
            raise
        finally:
            del self._tracing.active[self.key]
        self._tell_calls()
        if self.calls and self._priority is not None:
            last = self.calls[-1]
            seconds = last.started - self.arrived + last.elapsed
            self._tracing.remember(self.model, self.version, self._priority, seconds, self.context.trace_id)

    def was_in(self, call: _Call, item: Pending) -> None:
        """The request was in an engine call, as `item`."""
        if not self.calls:
            self._left = call.started
        self.calls.append(call)
        self.arrived = item.arrival
        self._priority = item.priority.name.lower()
        self._span.set_attributes({"kapsl.priority": self._priority, "kapsl.rows": item.rows})

    def end(self, status: int) -> None:
        """It was answered with an HTTP status."""
        self._span.set_attribute("http.response.status_code", status)
        self._end(status, str(status))

    def end_rpc(self, status: int, name: str, code: int) -> None:
        """It was answered with a status of gRPC, of this name and number. `status` is that of HTTP for the same."""
        self._span.set_attribute("rpc.grpc.status_code", code)
        self._end(status, name)

    def _end(self, status: int, name: str) -> None:
        if status >= 400:
            self._span.set_attribute("error.type", name)
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def at(self, moment: float) -> int:
        """A moment of the scheduler's clock as nanoseconds since 1970."""
        return int(moment * 1e9) + self._offset

    def _tell_calls(self) -> None:
        inside = set_span_in_context(self._span, Context())
        tracer = self._tracing.tracer
        left = time.monotonic() if self._left is None else self._left
        queue = tracer.start_span("queue", inside, start_time=self.at(self.arrived))
        queue.end(self.at(left))
        for call in self.calls:
            attributes = {"kapsl.batch.rows": call.rows, "kapsl.batch.requests": call.requests}
            span = tracer.start_span(
                "engine call", inside, SpanKind.INTERNAL, attributes, [Link(call.batch)], self.at(call.started)
            )
            if call.failed:
                span.set_status(Status(StatusCode.ERROR))
            span.end(self.at(call.started + call.elapsed))


class _Calls:
    """Hears of the engine calls of one model."""

    def __init__(self, tracing: Tracing, model: str) -> None:
        self._tracing = tracing
        self._model = model

    def on_call(
        self, *, rows: int, requests: int, started: float, elapsed: float, failed: bool, members: Sequence[Pending]
    ) -> None:
        active = self._tracing.active
        if not active:
            return
        traced = [(active[item.request_id], item) for item in members if item.request_id in active]
        if not traced:
            return
        first = traced[0][0]
        span = self._tracing.tracer.start_span(
            "batch",
            Context(),
            SpanKind.INTERNAL,
            {
                "kapsl.model": self._model,
                "kapsl.model.version": first.version,
                "kapsl.batch.rows": rows,
                "kapsl.batch.requests": requests,
            },
            [Link(trace.context) for trace, _ in traced],
            first.at(started),
        )
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(first.at(started + elapsed))
        call = _Call(started, elapsed, rows, requests, failed, span.get_span_context())
        for trace, item in traced:
            trace.was_in(call, item)


def _nanoseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1e6) * 1000
