"""The composition root in process: what becomes of a package's files, and the limit on open files."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import resource
import shutil
import sys
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import app, app_jobs, app_models, app_sources
from kapsl_scheduler.app_memory import frozen, let_go
from kapsl_scheduler.app_tracing import tracing_to
from kapsl_scheduler.config import Config, ConfigError, CronSettings, ModelSettings, TracingSettings
from kapsl_scheduler.core.jobs import CronJob, Named
from kapsl_scheduler.core.wire import encode_tensor
from kapsl_scheduler.demo.run import PACKAGE
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.errors import (
    InvalidInput,
    InvalidPackage,
    ModelLoadError,
    ModelNotLoaded,
    Overloaded,
    Unavailable,
)
from kapsl_scheduler.packages import build_package, load_package
from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.stores.memory import MemoryStore
from kapsl_scheduler.types import Priority
from tests.e2e.process import DIGITS


@pytest.mark.slow
async def test_what_a_package_was_unpacked_to_goes_with_its_model(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    unpacked = tmp_path / "unpacked"
    given = [f"old={PACKAGE}", f"new={PACKAGE}", f"bad={build_package(broken, tmp_path / 'broken.aimod')}"]
    old, new, bad = await app_sources.open_all(Config(), given, unpacked)
    assert len(list(unpacked.iterdir())) == 3

    async with ModelRegistry(app_sources.start_source) as registry:
        await registry.load("digits", old)
        with pytest.raises(ModelLoadError):
            await registry.replace("digits", bad)
        assert set(unpacked.iterdir()) == {old.package.directory, new.package.directory}

        await registry.replace("digits", new)
        assert list(unpacked.iterdir()) == [new.package.directory]

        await registry.unload("digits")
        assert list(unpacked.iterdir()) == []


@pytest.mark.parametrize("name", ["org/digits", "..", "digits\n"])
async def test_a_model_whose_name_has_no_url_needs_another_name(tmp_path: Path, name: str) -> None:
    package = build_package(DIGITS, tmp_path / "model.aimod", project_name=name)

    with pytest.raises(ModelLoadError, match=f"has no URL; name this one NAME={re.escape(str(package))}$"):
        await app_sources.open_all(Config(), [str(package)], tmp_path)
    (source,) = await app_sources.open_all(Config(), [f"digits={package}"], tmp_path)
    assert source.name == "digits"


@asynccontextmanager
async def loaded(
    tmp_path: Path,
    cron: CronSettings | None = None,
    given: Sequence[str] | None = None,
    engines: Mapping[str, Any] | None = None,
) -> AsyncIterator[tuple[Path, ModelRegistry[Any], app_models.Models]]:
    """The digits model under its name, from a package that a test may replace; or what is given."""
    package, unpacked = tmp_path / "digits.aimod", tmp_path / "unpacked"
    shutil.copy(PACKAGE, package)
    config = Config(cron=cron or CronSettings(store="memory"))
    jobs = app_jobs.Jobs(config)
    async with (
        ModelRegistry(app_sources.start_source, placed=jobs.start) as registry,
        jobs.over(registry),
        app_models.Models(config, registry, jobs, unpacked) as models,
    ):
        await models.load([str(package)] if given is None else given, engines)
        yield package, registry, models
    assert not unpacked.exists() or list(unpacked.iterdir()) == []


def jobs_of(models: app_models.Models) -> dict[str, CronJob]:
    cron = models._jobs._cron
    assert cron is not None
    return {id: cron.job(id) for id in cron._ledger.entries}


def declared(id: str, schedule: Any = "0 0 3 * * *", width: int = 64, **changes: Any) -> dict[str, Any]:
    """A job of a package, as its manifest has it."""
    return {"id": id, "schedule": schedule, "input": encode_tensor(np.zeros((1, width), np.float32)), **changes}


async def test_the_jobs_of_a_package_start_with_its_model_and_go_with_it(tmp_path: Path) -> None:
    async with loaded(tmp_path) as (package, registry, models):
        assert list(jobs_of(models)) == ["digits:heartbeat"]
        job = jobs_of(models)["digits:heartbeat"]
        assert (job.model, job.package, job.priority) == ("digits", "digits", Priority.BACKGROUND)

        build_package(DIGITS, package, cron_jobs=[declared("x"), declared("y", priority="latency_critical")])
        await models.reload("digits")
        assert sorted(jobs_of(models)) == ["digits:x", "digits:y"]
        assert jobs_of(models)["digits:y"].priority is Priority.THROUGHPUT

        await models.unload("digits")
        assert jobs_of(models) == {}
        assert registry.list() == []
        with pytest.raises(ModelNotLoaded):
            await models.unload("digits")

        model = await models.reload("digits")
        assert registry.list() == [model]
        assert sorted(jobs_of(models)) == ["digits:x", "digits:y"]
        models.stop()
        with pytest.raises(Unavailable, match="closing"):
            await models.unload("digits")


async def test_jobs_with_faults_keep_a_package_from_being_loaded(tmp_path: Path) -> None:
    async with loaded(tmp_path) as (package, registry, models):
        old = registry.get("digits")
        wrong = [declared("x"), declared("y", "0 61 * * * *"), declared("z", "0 0 0 30 2 *")]
        build_package(DIGITS, package, cron_jobs=wrong)

        with pytest.raises(InvalidPackage) as raised:
            await models.reload("digits")

        assert raised.value.source == str(package)
        minute, never = raised.value.faults
        assert "'digits:y': schedule: minute" in minute
        assert "'digits:z': schedule: it never fires" in never
        assert registry.get("digits") is old
        assert old.ready
        assert list(jobs_of(models)) == ["digits:heartbeat"]

        build_package(DIGITS, package, cron_jobs=[declared("x", width=63), declared("y")])
        with pytest.raises(InvalidPackage, match="'digits:x': request: input 'pixels': axis 1 is 63"):
            await models.reload("digits")
        await models.unload("digits")
        with pytest.raises(InvalidPackage):
            await models.reload("digits")
        assert registry.list() == []
        assert jobs_of(models) == {}


async def test_a_server_without_jobs_serves_a_package_that_has_some(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with loaded(tmp_path, CronSettings(enabled=False)) as (package, registry, models):
        assert registry.get("digits").ready
        await models.unload("digits")

    assert caplog.messages == [f"{package}: cron_jobs: not run, as the server was started with --no-cron"]


async def test_a_store_that_cannot_be_opened_is_a_fault_of_the_configuration(tmp_path: Path) -> None:
    damaged = tmp_path / "cron.db"
    damaged.write_bytes(b"no database, whatever its name says")
    for store in (damaged, tmp_path / "nowhere" / "cron.db"):
        jobs = app_jobs.Jobs(Config(cron=CronSettings(store=str(store))))
        with pytest.raises(ConfigError, match=rf"^store: {re.escape(str(store))}: .* --no-cron serves without jobs$"):
            async with ModelRegistry(app_sources.start_source) as registry, jobs.over(registry):
                raise AssertionError("it was opened")

    assert damaged.read_bytes() == b"no database, whatever its name says"


def test_jobs_are_kept_where_the_configuration_says(tmp_path: Path) -> None:
    state = tmp_path / "state" / "kapsl-scheduler"

    assert isinstance(app_jobs.store_of(Config()), MemoryStore)
    assert isinstance(app_jobs.store_of(Config(cron=CronSettings(store="memory"), state_directory=state)), MemoryStore)
    named = app_jobs.store_of(Config(cron=CronSettings(store=str(tmp_path / "x.db")), state_directory=state))
    assert repr(named) == f"SqliteStore({str(tmp_path / 'x.db')!r})"
    assert not state.exists()
    assert repr(app_jobs.store_of(Config(state_directory=state))) == f"SqliteStore({str(state / 'cron.db')!r})"
    assert state.is_dir()


FEEDS = """
class Feed:
    @staticmethod
    def ask(firing): ...

def latest(firing): ...

TABLE = {}
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "feeds_of_a_test.py").write_text(FEEDS)
    (tmp_path / "broken_feeds_of_a_test.py").write_text("1 / 0\n")
    (tmp_path / "leaving_feeds_of_a_test.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.endswith("feeds_of_a_test")]:
        del sys.modules[name]


@pytest.mark.usefixtures("modules")
async def test_functions_that_jobs_may_name_are_there_from_the_start(tmp_path: Path) -> None:
    named = {"latest": "feeds_of_a_test:latest", "ask": "feeds_of_a_test:Feed.ask"}
    settings = CronSettings(store=str(tmp_path / "jobs.db"), callables=named)
    job = CronJob(
        "a", 3600, Named("latest"), condition=Named("ask"), on_result=Named("ask"), sink=Named("latest"), model="digits"
    )
    async with loaded(tmp_path, settings) as (_, _, models):
        cron = models._jobs._cron
        assert cron is not None
        await cron.register(job)
    async with loaded(tmp_path, settings) as (_, _, models):
        stored = jobs_of(models)["a"]
        assert [value.__qualname__ for value in (stored.request, stored.condition, stored.on_result, stored.sink)] == [
            *("latest", "Feed.ask", "Feed.ask", "latest")
        ]


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("feeds_of_a_test", "expected module:function, got 'feeds_of_a_test'"),
        ("feeds of a test:latest", "expected module:function, got 'feeds of a test:latest'"),
        (
            "no_feeds_of_a_test:latest",
            "expected a module that can be imported, got 'no_feeds_of_a_test': "
            "ModuleNotFoundError: No module named 'no_feeds_of_a_test'",
        ),
        (
            "broken_feeds_of_a_test:latest",
            "expected a module that can be imported, got 'broken_feeds_of_a_test': ZeroDivisionError: division by zero",
        ),
        (
            "leaving_feeds_of_a_test:latest",
            "expected a module that can be imported, got 'leaving_feeds_of_a_test': SystemExit: 3",
        ),
        (
            "feeds_of_a_test:Feed.tell",
            "expected a name in module 'feeds_of_a_test', got 'Feed.tell': type object 'Feed' has no attribute 'tell'",
        ),
        ("feeds_of_a_test:TABLE", "expected a function, got 'feeds_of_a_test:TABLE', which is of type dict"),
    ],
)
def test_functions_that_are_not_there_are_faults_of_the_configuration(text: str, said: str) -> None:
    table = {"wrong": text, "right": "feeds_of_a_test:latest", " ": "feeds_of_a_test:latest"}
    with pytest.raises(ConfigError) as caught:
        app_jobs.Jobs(Config(cron=CronSettings(callables=table)))
    assert caught.value.faults == (
        f"cron.callables.wrong: {said}",
        "cron.callables. : expected a name that jobs can give, got a blank one",
    )
    app_jobs.Jobs(Config(cron=CronSettings(callables=table, enabled=False)))


async def test_a_model_is_replaced_by_what_its_path_holds_now(tmp_path: Path) -> None:
    async with loaded(tmp_path) as (package, registry, models):
        old = registry.get("digits")
        build_package(DIGITS, package, version="2", project_name="another name")

        new = await models.reload("digits")

        assert (new.name, new.info.version) == ("digits", "2")
        assert registry.list() == [new]
        assert not old.ready
        assert len(list((tmp_path / "unpacked").iterdir())) == 1


@pytest.mark.parametrize("content", [b"no archive", None])
async def test_what_cannot_be_loaded_replaces_nothing(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with loaded(tmp_path) as (package, registry, models):
        old = registry.get("digits")
        package.unlink()
        if content is not None:
            package.write_bytes(content)

        with pytest.raises(ModelLoadError, match=r"digits\.aimod"):
            await models.reload("digits")
        with pytest.raises(ModelNotLoaded, match="'digits'"):
            await models.reload("none")

        assert registry.get("digits") is old
        assert old.ready
    assert "model 'digits' was not replaced: " in caplog.text


async def test_a_model_that_is_being_loaded_is_not_loaded_twice_and_a_stop_ends_it(tmp_path: Path) -> None:
    async with loaded(tmp_path) as (package, registry, models):
        old = registry.get("digits")
        package.unlink()
        os.mkfifo(package)  # takes as long to read as the test wants
        first = asyncio.create_task(models.reload("digits"))
        writer = await asyncio.to_thread(package.open, "wb")

        with pytest.raises(Overloaded, match="being loaded already"):
            await models.reload("digits")
        models.stop()
        writer.close()
        with pytest.raises(Unavailable, match="closing"):
            await first
        with pytest.raises(Unavailable, match="closing"):
            await models.reload("digits")

        assert registry.get("digits") is old


async def test_what_a_manifest_says_in_vain_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    package = load_package(PACKAGE, workdir=tmp_path)
    manifest = package.directory / "metadata.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"task": "digits"}))
    shutil.move(package.directory, tmp_path / "model")

    await app_sources.open_all(Config(), [str(tmp_path / "model")], tmp_path)

    assert caplog.messages == [f"{tmp_path / 'model'}: task: unknown key, ignored"]


async def test_what_a_package_asks_for_and_does_not_get_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = {"preferred_provider": "ACUDAExecutionProvider", "fallback_providers": ["CPUExecutionProvider"]}
    package = build_package(DIGITS, tmp_path / "digits.aimod", hardware_requirements=wanted, project_name="digits")
    plain = build_package(
        DIGITS, tmp_path / "plain.aimod", hardware_requirements={"preferred_provider": "CPUExecutionProvider"}
    )

    sources = await app_sources.open_all(Config(), [str(package), f"plain={plain}"], tmp_path / "unpacked")
    for source in sources:
        app_sources.engine_of(source)

    assert caplog.messages == [
        f"{package}: this onnxruntime has no provider 'ACUDAExecutionProvider', so 'cpu' it is",
    ]


async def test_settings_and_requirements_reach_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {
        "preferred_provider": "AzureExecutionProvider",
        "fallback_providers": ["NoSuchExecutionProvider", "CPUExecutionProvider"],
        "graph_optimization_level": "basic",
    }
    package = build_package(DIGITS, tmp_path / "digits.aimod", version="7", hardware_requirements=wanted)
    config = Config(models={"mine": ModelSettings(threads=2)})
    (source,) = await app_sources.open_all(config, [f"mine={package}"], tmp_path / "unpacked")
    made: list[tuple[Path, dict[str, Any]]] = []
    monkeypatch.setattr(app_sources, "OnnxEngine", lambda path, **options: made.append((path, options)))

    app_sources.engine_of(source)

    ((path, options),) = made
    assert path == source.package.model_path
    assert options == {
        "providers": ("azure", "cpu"),
        "threads": 2,
        "graph_optimization_level": "basic",
        "name": "mine",
        "version": "7",
    }


async def test_settings_reach_the_scheduler(tmp_path: Path) -> None:
    settings = ModelSettings(max_batch_size=3, max_queue_size=2, workers=2, default_priority="throughput")
    (source,) = await app_sources.open_all(Config(model=settings), [str(DIGITS)], tmp_path)
    row = np.zeros((1, 64), np.float32)

    async with ModelRegistry(app_sources.start_source) as registry:
        scheduler = (await registry.load("digits", source)).scheduler
        await scheduler.infer(row.repeat(3, axis=0))
        with pytest.raises(InvalidInput, match="at most 3 "):
            await scheduler.infer(row.repeat(4, axis=0))
        outcomes = await asyncio.gather(*(scheduler.infer(row) for _ in range(20)), return_exceptions=True)

        statistics = scheduler.statistics()
        assert statistics.slots == 2
        assert statistics.classes["throughput"].succeeded == statistics.succeeded > 0
        assert statistics.refused == sum(isinstance(outcome, Overloaded) for outcome in outcomes) > 0


async def test_a_model_of_another_framework_is_refused_by_name(tmp_path: Path) -> None:
    package = build_package(DIGITS, tmp_path / "digits.aimod", framework="pytorch")
    (source,) = await app_sources.open_all(Config(), [str(package)], tmp_path / "unpacked")

    with pytest.raises(ModelLoadError, match="digits: framework 'pytorch' came, expected 'onnx'"):
        await app_sources.start_source(source)
    assert list((tmp_path / "unpacked").iterdir()) == []


@pytest.fixture
def limit() -> Iterator[tuple[int, int]]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield limits
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_limit_on_open_files_is_raised_as_far_as_it_may_and_never_lowered(limit: tuple[int, int]) -> None:
    hard = limit[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))

    for wanted, got in [(300, 300), (250, 300), *([(hard + 1, hard)] if hard > 0 else [])]:
        app._allow_files(wanted)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (got, hard)


async def test_engines_of_a_program_are_served_beside_packages_and_are_loaded_once(tmp_path: Path) -> None:
    engine = CallableEngine(lambda x: x, inputs={"x": ("float32", (None, 2))}, outputs={"y": ("float32", (None, 2))})
    sources = await app_sources.open_all(Config(), [str(DIGITS)], tmp_path, {"mine": engine, "both": [engine, engine]})
    assert [(source.name, len(source.engines)) for source in sources] == [("mine", 1), ("both", 2), ("digits", 0)]
    with pytest.raises(ModelLoadError, match="a model named 'a/b' has no URL"):
        await app_sources.open_all(Config(), [], tmp_path, {"a/b": engine})
    async with loaded(tmp_path, given=[], engines={"mine": engine}) as (_, registry, models):
        assert registry.get("mine").info.framework == "python"
        with pytest.raises(ModelLoadError, match="'mine' is the running program's own"):
            await models.reload("mine")


async def test_versions_of_a_model_are_loaded_side_by_side_and_anew(tmp_path: Path) -> None:
    paths = [
        f"digits={build_package(DIGITS, tmp_path / f'{version}.aimod', version=version)}"
        for version in ("1.2.0", "1.10.0")
    ]
    with pytest.raises(ModelLoadError, match=r"version 1\.2\.0 of a model named 'digits' is there already"):
        await app_sources.open_all(Config(), [paths[0], paths[0]], tmp_path)
    async with loaded(tmp_path, given=paths) as (_, registry, models):
        before = registry.versions("digits")
        assert [model.info.version for model in before] == ["1.2.0", "1.10.0"]
        assert (await models.reload("digits")).info.version == "1.10.0"
        after = registry.versions("digits")
        assert [model.info.version for model in after] == ["1.2.0", "1.10.0"]
        assert not set(map(id, before)) & set(map(id, after))
        await models.unload("digits")
        assert registry.list() == []


async def test_a_version_that_cannot_be_loaded_anew_keeps_no_other_from_it(tmp_path: Path) -> None:
    paths = [build_package(DIGITS, tmp_path / f"{version}.aimod", version=version) for version in ("1", "2")]
    async with loaded(tmp_path, given=[f"digits={path}" for path in paths]) as (_, registry, models):
        before = registry.versions("digits")
        paths[0].write_bytes(b"no archive")
        with pytest.raises(ModelLoadError, match=r"1\.aimod"):
            await models.reload("digits")
        after = registry.versions("digits")
        assert after[0] is before[0]
        assert (after[1].info.version, after[1] is before[1]) == ("2", False)
        assert len(list((tmp_path / "unpacked").iterdir())) == 2


async def test_tracing_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "kapsl_scheduler.server.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)

    with pytest.raises(ConfigError, match=r"opentelemetry.* is not installed: pip install 'kapsl-scheduler\[otel\]'"):
        async with tracing_to(TracingSettings(exporter="otlp"), "1.2.3"):
            pass


async def test_the_collector_passes_over_what_is_there_from_the_start_until_it_is_replaced(
    tmp_path: Path,
) -> None:
    async with loaded(tmp_path) as (_, registry, models):
        with frozen():
            assert gc.get_freeze_count() > 10_000
            old = weakref.ref(registry.get("digits").scheduler)
            await models.reload("digits")
            assert models._letting_go is not None
            models._letting_go._run()  # type: ignore[attr-defined]  # as a second later
            assert old() is None
            assert gc.get_freeze_count() > 10_000
        assert gc.get_freeze_count() == 0
        let_go()
        assert gc.get_freeze_count() == 0
