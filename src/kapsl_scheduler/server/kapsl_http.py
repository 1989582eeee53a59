"""The original's routes under `/api`: models by number, inference in its own form, the state of the process.

There is one replica of each model, so that scaling can be looked at and not be set. What is not here: loading and
unloading (whoever is the `Repository`), the Open Inference Protocol, and what requests mean (`server.kapsl_call`).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from kapsl_scheduler.core.wire import WireTensor, decode_tensor
from kapsl_scheduler.errors import EngineError, InvalidInput, ModelNotLoaded
from kapsl_scheduler.server.answers import JSON, json_response, status_of
from kapsl_scheduler.server.bodies import LONG_BODY, beside_the_loop, read_body
from kapsl_scheduler.server.kapsl_call import Answered, KapslRequest, Metadata, answer_of, call_of, model_of
from kapsl_scheduler.server.model_ids import MAX_ID, ModelIds
from kapsl_scheduler.server.presence import while_connected
from kapsl_scheduler.server.service import Figures, Service

__all__ = ["KapslApi", "KnownModel", "Repository"]

if TYPE_CHECKING:
    from kapsl_scheduler.server.tracing import RequestTrace

Asked = TypeVar("Asked", bound=msgspec.Struct)

_INFER_ROUTE: Final = "/api/models/{id}/infer"
_ORDER_BYTES: Final = 64 << 10  # a request to load or to scale says next to nothing
_LONG_ANSWER: Final = 64 << 10  # bytes whose numbers take more than a few milliseconds


class KnownModel(msgspec.Struct, frozen=True):
    """A model as it is listed, whether it is loaded or not. What a program made itself has no path and no device."""

    name: str
    path: str | None
    loaded_at: datetime | None
    status: Literal["active", "inactive", "starting", "stopping"]
    version: str = ""
    framework: str = ""
    device: str | None = None
    optimization_level: str | None = None


class Repository(Protocol):
    """Who loads models. All but `known` raise `Unavailable` while the server closes, and `Overloaded` while the model
    is being loaded or taken out of service."""

    @property
    def ids(self) -> ModelIds: ...

    def known(self) -> Sequence[KnownModel]:
        """All models that have an id, in the order of their ids."""

    async def start(self, path: str, id: int | None) -> str:
        """Loads what is at the path; the name of the model. Raises `ModelLoadError`, `Forbidden` for a path that
        nothing may be loaded from, `InvalidInput` for one that is served already and for an id of somebody else."""

    async def unload(self, name: str) -> None:
        """Takes a model out of service. Raises `ModelNotLoaded`."""

    async def forget(self, name: str) -> None:
        """The same, and it is known no more."""


class _Start(msgspec.Struct):
    model_path: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    model_id: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)] | None = None
    topology: str = "data-parallel"
    tp_degree: int = 1


_Replicas = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_Depth = Annotated[int, msgspec.Meta(ge=0)]


class _Scaling(msgspec.Struct):
    min_replicas: _Replicas = 1
    max_replicas: _Replicas = 4
    target_queue_depth: _Depth = 5
    scale_down_threshold: _Depth = 2
    cooldown_seconds: _Depth = 300


class _NamedTensor(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(max_length=1024)]
    tensor: WireTensor


class _Infer(msgspec.Struct):
    input: WireTensor
    additional_inputs: Annotated[list[_NamedTensor], msgspec.Meta(max_length=1024)] = []
    session_id: str | None = None
    metadata: Metadata | None = None


class KapslApi:
    """The routes over a service and its repository. Bodies beyond `max_body_bytes` are refused."""

    def __init__(self, service: Service, repository: Repository, *, max_body_bytes: int) -> None:
        self._service = service
        self._repository = repository
        self._ids = repository.ids
        self._max_body_bytes = max_body_bytes

    def routes(self) -> list[BaseRoute]:
        model = "/api/models/{id}"
        return [
            Route("/api/health", self._health),
            Route("/api/models", self._models),
            Route("/api/models/start", self._start, methods=["POST"]),
            Route(model, self._model),
            Route(model + "/stop", self._stop, methods=["POST"]),
            Route(model + "/remove", self._remove, methods=["POST"]),
            Route(model + "/scaling", self._scaling),
            Route(model + "/scaling", self._scale, methods=["POST"]),
            Route(_INFER_ROUTE, self._infer, methods=["POST"]),
            Route("/api/system/stats", self._stats),
            Route("/api/hardware", self._hardware),
        ]

    async def _health(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    # ------------------------------------------------------------------------------------------------ models

    async def _models(self, request: Request) -> Response:
        return json_response([self._shown(model) for model in self._repository.known()])

    async def _model(self, request: Request) -> Response:
        return json_response(self._listed(self._ids.name(_id(request))))

    def _listed(self, name: str) -> dict[str, Any]:
        return next(self._shown(model) for model in self._repository.known() if model.name == name)

    def _shown(self, model: KnownModel) -> dict[str, Any]:
        id = self._ids.of(model.name)
        return {
            "id": id,
            "name": model.name,
            "version": model.version,
            "framework": model.framework,
            "device": model.device,
            "optimization_level": model.optimization_level,
            "loaded_at": model.loaded_at,
            "model_path": model.path,
            "status": model.status,
            "replica_id": 0,
            "base_model_id": id,
        }

    async def _start(self, request: Request) -> Response:
        asked = await _read(request, _Start, "a start")
        if asked.topology != "data-parallel" or asked.tp_degree != 1:
            raise InvalidInput(
                f"topology, tp_degree: {asked.topology!r} over {asked.tp_degree} came; a model runs on one device: "
                "'data-parallel' over 1"
            )
        return json_response(self._listed(await self._repository.start(asked.model_path, asked.model_id)))

    async def _stop(self, request: Request) -> Response:
        name = self._ids.name(_id(request))
        await self._repository.unload(name)
        return json_response(self._listed(name))

    async def _remove(self, request: Request) -> Response:
        id = _id(request)
        await self._repository.forget(self._ids.name(id))
        return json_response({"id": id, "removed": True})

    async def _scaling(self, request: Request) -> Response:
        self._ids.name(_id(request))
        return json_response(_AS_IT_IS)

    async def _scale(self, request: Request) -> Response:
        self._ids.name(_id(request))
        asked = await _read(request, _Scaling, "a scaling policy")
        if asked.min_replicas > asked.max_replicas:
            raise InvalidInput(f"min_replicas: {asked.min_replicas} came, expected at most {asked.max_replicas}")
        if asked.scale_down_threshold >= asked.target_queue_depth:
            raise InvalidInput(
                f"scale_down_threshold: {asked.scale_down_threshold} came, expected less than the target_queue_depth, "
                f"{asked.target_queue_depth}"
            )
        if asked.max_replicas > 1:
            raise InvalidInput(f"max_replicas: {asked.max_replicas} came; there is one replica of each model")
        return json_response(_AS_IT_IS)

    # --------------------------------------------------------------------------------------------- inference

    async def _infer(self, request: Request) -> Response:
        service = self._service
        service.enter()
        begun, figures = perf_counter_ns(), Figures()
        trace: RequestTrace | None = None
        status = 499  # if it is cancelled, as the server ends
        try:
            id = _id(request)
            model = model_of(service, self._ids, id)  # before much is read for nobody
            trace = service.begin_trace(_INFER_ROUTE, model.name, request.scope["headers"])
            body = await read_body(request.scope, request.receive, self._max_body_bytes)
            asked = await beside_the_loop(len(body) > LONG_BODY, _decoded, body)
            model = model_of(service, self._ids, id, asked.metadata.model_version)
            figures = service.figures_of(model)
            call = call_of(asked, model, None)
            read = perf_counter_ns()
            response = await while_connected(request.receive, service.infer(model, call, trace))
            done = perf_counter_ns()
            answer = answer_of(response)
            written = await beside_the_loop(len(answer.data) > _LONG_ANSWER, _encoded, answer)
            figures.succeeded(begun, read, done, response)
            status = 200
        except EngineError as error:
            figures.failed(begun, error)
            status = status_of(error)
            raise
        finally:
            service.leave()
            if trace is not None:
                trace.end(status)
        return Response(written, media_type=JSON)

    # --------------------------------------------------------------------------------------------- the machine

    async def _stats(self, request: Request) -> Response:
        return json_response(
            {
                "pid": os.getpid(),
                "process_memory_bytes": _resident(),
                "total_system_memory_bytes": _memory(),
                "gpu_utilization": None,
                "gpu_memory_bytes": None,
                "gpu_memory_total_bytes": None,
                "pressure_state": None,
                "collected_at_ms": time.time_ns() // 1_000_000,
            }
        )

    async def _hardware(self, request: Request) -> Response:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        device = {"id": 0, "kind": "cpu", "name": platform.machine(), "cores": cores, "memory_bytes": _memory()}
        return json_response({"devices": [device]})


_AS_IT_IS: Final = {
    "min_replicas": 1,
    "max_replicas": 1,
    "target_queue_depth": None,
    "scale_down_threshold": None,
    "cooldown_seconds": None,
    "replicas": 1,
}


def _id(request: Request) -> int:
    text = request.path_params["id"]
    if not (text.isascii() and text.isdigit() and len(text) < 11):
        raise ModelNotLoaded(f"Model {text[:40]} not found")
    return int(text)


async def _read(request: Request, kind: type[Asked], what: str) -> Asked:
    body = await read_body(request.scope, request.receive, _ORDER_BYTES)
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the request body is not {what}: {error}") from None


def _decoded(body: bytes) -> KapslRequest:
    """Raises `InvalidInput`."""
    try:
        asked = _INFER.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the request body is not an inference request: {error}") from None
    additional = [(one.name, decode_tensor(one.tensor, one.name)) for one in asked.additional_inputs]
    return KapslRequest(decode_tensor(asked.input, "input"), additional, asked.session_id, asked.metadata or Metadata())


def _encoded(answer: Answered) -> bytes:
    return msgspec.json.encode({"shape": answer.shape, "dtype": answer.dtype, "data": list(answer.data)})


_INFER: Final = msgspec.json.Decoder(_Infer)


def _memory() -> int | None:
    """Of the machine, in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _resident() -> int | None:
    """What this process has in memory, in bytes; None where the system does not tell (it has no /proc)."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
