"""What a server serves: from what the command line names to packages, engines and schedulers.

What is not here: which models are loaded when (`app_models`), and their jobs (`app_jobs`).
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kapsl_scheduler.config import (
    Config,
    ConfigError,
    ModelSettings,
    unknown_key,
)
from kapsl_scheduler.engines.onnx import OnnxEngine, usable_providers
from kapsl_scheduler.errors import ModelLoadError
from kapsl_scheduler.packages import LoadedPackage, Manifest, load_model
from kapsl_scheduler.runtime.scheduler import DRAIN, Scheduler

if TYPE_CHECKING:
    from kapsl_scheduler.server.tracing import Tracing

__all__ = [
    "Source",
    "checked_name",
    "engine_of",
    "open_all",
    "open_source",
    "providers_of",
    "source_of",
    "start_source",
]

_log = logging.getLogger(__name__)

_NAMED_PATH: Final = re.compile(r"([\w.-]+)=(.+)")


class Source(NamedTuple):
    """A model to serve: its name, what was given for it, and what that is: a package, or engines of a program's own."""

    name: str
    given: str
    settings: ModelSettings
    package: LoadedPackage | None = None
    engines: tuple[Any, ...] = ()


async def open_all(
    config: Config, models: Sequence[str], workdir: Path, engines: Mapping[str, Any] | None = None
) -> list[Source]:
    sources: dict[tuple[str, str], Source] = {}
    for name, given_engines in (engines or {}).items():
        several = tuple(given_engines) if isinstance(given_engines, list | tuple) else (given_engines,)
        sources[checked_name(name, f"{name}=..."), ""] = Source(name, name, config.for_model(name), engines=several)
    for given in models:
        name, package = await open_source(given, workdir)
        checked_name(name, given)
        version = package.manifest.version
        if (name, version) in sources or (name, "") in sources:
            raise ModelLoadError(
                f"{given}: version {version} of a model named {name!r} is there already; name this one NAME={given}"
            )
        sources[name, version] = source_of(name, given, package, config)
    names = dict.fromkeys(name for name, _ in sources)
    faults = [unknown_key("models", name, names) for name in config.models if name not in names]
    if faults:
        raise ConfigError(faults)
    return list(sources.values())


def checked_name(name: str, given: str) -> str:
    """The name of a model; raises `ModelLoadError` where it is none that a URL can have."""
    if "/" in name or name in (".", "..") or not name.isprintable():
        raise ModelLoadError(f"{given}: a model named {name!r} has no URL; name this one NAME={given}")
    return name


def source_of(name: str, given: str, package: LoadedPackage, config: Config) -> Source:
    for warning in package.warnings:
        _log.warning("%s: %s", given, warning)
    return Source(name, given, config.for_model(name), package)


async def open_source(given: str, workdir: Path) -> tuple[str, LoadedPackage]:
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

    def __init__(self, source: Source, tracing: Tracing | None) -> None:
        settings = source.settings
        super().__init__(
            source.engines if source.package is None else [engine_of(source)],
            batch=settings.batch_policy(),
            queue=settings.queue_policy(),
            workers_per_engine=settings.workers,
            default_priority=settings.priority(),
            observer=None if tracing is None else tracing.observer(source.name),
        )
        self._package = source.package

    async def close(self, drain: float = DRAIN) -> None:
        try:
            await super().close(drain)
        finally:
            if self._package is not None:
                await asyncio.to_thread(self._package.remove)


async def start_source(source: Source, tracing: Tracing | None = None) -> Scheduler:
    try:
        return await _SourceScheduler(source, tracing).__aenter__()
    except BaseException:
        if source.package is not None:
            source.package.remove()
        raise


def providers_of(manifest: Manifest) -> tuple[str, ...]:
    """Where a package's model runs: what it asks for, as far as this onnxruntime has it."""
    requirements = manifest.hardware_requirements
    return usable_providers(filter(None, (requirements.preferred_provider, *requirements.fallback_providers)))


def engine_of(source: Source) -> OnnxEngine:
    """The engine of a package."""
    name, package, settings = source.name, source.package, source.settings
    assert package is not None
    manifest = package.manifest
    if manifest.framework.lower() != "onnx":
        raise ModelLoadError(f"{name}: framework {manifest.framework!r} came, expected 'onnx'")
    requirements = manifest.hardware_requirements
    preferred = requirements.preferred_provider
    providers = providers_of(manifest)
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
