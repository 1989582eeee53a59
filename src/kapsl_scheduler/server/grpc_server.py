"""The gRPC port: its services put together, its certificates, its bounds, its start and its end.

What is not here: what the services answer (`server.oip_grpc`, `server.oip_stream`, `server.grpc_health`), and who may
ask (`server.grpc_door`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Final, NamedTuple

import grpc
import grpc.aio

from kapsl_scheduler.runtime.registry import ServedModel
from kapsl_scheduler.server.access import Access
from kapsl_scheduler.server.grpc_door import Call, Door
from kapsl_scheduler.server.grpc_health import HEALTH, REFLECTION, Health, Reflection
from kapsl_scheduler.server.oip_grpc import SERVICE, OipGrpc
from kapsl_scheduler.server.oip_stream import InferStreams
from kapsl_scheduler.server.service import Service

__all__ = ["Certificates", "GrpcServer"]

OTHER_CALLS: Final = 2048
"""Calls that may be open beside the inferences of the service: streams, watches, and messages on their way. More than
streams, watches and reflections together may be, so that those cannot keep inferences out."""
CALLS_EACH: Final = 1024
"""Calls that one connection may have open."""
MESSAGE_HEAD: Final = 64 << 10
"""Bytes of a message beside its tensors."""
_LARGEST: Final = 2**31 - 1  # gRPC counts in 32 bits


class Certificates(NamedTuple):
    """PEM files: the server's certificate with its chain, its key, and the authority (None: none) of which each client
    must have one."""

    chain: bytes
    key: bytes
    client_authority: bytes | None = None


class GrpcServer:
    """A port of its own, taken when this is made; calls are answered from `start` on.

    Messages of more than `max_body_bytes` (and a little for what is not tensor) are refused, and so are calls beyond
    `max_in_flight` and `OTHER_CALLS`, before they are read: both with RESOURCE_EXHAUSTED. A client that does not answer
    a ping within `patience` seconds, twice that after it was last heard, loses its connection; one that does not send
    the message of a call loses the call (`grpc_door.Door`). Leaving the `async with` ends every call. Raises `OSError`
    for an address that cannot be had.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        certificates: Certificates | None = None,
        max_body_bytes: int = 64 << 20,
        max_in_flight: int = 4096,
        patience: float = 20.0,
    ) -> None:
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", min(max_body_bytes + MESSAGE_HEAD, _LARGEST)),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", CALLS_EACH),
                ("grpc.so_reuseport", 0),  # else two servers would share a port, and their callers
                ("grpc.keepalive_time_ms", _milliseconds(patience)),
                ("grpc.keepalive_timeout_ms", _milliseconds(patience)),
                # Clients that ping on their own behalf are not to be cut off for it.
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
            maximum_concurrent_rpcs=max_in_flight + OTHER_CALLS,
        )
        self._host = f"[{host}]" if ":" in host else host or "0.0.0.0"
        self._patience = patience
        self._health: Health | None = None
        self._streams: InferStreams | None = None
        address = f"{self._host}:{port}"
        try:
            if certificates is None:
                self.port: int = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, _credentials(certificates))
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address} for gRPC: {error}") from error

    @property
    def address(self) -> str:
        """Where it listens, as clients take it."""
        return f"{self._host}:{self.port}"

    async def start(
        self,
        service: Service,
        *,
        reload: Callable[[str], Awaitable[ServedModel]] | None = None,
        unload: Callable[[str], Awaitable[None]] | None = None,
        access: Access | None = None,
        access_log: bool = False,
    ) -> None:
        """Answers calls for the models of a service."""
        self._health = Health(service, (SERVICE,))
        self._streams = InferStreams(service, access_log=access_log)
        inference: Mapping[str, Call] = {
            **OipGrpc(service, reload=reload, unload=unload).calls(),
            "ModelStreamInfer": self._streams.call(),
        }
        reflection = Reflection((SERVICE, HEALTH, *REFLECTION)).calls()
        services: dict[str, Mapping[str, Call]] = {
            SERVICE: inference,
            HEALTH: self._health.calls(),
            **dict.fromkeys(REFLECTION, reflection),
        }
        door = Door(services, patience=self._patience, access=access, access_log=access_log)
        self._server.add_generic_rpc_handlers((door,))
        await self._server.start()

    async def close(self, drain: float) -> None:
        """Takes no more calls, lets those that run end within so many seconds, then ends them. Watchers of health hear
        of it first. Streams are read no further, and end with UNAVAILABLE when what came is answered."""
        if self._health is not None and self._streams is not None:
            self._health.close()
            self._streams.close()
        else:
            await self._server.start()  # one that has never begun would keep its port
        await self._server.stop(drain)

    async def __aenter__(self) -> GrpcServer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(0.0)


def _milliseconds(seconds: float) -> int:
    return min(max(1, round(seconds * 1e3)), _LARGEST)


def _credentials(certificates: Certificates) -> grpc.ServerCredentials:
    authority = certificates.client_authority
    return grpc.ssl_server_credentials(
        [(certificates.key, certificates.chain)],
        root_certificates=authority,
        require_client_auth=authority is not None,
    )
