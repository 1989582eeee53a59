"""The composition root: configuration to packages, engines, schedulers, registry and server, and their end.

What is not here: what is configured (`config`), how a request is answered (`server`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from kapsl_scheduler.app_grpc import check_grpc, grpc_port
from kapsl_scheduler.app_http import Listening, Ports, Served, listen, serve_http, server_version, tls_options
from kapsl_scheduler.app_jobs import Jobs, faults_of_jobs
from kapsl_scheduler.app_kapsl import kapsl_listeners
from kapsl_scheduler.app_memory import frozen
from kapsl_scheduler.app_models import Models
from kapsl_scheduler.app_sources import open_all, start_source
from kapsl_scheduler.app_tracing import tracing_to
from kapsl_scheduler.config import Config, load_config
from kapsl_scheduler.errors import InvalidPackage
from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.server.loop import run_coroutine

__all__ = ["Checked", "Listening", "check", "run", "serve"]

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
# Files that the process may have open beside its connections: models, stores.
_OTHER_FILES: Final = 1024


class Checked(NamedTuple):
    """A model that loads, and how many jobs it brings."""

    name: str
    version: str
    jobs: int


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
    run_coroutine(serve(config, models or config.server.models, engines=engines, announce=announce))


async def serve(
    config: Config,
    models: Sequence[str],
    *,
    engines: Mapping[str, Any] | None = None,
    announce: Callable[[Listening], None],
) -> None:
    """Serves models until SIGTERM or SIGINT. Then it is not ready any more, goes on for `ready_grace` seconds, stops
    accepting, and drains; while models load, a signal ends that too. A second signal ends the process at once.

    `models` are paths of packages or model files, `NAME=PATH` to choose a name; `engines` are models that are there
    already, by name. `announce` is called once, when the server answers. Raises `ModelLoadError`, also for what is
    wrong with the jobs of a package, `ConfigError` for a configured model or a function of jobs that is not there and
    for a store of the jobs that cannot be opened, `StoreError` for one that fails later, and `OSError` for an address
    that cannot be had.
    """
    jobs = Jobs(config)  # before signals are handled: what it imports may take a while
    tls_options(config.server)  # what is wrong with certificates is said before models are loaded
    _allow_files(2 * config.server.max_connections + _OTHER_FILES)  # over HTTP, and as many over the Kapsl socket
    with (
        _first_signal() as stop,
        tempfile.TemporaryDirectory(prefix="kapsl-") as workdir,
        listen(config.server.host, config.server.port) as listener,
        kapsl_listeners(config.server) as sockets,
    ):
        async with (
            grpc_port(config.server) as grpc,
            tracing_to(config.tracing, server_version()) as tracing,
            ModelRegistry(partial(start_source, tracing=tracing), placed=jobs.start) as registry,
            jobs.over(registry) as cron,
            Models(config, registry, jobs, Path(workdir)) as loading,
        ):
            if await _done_before(stop, loading.load(models, engines)):
                served, ports = Served(registry, loading, cron, tracing), Ports(listener, sockets, grpc)
                with frozen():
                    await serve_http(config, served, ports, announce, stop)


async def check(config: Config, models: Sequence[str]) -> list[Checked]:
    """What a server would have with this configuration. Everything is loaded once, nothing is served, and no store is
    opened. Raises what is wrong, as `serve` does."""
    Jobs(config)  # imports the functions that jobs may name
    tls_options(config.server)
    check_grpc(config.server)
    found: list[Checked] = []
    with tempfile.TemporaryDirectory(prefix="kapsl-") as workdir:
        for source in await open_all(config, models, Path(workdir)):
            scheduler = await start_source(source)
            try:
                info = scheduler.model_info()
                manifest = None if source.package is None else source.package.manifest
                faults = [] if manifest is None else faults_of_jobs(source.name, manifest, info, config)
                if faults:
                    raise InvalidPackage(faults, source=source.given)
                jobs = 0 if manifest is None else len(manifest.cron_jobs)
                found.append(Checked(source.name, info.version, jobs))
            finally:
                await scheduler.close(0.0)
    return found


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
