"""A server's models: loaded, loaded anew from where they came, taken out of service, with the jobs of their packages.

What is not here: what they are made of (`app_sources`), finding them by name (`runtime.registry`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from kapsl_scheduler.app_jobs import Jobs
from kapsl_scheduler.app_sources import Source, open_all, open_source, source_of
from kapsl_scheduler.config import Config
from kapsl_scheduler.errors import (
    ModelLoadError,
    Overloaded,
    StoreError,
    Unavailable,
)
from kapsl_scheduler.runtime.registry import ModelRegistry, ServedModel

__all__ = ["Models"]

_log = logging.getLogger(__name__)


class _Reload(NamedTuple):
    old: ServedModel | None
    task: asyncio.Task[ServedModel]


class Models:
    """Loads what the command line names, and loads it anew from the same place while the server runs.

    Leaving the `async with` ends the loads that are still running. What was unpacked under `workdir` goes with its
    model.
    """

    def __init__(self, config: Config, registry: ModelRegistry[Source], jobs: Jobs, workdir: Path) -> None:
        self._config = config
        self._registry = registry
        self._jobs = jobs
        self._workdir = workdir
        self._given: dict[str, dict[str, ServedModel]] = {}  # by name and path, what was last loaded from there
        self._reloads: dict[str, _Reload] = {}
        self._stopping = False

    async def __aenter__(self) -> Models:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        await asyncio.gather(*(reload.task for reload in self._reloads.values()), return_exceptions=True)

    async def load(self, models: Sequence[str], engines: Mapping[str, Any] | None = None) -> None:
        """Loads all models. Raises `ModelLoadError`, and `ConfigError` for a configured model that is not there."""
        for source in await open_all(self._config, models, self._workdir, engines):
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
                _, package = await open_source(path, self._workdir)
                source = source_of(name, path, package, self._config)
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
