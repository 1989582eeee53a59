"""What all protocols of a server ask for: an inference on a model by its name, within bounds, counted.

What is not here: bytes of any protocol, and who may ask for what.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING, Any, Self, cast

from kapsl_scheduler.errors import ModelNotLoaded, Overloaded, Unavailable
from kapsl_scheduler.runtime.registry import ModelRegistry, ServedModel
from kapsl_scheduler.runtime.reply import Told
from kapsl_scheduler.server.answers import status_of
from kapsl_scheduler.server.oip import InferCall, check_outputs
from kapsl_scheduler.types import InferenceResponse

if TYPE_CHECKING:
    from kapsl_scheduler.server.tracing import RequestTrace, Tracing

__all__ = ["Figures", "Flight", "Service"]


class Figures:
    """What became of the requests for one model, over all protocols. Times are sums in nanoseconds: from the
    request's bytes to the answer's (`success_ns`, `fail_ns`), and for reading and writing tensors; those in the queue
    and in the engine are in seconds."""

    __slots__ = (
        "answers",
        "compute_time",
        "fail",
        "fail_ns",
        "last",
        "queue_time",
        "read_ns",
        "success",
        "success_ns",
        "write_ns",
    )

    def __init__(self) -> None:
        self.answers: Counter[int] = Counter()  # by HTTP status, also those of other protocols
        self.success = self.success_ns = self.fail = self.fail_ns = 0
        self.read_ns = self.write_ns = 0
        self.queue_time = self.compute_time = 0.0
        self.last = 0  # when the last inference was answered, by `time.perf_counter_ns`

    def succeeded(self, begun: int, read: int, done: int, response: InferenceResponse) -> None:
        """An answer is written. The moments are of `time.perf_counter_ns`: when its request came, when it was read,
        when the model had answered."""
        now = self.last = time.perf_counter_ns()
        self.answers[200] += 1
        self.success += 1
        self.success_ns += now - begun
        self.read_ns += read - begun
        self.write_ns += now - done
        self.queue_time += response.queue_time
        self.compute_time += response.compute_time

    def ended(self, begun: int) -> None:
        """A request was answered, whole or in pieces, of which there are no other times."""
        now = self.last = time.perf_counter_ns()
        self.answers[200] += 1
        self.success += 1
        self.success_ns += now - begun

    def failed(self, begun: int, error: BaseException) -> None:
        """The request ended in an error."""
        self.answers[status_of(error)] += 1
        self.fail += 1
        self.fail_ns += time.perf_counter_ns() - begun


class Flight:
    """One request from its coming to its end, counted for the model of that name, and its `trace` if it has one.
    Entering it raises `Overloaded`. It ends when the `with` is left, or, once it is `kept`, when `end` is called."""

    def __init__(self, service: Service, name: str, version: str = "", *, trace: RequestTrace | None = None) -> None:
        self.trace = trace
        self._service = service
        self._name = name
        self._version = version
        self._begun = 0
        self.kept = False

    def __enter__(self) -> Self:
        try:
            self._service.enter()
        except Overloaded as error:
            self._end_trace(error)
            raise
        self._begun = time.perf_counter_ns()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.end(error)
        elif not self.kept:
            self.end()

    def keep(self) -> None:
        """A stream goes on when the `with` is left."""
        self.kept = True

    def end(self, error: BaseException | None = None) -> None:
        """The answer, or the stream, is at its end, or failed."""
        figures = self._service.figures(self._name, self._version)
        if error is None:
            figures.ended(self._begun)
        else:
            figures.failed(self._begun, error)
        self._end_trace(error)
        self._service.leave()

    def _end_trace(self, error: BaseException | None) -> None:
        if self.trace is not None:
            self.trace.end(200 if error is None else status_of(error))


class Service:
    """The models of a server, for its protocols.

    `tracing` is where those who answer requests begin their traces, None if there are none. At most `max_in_flight`
    inference requests are in it at a time, beyond which they are refused. While it is `draining` it says that it is not
    ready; requests that come all the same are answered.
    """

    def __init__(
        self,
        registry: ModelRegistry[Any],
        *,
        version: str,
        max_in_flight: int = 4096,
        tracing: Tracing | None = None,
    ) -> None:
        self.registry = registry
        self.version = version
        self.tracing = tracing
        self.draining = False
        self.in_flight = 0
        self.max_in_flight = max_in_flight
        self.refused = 0  # as so many were in flight
        self._figures: dict[tuple[str, str], Figures] = {}

    def enter(self) -> None:
        """A request comes in, of which `leave` is to be called. Raises `Overloaded`."""
        if self.in_flight >= self.max_in_flight:
            self.refused += 1
            raise Overloaded(f"{self.max_in_flight} inference requests are in flight, which is the limit")
        self.in_flight += 1

    def leave(self) -> None:
        """It has its answer, and that is sent: a client that is slow to send or to read holds memory too."""
        self.in_flight -= 1

    def figures(self, name: str, version: str = "") -> Figures:
        """Those of a model, of the latest without a version. They are kept only for models that are there, or those of
        every name that a stranger makes up would be."""
        try:
            return self.figures_of(self.registry.get(name, version))
        except ModelNotLoaded:
            return Figures()

    def figures_of(self, model: ServedModel) -> Figures:
        """Those of a model that is there."""
        key = model.name, model.info.version
        figures = self._figures.get(key)
        if figures is None:
            figures = self._figures[key] = Figures()
        return figures

    async def infer(self, model: ServedModel, call: InferCall, trace: RequestTrace | None = None) -> InferenceResponse:
        """The model's answer, told to the `trace` that was begun for the request. Raises what the scheduler raises, and
        `InvalidInput` for an output that there is none of. Cancelling it takes the request back."""
        _check_outputs(model, call)
        if trace is not None:
            return await trace.through(model, call)
        return await model.scheduler.infer(_asked(model, call), priority=call.priority, timeout=call.timeout)

    def infer_then(self, model: ServedModel, call: InferCall, then: Told) -> Any:
        """The same for whoever awaits nothing, and without a trace: `Scheduler.infer_then`."""
        _check_outputs(model, call)
        return model.scheduler.infer_then(_asked(model, call), then, priority=call.priority, timeout=call.timeout)

    def stream(
        self, model: ServedModel, call: InferCall, trace: RequestTrace | None = None
    ) -> AsyncGenerator[InferenceResponse, None]:
        """The same in chunks, from a model that streams. Closing it takes the request back."""
        _check_outputs(model, call)
        if trace is not None:
            return trace.stream(model, call)
        chunks: Any = model.scheduler.infer_stream(call.request, priority=call.priority, timeout=call.timeout)
        return cast("AsyncGenerator[InferenceResponse, None]", chunks)

    def begin_trace(self, route: str, name: str, headers: Iterable[tuple[bytes, bytes]]) -> RequestTrace | None:
        """That of a request for a model by a `POST` of that route, if it is to have one. It is to be ended."""
        return None if self.tracing is None else self.tracing.begin("POST", route, name, dict(headers))

    def ready(self) -> bool:
        """Whether every model can answer, and the server is not closing."""
        return not self.draining and self.registry.ready()

    def check_open(self) -> None:
        """Raises `Unavailable` while the server is closing."""
        if self.draining:
            raise Unavailable("the server is closing")


def _asked(model: ServedModel, call: InferCall) -> Any:
    """What to ask the scheduler, by the shortest way: a lone array goes in faster than a request."""
    request = call.request
    inputs = request.inputs
    if len(inputs) != 1 or request.session_id is not None or request.metadata is not None:
        return request
    specs = model.info.inputs
    return inputs if len(specs) != 1 else inputs.get(specs[0].name, inputs)


def _check_outputs(model: ServedModel, call: InferCall) -> None:
    if call.outputs and model.info.outputs:
        check_outputs(call.outputs, (spec.name for spec in model.info.outputs))
