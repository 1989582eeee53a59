"""The registry of named models, over fakes for its own rules and over real schedulers for a replacement's gap."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import Scheduler
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.errors import ModelLoadError, ModelNotLoaded, Unavailable
from kapsl_scheduler.runtime.metrics import SchedulerHealth
from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.types import ModelInfo


class FakeScheduler:
    """A started scheduler that remembers how it was closed."""

    def __init__(self, version: str = "1") -> None:
        self.version = version
        self.ready = True
        self.closed_with: float | None = None
        self.close_error: Exception | None = None

    def model_info(self) -> ModelInfo:
        return ModelInfo("inner", version=self.version)

    def health(self) -> SchedulerHealth:
        return SchedulerHealth(self.ready, self.ready, "ready", ())

    async def close(self, drain: float = 10.0) -> None:
        if self.close_error is not None:
            self.closed_with = drain
            raise self.close_error
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.closed_with = drain


def registry_of_fakes() -> ModelRegistry[Any]:
    """A registry whose sources are the schedulers themselves, or the error that loading them raises."""

    async def start(source: Any) -> Any:
        if isinstance(source, Exception):
            raise source
        return source

    return ModelRegistry(start)


async def test_models_are_found_by_name_and_version() -> None:
    registry = registry_of_fakes()
    b = await registry.load("b", FakeScheduler("2"))
    a = await registry.load("a", FakeScheduler())

    assert registry.get("b") is b
    assert registry.get("b", "2") is b
    assert (b.name, b.info.version) == ("b", "2")
    assert registry.list() == [a, b]
    assert "a" in registry
    assert "c" not in registry


async def test_what_is_not_loaded_is_refused_by_naming_what_is() -> None:
    registry = registry_of_fakes()
    with pytest.raises(ModelNotLoaded, match="'c' is not loaded; loaded: nothing"):
        registry.get("c")
    await registry.load("b", FakeScheduler())
    await registry.load("a", FakeScheduler())

    with pytest.raises(ModelNotLoaded, match="'c' is not loaded; loaded: 'a', 'b'"):
        registry.get("c")
    with pytest.raises(ModelNotLoaded, match="version '9' of model 'a' is not loaded; loaded: version '1'"):
        registry.get("a", "9")
    with pytest.raises(ModelNotLoaded, match="'c'"):
        await registry.unload("c")
    with pytest.raises(ModelNotLoaded, match="'c'"):
        await registry.replace("c", FakeScheduler())


async def test_a_name_is_loaded_once() -> None:
    registry = registry_of_fakes()
    first = FakeScheduler()
    await registry.load("a", first)

    with pytest.raises(ModelLoadError, match="version '1' of a model named 'a' is loaded already"):
        await registry.load("a", FakeScheduler())

    assert registry.get("a").scheduler is first


@pytest.mark.parametrize(
    ("loaded", "ordered"),
    [
        (["2", "10", "9"], ["2", "9", "10"]),
        (["1.10.0", "1.9.3", "2"], ["1.9.3", "1.10.0", "2"]),
        (["b", "2", "a"], ["b", "2", "a"]),
    ],
)
async def test_the_latest_of_several_versions_is_the_models(loaded: list[str], ordered: list[str]) -> None:
    registry = registry_of_fakes()
    schedulers = {version: FakeScheduler(version) for version in loaded}
    for version in loaded:
        await registry.load("a", schedulers[version])

    assert [model.info.version for model in registry.versions("a")] == ordered
    assert [model.info.version for model in registry.list()] == ordered
    assert registry.get("a").info.version == ordered[-1]
    assert [registry.get("a", version).scheduler for version in loaded] == list(schedulers.values())
    with pytest.raises(ModelNotLoaded, match=f"loaded: version {', '.join(map(repr, ordered))}"):
        registry.get("a", "no")
    await registry.unload("a", version=ordered[-1])
    assert registry.get("a").info.version == ordered[-2]
    assert schedulers[ordered[-1]].closed_with is not None
    await registry.unload("a")
    assert "a" not in registry
    assert None not in [scheduler.closed_with for scheduler in schedulers.values()]


async def test_one_of_several_versions_is_replaced_also_by_another() -> None:
    registry = registry_of_fakes()
    one, two, three = FakeScheduler("1"), FakeScheduler("2"), FakeScheduler("3")
    await registry.load("a", one)
    await registry.load("a", two)
    with pytest.raises(ModelLoadError, match="version '2' of a model named 'a' is loaded already"):
        await registry.replace("a", FakeScheduler("2"), version="1")
    await registry.replace("a", three, version="1")

    assert [model.info.version for model in registry.versions("a")] == ["2", "3"]
    assert (one.closed_with is not None, two.closed_with) == (True, None)


async def test_a_model_that_does_not_load_leaves_no_name() -> None:
    registry = registry_of_fakes()

    with pytest.raises(ModelLoadError, match="broken"):
        await registry.load("a", ModelLoadError("broken"))

    assert registry.list() == []
    await registry.load("a", FakeScheduler())


async def test_a_replacement_that_does_not_load_changes_nothing() -> None:
    registry = registry_of_fakes()
    old = FakeScheduler()
    await registry.load("a", old)

    with pytest.raises(ModelLoadError, match="broken"):
        await registry.replace("a", ModelLoadError("broken"))

    assert registry.get("a").scheduler is old
    assert old.closed_with is None


async def test_unloading_takes_the_name_away_and_drains() -> None:
    registry = registry_of_fakes()
    scheduler = FakeScheduler()
    await registry.load("a", scheduler)

    await registry.unload("a", drain=3.0)

    assert scheduler.closed_with == 3.0
    assert "a" not in registry


async def test_ready_means_every_model() -> None:
    registry = registry_of_fakes()
    assert registry.ready()
    schedulers = [FakeScheduler(), FakeScheduler()]
    for name, scheduler in zip("ab", schedulers, strict=True):
        await registry.load(name, scheduler)
    assert registry.ready()

    schedulers[1].ready = False

    assert not registry.ready()
    assert [model.ready for model in registry.list()] == [True, False]


async def test_closing_closes_every_model_even_if_one_fails_to() -> None:
    schedulers = [FakeScheduler(), FakeScheduler()]
    schedulers[0].close_error = RuntimeError("stuck")

    async def scenario() -> None:
        async with registry_of_fakes() as registry:
            for name, scheduler in zip("ab", schedulers, strict=True):
                await registry.load(name, scheduler)

    with pytest.raises(RuntimeError, match="stuck"):
        await scenario()
    assert [scheduler.closed_with for scheduler in schedulers] == [10.0, 10.0]


async def test_changes_to_one_name_wait_for_each_other() -> None:
    loading = asyncio.Event()
    go_on = asyncio.Event()

    async def start(source: Any) -> Any:
        loading.set()
        await go_on.wait()
        return source

    registry: ModelRegistry[Any] = ModelRegistry(start)
    async with asyncio.TaskGroup() as group:
        group.create_task(registry.load("a", FakeScheduler()))
        await loading.wait()
        unloading = group.create_task(registry.unload("a"))
        await asyncio.sleep(0)
        assert not unloading.done()
        go_on.set()

    assert "a" not in registry


async def test_what_is_loaded_when_the_registry_closes_is_closed_and_never_listed() -> None:
    go_on = asyncio.Event()

    async def start(source: Any) -> Any:
        await go_on.wait()
        return source

    registry: ModelRegistry[Any] = ModelRegistry(start)
    late = FakeScheduler()
    loading = asyncio.ensure_future(registry.load("a", late))
    await asyncio.sleep(0)
    await registry.close()
    go_on.set()
    with pytest.raises(Unavailable, match="the registry was closed while the model was being loaded"):
        await loading
    assert late.closed_with == 0.0
    assert registry.list() == []


async def test_names_that_never_were_leave_nothing_behind() -> None:
    async with registry_of_fakes() as registry:
        for change in (registry.unload("nobody"), registry.replace("nobody", FakeScheduler())):
            with pytest.raises(ModelNotLoaded):
                await change
        assert registry._changes == {}


# ------------------------------------------------------------------------- a replacement without a gap


class Versioned:
    """A model that answers with its version, once it may."""

    def __init__(self, version: float) -> None:
        self.version = version
        self.entered = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self, x: Any) -> Any:
        self.entered.set()
        await self.open.wait()
        return np.full_like(x, self.version)


async def start_versioned(source: Versioned) -> Any:
    return await Scheduler([CallableEngine(source, name="m", version=str(source.version))]).__aenter__()


async def ask(registry: ModelRegistry[Any]) -> float:
    response = await registry.get("m").scheduler.infer(np.zeros((1, 1)))
    return float(response.output[0, 0])


async def test_what_began_on_the_old_model_ends_there_and_the_rest_meets_the_new() -> None:
    old, new = Versioned(1), Versioned(2)
    new.open.set()
    async with ModelRegistry(start_versioned) as registry, asyncio.TaskGroup() as group:
        await registry.load("m", old)
        running = group.create_task(ask(registry))
        await old.entered.wait()
        queued = group.create_task(ask(registry))
        await asyncio.sleep(0)
        old_scheduler = registry.get("m").scheduler

        replacing = group.create_task(registry.replace("m", new))
        async with asyncio.timeout(10):
            for _ in iter(lambda: registry.get("m").scheduler is old_scheduler, False):
                await asyncio.sleep(0)

        assert await ask(registry) == 2
        assert not replacing.done()
        old.open.set()
        assert await running == 1
        assert await queued == 1
        await replacing
        with pytest.raises(Unavailable):
            await old_scheduler.infer(np.zeros((1, 1)))


@pytest.mark.slow
async def test_no_request_fails_while_models_are_replaced_under_load() -> None:
    versions = [Versioned(number) for number in range(10)]
    for version in versions:
        version.open.set()
    answers: list[float] = []
    async with ModelRegistry(start_versioned) as registry:
        await registry.load("m", versions[0])
        stop = asyncio.Event()

        async def caller() -> None:
            while not stop.is_set():
                answers.append(await ask(registry))

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(caller())
            for version in versions[1:]:
                await registry.replace("m", version)
                await version.entered.wait()
            stop.set()

    assert set(answers) == set(range(10))


# ---------------------------------------------------------------------------- what belongs to a model beside it


class Beside:
    """What is called when a model is in its place; it fails when it is told to."""

    def __init__(self) -> None:
        self.registry = ModelRegistry[Any](self.start, placed=self.placed)
        self.seen: list[tuple[Any, bool]] = []
        self.error: Exception | None = None
        self.wait = asyncio.Event()
        self.wait.set()

    async def start(self, source: Any) -> Any:
        return source

    async def placed(self, source: Any, model: Any) -> None:
        self.seen.append((source, self.registry.get(model.name) is model))
        await self.wait.wait()
        if self.error is not None:
            raise self.error


async def test_what_belongs_to_a_model_is_placed_before_the_old_one_is_closed() -> None:
    beside, old, new = Beside(), FakeScheduler("1"), FakeScheduler("2")
    await beside.registry.load("m", old)
    beside.wait.clear()
    replacing = asyncio.create_task(beside.registry.replace("m", new))
    for _ in range(5):
        await asyncio.sleep(0)
    assert old.closed_with is None
    beside.wait.set()
    await replacing

    assert beside.seen == [(old, True), (new, True)]
    assert old.closed_with is not None


async def test_a_model_whose_belongings_are_refused_is_not_there() -> None:
    beside, old, new = Beside(), FakeScheduler("1"), FakeScheduler("2")
    beside.error = ModelLoadError("its jobs are wrong")
    with pytest.raises(ModelLoadError, match="its jobs are wrong"):
        await beside.registry.load("m", old)
    assert old.closed_with is not None
    assert beside.registry.list() == []

    beside.error = None
    kept = await beside.registry.load("m", FakeScheduler("1"))
    beside.error = ModelLoadError("its jobs are wrong")
    with pytest.raises(ModelLoadError):
        await beside.registry.replace("m", new)
    assert beside.registry.list() == [kept]
    assert (new.closed_with is not None, kept.scheduler.closed_with) == (True, None)  # type: ignore[attr-defined]


async def test_a_registry_that_closes_meanwhile_closes_both() -> None:
    beside, old, new = Beside(), FakeScheduler("1"), FakeScheduler("2")
    await beside.registry.load("m", old)
    beside.wait.clear()
    beside.error = Unavailable("the server is closing")
    replacing = asyncio.create_task(beside.registry.replace("m", new))
    for _ in range(5):
        await asyncio.sleep(0)
    await beside.registry.close(0.0)
    beside.wait.set()
    with pytest.raises(Unavailable):
        await replacing

    assert beside.registry.list() == []
    assert None not in (old.closed_with, new.closed_with)
