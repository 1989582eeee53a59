"""The figures of models, of the server around them, and the same under Triton's names."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Exemplar

from kapsl_scheduler import Scheduler
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.runtime.metrics import Latencies
from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.server.http_figures import HttpFigures
from kapsl_scheduler.server.metrics_models import histogram
from kapsl_scheduler.server.tracing import Tracing
from tests.server.api import Gate, Server, api_over, body_of, double, serving, serving_jobs, until
from tests.server.test_cron_http import put
from tests.server.test_metrics import scraped, value

PROMTOOL = shutil.which("promtool")
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


async def test_a_models_requests_rows_calls_and_answers_are_there() -> None:
    async with serving() as server:
        for priority in (1, 1, 2, 3):
            await server.infer(parameters={"priority": priority})
        assert (await server.infer("wrong")).status_code == 400
        assert (await server.infer(inputs=[])).status_code == 400
        families = await scraped(server)

    assert value(families, "kapsl_requests", model="m", outcome="succeeded") == 4
    assert value(families, "kapsl_requests", model="m", outcome="invalid") == 1
    assert value(families, "kapsl_requests", model="m", outcome="failed") == 0
    assert value(families, "kapsl_answers", model="m", status="200") == 4
    assert value(families, "kapsl_answers", model="m", status="400") == 2
    assert value(families, "kapsl_rows", model="m") == value(families, "kapsl_calls", model="m") == 4
    assert value(families, "kapsl_engine_busy_seconds", model="m") > 0
    assert value(families, "kapsl_codec_seconds", model="m", step="read") > 0
    assert value(families, "kapsl_model_ready", model="m") == 1
    assert [sample.value for sample in families["kapsl_engine_ready"].samples] == [1]
    latency = families["kapsl_request_latency_seconds"].samples
    counts = {s.labels["class"]: s.value for s in latency if s.name.endswith("_count")}
    assert counts == {"latency_critical": 2, "throughput": 1, "background": 1}
    assert all(s.value > 0 for s in latency if s.name.endswith("_sum"))


async def test_what_waits_and_what_runs_is_there_by_class() -> None:
    gate = Gate()
    async with serving(gate, max_size=3, max_in_flight=4) as server:
        running = [asyncio.create_task(server.infer())]
        await gate.entered.wait()
        running += [asyncio.create_task(server.infer(parameters={"priority": priority})) for priority in (2, 3, 3)]
        await until(lambda: server.scheduler.statistics().queued == 3)
        refused = await server.infer()
        families = await scraped(server)
        gate.open.set()
        await asyncio.gather(*running)
        after = await scraped(server)

    assert refused.status_code == 429
    queued = {sample.labels["class"]: sample.value for sample in families["kapsl_queued"].samples}
    assert queued == {"latency_critical": 0, "throughput": 1, "background": 2}
    for name, expected in {"running": 1, "calls_in_flight": 1, "slots": 1, "waiting": 0}.items():
        assert value(families, f"kapsl_{name}", model="m") == expected
    assert value(families, "kapsl_in_flight") == value(families, "kapsl_in_flight_limit") == 4
    assert value(families, "kapsl_in_flight_refused") == 1
    assert value(after, "kapsl_in_flight") == value(after, "kapsl_running", model="m") == 0
    assert value(after, "kapsl_queue_seconds", model="m", **{"class": "background"}) > 0


async def test_the_sizes_of_batches_are_a_histogram_up_to_the_largest() -> None:
    gate = Gate()
    async with serving(gate, max_batch_size=6) as server:
        first = asyncio.create_task(server.infer())
        await gate.entered.wait()
        rest = [asyncio.create_task(server.infer()) for _ in range(5)]
        await until(lambda: server.scheduler.statistics().queued == 5)
        gate.open.set()
        await asyncio.gather(first, *rest)
        families = await scraped(server)

    samples = families["kapsl_batch_rows"].samples
    buckets = {s.labels["le"]: s.value for s in samples if s.name.endswith("_bucket")}
    assert buckets == {"1": 1, "2": 1, "4": 1, "6": 2, "+Inf": 2}
    assert next(s.value for s in samples if s.name.endswith("_sum")) == 6


async def test_answers_over_http_are_counted_by_route_and_never_by_path() -> None:
    async with serving() as server:
        await server.infer()
        await server.infer("wrong")
        for path in ("/v2/models/m", "/v2/models/nope", "/v2/models/other/ready", "/strange/1", "/strange/2"):
            await server.client.get(path)
        await server.client.request("BREW", "/v2")
        families = await scraped(server)

    counts = {
        (s.labels["method"], s.labels["route"], s.labels["status"]): s.value
        for s in families["kapsl_http_requests"].samples
    }
    assert counts == {
        ("POST", "/v2/models/{model}/infer", "200"): 1,
        ("POST", "/v2/models/{model}/infer", "400"): 1,
        ("GET", "/v2/models/{model}", "200"): 1,
        ("GET", "/v2/models/{model}", "404"): 1,
        ("GET", "/v2/models/{model}/ready", "404"): 1,
        ("GET", "(none)", "404"): 2,
        ("(other)", "/v2", "405"): 1,
    }


def test_the_series_of_http_are_bounded_whatever_routes_there_are() -> None:
    figures = HttpFigures()
    for number in range(5000):
        figures.answered({"method": "GET", "root_path": f"/{number}", "route": _Route()}, 200)
    figures.answered({"method": "GET", "root_path": "/1", "route": _Route()}, 200)

    answers = figures.answers()
    assert (len(answers), answers.total(), answers["GET", "/1/x", 200]) == (2001, 5001, 2)


class _Route:
    path = "/x"


async def test_a_server_that_drains_says_so_and_closes_its_connections() -> None:
    async with serving() as server:
        before = await scraped(server)
        server.api.inference.service.draining = True
        answer = await server.client.get("/v2/health/live")
        after = await scraped(server)

    assert [(value(f, "kapsl_ready"), value(f, "kapsl_draining")) for f in (before, after)] == [(1, 0), (0, 1)]
    assert answer.headers["connection"] == "close"


async def test_the_process_is_there() -> None:
    async with serving() as server:
        families = await scraped(server)

    assert value(families, "process_resident_memory_bytes") > 1e6
    assert value(families, "process_open_fds") > 0
    assert "python_gc_collections" in families


async def test_triton_names_have_tritons_meanings_and_form() -> None:
    async with serving() as server:
        for _ in range(3):
            await server.infer()
        await server.infer("wrong")
        stats = (await server.client.get("/v2/models/m/stats")).json()["model_stats"][0]["inference_stats"]
        page = await server.client.get("/metrics/triton")
        ours = await scraped(server)

    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
    labels = 'model="m",version="3"'
    for name in ("request_success", "exec_count", "count"):
        assert lines[f"nv_inference_{name}{{{labels}}}"] == "3"
    for name, part in {
        "request": "success",
        "queue": "queue",
        "compute_input": "compute_input",
        "compute_infer": "compute_infer",
        "compute_output": "compute_output",
    }.items():
        assert int(lines[f"nv_inference_{name}_duration_us{{{labels}}}"]) == stats[part]["ns"] // 1000
    failures = {key: number for key, number in lines.items() if "failure" in key}
    assert failures[f'nv_inference_request_failure{{{labels},reason="OTHER"}}'] == "1"
    assert sum(map(int, failures.values())) == 1
    assert "# TYPE nv_inference_request_success counter" in page.text
    assert not [name for name in ours if name.startswith("nv_")]
    assert {family.name for family in text_string_to_metric_families(page.text)} > {"nv_inference_count"}


async def test_a_name_with_quotes_is_a_label_all_the_same() -> None:
    async with serving() as server:
        name = 'a"b\\c'
        await server.registry.load(name, lambda x: x)
        page = (await server.client.get("/metrics/triton")).text
        families = await scraped(server)

    assert value(families, "kapsl_model_ready", model=name) == 1
    (family,) = [f for f in text_string_to_metric_families(page) if f.name == "nv_inference_pending_request_count"]
    assert {sample.labels["model"] for sample in family.samples} == {"m", name}


async def test_versions_of_a_model_have_their_own_series() -> None:
    spans = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(spans), version="1.2.3")

    async def start(version: str) -> Scheduler:
        inputs, outputs = {"x": ("float32", (None, 2))}, {"y": ("float32", (None, 2))}
        engine = CallableEngine(double, version=version, inputs=inputs, outputs=outputs)
        return await Scheduler([engine], observer=tracing.observer("m")).__aenter__()

    async with ModelRegistry(start) as registry:
        for version in ("3", "4"):
            await registry.load("m", version)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(api_over(registry, tracing=tracing)), base_url="http://server"
        ) as client:
            for path in ("/v2/models/m", "/v2/models/m", "/v2/models/m/versions/3"):
                assert (await client.post(f"{path}/infer", content=body_of())).status_code == 200
            page = (await client.get("/metrics", headers={"accept": OPENMETRICS})).text
            triton = (await client.get("/metrics/triton")).text

    families = {family.name: family for family in openmetrics.text_string_to_metric_families(page)}
    for version, count in (("3", 1), ("4", 2)):
        labels = {"model": "m", "version": version}
        for name in ("kapsl_rows", "kapsl_calls"):
            assert value(families, name, **labels) == count
        assert value(families, "kapsl_requests", **labels, outcome="succeeded") == count
        assert value(families, "kapsl_answers", **labels, status="200") == count
        assert f'nv_inference_request_success{{model="m",version="{version}"}} {count}' in triton.splitlines()
    keys = [(sample.name, *sorted(sample.labels.items())) for family in families.values() for sample in family.samples]
    assert len(keys) == len(set(keys))
    samples = families["kapsl_request_latency_seconds"].samples
    assert {sample.labels["version"] for sample in samples if sample.exemplar is not None} == {"3", "4"}
    batches = [dict(span.attributes or {}) for span in spans.get_finished_spans() if span.name == "batch"]
    assert [batch["kapsl.model.version"] for batch in batches] == ["4", "4", "3"]


async def full_page(server: Server, accept: str = "") -> str:
    await put(server)
    for priority in (1, 2, 3):
        await server.infer(parameters={"priority": priority})
    return (await server.client.get("/metrics", headers={"accept": accept})).text


async def test_openmetrics_has_all_of_it() -> None:
    async with serving_jobs() as server:
        page = await full_page(server, OPENMETRICS)

    names = {family.name for family in openmetrics.text_string_to_metric_families(page)}
    assert {"kapsl_request_latency_seconds", "kapsl_http_requests", "kapsl_batch_rows", "process_open_fds"} <= names


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian's package prometheus has it)")
async def test_promtool_finds_nothing_to_say(tmp_path: Path) -> None:
    async with serving_jobs() as server:
        page = await full_page(server)

    assert PROMTOOL is not None
    checked = subprocess.run(  # noqa: ASYNC221  # nothing else runs
        [PROMTOOL, "check", "metrics"], input=page, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_an_exemplar_stands_in_the_bucket_that_its_value_belongs_to() -> None:
    bounds = (1e-5, 2e-5)
    counts = [0] * 97
    of: Mapping[tuple[str, ...], Latencies] = {("m",): Latencies(counts, 0.0)}
    there = {("m",): {2: Exemplar({"trace_id": "a"}, 1.5e-5), 96: Exemplar({"trace_id": "b"}, 200.0)}}
    family = histogram("h", "", ("model",), of, bounds, there)

    found = {s.labels["le"]: s.exemplar.labels["trace_id"] for s in family.samples if s.exemplar is not None}
    assert found == {"2e-05": "a", "+Inf": "b"}
