"""The dashboard's pages and their stream, in process: what is served how, what a second says, what is bounded."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kapsl_scheduler import Priority, Scheduler
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.server.access import Access, Guard, Role, made_token, tokens_of
from kapsl_scheduler.server.dashboard import live, pages
from kapsl_scheduler.server.dashboard.live import Live
from kapsl_scheduler.server.dashboard.pages import Pages
from kapsl_scheduler.server.dashboard.samples import Sampler
from kapsl_scheduler.server.http import HttpApi
from kapsl_scheduler.server.service import Service
from tests.server.api import Gate, Server, assert_error, double, serving, serving_jobs, until

STATIC = Path(pages.__file__).with_name("static")
VIEWS = (
    "/",
    "/models",
    "/models/a%2Fb",
    "/models/m/versions/2",
    "/jobs",
    "/jobs/p%3Anight",
    "/runs",
    "/runs/7",
    "/events",
)


class Dashboard:
    """The pages and the stream over a server's models and jobs, and a client of them."""

    def __init__(self, server: Server, *, jobs: bool = False, guard: Guard | None = None) -> None:
        self.server = server
        self.service = Service(server.registry, version="1.2.3")
        self.pages = Pages()
        stream = Live(self.service, server.cron if jobs else None, pages=self.pages.digest)
        self.api = HttpApi(self.service, parts=[self.pages, stream], guard=guard)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.api), base_url="http://server")


@asynccontextmanager
async def dashboard() -> AsyncIterator[Dashboard]:
    async with serving() as server:
        shown = Dashboard(server)
        async with shown.client:
            yield shown


class Listener:
    """A page's stream over bare ASGI."""

    def __init__(self, api: HttpApi, headers: list[tuple[bytes, bytes]]) -> None:
        self.gone = asyncio.Event()
        self.said: list[tuple[str, Any]] = []
        self.complete = False
        self._api = api
        self._headers = headers
        self._more = asyncio.Event()

    async def listen(self) -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/dashboard/live",
            "query_string": b"",
            "headers": self._headers,
        }
        await self._api(scope | {"root_path": ""}, self._receive, self._send)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for more to come until the condition holds."""
        async with asyncio.timeout(5):
            while not condition():
                self._more.clear()
                await self._more.wait()

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
            if message["body"]:
                kind, data = message["body"].decode().splitlines()[:2]
                self.said.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
            self._more.set()


@asynccontextmanager
async def listening(shown: Dashboard, headers: list[tuple[bytes, bytes]] | None = None) -> AsyncIterator[Listener]:
    listener = Listener(shown.api, headers or [])
    task = asyncio.create_task(listener.listen())
    await until(lambda: bool(listener.said))
    try:
        yield listener
    finally:
        listener.gone.set()
        await task


# -------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("path", VIEWS)
async def test_every_view_has_an_address(path: str) -> None:
    async with dashboard() as shown:
        response = await shown.client.get(path)

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert 'id="app"' in response.text


async def test_a_page_is_asked_for_each_time_and_sent_once() -> None:
    async with dashboard() as shown:
        first = await shown.client.get("/")
        again = await shown.client.get("/jobs", headers={"if-none-match": first.headers["etag"]})

    assert first.headers["cache-control"] == again.headers["cache-control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")


async def test_its_files_may_be_kept_for_ever_under_the_address_of_their_version() -> None:
    async with dashboard() as shown:
        page = (await shown.client.get("/")).text
        addresses = re.findall(r'(?:src|href)="([^"]+)"', page)
        files = [await shown.client.get(address) for address in addresses]
        other = await shown.client.get(addresses[0].replace(shown.pages.digest, "0" * 16))

    assert len(addresses) >= 5
    assert all(address.startswith(f"/dashboard/static/{shown.pages.digest}/") for address in addresses)
    assert {file.status_code for file in files} == {200}
    assert {file.headers["cache-control"] for file in files} == {"public, max-age=31536000, immutable"}
    assert {file.headers["content-type"].partition(";")[0] for file in files} == {
        "text/javascript",
        "text/css",
        "image/svg+xml",
    }
    assert_error(other, 404, "not_found")


@pytest.mark.parametrize("name", ["none.js", "../pages.py", "..%2Fpages.py", "%2Fetc%2Fpasswd", "index.html"])
async def test_nothing_but_its_files_is_served(name: str) -> None:
    async with dashboard() as shown:
        response = await shown.client.get(f"/dashboard/static/{shown.pages.digest}/{name}")

    assert response.status_code == 404


async def test_modules_and_page_may_load_from_here_only() -> None:
    async with dashboard() as shown:
        page = await shown.client.get("/")
        script = await shown.client.get(f"/dashboard/static/{shown.pages.digest}/app.js")

    for response in (page, script):
        assert sorted(response.headers["content-security-policy"].split("; ")) == [
            "base-uri 'none'",
            "connect-src 'self'",
            "default-src 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "img-src 'self'",
            "script-src 'self'",
            "style-src 'self'",
        ]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"<style|<script>|\son\w+=|\sstyle=", page.text)


async def test_long_files_are_packed_for_who_takes_that() -> None:
    async with dashboard() as shown:
        address = f"/dashboard/static/{shown.pages.digest}/vendor/uplot.js"
        packed = await shown.client.get(address, headers={"accept-encoding": "gzip"})
        plain = await shown.client.get(address, headers={"accept-encoding": "identity"})

    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == plain.content
    assert int(packed.headers["content-length"]) < len(plain.content) / 2


def test_what_others_have_written_is_as_they_published_it() -> None:
    folder = STATIC / "vendor"
    listed = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name not in ("README.md", "SHA256SUMS")
    }

    assert found == listed
    assert {"htm.LICENSE", "preact.LICENSE", "uplot.LICENSE"} <= set(found)


def test_no_module_of_ours_is_missing_or_fetched_from_elsewhere() -> None:
    for module in STATIC.glob("*.js"):
        for imported in re.findall(r'from "([^"]+)"', module.read_text()):
            assert imported.startswith("./")
            assert (STATIC / imported).is_file(), f"{module.name} imports {imported}"


# -------------------------------------------------------------------------------------------------- access


@pytest.mark.parametrize("role", list(Role))
async def test_pages_are_for_everybody_and_what_they_show_is_for_who_has_a_token(role: Role) -> None:
    text, line = made_token("ann", role)
    guard = Guard(Access(tokens_of(line, "here")), None)
    async with serving() as server:
        shown = Dashboard(server, guard=guard)
        async with shown.client:
            page = (await shown.client.get("/")).text
            addresses = [*VIEWS, *re.findall(r'(?:src|href)="([^"]+)"', page)]
            open_to_all = {(await shown.client.get(address)).status_code for address in addresses}
            posted = {(await shown.client.post(path)).status_code for path in VIEWS}
            assert_error(await shown.client.get("/dashboard/live"), 401, "unauthorized")
            async with listening(shown, headers=[(b"authorization", f"Bearer {text}".encode())]) as listener:
                greeted = listener.said[0][0]

    assert (open_to_all, posted, greeted) == ({200}, {401}, "hello")
    assert not any(word in page for word in ("1.2.3", '"m"'))  # neither its version nor its model


# ------------------------------------------------------------------------------------------------- samples


async def test_a_sample_says_what_happened_since_the_one_before() -> None:
    async with serving() as server:
        now = 100.0
        sampler = Sampler(Service(server.registry, version="1"), None, clock=lambda: now)
        first = sampler.latest().sample.models[0]
        for _ in range(4):
            await server.scheduler.infer([[1.0, 2.0]], priority=Priority.THROUGHPUT)
        await server.scheduler.infer([[1.0, 2.0], [3.0, 4.0]], priority=Priority.LATENCY_CRITICAL)
        now += 2.0
        number, sample = sampler.latest()
        now += 1.0
        quiet = sampler.latest().sample.models[0]

    assert (first.requests, first.busy, first.classes["throughput"].p99, first.batches) == (None, None, None, {})
    model = sample.models[0]
    assert (number, model.name, model.requests, model.rows, model.failed) == (2, "m", 2.5, 3.0, 0.0)
    assert (model.classes["throughput"].rate, model.classes["latency_critical"].rate) == (2.0, 0.5)
    slow, slower = model.classes["throughput"].p50, model.classes["throughput"].p99
    assert slow is not None
    assert slower is not None
    assert 0 < slow <= slower < 1
    assert model.classes["background"].p99 is None
    assert model.batches == {1: 4, 2: 1}
    assert model.busy is not None
    assert 0 < model.busy < 1
    assert (quiet.requests, quiet.busy, quiet.batches) == (0.0, 0.0, {})
    assert (quiet.classes["throughput"].rate, quiet.classes["throughput"].p99) == (0.0, None)


async def test_a_sample_counts_what_waits_and_what_was_refused() -> None:
    gate = Gate()
    async with serving(gate, max_size=1, max_batch_size=1) as server:
        now = 0.0
        sampler = Sampler(Service(server.registry, version="1"), None, clock=lambda: now)
        sampler.latest()
        async with asyncio.TaskGroup() as group:
            group.create_task(server.scheduler.infer([[1.0, 2.0]]))
            await gate.entered.wait()
            group.create_task(server.scheduler.infer([[1.0, 2.0]], priority=Priority.THROUGHPUT))
            await until(lambda: server.scheduler.statistics().queued == 1)
            refused = await server.infer(parameters={"priority": 2})
            now += 1.0
            model = sampler.latest().sample.models[0]
            gate.open.set()

    assert_error(refused, 429, "overloaded")
    assert (model.queued, model.classes["throughput"].queued, model.calls_in_flight) == (1, 1, 1)
    assert (model.refused, model.requests) == (1.0, 0.0)


async def test_listeners_share_a_sample_and_averages_over_long_gaps_are_not_made() -> None:
    async with serving() as server:
        now = 0.0
        sampler = Sampler(Service(server.registry, version="1"), None, clock=lambda: now)
        numbers = [sampler.latest().number]
        for moment in (0.5, 1.0, 1.4):
            now = moment
            numbers += [sampler.latest().number]
        rates = [sample.models[0].requests for sample in sampler.history()]
        now = 60.0
        late = sampler.latest().sample.models[0]

    assert numbers == [1, 1, 2, 2]
    assert rates == [None, 0.0]
    assert late.requests is None


async def test_versions_side_by_side_are_told_apart() -> None:
    schedulers: list[Scheduler] = []

    async def start(version: str) -> Scheduler:
        engine = CallableEngine(double, version=version, inputs={"x": ("float32", (None, 2))})
        schedulers.append(await Scheduler([engine]).__aenter__())
        return schedulers[-1]

    async with ModelRegistry(start) as registry:
        await registry.load("m", "10")
        await registry.load("m", "9")
        now = 0.0
        sampler = Sampler(Service(registry, version="1"), None, clock=lambda: now)
        sampler.latest()
        await schedulers[1].infer([[1.0, 2.0]])
        now = 1.0
        models = sampler.latest().sample.models

    assert [(model.version, model.latest, model.requests) for model in models] == [("9", False, 1.0), ("10", True, 0.0)]


async def test_a_model_that_was_replaced_begins_anew() -> None:
    async with serving() as server:
        now = 0.0
        sampler = Sampler(Service(server.registry, version="1"), None, clock=lambda: now)
        await server.scheduler.infer([[1.0, 2.0]])
        sampler.latest()
        await server.registry.replace("m", double)
        now = 1.0
        model = sampler.latest().sample.models[0]

    assert (model.requests, model.succeeded) == (None, 0)


# ------------------------------------------------------------------------------------------------- stream


async def test_the_stream_says_who_it_is_then_each_second_what_has_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kapsl_scheduler.server.dashboard.samples._EARLY", 1.0)  # a sample whenever one is asked for
    monkeypatch.setattr(live, "PERIOD", 0.001)
    async with serving_jobs() as server:
        shown = Dashboard(server, jobs=True)
        async with listening(shown) as listener:
            definition = {"schedule": "0 0 3 * * *", "model": "m", "value": [[1, 2]]}
            await server.client.put("/v2/cron/jobs/night", content=json.dumps(definition))
            await server.client.post("/v2/cron/jobs/night/trigger")
            await listener.until(lambda: any(event["kind"] == "ended" for event in told(listener)))

    kind, hello = listener.said[0]
    assert (kind, hello["version"], hello["pages"]) == ("hello", "1.2.3", shown.pages.digest)
    assert [model["name"] for model in hello["history"][0]["models"]] == ["m"]
    assert [event["kind"] for event in told(listener)][:3] == ["registered", "started", "ended"]
    assert told(listener)[2]["run"]["state"] == "succeeded"
    assert listener.said[-1][1]["sample"]["cron"]["jobs"] == 1


def told(listener: Listener) -> list[dict[str, Any]]:
    return [event for kind, data in listener.said if kind == "second" for event in data["events"]]


async def test_too_many_events_are_counted_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_EVENTS", 2)
    async with serving_jobs() as server:
        events = server.cron.events()
        collected = live._Collected()
        following = asyncio.create_task(collected.follow(events))
        for hour in range(3):
            definition = {"schedule": f"0 0 {hour} * * *", "model": "m", "value": [[1, 2]]}
            await server.client.put(f"/v2/cron/jobs/{hour}", content=json.dumps(definition))
        await asyncio.sleep(0)
        happened, lost = collected.take()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await events.aclose()

    assert ([event["job"] for event in happened], lost) == (["1", "2"], 1)
    assert collected.take() == ([], 0)


async def test_pages_that_look_are_bounded_and_those_that_go_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST", 1)
    async with dashboard() as shown:
        async with listening(shown):
            assert_error(await shown.client.get("/dashboard/live"), 429, "overloaded")
        async with listening(shown) as listener:
            assert listener.said[0][0] == "hello"


async def test_the_stream_ends_when_the_server_begins_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PERIOD", 0.001)
    async with dashboard() as shown, listening(shown) as listener:
        shown.service.draining = True
        await listener.until(lambda: listener.complete)
        assert_error(await shown.client.get("/dashboard/live"), 503, "unavailable")
