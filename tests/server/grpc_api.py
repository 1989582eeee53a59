"""A gRPC port over one model named `m`, in process, and a channel to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import numpy as np

from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.server.access import Access
from kapsl_scheduler.server.grpc_server import Certificates, GrpcServer
from kapsl_scheduler.server.oip_proto import Message, message_class
from kapsl_scheduler.server.service import Service
from kapsl_scheduler.server.tracing import Tracing
from tests.server.api import Function, Server, double, serving

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"

Metadata = Sequence[tuple[str, str]]


class Port:
    """The port, what it serves, and calls of it by their names."""

    def __init__(self, http: Server, service: Service, server: GrpcServer, channel: grpc.aio.Channel) -> None:
        self.http = http
        self.service = service
        self.server = server
        self.channel = channel

    @property
    def registry(self) -> ModelRegistry[Any]:
        return self.http.registry

    def call(self, name: str, request: Message | bytes, **options: Any) -> Any:
        """A call of the inference service, which can be awaited or cancelled."""
        answer = message_class(f"inference.{name}Response")
        ask = self.channel.unary_unary(f"/{SERVICE}/{name}", response_deserializer=answer.FromString)
        return ask(request if isinstance(request, bytes) else request.SerializeToString(), **options)

    async def ask(self, call: str, /, *, metadata: Metadata = (), **fields: Any) -> Message:
        return await self.call(call, message_class(f"inference.{call}Request")(**fields), metadata=metadata)

    def infer(self, data: Any = (1, 2), *, timeout: float | None = None, metadata: Metadata = (), **fields: Any) -> Any:
        return self.call("ModelInfer", request_of(data, **fields), timeout=timeout, metadata=metadata)

    def stream(self, **options: Any) -> Any:
        answer = message_class("inference.ModelStreamInferResponse")
        ask = self.channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return ask(**options)

    async def health(self, name: str = "", **options: Any) -> str:
        return status_name(await self._of_health("Check", name, **options))

    def watch(self, name: str = "", **options: Any) -> Any:
        return self._of_health("Watch", name, **options)

    def _of_health(self, call: str, name: str, **options: Any) -> Any:
        answer = message_class("grpc.health.v1.HealthCheckResponse").FromString
        kind = self.channel.unary_unary if call == "Check" else self.channel.unary_stream
        request = message_class("grpc.health.v1.HealthCheckRequest")(service=name).SerializeToString()
        return kind(f"/{HEALTH}/{call}", response_deserializer=answer)(request, **options)


def status_name(answer: Message) -> str:
    value: str = type(answer).ServingStatus.Name(answer.status)
    return value


def request_of(data: Any = (1, 2), model: str = "m", **fields: Any) -> Message:
    array = np.array(data, np.float32).reshape(-1, 2)
    return message_class("inference.ModelInferRequest")(
        model_name=model,
        inputs=[{"name": "x", "datatype": "FP32", "shape": array.shape}],
        raw_input_contents=[array.tobytes()],
        **fields,
    )


def values(answer: Message) -> list[list[float]]:
    """The rows of the one output of an answer."""
    (raw,) = answer.raw_output_contents
    rows: list[list[float]] = np.frombuffer(raw, "<f4").reshape(tuple(answer.outputs[0].shape)).tolist()
    return rows


def trailing(error: grpc.aio.AioRpcError) -> dict[str, str]:
    return {key: value for key, value in error.trailing_metadata() if not key.startswith("grpc-status")}


@asynccontextmanager
async def grpc_serving(
    function: Function = double,
    *,
    max_body_bytes: int = 10_000,
    max_in_flight: int = 4096,
    patience: float = 20.0,
    access: Access | None = None,
    access_log: bool = False,
    certificates: Certificates | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    channel_options: Sequence[tuple[str, Any]] = (),
    reload: Callable[[str], Awaitable[Any]] | None = None,
    unload: Callable[[str], Awaitable[None]] | None = None,
    tracing: Tracing | None = None,
    **policy: Any,
) -> AsyncIterator[Port]:
    async with serving(function, tracing=tracing, **policy) as http:
        service = Service(http.registry, version="1.2.3", max_in_flight=max_in_flight, tracing=tracing)
        server = GrpcServer(
            "127.0.0.1",
            0,
            certificates=certificates,
            max_body_bytes=max_body_bytes,
            max_in_flight=max_in_flight,
            patience=patience,
        )
        async with server:
            await server.start(service, reload=reload, unload=unload, access=access, access_log=access_log)
            if credentials is None:
                channel = grpc.aio.insecure_channel(server.address, options=channel_options)
            else:
                channel = grpc.aio.secure_channel(server.address, credentials, options=channel_options)
            async with channel:
                yield Port(http, service, server, channel)
    assert service.in_flight == 0
