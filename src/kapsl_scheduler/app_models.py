"""A server's models: loaded, loaded anew from where they came, taken out of service, with the jobs of their packages.

What is not here: what they are made of (`app_sources`), finding them by name (`runtime.registry`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple

import msgspec

from kapsl_scheduler.app_jobs import Jobs
from kapsl_scheduler.app_memory import let_go
from kapsl_scheduler.app_sources import Source, checked_name, open_all, open_source, providers_of, source_of
from kapsl_scheduler.config import Config, ConfigError
from kapsl_scheduler.errors import (
    EngineError,
    Forbidden,
    InvalidInput,
    ModelLoadError,
    Overloaded,
    StoreError,
    Unavailable,
)
from kapsl_scheduler.runtime.registry import ModelRegistry, ServedModel
from kapsl_scheduler.server.kapsl_http import KnownModel
from kapsl_scheduler.server.model_ids import ModelIds

__all__ = ["Models"]

_log = logging.getLogger(__name__)


LET_GO_AFTER: Final = 1.0
"""Seconds after which nobody holds a model any more that has left its place."""


class _Reload(NamedTuple):
    old: ServedModel | None
    task: asyncio.Task[ServedModel]


class Models:
    """Loads what the command line names, loads it anew from the same place while the server runs, and loads more from
    the directories that are configured for that. `ids` has the number of each.

    Leaving the `async with` ends the loads that are still running. What was unpacked under `workdir` goes with its
    model.
    """

    def __init__(self, config: Config, registry: ModelRegistry[Source], jobs: Jobs, workdir: Path) -> None:
        self._config = config
        self._registry = registry
        self._jobs = jobs
        self._workdir = workdir
        try:
            self.ids = ModelIds(config.server.model_ids)
        except ValueError as error:
            raise ConfigError([f"server.model_ids: {error}"]) from None
        self._given: dict[str, dict[str, ServedModel]] = {}  # by name and path, what was last loaded from there
        self._known: dict[str, KnownModel] = {}  # as each was when it was last loaded
        self._reloads: dict[str, _Reload] = {}  # by name, of what has none yet by path
        self._adding: set[str] = set()  # names of the latter, once they are known
        self._ending: set[str] = set()
        self._letting_go: asyncio.TimerHandle | None = None
        self._stopping = False

    async def __aenter__(self) -> Models:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        await asyncio.gather(*(reload.task for reload in self._reloads.values()), return_exceptions=True)
        if self._letting_go is not None:
            self._letting_go.cancel()

    async def load(self, models: Sequence[str], engines: Mapping[str, Any] | None = None) -> None:
        """Loads all models. Raises `ModelLoadError`, and `ConfigError` for a configured model that is not there."""
        for source in await open_all(self._config, models, self._workdir, engines):
            model = await self._registry.load(source.name, source)
            if source.package is not None:
                self._given.setdefault(source.name, {})[source.given] = model
            self.ids.assign(source.name)
            self._known[source.name] = _known(source, model)

    async def reload(self, name: str) -> ServedModel:
        """Reads a model's file again and puts what is there now in its place, without a gap, or into service again. Of
        several versions each by itself: what is wrong with one keeps none of the others.

        Whoever asked may stop waiting: it goes on. Raises `ModelNotLoaded`, `ModelLoadError` and `StoreError` (then
        the old model and its jobs stay; of several versions, the first error), `Overloaded` while the model is being
        loaded already and `Unavailable` once `stop` was called.
        """
        old = self._registry.get(name) if name in self._registry or name not in self._given else None
        if name not in self._given:
            raise ModelLoadError(f"model {name!r} is the running program's own, and there is nothing to load it from")
        self._check_idle(name)
        return await self._apart(name, old, self._reload(name))

    async def _apart(self, key: str, old: ServedModel | None, work: Coroutine[Any, Any, ServedModel]) -> ServedModel:
        """What the work returns or raises; it goes on if the caller stops waiting."""
        task = asyncio.create_task(work)
        self._reloads[key] = _Reload(old, task)
        task.add_done_callback(lambda _: self._reloads.pop(key))
        task.add_done_callback(lambda _: self._let_go_soon())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            raise Unavailable("the server is closing") from None

    def _let_go_soon(self) -> None:
        """A model is gone, or will be when the last who asked for that has been told."""
        if self._letting_go is not None:
            self._letting_go.cancel()
        self._letting_go = asyncio.get_running_loop().call_later(LET_GO_AFTER, let_go)

    async def unload(self, name: str) -> None:
        """Takes a model and the jobs of its package out of service; what it has begun ends first. Raises
        `ModelNotLoaded`, `StoreError`, `Overloaded` while the model is being loaded and `Unavailable` once `stop` was
        called."""
        self._registry.get(name)
        self._check_idle(name)
        self._ending.add(name)
        try:
            await self._jobs.remove(name)
            await self._registry.unload(name, drain=self._config.server.drain)
        finally:
            self._ending.discard(name)
            self._let_go_soon()
        self._jobs.look_again()

    async def forget(self, name: str) -> None:
        """Takes a model out of service, if it is in it, and knows it no more: it cannot be loaded again by its name or
        its id. Raises what `unload` raises."""
        if name in self._registry:
            await self.unload(name)
        self._check_idle(name)
        if name in self._registry or name in self._ending:  # somebody else was faster
            raise Overloaded(f"model {name!r} is being loaded or taken out of service")
        self._given.pop(name, None)
        self._known.pop(name, None)
        self.ids.forget(name)

    async def start(self, path: str, id: int | None = None) -> str:
        """Loads a further model from within the configured directories, with the `id` that is asked for or the next
        one, or loads one again that was taken out of service. The model's name.

        Whoever asked may stop waiting: it goes on. Raises `InvalidInput` for what is served already and for an id that
        cannot be, `Forbidden` for another path, and what `reload` raises.
        """
        if self._stopping:
            raise Unavailable("the server is closing")
        try:
            given = {name: tuple(paths) for name, paths in self._given.items()}  # which may change meanwhile
            place, owners = await asyncio.to_thread(self._placed, path, given)
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of links
            raise InvalidInput(f"model_path: {path!r} cannot be looked at: {error}") from None
        key = str(place)
        for name in owners:
            if name in self._registry:
                raise InvalidInput(f"model_path: {path!r} is served already, as model {self.ids.of(name)}, {name!r}")
            self.ids.assign(name, id)
            return (await self.reload(name)).name
        self._check_idle(key)
        return (await self._apart(key, None, self._add(key, id))).name

    def _placed(self, path: str, models: Mapping[str, Iterable[str]]) -> tuple[Path, list[str]]:
        """Where a path leads, links resolved, and which of the models with their paths come from there already."""
        place = Path(path).resolve()
        owners = [
            name
            for name, paths in models.items()
            if any(place == Path(given.removeprefix(f"{name}=")).resolve() for given in paths)
        ]
        directories = [Path(directory).expanduser().resolve() for directory in self._config.server.model_directories]
        if not owners and not any(directory in place.parents for directory in directories):
            raise Forbidden(
                f"model_path: {path!r} is not within a directory that models may be loaded from (model_directories)"
            )
        return place, owners

    async def _add(self, given: str, id: int | None) -> ServedModel:
        name, package = await open_source(given, self._workdir)
        try:
            checked_name(name, given)
            if name in self._registry or name in self._given:
                raise InvalidInput(f"model_path: a model named {name!r} is known already, expected another name")
            self._given[name] = {}  # from here on nobody else can take the name
            self._adding.add(name)
            try:
                self.ids.assign(name, id)
                try:
                    source = source_of(name, given, package, self._config)
                    model = await self._registry.load(name, source)
                except BaseException:
                    self.ids.release(name)
                    raise
            except BaseException:
                del self._given[name]
                raise
            finally:
                self._adding.discard(name)
        except BaseException:
            package.remove()
            raise
        self._given[name][given] = model
        self._known[name] = _known(source, model)
        return model

    def known(self) -> list[KnownModel]:
        """Every model that has an id, in the order of their ids."""
        return [self._as_it_is(self._known[name]) for name in self.ids.names() if name in self._known]

    def _as_it_is(self, known: KnownModel) -> KnownModel:
        status: Literal["active", "inactive", "starting", "stopping"] = "inactive"
        if known.name in self._ending:
            status = "stopping"
        elif known.name in self._registry:
            status = "active" if self._registry.get(known.name).ready else "inactive"
        elif known.name in self._reloads:
            status = "starting"
        return msgspec.structs.replace(known, status=status)

    def _check_idle(self, name: str) -> None:
        if self._stopping:
            raise Unavailable("the server is closing")
        if name in self._reloads or name in self._adding:
            raise Overloaded(f"model {name!r} is being loaded already")

    async def _reload(self, name: str) -> ServedModel:
        given = self._given[name]
        errors: list[EngineError | StoreError] = []
        for path, before in given.items():
            try:
                given[path] = await self._load_again(name, path, before)
            except (ModelLoadError, StoreError) as error:
                _log.error("model %r was not replaced: %s", name, error)
                errors.append(error)
        if errors:
            raise errors[0]
        return self._registry.get(name)

    async def _load_again(self, name: str, path: str, before: ServedModel) -> ServedModel:
        _, package = await open_source(path, self._workdir)
        served = before in self._registry.versions(name)
        source = source_of(name, path, package, self._config)
        try:
            if served:
                drain, version = self._config.server.drain, before.info.version
                model = await self._registry.replace(name, source, version=version, drain=drain)
            else:
                model = await self._registry.load(name, source)
        except BaseException:
            if not served or before in self._registry.versions(name):  # else the new one is in its place
                package.remove()
            raise
        self._known[name] = _known(source, model)
        return model

    def stop(self) -> None:
        """Refuses further reloads and ends those that still load; an old model that was replaced ends its requests."""
        self._stopping = True
        for reload in self._reloads.values():
            if reload.old is None or reload.old in self._registry.list():
                reload.task.cancel()


def _known(source: Source, model: ServedModel) -> KnownModel:
    """A model that has just been loaded, as it is listed."""
    device = level = None
    if source.package is not None:
        manifest = source.package.manifest
        device = providers_of(manifest)[0]
        level = manifest.hardware_requirements.graph_optimization_level or "all"
    return KnownModel(
        model.name,
        path=None if source.package is None else source.given.removeprefix(f"{source.name}="),
        loaded_at=datetime.now(UTC),
        status="active",
        version=model.info.version,
        framework=model.info.framework,
        device=device,
        optimization_level=level,
    )
