"""`/metrics`: what a scraper reads."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from kapsl_scheduler.core.runs import Run, RunState
from kapsl_scheduler.runtime.cron_metrics import MAX_JOBS, OTHER_JOBS
from kapsl_scheduler.server.metrics import _bounded
from tests.server.api import Server, serving, serving_jobs
from tests.server.test_cron_http import ended, post, put


async def scraped(server: Server, accept: str = "") -> dict[str, Any]:
    response = await server.client.get("/metrics", headers={"accept": accept})
    assert response.status_code == 200
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def value(families: dict[str, Any], family: str, **labels: str) -> float:
    (sample,) = [sample for sample in families[family].samples if labels.items() <= sample.labels.items()]
    return float(sample.value)


async def test_the_figures_of_jobs_are_there() -> None:
    async with serving_jobs() as server:
        await put(server)
        await put(server, "other")
        for _ in range(2):
            await ended(server, (await post(server, "/trigger")).json()["number"])
        families = await scraped(server)

    plain = ("jobs", "running", "waiting", "overdue", "store_up")
    assert [value(families, f"kapsl_cron_{name}") for name in plain] == [2, 0, 0, 0, 1]
    assert value(families, "kapsl_cron_fired") == 2
    assert value(families, "kapsl_cron_outcomes", job="p:night", state="succeeded", reason="") == 2
    assert value(families, "kapsl_build_info", version="1.2.3") == 1
    for name in ("lateness", "duration"):
        samples = families[f"kapsl_cron_{name}_seconds"].samples
        buckets = [sample.value for sample in samples if sample.name.endswith("_bucket")]
        assert families[f"kapsl_cron_{name}_seconds"].type == "histogram"
        assert buckets == sorted(buckets)
        assert buckets[-1] == next(sample.value for sample in samples if sample.name.endswith("_count")) == 2


async def test_openmetrics_is_spoken_to_who_asks_for_it() -> None:
    async with serving_jobs() as server:
        await put(server)
        await ended(server, (await post(server, "/trigger")).json()["number"])
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        response = await server.client.get("/metrics", headers=accept)

    assert response.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics.text_string_to_metric_families(response.text)}
    assert {"kapsl_build", "kapsl_build_info"} & names
    assert "kapsl_cron_outcomes" in names


async def test_a_server_without_jobs_has_no_figures_of_them() -> None:
    async with serving() as server:
        families = await scraped(server)

    assert list(families) == ["kapsl_build_info"]


async def test_the_series_of_jobs_and_of_reasons_are_bounded() -> None:
    async with serving_jobs() as server:
        for number in range(MAX_JOBS + 2):
            server.cron.figures.ended(Run(job=f"job:{number}", nominal=1, state=RunState.MISSED, first=1, due=1))
        families = await scraped(server)

    samples = families["kapsl_cron_outcomes"].samples
    assert len(samples) == MAX_JOBS + 1
    assert value(families, "kapsl_cron_outcomes", job=OTHER_JOBS) == 2

    counts = Counter({("failed", f"reason {number}"): 1 for number in range(60)})
    bounded = _bounded(counts)
    assert (len(bounded), sum(bounded.values()), bounded["failed", "(other)"]) == (51, 60, 10)
