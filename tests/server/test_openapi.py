"""The OpenAPI document: it has all routes of a server, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
from starlette.routing import Route

from kapsl_scheduler import CronScheduler
from kapsl_scheduler.app_jobs import Jobs
from kapsl_scheduler.app_models import Models
from kapsl_scheduler.config import Config
from kapsl_scheduler.server.cron import CronApi
from kapsl_scheduler.server.debug import DebugApi
from kapsl_scheduler.server.generate import GenerateApi
from kapsl_scheduler.server.http import HttpApi
from kapsl_scheduler.server.kapsl_http import KapslApi
from kapsl_scheduler.server.oip_http import OipApi
from kapsl_scheduler.server.openai import OpenAiApi
from kapsl_scheduler.server.openapi import OPERATIONS
from kapsl_scheduler.server.service import Service
from tests.server.api import Targets, serving

OF_JOBS = "/v2/cron/jobs/{rest}"  # one route for all that concerns a job


def paths_of(api: HttpApi) -> set[tuple[str, str]]:
    return {
        (method, re.sub(r":\w+\}", "}", route.path))
        for route in api._routes.routes
        if isinstance(route, Route)
        for method in (route.methods or ())
        if method != "HEAD"
    }


async def document(api: HttpApi) -> Any:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://server") as client:
        response = await client.get("/openapi.json")
    assert response.status_code == 200
    return response.json()


def listed(document: Any) -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}


async def test_every_route_is_described_and_nothing_else(tmp_path: Path) -> None:
    config = Config()
    async with serving() as plain, CronScheduler(Targets(plain.registry)) as cron:
        service = Service(plain.registry, version="1.2.3")
        models: Any = Models(config, plain.registry, Jobs(config), tmp_path)  # type: ignore[arg-type]
        api = HttpApi(
            service,
            parts=[
                OipApi(service, reload=models.reload, unload=models.unload),
                GenerateApi(service, max_body_bytes=1),
                OpenAiApi(service, max_body_bytes=1),
                KapslApi(service, models, max_body_bytes=1),
                CronApi(cron, plain.registry, service.check_open, max_body_bytes=1),
                DebugApi(service, cron, {}, lambda: ()),
            ],
        )
        found = await document(api)
    assert listed(found) == {(operation.method, operation.path) for operation in OPERATIONS}
    of_jobs = {(method, path) for method, path in listed(found) if path.startswith("/v2/cron/jobs/")}
    assert paths_of(api) - {(method, OF_JOBS) for method in ("GET", "PUT", "DELETE", "POST")} == listed(found) - of_jobs
    assert found["info"]["version"] == "1.2.3"


async def test_what_a_server_does_not_have_is_not_described() -> None:
    async with serving() as server:
        found = await document(server.api)
    assert not [
        path for path in found["paths"] if path.startswith(("/v2/cron", "/api", "/v1", "/v2/repository/models"))
    ]
    assert "/v2/models/{model}/infer" in found["paths"]


async def test_it_says_who_may_ask_and_shows_the_models_that_are_there() -> None:
    async with serving() as server:
        found = await document(server.api)
    assert found["paths"]["/v2/health/live"]["get"]["security"] == []
    infer = found["paths"]["/v2/models/{model}/infer"]["post"]
    assert "`reader`" in infer["description"]
    assert "`admin`" in found["paths"]["/v2/logging"]["post"]["description"]
    assert [one["schema"]["examples"] for one in infer["parameters"]] == [["m"]]


async def test_every_reference_leads_somewhere_and_no_two_operations_share_an_id() -> None:
    async with serving() as server:
        found = await document(server.api)
    schemas = found["components"]["schemas"]
    references = set(re.findall(r"'#/components/schemas/(\w+)'", str(found)))
    assert references <= set(schemas)
    ids = [operation["operationId"] for methods in found["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))
