"""The composition root: configuration to packages, engines, schedulers, registry and server, and their end.

What is not here: what is configured (`config`), how a request is answered (`server`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import math
import operator
import os
import re
import resource
import signal
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import uvicorn

from kapsl_scheduler.adapters import builtin_adapters
from kapsl_scheduler.config import (
    Config,
    ConfigError,
    ModelSettings,
    ServerSettings,
    is_loopback,
    load_config,
    unknown_key,
)
from kapsl_scheduler.engines.onnx import OnnxEngine, usable_providers
from kapsl_scheduler.errors import (
    DuplicateId,
    InvalidExpression,
    InvalidJob,
    InvalidPackage,
    ModelLoadError,
    Overloaded,
    StoreError,
    Unavailable,
)
from kapsl_scheduler.packages import LoadedPackage, load_model
from kapsl_scheduler.ports import CronTarget, JobStore
from kapsl_scheduler.runtime.cron_manifest import declared_inputs
from kapsl_scheduler.runtime.cron_scheduler import CronScheduler
from kapsl_scheduler.runtime.registry import ModelRegistry, ServedModel
from kapsl_scheduler.runtime.scheduler import DRAIN, Scheduler
from kapsl_scheduler.server.access import Access, Guard, Hosts
from kapsl_scheduler.server.cron import NO_JOBS, CronApi, misfit
from kapsl_scheduler.server.door import Connection
from kapsl_scheduler.server.generate import GenerateApi
from kapsl_scheduler.server.http import HttpApi, Part
from kapsl_scheduler.server.loop import run_coroutine
from kapsl_scheduler.server.metrics import Metrics
from kapsl_scheduler.server.oip_http import OipApi
from kapsl_scheduler.server.openai import OpenAiApi
from kapsl_scheduler.server.service import Service
from kapsl_scheduler.stores.memory import MemoryStore
from kapsl_scheduler.stores.sqlite import SqliteStore

__all__ = ["Listening", "serve"]

_log = logging.getLogger(__name__)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_NAMED_PATH: Final = re.compile(r"([\w.-]+)=(.+)")
_CALLABLE: Final = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")
# Longer than clients keep a connection idle, so that it is they who close it and never we, under a request.
_KEEP_ALIVE: Final = 75
# What a connection may still take, after the drain has failed all requests, to be told so.
_GOODBYE: Final = 2
# Seconds in which it is written down how the last runs of jobs have ended.
_LAST_WORD: Final = 1.0
# Files that the process may have open beside its connections: models, stores.
_OTHER_FILES: Final = 1024


class Listening(NamedTuple):
    """What a server says once it answers."""

    url: str
    models: tuple[str, ...]


class _Source(NamedTuple):
    """A model to serve: its name, what was given for it, and what that is: a package, or engines of a program's own."""

    name: str
    given: str
    settings: ModelSettings
    package: LoadedPackage | None = None
    engines: tuple[Any, ...] = ()


class _Reload(NamedTuple):
    old: ServedModel | None
    task: asyncio.Task[ServedModel]


def run(
    engines: Mapping[str, Any],
    models: Sequence[str] = (),
    *,
    announce: Callable[[Listening], None] = lambda listening: None,
    **settings: Any,
) -> None:
    """Serves engines of a program's own, each under its name (an engine, or several that run the same model), beside
    the packages and files of `models`, until a signal ends it: what `kapsl-scheduler serve` does, from Python.

    `settings` are those of the command's options (`port=8081`, `max_batch_size=64`), before variables and the file that
    `KAPSL_CONFIG` names. Raises what `serve` raises, and `ConfigError`.
    """
    config = load_config(flags=settings, environment=os.environ)
    run_coroutine(serve(config, models, engines=engines, announce=announce))


async def serve(
    config: Config,
    models: Sequence[str],
    *,
    engines: Mapping[str, Any] | None = None,
    announce: Callable[[Listening], None],
) -> None:
    """Serves models until SIGTERM or SIGINT, then drains; while they load, a signal ends that too. A second signal
    ends the process at once.

    `models` are paths of packages or model files, `NAME=PATH` to choose a name; `engines` are models that are there
    already, by name. `announce` is called once, when the server answers. Raises `ModelLoadError`, also for what is
    wrong with the jobs of a package, `ConfigError` for a configured model or a function of jobs that is not there and
    for a store of the jobs that cannot be opened, `StoreError` for one that fails later, and `OSError` for an address
    that cannot be had.
    """
    jobs = _Jobs(config)  # before signals are handled: what it imports may take a while
    _allow_files(config.server.max_connections + _OTHER_FILES)
    with (
        _first_signal() as stop,
        tempfile.TemporaryDirectory(prefix="kapsl-") as workdir,
        _listen(config.server.host, config.server.port) as listener,
    ):
        async with (
            ModelRegistry(_start, placed=jobs.start) as registry,
            jobs.over(registry) as cron,
            _Models(config, registry, jobs, Path(workdir)) as loading,
        ):
            if await _done_before(stop, loading.load(models, engines)):
                await _serve_http(config, registry, cron, loading, listener, announce, stop)


# ------------------------------------------------------------------------------------------------ models


class _Models:
    """Loads what the command line names, and loads it anew from the same place while the server runs.

    Leaving the `async with` ends the loads that are still running. What was unpacked under `workdir` goes with its
    model.
    """

    def __init__(self, config: Config, registry: ModelRegistry[_Source], jobs: _Jobs, workdir: Path) -> None:
        self._config = config
        self._registry = registry
        self._jobs = jobs
        self._workdir = workdir
        self._given: dict[str, dict[str, ServedModel]] = {}  # by name and path, what was last loaded from there
        self._reloads: dict[str, _Reload] = {}
        self._stopping = False

    async def __aenter__(self) -> _Models:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        await asyncio.gather(*(reload.task for reload in self._reloads.values()), return_exceptions=True)

    async def load(self, models: Sequence[str], engines: Mapping[str, Any] | None = None) -> None:
        """Loads all models. Raises `ModelLoadError`, and `ConfigError` for a configured model that is not there."""
        for source in await _open_all(self._config, models, self._workdir, engines):
            model = await self._registry.load(source.name, source)
            if source.package is not None:
                self._given.setdefault(source.name, {})[source.given] = model

    async def reload(self, name: str) -> ServedModel:
        """Reads a model's file again (of several versions, all) and puts what is there now in its place, without a gap,
        or into service again.

        Whoever asked may stop waiting: it goes on. Raises `ModelNotLoaded`, `ModelLoadError` and `StoreError` (then
        the old model and its jobs stay), `Overloaded` while the model is being loaded already and `Unavailable` once
        `stop` was called.
        """
        old = self._registry.get(name) if name in self._registry or name not in self._given else None
        if name not in self._given:
            raise ModelLoadError(f"model {name!r} is the running program's own, and there is nothing to load it from")
        self._check_idle(name)
        task = asyncio.create_task(self._reload(name))
        self._reloads[name] = _Reload(old, task)
        task.add_done_callback(lambda _: self._reloads.pop(name))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            raise Unavailable("the server is closing") from None

    async def unload(self, name: str) -> None:
        """Takes a model and the jobs of its package out of service; what it has begun ends first. Raises
        `ModelNotLoaded`, `StoreError`, `Overloaded` while the model is being loaded and `Unavailable` once `stop` was
        called."""
        self._registry.get(name)
        self._check_idle(name)
        await self._jobs.remove(name)
        await self._registry.unload(name, drain=self._config.server.drain)
        self._jobs.look_again()

    def _check_idle(self, name: str) -> None:
        if self._stopping:
            raise Unavailable("the server is closing")
        if name in self._reloads:
            raise Overloaded(f"model {name!r} is being loaded already")

    async def _reload(self, name: str) -> ServedModel:
        try:
            given = self._given[name]
            for path, before in given.items():
                _, package = await _open(path, self._workdir)
                source = _source(name, path, package, self._config)
                if before in self._registry.versions(name):
                    drain, version = self._config.server.drain, before.info.version
                    given[path] = await self._registry.replace(name, source, version=version, drain=drain)
                else:
                    given[path] = await self._registry.load(name, source)
            return self._registry.get(name)
        except (ModelLoadError, StoreError) as error:
            _log.error("model %r was not replaced: %s", name, error)
            raise

    def stop(self) -> None:
        """Refuses further reloads and ends those that still load; an old model that was replaced ends its requests."""
        self._stopping = True
        for reload in self._reloads.values():
            if reload.old is None or reload.old in self._registry.list():
                reload.task.cancel()


async def _open_all(
    config: Config, models: Sequence[str], workdir: Path, engines: Mapping[str, Any] | None = None
) -> list[_Source]:
    sources: dict[tuple[str, str], _Source] = {}
    for name, given_engines in (engines or {}).items():
        several = tuple(given_engines) if isinstance(given_engines, list | tuple) else (given_engines,)
        sources[_checked_name(name, f"{name}=..."), ""] = _Source(name, name, config.for_model(name), engines=several)
    for given in models:
        name, package = await _open(given, workdir)
        _checked_name(name, given)
        version = package.manifest.version
        if (name, version) in sources or (name, "") in sources:
            raise ModelLoadError(
                f"{given}: version {version} of a model named {name!r} is there already; name this one NAME={given}"
            )
        sources[name, version] = _source(name, given, package, config)
    names = dict.fromkeys(name for name, _ in sources)
    faults = [unknown_key("models", name, names) for name in config.models if name not in names]
    if faults:
        raise ConfigError(faults)
    return list(sources.values())


def _checked_name(name: str, given: str) -> str:
    if "/" in name or name in (".", "..") or not name.isprintable():
        raise ModelLoadError(f"{given}: a model named {name!r} has no URL; name this one NAME={given}")
    return name


def _source(name: str, given: str, package: LoadedPackage, config: Config) -> _Source:
    for warning in package.warnings:
        _log.warning("%s: %s", given, warning)
    return _Source(name, given, config.for_model(name), package)


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


class _SourceScheduler(Scheduler):
    """A scheduler of what is to be served. It takes along what its package was unpacked to when it closes, so that a
    model that was replaced leaves no files behind."""

    def __init__(self, source: _Source) -> None:
        settings = source.settings
        super().__init__(
            source.engines if source.package is None else [_engine(source)],
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
            if self._package is not None:
                await asyncio.to_thread(self._package.remove)


async def _start(source: _Source) -> Scheduler:
    try:
        return await _SourceScheduler(source).__aenter__()
    except BaseException:
        if source.package is not None:
            source.package.remove()
        raise


def _engine(source: _Source) -> OnnxEngine:
    """The engine of a package."""
    name, package, settings = source.name, source.package, source.settings
    assert package is not None
    manifest = package.manifest
    if manifest.framework.lower() != "onnx":
        raise ModelLoadError(f"{name}: framework {manifest.framework!r} came, expected 'onnx'")
    requirements = manifest.hardware_requirements
    preferred = requirements.preferred_provider
    providers = usable_providers(filter(None, (preferred, *requirements.fallback_providers)))
    if preferred and not preferred.lower().startswith(providers[0]):
        _log.warning("%s: this onnxruntime has no provider %r, so %r it is", source.given, preferred, providers[0])
    return OnnxEngine(
        package.model_path,
        providers=providers,
        threads=settings.threads,
        graph_optimization_level=requirements.graph_optimization_level or "all",
        name=name,
        version=manifest.version,
    )


# -------------------------------------------------------------------------------------------------- jobs


class _Targets:
    """What jobs fire into: the models by name."""

    def __init__(self, registry: ModelRegistry[_Source]) -> None:
        self._registry = registry

    def target(self, model: str) -> CronTarget:
        """Raises `ModelNotLoaded`."""
        return self._registry.get(model).scheduler


class _Jobs:
    """The jobs of the models: started when their package is loaded, removed when it is taken out of service. They stay
    in the store when the server ends. Raises `ConfigError` for functions that jobs may name and that are not there."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._callables = _imported(config.cron.callables) if config.cron.enabled else {}
        self._cron: CronScheduler | None = None
        self._registry: ModelRegistry[_Source] | None = None

    @contextlib.asynccontextmanager
    async def over(self, registry: ModelRegistry[_Source]) -> AsyncIterator[CronScheduler | None]:
        """The scheduler of the jobs, None where there is to be none. Raises `ConfigError` for a store that cannot be
        opened."""
        self._registry = registry
        settings = self._config.cron
        if not settings.enabled:
            yield None
            return
        cron = CronScheduler(
            _Targets(registry),
            store=_store(self._config),
            allow_latency_critical=settings.allow_latency_critical,
            adapters=builtin_adapters,
            max_concurrent_runs=settings.max_concurrent_runs,
            history_keep=settings.history_keep,
            history_max_age=settings.history_max_age,
        )
        for name, function in self._callables.items():
            cron.bind(name, function)
        try:
            await cron.__aenter__()
        except StoreError as error:
            raise ConfigError([f"store: {error}; --store PATH names another, --no-cron serves without jobs"]) from error
        self._cron = cron
        try:
            yield cron
        finally:
            await cron.close(0.0)

    async def start(self, source: _Source, model: ServedModel) -> None:
        """Starts the jobs of a package whose model is in its place, all or none of them. Raises `InvalidPackage` with
        everything that is wrong with them, `StoreError`. Of several versions of a model, the jobs of the latest run."""
        if self._registry is not None and self._registry.get(source.name) is not model:
            return
        if source.package is None:
            self.look_again()
            return
        manifest = source.package.manifest
        if self._cron is None:
            if manifest.cron_jobs:
                _log.warning("%s: cron_jobs: not run, as the server was started with --no-cron", source.given)
            return
        faults = [
            f"job '{source.name}:{job.id}': {fault}"
            for job in manifest.cron_jobs
            for fault in misfit(declared_inputs(job, model.info), model.info)
        ]
        try:
            if faults:
                raise InvalidJob(faults)
            await self._cron.register_from_manifest(manifest, model=source.name)
        except (InvalidJob, InvalidExpression, DuplicateId) as error:
            raise InvalidPackage(getattr(error, "faults", (str(error),)), source=source.given) from error
        self._cron.look_again()

    async def remove(self, name: str) -> None:
        """Removes the jobs that came with a model's package. Raises `StoreError`."""
        if self._cron is not None:
            await self._cron.unregister_package(name)

    def look_again(self) -> None:
        """A model has gone: what others want of it waits."""
        if self._cron is not None:
            self._cron.look_again()


def _store(config: Config) -> JobStore:
    named = config.cron.store
    if named == "memory" or (named is None and config.state_directory is None):
        return MemoryStore()
    if named is not None:
        return SqliteStore(Path(named).expanduser())
    assert config.state_directory is not None
    try:
        config.state_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        pass  # the store says what is wrong with it
    return SqliteStore(config.state_directory / "cron.db")


def _imported(callables: Mapping[str, str]) -> dict[str, Callable[..., Any]]:
    """The functions that jobs may name. Raises `ConfigError` with what is wrong with each."""
    found: dict[str, Callable[..., Any]] = {}
    faults: list[str] = []
    for name, text in callables.items():
        try:
            if not name.strip():
                raise ValueError("expected a name that jobs can give, got a blank one")
            found[name] = _import(text)
        except ValueError as error:
            faults.append(f"cron.callables.{name}: {error}")
    if faults:
        raise ConfigError(faults)
    return found


def _import(text: str) -> Callable[..., Any]:
    """What `module:function` stands for. Raises `ValueError`."""
    if _CALLABLE.fullmatch(text) is None:
        raise ValueError(f"expected module:function, got {text!r}")
    module, _, path = text.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # it runs, and may raise anything
        raise ValueError(
            f"expected a module that can be imported, got {module!r}: {type(error).__name__}: {error}"
        ) from error
    try:
        found = operator.attrgetter(path)(found)
    except Exception as error:
        raise ValueError(f"expected a name in module {module!r}, got {path!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"expected a function, got {text!r}, which is of type {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


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
    cron: CronScheduler | None,
    models: _Models,
    listener: socket.socket,
    announce: Callable[[Listening], None],
    stop: asyncio.Event,
) -> None:
    service = Service(registry, version=_version(), max_in_flight=config.server.max_in_flight)
    max_body_bytes = config.server.max_body_bytes
    parts: list[Part] = [
        OipApi(service, reload=models.reload, unload=models.unload),
        GenerateApi(service, max_body_bytes=max_body_bytes),
        OpenAiApi(service, max_body_bytes=max_body_bytes),
    ]
    if cron is not None:
        parts.append(CronApi(cron, registry, service.check_open, max_body_bytes=max_body_bytes))
    metrics = Metrics(service.version, cron)
    settings = config.server
    api = HttpApi(
        service,
        max_body_bytes=max_body_bytes,
        metrics=metrics,
        parts=parts,
        absent=NO_JOBS,
        guard=_guard(config),
        access_log=settings.access_log,
    )
    host, port = listener.getsockname()[:2]
    scheme = "http" if settings.tls_cert is None else "https"
    url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    names = tuple(dict.fromkeys(model.name for model in registry.list()))
    server = _Server(
        uvicorn.Config(
            api,
            http=partial(Connection, api.inference, settings.max_connections),  # type: ignore[arg-type]  # it is called as a class would be
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(config.server.drain) + _GOODBYE,
            **_tls(settings),
        ),
        started=lambda: announce(Listening(url, names)),
    )
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(server.serve([listener]))
        sweeping = group.create_task(_sweep(server, settings.client_patience))
        await stop.wait()
        service.draining = True
        models.stop()
        server.should_exit = True
        draining = {serving}
        if cron is not None:  # fires nothing more from here on
            closing = group.create_task(cron.close(config.server.drain))
            draining.add(closing)
        await asyncio.wait(draining, timeout=config.server.drain)
        if cron is not None:  # its runs are cut short by now, and it is being written down that it was not their model
            await asyncio.wait({closing}, timeout=_LAST_WORD)
        sweeping.cancel()
        # Whoever still waits now hears that the server is closing, not that the connection is gone.
        await registry.close(0)


def _guard(config: Config) -> Guard | None:
    """What stands before the routes, if anything does."""
    settings = config.server
    access = Access(config.tokens) if config.tokens else None
    hosts = None
    if settings.allowed_hosts or is_loopback(settings.host):
        hosts = Hosts(("localhost", "127.0.0.1", "::1", settings.host, *settings.allowed_hosts))
    return None if access is None and hosts is None else Guard(access, hosts)


def _tls(settings: ServerSettings) -> dict[str, Any]:
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


async def _sweep(server: uvicorn.Server, patience: float) -> None:
    """Lets go of clients that stall, until cancelled: one look at all connections instead of a timer for each."""
    while True:
        await asyncio.sleep(patience / 4)
        for connection in list(server.server_state.connections):
            if isinstance(connection, Connection):
                connection.close_if_stalled(patience)


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
