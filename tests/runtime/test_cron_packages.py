"""The jobs of packages, and what a scheduler over several models makes of those that are not there."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import CronJob, CronScheduler, InvalidJob, ModelNotLoaded, RunState, StoreError
from kapsl_scheduler.core.definition import encode_job
from kapsl_scheduler.packages.manifest import CronJobDef, IntervalDef, Manifest
from kapsl_scheduler.ports import Result
from kapsl_scheduler.stores.memory import MemoryStore
from kapsl_scheduler.types import InferenceResponse, ModelInfo, TensorSpec

NIGHTLY = "0 0 3 * * *"
ROW = np.zeros((2, 3), np.float32)
NEVER = "0 0 0 30 2 *"


class Models:
    """Models by name; each answers with what it was asked."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)

    def target(self, model: str) -> Models:
        if model not in self.names:
            raise ModelNotLoaded(f"model {model!r} is not loaded")
        return self

    def model_info(self) -> ModelInfo:
        return ModelInfo("inner", inputs=(TensorSpec("pixels", "float32", (None, 3)),))

    async def infer(self, request: Any, **options: Any) -> InferenceResponse:
        return InferenceResponse.of(request, 0.0, 0.0, 1)


class FullDisk(MemoryStore):
    full = False

    async def commit(self, changes: Any) -> list[Result]:
        if self.full:
            raise StoreError("the disk is full")
        return await super().commit(changes)


def manifest(*jobs: CronJobDef) -> Manifest:
    return Manifest("original", "onnx", "1", "now", "m.onnx", cron_jobs=jobs)


def job(id: str, schedule: str | IntervalDef = NIGHTLY, **changes: Any) -> CronJobDef:
    return CronJobDef(id, schedule, ROW, **changes)


@pytest.fixture
async def cron() -> AsyncIterator[CronScheduler]:
    async with CronScheduler(Models("a", "b"), store=FullDisk()) as scheduler:
        yield scheduler


async def ids(cron: CronScheduler) -> list[str]:
    return [info.id for info in await cron.list_jobs()]


async def test_two_models_of_one_package_have_their_own_jobs(cron: CronScheduler) -> None:
    for model in ("a", "b"):
        await cron.register_from_manifest(manifest(job("x"), job("y", IntervalDef(2))), model=model)
    await cron.register(CronJob("a:mine", NIGHTLY, ROW, model="a"))

    assert await ids(cron) == ["a:mine", "a:x", "a:y", "b:x", "b:y"]
    assert cron.job("b:y").request["pixels"].tolist() == ROW.tolist()
    assert sorted(await cron.unregister_package("a")) == ["a:x", "a:y"]
    assert await ids(cron) == ["a:mine", "b:x", "b:y"]


async def test_a_package_that_comes_again_is_updated_and_loses_what_it_has_no_more(cron: CronScheduler) -> None:
    await cron.register_from_manifest(manifest(job("x"), job("y")), model="a")
    await cron.pause("a:x", reason="holiday")
    await cron.trigger("a:x")

    await cron.register_from_manifest(manifest(job("x", "@daily"), job("z")), model="a")

    assert await ids(cron) == ["a:x", "a:z"]
    info = await cron.job_info("a:x")
    assert info is not None
    assert (info.schedule, info.paused, info.fired_count) == ("@daily", "holiday", 1)


@pytest.mark.parametrize("there", [False, True])
async def test_one_fault_keeps_all_jobs_of_a_package_as_they_were(cron: CronScheduler, there: bool) -> None:
    if there:
        await cron.register_from_manifest(manifest(job("x"), job("old")), model="a")
    before = {id: cron.definition(id) for id in await ids(cron)}

    with pytest.raises(InvalidJob) as raised:
        await cron.register_from_manifest(
            manifest(job("x", "@daily"), job("y", "0 61 * * * *"), job("z", NEVER), job("w", "*")), model="a"
        )

    assert len(raised.value.faults) == 3
    for fault, word in zip(raised.value.faults, ("'a:y'", "'a:z'", "'a:w'"), strict=True):
        assert word in fault
    assert {id: cron.definition(id) for id in await ids(cron)} == before
    await cron.register_from_manifest(manifest(job("x")), model="a")  # it may come again
    assert await ids(cron) == ["a:x"]


async def test_a_store_that_fails_keeps_all_jobs_of_a_package_as_they_were() -> None:
    store = FullDisk()
    async with CronScheduler(Models("a"), store=store) as cron:
        await cron.register_from_manifest(manifest(job("x")), model="a")
        store.full = True
        with pytest.raises(StoreError):
            await cron.register_from_manifest(manifest(job("x", "@daily"), job("y")), model="a")
        store.full = False

        assert await ids(cron) == ["a:x"]
        await cron.register_from_manifest(manifest(job("x", "@daily"), job("y")), model="a")
        assert await ids(cron) == ["a:x", "a:y"]


async def test_a_package_takes_no_job_of_somebody_else(cron: CronScheduler) -> None:
    await cron.register(CronJob("a:x", "@hourly", ROW, model="a"))

    with pytest.raises(InvalidJob, match="'a:x': id: a job that is not the package's has it"):
        await cron.register_from_manifest(manifest(job("x")), model="a")

    assert cron.job("a:x").package is None


async def test_jobs_of_a_package_outlive_a_restart_and_wait_for_it() -> None:
    store = MemoryStore()
    async with CronScheduler(Models("a"), store=store) as cron:
        await cron.register_from_manifest(manifest(job("x"), job("y")), model="a")
        await cron.trigger("a:x")
    async with CronScheduler(Models("a"), store=store) as cron:
        waiting = [info.waiting_for for info in await cron.list_jobs()]
        await cron.register_from_manifest(manifest(job("x")), model="a")

        assert waiting == ["package: 'a' is not loaded"] * 2
        (info,) = await cron.list_jobs()
        assert (info.id, info.waiting_for, info.fired_count) == ("a:x", None, 1)


async def test_jobs_of_models_that_are_not_there_wait_until_they_are() -> None:
    models = Models("a")
    async with CronScheduler(models) as cron:
        with pytest.raises(InvalidJob, match="model: model 'b' is not loaded"):
            await cron.register(CronJob("early", NIGHTLY, ROW, model="b"))
        await cron.register(CronJob("x", NIGHTLY, {"pixels": ROW}, model="a"))
        models.names.clear()
        cron.look_again()

        info = await cron.job_info("x")
        assert info is not None
        assert (info.waiting_for, info.next_firing) == ("model: model 'a' is not loaded", None)
        with pytest.raises(InvalidJob, match="it cannot run here"):
            await cron.trigger("x")

        models.names.add("a")
        cron.look_again()
        info = await cron.job_info("x")
        assert info is not None
        assert info.waiting_for is None
        assert info.next_firing is not None
        assert (await cron.trigger("x")).state is RunState.RUNNING


async def test_an_update_to_a_schedule_that_never_fires_is_refused(cron: CronScheduler) -> None:
    await cron.register(CronJob("x", NIGHTLY, ROW, model="a"))

    with pytest.raises(InvalidJob, match="never fires"):
        await cron.update(CronJob("x", NEVER, ROW, model="a"))

    assert cron.definition("x") == encode_job(CronJob("x", NIGHTLY, ROW, model="a").check())


async def test_a_job_that_has_had_its_time_may_be_registered_again_as_it_is() -> None:
    store, now = MemoryStore(), dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    once = CronJob("x", "0 0 0 2 1 * 2026", ROW, model="a")
    moments = [now, now + dt.timedelta(days=30)]
    for moment in moments:
        async with CronScheduler(
            Models("a"), store=store, clock=lambda moment=moment: int(moment.timestamp() * 1e6)
        ) as cron:
            await cron.register_all([once])
            assert await ids(cron) == ["x"]


async def test_a_trigger_is_one_run_for_one_origin_and_never_the_schedules(cron: CronScheduler) -> None:
    await cron.register(CronJob("x", NIGHTLY, {"pixels": ROW}, model="a"))
    first = await cron.trigger("x", origin="mine")
    again = await cron.trigger("x", origin="mine")

    assert again.number == first.number
    for origin in ("schedule", "", "a\n", "x" * 300):
        with pytest.raises(InvalidJob, match="origin: "):
            await cron.trigger("x", origin=origin)


async def test_jobs_are_listed_in_pages(cron: CronScheduler) -> None:
    for name in "cab":
        await cron.register(CronJob(name, NIGHTLY, ROW, model="a"))

    assert [info.id for info in await cron.list_jobs(limit=2)] == ["a", "b"]
    assert [info.id for info in await cron.list_jobs(after="b", limit=2)] == ["c"]


async def test_a_run_of_several_rows_says_so() -> None:
    store = MemoryStore()
    async with CronScheduler(Models("a"), store=store) as cron:
        await cron.register(CronJob("x", NIGHTLY, {"pixels": ROW}, model="a"))
        await cron.trigger("x")
    async with CronScheduler(Models("a"), store=store) as cron:
        (run,) = await cron.runs("x")

    assert (run.state, run.requests, run.rows) == (RunState.SUCCEEDED, 1, 2)
