"""`/debug`: what it shows of a running server, and what it must not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest

from kapsl_scheduler.config import load_config
from kapsl_scheduler.server.access import Role, made_token
from kapsl_scheduler.server.debug import DebugApi, without_secrets
from kapsl_scheduler.server.http import HttpApi
from tests.server.api import Gate, Server, serving, serving_jobs, until
from tests.server.test_cron_http import put

CONFIG = {"server": {"port": 8080, "admin_token": "hush"}}


class Open:
    client = ("10.0.0.1", 5000)
    pipeline = (1, 2)

    class cycle:  # noqa: N801  # uvicorn's name
        response_complete = False


@asynccontextmanager
async def debugging(server: Server, connections: tuple[Any, ...] = ()) -> AsyncIterator[httpx.AsyncClient]:
    service = server.api.inference.service
    part = DebugApi(service, server._cron, CONFIG, lambda: connections)
    transport = httpx.ASGITransport(HttpApi(service, parts=[part]))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


async def dump(server: Server, connections: tuple[Any, ...] = ()) -> dict[str, Any]:
    async with debugging(server, connections) as client:
        response = await client.get("/debug")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


async def test_it_shows_what_every_scheduler_holds() -> None:
    gate = Gate()
    async with serving(gate) as server:
        running = asyncio.create_task(server.infer())
        await gate.entered.wait()
        queued = asyncio.create_task(server.infer())
        await until(lambda: server.scheduler.statistics().queued == 1)
        found = await dump(server)
        gate.open.set()
        await asyncio.gather(running, queued)

    (model,) = found["models"]
    assert model["repr"] == "<Scheduler 'inner' ready: 1 queued, 1 running, 1 calls in flight of 1 slots>"
    assert model["statistics"]["queued"] == model["statistics"]["running"] == 1
    assert model["health"]["status"] == "ready"
    assert found["service"] == {
        "ready": True,
        "draining": False,
        "in_flight": 2,
        "max_in_flight": 4096,
        "refused": 0,
    }
    assert found["cron"] is None


async def test_it_shows_jobs() -> None:
    async with serving_jobs() as server:
        await put(server)
        found = await dump(server)

    assert found["cron"]["statistics"]["jobs"] == 1


async def test_it_shows_where_threads_and_tasks_are_and_none_of_their_values() -> None:
    stop = threading.Event()
    there = threading.Event()

    def waits_for_the_test(secret: str) -> None:
        there.set()
        stop.wait()

    async def sleeps(secret: str) -> None:
        await asyncio.Event().wait()

    thread = threading.Thread(target=waits_for_the_test, args=("a value",), name="lingering")
    thread.start()
    task = asyncio.create_task(sleeps("a value"), name="sleeper")
    try:
        there.wait()
        await asyncio.sleep(0)
        async with serving() as server:
            await server.infer((41.5, 42.5))
            found = await dump(server)
    finally:
        stop.set()
        thread.join()
        task.cancel()

    (shown,) = [each for each in found["threads"] if each["name"] == "lingering"]
    assert any(place.endswith("waits_for_the_test") and "test_debug.py:" in place for place in shown["stack"])
    (shown,) = [each for each in found["tasks"]["shown"] if each["name"] == "sleeper"]
    assert shown["coroutine"].endswith("sleeps")
    assert [place for place in shown["stack"] if "test_debug.py:" in place]
    assert found["tasks"]["number"] == len(found["tasks"]["shown"])
    text = str(found)
    assert "a value" not in text
    assert "42.5" not in text


async def test_it_shows_connections_and_versions() -> None:
    async with serving() as server:
        found = await dump(server, (Open(), object()))

    assert found["connections"] == {
        "number": 2,
        "shown": [
            {"client": "10.0.0.1:5000", "busy": True, "waiting": 2},
            {"client": None, "busy": False, "waiting": 0},
        ],
    }
    assert {"python", "numpy", "kapsl-scheduler"} <= set(found["versions"])


async def test_it_shows_the_configuration_without_secrets() -> None:
    async with serving() as server:
        found = await dump(server)

    assert found["config"] == {"server": {"port": 8080, "admin_token": "(hidden)"}}


def test_a_servers_own_settings_hide_who_may_ask() -> None:
    _, line = made_token("ann", Role.ADMIN)
    config = load_config(flags={"port": 8081}, environment={"KAPSL_TOKENS_TEXT": line})
    shown = without_secrets(msgspec.to_builtins(config, enc_hook=str))
    assert shown["tokens"] == "(hidden)"
    assert shown["server"]["port"] == 8081
    assert config.tokens[0].digest not in str(shown)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"tokens": ["a"]}, {"tokens": "(hidden)"}),
        ({"db_password": "x", "password": None}, {"db_password": "(hidden)", "password": None}),
        ({"a": [{"api_key": "x", "key": "y"}]}, {"a": [{"api_key": "(hidden)", "key": "y"}]}),
        ("postgres://me:pass@host/db", "postgres://(hidden)@host/db"),
        ("https://me:p@ss@host/v1?api_key=x&a=b#c", "https://(hidden)@host/v1?(hidden)#c"),
        ("http://host:4318/v1@2", "http://host:4318/v1@2"),
        ("what is it? a text", "what is it? a text"),
        (("plain", 1, 2.5, None, True), ["plain", 1, 2.5, None, True]),
    ],
)
def test_secrets_are_hidden_by_name_and_users_and_queries_in_urls(value: Any, shown: Any) -> None:
    assert without_secrets(value) == shown


async def test_a_request_for_it_changes_nothing() -> None:
    async with serving() as server:
        before = server.scheduler.statistics()
        await dump(server)
        assert server.scheduler.statistics() == before
