"""Where an application's gRPC is, and what becomes of one that cannot be there.

grpcio is imported here and behind this, and nowhere else. What is not here: what is answered (`server.grpc_server`).
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kapsl_scheduler.config import ConfigError, ServerSettings

if TYPE_CHECKING:
    from kapsl_scheduler.server.grpc_server import Certificates, GrpcServer

__all__ = ["check_grpc", "grpc_port"]

_log = logging.getLogger(__name__)

DEFAULT_PORT: Final = 8001
"""Where clients of the protocol look for it."""


def check_grpc(settings: ServerSettings) -> type[GrpcServer] | None:
    """What serves gRPC; None where it is switched off, or neither asked for nor installed. Raises `ConfigError` where
    it is asked for, by a port, and not installed."""
    if not settings.grpc_enabled:
        return None
    try:
        from kapsl_scheduler.server.grpc_server import GrpcServer
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("grpc", "google"):
            raise
        if settings.grpc_port is None:
            return None
        raise ConfigError(["grpc_port: gRPC needs grpcio: pip install 'kapsl-scheduler[grpc]'"]) from error
    return GrpcServer


@contextlib.asynccontextmanager
async def grpc_port(settings: ServerSettings) -> AsyncIterator[GrpcServer | None]:
    """The port, taken and not answered yet; None where there is none. Raises `ConfigError` as `check_grpc` does, and
    `OSError` for a port that cannot be had; one that nobody has asked for is left out instead, with a warning."""
    kind = check_grpc(settings)
    if kind is None:
        yield None
        return
    port = settings.grpc_port
    if port is None:
        port = DEFAULT_PORT if settings.port else 0
    try:
        _check_free(settings.host, port)
        server = kind(
            settings.host,
            port,
            certificates=_certificates(settings),
            max_body_bytes=settings.max_body_bytes,
            max_in_flight=settings.max_in_flight,
            patience=settings.client_patience,
        )
    except OSError as error:
        if settings.grpc_port is not None:
            raise
        _log.warning("no gRPC: %s; --no-grpc does without", error)
        yield None
        return
    async with server:
        yield server


def _check_free(host: str, port: int) -> None:
    """Says in words why a port cannot be had: gRPC would say it to stderr, and not why."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        hint = "; another --grpc-port, or 0 for any that is free, may do" if port else ""
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from error


def _certificates(settings: ServerSettings) -> Certificates | None:
    """What is in the files, which are known to be good (`app_http.tls_options`)."""
    from kapsl_scheduler.server.grpc_server import Certificates

    if settings.tls_cert is None or settings.tls_key is None:
        return None
    authority = None if settings.tls_client_ca is None else Path(settings.tls_client_ca).read_bytes()
    return Certificates(Path(settings.tls_cert).read_bytes(), Path(settings.tls_key).read_bytes(), authority)
