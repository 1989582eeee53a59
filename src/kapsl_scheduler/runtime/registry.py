"""Named models: load, unload, replace without a gap, several versions of one side by side, ready, list.

The registry knows schedulers by their port only; how one is made from a source is the factory's business. What
is not here: files, engines, protocols.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from kapsl_scheduler.errors import ModelLoadError, ModelNotLoaded, Unavailable
from kapsl_scheduler.ports import ReplicaScheduler
from kapsl_scheduler.runtime.reply import Told
from kapsl_scheduler.types import ModelInfo, Priority

__all__ = ["ModelRegistry", "ModelScheduler", "ServedModel"]

Source = TypeVar("Source")


class _EngineHealth(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...


class _Health(Protocol):
    @property
    def ready(self) -> bool: ...
    @property
    def status(self) -> str: ...
    @property
    def engines(self) -> Sequence[_EngineHealth]: ...


class ModelScheduler(ReplicaScheduler, Protocol):
    """What the registry and the servers need of a scheduler beside its calls."""

    def infer_then(
        self, request: Any, then: Told, *, priority: Priority | None = None, timeout: float | None = None
    ) -> Any: ...
    def withdraw(self, submitted: Any) -> None: ...
    def health(self) -> _Health: ...
    def statistics(self) -> Any: ...


class ServedModel(msgspec.Struct, frozen=True):
    """One loaded model under its name. `info` is what the scheduler said when it was loaded."""

    name: str
    info: ModelInfo
    scheduler: ModelScheduler

    @property
    def ready(self) -> bool:
        return self.scheduler.health().ready


class ModelRegistry(Generic[Source]):
    """Many models by name and version, each behind its own scheduler. Of several versions the latest is the model's: by
    number if all are numbers (`2`, `1.10.0`), else the one that was loaded last.

    `factory` makes a started scheduler, loaded and warm, of a source, or raises `ModelLoadError`. `placed` is what
    belongs to a model beside its scheduler: it is called when a model is in its place, before one that it replaces is
    closed; if it raises, everything is as it was before. Leaving the `async with` closes every model.
    """

    def __init__(
        self,
        factory: Callable[[Source], Awaitable[ModelScheduler]],
        *,
        placed: Callable[[Source, ServedModel], Awaitable[None]] | None = None,
    ) -> None:
        self._factory = factory
        self._placed = placed
        self._models: dict[str, dict[str, ServedModel]] = {}  # by name, then by version, in the order of loading
        self._latest: dict[str, ServedModel] = {}
        self._changes: dict[str, asyncio.Lock] = {}
        self._closing = False

    async def __aenter__(self) -> ModelRegistry[Source]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def load(self, name: str, source: Source) -> ServedModel:
        """Loads a model under a name, beside the versions of it that are there. Raises `ModelLoadError`, also for a
        version that is loaded already, `Unavailable` once `close` was called, and what `placed` raises."""
        async with self._changing(name):
            return await self._put(name, source, None)

    async def replace(self, name: str, source: Source, *, version: str = "", drain: float = 10.0) -> ServedModel:
        """Puts a new model in the place of a loaded one (of the latest, without a version), without a gap. It may have
        another version.

        The old one serves until the new one is loaded and warm; what began on the old one ends there, within
        `drain` seconds. If the new one does not load, nothing changes and its `ModelLoadError` is raised, or what
        `placed` raises.
        """
        if name not in self._changes:
            self.get(name, version)
        async with self._changing(name):
            old = self.get(name, version)
            new = await self._put(name, source, old)
            await old.scheduler.close(drain)
            return new

    async def unload(self, name: str, *, version: str = "", drain: float = 10.0) -> None:
        """Takes a model out of service at once (all its versions, without one) and closes it, giving its work `drain`
        seconds to end."""
        if name not in self._changes:
            self.get(name, version)
        async with self._changing(name):
            self.get(name, version)
            models = [model for model in self.versions(name) if version in ("", model.info.version)]
            for model in models:
                self._remove(model)
            await asyncio.gather(*(model.scheduler.close(drain) for model in models))

    def get(self, name: str, version: str = "") -> ServedModel:
        """The model of that name; an empty version means the latest that is loaded.

        Call its scheduler before anything else is awaited: a call that began is waited for when the model is
        replaced, a model merely held is not. Raises `ModelNotLoaded`, which names what is loaded.
        """
        model = self._latest.get(name)
        if model is None:
            loaded = ", ".join(map(repr, sorted(self._models))) or "nothing"
            raise ModelNotLoaded(f"model {name!r} is not loaded; loaded: {loaded}")
        if version and version != model.info.version:
            model = self._models[name].get(version)
            if model is None:
                loaded = ", ".join(repr(one.info.version) for one in self.versions(name))
                raise ModelNotLoaded(f"version {version!r} of model {name!r} is not loaded; loaded: version {loaded}")
        return model

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def versions(self, name: str) -> Sequence[ServedModel]:
        """What is loaded under a name, the latest last."""
        models = tuple(self._models.get(name, {}).values())
        numbers = [_number(model.info.version) for model in models]
        if None in numbers:
            return models
        return tuple(model for _, model in sorted(zip(numbers, models, strict=True), key=lambda pair: pair[0] or ()))

    def list(self) -> list[ServedModel]:
        """The loaded models by name, versions in their order."""
        return [model for name in sorted(self._models) for model in self.versions(name)]

    def ready(self) -> bool:
        """Whether every loaded model can answer."""
        return all(model.ready for models in self._models.values() for model in models.values())

    async def close(self, drain: float = 10.0) -> None:
        """Closes all models side by side, giving their work `drain` seconds. They stay listed until then, so
        that late requests hear from their scheduler that it is closing. What is still being loaded is closed when it is
        there, and never listed."""
        self._closing = True
        models = self.list()
        outcomes = await asyncio.gather(*(model.scheduler.close(drain) for model in models), return_exceptions=True)
        for model in models:
            self._remove(model)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _put(self, name: str, source: Source, before: ServedModel | None) -> ServedModel:
        """Beside what is there, or in the place of one that was there `before`."""
        scheduler = await self._factory(source)
        if self._closing:
            await scheduler.close(0.0)
            raise Unavailable("the registry was closed while the model was being loaded")
        model = ServedModel(name, scheduler.model_info(), scheduler)
        version = model.info.version
        there = self._models.get(name, {}).get(version)
        if there is not None and there is not before:
            await scheduler.close(0.0)
            raise ModelLoadError(
                f"version {version!r} of a model named {name!r} is loaded already: replace it, or unload it first"
            )
        if before is not None:
            self._remove(before)
        self._add(model)
        if self._placed is not None:
            try:
                await self._placed(source, model)
            except BaseException:
                await self._take_back(model, before)
                raise
        return model

    async def _take_back(self, model: ServedModel, before: ServedModel | None) -> None:
        self._remove(model)
        if before is not None:
            if self._closing:  # `close` knew nothing of it: it was not listed
                await before.scheduler.close(0.0)
            else:
                self._add(before)
        await model.scheduler.close()

    def _add(self, model: ServedModel) -> None:
        self._models.setdefault(model.name, {})[model.info.version] = model
        self._latest[model.name] = self.versions(model.name)[-1]

    def _remove(self, model: ServedModel) -> None:
        models = self._models.get(model.name, {})
        if models.get(model.info.version) is model:
            del models[model.info.version]
        if models:
            self._latest[model.name] = self.versions(model.name)[-1]
        else:
            self._models.pop(model.name, None)
            self._latest.pop(model.name, None)

    def _changing(self, name: str) -> asyncio.Lock:
        """Changes to one name wait for each other; a load of one model does not hold up another's."""
        return self._changes.setdefault(name, asyncio.Lock())


def _number(version: str) -> tuple[int, ...] | None:
    """`1.10.0` as it is ordered; None for what is no number."""
    parts = version.split(".")
    return tuple(map(int, parts)) if all(part.isascii() and part.isdigit() for part in parts) else None
