"""The Open Inference Protocol v2 over gRPC: `inference.GRPCInferenceService`, all but its streams.

What is not here: the messages (`server.oip_proto`), `ModelStreamInfer` (`server.oip_stream`), what models look like
(`server.oip_models`), who may ask and how a call ends in an error (`server.grpc_door`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import grpc

from kapsl_scheduler.errors import Cancelled, DeadlineExceeded, EngineError, ModelNotLoaded
from kapsl_scheduler.runtime.registry import ServedModel
from kapsl_scheduler.server.access import Caller
from kapsl_scheduler.server.answers import grpc_status_of, status_of
from kapsl_scheduler.server.bodies import LONG_BODY
from kapsl_scheduler.server.grpc_answers import Context
from kapsl_scheduler.server.grpc_door import Asking, Unary
from kapsl_scheduler.server.oip import InferCall
from kapsl_scheduler.server.oip_models import (
    LogSettings,
    check_order,
    checked_traces,
    index_entry,
    model_config,
    model_metadata,
    model_statistics,
    server_metadata,
)
from kapsl_scheduler.server.oip_proto import Message, decode_call, encode_response, message_class, parameters_of, parsed
from kapsl_scheduler.server.service import Service

if TYPE_CHECKING:
    from kapsl_scheduler.server.tracing import RequestTrace

__all__ = [
    "SERVICE",
    "Asked",
    "OipGrpc",
    "begin_trace",
    "bounded_by",
    "come_in",
    "ended",
    "leave",
    "read_request",
    "why_cancelled",
]

logger = logging.getLogger(__name__)

SERVICE: Final = "inference.GRPCInferenceService"

_Request: Final = message_class("inference.ModelInferRequest")
_SHARED_MEMORY: Final = ("Status", "Register", "Unregister")


class Asked(NamedTuple):
    """A request as it was read: for which model, what, and all its parameters."""

    model: ServedModel
    call: InferCall
    parameters: Mapping[str, Any]


def come_in(service: Service, caller: Caller | None) -> None:
    """An inference request comes in, of which `leave` is to be called. Raises `Overloaded`."""
    service.enter()
    if caller is not None:
        try:
            caller.enter(time.monotonic())
        except BaseException:
            service.leave()
            raise


def leave(service: Service, caller: Caller | None) -> None:
    """It has its answer."""
    service.leave()
    if caller is not None:
        caller.leave()


async def read_request(service: Service, request: Message, size: int) -> Asked:
    """Reads a `ModelInferRequest` of so many bytes. Raises `ModelNotLoaded` and `InvalidInput`."""
    model = service.registry.get(request.model_name, request.model_version)  # before much is decoded for nobody
    if size <= LONG_BODY:
        return Asked(model, *decode_call(request))
    call, parameters = await asyncio.to_thread(decode_call, request)
    return Asked(service.registry.get(request.model_name, request.model_version), call, parameters)


def bounded_by(call: InferCall, remaining: float | None) -> None:
    """Makes the seconds that its client still waits a bound of the call's own. Raises `DeadlineExceeded`."""
    if remaining is not None:
        if remaining <= 0:
            raise DeadlineExceeded("the deadline of the call passed before it was read")
        call.timeout = remaining if call.timeout is None else min(call.timeout, remaining)


def begin_trace(service: Service, method: str, request: Message, context: Context) -> RequestTrace | None:
    """That of an inference request, if it is to have one."""
    tracing = service.tracing
    if tracing is None:
        return None
    return tracing.begin_rpc(SERVICE, method, request.model_name, context.invocation_metadata())


def ended(
    service: Service, request: Message, begun: int, error: BaseException | None, trace: RequestTrace | None
) -> None:
    """Ends the trace of a request. Counts one that ended in an error, and logs what its model has done wrong."""
    if error is not None:
        service.figures(request.model_name, request.model_version).failed(begun, error)
        if isinstance(error, EngineError) and status_of(error) == 500:
            logger.error("inference on %r failed: %s: %s", request.model_name, error.code, error)
    if trace is not None:
        name = "OK" if error is None else grpc_status_of(error)
        number, _ = grpc.StatusCode[name].value
        trace.end_rpc(200 if error is None else status_of(error), name, number)


class OipGrpc:
    """The calls over a service. `reload` loads a model anew from where it came, `unload` takes it out of service;
    without them these calls are not offered."""

    def __init__(
        self,
        service: Service,
        *,
        reload: Callable[[str], Awaitable[ServedModel]] | None = None,
        unload: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._service = service
        self._reload = reload
        self._unload = unload
        self._logs = LogSettings(logging.getLogger("kapsl_scheduler"))

    def calls(self) -> dict[str, Unary]:
        """How each call is answered, by its name."""
        answers: dict[str, Callable[[Message], Awaitable[Message]]] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server,
            "ModelMetadata": self._model,
            "ModelConfig": self._config,
            "ModelStatistics": self._statistics,
            "RepositoryIndex": self._index,
            "TraceSetting": self._traces,
            "LogSettings": self._log_settings,
        }
        if self._reload is not None:
            answers["RepositoryModelLoad"] = self._load
        if self._unload is not None:
            answers["RepositoryModelUnload"] = self._take_out
        calls = {name: _plain(name, answer) for name, answer in answers.items()}
        calls["ModelInfer"] = Unary(self._infer)
        for kind in ("System", "Cuda"):
            for name in _SHARED_MEMORY:
                calls[f"{kind}SharedMemory{name}"] = Unary(_no_shared_memory)
        return calls

    # ----------------------------------------------------------------------------------------- inference

    async def _infer(self, body: bytes, context: Context, asking: Asking) -> bytes:
        """`ModelInfer`. A client that goes away or whose deadline passes takes its request back."""
        begun = perf_counter_ns()
        service, caller = self._service, asking.caller
        long = len(body) > LONG_BODY
        request = await asyncio.to_thread(parsed, _Request, body) if long else parsed(_Request, body)
        asking.model = request.model_name
        trace = begin_trace(service, "ModelInfer", request, context)
        failure: BaseException | None = None
        try:
            come_in(service, caller)
            try:
                model, call, _ = await read_request(service, request, len(body))
                bounded_by(call, context.time_remaining())
                read = perf_counter_ns()
                response = await service.infer(model, call, trace)
                done = perf_counter_ns()
                answer = encode_response(model.info, request.model_name, response.outputs, call)
                data: bytes = answer.SerializeToString()
            finally:
                leave(service, caller)
        except asyncio.CancelledError:
            failure = why_cancelled(context)
            raise
        except Exception as error:
            failure = error
            raise
        finally:
            ended(service, request, begun, failure, trace)
        service.figures_of(model).succeeded(begun, read, done, response)
        return data

    # ------------------------------------------------------------------------------------ health, models

    async def _live(self, request: Message) -> Message:
        return _answer("ServerLive", live=True)

    async def _ready(self, request: Message) -> Message:
        return _answer("ServerReady", ready=self._service.ready())

    async def _model_ready(self, request: Message) -> Message:
        try:
            ready = not self._service.draining and self._requested(request).ready
        except ModelNotLoaded:  # clients wait in this way for a model that is to come
            ready = False
        return _answer("ModelReady", ready=ready)

    async def _server(self, request: Message) -> Message:
        return _answer("ServerMetadata", **server_metadata(self._service.version))

    async def _model(self, request: Message) -> Message:
        model = self._requested(request)
        return _answer("ModelMetadata", **model_metadata(model.name, model.info, self._versions(model)))

    async def _config(self, request: Message) -> Message:
        return _answer("ModelConfig", config=model_config(self._requested(request)))

    async def _statistics(self, request: Message) -> Message:
        models = [self._requested(request)] if request.name else self._service.registry.list()
        shown = [model_statistics(model, self._service.figures_of(model)) for model in models]
        return _answer("ModelStatistics", model_stats=[{key: each[key] for key in _STATISTICS} for each in shown])

    def _requested(self, request: Message) -> ServedModel:
        return self._service.registry.get(request.name, request.version)

    def _versions(self, model: ServedModel) -> list[str]:
        return [one.info.version for one in self._service.registry.versions(model.name)]

    # ---------------------------------------------------------------------------------------- repository

    async def _index(self, request: Message) -> Message:
        models = self._service.registry.list()
        return _answer(
            "RepositoryIndex", models=[index_entry(model) for model in models if model.ready or not request.ready]
        )

    async def _load(self, request: Message) -> Message:
        check_order(parameters_of(request.parameters), "load")
        assert self._reload is not None
        await self._reload(request.model_name)
        return _answer("RepositoryModelLoad")

    async def _take_out(self, request: Message) -> Message:
        check_order(parameters_of(request.parameters), "unload")
        assert self._unload is not None
        await self._unload(request.model_name)
        return _answer("RepositoryModelUnload")

    # ------------------------------------------------------------------------------------------ settings

    async def _log_settings(self, request: Message) -> Message:
        if request.settings:
            self._logs.set(parameters_of(request.settings))
        return _answer("LogSettings", settings=dict(map(_log_setting, self._logs.shown().items())))

    async def _traces(self, request: Message) -> Message:
        if request.model_name:
            self._service.registry.get(request.model_name)
        shown = checked_traces({name: list(setting.value) for name, setting in request.settings.items()})
        lists = {name: value if isinstance(value, list) else [value] for name, value in shown.items()}
        return _answer("TraceSetting", settings={name: {"value": values} for name, values in lists.items()})


_STATISTICS: Final = tuple(field.name for field in message_class("inference.ModelStatistics").DESCRIPTOR.fields)


def why_cancelled(context: Context) -> EngineError:
    """What gRPC cancels a call for."""
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        return DeadlineExceeded("the deadline of the call passed before its answer was ready")
    return Cancelled("the client went away before its answer was ready")


def _plain(name: str, answer: Callable[[Message], Awaitable[Message]]) -> Unary:
    """A call that answers one message with another. Which model it was about is told by its field of that name."""
    kind = message_class(f"inference.{name}Request")
    field = next((field for field in ("model_name", "name") if field in kind.DESCRIPTOR.fields_by_name), "")

    async def answered(body: bytes, context: Context, asking: Asking) -> bytes:
        request = parsed(kind, body)
        if field:
            asking.model = getattr(request, field)
        data: bytes = (await answer(request)).SerializeToString()
        return data

    return Unary(answered)


def _answer(call: str, **fields: Any) -> Message:
    return message_class(f"inference.{call}Response")(**fields)


def _log_setting(setting: tuple[str, Any]) -> tuple[str, dict[str, Any]]:
    name, value = setting
    kind = "bool_param" if isinstance(value, bool) else "uint32_param" if isinstance(value, int) else "string_param"
    return name, {kind: value}


async def _no_shared_memory(body: bytes, context: Context, asking: Asking) -> bytes:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "shared memory is not offered: send tensors in the message")
    raise AssertionError("gRPC goes on after the end of a call")
