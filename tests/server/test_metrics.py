"""`/metrics`: what a scraper reads."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from kapsl_scheduler import CronJob
from kapsl_scheduler.core.runs import Run, RunState
from kapsl_scheduler.runtime.cron_metrics import MAX_JOBS, OTHER_JOBS
from kapsl_scheduler.server.metrics import _bounded
from tests.server.api import Server, serving, serving_jobs
from tests.server.test_cron_http import ended, path_of, post, put


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
    assert value(families, "kapsl_cron_outcomes", cron_job="p:night", state="succeeded", reason="") == 2
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


@pytest.mark.parametrize("version", ["abc", "", "1.0.0.0.0"])
async def test_a_version_that_is_none_is_answered_in_some_form(version: str) -> None:
    async with serving() as server:
        accept = {"accept": f"application/openmetrics-text; version={version}; escaping=allow-utf-8"}
        response = await server.client.get("/metrics", headers=accept)
    assert response.status_code == 200
    assert "kapsl_build" in response.text


async def test_a_server_without_jobs_has_no_figures_of_them() -> None:
    async with serving() as server:
        families = await scraped(server)

    assert not [name for name in families if name.startswith("kapsl_cron")]
    assert value(families, "kapsl_build_info", version="1.2.3") == 1


async def register(server: Server, *ids: str) -> None:
    await server.cron.register_all(CronJob(id, "0 0 3 * * *", [[1.0, 2.0]], model="m") for id in ids)


async def test_each_job_has_figures_of_its_own() -> None:
    async with serving_jobs() as server:
        await register(server, "a", "b")
        for id in ("a", "b", "b"):
            await ended(server, (await post(server, "/trigger", id=id)).json()["number"])
        families = await scraped(server)

    for name in ("lateness", "duration"):
        family = families[f"kapsl_cron_job_{name}_seconds"]
        assert family.type == "histogram"
        counts = {s.labels["cron_job"]: s.value for s in family.samples if s.name.endswith("_count")}
        assert counts == {"a": 1, "b": 2, OTHER_JOBS: 0}
        bounds = [s.labels["le"] for s in family.samples if s.name.endswith("_bucket") and s.labels["cron_job"] == "b"]
        assert bounds == ["0.00128", "0.01024", "0.08192", "0.65536", "5.24288", "41.94304", "+Inf"]
        of_all = families[f"kapsl_cron_{name}_seconds"].samples
        assert next(s.value for s in of_all if s.name.endswith("_count")) == 3
    assert value(families, "kapsl_cron_ended", state="succeeded") == 3
    overdue = families["kapsl_cron_job_overdue_seconds"].samples
    assert {s.labels["cron_job"]: s.value for s in overdue} == {"a": 0, "b": 0, OTHER_JOBS: 0}


async def test_the_series_of_a_job_ends_with_it_and_no_counter_falls_or_jumps() -> None:
    async with serving_jobs() as server:
        await register(server, "a", "b")
        for id in ("a", "a", "b"):
            await ended(server, (await post(server, "/trigger", id=id)).json()["number"])
        before = await scraped(server)
        await server.client.delete(path_of("a"))
        after = await scraped(server)

    def counters(families: dict[str, Any]) -> dict[tuple[str, ...], float]:
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in families.values()
            if family.type in ("counter", "histogram") and family.name.startswith("kapsl_cron")
            for sample in family.samples
        }

    old, new = counters(before), counters(after)
    assert new == {key: number for key, number in old.items() if "a" not in key}
    assert old["kapsl_cron_ended_total", "succeeded"] == 3
    assert any("a" in key for key in old)


async def test_a_job_that_is_late_says_for_how_long() -> None:
    moved = 0.0
    async with serving_jobs(clock=lambda: time.time_ns() // 1000 + round(moved * 1e6)) as server:
        await server.cron.register(CronJob("often", 10.0, [[1.0, 2.0]], model="m"))
        await server.cron.register(CronJob("rarely", 3600.0, [[1.0, 2.0]], model="m"))
        moved = 70.0
        families = await scraped(server)

    assert value(families, "kapsl_cron_overdue") == 1
    assert 59 < value(families, "kapsl_cron_job_overdue_seconds", cron_job="often") < 65
    assert {s.labels["cron_job"] for s in families["kapsl_cron_job_overdue_seconds"].samples} == {"often", OTHER_JOBS}


async def test_the_series_of_jobs_and_of_reasons_are_bounded() -> None:
    async with serving_jobs() as server:
        ids = [f"job:{number}" for number in range(MAX_JOBS + 2)]
        await register(server, *ids)
        for id in ids:
            server.cron.figures.ended(Run(job=id, nominal=1, state=RunState.MISSED, first=1, due=1))
        families = await scraped(server)

    samples = families["kapsl_cron_outcomes"].samples
    assert len(samples) == MAX_JOBS + 1
    assert value(families, "kapsl_cron_outcomes", cron_job=OTHER_JOBS) == 2
    assert len(families["kapsl_cron_job_overdue_seconds"].samples) == MAX_JOBS + 1
    of_jobs = [family for family in families.values() if family.name.startswith("kapsl_cron")]
    assert sum(len(family.samples) for family in of_jobs) < 20 * (MAX_JOBS + 1) + 100

    counts = Counter({("failed", f"reason {number}"): 1 for number in range(60)})
    bounded = _bounded(counts)
    assert (len(bounded), sum(bounded.values()), bounded["failed", "(other)"]) == (51, 60, 10)
