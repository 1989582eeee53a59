"""What the real process says of itself."""

from __future__ import annotations

import shutil
import subprocess

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kapsl_scheduler.client import Client
from kapsl_scheduler.demo.run import PACKAGE
from tests.e2e.process import serving

pytestmark = pytest.mark.slow

PROMTOOL = shutil.which("promtool")
BODY = b'{"inputs":[{"name":"pixels","shape":[1,64],"datatype":"FP32","data":[' + b"0," * 63 + b"0]}]}"


async def test_figures_are_those_of_the_process_and_of_its_connections() -> None:
    async with serving(PACKAGE, "--cron-store", "memory") as server, Client(server.url) as idle:
        await idle.get("/v2/health/live")  # it stays connected
        async with httpx.AsyncClient(base_url=server.url) as client:
            for _ in range(3):
                assert (await client.post("/v2/models/digits/infer", content=BODY)).status_code == 200
            page = (await client.get("/metrics")).text
            debug = (await client.get("/debug")).json()

    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert samples["kapsl_http_connections",] == 2
    assert samples["kapsl_http_requests_total", "POST", "/v2/models/{model}/infer", "200"] == 3
    assert samples["kapsl_answers_total", "digits", "200", "1.0.0"] == 3
    assert samples["process_resident_memory_bytes",] > 20e6
    if PROMTOOL is not None:
        checked = subprocess.run(  # noqa: ASYNC221  # nothing else runs
            [PROMTOOL, "check", "metrics"], input=page, text=True, capture_output=True, check=False
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")

    assert debug["connections"]["number"] == 2
    assert debug["config"]["cron"]["store"] == "memory"
    assert {"MainThread"} <= {thread["name"] for thread in debug["threads"]}
    assert debug["process"]["loop"] == "uvloop"
    assert [model["name"] for model in debug["models"]] == ["digits"]
