"""The HTTP server of an application: its address, its certificates, who may come in, and the order in which it ends.

What is not here: what it answers (`server`), and what it serves (`app_models`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import ssl
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import uvicorn

from kapsl_scheduler.app_kapsl import endpoint_of
from kapsl_scheduler.app_models import Models
from kapsl_scheduler.app_sources import Source
from kapsl_scheduler.config import (
    Config,
    ConfigError,
    ServerSettings,
    is_loopback,
)
from kapsl_scheduler.runtime.cron_scheduler import CronScheduler
from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.server.access import Access, Guard, Hosts
from kapsl_scheduler.server.cron import NO_JOBS, CronApi
from kapsl_scheduler.server.dashboard.live import Live
from kapsl_scheduler.server.dashboard.pages import Pages
from kapsl_scheduler.server.debug import DebugApi
from kapsl_scheduler.server.door import Connection
from kapsl_scheduler.server.generate import GenerateApi
from kapsl_scheduler.server.http import HttpApi, Part
from kapsl_scheduler.server.kapsl_http import KapslApi
from kapsl_scheduler.server.kapsl_socket import KapslSocket
from kapsl_scheduler.server.metrics import Metrics
from kapsl_scheduler.server.oip_http import OipApi
from kapsl_scheduler.server.openai import OpenAiApi
from kapsl_scheduler.server.service import Service

if TYPE_CHECKING:
    from kapsl_scheduler.server.grpc_server import GrpcServer
    from kapsl_scheduler.server.tracing import Tracing

__all__ = ["Listening", "Ports", "Served", "listen", "serve_http", "server_version", "tls_options"]

_log = logging.getLogger(__name__)

# Longer than clients keep a connection idle, so that it is they who close it and never we, under a request.
_KEEP_ALIVE: Final = 75
# What a connection may still take, after the drain has failed all requests, to be told so.
_GOODBYE: Final = 2
# Seconds in which it is written down how the last runs of jobs have ended.
_LAST_WORD: Final = 1.0


class Listening(NamedTuple):
    """What a server says once it answers."""

    url: str
    models: tuple[str, ...]
    sockets: tuple[str, ...] = ()
    grpc: str | None = None


class _Server(uvicorn.Server):
    """uvicorn without its own handling of signals, which would re-raise them after the drain."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        hint = "; another --port, or 0 for any that is free, may do" if port else ""
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from error


class Ports(NamedTuple):
    """Where an application is asked: over HTTP, by the Kapsl socket's clients, and over gRPC, where there is that."""

    http: socket.socket
    kapsl: Sequence[socket.socket]
    grpc: GrpcServer | None


class Served(NamedTuple):
    """What an application answers for: its models, its jobs if it has any, and where its spans go if anywhere."""

    registry: ModelRegistry[Source]
    models: Models
    cron: CronScheduler | None
    tracing: Tracing | None


async def serve_http(
    config: Config, served: Served, ports: Ports, announce: Callable[[Listening], None], stop: asyncio.Event
) -> None:
    """Answers on all ports until it is to stop, and then in the order in which nobody is cut off."""
    settings, (registry, models, cron, tracing), grpc = config.server, served, ports.grpc
    service = Service(registry, version=server_version(), max_in_flight=settings.max_in_flight, tracing=tracing)
    access = Access(config.tokens) if config.tokens else None
    kapsl = KapslSocket(
        service,
        models.ids,
        max_body_bytes=settings.max_body_bytes,
        max_connections=settings.max_connections,
        access=access,
        access_log=settings.access_log,
    )
    api = _application(config, served, service, access, lambda: server.server_state.connections)
    server = _Server(_uvicorn_config(config, api), started=lambda: announce(_listening(settings, registry, ports)))
    # uvicorn has a warning for each request that is no HTTP: strangers could fill the log, or a pipe that nobody reads.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    await kapsl.start(ports.kapsl)
    if grpc is not None:
        await grpc.start(
            service, reload=models.reload, unload=models.unload, access=access, access_log=settings.access_log
        )
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(server.serve([ports.http]))
        sweeping = group.create_task(_sweep(server, kapsl, settings.client_patience))
        if tracing is not None and cron is not None:
            group.create_task(tracing.follow(cron.events()))  # until the scheduler of the jobs is closed
        await stop.wait()
        service.draining = True
        models.stop()
        draining = {serving}
        if cron is not None:  # fires nothing more from here on
            closing = group.create_task(cron.close(settings.ready_grace + settings.drain))
            draining.add(closing)
        # Whoever sends requests here learns by its next look at readiness not to, and until then none is turned away.
        await asyncio.sleep(settings.ready_grace)
        server.should_exit = True
        draining.add(group.create_task(kapsl.close(settings.drain + _GOODBYE)))
        if grpc is not None:
            draining.add(group.create_task(grpc.close(settings.drain + _GOODBYE)))
        await asyncio.wait(draining, timeout=settings.drain)
        if cron is not None:  # its runs are cut short by now, and it is being written down that it was not their model
            await asyncio.wait({closing}, timeout=_LAST_WORD)
        sweeping.cancel()
        # Whoever still waits now hears that the server is closing, not that the connection is gone.
        await registry.close(0)


def _application(
    config: Config,
    served: Served,
    service: Service,
    access: Access | None,
    connections: Callable[[], Collection[Any]],
) -> HttpApi:
    """All routes, and who may ask for what."""
    settings, (registry, models, cron, _) = config.server, served
    max_body_bytes = settings.max_body_bytes
    pages = Pages()
    parts: list[Part] = [
        OipApi(service, reload=models.reload, unload=models.unload),
        GenerateApi(service, max_body_bytes=max_body_bytes),
        OpenAiApi(service, max_body_bytes=max_body_bytes),
        KapslApi(service, models, max_body_bytes=max_body_bytes),
        pages,
        Live(service, cron, pages=pages.digest),
        DebugApi(service, cron, msgspec.to_builtins(config, enc_hook=str), connections),
    ]
    if cron is not None:
        parts.append(CronApi(cron, registry, service.check_open, max_body_bytes=max_body_bytes))
    return HttpApi(
        service,
        max_body_bytes=max_body_bytes,
        metrics=Metrics(service, cron, connections=lambda: len(connections())),
        parts=parts,
        absent=NO_JOBS,
        guard=_guard(settings, access),
        access_log=settings.access_log,
    )


def _uvicorn_config(config: Config, api: HttpApi) -> uvicorn.Config:
    settings = config.server
    return uvicorn.Config(
        api,
        http=partial(Connection, api.inference, settings.max_connections),  # type: ignore[arg-type]  # it is called as a class would be
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(settings.drain) + _GOODBYE,
        **tls_options(settings),
    )


def _listening(settings: ServerSettings, registry: ModelRegistry[Source], ports: Ports) -> Listening:
    host, port = ports.http.getsockname()[:2]
    scheme = "http" if settings.tls_cert is None else "https"
    return Listening(
        f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}",
        tuple(dict.fromkeys(model.name for model in registry.list())),
        tuple(map(endpoint_of, ports.kapsl)),
        None if ports.grpc is None else ports.grpc.address,
    )


def _guard(settings: ServerSettings, access: Access | None) -> Guard:
    """What stands before the routes."""
    named = bool(settings.allowed_hosts) or is_loopback(settings.host)
    own = ("localhost", "127.0.0.1", "::1", settings.host) if named else None  # by which it is reached from elsewhere
    return Guard(access, Hosts(own, settings.allowed_hosts))


def tls_options(settings: ServerSettings) -> dict[str, Any]:
    """What uvicorn is to know of certificates. Raises `ConfigError` for files that do not do."""
    if settings.tls_cert is None:
        return {}
    try:  # uvicorn would end in a traceback
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=settings.tls_client_ca)
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(filter(None, (settings.tls_cert, settings.tls_key, settings.tls_client_ca)))
        raise ConfigError([f"tls_cert, tls_key, tls_client_ca: {files}: {error}"]) from error
    return {
        "ssl_certfile": settings.tls_cert,
        "ssl_keyfile": settings.tls_key,
        "ssl_ca_certs": settings.tls_client_ca,
        "ssl_cert_reqs": ssl.CERT_NONE if settings.tls_client_ca is None else ssl.CERT_REQUIRED,
    }


async def _sweep(server: uvicorn.Server, kapsl: KapslSocket, patience: float) -> None:
    """Lets go of clients that stall, until cancelled: one look at all connections instead of a timer for each."""
    while True:
        await asyncio.sleep(patience / 4)
        for connection in list(server.server_state.connections):
            if isinstance(connection, Connection):
                connection.close_if_stalled(patience)
        kapsl.close_stalled(patience)


def server_version() -> str:
    """The installed version of this package."""
    try:
        return version("kapsl-scheduler")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
