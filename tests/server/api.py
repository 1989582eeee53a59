"""The application in process over one model, with jobs or without, for the tests of its routes: a client of it, and
bare ASGI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from kapsl_scheduler import BatchPolicy, CronScheduler, QueueOverflowPolicy, QueuePolicy, Scheduler
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.ports import CronTarget, JobStore
from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.server.access import Guard
from kapsl_scheduler.server.cron import NO_JOBS, CronApi
from kapsl_scheduler.server.http import HttpApi, Part
from kapsl_scheduler.server.metrics import Metrics
from kapsl_scheduler.server.oip_http import OipApi
from kapsl_scheduler.server.service import Service
from kapsl_scheduler.server.tracing import Tracing

Function = Callable[..., Any]


class Gate:
    """A model that answers when it is told to. It doubles its input."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.open = asyncio.Event()
        self.calls = 0

    async def __call__(self, x: Any) -> Any:
        self.calls += 1
        self.entered.set()
        await self.open.wait()
        return x * 2


async def double(x: Any) -> Any:
    return x * 2


class Server:
    """The application over one model named `m`, and a client of it."""

    def __init__(
        self, registry: ModelRegistry[Function], scheduler: Scheduler, cron: CronScheduler | None = None, **limits: Any
    ) -> None:
        self.registry = registry
        self.scheduler = scheduler
        self._cron = cron
        self.api = api_over(registry, cron=cron, **limits)
        transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://server")

    @property
    def cron(self) -> CronScheduler:
        assert self._cron is not None
        return self._cron

    async def infer(self, data: Any = (1, 2), path: str = "/v2/models/m/infer", **keys: Any) -> httpx.Response:
        return await self.client.post(path, content=body_of(data, **keys))


def api_over(
    registry: ModelRegistry[Function],
    *,
    version: str = "1.2.3",
    cron: CronScheduler | None = None,
    max_body_bytes: int = 64 << 20,
    max_in_flight: int = 4096,
    guard: Guard | None = None,
    access_log: bool = False,
    tracing: Tracing | None = None,
    **repository: Any,
) -> HttpApi:
    """The application as the server puts it together. `repository` may have `reload` and `unload`."""
    service = Service(registry, version=version, max_in_flight=max_in_flight, tracing=tracing)
    parts: list[Part] = [OipApi(service, **repository)]
    if cron is not None:
        parts.append(CronApi(cron, registry, service.check_open, max_body_bytes=max_body_bytes))
    return HttpApi(
        service,
        max_body_bytes=max_body_bytes,
        metrics=Metrics(service, cron),
        parts=parts,
        absent=NO_JOBS,
        guard=guard,
        access_log=access_log,
    )


class Targets:
    """The models of a registry, as jobs see them."""

    def __init__(self, registry: ModelRegistry[Function]) -> None:
        self._registry = registry

    def target(self, model: str) -> CronTarget:
        return self._registry.get(model).scheduler


def body_of(data: Any = (1, 2), **keys: Any) -> bytes:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": data}
    return json.dumps({"inputs": [tensor], **keys}).encode()


@asynccontextmanager
async def serving(
    function: Function = double,
    *,
    max_body_bytes: int = 10_000,
    max_in_flight: int = 4096,
    max_batch_size: int = 32,
    tracing: Tracing | None = None,
    **policy: Any,
) -> AsyncIterator[Server]:
    schedulers = []

    async def start(function: Function) -> Scheduler:
        engine = CallableEngine(
            function,
            name="inner",
            version="3",
            inputs={"x": ("float32", (None, 2))},
            outputs={"y": ("float32", (None, 2))},
        )
        queue = QueuePolicy(overflow=QueueOverflowPolicy.DROP_NEWEST, **policy)
        batch = BatchPolicy(max_batch_size=max_batch_size)
        observer = None if tracing is None else tracing.observer("m")
        schedulers.append(await Scheduler([engine], batch=batch, queue=queue, observer=observer).__aenter__())
        return schedulers[-1]

    async with ModelRegistry(start) as registry:
        await registry.load("m", function)
        limits = {"max_body_bytes": max_body_bytes, "max_in_flight": max_in_flight}
        server = Server(registry, schedulers[0], tracing=tracing, **limits)
        async with server.client:
            yield server


def assert_error(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body["code"] == code
    message = body["error"]
    assert isinstance(message, str)
    assert message
    return message


async def until(condition: Callable[[], bool]) -> None:
    """Lets other tasks run until the condition holds; it must come to hold without any time passing."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition did not come to hold")


async def settled(condition: Callable[[], bool]) -> None:
    """Until what has been sent, or begun in a thread, has come through."""
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.001)


async def exchange(
    api: HttpApi,
    messages: list[dict[str, Any]],
    *,
    headers: list[tuple[bytes, bytes]] | None = None,
    gone: Awaitable[Any] | None = None,
    path: str = "/v2/models/m/infer",
) -> tuple[int, int]:
    """One inference over bare ASGI: `messages`, then a disconnect once `gone` is done. Status and messages read."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "root_path": "",
        "headers": headers or [],
    }
    sent: list[dict[str, Any]] = []
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        if read < len(messages):
            read += 1
            return messages[read - 1]
        await (gone or asyncio.Event().wait())
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await api(scope, receive, send)
    return sent[0]["status"], read


@asynccontextmanager
async def serving_jobs(
    function: Function = double, *, store: JobStore | None = None, max_body_bytes: int = 10_000, **cron_options: Any
) -> AsyncIterator[Server]:
    """The application with a scheduler of jobs, which end at once when it is left."""
    async with serving(function) as plain:
        cron = CronScheduler(Targets(plain.registry), store=store, **cron_options)
        async with cron:
            server = Server(plain.registry, plain.scheduler, cron, max_body_bytes=max_body_bytes)
            async with server.client:
                yield server
            await cron.close(0.0)
