"""The original's routes over the models of a real application: what they show, what they load, what they refuse."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kapsl_scheduler.app_jobs import Jobs
from kapsl_scheduler.app_models import Models
from kapsl_scheduler.app_sources import start_source
from kapsl_scheduler.config import Config, ConfigError, CronSettings, ServerSettings
from kapsl_scheduler.demo.run import PACKAGE
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.errors import Overloaded
from kapsl_scheduler.packages import build_package
from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.server.http import HttpApi
from kapsl_scheduler.server.kapsl_http import KapslApi
from kapsl_scheduler.server.service import Service
from kapsl_scheduler.server.tracing import Tracing
from tests.e2e.process import DIGITS
from tests.server.api import Gate, assert_error, exchange, settled, until

PIXELS = np.linspace(0, 16, 64, dtype=np.float32).reshape(1, 64)


class Served:
    def __init__(self, models: Models, service: Service, api: HttpApi) -> None:
        self.models = models
        self.service = service
        self.api = api
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://server/api")

    async def get(self, path: str) -> Any:
        response = await self.client.get(path)
        assert response.status_code == 200
        return response.json()

    async def post(self, path: str, body: Any = None) -> httpx.Response:
        return await self.client.post(path, json=body) if body is not None else await self.client.post(path)


@asynccontextmanager
async def serving(folder: Path, *, engines: dict[str, Any] | None = None, **server: Any) -> AsyncIterator[Served]:
    """The digits model from a package that a test may replace, and engines of its own."""
    package = folder / "digits.aimod"
    shutil.copy(PACKAGE, package)
    config = Config(server=ServerSettings(drain=5.0, **server), cron=CronSettings(enabled=False))
    jobs = Jobs(config)
    async with (
        ModelRegistry(start_source, placed=jobs.start) as registry,
        jobs.over(registry),
        Models(config, registry, jobs, folder / "unpacked") as models,
    ):
        await models.load([str(package)], engines)
        service = Service(registry, version="1")
        api = HttpApi(service, parts=[KapslApi(service, models, max_body_bytes=100_000)])
        served = Served(models, service, api)
        async with served.client:
            yield served


def tensor(array: np.ndarray[Any, Any] = PIXELS) -> dict[str, Any]:
    raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return {"shape": list(array.shape), "dtype": array.dtype.name, "data_base64": base64.b64encode(raw).decode()}


# ---------------------------------------------------------------------------------------------- models


async def test_models_are_listed_with_what_the_original_says_of_them(tmp_path: Path) -> None:
    async with serving(tmp_path, engines={"own": CallableEngine(lambda x: x, name="own")}) as served:
        own, digits = await served.get("/models")
        assert await served.get("/models/1") == digits
        loaded_at = digits.pop("loaded_at")
        assert loaded_at.endswith("Z")
        assert digits == {
            "id": 1,
            "name": "digits",
            "version": "1.0.0",
            "framework": "onnx",
            "device": "cpu",
            "optimization_level": "all",
            "model_path": str(tmp_path / "digits.aimod"),
            "status": "active",
            "replica_id": 0,
            "base_model_id": 1,
        }
        assert (own["id"], own["name"], own["model_path"], own["device"]) == (0, "own", None, None)
        for path in ("/models/2", "/models/x", "/models/-1", "/models/" + "9" * 30, "/models/²"):
            response = await served.client.get(path)
            assert assert_error(response, 404, "model_not_loaded").startswith("Model ")
        assert await served.get("/health") == {"status": "ok"}


async def test_a_model_is_stopped_started_and_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "digits.aimod")
    async with serving(tmp_path) as served:
        first = await served.get("/models/0")
        assert "is served already, as model 0" in assert_error(
            await served.post("/models/start", {"model_path": path}), 400, "invalid_input"
        )

        stopped = await served.post("/models/0/stop")
        assert (stopped.status_code, stopped.json()["status"]) == (200, "inactive")
        assert_error(await served.post("/models/0/stop"), 404, "model_not_loaded")
        assert "Model 0 not found" in assert_error(
            await served.post("/models/0/infer", {"input": tensor()}), 404, "model_not_loaded"
        )
        wrong = await served.post("/models/start", {"model_path": path, "model_id": 3})
        assert "3 came, and model 'digits' has the id 0" in assert_error(wrong, 400, "invalid_input")

        started = await served.post("/models/start", {"model_path": path, "model_id": 0})
        assert (started.status_code, started.json()["status"]) == (200, "active")
        assert started.json()["loaded_at"] > first["loaded_at"]
        assert (await served.post("/models/0/infer", {"input": tensor()})).status_code == 200

        assert (await served.post("/models/0/remove")).json() == {"id": 0, "removed": True}
        assert await served.get("/models") == []
        assert_error(await served.post("/models/0/remove"), 404, "model_not_loaded")
        assert_error(await served.post("/models/start", {"model_path": path}), 403, "forbidden")


async def test_further_models_are_loaded_from_the_configured_directories_only(tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / "deep").mkdir(parents=True)
    build_package(DIGITS, store / "deep" / "other.aimod", project_name="other")
    build_package(DIGITS, tmp_path / "outside.aimod", project_name="outside")
    (store / "link.aimod").symlink_to(tmp_path / "outside.aimod")
    (store / "broken.onnx").write_bytes(b"no model")
    async with serving(tmp_path, model_directories=(str(store),), model_ids={"later": 1}) as served:
        for path in ("outside.aimod", "store/link.aimod", "store/../outside.aimod", "store", "nothing"):
            response = await served.post("/models/start", {"model_path": str(tmp_path / path)})
            assert "model_directories" in assert_error(response, 403, "forbidden")
        for path, fault in (("a\0b", "cannot be looked at"), ("", "Expected `str` of length >= 1")):
            response = await served.post("/models/start", {"model_path": path})
            assert fault in assert_error(response, 400, "invalid_input")

        other = {"model_path": str(store / "deep" / "other.aimod")}
        for id, whose in ((0, "digits"), (1, "later")):
            taken = await served.post("/models/start", {**other, "model_id": id})
            assert f"{id} is the id of model '{whose}'" in assert_error(taken, 400, "invalid_input")
        assert_error(await served.post("/models/start", {**other, "model_id": 2**32}), 400, "invalid_input")
        assert_error(
            await served.post("/models/start", {"model_path": str(store / "broken.onnx")}), 500, "model_load_error"
        )
        assert [model["id"] for model in await served.get("/models")] == [0]

        started = (await served.post("/models/start", other)).json()
        assert (started["id"], started["name"], started["status"]) == (2, "other", "active")
        assert (await served.post("/models/2/infer", {"input": tensor()})).status_code == 200
        again = await served.post("/models/start", other)
        assert "is served already, as model 2, 'other'" in assert_error(again, 400, "invalid_input")
        build_package(DIGITS, store / "namesake.aimod", project_name="other")
        namesake = await served.post("/models/start", {"model_path": str(store / "namesake.aimod")})
        assert "a model named 'other' is known already" in assert_error(namesake, 400, "invalid_input")
        assert len(list((tmp_path / "unpacked").iterdir())) == 2


async def test_a_start_goes_on_when_its_caller_goes_and_is_one_at_a_time(tmp_path: Path) -> None:
    build_package(DIGITS, tmp_path / "store.aimod", project_name="other")
    path = str(tmp_path / "store.aimod")
    async with serving(tmp_path, model_directories=(str(tmp_path),)) as served:
        asking = asyncio.create_task(served.models.start(path))
        await settled(lambda: bool(served.models._reloads))
        asking.cancel()
        second = await asyncio.gather(served.models.start(path), return_exceptions=True)
        assert "is being loaded already" in str(second[0]) or "is served already" in str(second[0])
        while served.models._reloads:
            await asyncio.gather(*(reload.task for reload in served.models._reloads.values()))

        assert [model["name"] for model in await served.get("/models")] == ["digits", "other"]
        served.models.stop()
        assert_error(await served.post("/models/start", {"model_path": path}), 503, "unavailable")


async def test_a_model_that_is_being_added_cannot_be_removed_or_loaded_a_second_time(tmp_path: Path) -> None:
    build_package(DIGITS, tmp_path / "store.aimod", project_name="other")
    async with serving(tmp_path, model_directories=(str(tmp_path),)) as served:
        starting = asyncio.create_task(served.models.start(str(tmp_path / "store.aimod")))
        await settled(lambda: "other" in served.models.ids.names())
        assert "being loaded" in assert_error(await served.post("/models/1/remove"), 429, "overloaded")
        with pytest.raises(Overloaded):
            await served.models.reload("other")
        assert await starting == "other"
        assert (await served.post("/models/1/remove")).status_code == 200
        assert "other" not in served.service.registry


async def test_a_model_that_is_taken_out_is_stopping_until_its_work_has_ended(tmp_path: Path) -> None:
    gate = Gate()
    engine = CallableEngine(gate, name="own", inputs={"x": ("float32", (None, 2))})
    async with serving(tmp_path, engines={"own": engine}) as served:
        asking = asyncio.create_task(served.post("/models/0/infer", {"input": tensor(np.ones((1, 2), np.float32))}))
        await gate.entered.wait()
        stopping = asyncio.create_task(served.post("/models/0/stop"))
        await until(lambda: "own" not in served.service.registry)

        assert (await served.get("/models/0"))["status"] == "stopping"
        assert_error(await served.post("/models/0/remove"), 429, "overloaded")
        gate.open.set()
        assert (await asking).status_code == 200
        assert (await stopping).json()["status"] == "inactive"
        assert (await served.post("/models/0/remove")).status_code == 200


def test_two_models_cannot_have_one_id(tmp_path: Path) -> None:
    config = Config(server=ServerSettings(model_ids={"a": 1, "b": 1}), cron=CronSettings(enabled=False))
    registry: ModelRegistry[Any] = ModelRegistry(start_source)

    with pytest.raises(
        ConfigError, match=r"^server.model_ids: expected an id for each model, got 1 for 'a' and for 'b'$"
    ):
        Models(config, registry, Jobs(config), tmp_path)


# ------------------------------------------------------------------------------------------ not offered


@pytest.mark.parametrize("asked", [{"topology": "tensor-parallel"}, {"tp_degree": 2}])
async def test_a_model_over_several_devices_is_not_offered(tmp_path: Path, asked: dict[str, Any]) -> None:
    async with serving(tmp_path) as served:
        body = {"model_path": str(tmp_path / "digits.aimod"), **asked}
        assert "a model runs on one device" in assert_error(
            await served.post("/models/start", body), 400, "invalid_input"
        )


async def test_scaling_is_shown_as_it_is_and_cannot_be_set_to_what_is_not_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        as_it_is = await served.get("/models/0/scaling")
        assert (as_it_is["min_replicas"], as_it_is["max_replicas"], as_it_is["replicas"]) == (1, 1, 1)

        policy = {"min_replicas": 1, "max_replicas": 4, "target_queue_depth": 5, "scale_down_threshold": 2}
        refused = await served.post("/models/0/scaling", policy)
        assert "there is one replica of each model" in assert_error(refused, 400, "invalid_input")
        kept = await served.post("/models/0/scaling", {**policy, "max_replicas": 1})
        assert (kept.status_code, kept.json()) == (200, as_it_is)
        for wrong, fault in (
            ({"min_replicas": 5}, "min_replicas: 5 came, expected at most 4"),
            ({"scale_down_threshold": 5}, "scale_down_threshold: 5 came, expected less than"),
            ({"min_replicas": 0}, "not a scaling policy"),
            ({"cooldown_seconds": "x"}, "not a scaling policy"),
        ):
            response = await served.post("/models/0/scaling", {**policy, **wrong})
            assert fault in assert_error(response, 400, "invalid_input")
        assert_error(await served.client.get("/models/3/scaling"), 404, "model_not_loaded")
        assert_error(await served.post("/models/3/scaling", policy), 404, "model_not_loaded")


# -------------------------------------------------------------------------------------------- inference


async def test_an_inference_has_bytes_in_and_out(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        named = {"shape": [1, 64], "dtype": "fp32", "data": list(PIXELS.tobytes())}
        bodies = (
            {"input": tensor()},
            {"input": named, "session_id": "s", "metadata": {"timeout_ms": 5000, "priority": 1, "top_k": 3}},
            {"input": named, "additional_inputs": [], "metadata": None},
        )
        answers = [await served.post("/models/0/infer", body) for body in bodies]

        assert [answer.status_code for answer in answers] == [200] * 3
        first, *others = (answer.json() for answer in answers)
        assert others == [first, first]
        assert (first["shape"], first["dtype"], len(first["data"])) == ([1, 10], "float32", 40)
        assert np.frombuffer(bytes(first["data"]), "<f4").sum() == pytest.approx(1.0)
        statistics = served.service.registry.get("digits").scheduler.statistics()
        assert statistics.classes["throughput"].succeeded == 1
        assert statistics.classes["latency_critical"].succeeded == 2  # the model's default class
        assert served.service.figures("digits").answers == {200: 3}


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({}, "not an inference request"),
        ({"input": {"shape": [1], "dtype": "float32"}}, "input: expected exactly one of data and data_base64"),
        ({"input": tensor(), "metadata": {"priority": -1}}, "metadata.priority: expected 0 or more, got -1"),
        ({"input": tensor(), "metadata": {"timeout_ms": 0}}, "metadata.timeout_ms: expected 1 or more, got 0"),
        ({"input": tensor(PIXELS[:, :63])}, "input 'pixels': axis 1 is 63"),
        ({"input": tensor(), "additional_inputs": [{"name": "z", "tensor": tensor()}]}, "input 'z' is not one of"),
        ({"input": tensor(), "additional_inputs": [{"name": "z", "tensor": {"shape": [], "dtype": "x"}}]}, "z.dtype"),
    ],
)
async def test_an_inference_that_cannot_be_says_why(tmp_path: Path, body: Any, fault: str) -> None:
    async with serving(tmp_path) as served:
        assert fault in assert_error(await served.post("/models/0/infer", body), 400, "invalid_input")
        assert served.service.in_flight == 0


async def test_an_inference_is_traced_as_its_caller_asks(tmp_path: Path) -> None:
    spans = InMemorySpanExporter()
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    async with serving(tmp_path) as served:
        served.service.tracing = Tracing(SimpleSpanProcessor(spans), version="1", sample_ratio=0.0)
        for asked, sampled in ((tensor(), 1), (tensor(PIXELS[:, :63]), 1), (tensor(), 0)):
            headers = {"traceparent": f"00-{trace}-{parent}-0{sampled}"}
            await served.client.post("/models/0/infer", json={"input": asked}, headers=headers)
        await served.post("/models/0/infer", {"input": tensor()})

    roots = [span for span in spans.get_finished_spans() if span.name == "POST /api/models/{id}/infer"]
    assert [(root.attributes or {})["http.response.status_code"] for root in roots] == [200, 400]
    assert {(root.attributes or {})["kapsl.model"] for root in roots} == {"digits"}
    assert {f"{root.context.trace_id:032x}" for root in roots} == {trace}
    (queue,) = [span for span in spans.get_finished_spans() if span.name == "queue"]
    assert queue.parent is not None
    assert queue.parent.span_id == roots[0].context.span_id


async def test_an_inference_of_another_version_or_too_large_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        body = {"input": tensor(), "metadata": {"model_version": "9"}}
        response = await served.post("/models/0/infer", body)
        assert "Model 0 not found: version '9'" in assert_error(response, 404, "model_not_loaded")
        response = await served.post("/models/0/infer", {"input": tensor(), "session_id": "x" * 100_000})
        assert_error(response, 413, "resource_exhausted")


async def test_a_client_that_goes_takes_its_inference_back(tmp_path: Path) -> None:
    gate = Gate()
    engine = CallableEngine(gate, name="own", inputs={"x": ("float32", (None, 2))})
    async with serving(tmp_path, engines={"own": engine}) as served:
        body = httpx.Request("POST", "http://x", json={"input": tensor(np.ones((1, 2), np.float32))}).content
        gone = asyncio.Event()
        asking = asyncio.create_task(
            exchange(
                served.api,
                [{"type": "http.request", "body": body, "more_body": False}],
                gone=gone.wait(),
                path="/api/models/0/infer",
            )
        )
        await gate.entered.wait()
        gone.set()

        assert (await asking)[0] == 499
        assert served.service.figures("own").answers == {499: 1}
        assert served.service.in_flight == 0
        gate.open.set()


# ------------------------------------------------------------------------------------------- the machine


async def test_the_process_and_the_machine_are_shown(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        before = time.time_ns() // 1_000_000
        stats = await served.get("/system/stats")
        assert stats["pid"] == os.getpid()
        assert 10 << 20 < stats["process_memory_bytes"] < stats["total_system_memory_bytes"]
        assert before <= stats["collected_at_ms"] <= time.time_ns() // 1_000_000
        assert {key for key, value in stats.items() if value is None} == {
            "gpu_utilization",
            "gpu_memory_bytes",
            "gpu_memory_total_bytes",
            "pressure_state",
        }
        (device,) = (await served.get("/hardware"))["devices"]
        assert device["kind"] == "cpu"
        assert 1 <= device["cores"] <= (os.cpu_count() or 1)
        assert device["memory_bytes"] == stats["total_system_memory_bytes"]
