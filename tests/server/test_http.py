"""The HTTP routes in process: the table from error to status, bounds, and clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from kapsl_scheduler import Scheduler
from kapsl_scheduler import errors as error_tree
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.errors import (
    Backend,
    Cancelled,
    CronError,
    DeadlineExceeded,
    DuplicateId,
    EngineError,
    Forbidden,
    InferenceError,
    InvalidExpression,
    InvalidInput,
    InvalidJob,
    InvalidPackage,
    ModelLoadError,
    ModelNotLoaded,
    NotFound,
    Overloaded,
    ResourceExhausted,
    StoreError,
    Unauthorized,
    Unavailable,
)
from kapsl_scheduler.runtime.registry import ModelRegistry, ServedModel
from kapsl_scheduler.server.answers import status_of
from kapsl_scheduler.server.oip_models import EXTENSIONS
from kapsl_scheduler.types import InferenceResponse, ModelInfo, Priority
from tests.server.api import Gate, api_over, assert_error, body_of, double, exchange, serving, until

# ------------------------------------------------------------------------------------------ what works


@pytest.mark.parametrize("path", ["/v2/models/m/infer", "/v2/models/m/versions/3/infer"])
async def test_an_inference_is_answered(path: str) -> None:
    async with serving() as server:
        response = await server.infer([1.5, -2], path, id="7", outputs=[{"name": "y"}])

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "model_name": "m",
        "model_version": "3",
        "id": "7",
        "outputs": [{"name": "y", "shape": [1, 2], "datatype": "FP32", "data": [3.0, -4.0]}],
    }


async def test_health_metadata_and_index() -> None:
    async with serving() as server:
        answers = {
            path: (await server.client.get(path)).json()
            for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/m", "/v2/models/m/versions/3/ready")
        }
        index = await server.client.post("/v2/repository/index")

    assert answers["/v2"] == {"name": "kapsl-scheduler", "version": "1.2.3", "extensions": list(EXTENSIONS)}
    assert answers["/v2/health/live"] == {"live": True}
    assert answers["/v2/health/ready"] == {"ready": True}
    assert answers["/v2/models/m/versions/3/ready"] == {"name": "m", "ready": True}
    assert answers["/v2/models/m"]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    assert index.json() == [{"name": "m", "version": "3", "state": "READY", "reason": ""}]


async def test_versions_of_a_model_are_served_side_by_side() -> None:
    async with serving() as server:

        def negate(x: Any) -> Any:
            return -x

        newer = CallableEngine(
            negate, version="4", inputs={"x": ("float32", (None, 2))}, outputs={"y": ("float32", (None, 2))}
        )
        async with Scheduler([newer]) as scheduler:
            other = ModelRegistry[Any](lambda source: source)
            await other.load("m", returned(server.scheduler))
            await other.load("m", returned(scheduler))
            api = api_over(other)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://server") as client:
                answers = [
                    (await client.post(f"/v2/models/m{version}/infer", content=body_of())).json()
                    for version in ("", "/versions/3", "/versions/4")
                ]
                metadata = (await client.get("/v2/models/m/versions/3")).json()
                index = (await client.post("/v2/repository/index")).json()
                stats = (await client.get("/v2/models/stats")).json()["model_stats"]

    assert [(answer["model_version"], answer["outputs"][0]["data"]) for answer in answers] == [
        ("4", [-1, -2]),
        ("3", [2, 4]),
        ("4", [-1, -2]),
    ]
    assert metadata["versions"] == ["3", "4"]
    assert [(entry["name"], entry["version"]) for entry in index] == [("m", "3"), ("m", "4")]
    assert [(entry["version"], entry["inference_stats"]["success"]["count"]) for entry in stats] == [("3", 1), ("4", 2)]


async def returned(scheduler: Any) -> Any:
    return scheduler


async def test_statistics_count_answers_and_calls() -> None:
    async with serving() as server:
        await server.infer()
        await server.infer("nonsense")
        stats = (await server.client.get("/v2/models/m/stats")).json()["model_stats"][0]

    assert (stats["name"], stats["version"]) == ("m", "3")
    assert (stats["inference_count"], stats["execution_count"]) == (1, 1)
    assert stats["answers"] == {"200": 1, "400": 1}
    assert stats["scheduler"]["succeeded"] == 1
    assert stats["scheduler"]["classes"]["latency_critical"]["succeeded"] == 1


async def test_a_model_is_loaded_anew_by_name() -> None:
    asked: list[str] = []
    async with serving() as server:

        async def reload(name: str) -> ServedModel:
            asked.append(name)
            return server.registry.get(name)

        api = api_over(server.registry, reload=reload)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://server") as client:
            path = "/v2/repository/models/m/load"
            answers = [await client.post(path, content=body) for body in (b"", b"{}", b'{"parameters":{}}')]
            with_parameters = await client.post(path, content=b'{"parameters":{"config":"{}"}}')
            no_json = await client.post(path, content=b"[")
            too_long = await client.post(path, content=b" " * 70_000)
            unknown = await client.post("/v2/repository/models/no/load")

        assert [answer.json() for answer in answers] == [
            {"name": "m", "version": "3", "state": "READY", "reason": ""}
        ] * 3
        assert asked == ["m"] * 3 + ["no"]
        assert "config" in assert_error(with_parameters, 400, "invalid_input")
        assert_error(no_json, 400, "invalid_input")
        assert_error(too_long, 413, "resource_exhausted")
        assert_error(unknown, 404, "model_not_loaded")
        assert_error(await server.client.post(path), 404, "not_found")


async def test_a_model_is_unloaded_by_name() -> None:
    async with serving() as server:
        api = api_over(server.registry, unload=server.registry.unload)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://server") as client:
            path = "/v2/repository/models/m/unload"
            refused = await client.post(path, content=b'{"parameters":{"config":"{}"}}')
            done = await client.post(path, content=b'{"parameters":{"unload_dependents":true}}')
            again = await client.post(path)

        assert "config" in assert_error(refused, 400, "invalid_input")
        assert (done.status_code, done.json()) == (200, {})
        assert_error(again, 404, "model_not_loaded")
        assert_error(await server.client.post(path), 404, "not_found")


# --------------------------------------------------------------------------------- the table of statuses


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidInput(), 400),
        (Unauthorized(), 401),
        (Forbidden(), 403),
        (ModelNotLoaded(), 404),
        (ResourceExhausted(), 413),
        (Overloaded(), 429),
        (Cancelled(), 499),
        (Unavailable(), 503),
        (DeadlineExceeded(), 504),
        (Backend(), 500),
        (InferenceError(), 500),
        (ModelLoadError(), 500),
        (InvalidPackage(["x"]), 500),
        (EngineError(), 500),
        (InvalidExpression("x"), 400),
        (InvalidJob(["x"]), 400),
        (NotFound(), 404),
        (DuplicateId(), 409),
        (StoreError(), 503),
        (CronError(), 503),
        (ValueError(), 500),
    ],
)
def test_every_error_has_its_status(error: Exception, status: int) -> None:
    assert status_of(error) == status


def test_the_table_above_knows_every_error_of_the_tree() -> None:
    marked = test_every_error_has_its_status.pytestmark[0]  # type: ignore[attr-defined]
    tested = {type(error).__name__ for error, _ in marked.args[1]}

    assert tested >= set(error_tree.__all__)


@pytest.mark.parametrize(
    ("data", "keys", "said"),
    [
        ([1], {}, "input 'x': data has 1 elements, expected 2"),
        ([1, 2], {"outputs": [{"name": "z"}]}, "output 'z' was asked for, expected one of 'y'"),
        ([1, 2], {"parameters": {"priority": "high"}}, "priority"),
        ([1, 2], {"parameters": {"priority": 10**400}}, "priority"),
        ([1, 2], {"parameters": {"timeout": 10**400}}, "timeout"),
        ([1, 2], {"inputs": [{"name": "w", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}, "'w'"),
        ([1, 2], {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "INT8", "data": [1, 2]}]}, "float32"),
    ],
)
async def test_400(data: Any, keys: dict[str, Any], said: str) -> None:
    async with serving() as server:
        response = await server.infer(data, **keys)

        assert said in assert_error(response, 400, "invalid_input")
        assert server.scheduler.statistics().calls == 0


async def test_400_for_more_rows_than_a_batch_may_have_names_the_limit() -> None:
    tensor = {"name": "x", "shape": [33, 2], "datatype": "FP32", "data": [0] * 66}
    async with serving() as server:
        message = assert_error(await server.infer(inputs=[tensor]), 400, "invalid_input")

    assert message == "the request has 33 rows, expected at most 32 (max_batch_size)"


async def test_404_names_what_is_loaded() -> None:
    async with serving() as server:
        assert "'m'" in assert_error(await server.infer(path="/v2/models/no/infer"), 404, "model_not_loaded")
        assert "'3'" in assert_error(await server.infer(path="/v2/models/m/versions/9/infer"), 404, "model_not_loaded")
        for path in ("/v2/models/no", "/v2/models/no/ready", "/v2/models/no/stats"):
            assert_error(await server.client.get(path), 404, "model_not_loaded")
        for path in ("/v3", "/v2/", "/v2/models/m/"):
            assert path in assert_error(await server.client.get(path), 404, "not_found")


async def test_405() -> None:
    async with serving() as server:
        response = await server.client.get("/v2/models/m/infer")

    assert_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


async def test_429_with_retry_after_when_the_queue_is_full() -> None:
    gate = Gate()
    async with serving(gate, max_size=1) as server, asyncio.TaskGroup() as group:
        running = group.create_task(server.infer())
        await gate.entered.wait()
        queued = group.create_task(server.infer())
        await until(lambda: server.scheduler.statistics().queued == 1)

        refused = await server.infer()

        assert_error(refused, 429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["retry_after"] >= 0
        gate.open.set()
        assert [(await running).status_code, (await queued).status_code] == [200, 200]


async def test_429_beyond_the_requests_in_flight_while_health_and_metadata_are_answered() -> None:
    gate = Gate()
    async with serving(gate, max_in_flight=2) as server, asyncio.TaskGroup() as group:
        body_arrives = asyncio.Event()
        leaving = group.create_task(
            exchange(server.api, [{"type": "http.request", "body": b"{", "more_body": True}], gone=body_arrives.wait())
        )
        running = group.create_task(server.infer())
        await gate.entered.wait()

        refused = await server.infer()
        others = [
            await server.client.get(path) for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/m", "/v2")
        ]
        stats = (await server.client.get("/v2/models/m/stats")).json()["model_stats"][0]
        body_arrives.set()
        await leaving
        gate.open.set()
        room_again = await server.infer()

        assert "2 inference requests" in assert_error(refused, 429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert {answer.status_code for answer in others} == {200}
        assert stats["answers"] == {"429": 1}
        assert stats["scheduler"]["offered"] == 1
        assert [room_again.status_code, (await running).status_code] == [200, 200]


async def test_503_with_retry_after_when_the_scheduler_is_closed() -> None:
    async with serving() as server:
        await server.scheduler.close(0)

        response = await server.infer()
        ready = await server.client.get("/v2/health/ready")
        model_ready = await server.client.get("/v2/models/m/ready")
        index = await server.client.post("/v2/repository/index")

    assert_error(response, 503, "unavailable")
    assert int(response.headers["retry-after"]) >= 1
    assert (ready.status_code, ready.json()) == (503, {"ready": False})
    assert (model_ready.status_code, model_ready.json()) == (503, {"name": "m", "ready": False})
    assert index.json()[0]["state"] == "UNAVAILABLE"


async def test_a_draining_server_is_not_ready_but_answers() -> None:
    async with serving() as server:
        server.api.inference.service.draining = True

        assert (await server.client.get("/v2/health/ready")).status_code == 503
        assert (await server.client.get("/v2/models/m/ready")).status_code == 503
        assert (await server.client.get("/v2/health/live")).status_code == 200
        assert (await server.infer()).status_code == 200


async def test_504_when_the_timeout_in_microseconds_is_over() -> None:
    gate = Gate()
    async with serving(gate) as server:
        response = await server.infer(parameters={"timeout": 1000})

        assert_error(response, 504, "deadline_exceeded")
        gate.open.set()


async def test_500_keeps_the_type_of_the_error_and_says_what_the_model_said(caplog: pytest.LogCaptureFixture) -> None:
    def fails(x: Any) -> Any:
        raise ZeroDivisionError("no answer to that")

    async with serving(fails) as server:
        message = assert_error(await server.infer(), 500, "inference_error")

    assert "no answer to that" in message
    assert "inference on 'm' failed: inference_error" in caplog.text


class Recording:
    """A scheduler that only remembers how it was called; `failure` is what it raises."""

    def __init__(self) -> None:
        self.keywords: dict[str, Any] = {}
        self.failure: Exception | None = None

    async def infer(self, request: Any, **keywords: Any) -> InferenceResponse:
        self.keywords = keywords
        if self.failure is not None:
            raise self.failure
        return InferenceResponse.of({"y": np.zeros(1)}, 0.0, 0.0, 1)

    def model_info(self) -> ModelInfo:
        return ModelInfo("inner")

    async def close(self, drain: float = 0) -> None: ...


@asynccontextmanager
async def recording() -> AsyncIterator[tuple[Recording, httpx.AsyncClient]]:
    scheduler = Recording()

    async def start(source: None) -> Any:
        return scheduler

    async with ModelRegistry(start) as registry:
        await registry.load("m", None)
        transport = httpx.ASGITransport(api_over(registry), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield scheduler, client


async def test_an_unexpected_error_is_500_and_is_logged_but_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async with recording() as (scheduler, client):
        scheduler.failure = RuntimeError("secret")
        response = await client.post("/v2/models/m/infer", content=body_of())

    assert "secret" not in assert_error(response, 500, "internal")
    assert "secret" in caplog.text


async def test_priority_and_timeout_reach_the_scheduler_in_its_units() -> None:
    async with recording() as (scheduler, client):
        for sent, meant in [
            (0, None),
            (1, Priority.LATENCY_CRITICAL),
            (2, Priority.THROUGHPUT),
            (7, Priority.BACKGROUND),
        ]:
            parameters = {"priority": sent, "timeout": 1_500_000}
            await client.post("/v2/models/m/infer", content=body_of(parameters=parameters))
            assert scheduler.keywords == {"priority": meant, "timeout": 1.5}
        await client.post("/v2/models/m/infer", content=body_of())
        assert scheduler.keywords == {"priority": None, "timeout": None}


async def test_an_output_that_an_undeclared_model_did_not_return_is_400() -> None:
    async with recording() as (_, client):
        response = await client.post("/v2/models/m/infer", content=body_of(outputs=[{"name": "z"}]))

    assert_error(response, 400, "invalid_input")


# ---------------------------------------------------------------------------------- clients that go away


async def test_a_client_that_goes_away_cancels_its_running_request() -> None:
    gate = Gate()
    async with serving(gate) as server:
        status, _ = await exchange(server.api, [{"type": "http.request", "body": body_of()}], gone=gate.entered.wait())

        assert status == 499
        assert server.scheduler.statistics().cancelled == 1
        assert not [task for task in asyncio.all_tasks() if "_fail_when_gone" in repr(task)]
        stats = (await server.client.get("/v2/models/m/stats")).json()["model_stats"][0]
        assert stats["answers"] == {"499": 1}
        gate.open.set()


async def test_nothing_is_left_waiting_for_a_client_that_got_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, timers = asyncio.get_running_loop(), []
    call_later = loop.call_later

    def recorded(delay: float, *arguments: Any, **keywords: Any) -> asyncio.TimerHandle:
        timers.append(call_later(delay, *arguments, **keywords))
        return timers[-1]

    async with serving() as server:
        monkeypatch.setattr(loop, "call_later", recorded)
        assert (await server.infer()).status_code == 200

        assert timers
        assert all(timer.cancelled() for timer in timers)


async def test_a_client_that_goes_away_takes_its_request_out_of_the_queue() -> None:
    gate = Gate()
    async with serving(gate) as server, asyncio.TaskGroup() as group:
        running = group.create_task(server.infer())
        await gate.entered.wait()
        gone = asyncio.Event()
        leaving = group.create_task(
            exchange(server.api, [{"type": "http.request", "body": body_of()}], gone=gone.wait())
        )
        await until(lambda: server.scheduler.statistics().queued == 1)

        gone.set()

        assert (await leaving)[0] == 499
        gate.open.set()
        assert (await running).status_code == 200
        statistics = server.scheduler.statistics()
        assert (statistics.queued, statistics.cancelled, gate.calls) == (0, 1, 1)


async def test_answers_to_a_name_that_was_not_loaded_are_not_counted() -> None:
    async with serving() as server:
        await server.client.post("/v2/models/later/infer", content=b"x" * 20_000)
        await server.registry.load("later", double)

        stats = (await server.client.get("/v2/models/later/stats")).json()["model_stats"][0]

    assert stats["answers"] == {}


async def test_an_answer_says_how_it_came_about_to_who_asks() -> None:
    async with serving() as server:
        silent = await server.infer()
        body = {"inputs": [{"name": "x", "shape": [3, 2], "datatype": "FP32", "data": [1] * 6}]}
        asked = await server.client.post("/v2/models/m/infer", json=body, headers={"kapsl-timing": "1"})

    assert not [name for name in silent.headers if name.startswith("kapsl-")]
    assert asked.headers["kapsl-batch-rows"] == "3"
    assert 0 <= int(asked.headers["kapsl-queue-time-us"]) < 1e6
    assert 0 <= int(asked.headers["kapsl-compute-time-us"]) < 1e6
