"""The jobs of a server's models: their scheduler, its store, and the functions that they may name.

What is not here: how jobs fire (`runtime.cron_scheduler`), and their routes (`server.cron`).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import operator
import re
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from kapsl_scheduler.adapters import builtin_adapters
from kapsl_scheduler.app_sources import Source
from kapsl_scheduler.config import Config, ConfigError
from kapsl_scheduler.errors import (
    DuplicateId,
    InvalidExpression,
    InvalidJob,
    InvalidPackage,
    StoreError,
)
from kapsl_scheduler.packages.manifest import Manifest
from kapsl_scheduler.ports import CronTarget, JobStore
from kapsl_scheduler.runtime.cron_manifest import declared_inputs, declared_job
from kapsl_scheduler.runtime.cron_scheduler import CronScheduler
from kapsl_scheduler.runtime.registry import ModelRegistry, ServedModel
from kapsl_scheduler.server.cron import misfit
from kapsl_scheduler.stores.memory import MemoryStore
from kapsl_scheduler.stores.sqlite import SqliteStore
from kapsl_scheduler.types import ModelInfo

__all__ = ["Jobs", "faults_of_jobs", "store_of"]

_log = logging.getLogger(__name__)

_CALLABLE: Final = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


class _Targets:
    """What jobs fire into: the models by name."""

    def __init__(self, registry: ModelRegistry[Source]) -> None:
        self._registry = registry

    def target(self, model: str) -> CronTarget:
        """Raises `ModelNotLoaded`."""
        return self._registry.get(model).scheduler


class Jobs:
    """The jobs of the models: started when their package is loaded, removed when it is taken out of service. They stay
    in the store when the server ends. Raises `ConfigError` for functions that jobs may name and that are not there."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._callables = _imported(config.cron.callables) if config.cron.enabled else {}
        self._cron: CronScheduler | None = None
        self._registry: ModelRegistry[Source] | None = None

    @contextlib.asynccontextmanager
    async def over(self, registry: ModelRegistry[Source]) -> AsyncIterator[CronScheduler | None]:
        """The scheduler of the jobs, None where there is to be none. Raises `ConfigError` for a store that cannot be
        opened."""
        self._registry = registry
        settings = self._config.cron
        if not settings.enabled:
            yield None
            return
        cron = CronScheduler(
            _Targets(registry),
            store=store_of(self._config),
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

    async def start(self, source: Source, model: ServedModel) -> None:
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
        faults = _misfits(source.name, manifest, model.info)
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


def _misfits(model: str, manifest: Manifest, info: ModelInfo) -> list[str]:
    """Why the model would refuse what its package's jobs send it."""
    return [
        f"job '{model}:{job.id}': {fault}"
        for job in manifest.cron_jobs
        for fault in misfit(declared_inputs(job, info), info)
    ]


def faults_of_jobs(model: str, manifest: Manifest, info: ModelInfo, config: Config) -> list[str]:
    """All that is wrong with a package's jobs, as far as that can be said without a scheduler of them."""
    faults = _misfits(model, manifest, info)
    critical = config.cron.allow_latency_critical
    for job in manifest.cron_jobs:
        try:
            declared_job(job, info, model=model, package=model, allow_latency_critical=critical).check(
                allow_latency_critical=critical
            )
        except (InvalidJob, InvalidExpression) as error:
            faults.extend(getattr(error, "faults", (f"job '{model}:{job.id}': {error}",)))
    return faults


def store_of(config: Config) -> JobStore:
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
