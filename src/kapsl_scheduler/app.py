"""The composition root: configuration to packages, engines, schedulers, registry and server, and their end.

What is not here: what is configured (`config`), how a request is answered (`server`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import resource
import signal
import socket
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import uvicorn

from kapsl_scheduler.config import Config, ConfigError, ModelSettings, unknown_key
from kapsl_scheduler.engines.onnx import OnnxEngine, usable_providers
from kapsl_scheduler.errors import ModelLoadError, Overloaded, Unavailable
from kapsl_scheduler.packages import LoadedPackage, load_model
from kapsl_scheduler.runtime.registry import ModelRegistry, ServedModel
from kapsl_scheduler.runtime.scheduler import DRAIN, Scheduler
from kapsl_scheduler.server.connection import Connection
from kapsl_scheduler.server.http import HttpApi

__all__ = ["Listening", "serve"]

_log = logging.getLogger(__name__)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_NAMED_PATH: Final = re.compile(r"([\w.-]+)=(.+)")
# Longer than clients keep a connection idle, so that it is they who close it and never we, under a request.
_KEEP_ALIVE: Final = 75
# What a connection may still take, after the drain has failed all requests, to be told so.
_GOODBYE: Final = 2
# Files that the process may have open beside a connection for each request in flight: models, idle connections.
_OTHER_FILES: Final = 1024


class Listening(NamedTuple):
    """What a server says once it answers."""

    url: str
    models: tuple[str, ...]


class _Source(NamedTuple):
    """A model to serve: its name, what was given for it, and what that is."""

    name: str
    given: str
    package: LoadedPackage
    settings: ModelSettings


class _Reload(NamedTuple):
    old: ServedModel
    task: asyncio.Task[ServedModel]


async def serve(config: Config, models: Sequence[str], *, announce: Callable[[Listening], None]) -> None:
    """Serves models until SIGTERM or SIGINT, then drains; while they load, a signal ends that too. A second signal
    ends the process at once.

    `models` are paths of packages or model files, `NAME=PATH` to choose a name. `announce` is called once, when
    the server answers. Raises `ModelLoadError`, `ConfigError` for a configured model that is not there, and
    `OSError` for an address that cannot be had.
    """
    _allow_files(config.server.max_in_flight + _OTHER_FILES)
    with (
        _first_signal() as stop,
        tempfile.TemporaryDirectory(prefix="kapsl-") as workdir,
        _listen(config.server.host, config.server.port) as listener,
    ):
        async with ModelRegistry(_start) as registry, _Models(config, registry, Path(workdir)) as loading:
            if await _done_before(stop, loading.load(models)):
                await _serve_http(config, registry, loading, listener, announce, stop)


# ------------------------------------------------------------------------------------------------ models


class _Models:
    """Loads what the command line names, and loads it anew from the same place while the server runs.

    Leaving the `async with` ends the loads that are still running. What was unpacked under `workdir` goes with its
    model.
    """

    def __init__(self, config: Config, registry: ModelRegistry[_Source], workdir: Path) -> None:
        self._config = config
        self._registry = registry
        self._workdir = workdir
        self._given: dict[str, str] = {}
        self._reloads: dict[str, _Reload] = {}
        self._stopping = False

    async def __aenter__(self) -> _Models:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        await asyncio.gather(*(reload.task for reload in self._reloads.values()), return_exceptions=True)

    async def load(self, models: Sequence[str]) -> None:
        """Loads all models. Raises `ModelLoadError`, and `ConfigError` for a configured model that is not there."""
        for source in await _open_all(self._config, models, self._workdir):
            await self._registry.load(source.name, source)
            self._given[source.name] = source.given

    async def reload(self, name: str) -> ServedModel:
        """Reads a model's file again and puts what is there now in its place, without a gap.

        Whoever asked may stop waiting: it goes on. Raises `ModelNotLoaded`, `ModelLoadError` (then the old model
        stays), `Overloaded` while the model is being loaded already and `Unavailable` once `stop` was called.
        """
        old = self._registry.get(name)
        if self._stopping:
            raise Unavailable("the server is closing")
        if name in self._reloads:
            raise Overloaded(f"model {name!r} is being loaded already")
        task = asyncio.create_task(self._reload(name))
        self._reloads[name] = _Reload(old, task)
        task.add_done_callback(lambda _: self._reloads.pop(name))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            raise Unavailable("the server is closing") from None

    async def _reload(self, name: str) -> ServedModel:
        try:
            _, package = await _open(self._given[name], self._workdir)
            source = _source(name, self._given[name], package, self._config)
            return await self._registry.replace(name, source, drain=self._config.server.drain)
        except ModelLoadError as error:
            _log.error("model %r was not replaced: %s", name, error)
            raise

    def stop(self) -> None:
        """Refuses further reloads and ends those that still load; an old model that was replaced ends its requests."""
        self._stopping = True
        for reload in self._reloads.values():
            if reload.old in self._registry.list():
                reload.task.cancel()


async def _open_all(config: Config, models: Sequence[str], workdir: Path) -> list[_Source]:
    sources: dict[str, _Source] = {}
    for given in models:
        name, package = await _open(given, workdir)
        if "/" in name or name in (".", "..") or not name.isprintable():
            raise ModelLoadError(f"{given}: a model named {name!r} has no URL; name this one NAME={given}")
        if name in sources:
            raise ModelLoadError(f"{given}: a model named {name!r} is there already; name this one NAME={given}")
        sources[name] = _source(name, given, package, config)
    faults = [unknown_key("models", name, sources) for name in config.models if name not in sources]
    if faults:
        raise ConfigError(faults)
    return list(sources.values())


def _source(name: str, given: str, package: LoadedPackage, config: Config) -> _Source:
    for warning in package.warnings:
        _log.warning("%s: %s", given, warning)
    if package.manifest.cron_jobs:
        _log.warning("%s: cron_jobs: kept, but this version does not run them", given)
    return _Source(name, given, package, config.for_model(name))


async def _open(given: str, workdir: Path) -> tuple[str, LoadedPackage]:
    """The name and the package of what was given. Being cancelled waits for the thread that unpacks it, which would
    go on writing into a directory that is being removed."""
    opening = asyncio.create_task(asyncio.to_thread(_open_here, given, workdir))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        await asyncio.gather(opening, return_exceptions=True)
        raise


def _open_here(given: str, workdir: Path) -> tuple[str, LoadedPackage]:
    named = None if Path(given).exists() else _NAMED_PATH.fullmatch(given)
    package = load_model(named.group(2) if named else given, workdir=workdir)
    return named.group(1) if named else package.manifest.project_name, package


class _PackageScheduler(Scheduler):
    """Takes what its package was unpacked to along when it closes, so that a model that was replaced leaves no
    files behind."""

    def __init__(self, source: _Source) -> None:
        settings = source.settings
        super().__init__(
            [_engine(source)],
            batch=settings.batch_policy(),
            queue=settings.queue_policy(),
            workers_per_engine=settings.workers,
            default_priority=settings.priority(),
        )
        self._package = source.package

    async def close(self, drain: float = DRAIN) -> None:
        try:
            await super().close(drain)
        finally:
            await asyncio.to_thread(self._package.remove)


async def _start(source: _Source) -> Scheduler:
    try:
        return await _PackageScheduler(source).__aenter__()
    except BaseException:
        source.package.remove()
        raise


def _engine(source: _Source) -> OnnxEngine:
    manifest = source.package.manifest
    if manifest.framework.lower() != "onnx":
        raise ModelLoadError(f"{source.name}: framework {manifest.framework!r} came, expected 'onnx'")
    requirements = manifest.hardware_requirements
    preferred = requirements.preferred_provider
    providers = usable_providers(filter(None, (preferred, *requirements.fallback_providers)))
    if preferred and not preferred.lower().startswith(providers[0]):
        _log.warning("%s: this onnxruntime has no provider %r, so %r it is", source.given, preferred, providers[0])
    return OnnxEngine(
        source.package.model_path,
        providers=providers,
        threads=source.settings.threads,
        graph_optimization_level=requirements.graph_optimization_level or "all",
        name=source.name,
        version=manifest.version,
    )


# ---------------------------------------------------------------------------------------------- the server


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


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        hint = "; another --port, or 0 for any that is free, may do" if port else ""
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from error


async def _serve_http(
    config: Config,
    registry: ModelRegistry[_Source],
    models: _Models,
    listener: socket.socket,
    announce: Callable[[Listening], None],
    stop: asyncio.Event,
) -> None:
    api = HttpApi(
        registry,
        version=_version(),
        max_body_bytes=config.server.max_body_bytes,
        max_in_flight=config.server.max_in_flight,
        reload=models.reload,
    )
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    names = tuple(model.name for model in registry.list())
    server = _Server(
        uvicorn.Config(
            api,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(config.server.drain) + _GOODBYE,
        ),
        started=lambda: announce(Listening(url, names)),
    )
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(server.serve([listener]))
        await stop.wait()
        api.draining = True
        models.stop()
        server.should_exit = True
        await asyncio.wait({serving}, timeout=config.server.drain)
        # Whoever still waits now hears that the server is closing, not that the connection is gone.
        await registry.close(0)


def _version() -> str:
    try:
        return version("kapsl-scheduler")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _allow_files(number: int) -> None:
    """Raises the process's limit on open files to `number`, as far as it may: the usual 1024 would leave clients
    unanswered in the backlog, health probes among them, before any bound of ours is reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _done_before(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether the work was done before the signal, which cancels it. Raises what the work raises."""
    task = asyncio.create_task(work)
    signalled = asyncio.create_task(stop.wait())
    signalled.add_done_callback(lambda _: task.cancel())
    try:
        await task
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    finally:
        signalled.cancel()
    return not stop.is_set()


@contextlib.contextmanager
def _first_signal() -> Iterator[asyncio.Event]:
    """An event that the first signal sets. The next one meets the system's own handler, which ends the process."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def restore() -> None:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    def on_signal() -> None:
        restore()
        stop.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        restore()
